"""The statistics of the results: every arm of every grid against its baseline, over paired seeds."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arms import Arm, reference
from curves import Curve, overtaking_step, read_curves, relative_time

from lightning_revbn.compare import least_detectable_effect, paired_t_test
from lightning_revbn.runs.comparison import POWER, Comparison, compare

MARGIN = 0.2
"""The largest loss, in points of accuracy, that counts as no loss; fixed before the runs."""

LEVEL = 0.05


@dataclass(frozen=True)
class Cell:
    """An arm of a grid.

    Attributes:
        grid: Name of the grid.
        arm: Name of the arm.
        baseline: Name of the arm that it is compared with; its own name for a baseline.
        validation: Mean accuracy on validation data after the last epoch, in %.
        scores: Accuracy on test data after the last epoch, in %, by seed.
        best_epoch: Mean accuracy on test data with the weights of the best validation epoch, in %.
        comparison: Comparison with the baseline, corrected for all arms of this baseline; None for a baseline.
        overtakes: Step from which the arm stays above the baseline; None for never, and for a baseline.
        relative_time: Steps to the baseline's final validation accuracy, relative to the baseline's steps; None for
            never, and for a baseline.
    """

    grid: str
    arm: str
    baseline: str
    validation: float
    scores: dict[int, float]
    best_epoch: float
    comparison: Comparison | None
    overtakes: int | None
    relative_time: float | None

    @property
    def difference(self) -> float:
        """The mean difference to the baseline on test data, in points."""
        assert self.comparison is not None
        return self.comparison.test.mean_difference

    @property
    def loss_excluded(self) -> float:
        """The p-value of the one-sided paired t-test that the arm loses less than `MARGIN` points."""
        assert self.comparison is not None
        if math.isnan(self.comparison.test.p_value):  # all differences are equal
            return float(self.difference <= -MARGIN)
        within = [score + MARGIN for score in self.comparison.proposed]
        return paired_t_test(within, self.comparison.baseline).p_value

    @property
    def detectable(self) -> float:
        """The difference that this number of pairs, with this spread, detects in 80 % of experiments."""
        assert self.comparison is not None
        test = self.comparison.test
        return least_detectable_effect(test.n, power=POWER) * test.std_difference


def read_runs(file: Path) -> list[dict[str, str]]:
    """Return the rows of a grid's CSV file."""
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def read_cells(folder: Path, grid: str) -> list[Cell]:
    """Compare the arms of a grid.

    Args:
        folder: Directory of the CSV files.
        grid: Name of the grid.

    Returns:
        A cell for each arm, in the order of the file; empty if the grid was not run.
    """
    file = folder / f"{grid}.csv"
    if not file.is_file():
        return []
    rows, curves = read_runs(file), read_curves(folder / f"{grid}_curves.csv")
    arms: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        arms.setdefault(row["arm"], []).append(row)
    references = {name: _reference(found[0]) for name, found in arms.items()}
    comparisons: dict[str, Comparison] = {}
    for baseline in dict.fromkeys(references.values()):
        others = {name: _scores(arms[name]) for name in arms if references[name] == baseline != name}
        if others:
            comparisons |= {found.label: found for found in compare(_scores(arms[baseline]), others, "greater")}
    return [_cell(grid, name, arms[name], references[name], comparisons.get(name), curves) for name in arms]


def _cell(
    grid: str,
    name: str,
    rows: Sequence[dict[str, str]],
    baseline: str,
    comparison: Comparison | None,
    curves: dict[str, Curve],
) -> Cell:
    curve = curves[name]
    return Cell(
        grid=grid,
        arm=name,
        baseline=baseline,
        validation=statistics.fmean(float(row["val_acc"]) for row in rows),
        scores=_scores(rows),
        best_epoch=statistics.fmean(float(row["best_test_acc"]) for row in rows),
        comparison=comparison,
        overtakes=None if comparison is None else overtaking_step(curve.steps, curve.gain),
        relative_time=None if comparison is None else relative_time(curve, curves[baseline]),
    )


def _scores(rows: Sequence[dict[str, str]]) -> dict[int, float]:
    return {int(row["seed"]): float(row["test_acc"]) for row in rows}


def _reference(row: dict[str, str]) -> str:
    values: dict[str, Any] = {
        name: float(row[name]) if row[name] else None
        for name in ("scale", "scale_lr_divisor", "shift_lr_multiplier", "eps")
    }
    return reference(Arm(**values, input_norm=row["input_norm"])).name
