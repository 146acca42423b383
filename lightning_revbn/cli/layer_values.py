"""Describes the layers of a target as plain values: the facts, the verdict, and statistics of scale and shift."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_revbn.cli.checkpoint_layers import BatchNorm, Modules, OddLayer, known_layers
from lightning_revbn.core.affine_statistics import AffineStatistics
from lightning_revbn.core.initialization import InitReport
from lightning_revbn.core.layers import BatchNormRecord, Verdict, find_batch_norms
from lightning_revbn.core.metric_keys import AFFINE_KINDS, affine_quantity, metric_key
from lightning_revbn.core.module_names import unwrapped
from lightning_revbn.core.printable import error_text

__all__ = ["SHOWN", "UNKNOWN", "counts", "describe_checkpoint", "describe_model"]

SHOWN = ("mean", "std", "min", "max")
"""The statistics shown for a scale or shift."""
UNKNOWN = "unknown"
"""The verdict on a layer that cannot be judged."""
_ATTRIBUTES = {"scale": "weight", "shift": "bias"}


def describe_model(model: nn.Module) -> list[dict[str, Any]]:
    """Describe the batch norm layers of a model.

    Args:
        model: The model.

    Returns:
        A dict for each layer, as in `InitReport.to_dict()`, with `"scale"` and `"shift"`: the statistics, or None.
    """
    try:
        records = find_batch_norms(model)
    except Exception:  # of an odd layer, or of more levels of modules than Python's recursion can walk
        return [layer for name, module in _walk(model) for layer in _describe_alone(name, module)]
    return [_describe(record) for record in records]


def describe_checkpoint(layers: Mapping[str, BatchNorm | OddLayer]) -> list[dict[str, Any]]:
    """Describe the batch norm layers of a checkpoint.

    Args:
        layers: The layers by name.

    Returns:
        The same as `describe_model` returns, with odd layers among them.
    """
    found = {record.module: _describe(record) for record in find_batch_norms(known_layers(layers))}
    return [
        _odd(name, BatchNorm.__name__, layer.channels, layer.reason) if isinstance(layer, OddLayer) else found[layer]
        for name, layer in layers.items()
    ]


def counts(layers: list[dict[str, Any]]) -> dict[str, int]:
    """Count the verdicts.

    Args:
        layers: The layers.

    Returns:
        The number of layers by verdict; `UNKNOWN` is a key only if some layer could not be judged.
    """
    verdicts = [layer["verdict"] for layer in layers]
    found = {verdict: verdicts.count(verdict) for verdict in get_args(Verdict)}
    return found | ({UNKNOWN: verdicts.count(UNKNOWN)} if UNKNOWN in verdicts else {})


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module once, in the order of `named_modules`, for any number of levels."""
    seen: set[int] = set()
    waiting = [("", model)]  # a stack: modules may nest deeper than Python recurses
    while waiting:
        name, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        own = [(part, child) for part, child in vars(module)["_modules"].items() if child is not None]
        waiting += [(f"{name}.{part}" if name else part, child) for part, child in reversed(own)]


def _describe_alone(name: str, module: nn.Module) -> list[dict[str, Any]]:
    """Describe a module of a model in which some layer cannot be judged; return [] if it is not batch norm."""
    try:
        return [_describe(record) for record in find_batch_norms(Modules({name: module}))]
    except Exception as error:
        # Tensors of an odd kind may raise any error, and the error is the reason that is shown.
        return [_odd(unwrapped(name), type(module).__name__, _channels(module), _text(error))]


def _describe(record: BatchNormRecord) -> dict[str, Any]:
    (layer,) = InitReport((record,)).to_dict()["layers"]
    layer.update(dict.fromkeys(AFFINE_KINDS))
    if any(_has_no_values(getattr(record.module, attribute, None)) for attribute in _ATTRIBUTES.values()):
        return layer
    try:
        # Layer by layer: tensors of a checkpoint may share memory, and copies of all at once would need much more.
        values = AffineStatistics((record,)).compute()
    except Exception as error:
        return layer | {"reason": f"{layer['reason']}; its values cannot be read: {_text(error)}"}
    for kind in AFFINE_KINDS:
        keys = {statistic: metric_key("", record.name, affine_quantity(kind, statistic)) for statistic in SHOWN}
        if keys["std"] in values:
            layer[kind] = {statistic: values[key] for statistic, key in keys.items()}
    return layer


def _has_no_values(value: object) -> bool:
    return isinstance(value, Tensor) and (value.is_meta or is_lazy(value))


def _odd(name: str, kind: str, channels: int, reason: str) -> dict[str, Any]:
    nothing = dict.fromkeys(("target", "copy_of", "eps", "eps_before", *AFFINE_KINDS))
    known = {"name": unwrapped(name), "class": kind, "channels": channels, "verdict": UNKNOWN, "state": UNKNOWN}
    return {**known, "reason": reason, **nothing}


def _channels(module: nn.Module) -> int:
    channels: object = getattr(module, "num_features", 0)
    return channels if isinstance(channels, int) else 0


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error_text(error, 200)}"
