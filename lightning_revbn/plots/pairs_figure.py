"""Draws pairs of scores: a line from the baseline to the proposed run of every seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_revbn.plots.fitted_text import wrapped
from lightning_revbn.plots.output import NORMAL, SMALL, settings
from lightning_revbn.runs.names import one_line

__all__ = ["draw", "draw_pairs"]

_MOST_IN_A_ROW = 6
_LABEL_WIDTH = 1.2  # in inches

_HIGHER, _LOWER, _TIE = "#0072B2", "#D55E00", "#8C8C8C"  # blue, vermilion, grey: safe for colour-blind readers


def draw(
    baseline: Sequence[float], arms: Mapping[str, Sequence[float]], metric: str, notes: Mapping[str, str] | None = None
) -> Figure:
    """Draw a panel for every proposed arm, all on the same axis.

    Args:
        baseline: Scores of the baseline, shape `(n,)`.
        arms: Scores of the same seeds by label, each of shape `(n,)`.
        metric: The key of the scores.
        notes: The result of an arm's test by label, in two short lines above its panel.

    Returns:
        The figure.
    """
    with settings():  # labels of runs and metrics are not formulas
        return _draw(baseline, arms, metric, notes or {})


def _draw(
    baseline: Sequence[float], arms: Mapping[str, Sequence[float]], metric: str, notes: Mapping[str, str]
) -> Figure:
    columns = min(len(arms), _MOST_IN_A_ROW)
    rows = -(-len(arms) // columns)
    figure: Any = Figure(figsize=(1.2 + 2.6 * columns, 0.4 + 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    short = [wrapped(label, _LABEL_WIDTH) for label in arms]
    lines = 3 if len(set(short)) == len(short) else 20  # if the ends of the labels do not tell the arms apart
    for panel, (label, scores) in zip(panels.flat, arms.items(), strict=False):
        draw_pairs(panel, baseline, scores, label, lines)
        panel.set_title(notes.get(label, ""), fontsize=SMALL)
    for panel in panels.flat[len(arms) :]:
        panel.set_axis_off()
    for panel in panels[:, 0]:
        panel.set_ylabel(one_line(metric, 60))
    figure.suptitle("A line per seed (blue: higher, orange: lower), black: mean", fontsize=NORMAL)
    return figure


def draw_pairs(panel: Axes, baseline: Sequence[float], proposed: Sequence[float], label: str, lines: int = 3) -> None:
    """Draw the pairs of an arm.

    Args:
        panel: The axes to draw into.
        baseline: Scores of the baseline, shape `(n,)`.
        proposed: Scores of the same seeds, shape `(n,)`.
        label: The name of the arm.
        lines: Largest number of lines for the name.
    """
    axes: Any = panel  # matplotlib types only a part of its keyword arguments
    for before, after in zip(baseline, proposed, strict=True):
        colour = _TIE if before == after else _HIGHER if after > before else _LOWER
        axes.plot((0, 1), (before, after), color=colour, alpha=0.6, linewidth=1.2, marker="o", markersize=4)
    means = statistics.fmean(baseline), statistics.fmean(proposed)
    axes.plot((0, 1), means, color="black", linewidth=2.5, marker="D", markersize=7)
    for x, mean, side, offset in ((0, means[0], "right", -10), (1, means[1], "left", 10)):
        axes.annotate(f"{mean:.4g}", (x, mean), (offset, 0), textcoords="offset points", ha=side, va="center")
    axes.set_xticks((0, 1), ("Baseline", wrapped(label, _LABEL_WIDTH, lines)))
    axes.set_xlim(-0.45, 1.45)
    axes.spines[["top", "right"]].set_visible(False)
