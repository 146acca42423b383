"""Draws runs side by side: a column for each run, a row for each quantity, the same axes across a row."""

# pyright: reportUnknownMemberType=false
# Matplotlib leaves the keyword arguments of most of its functions untyped.

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import matplotlib as mpl
import numpy as np
from matplotlib import style as mpl_style
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation
from numpy.typing import NDArray
from PIL import Image

from lightning_revbn.runs.logs import Run, one_line, shared_parts

Floats: TypeAlias = NDArray[np.float64]
Style: TypeAlias = Literal["auto", "lines", "heatmap"]

MOST_LINES = 24
"""Layers up to which lines can be told apart."""

FEW_LINES = 8
"""Layers up to which every line is dashed in another way than its neighbours."""

NORMAL_OVER_3 = 100 * math.erfc(3 / math.sqrt(2))
"""Share of a normal distribution beyond three standard deviations, in %: 2 (1 - Phi(3))."""

HUGE = 1e30
"""From here on a value is as good as infinite: nothing else could be seen beside it."""

X_HAT = "|x\N{COMBINING CIRCUMFLEX ACCENT}|"

SMALL, NORMAL = 8, 9  # points
LABEL_HEIGHT = 1.2 * SMALL / 72  # inches, as all lengths below
PANEL_WIDTH, NARROW_PANEL_WIDTH = 2.6, 2.1
LINES_HEIGHT, HEAT_HEIGHT = 1.4, 1.75
MOST_CHARACTERS = 32  # of a layer's name

LINE_STYLES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)))
PALE = 0.82  # the end of viridis is pale on white
STEPS = 64  # of a colour map: more than an eye can tell, and a quarter of the file
GAP = "0.8"
HEAT_MAP = "heat map"

_SETTINGS: dict[str, Any] = {
    "font.size": SMALL,
    "axes.titlesize": NORMAL,
    "axes.labelsize": SMALL,
    "figure.labelsize": SMALL,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.title_fontsize": SMALL,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "text.parse_math": False,  # names of runs and layers are no formulas
    "svg.hashsalt": "lightning-revbn",  # the same file from the same logs
    "pdf.fonttype": 42,  # text of a PDF stays text
}


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
    Row("scale_mean", "Mean scale", ratios=True, spread=4),
    Row("shift_mean", "Mean shift", signed=True, spread=300),
    Row("scale_drift", "Drift of scale"),
    Row("shift_drift", "Drift of shift"),
    Row("normalized_absmax", f"Greatest {X_HAT}", from_zero=False),
    Row(
        "normalized_over_3",
        f"Share of {X_HAT} > 3\n(%; normal: {NORMAL_OVER_3:.2f})",
        factor=100,
        reference=NORMAL_OVER_3,
    ),
)


@dataclass(frozen=True)
class Axis:
    """How values become positions or colours, the same for all runs.

    Args:
        kind: `"symlog"` is linear up to a threshold, and logarithmic beyond.
        low: Least value.
        high: Greatest.
        ticks: Where to put numbers.
        threshold: Of `"symlog"`.
    """

    kind: Literal["linear", "log", "symlog"]
    low: float
    high: float
    ticks: tuple[float, ...]
    threshold: float = 1.0

    def norm(self) -> Normalize:
        """Return what turns values into places in a colour map."""
        if self.kind == "log":
            return LogNorm(self.low, self.high)
        if self.kind == "symlog":
            return SymLogNorm(self.threshold, vmin=self.low, vmax=self.high)
        return Normalize(self.low, self.high)


@dataclass(frozen=True)
class Stage:
    """Layers in succession whose names begin alike.

    Args:
        name: What they have in common; a layer's own name if it is alone.
        first: The first row.
        stop: The row after the last.
    """

    name: str
    first: int
    stop: int

    @property
    def middle(self) -> float:
        """Where to label it; rows are centred at whole numbers."""
        return (self.first + self.stop - 1) / 2


def draw(runs: Sequence[Run], style: Style = "auto") -> Figure:
    """Draw runs.

    Args:
        runs: The runs; there is something to draw of one.
        style: Lines, or heat maps with a row for each layer; `"auto"` takes lines for up to 24 layers.

    Returns:
        The figure.
    """
    rows = logged_rows(runs)
    heat = style == "heatmap" or (style == "auto" and max(len(run.layers) for run in runs) > MOST_LINES)
    with _settings():
        return _draw_heat(runs, rows) if heat else _draw_lines(runs, rows)


