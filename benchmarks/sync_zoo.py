"""Synchronises every timm model that has BatchNormAct2d and undoes it, then applies torch's converter.

Models have random weights and running statistics, and are in evaluation mode. The outputs for random images must be
equal to the bit before, while synchronised and after, and so must the classes of all modules. Then torch's
`convert_sync_batchnorm`, which drops the activations of these layers, is applied, and the outputs are compared again.
Prints a line per model, and totals. `--log FILE` keeps the lines, so that a second run goes on where the first ended.
`--sample 20` checks about 20 models, evenly spaced.
"""

from __future__ import annotations

import argparse
import gc
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from zoo import quick_initialisation, timm_models

from lightning_revbn.core.batch_norm_sync import damaged_by_conversion, restore_batch_norms, synchronize_batch_norms

SIZES = (64, 128, None)
"""Image sizes to try, smallest first; None is the model's own input size."""


def activated(model: nn.Module) -> list[str]:
    """Name the BatchNormAct2d layers with an activation other than the identity."""
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, timm.layers.BatchNormAct2d) and not isinstance(layer.act, nn.Identity)
    ]


def build(construct: Callable[[], nn.Module]) -> nn.Module:
    """Make a model whose weights keep the size of activations, and whose batch norms change their input."""
    skipping = quick_initialisation()
    next(skipping)
    try:
        model = construct()
    finally:
        next(skipping, None)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, (parameter[0].numel() or 1) ** -0.5)
        for layer in model.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.weight is not None:
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.normal_(0, 0.2)
                layer.momentum = 1.0  # after a single batch, the running statistics fit the network
    return model


def images(model: nn.Module) -> Tensor:
    """Return the smallest images that the model accepts, and set its running statistics from them."""
    for size in SIZES:
        channels, height, width = model.pretrained_cfg.get("input_size", (3, 224, 224))
        values = torch.randn(2, channels, size or height, size or width)
        try:
            model.train()(values)
            model.eval()(values)
        except (RuntimeError, ValueError, AssertionError, IndexError):
            if size is None:
                raise
            continue
        return values
    raise AssertionError("unreachable")


def check(construct: Callable[[], nn.Module]) -> tuple[str, str]:
    """Synchronise a model and undo it, then convert it.

    Returns:
        The result with this package, and the result with torch's converter.
    """
    model = build(construct)
    with torch.no_grad():
        values = images(model)
        before, classes = flat(model(values)), [type(module) for module in model.modules()]
        lost, refused = activated(model), damaged_by_conversion(model)
        during = flat(synchronize_batch_norms(model)(values))
        kept = [type(module) for module in model.modules()] == classes
        after = flat(restore_batch_norms(model)(values))
        kept &= [type(module) for module in model.modules()] == classes
        wrong = [
            what
            for what, is_right in {
                "outputs are not finite": bool(before.isfinite().all()),
                "outputs differ while synchronised": torch.equal(before, during),
                "outputs differ afterwards": torch.equal(before, after),
                "classes differ": kept,
                "torch's converter would not be refused": set(lost) <= set(refused),
            }.items()
            if not is_right
        ]
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        gone = len(lost) - len(activated(converted))
        try:
            same = torch.equal(before, flat(converted(values)))
        except (RuntimeError, AttributeError) as error:
            return "; ".join(wrong) or "same", f"{type(error).__name__}, {gone} activations lost"
    return "; ".join(wrong) or "same", f"{'same' if same else 'differs'}, {gone} activations lost"


def flat(outputs: Tensor | tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """Join the outputs of a model."""
    return outputs.flatten() if isinstance(outputs, Tensor) else torch.cat([flat(output) for output in outputs])


def uses_batch_norm_act(construct: Callable[[], nn.Module]) -> bool | None:
    """Tell whether a model has BatchNormAct2d layers; None if it cannot be built on the meta device."""
    try:
        with torch.device("meta"):
            model = construct()
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AssertionError):
        return None
    return any(isinstance(layer, timm.layers.BatchNormAct2d) for layer in model.modules())


def line(construct: Callable[[], nn.Module]) -> tuple[str, str]:
    """Return the results of a model; the first is "none" if the model has no BatchNormAct2d."""
    if uses_batch_norm_act(construct) is False:
        return "none", ""
    try:
        return check(construct)
    except Exception as error:  # a model may need a package that is not installed
        return f"not run: {type(error).__name__}: {error}".replace("\t", " ").replace("\n", " ")[:120], ""


def main() -> int:
    """Check the models and print the totals."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sample", type=int, metavar="N", help="about N models (default: all)")
    parser.add_argument("--only", default="", help="only models whose name contains this")
    parser.add_argument("--log", type=Path, help="file of lines to go on from and to add to")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # from the library's own constructors
    models = {name: construct for name, construct in timm_models().items() if arguments.only in name}
    names = list(models)[:: max(1, len(models) // arguments.sample)] if arguments.sample else list(models)
    results: dict[str, tuple[str, str]] = {}
    if arguments.log and arguments.log.exists():
        for entry in arguments.log.read_text().splitlines():
            name, ours, theirs = entry.split("\t")
            results[name] = (ours, theirs)
    for name in names:
        if name not in results:
            results[name] = line(models[name])
            gc.collect()
            if arguments.log:
                with arguments.log.open("a") as log:
                    log.write("\t".join([name, *results[name]]) + "\n")
            if results[name][0] != "none":
                print(name, *results[name], sep="\t", flush=True)
    seen = {name: results[name] for name in names if results[name][0] != "none"}
    ours = Counter(result for result, _ in seen.values())
    theirs = Counter(result.partition(",")[0] for result, _ in ((theirs, 0) for _, theirs in seen.values()))
    print(f"{len(names)} models, {len(seen)} with BatchNormAct2d")
    print(f"this package, before against synchronised and undone: {dict(ours)}")
    print(f"torch's converter, before against converted: {dict(theirs)}")
    return 0 if set(ours) <= {"same"} else 1


if __name__ == "__main__":
    sys.exit(main())
