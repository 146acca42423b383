"""Makes hostile targets of `inspect` and hostile values of LIGHTNING_REVBN from a seed."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["environment_value", "target"]

_PIECES = (
    *("x", "bn1", "layer1.0.bn1", "type", "train", "..", ".", "", "_orig_mod", "running_mean", "a" * 300, "层", "é"),
    *(
        "\x1b[31m",
        "\n",
        "\r",
        "\t",
        "\x07",
        "\u202e",
        "\udcff",
        "\x9b",
        "[/x]",
        "[red]",
        "[link=x]",
        ":smile:",
        "$\\frac$",
    ),
    *("%s", "{}", "'", '"', "\\", "/", "//", ":", "=", ",", "*", "&", "#", "--", "-", "1e308", "9" * 4301, "nan", "0"),
    *("s3://", "https://", "file:", "C:\\", "~/", ".py:", ".ckpt", ".pt", "torchvision:", "timm:", "resnet18", "json:"),
    *("torch.nn:", "BatchNorm1d", "ReLU", "math:", "pi", "collections:OrderedDict", "no_such_module:", "sys:exit"),
)
_PARTS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def _text(random_: random.Random) -> str:
    return "".join(random_.choices(_PIECES, k=random_.randint(1, 5)))


def _tensor(random_: random.Random, channels: int) -> Tensor:
    """Return a tensor; most of these tensors have the shape and dtype of a batch norm layer's."""
    shape = (channels,) if random_.random() < 0.7 else random_.choice([(), (0,), (3, channels), (channels + 1,), (1,)])
    values = torch.full(shape, random_.choice([0.0, 0.1, 1.0, -1.0, float("nan"), float("inf"), 1e38, 1e-45]))
    kinds: list[Callable[[Tensor], Tensor]] = [
        lambda own: own.half(),
        lambda own: own.bfloat16(),
        lambda own: own.double(),
        lambda own: own.to(torch.float8_e5m2),
        lambda own: own.to("meta"),
        lambda own: own.cfloat(),
        lambda own: torch.ones(shape, dtype=torch.int64),
        lambda own: torch.ones(shape, dtype=torch.bool),
        lambda own: own.reshape(-1).to_sparse(),
        lambda own: torch.quantize_per_tensor(torch.ones(shape), 0.1, 0, torch.quint8),
        lambda own: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda own: torch.ones(1).expand(10**9),
        lambda own: torch.ones(20_000).as_strided((10_000, 10_000), (1, 1)),
        lambda own: torch.arange(2.0 * channels)[::2],
    ]
    return random_.choice(kinds)(values) if random_.random() < 0.4 else values


def _anything(random_: random.Random, depth: int = 0) -> Any:
    plain = [None, True, 0, -1, 2**70, 0.1, 100.0, float("nan"), "x", "\x1b[2J", "keep", torch.ones(3)]
    kind = random_.random()
    if depth > 3 or kind < 0.6:
        return random_.choice(plain)
    if kind < 0.75:
        inner = _anything(random_, depth + 1)
        return [inner] * random_.randint(0, 10)  # the same object many times
    keys = (
        "scale",
        "scale_lr_divisor",
        "zero_kept",
        "monitor",
        "start",
        "shift",
        "layers",
        "channels",
        "values",
        "kind",
    )
    more = ("count", "mean", "m2", "samples", "input_range", "input_norm", "eps_by_layer", "bn1", 3, None)
    return {random_.choice((*keys, *more)): _anything(random_, depth + 1) for _ in range(random_.randint(0, 8))}


def _checkpoint(random_: random.Random, path: Path) -> None:
    layers: dict[Any, Any] = {}
    for _ in range(random_.randint(1, 6)):
        name = random_.choice([_text(random_), ".".join("x" * random_.choice((3, 2000))), "bn1"])
        channels = random_.randint(1, 5)
        layers.update({f"{name}.{part}": _tensor(random_, channels) for part in _PARTS if random_.random() < 0.95})
    state = {"callbacks": {"RevisitedBatchNorm": _anything(random_), "other": _anything(random_)}, "epoch": 1}
    run = {**state, "Data": {"input_norm": _anything(random_)}, "global_step": _anything(random_)}
    lit = {**run, "state_dict": layers}
    content: Any = random_.choice([layers, {"state_dict": layers}, *[lit] * 4, _anything(random_)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about kinds of tensors that torch deprecates
        torch.save(content, path, _use_new_zipfile_serialization=random_.random() < 0.8)
    if random_.random() < 0.15:
        damaged = bytearray(path.read_bytes())
        for _ in range(random_.randint(1, 20)):
            damaged[random_.randrange(len(damaged))] = random_.randrange(256)
        path.write_bytes(damaged[: random_.randint(1, len(damaged))] if random_.random() < 0.5 else damaged)


def target(seed: int, folder: Path) -> str:
    """Make a target.

    Args:
        seed: Equal seeds make equal targets.
        folder: Directory for checkpoints.

    Returns:
        A text, or the path of a file.
    """
    random_ = random.Random(seed)
    if random_.random() < 0.4:
        return _text(random_)
    path = folder / random_.choice(["model.ckpt", "run[red].pt", "ru\x1b[2Jn.pt", "层.pt"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _checkpoint(random_, path)
    return str(path)


_KEYS = ("scale", "scale_lr_divisor", "eps", "include", "exclude", "monitor", "enabled", "zero_scale", "trained", "x")
_VALUES = (
    *("0.1", "1e-1", "-1", "nan", "inf", "true", "null", "'keep'", "[]", "[a, b]", "{'*': 0.1}", "{a: [b]}", "''"),
    *(
        "9" * 5000,
        "(" * 3000,
        "[" * 3000,
        "\x1b[2J",
        "*a",
        "&a [*a]",
        "[[[1]]]",
        "{every_n_steps: 3}",
        "\u202e",
        "\x00",
    ),
    *("{activations: 'false'}", "{prefix: 3}", "{prefix: a, prefix: b}", "2001-01-01", "!!python/object:os.system x"),
    *("0.1+2j", "b'x'", "|\n  text", "word " * 5000, "\udcff"),
)
_GOOD = (
    *(("scale", "0.25"), ("scale", "1e-1"), ("eps", "0.001"), ("include", "'*'"), ("monitor", "false")),
    *(("zero_scale", "overwrite"), ("trained", "keep"), ("enabled", "true"), ("shift_lr_multiplier", "3")),
)


def environment_value(seed: int, folder: Path) -> str:
    """Make a value of LIGHTNING_REVBN.

    Args:
        seed: Equal seeds make equal values.
        folder: Directory for YAML files.

    Returns:
        A text, or the path of a file.
    """
    random_ = random.Random(seed)
    pairs = [
        random_.choice(_GOOD) if random_.random() < 0.7 else (random_.choice(_KEYS), random_.choice(_VALUES))
        for _ in range(random_.randint(1, 4))
    ]
    kind = random_.random()
    if kind < 0.4:
        return ",".join(f"{key}={value}" for key, value in pairs) or _text(random_)
    if kind < 0.5:
        return _text(random_)
    lines = [f"{key}: {value}" for key, value in pairs]
    if random_.random() < 0.2:
        lines = ["a0: &a0 [0.1]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)), *lines]
    file = folder / "revbn.yaml"
    file.write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")
    if random_.random() < 0.2:
        file.write_bytes(random_.randbytes(200))
    return str(file)
