"""Compares a scalar over all steps of paired runs: means, their intervals, and the step from which an arm is ahead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from lightning_revbn.runs.finished_runs import FinishedRun
from lightning_revbn.runs.names import one_line
from lightning_revbn.runs.scalars import LogError, Series

__all__ = ["Band", "CurveComparison", "ahead_for_good", "clear_for_good", "compare_curves", "conclude"]


@dataclass(frozen=True, eq=False)
class Band:
    """A mean over runs at every step, and its pointwise 95 % interval.

    Args:
        mean: Shape `(N,)`; NaN where a run has no finite value.
        low: Lower ends of the intervals, shape `(N,)`.
        high: Upper ends, shape `(N,)`.
    """

    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class CurveComparison:
    """An arm against the baseline, at the steps that every run of both sides logged.

    Args:
        label: The name of the arm.
        pairs: Number of pairs.
        steps: Ascending, shape `(N,)`.
        baseline: Band of the baseline's runs.
        proposed: Band of the arm's runs.
        difference: Band of the paired differences, proposed - baseline.
    """

    label: str
    pairs: int
    steps: NDArray[np.int64]
    baseline: Band
    proposed: Band
    difference: Band


def compare_curves(
    baseline: Mapping[int, FinishedRun], proposed: Mapping[int, FinishedRun], label: str, key: str
) -> CurveComparison:
    """Compare an arm with the baseline at every step.

    Args:
        baseline: Runs by seed, each with its curve.
        proposed: Runs of the same seeds.
        label: The name of the arm.
        key: The key of the curve.

    Returns:
        The comparison.

    Raises:
        LogError: If the runs share no step.
    """
    sides = [[_curve(runs[seed]) for seed in baseline] for runs in (baseline, proposed)]
    steps = sides[0][0].steps
    for one in (*sides[0], *sides[1]):
        steps = np.intersect1d(steps, one.steps, assume_unique=True)
    if not len(steps):
        raise LogError(f"the runs of the baseline and of {one_line(label)} logged {one_line(key)} at no step in common")
    before, after = (np.stack([one.values[np.searchsorted(one.steps, steps)] for one in side]) for side in sides)
    with np.errstate(invalid="ignore", over="ignore"):  # diverged runs have infinite values: inf - inf is NaN
        bands = [_band(values) for values in (before, after, after - before)]
    return CurveComparison(label, len(baseline), steps, *bands)


def ahead_for_good(comparison: CurveComparison, lower_is_better: bool) -> int | None:
    """Find the step from which an arm's mean stays on the better side to the end.

    Args:
        comparison: The arm.
        lower_is_better: Whether lower values are better, as for a loss.

    Returns:
        The step; None if the arm is not ahead at the last step.

    Example:
        >>> flat = np.zeros(3)
        >>> difference = Band(np.array([1.0, -0.5, -1.0]), flat, flat)
        >>> arm = CurveComparison("b", 5, np.array([0, 10, 20]), difference, difference, difference)
        >>> ahead_for_good(arm, lower_is_better=True), ahead_for_good(arm, lower_is_better=False)
        (10, None)
    """
    mean = comparison.difference.mean
    return _first_of_the_end(comparison.steps, mean < 0 if lower_is_better else mean > 0)


def clear_for_good(comparison: CurveComparison, lower_is_better: bool) -> int | None:
    """Find the step from which the interval of the difference stays on the better side to the end.

    Args:
        comparison: The arm.
        lower_is_better: Whether lower values are better, as for a loss.

    Returns:
        The step; None if the interval is not on the better side at the last step.
    """
    band = comparison.difference
    return _first_of_the_end(comparison.steps, band.high < 0 if lower_is_better else band.low > 0)


def conclude(comparison: CurveComparison, key: str, lower_is_better: bool) -> str:
    """Say from which step an arm is ahead.

    Args:
        comparison: The arm.
        key: The key of the curve.
        lower_is_better: Whether lower values are better, as for a loss.

    Returns:
        A line of text.
    """
    better = f"{'lower' if lower_is_better else 'higher'} {key}"
    last = int(comparison.steps[-1])
    ahead, clear = ahead_for_good(comparison, lower_is_better), clear_for_good(comparison, lower_is_better)
    start = f"{comparison.label}: "
    if np.isnan(comparison.difference.mean[-1]):
        return f"{start}no mean difference at the last step, {last:,}: {_lost(comparison, key)}"
    if ahead is None:
        return f"{start}not ahead at the last step, {last:,} ({better} is ahead; mean of {comparison.pairs} pairs)"
    sure = f"from step {clear:,} on" if clear is not None else "at no end of the run"
    return (
        f"{start}ahead for good from step {ahead:,} of {last:,} ({better}; mean of {comparison.pairs} pairs); the 95 % "
        f"interval of the difference stays clear of 0 {sure}"
    )


def _lost(comparison: CurveComparison, key: str) -> str:
    """Say which side has a run without a finite value at the last step, and since which step."""
    sides = {"the baseline": comparison.baseline.mean, "this arm": comparison.proposed.mean}
    since = {name: _first_of_the_end(comparison.steps, np.isnan(mean)) for name, mean in sides.items()}
    told = [f"{name} from step {step:,} on" for name, step in since.items() if step is not None]
    return f"not every run has a finite {key} in {' and in '.join(told)}" if told else "the difference is too large"


def _curve(run: FinishedRun) -> Series:
    if run.curve is None:
        raise LogError(f"{one_line(run.path)} was read without its curve")
    return run.curve


def _band(values: NDArray[np.float64]) -> Band:
    """Return the mean and Student's t interval over runs at each step, from values of shape `(runs, N)`."""
    from scipy import special

    runs = len(values)
    finite = np.where(np.isfinite(values).all(axis=0), values, np.nan)
    mean = finite.mean(axis=0)
    spread = finite.std(axis=0, ddof=1) if runs > 1 else np.full_like(mean, np.nan)
    # A single run has no spread, so its interval is NaN.
    half = float(cast("Any", special).stdtrit(max(1, runs - 1), 0.975)) * spread / np.sqrt(runs)
    return Band(mean, mean - half, mean + half)


def _first_of_the_end(steps: Sequence[int] | NDArray[np.int64], holds: NDArray[np.bool_]) -> int | None:
    wrong = np.flatnonzero(~holds)
    first = int(wrong[-1]) + 1 if len(wrong) else 0
    return int(steps[first]) if first < len(holds) else None
