"""Which part of a small scale does it? The identity of docs/why.md, taken apart on digits.

    python research/ablation.py
    python research/ablation.py --scales 0.1 --leave-one-out --seeds 8

Training with all scales at g and their learning rate divided by c equals training at scale 1 with five settings
changed. Each can be changed without the others:

- `logits`: the last linear weights start at g times their values, so the first logits are softer;
- `head`: these weights learn with lr g^2 (and weight decay / g^2, so that a step decays them as before);
- `shift`: shifts learn with lr / g^2;
- `scale`: scales learn with lr / (c g^2);
- `eps`: it is eps / g^2 in every batch norm layer but the stem's, whose input is the images.

`logits` and `head` are the two halves of one fact: the last layer sees an input of another size. With g = 0.1 and
c = 100, `scale` is a factor of 1 and no part. Every arm has one part alone (or all but one); beside them stand the arm
with all of them, which is the method in other words, and the method itself. An arm is judged against the same
baseline by the same paired test as in `paper_protocol.py`, whose runs these are: a second call trains only what is
missing.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import lightning as L
import torch
from digits import DigitsResNet
from paper_protocol import (
    DIVISOR,
    Run,
    Settings,
    add_run_options,
    check_run_options,
    report_arms,
    train_missing,
    write_results,
)
from rich.console import Console
from torch import Tensor, nn
from torch.optim import Optimizer

SCALES = (0.1, 0.25)


def parts_of(scale: float, divisor: float) -> tuple[str, ...]:
    """Return the parts that a scale and a divisor amount to: `scale` is none where divisor * scale^2 is 1."""
    parts = ("logits", "head", "shift", "scale", "eps")
    return tuple(part for part in parts if part != "scale" or not math.isclose(divisor * scale**2, 1))


class ScaleOne(L.Callback):
    """Trains a `DigitsResNet` at scale 1 with some of the parts that a small scale amounts to.

    A learning rate of k lr with weight decay / k is a gradient multiplied by k: SGD is linear in it, and the rate
    keeps its factor under every schedule.

    Args:
        scale: The scale g that is meant.
        divisor: The divisor c that is meant.
        parts: Some of `parts_of(scale, divisor)`.
    """

    def __init__(self, scale: float, divisor: float, parts: tuple[str, ...]) -> None:
        self.scale, self.divisor, self.parts = scale, divisor, parts
        self.factors: list[tuple[nn.Parameter, float]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Change the start and eps, and find the parameters whose learning rate changes."""
        if stage != "fit":
            return
        assert isinstance(pl_module, DigitsResNet)
        last = pl_module.head[-1].weight
        norms = [layer for layer in pl_module.modules() if isinstance(layer, nn.BatchNorm2d)]
        if "logits" in self.parts:
            with torch.no_grad():
                last.mul_(self.scale)
        if "eps" in self.parts:
            for layer in pl_module.blocks.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.eps /= self.scale**2
        learning = {
            "head": ([last], self.scale**2),
            "shift": ([layer.bias for layer in norms], 1 / self.scale**2),
            "scale": ([layer.weight for layer in norms], 1 / (self.divisor * self.scale**2)),
        }
        self.factors = [
            (parameter, factor)
            for part, (parameters, factor) in learning.items()
            if part in self.parts
            for parameter in parameters
        ]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Multiply the gradients."""
        for parameter, factor in self.factors:
            assert isinstance(parameter.grad, Tensor)
            parameter.grad.mul_(factor)


@dataclass(frozen=True)
class PartialRun(Run):
    """A run at scale 1 with some of the parts; `scale` is the one that is meant.

    Attributes:
        label: What the arm is called behind the scale.
        parts: Which.
    """

    label: str = "all"
    parts: tuple[str, ...] = ()

    @property
    def arm(self) -> str:
        """The name of the arm in tables and directories."""
        return f"{super().arm}_{self.label}"

    def callbacks(self) -> list[L.Callback]:
        """Return the parts in the callback's place."""
        assert self.scale is not None
        return [ScaleOne(self.scale, DIVISOR, self.parts)]


def grid(arguments: argparse.Namespace) -> list[Run]:
    """Return all runs, seed by seed: the baseline, and for every scale the method and its parts."""
    settings = Settings("digits", "", None, "cnn", arguments.epochs, arguments.batch_size, arguments.accelerator)
    runs: list[Run] = []
    for seed in range(1, arguments.seeds + 1):
        runs.append(Run(settings, None, input_norm=False, seed=seed))
        for scale in arguments.scales:
            parts = parts_of(scale, DIVISOR)
            arms = {f"only_{part}": (part,) for part in parts}
            if arguments.leave_one_out:
                arms |= {f"without_{part}": tuple(other for other in parts if other != part) for part in parts}
            runs.append(Run(settings, scale, input_norm=False, seed=seed))
            runs += [PartialRun(settings, scale, False, seed, *arm) for arm in [("all", parts), *arms.items()]]
    return runs


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's settings; end the program with one line where a value is wrong."""
    parser = argparse.ArgumentParser(description="Takes the parts of a small scale one at a time, over paired seeds.")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, metavar="G", help="scales to take apart")
    parser.add_argument("--leave-one-out", action="store_true", help="all parts but one, too")
    add_run_options(parser, Path("ablation_output"))
    settings = parser.parse_args(arguments)
    check_run_options(parser, settings)
    if not all(0 < scale < 1 for scale in settings.scales):
        parser.error(f"--scales must be between 0 and 1, got {settings.scales}")
    return settings


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing, write one CSV, and print what it says of every scale."""
    parsed = parse_arguments(arguments)
    console = Console()
    try:
        results = train_missing(grid(parsed), parsed.output_dir, parsed.workers, console)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"ablation.py: {error}")
    write_results(results, parsed.output_dir / "results.csv")
    for scale in parsed.scales:
        arms = [result for result in results if result["scale"] in (None, scale)]
        report_arms(arms, f"the parts of scale {scale:g}, divisor {DIVISOR:g}", console)
    console.print(f"Runs: {parsed.output_dir / 'results.csv'}", soft_wrap=True)


if __name__ == "__main__":
    main()
