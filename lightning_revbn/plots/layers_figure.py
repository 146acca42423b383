"""Draws runs side by side: a column for each run, a row for each quantity, the same axes across a row."""

# pyright: reportUnknownMemberType=false
# Most functions of matplotlib have untyped keyword arguments.

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, cast

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from lightning_revbn.plots.crowd_panel import CROWD_TITLE, choose_crowd_axis, draw_crowd
from lightning_revbn.plots.fitted_text import elided, text_width, wrapped
from lightning_revbn.plots.layer_axes import Axis, choose_axes
from lightning_revbn.plots.layer_rows import (
    NOTHING_FINITE,
    Floats,
    Row,
    drawable,
    first_gap,
    gaps,
    logged_rows,
    lone,
    relative_to_start,
    values_by_layer,
)
from lightning_revbn.plots.layer_stages import common_prefix, name_rows
from lightning_revbn.plots.output import HEAT_MAP, SMALL, settings
from lightning_revbn.plots.step_axis import step_label
from lightning_revbn.runs.batch_norm_runs import Run
from lightning_revbn.runs.names import one_line

__all__ = ["NOTHING_FINITE", "NOT_LOGGED", "Style", "draw"]

Style: TypeAlias = Literal["auto", "lines", "heatmap"]

_MOST_LINES = 24  # layers; with more layers, lines cannot be told apart
_FEW_LINES = 8  # layers up to which every line has another dash pattern than its neighbours

_LABEL_HEIGHT = 1.2 * SMALL / 72  # inches, as all lengths below
_PANEL_WIDTH, _NARROW_PANEL_WIDTH = 2.6, 2.1
_LINES_HEIGHT, _HEAT_HEIGHT = 1.4, 1.75

_LINE_STYLES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)))
_PALE = 0.82  # the end of viridis is pale on white
_STEPS = 64  # colours of a map: more than an eye can tell apart, in a quarter of the file size
_GAP = "0.8"
_FIRST_GAP = "#E8000B"
NOT_LOGGED = "not logged"


def draw(runs: Sequence[Run], style: Style = "auto") -> Figure:
    """Draw runs.

    Args:
        runs: The runs; at least one run has a quantity to draw.
        style: Lines, or heat maps with a row for each layer; `"auto"` draws lines for up to 24 layers.

    Returns:
        The figure.
    """
    rows = logged_rows(runs)
    heat = style == "heatmap" or (style == "auto" and max(len(run.layers) for run in runs) > _MOST_LINES)
    with settings():
        return _draw_heat(runs, rows) if heat else _draw_lines(runs, rows)


def _draw_lines(runs: Sequence[Run], rows: Sequence[Row]) -> Figure:
    deep = max(len(run.layers) for run in runs) > _MOST_LINES
    alike = _alike(runs)
    if alike or deep:
        beside, below, width = 1.0 + _names_width(runs[0]), 0.0, 0.0
    else:  # each run's legend is below its panels, and the panels are as wide as the widest legend
        beside, below = 0.3, 0.6 + 1.4 * _LABEL_HEIGHT * max(len(run.layers) for run in runs)
        width = 0.7 + max(_names_width(run) for run in runs)
    # The legend of many layers is higher than a single row of panels beside it.
    legend = 0.0 if deep or not alike else 0.4 + 1.4 * _LABEL_HEIGHT * (1 + len(runs[0].layers))
    height = max(_LINES_HEIGHT, (legend - 0.6) / len(rows))
    figure, panels = _panels(runs, rows, height, beside, below, width)
    for row, axis, line in zip(rows, choose_axes(runs, rows, margin=True), panels, strict=True):
        if deep and row.is_crowd:
            _draw_crowds(line, runs, row)
            continue
        for run, panel in zip(runs, line, strict=True):
            _draw_curves(panel, run, row)
            _set_axis(panel, axis)
            panel.tick_params(labelleft=panel is line[0])
        line[0].set_ylabel(row.title)
    panels[0][0].set_xlim(*_all_steps(runs, rows))
    figure.align_ylabels()
    if deep:
        _add_depth_bar(figure, runs, [panel for line in panels for panel in line])
    elif alike:
        _add_legend(runs[0], figure, loc="outside right upper")
    else:
        for run, panel in zip(runs, panels[-1], strict=True):
            below_labels = panel.transAxes + ScaledTranslation(0, -0.45, figure.dpi_scale_trans)
            _add_legend(run, panel, loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below_labels)
    if any(gaps(run) for run in runs):
        figure.supxlabel("Gaps: values that are NaN or infinite; red: the first")
    return figure