def save(figure: Figure, path: Path) -> None:
    """Write a figure, the same bytes for the same figure.

    Args:
        figure: The figure.
        path: Its suffix says which format.
    """
    kind = path.suffix.lower()[1:]
    undated: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    content = io.BytesIO()
    with _settings():
        figure.savefig(content, format=kind, dpi=150, metadata=undated.get(kind))
    meshes = [mesh for panel in figure.axes for mesh in panel.collections if mesh.get_label() == HEAT_MAP]
    maps = {mesh.get_cmap().name: mesh.get_cmap() for mesh in meshes}
    path.write_bytes(_with_palette(content, [*maps.values()]) if kind == "png" else content.getvalue())


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
        count = sum(int((~_drawable(series.values)).sum()) for series in known)
        if count:
            bad[layer] = count
    if not bad:
        return ""
    layers = ", ".join(one_line(layer or _unnamed(run)) for layer in list(bad)[:3]) + (", ..." if len(bad) > 3 else "")
    return f"{one_line(run.label)}: values that are NaN or infinite are drawn as gaps: {sum(bad.values())} of {layers}"


def choose_axis(row: Row, values: Sequence[Floats], margin: bool) -> Axis:
    """Choose the axis of a row.

    Args:
        row: The quantity.
        values: Of each layer of each run, those that can be drawn, in the drawn unit.
        margin: Whether to leave room around, for lines.

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


def find_stages(layers: Sequence[str], apart: int) -> list[Stage]:
    """Divide a network into stages by its layers' names.

    Args:
        layers: Dotted names in order.
        apart: How many rows a label needs. A stage is divided while its parts are large enough for labels.

    Returns:
        The stages, from the first layer to the last.

    Example:
        >>> [stage.name for stage in find_stages(["bn1", "layer1.0.bn1", "layer1.1.bn1", "layer2.0.bn1"], 2)]
        ['bn1', 'layer1', 'layer2.0.bn1']
    """
    parts = [layer.split(".") for layer in layers]
    stages = [Stage("", 0, len(layers))]
    for depth in range(max(map(len, parts))):
        divided = [_parts_of_stage(stage, parts, depth, apart) for stage in stages]
        stages = [part for own in divided for part in own]
    return stages


def choose_labels(stages: Sequence[Stage], apart: float) -> list[Stage]:
    """Choose the stages to label, the longest first.

    Args:
        stages: All stages.
        apart: How many rows a label needs.

    Returns:
        Stages whose middles are far enough from each other, in order.
    """
    chosen: list[Stage] = []
    for stage in sorted(stages, key=lambda stage: stage.first - stage.stop):
        if all(abs(stage.middle - other.middle) >= apart for other in chosen):
            chosen.append(stage)
    return sorted(chosen, key=lambda stage: stage.first)


def name_rows(layers: Sequence[str], apart: int) -> tuple[list[Stage], list[Stage]]:
    """Divide a network for its labels: into stages, or into layers where fewer than three stages could be named.

    Args:
        layers: Dotted names in order.
        apart: How many rows a label needs.

    Returns:
        The parts, and those to label.

    Example:
        >>> blocks = [f"blocks.{i}.bn" for i in range(90)]
        >>> [part.name for part in name_rows(["stem", *blocks], 30)[1]]
        ['stem', 'blocks.29.bn', 'blocks.59.bn', 'blocks.89.bn']
    """
    stages = find_stages(layers, apart)
    labels = choose_labels(stages, apart)
    if len(labels) > 2 and apart > 1:
        return stages, labels
    single = [Stage(name, row, row + 1) for row, name in enumerate(layers)]
    return single, choose_labels(single, apart)


def common_prefix(layers: Sequence[str]) -> str:
    """Return the leading parts that all names share, so that they need not be repeated.

    Args:
        layers: Dotted names.

    Returns:
        The parts; empty if there are none.

    Example:
        >>> common_prefix(["model.layer1.bn1", "model.layer2.bn1"])
        'model.'
    """
    parts = [layer.split(".")[:-1] for layer in layers]
    return "".join(f"{part}." for part in shared_parts(parts)) if len(layers) > 1 else ""


def _draw_lines(runs: Sequence[Run], rows: Sequence[Row]) -> Figure:
    deep = max(len(run.layers) for run in runs) > MOST_LINES
    alike = _alike(runs)
    if alike or deep:
        beside, below, width = 1.0 + _names_width(runs[0]), 0.0, 0.0
    else:  # legends are below each run's panels, and as wide as they need to be
        beside, below = 0.3, 0.6 + 1.4 * LABEL_HEIGHT * max(len(run.layers) for run in runs)
        width = 0.7 + max(_names_width(run) for run in runs)
    # Beside a single row of panels the legend of many layers is the higher of the two.
    legend = 0.0 if deep or not alike else 0.4 + 1.4 * LABEL_HEIGHT * (1 + len(runs[0].layers))
    height = max(LINES_HEIGHT, (legend - 0.6) / len(rows))
    figure, panels = _panels(runs, rows, height, beside, below, width)
    for row, axis, line in zip(rows, _axes_of_rows(runs, rows, margin=True), panels, strict=True):
        for run, panel in zip(runs, line, strict=True):
            _draw_curves(panel, run, row)
            _set_axis(panel, axis)
            panel.tick_params(labelleft=panel is line[0])
        line[0].set_ylabel(row.title)
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
        figure.supxlabel("Gaps: values that are NaN or infinite")
    return figure


def _draw_heat(runs: Sequence[Run], rows: Sequence[Row]) -> Figure:
    alike = _alike(runs)
    beside = 0.9 + sum(_names_width(run) for run in (runs[:1] if alike else runs))
    figure, panels = _panels(runs, rows, HEAT_HEIGHT, beside)
    for row, axis, line in zip(rows, _axes_of_rows(runs, rows, margin=False), panels, strict=True):
        norm = axis.norm()
        colours = mpl.colormaps["RdBu_r" if row.signed else "viridis"].resampled(STEPS + row.signed)
        colours = colours.with_extremes(bad=GAP)
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
    figure.supylabel(_wrapped(title, figure.get_figheight() - 0.2))
    if any(gaps(run) for run in runs):
        figure.supxlabel("Grey: values that are NaN or infinite, or were not logged")
    return figure


def _panels(
    runs: Sequence[Run], rows: Sequence[Row], height: float, beside: float, below: float = 0.0, width: float = 0.0
) -> tuple[Figure, list[list[Axes]]]:
    width = max(width, PANEL_WIDTH if len(runs) < 4 else NARROW_PANEL_WIDTH)
    figure = Figure((beside + width * len(runs), 0.6 + height * len(rows) + below), layout="constrained")
    axes: Any = figure.subplots(len(rows), len(runs), sharex=True, squeeze=False)
    panels = cast("list[list[Axes]]", axes.tolist())
    for run, panel in zip(runs, panels[0], strict=True):
        panel.set_title(_wrapped(run.label, width - 0.4))
    for panel in panels[-1]:
        panel.set_xlabel("Training step")
        panel.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, min_n_ticks=1))
        panel.xaxis.set_major_formatter(FuncFormatter(_step))
    for row, line in zip(rows, panels, strict=True):
        for run, panel in zip(runs, line, strict=True):
            if not any((layer, row.quantity) in run.series for layer in run.layers):
                blank = {"facecolor": "white", "edgecolor": "none"}
                panel.text(0.5, 0.5, "not logged", transform=panel.transAxes, ha="center", va="center", bbox=blank)
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
        good = _drawable(series.values)
        alone = good & ~np.append(good[1:], False) & ~np.append(False, good[:-1])
        panel.plot(
            series.steps,
            row.factor * np.where(good, series.values, np.nan),
            color=colour,
            linestyle=dashes,
            linewidth=1.1 if len(run.layers) <= MOST_LINES else 0.7,
            marker="o",
            markersize=3,
            markevery=np.flatnonzero(alone).tolist(),  # a line needs two points
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
    steps, table = _table(run, row)
    rows = np.arange(len(run.layers) + 1) - 0.5
    if len(steps):
        # A drawing program would have to handle every cell of a mesh that is not rasterised.
        panel.pcolormesh(_edges(steps), rows, table, norm=norm, cmap=colours, rasterized=True, label=HEAT_MAP)
    panel.set_ylim(len(run.layers) - 0.5, -0.5)


def _label_layers(panel: Axes, run: Run, names: bool) -> None:
    shown = _shown(run)
    room = int(0.88 * HEAT_HEIGHT / LABEL_HEIGHT)
    apart = math.ceil(len(shown) / room)
    stages, labels = name_rows(shown, apart)
    edges: list[float] = []
    if len(stages) <= room < len(shown):
        edges = sorted({edge - 0.5 for stage in labels for edge in (stage.first, stage.stop)})
    panel.set_yticks(edges, [""] * len(edges))
    panel.set_yticks([stage.middle for stage in labels], [_elided(s.name) if names else "" for s in labels], minor=True)
    panel.tick_params(axis="y", length=6)
    panel.tick_params(axis="y", which="minor", length=0 if edges else 2.5, pad=8 if edges else 3)


def _table(run: Run, row: Row) -> tuple[Floats, Floats]:
    """Return the steps at which a quantity was logged, and a table of layers by steps, NaN where there is no value."""
    of_layers = [run.series.get((layer, row.quantity)) for layer in run.layers]
    known = [series.steps for series in of_layers if series is not None]
    steps = np.unique(np.concatenate([*known, np.empty(0, dtype=np.int64)]))
    table = np.full((len(run.layers), len(steps)), np.nan)
    for i, series in enumerate(of_layers):
        if series is not None:
            good = _drawable(series.values)
            table[i, np.searchsorted(steps, series.steps[good])] = row.factor * series.values[good]
    return steps.astype(np.float64), table


def _edges(steps: Floats) -> Floats:
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    return np.array([2 * steps[0] - middles[0], *middles, 2 * steps[-1] - middles[-1]])


def _looks(run: Run) -> list[tuple[Any, Any]]:
    """Return colour and line style of every layer.

    Colours tell the depth, and become lighter with it in print too. Styles tell neighbours apart if there are few
    layers, and what a layer is for in its block (bn1, bn2, downsample) if there are more; a crowd is all solid.
    """
    colours = _depth_colours()(np.linspace(0, 1, max(2, len(run.layers))))
    if len(run.layers) <= FEW_LINES:
        styles = [i % len(LINE_STYLES) for i in range(len(run.layers))]
    else:
        roles = [_role(layer) for layer in run.layers]
        kinds = list(dict.fromkeys(roles))
        few = len(kinds) <= len(LINE_STYLES) and len(run.layers) <= MOST_LINES
        styles = [kinds.index(role) if few else 0 for role in roles]
    return [(colours[i], LINE_STYLES[style]) for i, style in enumerate(styles)]


def _role(layer: str) -> str:
    return next((part for part in reversed(layer.split(".")) if not part.isdigit()), "")


def _depth_colours() -> Colormap:
    return ListedColormap(mpl.colormaps["viridis"](np.linspace(0, PALE, 256)))


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
        text.set_text(_elided(name))  # given as a label, a name with a leading underscore would be left out


def _add_depth_bar(figure: Figure, runs: Sequence[Run], panels: Sequence[Axes]) -> None:
    shown = _shown(runs[0]) if _alike(runs) else ["input", "output"]
    last = len(shown) - 1
    bar = figure.colorbar(ScalarMappable(Normalize(0, last), _depth_colours()), ax=panels, pad=0.02, aspect=40)
    room = int(0.8 * figure.get_figheight() / LABEL_HEIGHT)
    apart = math.ceil(len(shown) / room)
    _, labels = name_rows(shown, apart)
    bar.set_ticks([stage.middle for stage in labels], labels=[_elided(stage.name) for stage in labels])
    bar.ax.minorticks_off()
    bar.ax.invert_yaxis()
    bar.set_label(_layers_title(runs[0]) if _alike(runs) else "Layers, by depth")


def _parts_of_stage(stage: Stage, names: Sequence[Sequence[str]], depth: int, apart: int) -> list[Stage]:
    """Divide a stage by one more part of the names, unless its parts would be too small for labels."""
    heads = [".".join(names[row][: depth + 1]) for row in range(stage.first, stage.stop)]
    begins = [i for i, head in enumerate(heads) if not i or head != heads[i - 1]]
    size = len(heads)
    if depth and size > 1 and (size < max(2, len(begins)) * apart):
        return [stage]
    ends = [*begins[1:], size]
    return [Stage(heads[i], stage.first + i, stage.first + end) for i, end in zip(begins, ends, strict=True)]


def _alike(runs: Sequence[Run]) -> bool:
    return all(run.layers == runs[0].layers and run.whole_model == runs[0].whole_model for run in runs)


def _layers_title(run: Run) -> str:
    prefix = common_prefix(run.layers)
    return f"Layers of {_elided(prefix[:-1])}" if prefix else "Layers"


def _unnamed(run: Run) -> str:
    return "(all layers)" if run.whole_model else "(the model)"


def _shown(run: Run) -> list[str]:
    prefix = common_prefix(run.layers)
    return [one_line(layer[len(prefix) :]) or _unnamed(run) for layer in run.layers]


def _names_width(run: Run) -> float:
    return max(_width(_elided(name), SMALL) for name in _shown(run))


def _width(text: str, size: float) -> float:
    return text_to_path.get_text_width_height_descent(text, FontProperties(size=size), ismath=False)[0] / 72


def _elided(text: str) -> str:
    over = len(text) - MOST_CHARACTERS
    return (
        text
        if over <= 0
        else f"{text[: MOST_CHARACTERS // 3]}\N{HORIZONTAL ELLIPSIS}{text[over + MOST_CHARACTERS // 3 + 1 :]}"
    )


def _wrapped(text: str, width: float, lines: int = 3) -> str:
    """Break a run's name into lines, after a slash or dash if possible, and drop its beginning if it is too long."""
    done: list[str] = [""]
    for piece in re.findall(r"[^/_\s-]*[/_\s-]?", one_line(text)):
        if done[-1] and _width(done[-1] + piece, NORMAL) > width:
            done.append("")
        for char in piece:
            if done[-1] and _width(done[-1] + char, NORMAL) > width:
                done.append("")
            done[-1] += char
    kept = done[-lines:]
    return "\n".join(kept) if len(done) <= lines else "\n".join(["\N{HORIZONTAL ELLIPSIS}" + kept[0][1:], *kept[1:]])


