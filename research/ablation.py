"""Tests on digits which part of a small scale causes its effect, by the identity of docs/why.md.

    python research/ablation.py
    python research/ablation.py --scale 0.25 --leave-one-out --seeds 8

Training with all scales at g and their learning rate divided by c equals training at scale 1 with five changed
settings. Each setting can be changed without the others:

- `logits`: the last linear weights start at g times their values, so the first logits are softer;
- `head`: these weights learn with lr g^2, and weight decay / g^2, so that a step decays them as before;
- `shift`: shifts learn with lr / g^2;
- `scale`: scales learn with lr / (c g^2);
- `eps`: eps becomes eps / g^2 in every batch norm layer except the stem's, whose input is the images.

`logits` and `head` have the same cause: the size of the last layer's input changes. With g = 0.1 and c = 100, the
factor of `scale` is 1, so `scale` is not among the parts. An arm has a single part, all parts but one, or one of the
pairs `logits` and `head`, `shift` and `eps`. Two more arms are all parts together, which equals the method, and the
method itself. Every arm is compared with the same baseline by the same paired test as in `paper_protocol.py`. The runs
have the form of that script, so a second call trains only missing runs.
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
from arms import BASELINE, PAPERS_DIVISOR, Arm
from digits import DigitsResNet
from paper_protocol import OPTIMIZERS, Run, Settings, add_run_options, check_run_options, finish, train_missing
from rich.console import Console
from torch import Tensor, nn
from torch.optim import Optimizer

PAIRS = (("logits", "head"), ("shift", "eps"))


def parts_of(scale: float, divisor: float) -> tuple[str, ...]:
    """Return the parts that equal a scale and a divisor; `scale` is left out if divisor * scale^2 is 1."""
    parts = ("logits", "head", "shift", "scale", "eps")
    return tuple(part for part in parts if part != "scale" or not math.isclose(divisor * scale**2, 1))


class ScaleOne(L.Callback):
    """Trains a `DigitsResNet` at scale 1 with some of the parts that together equal a small scale.

    A learning rate of k lr with weight decay / k equals a gradient multiplied by k: SGD is linear in the gradient, and
    the rate keeps its factor under every schedule.

    Args:
        scale: The scale g to imitate.
        divisor: The divisor c to imitate.
        parts: Some of `parts_of(scale, divisor)`.
    """

    def __init__(self, scale: float, divisor: float, parts: tuple[str, ...]) -> None:
        self.scale, self.divisor, self.parts = scale, divisor, parts
        self.factors: list[tuple[nn.Parameter, float]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Change the initial weights and eps, and find the parameters whose learning rate changes."""
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
    """A run at scale 1 with some of the parts.

    Attributes:
        scale: The scale to imitate.
        label: The end of the arm's name, after the scale.
        parts: Some of `parts_of`.
    """

    scale: float = 0.1
    label: str = "all"
    parts: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the arm in tables and directories."""
        return f"scale_{self.scale:g}_{self.label}"

    def callbacks(self) -> list[L.Callback]:
        """Return the callback that trains with the parts."""
        return [ScaleOne(self.scale, PAPERS_DIVISOR, self.parts)]


def combinations(parts: tuple[str, ...], leave_one_out: bool) -> dict[str, tuple[str, ...]]:
    """Return the parts of each arm, by label."""
    arms = {"all": parts, **{f"only_{part}": (part,) for part in parts}}
    arms |= {f"only_{first}_{second}": (first, second) for first, second in PAIRS}
    if leave_one_out:
        arms |= {f"without_{part}": tuple(other for other in parts if other != part) for part in parts}
    return arms


def grid(arguments: argparse.Namespace) -> list[Run]:
    """Return all runs, seed by seed: the baseline, the method and its parts."""
    rate, decay = OPTIMIZERS["sgd"]
    settings = Settings(
        data="digits",
        data_dir="",  # digits come with scikit-learn
        train_images=None,
        network="cnn",
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        accelerator=arguments.accelerator,
        head_init=arguments.head_init,
        optimizer="sgd",
        learning_rate=rate,
        weight_decay=decay,
    )
    scale: float = arguments.scale
    arms = combinations(parts_of(scale, PAPERS_DIVISOR), arguments.leave_one_out)
    runs: list[Run] = []
    for seed in range(1, arguments.seeds + 1):
        runs += [Run(settings, BASELINE, seed), Run(settings, Arm(scale=scale), seed)]
        runs += [PartialRun(settings, BASELINE, seed, scale, *arm) for arm in arms.items()]
    return runs


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the settings of the command line; end the program with a single-line error if a value is wrong."""
    parser = argparse.ArgumentParser(description="Takes the parts of a small scale one at a time, over paired seeds.")
    parser.add_argument("--scale", type=float, default=0.1, metavar="G", help="to take apart (default: %(default)s)")
    parser.add_argument("--leave-one-out", action="store_true", help="all parts but one, too")
    add_run_options(parser, Path("ablation_output"))
    settings = parser.parse_args(arguments)
    check_run_options(parser, settings)
    if not 0 < settings.scale < 1:
        parser.error(f"--scale must be between 0 and 1, got {settings.scale:g}")
    return settings


def main(arguments: list[str] | None = None) -> None:
    """Train the missing runs, write their results as CSV, and print the comparisons."""
    parsed = parse_arguments(arguments)
    console, runs = Console(), grid(parsed)
    try:
        results = train_missing(runs, parsed.output_dir, parsed.jobs, console)
    except ValueError as error:
        sys.exit(f"ablation.py: {error}")
    finish(runs, results, parsed.output_dir, f"the parts of scale {parsed.scale:g}", console)


if __name__ == "__main__":
    main()
