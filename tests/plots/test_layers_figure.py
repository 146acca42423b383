from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from helpers.made_runs import AFFINE, ALL, RESNET_18, RESNET_152, SMALL_NET, make_run, pair
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.text import Text

from lightning_revbn.plots.layer_rows import NOTHING_FINITE, ROWS, gaps
from lightning_revbn.plots.layers_figure import NOT_LOGGED, draw
from lightning_revbn.plots.output import SMALL, settings
from lightning_revbn.runs.batch_norm_runs import Run


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
    with settings():
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
        assert not inside or text.get_text() in (NOT_LOGGED, NOTHING_FINITE), text
    for (one, first), (other, second) in itertools.combinations(zip(texts, boxes, strict=True), 2):
        assert not first.overlaps(second), (one, other)


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
    expected = [heat and not row.is_crowd for row in ROWS]
    assert [bool(maps(panel)) for (panel,) in panels(figure, 1)] == expected


@pytest.mark.parametrize(("style", "layers", "heat"), [("lines", RESNET_152, False), ("heatmap", SMALL_NET, True)])
def test_the_style_can_be_chosen(style: Any, layers: list[str], heat: bool) -> None:
    figure = draw(pair(layers, quantities=("scale_mean",), steps=(0, 1)), style)
    assert [bool(maps(panel)) for panel in panels(figure, 2)[0]] == [heat] * 2
    assert_readable(figure)


def test_a_heat_map_has_a_row_for_each_layer_and_colours_that_all_runs_share() -> None:
    runs = pair(RESNET_152)
    figure = draw(runs)
    rows = panels(figure, 2)
    for row, line in zip(ROWS[:4], rows, strict=False):
        for run, panel in zip(runs, line, strict=True):
            (mesh,) = maps(panel)
            expected = [row.factor * run.series[layer, row.quantity].values for layer in RESNET_152]
            if row is ROWS[0]:
                expected = [np.log2(values / values[0]) for values in expected]
            assert np.array_equal(mesh.get_array(), expected)
            assert mesh.norm is maps(line[0])[0].norm
            assert panel.get_ylim() == (154.5, -0.5)  # the input is at the top
            assert panel.get_xlim() == (-50, 450)
    for signed in (maps(rows[0][0])[0], maps(rows[1][0])[0]):
        assert signed.get_cmap()(signed.norm(0.0)) == pytest.approx((0.97, 0.97, 0.97, 1), abs=0.01)
    assert len([axes for axes in figure.axes if axes.get_label() == "<colorbar>"]) == 4
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
        pair(RESNET_152, change=lambda layer, quantity, values: np.where(np.arange(5) < 3, values, math.nan)),
        pair(RESNET_18, change=lambda layer, quantity, values: values * math.nan),
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


def test_the_order_of_layers_is_only_claimed_where_it_is_known() -> None:
    run = make_run(SMALL_NET)
    by_name = Run(run.label, run.layers, run.series, by_depth=False)
    assert draw([run]).legends[0].get_title().get_text() == "Layers of model"
    assert draw([by_name]).legends[0].get_title().get_text() == "Layers of model, by name"
    assert draw([run], "heatmap").get_supylabel() == "Layers of model, from input (top) to output"
    assert draw([by_name], "heatmap").get_supylabel() == "Layers of model, by name"


@pytest.mark.parametrize("style", ["lines", "heatmap"])
def test_a_run_that_diverges_is_drawn_to_its_last_step_and_the_first_gap_is_marked(style: Any) -> None:
    def change(layer: str, quantity: str, values: np.ndarray) -> np.ndarray:
        return np.array([1.0, 1.1, math.nan, math.nan, math.inf]) if layer == "b" else values * [1, 1, 1, 1, math.nan]

    figure = draw([make_run(["a", "b"], quantities=["scale_mean"], change=change)], style)
    (panel,) = panels(figure, 1)[0]
    assert panel.get_xlim()[1] >= 400
    marks = [list(line.get_xdata()) for line in panel.lines if str(line.get_color()) == "#E8000B"]
    assert marks == [[200, 200]]
    assert "red: the first" in figure.get_supxlabel()


@pytest.mark.parametrize("style", ["lines", "heatmap"])
def test_a_panel_without_a_finite_value_says_so(style: Any) -> None:
    run = make_run(["a"], quantities=["scale_mean", "shift_mean"], change=lambda *_: np.full(5, math.nan))
    other = make_run(["a"], quantities=["scale_mean"])
    rows = panels(draw([run, other], style), 2)
    said = [[text.get_text() for text in panel.texts] for line in rows for panel in line]
    assert said == [["all NaN or infinite"], [], ["all NaN or infinite"], ["not logged"]]
    assert rows[0][0].get_xlim()[1] >= 400


def test_scales_of_a_heat_map_are_ratios_to_their_first_value_so_that_runs_can_be_compared() -> None:
    figure = draw(pair(SMALL_NET, quantities=["scale_mean"]), "heatmap")
    one, other = (maps(panel)[0].get_array() for panel in panels(figure, 2)[0])
    np.testing.assert_allclose(one, other, atol=1e-12)
    zero = make_run(["a", "b"], start=0.0, quantities=["scale_mean"])
    assert draw([zero], "heatmap").get_supxlabel() == "Grey: scales that started at 0, or changed their sign"


@pytest.mark.parametrize("style", ["lines", "heatmap"])
def test_activations_of_many_layers_are_their_median_and_bands(style: Any) -> None:
    run = make_run(RESNET_152, quantities=["normalized_absmax"])
    (panel,) = panels(draw([run], style), 1)[0]
    values = np.stack([run.series[layer, "normalized_absmax"].values for layer in RESNET_152])
    (median,) = [line for line in panel.lines if len(line.get_xdata()) == 5]
    np.testing.assert_allclose(median.get_ydata(), np.median(values, axis=0))
    outer, inner = (band.get_paths()[0].vertices for band in panel.collections)
    for vertices, low, high in ((outer, 0, 1), (inner, 0.1, 0.9)):
        at_last = vertices[vertices[:, 0] == 400][:, 1]
        assert at_last.min() == pytest.approx(np.quantile(values[:, -1], low))
        assert at_last.max() == pytest.approx(np.quantile(values[:, -1], high))
