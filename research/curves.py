"""Learning curves: the step from which an arm stays above its baseline, and the time to the same accuracy."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arms import Arm, reference

COLUMNS = ("arm", "step", "train_loss", "val_loss", "val_acc", "test_acc", "gain", "gain_std")
"""Columns of a grid's file; accuracies are in %, `gain` is arm - baseline on test data over the same seeds."""


@dataclass(frozen=True)
class Curve:
    """The mean over seeds after every epoch.

    Attributes:
        steps: Optimizer steps after each epoch; shape `(epochs,)`, like every attribute.
        train_loss: Training loss, mean over the epoch.
        val_loss: Cross entropy on validation data.
        val_acc: Validation accuracy in %.
        test_acc: Test accuracy in %.
        gain: Test accuracy minus the baseline's at the same seed, in points; 0 for the baseline.
        gain_std: Standard deviation of the gain over seeds.
    """

    steps: tuple[int, ...]
    train_loss: tuple[float, ...]
    val_loss: tuple[float, ...]
    val_acc: tuple[float, ...]
    test_acc: tuple[float, ...]
    gain: tuple[float, ...]
    gain_std: tuple[float, ...]


def overtaking_step(steps: Sequence[int], gain: Sequence[float]) -> int | None:
    """Return the step from which an arm is above its baseline after every epoch.

    Args:
        steps: Steps taken after each epoch, shape `(epochs,)`.
        gain: Arm - baseline after each epoch, mean over seeds, shape `(epochs,)`.

    Returns:
        The step; None if the arm is not above after the last epoch.

    Example:
        >>> overtaking_step([10, 20, 30, 40], [0.1, -0.2, 0.3, 0.1])
        30
    """
    overtaken = None
    for step, difference in zip(reversed(steps), reversed(gain), strict=True):
        if not difference > 0:  # true for NaN too
            break
        overtaken = step
    return overtaken


def time_to_accuracy(steps: Sequence[int], accuracy: Sequence[float], target: float) -> int | None:
    """Return the first step after which an accuracy is reached.

    Args:
        steps: Steps taken after each epoch, shape `(epochs,)`.
        accuracy: Accuracy after each epoch, mean over seeds, shape `(epochs,)`.
        target: The accuracy.

    Returns:
        The step; None if it is never reached.

    Example:
        >>> time_to_accuracy([10, 20, 30], [80.0, 91.0, 90.5], target=90.0)
        20
    """
    return next((step for step, value in zip(steps, accuracy, strict=True) if value >= target), None)


def relative_time(arm: Curve, baseline: Curve) -> float | None:
    """Return an arm's steps to the baseline's final validation accuracy, as a ratio to the baseline's own steps.

    Args:
        arm: Curve of the arm.
        baseline: Curve of its baseline.

    Returns:
        The ratio, below 1 if the arm is faster; None if the arm never reaches the accuracy.
    """
    target = baseline.val_acc[-1]
    taken = time_to_accuracy(arm.steps, arm.val_acc, target)
    own = time_to_accuracy(baseline.steps, baseline.val_acc, target)
    assert own is not None  # the baseline reaches it at its last epoch at the latest
    return None if taken is None else taken / own


def mean_curves(results: Sequence[Mapping[str, Any]], output: Path) -> dict[str, Curve]:
    """Average the curves of a grid over seeds.

    Args:
        results: Results of all runs of the grid, as `paper_protocol.train` returns them.
        output: Directory of the runs.

    Returns:
        The curve of each arm by name.
    """
    runs: dict[str, dict[int, list[dict[str, float]]]] = {}
    references: dict[str, str] = {}
    for result in results:
        rows = read_rows(output / result["name"] / f"seed_{result['seed']:02}" / "metrics.csv")
        runs.setdefault(result["name"], {})[result["seed"]] = rows
        references[result["name"]] = reference(Arm(**result["arm"])).name
    return {name: _average(runs[name], runs[references[name]]) for name in runs}


def _average(arm: Mapping[int, list[dict[str, float]]], baseline: Mapping[int, list[dict[str, float]]]) -> Curve:
    epochs = range(len(next(iter(arm.values()))))

    def over_seeds(name: str, factor: float = 1.0) -> list[list[float]]:
        return [[factor * rows[epoch][name] for rows in arm.values()] for epoch in epochs]

    def mean(values: list[list[float]]) -> tuple[float, ...]:
        return tuple(map(statistics.fmean, values))

    def spread(values: list[list[float]]) -> tuple[float, ...]:
        return tuple(statistics.stdev(seeds) if len(seeds) > 1 else 0.0 for seeds in values)

    gain = [
        [100 * (rows[epoch]["test_acc"] - baseline[seed][epoch]["test_acc"]) for seed, rows in arm.items()]
        for epoch in epochs
    ]
    return Curve(
        steps=tuple(int(row["step"]) for row in next(iter(arm.values()))),
        train_loss=mean(over_seeds("train_loss")),
        val_loss=mean(over_seeds("val_loss")),
        val_acc=mean(over_seeds("val_acc", 100)),
        test_acc=mean(over_seeds("test_acc", 100)),
        gain=mean(gain),
        gain_std=spread(gain),
    )


def read_rows(file: Path) -> list[dict[str, float]]:
    """Return the numbers of a run's `metrics.csv`, a row per epoch."""
    with file.open(newline="") as opened:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(opened)]


def write_curves(curves: Mapping[str, Curve], file: Path) -> None:
    """Write the curves of a grid, rounded to the digits that the page needs."""
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(COLUMNS)
        for name, curve in curves.items():
            columns = (getattr(curve, column) for column in COLUMNS[2:])
            for step, *values in zip(curve.steps, *columns, strict=True):
                digits = (
                    f"{value:.{4 if 'acc' in column else 3}g}"
                    for column, value in zip(COLUMNS[2:], values, strict=True)
                )
                writer.writerow([name, step, *digits])


def read_curves(file: Path) -> dict[str, Curve]:
    """Return the curves that `write_curves` wrote, by name of the arm."""
    rows: dict[str, list[dict[str, str]]] = {}
    with file.open(newline="") as opened:
        for row in csv.DictReader(opened):
            rows.setdefault(row["arm"], []).append(row)
    return {
        name: Curve(
            tuple(int(row["step"]) for row in found),
            *(tuple(float(row[column]) for row in found) for column in COLUMNS[2:]),
        )
        for name, found in rows.items()
    }