@contextmanager
def _settings() -> Generator[None, None, None]:
    """Matplotlib's own settings and ours, whatever the user's are."""
    with mpl_style.context(["default", _SETTINGS]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)  # a box stands for it
        yield


def _with_palette(png: io.BytesIO, maps: Sequence[Colormap]) -> bytes:
    """Return a picture in 256 colours, which takes a third of the space and looks the same.

    Args:
        png: The picture.
        maps: Colour maps whose colours must stay as they are, however few cells have them.
    """
    picture = Image.open(png)
    rgb = picture.convert("RGB")
    reduced = _nearest(rgb, maps) if maps else rgb.quantize(256, dither=Image.Dither.NONE)
    content = io.BytesIO()
    reduced.save(content, "png", optimize=True, dpi=picture.info["dpi"])
    return content.getvalue()


def _nearest(picture: Image.Image, maps: Sequence[Colormap]) -> Image.Image:
    """Return a picture in the colours of maps, and greys for the text."""
    greys = np.repeat(np.arange(0, 256, 5)[:, None], 3, axis=1)
    shades = [np.asarray([*own(np.arange(own.N)), own.get_bad()], dtype=np.float64)[:, :3] for own in maps]
    exact: NDArray[np.int64] = np.rint(255 * np.concatenate(shades)).astype(np.int64)
    palette = np.concatenate([exact, greys])
    pixels = np.asarray(picture).astype(int)
    codes, where = np.unique(pixels @ (65536, 256, 1), return_inverse=True)
    used = np.stack([codes // 65536, codes // 256 % 256, codes % 256], axis=1)
    nearest = np.array([int(((palette - colour) ** 2).sum(1).argmin()) for colour in used])
    reduced = Image.fromarray(nearest[where].reshape(pixels.shape[:2]).astype(np.uint8))
    reduced.putpalette(palette.astype(np.uint8).tobytes())
    return reduced


def _drawable(values: Floats) -> NDArray[np.bool_]:
    return np.abs(values) < HUGE  # not so for NaN


def _axes_of_rows(runs: Sequence[Run], rows: Sequence[Row], margin: bool) -> list[Axis]:
    axes: list[Axis] = []
    for row in rows:
        known = [run.series.get((layer, row.quantity)) for run in runs for layer in run.layers]
        drawn = [row.factor * series.values[_drawable(series.values)] for series in known if series is not None]
        axes.append(choose_axis(row, drawn, margin))
    return axes


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
    """Return an axis that is linear around 0 and logarithmic over the decades above `start`, at most six."""
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


def _number(value: float, position: int | None = None) -> str:
    return f"{value:.6g}".replace("-", "\N{MINUS SIGN}")


def _step(value: float, position: int | None = None) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 1000 and value % 100 == 0 else f"{value:.0f}"
