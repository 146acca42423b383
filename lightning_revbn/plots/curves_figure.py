"""Draws a scalar over training: mean and interval of every arm, and the paired differences below."""

# pyright: reportUnknownMemberType=false
# Most functions of matplotlib have untyped keyword arguments.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from lightning_revbn.plots.fitted_text import elided, wrapped
from lightning_revbn.plots.layer_rows import NOTHING_FINITE, drawable, lone
from lightning_revbn.plots.output import NORMAL, settings
from lightning_revbn.plots.step_axis import step_label
from lightning_revbn.runs.curves import Band, CurveComparison, ahead_for_good
from lightning_revbn.runs.names import one_line

__all__ = ["draw"]

_BASELINE = "0.25"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""The colours of Okabe and Ito, which colour-blind readers can tell apart."""
_DASHED = ",\ndashed: from where an arm is ahead for good"
_MOST_INSIDE = 6  # arms; the names of more arms would cover the curves
_MOST_ROWS = 13  # of names beside the curves
_NAME_WIDTH = 2.0  # in inches


def draw(comparisons: Sequence[CurveComparison], key: str, lower_is_better: bool) -> Figure:
    """Draw all arms into one figure.

    Args:
        comparisons: The arms, each against the same baseline.
        key: The key of the scalar.
        lower_is_better: Whether lower values are better, as for a loss.

    Returns:
        The figure.
    """
    with settings():
        return _draw(comparisons, key, lower_is_better)


def _draw(comparisons: Sequence[CurveComparison], key: str, lower_is_better: bool) -> Figure:
    names = ["Baseline", *(one_line(comparison.label) for comparison in comparisons)]
    short = [*map(elided, names)]
    alike = len(set(short)) < len(short)
    columns = 1 + len(comparisons) // _MOST_ROWS if alike or len(comparisons) > _MOST_INSIDE else 0
    figure: Any = Figure(figsize=(6.4 + 2.2 * columns, 5.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    first = max(comparisons, key=lambda comparison: len(comparison.steps))
    _draw_band(above, first.steps, first.baseline, _BASELINE)
    below.axhline(0, color=_BASELINE, linewidth=0.8)
    many = len(comparisons) > len(_COLOURS)
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.85, len(comparisons))) if many else _COLOURS
    for comparison, colour in zip(comparisons, colours, strict=False):
        _draw_band(above, comparison.steps, comparison.proposed, colour)
        _draw_band(below, comparison.steps, comparison.difference, colour)
        ahead = ahead_for_good(comparison, lower_is_better)
        if ahead is not None:
            # Above the spines, which stand where an arm is ahead from its first step on.
            below.axvline(ahead, color=colour, linewidth=1.5, linestyle=(0, (4, 2)), clip_on=False, zorder=3)
    ends = [step for comparison in comparisons for step in comparison.steps[[0, -1]].tolist()]
    pad = 0.5 if min(ends) == max(ends) else 0.0
    below.set_xlim(min(ends) - pad, max(ends) + pad)
    above.set_ylabel(one_line(key, 60))
    below.set_ylabel(f"Difference from the\nbaseline ({'below' if lower_is_better else 'above'} 0: ahead)")
    below.set_xlabel("Training step")
    below.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    below.xaxis.set_major_formatter(FuncFormatter(step_label))
    for panel in (above, below):
        panel.grid(axis="y", color="0.92", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    bands = [first.baseline, *(comparison.proposed for comparison in comparisons)]
    lines = [Line2D([], [], color=colour) for colour in (_BASELINE, *colours[: len(comparisons)])]
    place: dict[str, Any] = {"ncols": columns, "loc": "outside right upper"} if columns else {}
    legend = (figure if columns else above).legend(lines, [*map(str, range(len(lines)))], frameon=False, **place)
    shown = [wrapped(name, _NAME_WIDTH, lines=_MOST_ROWS) for name in names] if alike else short
    for text, name, band in zip(legend.get_texts(), shown, bands, strict=True):
        nothing = "" if _drawn(band).any() else f"\n({NOTHING_FINITE})"
        # Set as a text, since matplotlib leaves out labels with a leading underscore.
        text.set_text(name + nothing)
    is_ahead = any(ahead_for_good(comparison, lower_is_better) is not None for comparison in comparisons)
    figure.suptitle(
        f"Mean of {first.pairs} runs and its 95 % interval at each step; below: paired differences"
        f"{_DASHED if is_ahead else ''}",
        fontsize=NORMAL,
    )
    return figure


def _draw_band(panel: Any, steps: Any, band: Band, colour: Any) -> None:
    """Draw a mean and its interval, with a gap where a run has no finite value, and a cross where a gap begins."""
    good = _drawn(band)
    low, mean, high = (np.where(good, values, np.nan) for values in (band.low, band.mean, band.high))
    panel.plot(steps, mean, color=colour, linewidth=1.5, marker="o", markersize=4, markevery=lone(good))
    panel.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
    panel.vlines(steps[lone(good)], low[lone(good)], high[lone(good)], color=colour, alpha=0.5)
    edge = np.flatnonzero(good[:-1] & ~good[1:])
    panel.plot(steps[edge], mean[edge], color=colour, linestyle="", marker="X", markersize=6)


def _drawn(band: Band) -> NDArray[np.bool_]:
    return drawable(band.mean) & drawable(band.low) & drawable(band.high)
