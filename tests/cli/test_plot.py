from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torchvision
from helpers.lit import LitNet, loader, trainer
from helpers.models import BATCH_NORMS
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from test_logs import COUNTING, write_csv, write_events
from torch import nn

from lightning_revbn import BatchNormMonitor
from lightning_revbn.cli.main import main
from lightning_revbn.plots import layers_figure as figure_module
from lightning_revbn.plots.layers_figure import (
    HEAT_MAP,
    HUGE,
    ROWS,
    SMALL,
    Row,
    choose_axis,
    choose_labels,
    draw,
    find_stages,
    gaps,
    save,
)
from lightning_revbn.runs.logs import Run, Series

AFFINE = ("scale_mean", "shift_mean", "scale_drift", "shift_drift")
ALL = tuple(row.quantity for row in ROWS)
RESNET_152 = [f"model.{n}" for n, m in torchvision.models.resnet152().named_modules() if isinstance(m, nn.BatchNorm2d)]
RESNET_18 = [f"model.{n}" for n, m in torchvision.models.resnet18().named_modules() if isinstance(m, nn.BatchNorm2d)]
SMALL_NET = ["model.stem.1", "model.block1.bn1", "model.block1.bn2", "model.head.1"]


def make_run(
    layers: Sequence[str],
    start: float = 1.0,
    quantities: Sequence[str] = ALL,
    steps: Sequence[int] = range(0, 500, 100),
    label: str = "baseline",
    change: Callable[[str, str, np.ndarray], np.ndarray] = lambda layer, quantity, values: values,
) -> Run:
    """Make a run whose values differ by layer, quantity and step."""
    time = np.arange(len(steps)) / 5
    series: dict[tuple[str, str], Series] = {}
    for depth, layer in enumerate(layers):
        sign = (-1) ** depth * (depth + 1) / len(layers)
        values = {
            "scale_mean": start * (1 + 0.3 * sign * time),
            "shift_mean": 0.2 * sign * time,
            "scale_drift": 0.4 * abs(sign) * time,
            "shift_drift": 0.2 * abs(sign) * time,
            "normalized_absmax": 4 + 9 * abs(sign) * time,
            "normalized_over_3": 0.002 + 0.01 * abs(sign) * time,
        }
        for quantity in quantities:
            drawn = change(layer, quantity, values[quantity])
            series[layer, quantity] = Series(np.asarray(steps, dtype=np.int64), drawn)
    return Run(label, tuple(layers), series, whole_model=tuple(layers) == ("",))


def pair(layers: Sequence[str], **options: Any) -> list[Run]:
    return [make_run(layers, **options), make_run(layers, start=0.1, label="revisited", **options)]


def panels(figure: Figure, runs: int) -> list[list[Axes]]:
    """Return the panels by row; colour bars come after them."""
    rows = len([axes for axes in figure.axes if axes.get_label() != "<colorbar>"]) // runs
    return [figure.axes[runs * row : runs * (row + 1)] for row in range(rows)]


def maps(panel: Axes) -> list[QuadMesh]:
    return [mesh for mesh in panel.collections if isinstance(mesh, QuadMesh)]


