"""Measures the cost of the update rule: `optimizer.step()` of ResNet-50 with the rule, permanent groups, and plain.

Machines are noisy, so times are never compared across runs: the three arms take turns in every round. Each figure is
the median over rounds of the ratio within a round, with quartiles.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import torch
import torchvision

from lightning_revbn import ScaleUpdateRule, find_batch_norms, scale_param_groups
from lightning_revbn.core.initialization import rule_scales

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 1e-6, "momentum": 0.9, "weight_decay": 1e-4}),
    "SGD fused": (torch.optim.SGD, {"lr": 1e-6, "momentum": 0.9, "weight_decay": 1e-4, "fused": True}),
    "AdamW fused": (torch.optim.AdamW, {"lr": 1e-6, "weight_decay": 1e-4, "fused": True}),
}


class NoUpdate(torch.optim.SGD):
    """An optimizer that reads its groups and updates no parameter, so that a step has only the cost around it."""

    def step(self, closure: Any = None) -> None:
        """Read the groups, as every optimizer does."""
        for group in self.param_groups:
            group["params"], group["lr"]


class Counting(NoUpdate):
    """An optimizer that counts its steps in its groups."""

    def step(self, closure: Any = None) -> None:
        """Count."""
        for group in self.param_groups:
            group["params"], group["lr"]
            group["k"] = group.get("k", 0) + 1


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """Time a call.

    Args:
        function: The function to call.
        repeats: Number of calls between two readings of the clock.

    Returns:
        Seconds per call.
    """
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def ratios(rounds: list[tuple[float, ...]], over: int) -> str:
    """Describe the ratio of the first column to another column.

    Args:
        rounds: A tuple of times for each round.
        over: The column to divide by.

    Returns:
        Median and quartiles.
    """
    low, middle, high = statistics.quantiles([times[0] / times[over] for times in rounds], n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def with_gradients(model: torch.nn.Module) -> torch.nn.Module:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model


def steps_of(make: type[torch.optim.Optimizer], options: dict[str, Any], first: int) -> list[Callable[[], Any]]:
    """Return the steps with the rule, with permanent groups, and plain, each on its own model.

    The place of a model's tensors in memory changes the time of a step by more than the effect measured here. So each
    set of rounds has new models, and `first` is the index of the model that is made first.
    """
    base = torchvision.models.resnet50()
    steps: dict[int, Callable[[], Any]] = {}
    for role in ((first + offset) % 3 for offset in range(3)):
        model = with_gradients(copy.deepcopy(base))
        groups = scale_param_groups(model, options["lr"], options["weight_decay"])
        optimizer = make(groups if role == 1 else model.parameters(), **options)
        if role == 0:
            scales = rule_scales(find_batch_norms(model))
            ScaleUpdateRule(optimizer, scales, weight_decay_exempt=scales)
        steps[role] = optimizer.step
        optimizer.step()  # the first step also makes the optimizer's state
    return [steps[role] for role in range(3)]


def compare_steps(rounds: int, sets: int = 9) -> None:
    threads = torch.get_num_threads()
    print(f"optimizer.step() of ResNet-50, {threads} thread(s), {sets} x {rounds} rounds, ratio in one round")
    print(f"{'optimizer':<12} {'rule / permanent groups':<26} {'rule / plain':<26} plain step")
    for name, (make, options) in OPTIMIZERS.items():
        times: list[tuple[float, ...]] = []
        for set_ in range(sets):
            steps = steps_of(make, options, first=set_)
            for round_ in range(rounds):
                found = {index: seconds(steps[index], 1) for index in ((round_ + offset) % 3 for offset in range(3))}
                times.append((found[0], found[1], found[2]))
        middle = statistics.median(row[2] for row in times)
        print(f"{name:<12} {ratios(times, 1):<26} {ratios(times, 2):<26} {middle * 1e3:.1f} ms")


def own_cost(rounds: int) -> None:
    """Print the time that the rule adds to a step, for different changes since the last step."""
    model = torchvision.models.resnet50()
    scales = rule_scales(find_batch_norms(model))
    print(
        f"own cost of the rule for ResNet-50 (161 parameters, 53 scales), least of {rounds} rounds, microseconds a step"
    )
    for name, cls, changes_lr in (
        ("nothing changes", NoUpdate, False),
        ("another learning rate in every step", NoUpdate, True),
        ("the optimizer writes a count into its groups", Counting, False),
    ):
        optimizer = cls(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)

        def step(optimizer: NoUpdate = optimizer, changes_lr: bool = changes_lr) -> None:
            if changes_lr:
                optimizer.param_groups[0]["lr"] *= 0.99999
            optimizer.step(torch.zeros)

        bare: list[float] = []
        ruled: list[float] = []
        for _ in range(rounds):
            bare.append(seconds(step, 200))
            with ScaleUpdateRule(optimizer, scales, weight_decay_exempt=scales):
                step()
                ruled.append(seconds(step, 200))
        print(f"{name:<46} {(min(ruled) - min(bare)) * 1e6:.1f}")


def allocations(steps: int) -> None:
    model = torchvision.models.resnet50()
    optimizer = NoUpdate(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    scales = rule_scales(find_batch_norms(model))
    with ScaleUpdateRule(optimizer, scales, weight_decay_exempt=scales):
        for _ in range(10):
            optimizer.step()
        tracemalloc.start()
        held: list[int] = []
        for _ in range(3):
            for _ in range(steps):
                optimizer.step()
            held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    print(f"Python memory held after {steps}, {2 * steps} and {3 * steps} steps: {', '.join(map(str, held))} bytes")


def main() -> None:
    """Print the three figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=40, help="rounds of each comparison (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    compare_steps(arguments.rounds)
    own_cost(arguments.rounds)
    allocations(2000)


if __name__ == "__main__":
    main()