def _draw_heat(given: Sequence[Run], rows: Sequence[Row]) -> Figure:
    # Scales that start at different values can be compared only as ratios to their start.
    runs, rows = [relative_to_start(run) for run in given], [row.relative or row for row in rows]
    alike = _alike(runs)
    deep = max(len(run.layers) for run in runs) > _MOST_LINES
    beside = 0.9 + sum(_names_width(run) for run in (runs[:1] if alike else runs))
    figure, panels = _panels(runs, rows, _HEAT_HEIGHT, beside)
    for row, axis, line in zip(rows, choose_axes(runs, rows, margin=False), panels, strict=True):
        if deep and row.is_crowd:
            _draw_crowds(line, runs, row)
            continue
        norm = axis.norm()
        colours = mpl.colormaps["RdBu_r" if row.signed else "viridis"].resampled(_STEPS + row.signed)
        colours = colours.with_extremes(bad=_GAP)
        for run, panel in zip(runs, line, strict=True):
            _draw_map(panel, run, row, norm, colours)
            _label_layers(panel, run, names=panel is line[0] or not alike)
        bar = figure.colorbar(
            ScalarMappable(norm, colours),
            ax=line,
            ticks=FixedLocator(axis.ticks),
            format=FuncFormatter(_number),
            aspect=14,
            pad=0.02,
        )
        bar.set_label(row.title)
        bar.ax.minorticks_off()
        if row.reference is not None:
            halo = withStroke(linewidth=2.5, foreground="white")
            bar.ax.axhline(row.reference, color="black", linewidth=1, path_effects=[halo])
    order = "from input (top) to output" if all(run.by_depth for run in runs) else "by name"
    title = f"{_layers_title(runs[0]) if alike else 'Layers'}, {order}"
    if not (deep and all(row.is_crowd for row in rows)):
        figure.supylabel(wrapped(title, figure.get_figheight() - 0.2))
    if any(gaps(run) for run in given):
        figure.supxlabel("Grey: values that are NaN or infinite, or were not logged; red: the first NaN or infinity")
    elif any(gaps(run) for run in runs):
        figure.supxlabel("Grey: scales that started at 0, or changed their sign")
    return figure


