from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from lightning_revbn.plots.curves_figure import draw
from lightning_revbn.plots.layer_rows import NOTHING_FINITE
from lightning_revbn.plots.output import save
from lightning_revbn.runs.curves import CurveComparison, compare_curves
from lightning_revbn.runs.finished_runs import FinishedRun
from lightning_revbn.runs.scalars import Series


def comparison(label: str, steps: int = 10, value: Callable[[int, int], float] = lambda s, i: 1.0) -> CurveComparison:
    """An arm of three seeds with these values by seed and step, against a baseline of 20 steps."""

    def run(seed: int, values: list[float]) -> FinishedRun:
        return FinishedRun(Path("run"), seed, 0.0, 20, Series(np.arange(len(values)), np.array(values)))

    baseline = {seed: run(seed, [2.0 + seed / 10] * 20) for seed in range(3)}
    proposed = {seed: run(seed, [value(seed, step) for step in range(steps)]) for seed in range(3)}
    return compare_curves(baseline, proposed, label, "loss")


def names(figure: Figure) -> list[str]:
    legends: list[Any] = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def test_every_arm_is_shown_to_its_last_step_wherever_others_end() -> None:
    figure = draw([comparison("long", 20), comparison("short", 10)], "loss", lower_is_better=True)
    assert [axes.get_xlim() for axes in figure.axes] == [(0, 19), (0, 19)]


def test_an_arm_with_nothing_finite_says_so() -> None:
    figure = draw([comparison("lost", value=lambda seed, step: math.nan)], "loss", lower_is_better=True)
    assert names(figure) == ["Baseline", f"lost\n({NOTHING_FINITE})"]


def test_a_step_between_two_that_cannot_be_drawn_is_a_point_with_its_interval() -> None:
    gappy = comparison("b", value=lambda seed, step: math.nan if step % 2 else 1.0 + seed / 10)
    above: Any = draw([gappy], "loss", lower_is_better=True).axes[0]
    line = next(line for line in above.lines if len(line.get_markevery() or []) == 5)
    assert (line.get_marker(), line.get_markevery()) == ("o", [0, 2, 4, 6, 8])
    low, high = gappy.proposed.low[0], gappy.proposed.high[0]
    segments = [path.vertices for lines in above.collections for path in lines.get_paths()]
    assert any(len(segment) == 2 and np.allclose(segment, [[4, low], [4, high]]) for segment in segments)


@pytest.mark.parametrize("count", [7, 24])
def test_the_names_of_many_arms_stand_beside_the_panels(count: int, tmp_path: Path) -> None:
    figure = draw([comparison(f"scale={k / 100}") for k in range(1, count + 1)], "loss", lower_is_better=True)
    save(figure, tmp_path / "curves.svg")  # matplotlib warns where panels have no room, and a warning fails a test
    above, below = (axes.get_position().height for axes in figure.axes)
    assert above > 0.4
    assert below > 0.2
    assert len(names(figure)) == count + 1


def test_names_whose_ends_are_alike_are_written_out() -> None:
    labels = [f'scale={{"backbone.layer1.*": {scale}, "backbone.layer2.*": 0.5, "*": 0.1}}' for scale in (0.1, 0.2)]
    figure = draw([comparison(label) for label in labels], "loss", lower_is_better=True)
    assert [name.replace("\n", "") for name in names(figure)] == ["Baseline", *labels]


@pytest.mark.parametrize(("lower_is_better", "told"), [(True, True), (False, False)])
def test_the_dashed_line_is_explained_where_there_is_one(lower_is_better: bool, told: bool) -> None:
    figure: Any = draw([comparison("b")], "loss", lower_is_better=lower_is_better)
    assert any(line.get_linestyle() == "--" for line in figure.axes[1].lines) == told
    assert ("dashed: from where an arm is ahead for good" in figure.get_suptitle()) == told
