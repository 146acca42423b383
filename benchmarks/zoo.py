"""Rewrites every torchvision and timm model that has batch norm, and checks that exactly the right values changed.

Models have random weights. The number of scales found must equal an independent count by parameter identity. After the
rewrite, every fresh scale must have the target, and every other tensor must be unchanged to the bit. Prints totals, and
every model that failed a check. `--sample 20` checks about 20 models of each library, evenly spaced.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
import torchvision
from rich.progress import track
from torch import Tensor, nn

from lightning_revbn import init_batch_norms

TARGET = 0.1


def torchvision_models() -> dict[str, Callable[[], nn.Module]]:
    """Return a constructor for every model of torchvision, without pretrained weights, so without a download."""

    def constructor(name: str) -> Callable[[], nn.Module]:
        builder = torchvision.models.get_model_builder(name)
        accepted = inspect.signature(builder).parameters
        options: dict[str, Any] = {key: None for key in ("weights", "weights_backbone") if key in accepted}
        if "init_weights" in accepted:
            options["init_weights"] = False  # the initialisation of Inception takes minutes
        return lambda: builder(**options)

    return {f"torchvision:{name}": constructor(name) for name in torchvision.models.list_models()}


def timm_models() -> dict[str, Callable[[], nn.Module]]:
    """Return a constructor for every architecture of timm, without pretrained weights."""
    return {f"timm:{name}": lambda name=name: timm.create_model(name, pretrained=False) for name in timm.list_models()}


def has_batch_norm(build: Callable[[], nn.Module]) -> bool | None:
    """Tell whether a model has batch norm layers, without memory for its weights; None if it cannot be built so."""
    try:
        with torch.device("meta"):
            model = build()
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AssertionError):
        return None
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules())


def count_scales(model: nn.Module) -> tuple[int, int, int]:
    """Count distinct scales by identity, without the package: all scales, scales at 1, scales at 0."""
    scales = {
        id(layer.weight): layer.weight
        for layer in model.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.weight is not None
    }
    ones = sum(bool((scale == 1).all()) for scale in scales.values())
    zeros = sum(bool((scale == 0).all()) for scale in scales.values())
    return len(scales), ones, zeros


def fingerprint(tensor: Tensor) -> tuple[Any, ...]:
    """Describe a tensor in a few numbers: the sums of all 32-bit words and of every seventh word, and its version."""
    # _version counts writes in place, even writes of equal values.
    flat = tensor.detach().contiguous().view(-1)
    if flat.dtype == torch.float32:
        words = flat.view(torch.int32)
        return int(words.sum(dtype=torch.int64)), int(words[::7].sum(dtype=torch.int64)), tensor._version
    return (*flat[:4].tolist(), float(flat.double().sum()), tensor._version)


def check(model: nn.Module) -> tuple[Counter[str], list[str]]:
    """Rewrite a model.

    Args:
        model: A fresh model.

    Returns:
        The number of layers in each state, and the failed checks.
    """
    wrong: list[str] = []
    total, ones, zeros = count_scales(model)
    before = {name: fingerprint(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    report = init_batch_norms(model, TARGET)
    states = Counter(record.state for record in report.records)
    found = {id(record.scale) for record in report.records if record.scale is not None}
    if len(found) != total:
        wrong.append(f"{len(found)} scales found, {total} counted")
    if (len(report.rewritten), states["zero"]) != (ones, zeros):
        wrong.append(f"{len(report.rewritten)} rewritten and {states['zero']} zero, {ones} and {zeros} counted")
    written = {id(record.scale) for record in report.rewritten}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in written:
            if not bool((tensor == TARGET).all()):
                wrong.append(f"{name} was not written")
        elif fingerprint(tensor) != before[name]:
            wrong.append(f"{name} was changed")
    if len(report.scales) != len(found) - zeros:
        wrong.append(f"the update rule would cover {len(report.scales)} of {len(found)} scales, {zeros} of them zero")
    return states, wrong


def quick_initialisation() -> Iterator[None]:
    """Skip the random initialisation of weights, which takes most of the time and matters to no check."""
    slow = (
        "normal_",
        "uniform_",
        "trunc_normal_",
        "kaiming_normal_",
        "kaiming_uniform_",
        "xavier_uniform_",
        "orthogonal_",
    )
    originals = {name: getattr(nn.init, name) for name in slow}

    def skipping(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        # RepVGG draws its batch norm scales, which are one-dimensional: that initialisation stays.
        return lambda tensor, *args, **kwargs: tensor if tensor.dim() > 1 else original(tensor, *args, **kwargs)

    for name, original in originals.items():
        setattr(nn.init, name, skipping(original))
    yield
    for name, original in originals.items():
        setattr(nn.init, name, original)


def main() -> int:
    """Check the models and print the totals."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sample", type=int, metavar="N", help="about N models of each library (default: all)")
    parser.add_argument("--only", default="", help="only models whose name contains this")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # from the libraries' own constructors
    failed = 0
    for library, models in (("torchvision", torchvision_models()), ("timm", timm_models())):
        names = [name for name in models if arguments.only in name]
        if arguments.sample:
            names = names[:: max(1, len(names) // arguments.sample)]
        start, totals, used, unbuilt = time.perf_counter(), Counter[str](), 0, Counter[str]()
        for name in track(names, library, disable=not sys.stdout.isatty()):
            if has_batch_norm(models[name]) is False:
                continue
            skipping = quick_initialisation()
            next(skipping)
            try:
                model = models[name]()
            except Exception as error:  # a model may need a package that is not installed
                unbuilt[f"{type(error).__name__}: {error}"[:100]] += 1
                continue
            finally:
                next(skipping, None)
            if not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules()):
                continue
            states, wrong = check(model)
            totals += states
            used += 1
            failed += bool(wrong)
            for what in wrong:
                print(f"WRONG {name}: {what}")
            del model
            gc.collect()
        seen = ", ".join(f"{count:,} {state}" for state, count in totals.most_common())
        print(f"{library}: {len(names)} models, {used} with batch norm, {sum(totals.values()):,} layers: {seen}")
        print(f"{library}: {time.perf_counter() - start:.0f} s, could not be built: {dict(unbuilt) or 'none'}")
    print(f"{failed} models failed a check" if failed else "every check passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