def _draw_crowds(line: Sequence[Axes], runs: Sequence[Run], row: Row) -> None:
    axis = choose_crowd_axis([*runs], row)
    for run, panel in zip(runs, line, strict=True):
        draw_crowd(panel, run, row)
        _set_axis(panel, axis)
        panel.tick_params(labelleft=panel is line[0])
        panel.set_axisbelow(True)
        panel.grid(axis="y", color="0.92", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    line[0].set_ylabel(f"{row.title}\n{CROWD_TITLE}")


def _all_steps(runs: Sequence[Run], rows: Sequence[Row]) -> tuple[float, float]:
    """Return the ends of the axis: a diverged run is shown to its last step, although it has no value to draw."""
    steps = np.concatenate([values_by_layer(run, row)[0] for run in runs for row in rows])
    first, last = float(steps.min()), float(steps.max())
    pad = 0.05 * (last - first) or 0.5
    return first - pad, last + pad


def _panels(
    runs: Sequence[Run], rows: Sequence[Row], height: float, beside: float, below: float = 0.0, width: float = 0.0
) -> tuple[Figure, list[list[Axes]]]:
    width = max(width, _PANEL_WIDTH if len(runs) < 4 else _NARROW_PANEL_WIDTH)
    figure = Figure((beside + width * len(runs), 0.6 + height * len(rows) + below), layout="constrained")
    axes: Any = figure.subplots(len(rows), len(runs), sharex=True, squeeze=False)
    panels = cast("list[list[Axes]]", axes.tolist())
    for run, panel in zip(runs, panels[0], strict=True):
        panel.set_title(wrapped(run.label, width - 0.4))
    for panel in panels[-1]:
        panel.set_xlabel("Training step")
        panel.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, min_n_ticks=1))
        panel.xaxis.set_major_formatter(FuncFormatter(step_label))
    for row, line in zip(rows, panels, strict=True):
        for run, panel in zip(runs, line, strict=True):
            known = [run.series[layer, row.quantity] for layer in run.layers if (layer, row.quantity) in run.series]
            if not any(drawable(series.values).any() for series in known):
                text = NOTHING_FINITE if known else NOT_LOGGED
                blank = {"facecolor": "white", "edgecolor": "none"}
                panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", va="center", bbox=blank, zorder=9)
            gap = first_gap(run, row)
            if gap is not None:
                halo = withStroke(linewidth=2.2, foreground="white")
                panel.axvline(gap, color=_FIRST_GAP, linewidth=1, linestyle=(0, (2, 1)), path_effects=[halo], zorder=8)
    return figure, panels


def _draw_curves(panel: Axes, run: Run, row: Row) -> None:
    if row.reference is not None:
        panel.axhline(row.reference, color="black", linewidth=0.8, linestyle=(0, (3, 2)))
    if row.signed:
        panel.axhline(0, color="0.6", linewidth=0.8)
    for layer, (colour, dashes) in zip(run.layers, _looks(run), strict=True):
        series = run.series.get((layer, row.quantity))
        if series is None:
            continue
        good = drawable(series.values)
        panel.plot(
            series.steps,
            row.factor * np.where(good, series.values, np.nan),
            color=colour,
            linestyle=dashes,
            linewidth=1.1 if len(run.layers) <= _MOST_LINES else 0.7,
            marker="o",
            markersize=3,
            markevery=lone(good),
        )
    panel.grid(axis="y", color="0.92", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def _set_axis(panel: Axes, axis: Axis) -> None:
    if axis.kind == "log":
        panel.set_yscale("log")
    elif axis.kind == "symlog":
        panel.set_yscale("symlog", linthresh=axis.threshold)
    panel.set_ylim(axis.low, axis.high)
    panel.yaxis.set_major_locator(FixedLocator(axis.ticks))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(_number))


def _draw_map(panel: Axes, run: Run, row: Row, norm: Normalize, colours: Colormap) -> None:
    steps, table = values_by_layer(run, row)
    rows = np.arange(len(run.layers) + 1) - 0.5
    if len(steps):
        # In an SVG or PDF, every cell of a mesh that is not rasterised would be an object of its own.
        panel.pcolormesh(_edges(steps), rows, table, norm=norm, cmap=colours, rasterized=True, label=HEAT_MAP)
    panel.set_ylim(len(run.layers) - 0.5, -0.5)


def _label_layers(panel: Axes, run: Run, names: bool) -> None:
    shown = _shown(run)
    room = int(0.88 * _HEAT_HEIGHT / _LABEL_HEIGHT)
    apart = math.ceil(len(shown) / room)
    stages, labels = name_rows(shown, apart)
    edges: list[float] = []
    if len(stages) <= room < len(shown):
        edges = sorted({edge - 0.5 for stage in labels for edge in (stage.first, stage.stop)})
    panel.set_yticks(edges, [""] * len(edges))
    panel.set_yticks([stage.middle for stage in labels], [elided(s.name) if names else "" for s in labels], minor=True)
    panel.tick_params(axis="y", length=6)
    panel.tick_params(axis="y", which="minor", length=0 if edges else 2.5, pad=8 if edges else 3)


