"""The quantities of a layer that are drawn, a row of panels for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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

__all__ = ["HUGE", "ROWS", "Floats", "Row", "drawable", "gaps", "logged_rows"]

Floats: TypeAlias = NDArray[np.float64]

HUGE = 1e30
"""From here on a value is as good as infinite: nothing else could be seen beside it."""

_NORMAL_OVER_3 = 100 * math.erfc(3 / math.sqrt(2))  # % of a normal distribution beyond three deviations: 2 (1 - Phi(3))
_X_HAT = "|x\N{COMBINING CIRCUMFLEX ACCENT}|"


@dataclass(frozen=True)
class Row:
    """A quantity to draw.

    Args:
        quantity: Its key.
        title: What it is, in two short lines at most.
        factor: From the logged unit to the drawn one.
        signed: Whether 0 is the middle.
        ratios: Whether equal factors are equally far apart, as for scales: 0.1 to 0.2 is like 1 to 2.
        from_zero: Whether 0 is always shown.
        spread: How many times less a tenth of the layers may move than the others before a linear axis would show them
            as lying at 0.
        reference: A value to mark.
    """

    quantity: str
    title: str
    factor: float = 1.0
    signed: bool = False
    ratios: bool = False
    from_zero: bool = True
    spread: float = 20.0
    reference: float | None = None


ROWS = (
    Row(SCALE_MEAN, "Mean scale", ratios=True, spread=4),
    Row(SHIFT_MEAN, "Mean shift", signed=True, spread=300),
    Row(SCALE_DRIFT, "Drift of scale"),
    Row(SHIFT_DRIFT, "Drift of shift"),
    Row(NORMALIZED_ABSMAX, f"Greatest {_X_HAT}", from_zero=False),
    Row(
        NORMALIZED_OVER_3,
        f"Share of {_X_HAT} > 3\n(%; normal: {_NORMAL_OVER_3:.2f})",
        factor=100,
        reference=_NORMAL_OVER_3,
    ),
)
"""All rows, from the top."""


def logged_rows(runs: Sequence[Run]) -> list[Row]:
    """Return what there is to draw.

    Args:
        runs: The runs.

    Returns:
        The quantities that a layer of any run has.
    """
    return [row for row in ROWS if any((layer, row.quantity) in run.series for run in runs for layer in run.layers)]


def gaps(run: Run) -> str:
    """Say which values of a run cannot be drawn.

    Args:
        run: The run.

    Returns:
        A line; empty if all can.
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


def drawable(values: Floats) -> NDArray[np.bool_]:
    """Tell which values can be drawn.

    Args:
        values: Shape `(N,)`.

    Returns:
        Where they are neither NaN nor as good as infinite, shape `(N,)`.
    """
    return np.abs(values) < HUGE  # not so for NaN
