"""Draws a quantity of many layers as median and bands: a single line over all layers would hide most of them."""

# pyright: reportUnknownMemberType=false
# Most functions of matplotlib have untyped keyword arguments.

from __future__ import annotations

import warnings

import numpy as np
from matplotlib.axes import Axes

from lightning_revbn.plots.layer_axes import Axis, choose_axis
from lightning_revbn.plots.layer_rows import Floats, Row, values_by_layer
from lightning_revbn.runs.batch_norm_runs import Run

__all__ = ["CROWD_TITLE", "choose_crowd_axis", "draw_crowd"]

CROWD_TITLE = "median of layers, middle\n80 %, and all (pale)"
"""The text below the title of a row."""

_COLOUR = "#31688e"
_QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)


def draw_crowd(panel: Axes, run: Run, row: Row) -> None:
    """Draw the layers of a run.

    Args:
        panel: The axes to draw into.
        run: The run.
        row: The quantity.
    """
    steps, (least, low, median, high, most) = _quantiles(run, row)
    for below, above, opacity in ((least, most, 0.18), (low, high, 0.3)):
        panel.fill_between(steps, below, above, color=_COLOUR, alpha=opacity, linewidth=0)
    panel.plot(steps, median, color=_COLOUR, linewidth=1.4, marker="o" if len(steps) == 1 else "", markersize=3)
    if row.reference is not None:
        panel.axhline(row.reference, color="black", linewidth=0.8, linestyle=(0, (3, 2)))


def choose_crowd_axis(runs: list[Run], row: Row) -> Axis:
    """Choose the axis of a row, the same for all runs.

    Args:
        runs: The runs.
        row: The quantity.

    Returns:
        The axis.
    """
    ends = [ends for run in runs for ends in _quantiles(run, row)[1]]
    return choose_axis(row, [values[np.isfinite(values)] for values in ends], margin=True)


def _quantiles(run: Run, row: Row) -> tuple[Floats, Floats]:
    """Return the steps, shape `(N,)`, and the quantiles over the layers at each step, shape `(5, N)`."""
    steps, table = values_by_layer(run, row)
    if not len(steps):
        return steps, np.empty((len(_QUANTILES), 0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)  # a step may have no value of any layer
        return steps, np.nanquantile(table, _QUANTILES, axis=0)
