"""The quantities of a layer that a figure shows, a row of panels for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lightning_revbn.core.metric_keys import (
    NORMALIZED_ABSMAX,
    NORMALIZED_OVER_3,
    SCALE_DRIFT,
    SCALE_MEAN,
    SHIFT_DRIFT,
    SHIFT_MEAN,
)
from lightning_revbn.runs.batch_norm_runs import Run
from lightning_revbn.runs.names import one_line
from lightning_revbn.runs.scalars import Series

__all__ = [
    "HUGE",
    "NOTHING_FINITE",
    "ROWS",
    "Floats",
    "Row",
    "drawable",
    "first_gap",
    "gaps",
    "logged_rows",
    "lone",
    "relative_to_start",
    "values_by_layer",
]

Floats: TypeAlias = NDArray[np.float64]

NOTHING_FINITE = "all NaN or infinite"

HUGE = 1e30
"""Values from here on count as infinite and are not drawn: no other value would be visible beside them."""

_NORMAL_OVER_3 = 100 * math.erfc(3 / math.sqrt(2))  # % of a normal distribution beyond three deviations: 2 (1 - Phi(3))
_X_HAT = "|x\N{COMBINING CIRCUMFLEX ACCENT}|"


@dataclass(frozen=True)
class Row:
    """A quantity to draw.

    Args:
        quantity: The key of the quantity.
        title: The title, in at most two short lines.
        factor: Factor from the logged unit to the drawn unit.
        signed: Whether 0 is in the middle.
        ratios: Whether equal ratios are drawn equally far apart, as for scales: 0.1 to 0.2 like 1 to 2.
        from_zero: Whether 0 is always shown.
        spread: Largest ratio of the highest peak to the peak of the quietest tenth of layers. Above this ratio a linear
            axis would show these layers as 0, so the axis becomes `"symlog"`.
        reference: A value to mark.
        is_crowd: Whether many layers are drawn as median and bands, since single values are mostly noise.
        relative: The row of a heat map: with plain values, colours would show the difference of 1 to 0.1, and hide
            smaller changes.
    """

    quantity: str
    title: str
    factor: float = 1.0
    signed: bool = False
    ratios: bool = False
    from_zero: bool = True
    spread: float = 20.0
    reference: float | None = None
    is_crowd: bool = False
    relative: Row | None = None


ROWS = (
    Row(
        SCALE_MEAN,
        "Mean scale",
        ratios=True,
        spread=4,
        relative=Row(SCALE_MEAN, "Mean scale: log2 of\nscale / first value", signed=True, spread=300),
    ),
    Row(SHIFT_MEAN, "Mean shift", signed=True, spread=300),
    Row(SCALE_DRIFT, "Drift of scale"),
    Row(SHIFT_DRIFT, "Drift of shift"),
    Row(NORMALIZED_ABSMAX, f"Greatest {_X_HAT}", from_zero=False, is_crowd=True),
    Row(
        NORMALIZED_OVER_3,
        f"Share of {_X_HAT} > 3\n(%; normal: {_NORMAL_OVER_3:.2f})",
        factor=100,
        reference=_NORMAL_OVER_3,
        is_crowd=True,
    ),
)
"""All rows, from the top."""


def logged_rows(runs: Sequence[Run]) -> list[Row]:
    """Return the quantities that can be drawn.

    Args:
        runs: The runs.

    Returns:
        The quantities that some layer of some run has.
    """
    return [row for row in ROWS if any((layer, row.quantity) in run.series for run in runs for layer in run.layers)]


def gaps(run: Run) -> str:
    """Say which values of a run cannot be drawn.

    Args:
        run: The run.

    Returns:
        A line; empty if all values can be drawn.
    """
    bad: dict[str, int] = {}
    for layer in run.layers:
        known = [run.series[layer, row.quantity] for row in ROWS if (layer, row.quantity) in run.series]
        count = sum(int((~drawable(series.values)).sum()) for series in known)
        if count:
            bad[layer] = count
    if not bad:
        return ""
    layers = ", ".join(one_line(layer or run.unnamed) for layer in list(bad)[:3]) + (", ..." if len(bad) > 3 else "")
    return f"{one_line(run.label)}: values that are NaN or infinite are drawn as gaps: {sum(bad.values())} of {layers}"


def first_gap(run: Run, row: Row) -> int | None:
    """Find the first step at which a value of a layer is NaN or infinite.

    Args:
        run: The run.
        row: The quantity.

    Returns:
        The step; None if all values can be drawn.
    """
    known = [run.series[layer, row.quantity] for layer in run.layers if (layer, row.quantity) in run.series]
    firsts = [series.steps[~drawable(series.values)][:1] for series in known]
    return min((int(step) for first in firsts for step in first), default=None)


def relative_to_start(run: Run) -> Run:
    """Replace every mean scale by log2 of its ratio to the layer's first mean scale.

    Args:
        run: The run.

    Returns:
        The run; NaN where a ratio is not positive and finite.
    """
    series = dict(run.series)
    for (layer, quantity), scale in run.series.items():
        if quantity == SCALE_MEAN and len(scale.values):
            with np.errstate(all="ignore"):
                ratios = np.log2(scale.values / scale.values[0])
            series[layer, quantity] = Series(scale.steps, np.where(np.isfinite(ratios), ratios, np.nan))
    return replace(run, series=series)


def values_by_layer(run: Run, row: Row) -> tuple[Floats, Floats]:
    """Join the series of all layers.

    Args:
        run: The run.
        row: The quantity.

    Returns:
        The steps at which the quantity was logged, shape `(N,)`, and the values in the drawn unit, shape
        `(layers, N)`, NaN where a layer has no drawable value.
    """
    of_layers = [run.series.get((layer, row.quantity)) for layer in run.layers]
    known = [series.steps for series in of_layers if series is not None]
    steps = np.unique(np.concatenate([*known, np.empty(0, dtype=np.int64)]))
    table = np.full((len(run.layers), len(steps)), np.nan)
    for i, series in enumerate(of_layers):
        if series is not None:
            good = drawable(series.values)
            table[i, np.searchsorted(steps, series.steps[good])] = row.factor * series.values[good]
    return steps.astype(np.float64), table


def lone(good: NDArray[np.bool_]) -> list[int]:
    """Find the points that a line cannot show, since a line needs two points.

    Args:
        good: Which values can be drawn, shape `(N,)`.

    Returns:
        The positions of drawable values without a drawable neighbour.

    Example:
        >>> lone(np.array([True, False, True, True, False, True]))
        [0, 5]
    """
    return np.flatnonzero(good & ~np.append(good[1:], False) & ~np.append(False, good[:-1])).tolist()


def drawable(values: Floats) -> NDArray[np.bool_]:
    """Tell which values can be drawn.

    Args:
        values: Shape `(N,)`.

    Returns:
        True where a value is not NaN and its absolute value is below `HUGE`, shape `(N,)`.
    """
    return np.abs(values) < HUGE  # False for NaN
