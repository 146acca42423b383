from __future__ import annotations

from lightning_revbn.plots.pairs_figure import draw


def test_many_arms_stand_in_rows() -> None:
    figure = draw([1.0, 2.0], {f"scale={k}": [2.0, 3.0] for k in range(13)}, "test_acc")
    assert figure.get_figwidth() < 20
    shown = [axes for axes in figure.axes if axes.axison]
    assert len(shown) == 13
    assert len({round(axes.get_subplotspec().rowspan.start) for axes in shown if axes.get_subplotspec()}) == 3


def test_labels_whose_ends_are_alike_are_written_out() -> None:
    labels = [f"scale={scale} of all layers in the first stage, 0.5 in others" for scale in (0.1, 0.2)]
    figure = draw([1.0, 2.0], {label: [2.0, 3.0] for label in labels}, "test_acc")
    ticks = [axes.get_xticklabels()[1].get_text().replace("\n", "") for axes in figure.axes]
    assert ticks == labels
