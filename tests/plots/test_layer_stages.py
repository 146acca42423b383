from __future__ import annotations

from helpers.made_runs import RESNET_152

from lightning_revbn.plots.layer_stages import choose_labels, find_stages


def test_long_networks_are_labelled_by_their_stages() -> None:
    stages = find_stages([layer.removeprefix("model.") for layer in RESNET_152], 12)
    assert [stage.name for stage in stages] == ["bn1", "layer1", "layer2", "layer3", "layer4"]
    assert [stage.name for stage in choose_labels(stages, 12)] == ["layer1", "layer2", "layer3", "layer4"]
    flat = find_stages([str(i) for i in range(50)], 5)
    assert [stage.name for stage in choose_labels(flat, 5)] == [str(i) for i in range(0, 50, 5)]
    nested = [f"blocks.{i}.{j}.bn" for i in range(3) for j in range(10)]
    assert [stage.name for stage in find_stages(["stem", *nested], 4)] == ["stem", "blocks.0", "blocks.1", "blocks.2"]
