from __future__ import annotations

import re

import torchvision
from hypothesis import given
from hypothesis import strategies as st

from lightning_revbn import find_batch_norms
from lightning_revbn.callbacks.scalar_layout import LAYERS_IN_A_CHART, scalar_layout

names = st.lists(
    st.lists(st.sampled_from(["a", "b", "0", "1", "10"]), min_size=1, max_size=4).map(".".join), unique=True
)


def tags(patterns: list[str | list[str]]) -> list[str]:
    kind, expressions = patterns
    assert kind == "Multiline"
    return [expression.removesuffix("$").replace("\\", "") for expression in expressions]


@given(names)
def test_every_layer_is_in_one_category_and_in_the_order_of_the_model(layers: list[str]) -> None:
    _, *stages = scalar_layout("revbn", layers).values()
    shown = [tag for charts in stages for tag in tags(charts["Scale: mean"])]
    assert shown == [f"revbn/{layer}/scale_mean" for layer in layers]
    assert all(len(tags(chart)) <= LAYERS_IN_A_CHART for charts in stages for chart in charts.values())


def test_a_deep_network_is_cut_at_the_seams_between_its_modules() -> None:
    layers = [record.name for record in find_batch_norms(torchvision.models.resnet152())]
    titles = list(scalar_layout("revbn", layers))
    assert titles[:4] == [
        "revbn: the whole model",
        "revbn: bn1 to layer1.2.bn3",
        "revbn: layer2.0.bn1 to layer2.4.bn3",
        "revbn: layer2.5.bn1 to layer2.7.bn3",
    ]
    assert len(titles) == 12


def test_tensorboard_takes_a_tag_for_a_pattern_so_it_must_match_itself_alone() -> None:
    layout = scalar_layout("revbn", ["net.bn", "net_bn"])
    pattern = layout["revbn: net.bn to net_bn"]["Scale: mean"][1][0]
    assert re.match(pattern, "revbn/net.bn/scale_mean")
    assert not re.match(pattern, "revbn/net_bn/scale_mean")
    assert not re.match(pattern, "revbn/net.bn/scale_mean_of_all")


def test_activations_have_charts_only_where_they_are_logged() -> None:
    plain, full = scalar_layout("x", ["bn"]), scalar_layout("x", ["bn"], activations=True)
    assert [*full["x: bn"]][: len(plain["x: bn"])] == [*plain["x: bn"]]
    assert tags(full["x: bn"]["Share of |x_hat| > 3"]) == ["x/bn/normalized_over_3"]
    assert tags(full["x: the whole model"]["Greatest |x_hat|"]) == ["x/normalized_absmax"]


def test_without_single_layers_only_the_whole_model_has_charts() -> None:
    assert list(scalar_layout("revbn", ["bn"], per_layer=False)) == ["revbn: the whole model"]
