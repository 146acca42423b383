"""Chooses the axis of a row, the same for all runs: linear, logarithmic or both, with limits and ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.colors import LogNorm, Normalize, SymLogNorm
from matplotlib.ticker import MaxNLocator

from lightning_revbn.plots.layer_rows import HUGE, Floats, Row, drawable
from lightning_revbn.runs.batch_norm_runs import Run

__all__ = ["Axis", "choose_axes", "choose_axis"]


@dataclass(frozen=True)
class Axis:
    """The mapping from values to positions or colours, the same for all runs.

    Args:
        kind: `"symlog"` is linear up to a threshold, and logarithmic beyond it.
        low: Smallest value.
        high: Largest value.
        ticks: The values that get a number.
        threshold: The threshold of `"symlog"`.
    """

    kind: Literal["linear", "log", "symlog"]
    low: float
    high: float
    ticks: tuple[float, ...]
    threshold: float = 1.0

    def norm(self) -> Normalize:
        """Return matplotlib's norm, which maps values to positions in a colour map."""
        if self.kind == "log":
            return LogNorm(self.low, self.high)
        if self.kind == "symlog":
            return SymLogNorm(self.threshold, vmin=self.low, vmax=self.high)
        return Normalize(self.low, self.high)


def choose_axes(runs: Sequence[Run], rows: Sequence[Row], margin: bool) -> list[Axis]:
    """Choose the axis of every row.

    Args:
        runs: The runs, all on the same axes.
        rows: The quantities.
        margin: Whether to leave space around the values, for lines.

    Returns:
        An axis for each row.
    """
    axes: list[Axis] = []
    for row in rows:
        known = [run.series.get((layer, row.quantity)) for run in runs for layer in run.layers]
        drawn = [row.factor * series.values[drawable(series.values)] for series in known if series is not None]
        axes.append(choose_axis(row, drawn, margin))
    return axes


def choose_axis(row: Row, values: Sequence[Floats], margin: bool) -> Axis:
    """Choose the axis of a row.

    Args:
        row: The quantity.
        values: The drawable values of each layer of each run, in the drawn unit.
        margin: Whether to leave space around the values, for lines.

    Returns:
        The axis.
    """
    joined = np.concatenate([*values, np.empty(0)])
    low, high = (float(joined.min()), float(joined.max())) if joined.size else (0.0, 0.0)
    if row.reference is not None:
        high = max(high, 1.1 * row.reference)
    if row.signed and max(-low, high) < 1 / HUGE:
        low, high = -1.0, 1.0
    elif row.signed and not margin:
        low, high = -max(-low, high), max(-low, high)
    if row.ratios and low > 1 / HUGE:
        return _log(low, high, margin)
    if row.from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    peaks = [float(np.abs(own).max()) for own in values if own.size]
    peaks = [peak for peak in peaks if peak > 1 / HUGE]
    usual = float(np.quantile(peaks, 0.1, method="lower")) if peaks else math.inf
    if max(peaks, default=0.0) > row.spread * usual:
        return _symlog(min(low, 0.0), high, usual / 5, margin)
    return _linear(low, high, margin)


def _linear(low: float, high: float, margin: bool) -> Axis:
    if high - low < max(1e-9 * max(-low, high), 1 / HUGE):
        pad = 0.5 * max(-low, high)
        low, high = (low - pad, high + pad) if pad > 1 / HUGE else (0.0, 1.0)
    ticks = _round_numbers(low, high)
    pad = 0.05 * (high - low) if margin else 0.0
    return Axis("linear", low - pad, high + pad, _within(ticks, low - pad, high + pad))


def _log(low: float, high: float, margin: bool) -> Axis:
    if high < 1.02 * low:
        low, high = low / 1.02, high * 1.02
    pad = (high / low) ** 0.05 if margin else 1.0
    low, high = low / pad, high * pad
    decades = [10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    ticks = _within([digit * decade for decade in decades for digit in (1, 2, 5)], low, high)
    if len(ticks) < 3:
        ticks = _within(_round_numbers(low, high), low, high)
    elif len(ticks) > 6:
        whole = _within(decades, low, high)
        ticks = whole[:: math.ceil(len(whole) / 6)]
    return Axis("log", low, high, ticks)


def _symlog(low: float, high: float, start: float, margin: bool) -> Axis:
    """Return an axis that is linear around 0, and logarithmic over at most six decades above `start`."""
    top = math.floor(math.log10(max(-low, high)))
    bottom = max(math.floor(math.log10(start)), top - 6)
    decades = [10.0**k for k in range(top, bottom - 1, -math.ceil((top - bottom + 1) / (4 if low == 0 else 2)))]
    ticks = _within([*(-decade for decade in decades), 0.0, *reversed(decades)], low, high)
    threshold = 10.0**bottom
    if margin:
        low, high = 1.5 * low - 0.2 * threshold, 1.5 * high + 0.2 * threshold
    return Axis("symlog", low, high, ticks, threshold)


def _round_numbers(low: float, high: float) -> Floats:
    return np.asarray(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))


def _within(ticks: Sequence[float] | Floats, low: float, high: float) -> tuple[float, ...]:
    slack = 1e-9 * (high - low)
    return tuple(min(max(float(tick), low), high) for tick in ticks if low - slack <= tick <= high + slack)