def _edges(steps: Floats) -> Floats:
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    return np.array([2 * steps[0] - middles[0], *middles, 2 * steps[-1] - middles[-1]])


def _looks(run: Run) -> list[tuple[Any, Any]]:
    """Return the colour and the line style of every layer.

    Colours show the depth: deeper layers are lighter, also in grey print. Up to 8 layers, styles tell neighbours
    apart. Up to 24 layers, styles show a layer's role in its block (bn1, bn2, downsample). More layers are all solid.
    """
    colours = _depth_colours()(np.linspace(0, 1, max(2, len(run.layers))))
    if len(run.layers) <= _FEW_LINES:
        styles = [i % len(_LINE_STYLES) for i in range(len(run.layers))]
    else:
        roles = [_role(layer) for layer in run.layers]
        kinds = list(dict.fromkeys(roles))
        few = len(kinds) <= len(_LINE_STYLES) and len(run.layers) <= _MOST_LINES
        styles = [kinds.index(role) if few else 0 for role in roles]
    return [(colours[i], _LINE_STYLES[style]) for i, style in enumerate(styles)]


def _role(layer: str) -> str:
    return next((part for part in reversed(layer.split(".")) if not part.isdigit()), "")


def _depth_colours() -> Colormap:
    return ListedColormap(mpl.colormaps["viridis"](np.linspace(0, _PALE, 256)))


def _add_legend(run: Run, where: Figure | Axes, **options: Any) -> None:
    marker = "o" if all(len(series.steps) == 1 for series in run.series.values()) else ""
    handles = [
        Line2D([], [], color=colour, linestyle=dashes, linewidth=1.1, marker=marker, markersize=3)
        for colour, dashes in _looks(run)
    ]
    order = "" if run.by_depth else ", by name"
    legend = where.legend(
        handles,
        [str(i) for i in range(len(handles))],
        title=f"{_layers_title(run)}{order}",
        frameon=False,
        handlelength=3.2,
        alignment="left",
        **options,
    )
    for text, name in zip(legend.get_texts(), _shown(run), strict=True):
        text.set_text(elided(name))  # matplotlib leaves out labels with a leading underscore


def _add_depth_bar(figure: Figure, runs: Sequence[Run], panels: Sequence[Axes]) -> None:
    shown = _shown(runs[0]) if _alike(runs) else ["input", "output"]
    last = len(shown) - 1
    bar = figure.colorbar(ScalarMappable(Normalize(0, last), _depth_colours()), ax=panels, pad=0.02, aspect=40)
    room = int(0.8 * figure.get_figheight() / _LABEL_HEIGHT)
    apart = math.ceil(len(shown) / room)
    _, labels = name_rows(shown, apart)
    bar.set_ticks([stage.middle for stage in labels], labels=[elided(stage.name) for stage in labels])
    bar.ax.minorticks_off()
    bar.ax.invert_yaxis()
    bar.set_label(_layers_title(runs[0]) if _alike(runs) else "Layers, by depth")


def _alike(runs: Sequence[Run]) -> bool:
    return all(run.layers == runs[0].layers and run.whole_model == runs[0].whole_model for run in runs)


def _layers_title(run: Run) -> str:
    prefix = common_prefix(run.layers)
    return f"Layers of {elided(prefix[:-1])}" if prefix else "Layers"


def _shown(run: Run) -> list[str]:
    prefix = common_prefix(run.layers)
    return [one_line(layer[len(prefix) :]) or run.unnamed for layer in run.layers]


def _names_width(run: Run) -> float:
    return max(text_width(elided(name), SMALL) for name in _shown(run))


def _number(value: float, position: int | None = None) -> str:
    return f"{value:.6g}".replace("-", "\N{MINUS SIGN}")