def drawn_texts(figure: Figure) -> Iterator[Text]:
    """Yield every text that can be seen in a figure that was drawn."""
    found = list(figure.texts)
    found += [text for text in (figure._supxlabel, figure._supylabel) if text is not None]  # type: ignore[attr-defined]
    for legend in [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]:
        found += [*legend.get_texts(), legend.get_title()]
    for axes in figure.axes:
        found += [axes.title, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            found.append(axis.label)
            low, high = sorted(axis.get_view_interval())
            slack = 1e-9 * (high - low)
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if low - slack <= tick.get_loc() <= high + slack:
                    found += [tick.label1, tick.label2]
    yield from dict.fromkeys(text for text in found if text.get_text() and text.get_visible())


def assert_readable(figure: Figure) -> None:
    """Assert that all texts are large enough, inside the figure, and on no other text or panel."""
    figure.set_dpi(150)  # as it is saved
    with figure_module._settings():
        figure.draw_without_rendering()
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = list(drawn_texts(figure))
    boxes = [text.get_window_extent(renderer).padded(-0.5) for text in texts]
    assert all(text.get_fontsize() >= SMALL for text in texts)
    for text, box in zip(texts, boxes, strict=True):
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= figure.bbox.x1, text
        assert box.y1 <= figure.bbox.y1, text
        inside = [axes for axes in figure.axes if axes.bbox.padded(-1).overlaps(box)]
        assert not inside or text.get_text() == "not logged", text
    for (one, first), (other, second) in itertools.combinations(zip(texts, boxes, strict=True), 2):
        assert not first.overlaps(second), (one, other)


def refused(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command, expect exit code 1, and return the one line it said."""
    assert main(["plot", *map(str, arguments)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("lightning-revbn: ")
    return line.removeprefix("lightning-revbn: ")


def logged(directory: Path, layers: Sequence[str] = SMALL_NET, **options: Any) -> Path:
    """Write the log of a run that `make_run` makes."""
    run = make_run(layers, **options)
    events: dict[int, dict[str, float]] = {}
    for (layer, quantity), series in run.series.items():
        for step, value in zip(series.steps.tolist(), series.values.tolist(), strict=True):
            events.setdefault(step, {})[f"revbn/{layer}/{quantity}" if layer else f"revbn/{quantity}"] = value
    write_csv(directory, events.items())
    return directory


@pytest.mark.parametrize("quantities", [AFFINE, ALL])
@pytest.mark.parametrize("layers", [SMALL_NET, RESNET_18])
def test_shallow_networks_are_lines_on_the_same_axes(layers: list[str], quantities: Sequence[str]) -> None:
    runs = pair(layers, quantities=quantities)
    rows = panels(draw(runs), 2)
    assert len(rows) == len(quantities)
    for row, line in zip(ROWS, rows, strict=False):
        assert len({(panel.get_ylim(), panel.get_xlim(), panel.get_yscale()) for panel in line}) == 1
        assert line[0].get_ylabel() == row.title
        for run, panel in zip(runs, line, strict=True):
            assert not maps(panel)
            curves = [curve for curve in panel.lines if len(curve.get_xdata()) == 5]
            for layer, curve in zip(layers, curves, strict=True):
                expected = run.series[layer, row.quantity]
                assert np.array_equal(curve.get_xdata(), expected.steps)
                assert np.array_equal(curve.get_ydata(), row.factor * expected.values)
    assert rows[0][0].get_yscale() == "log"
    assert [panel.get_title() for panel in rows[0]] == ["baseline", "revisited"]
    assert [panel.get_xlabel() for panel in rows[-1]] == ["Training step"] * 2


def test_few_layers_differ_by_dashes_and_many_by_their_part_in_a_block() -> None:
    for layers in (SMALL_NET, RESNET_18):
        figure = draw([make_run(layers)])
        (legend,) = figure.legends
        curves = [curve for curve in figure.axes[0].lines if len(curve.get_xdata()) == 5]
        looks = {(str(curve._dash_pattern), tuple(curve.get_color())) for curve in curves}  # type: ignore[attr-defined]
        assert len(looks) == len(layers)
        brightness = [np.dot(curve.get_color()[:3], (0.2126, 0.7152, 0.0722)) for curve in curves]
        assert brightness == sorted(brightness)
        assert brightness[-1] < 0.75
        names = [text.get_text() for text in legend.get_texts()]
        assert names == [layer.removeprefix("model.") for layer in layers]
        assert legend.get_title().get_text() == "Layers of model"
    dashes = {name.split(".")[-1]: str(curve._dash_pattern) for name, curve in zip(names, curves, strict=True)}  # type: ignore[attr-defined]
    assert len({dashes[part] for part in ("bn1", "bn2", "1")}) == 3


@pytest.mark.parametrize(("count", "heat"), [(24, False), (25, True)])
def test_deep_networks_are_heat_maps(count: int, heat: bool) -> None:
    figure = draw([make_run([f"bn{i}" for i in range(count)])])
    assert [bool(maps(panel)) for (panel,) in panels(figure, 1)] == [heat] * len(ROWS)


@pytest.mark.parametrize(("style", "layers", "heat"), [("lines", RESNET_152, False), ("heatmap", SMALL_NET, True)])
def test_the_style_can_be_chosen(style: Any, layers: list[str], heat: bool) -> None:
    figure = draw(pair(layers, quantities=("scale_mean",), steps=(0, 1)), style)
    assert [bool(maps(panel)) for panel in panels(figure, 2)[0]] == [heat] * 2
    assert_readable(figure)


def test_a_heat_map_has_a_row_for_each_layer_and_colours_that_all_runs_share() -> None:
    runs = pair(RESNET_152)
    figure = draw(runs)
    rows = panels(figure, 2)
    for row, line in zip(ROWS, rows, strict=True):
        for run, panel in zip(runs, line, strict=True):
            (mesh,) = maps(panel)
            expected = [row.factor * run.series[layer, row.quantity].values for layer in RESNET_152]
            assert np.array_equal(mesh.get_array(), expected)
            assert mesh.norm is maps(line[0])[0].norm
            assert panel.get_ylim() == (154.5, -0.5)  # the input is at the top
            assert panel.get_xlim() == (-50, 450)
    assert isinstance(maps(rows[0][0])[0].norm, LogNorm)
    shift = maps(rows[1][0])[0]
    assert shift.get_cmap()(shift.norm(0.0)) == pytest.approx((0.97, 0.97, 0.97, 1), abs=0.01)
    assert len([axes for axes in figure.axes if axes.get_label() == "<colorbar>"]) == len(ROWS)
    labels = [tick.label1.get_text() for tick in rows[0][0].yaxis.get_minor_ticks()]
    assert labels == ["layer1", "layer2", "layer3", "layer4"]
    first = [RESNET_152.index(f"model.layer{stage}.0.bn1") for stage in (1, 2, 3, 4)]
    assert rows[0][0].get_yticks().tolist() == [edge - 0.5 for edge in [*first, 155]]
    assert not any(tick.label1.get_text() for tick in rows[0][1].yaxis.get_minor_ticks())


def test_a_share_is_in_percent_beside_that_of_a_normal_distribution() -> None:
    assert ROWS[-1].reference == pytest.approx(100 * 2 * 0.0013498980316301)
    figure = draw([make_run(SMALL_NET, quantities=["normalized_over_3"])])
    panel = figure.axes[0]
    assert [line.get_ydata()[0] for line in panel.lines].count(ROWS[-1].reference) == 1
    assert panel.get_ylim()[1] > 1
    bar = draw([make_run(SMALL_NET, quantities=["normalized_over_3"])], "heatmap").axes[-1]
    assert ROWS[-1].reference in [line.get_ydata()[0] for line in bar.lines]


def only_above(threshold: float, otherwise: float) -> Callable[[str, str, np.ndarray], np.ndarray]:
    return lambda layer, quantity, values: np.where(values > threshold, values, otherwise)


MIXED = {"a": SMALL_NET, "b": ["net.bn", "net.other.bn"], "c": RESNET_18[:9]}


@pytest.mark.parametrize(
    "runs",
    [
        pair(SMALL_NET),
        pair(RESNET_18),
        pair(RESNET_152),
        pair(RESNET_152, quantities=AFFINE)[:1],
        [make_run(SMALL_NET, label=f"of_a_long_name/{i}/{'W' * 60}", quantities=AFFINE[:1]) for i in range(8)],
        [make_run(RESNET_152[:30], label=f"run {i}", quantities=AFFINE[2:3]) for i in range(8)],
        [make_run(layers, label=label, quantities=AFFINE[:2]) for label, layers in MIXED.items()],
        [make_run(SMALL_NET, quantities=ALL[2:5]), make_run(RESNET_152, quantities=ALL[3:])],
        [make_run([f"{c}{i}" * 30 for i in range(24)], label="$x_$ \n {", quantities=AFFINE[:1]) for c in "_W"],
        [make_run([f"bn{i}" for i in range(24)], quantities=AFFINE[:1])],
        [make_run([f"features.{i}" for i in range(100)], steps=[10**7, 2 * 10**7 + 1], quantities=AFFINE[:1])],
        pair(RESNET_152, steps=[7], quantities=AFFINE[:2]),
        pair([""], steps=[7], quantities=AFFINE),
        pair(SMALL_NET, quantities=ALL[:3], change=only_above(0.05, math.nan)),
        pair(RESNET_152, quantities=ALL[:2], change=only_above(0.05, math.inf)),
        pair(SMALL_NET, quantities=ALL[3:], change=lambda layer, quantity, values: 1e-7 * values),
        pair(SMALL_NET, quantities=ALL[:3], change=lambda layer, quantity, values: 123456789 * values),
    ],
    ids=lambda runs: f"{len(runs)}x{len(runs[-1].layers)}",
)
def test_nothing_overlaps_and_all_can_be_read(runs: list[Run]) -> None:
    figure = draw(runs)
    assert_readable(figure)
    for panel in figure.axes:
        assert len(panel.get_xticks()) <= 6


@pytest.mark.parametrize("layers", [RESNET_18, RESNET_152])
def test_pictures_are_small_files(layers: list[str], tmp_path: Path) -> None:
    random = np.random.default_rng(0)

    def noisy(layer: str, quantity: str, values: np.ndarray) -> np.ndarray:
        return values * random.uniform(0.9, 1.1, len(values))

    save(draw(pair(layers, quantities=AFFINE, steps=range(100), change=noisy)), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size < 300_000


def test_letters_that_no_font_has_are_boxes_and_no_warnings(tmp_path: Path) -> None:
    save(draw([make_run(["中", "文"], label="运行", quantities=["scale_mean"])]), tmp_path / "figure.png")
    Image.open(tmp_path / "figure.png").verify()


def test_long_networks_are_labelled_by_their_stages() -> None:
    stages = find_stages([layer.removeprefix("model.") for layer in RESNET_152], 12)
    assert [stage.name for stage in stages] == ["bn1", "layer1", "layer2", "layer3", "layer4"]
    assert [stage.name for stage in choose_labels(stages, 12)] == ["layer1", "layer2", "layer3", "layer4"]
    flat = find_stages([str(i) for i in range(50)], 5)
    assert [stage.name for stage in choose_labels(flat, 5)] == [str(i) for i in range(0, 50, 5)]
    nested = [f"blocks.{i}.{j}.bn" for i in range(3) for j in range(10)]
    assert [stage.name for stage in find_stages(["stem", *nested], 4)] == ["stem", "blocks.0", "blocks.1", "blocks.2"]


ROW = {row.quantity: row for row in ROWS}


@pytest.mark.parametrize(
    ("quantity", "values", "kind"),
    [
        ("scale_mean", [[1.0, 1.1], [0.1, 0.2]], "log"),
        ("scale_mean", [[1.0]], "log"),
        ("scale_mean", [[1.0, 1.1], [0.0, 0.3]], "linear"),
        ("scale_mean", [[1.0, 1.1], [0.1, 0.2], [0.0, 0.02]], "symlog"),  # some start at zero, and two runs differ
        ("scale_drift", [[0.0, 0.4], [0.0, 0.1]], "linear"),
        ("scale_drift", [[0.0, 0.4], [0.0, 0.004]], "symlog"),
        ("shift_mean", [[-0.2, 0.4], [0.0, 0.004]], "linear"),
        ("shift_mean", [[-0.2, 1e6], [0.0, 0.1]], "symlog"),
        ("normalized_absmax", [[4.0, 9.0], [5.0, 8.0]], "linear"),
        ("normalized_absmax", [[4.0, 1e9], [5.0, 8.0]], "symlog"),
    ],
)
@pytest.mark.parametrize("margin", [True, False])
def test_the_axis_shows_all_values_and_has_ticks(quantity: str, values: Any, kind: str, margin: bool) -> None:
    axis = choose_axis(ROW[quantity], [np.array(own) for own in values], margin)
    everything = list(itertools.chain(*values))
    assert axis.kind == kind
    assert axis.low <= min(everything)
    assert axis.high >= max(everything)
    assert 1 <= len(axis.ticks) <= 8
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
    assert list(axis.ticks) == sorted(set(axis.ticks))
    assert isinstance(axis.norm(), SymLogNorm) == (kind == "symlog")
    if quantity == "shift_mean" and not margin:
        assert axis.low == -axis.high


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.lists(st.floats(-1e30, 1e30, exclude_min=True, exclude_max=True), max_size=4), max_size=4),
    row=st.sampled_from(ROWS),
    margin=st.booleans(),
)
def test_any_values_have_an_axis(values: list[list[float]], row: Row, margin: bool) -> None:
    axis = choose_axis(row, [np.array(own, dtype=np.float64) for own in values], margin)
    assert math.isfinite(axis.high - axis.low)
    assert axis.low < axis.high
    assert all(axis.low - 1 / HUGE <= value <= axis.high + 1 / HUGE for own in values for value in own)
    assert 1 <= len(axis.ticks) <= 8
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
    places = axis.norm()(np.array([*axis.ticks, *itertools.chain(*values)]))
    assert ((places >= -1e-9) & (places <= 1 + 1e-9)).all()


@pytest.mark.parametrize("style", ["lines", "heatmap"])
@pytest.mark.parametrize("value", [0.0, -1e300, math.nan])
def test_any_value_can_be_drawn(value: float, style: Any) -> None:
    def change(layer: str, quantity: str, values: np.ndarray) -> np.ndarray:
        return np.full_like(values, value) if layer == "a" else values

    quantities = ["scale_mean", "shift_mean", "normalized_over_3"]
    draw([make_run(["a", "b"], quantities=quantities, change=change)], style).draw_without_rendering()
    draw([make_run(["a"], quantities=quantities[:2], change=change)], style).draw_without_rendering()


def test_values_that_cannot_be_drawn_are_gaps_and_named() -> None:
    def change(layer: str, quantity: str, values: np.ndarray) -> np.ndarray:
        return np.array([1.0, math.nan, 1.5, math.inf, 1.2]) if layer == "b" else values

    run = make_run(["a", "b"], quantities=["scale_mean"], change=change)
    figure = draw([run])
    curve = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 5][1]
    assert np.array_equal(curve.get_ydata(), [1, math.nan, 1.5, math.nan, 1.2], equal_nan=True)
    assert curve.get_markevery() == [0, 2, 4]  # a point between gaps has no line
    (mesh,) = maps(draw([run], "heatmap").axes[0])
    assert np.ma.getmaskarray(mesh.get_array())[1].tolist() == [False, True, False, True, False]
    assert gaps(run) == "baseline: values that are NaN or infinite are drawn as gaps: 2 of b"
    assert gaps(make_run(["a"])) == ""


def test_a_single_step_is_drawn_as_points() -> None:
    figure = draw([make_run(SMALL_NET, steps=[3])])
    curves = [curve for curve in figure.axes[0].lines if len(curve.get_xdata()) == 1]
    assert [(curve.get_marker(), curve.get_markevery()) for curve in curves] == [("o", [0])] * 4


def test_runs_of_different_models_have_their_own_layers() -> None:
    small, deep = make_run(SMALL_NET), make_run(RESNET_152, quantities=AFFINE)
    lines = draw([small, make_run(["x", "y"])])
    legends = [axes.get_legend() for axes in lines.axes if axes.get_legend()]
    names = [[text.get_text() for text in legend.get_texts()] for legend in legends]
    assert names == [[name.removeprefix("model.") for name in SMALL_NET], ["x", "y"]]
    rows = panels(draw([small, deep]), 2)
    labels = [[tick.label1.get_text() for tick in panel.yaxis.get_minor_ticks()] for panel in rows[0]]
    assert labels == [names[0], ["layer1", "layer2", "layer3", "layer4"]]
    assert [text.get_text() for text in rows[-1][1].texts] == ["not logged"]


def test_layers_whose_names_begin_with_an_underscore_are_in_the_legend() -> None:
    (legend,) = draw([make_run(["_bn0", "_blocks.0._bn1"])]).legends
    assert [text.get_text() for text in legend.get_texts()] == ["_bn0", "_blocks.0._bn1"]


def test_a_tree_without_batch_norm_layers_says_so_of_the_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        write_csv(tmp_path / name, COUNTING)
    assert refused([tmp_path], capsys).startswith("the log of one has no keys revbn/... of batch norm layers")


def test_the_order_of_layers_is_only_claimed_where_it_is_known() -> None:
    run = make_run(SMALL_NET)
    by_name = Run(run.label, run.layers, run.series, by_depth=False)
    assert draw([run]).legends[0].get_title().get_text() == "Layers of model"
    assert draw([by_name]).legends[0].get_title().get_text() == "Layers of model, by name"
    assert draw([run], "heatmap").get_supylabel() == "Layers of model, from input (top) to output"
    assert draw([by_name], "heatmap").get_supylabel() == "Layers of model, by name"


@pytest.mark.parametrize("style", ["lines", "heatmap"])
@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_same_runs_give_the_same_bytes(suffix: str, style: Any, tmp_path: Path) -> None:
    contents: list[bytes] = []
    for name in ("one", "other"):
        save(draw([make_run(["a", "b"], quantities=["shift_mean"])], style), tmp_path / f"{name}{suffix}")
        contents.append((tmp_path / f"{name}{suffix}").read_bytes())
    assert contents[0] == contents[1]
    assert b"Date" not in contents[0]
    if suffix == ".png":
        picture = Image.open(tmp_path / "one.png")
        assert round(picture.info["dpi"][0]) == 150
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    elif suffix == ".svg":
        assert ElementTree.fromstring(contents[0]).tag.endswith("svg")
    else:
        assert contents[0].startswith(b"%PDF-")
        assert contents[0].rstrip().endswith(b"%%EOF")


def test_a_reduced_picture_keeps_the_colours_of_its_heat_maps(tmp_path: Path) -> None:
    figure = draw([make_run(RESNET_152, quantities=["scale_mean", "shift_mean"], steps=range(64))])
    save(figure, tmp_path / "figure.png")
    colours = {colour for _, colour in Image.open(tmp_path / "figure.png").convert("RGB").getcolors(256)}
    meshes = [mesh for panel in figure.axes for mesh in panel.collections if mesh.get_label() == HEAT_MAP]
    assert len(meshes) == 2
    for cmap in {mesh.get_cmap().name: mesh.get_cmap() for mesh in meshes}.values():
        shades = {tuple(round(255 * part) for part in cmap(i)[:3]) for i in range(cmap.N)}
        assert len(shades - colours) <= 2


def test_the_settings_of_the_user_change_nothing(tmp_path: Path) -> None:
    import matplotlib as mpl

    runs = pair(SMALL_NET, quantities=["shift_drift"])
    save(draw(runs), tmp_path / "one.png")
    with mpl.rc_context({"font.size": 30, "lines.linewidth": 9, "axes.grid": True, "savefig.facecolor": "red"}):
        before = dict(mpl.rcParams)
        save(draw(runs), tmp_path / "other.png")
        assert dict(mpl.rcParams) == before
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_the_logs_of_real_runs_are_drawn(kind: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("baseline", "revisited"):
        run = trainer(tmp_path, BatchNormMonitor(every_n_steps=1), logger=kind(tmp_path, name=name, version="logs"))
        run.fit(LitNet(), loader(2))
    capsys.readouterr()
    assert main(["plot", str(tmp_path), "-o", str(tmp_path / "figure.png")]) == 0
    output = capsys.readouterr()
    assert output.out == f"Figure: {tmp_path / 'figure.png'} (2 runs, {len(BATCH_NORMS)} layers)\n"
    assert output.err == ""
    Image.open(tmp_path / "figure.png").verify()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[Run]]:
    """Note the runs that are drawn instead of drawing them."""
    seen: list[list[Run]] = []
    monkeypatch.setattr("lightning_revbn.plots.layers_figure.draw", lambda runs, style: seen.append(list(runs)))
    monkeypatch.setattr("lightning_revbn.plots.layers_figure.save", lambda figure, path: None)
    return seen


def test_runs_are_called_by_the_ends_of_their_paths(tmp_path: Path, drawn: list[list[Run]]) -> None:
    for name in ("a/x/logs", "b/x/logs"):
        logged(tmp_path / name, quantities=AFFINE)
    assert main(["plot", str(tmp_path)]) == 0
    assert main(["plot", str(tmp_path / "a" / "x" / "logs" / "metrics.csv")]) == 0
    assert main(["plot", str(tmp_path), "--labels", "one", "two"]) == 0
    labels = [[run.label for run in runs] for runs in drawn]
    assert labels == [["a/x/logs", "b/x/logs"], ["logs"], ["one", "two"]]


def test_layers_can_be_chosen(tmp_path: Path, drawn: list[list[Run]], capsys: pytest.CaptureFixture[str]) -> None:
    path = logged(tmp_path / "run")
    assert main(["plot", str(path), "--layers", "*.bn?", "model.head.1"]) == 0
    assert drawn[0][0].layers == ("model.block1.bn1", "model.block1.bn2", "model.head.1")
    assert capsys.readouterr().out == "Figure: batch_norms.png (1 run, 3 layers)\n"


def test_the_prefix_can_be_chosen(tmp_path: Path, drawn: list[list[Run]]) -> None:
    keys = [f"{prefix}/{layer}scale_mean" for prefix in ("one", "two/more") for layer in ("", f"{prefix[:3]}/")]
    write_csv(tmp_path, [(0, dict.fromkeys(keys, 1.0))])
    assert main(["plot", str(tmp_path), "--prefix", "two/more"]) == 0
    assert drawn[0][0].layers == ("two",)


def test_runs_of_the_whole_model_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = logged(tmp_path / "run", [""], quantities=["scale_mean", "scale_drift"])
    assert main(["plot", str(path), "-o", str(tmp_path / "figure.svg")]) == 0
    assert capsys.readouterr().out == f"Figure: {tmp_path / 'figure.svg'} (1 run, the whole model)\n"
    assert "--layers: run logged the whole model only" in refused([path, "--layers", "*"], capsys)


def test_what_is_damaged_or_missing_is_told_in_one_line_each(
    tmp_path: Path, drawn: list[list[Run]], capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["revbn/a/scale_mean", "revbn/scale_mean"]
    path = write_events(tmp_path / "logs" / "a", [(step, dict.fromkeys(keys, math.nan)) for step in range(3)])
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    write_csv(tmp_path / "logs" / "b", COUNTING)
    assert main(["plot", str(tmp_path / "logs")]) == 0
    assert [run.label for run in drawn[0]] == ["a"]
    left_out, damaged, gap = capsys.readouterr().err.splitlines()
    assert damaged.startswith(f"lightning-revbn: {path} is damaged or cut off at byte ")
    assert damaged.endswith(f" of {size - 1}; what is before was read")
    assert left_out.startswith("lightning-revbn: left out: the log of b has no keys revbn/... of batch norm layers")
    assert gap == "lightning-revbn: a: values that are NaN or infinite are drawn as gaps: 3 of a"


Arguments = Callable[[Path], list[object]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (lambda path: [path / "nowhere"], "nowhere does not exist"),
        (lambda path: [path / "empty"], "holds no log"),
        (lambda path: ["nowhere", "-o", "figure.jpg"], "figure.jpg must end in one of .png, .svg, .pdf"),
        (lambda path: ["nowhere", "-o", "figure"], "figure must end in one of .png, .svg, .pdf"),
        (lambda path: ["nowhere", "-o", path / "no" / "a.png"], "a.png cannot be written: there is no directory"),
        (lambda path: ["nowhere", "-o", path / "a.png"], "a.png cannot be written: it is a directory"),
        (
            lambda path: [path / "run", "--layers", "*.bn1", "block1.bn3"],
            "--layers: the pattern 'block1.bn3' matches none of the model's 4 batch norm layers; the nearest names are "
            "'model.block1.bn",
        ),
        (lambda path: [path, "--layers", "*head*"], "--layers: no pattern matches a layer of other"),
        (lambda path: [path, "--labels", "one"], "--labels has 1 names for 2 runs: other, run"),
        (
            lambda path: [path / "run", "--prefix", "bn"],
            "the log of run has no keys bn/... of batch norm layers (it has revbn/",
        ),
        (
            lambda path: [path / "loss"],
            "the log of loss has no keys revbn/... of batch norm layers (it has a, b): add BatchNormMonitor()",
        ),
        (lambda path: [path / "run", path / "loss"], "the log of loss has no keys revbn/..."),
        (lambda path: [path / "std"], "nothing to draw: no layer has one of scale_mean, "),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(
    arguments: Arguments, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs" / "empty").mkdir(parents=True)
    (tmp_path / "logs" / "a.png").mkdir()
    logged(tmp_path / "logs" / "run", steps=[0])
    logged(tmp_path / "logs" / "other", ["model.block1.bn1"], steps=[0])
    write_csv(tmp_path / "loss", COUNTING)
    write_csv(tmp_path / "std", [(0, {"revbn/a/scale_std": 1.0, "revbn/b/scale_std": 1.0})])
    for name in ("loss", "std"):
        if any(name in str(argument) for argument in arguments(Path())[:2]):
            (tmp_path / name).rename(tmp_path / "logs" / name)
    assert said in refused(arguments(tmp_path / "logs"), capsys)
    assert not (tmp_path / "batch_norms.png").exists()


def test_more_than_eight_runs_are_refused_before_they_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(9):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "metrics.csv").touch()
    assert refused([tmp_path], capsys).startswith("9 runs were found, and side by side no more can be read than 8")


def test_a_file_that_cannot_be_written_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = logged(tmp_path / "run", steps=[0])

    def full(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    line = refused([path, "-o", tmp_path / "figure.svg"], capsys)
    assert line == f"{tmp_path / 'figure.svg'} cannot be written: No space left on device"


def test_missing_libraries_are_named_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_events(tmp_path, COUNTING)
    remedy = 'pip install "lightning-revbn[plots]"'
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
        assert refused([tmp_path], capsys).endswith(f"needs tensorboard to be read: {remedy}")
    monkeypatch.delitem(sys.modules, "lightning_revbn.plots.layers_figure")
    monkeypatch.delattr("lightning_revbn.plots.layers_figure")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert refused(["nowhere"], capsys) == f"figures need matplotlib: {remedy}"


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["logs", "--style", "pie"], ["logs", "--layers"], ["logs", "--unknown"]):
        with pytest.raises(SystemExit) as exit_:
            main(["plot", *arguments])
        assert exit_.value.code == 2
        assert "usage: lightning-revbn" in capsys.readouterr().err


def test_the_command_imports_nothing_heavy_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "PIL", "tensorboard", "rich"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("cli.main", "cli.plot", "runs.logs", "plots.layers_figure"):
        monkeypatch.delitem(sys.modules, f"lightning_revbn.{name}")
        monkeypatch.delattr(f"lightning_revbn.cli.{name}")
    assert import_module("lightning_revbn.cli.main").main is not main
    assert "lightning_revbn.plots.layers_figure" not in sys.modules


def test_the_quantities_of_the_figure_are_those_that_the_monitor_logs(tmp_path: Path) -> None:
    run = trainer(tmp_path, BatchNormMonitor(every_n_steps=1, activations=True), logger=CSVLogger(tmp_path))
    run.fit(LitNet(), loader(1))
    header = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[0].split(",")
    for quantity in ALL:
        assert {f"revbn/model.{name}/{quantity}" for name in BATCH_NORMS} <= set(header)
