"""The plugin in a Trainer, and what the callback says of sync_batchnorm=True. Two ranks: tests/processes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.lit import LitNet, loader, trainer
from helpers.models import BATCH_NORMS, residual_net
from lightning.pytorch.plugins import TorchSyncBatchNorm
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import nn

from lightning_revbn import RevisitedBatchNorm
from lightning_revbn.plugins import BatchNormSync


def with_activations() -> nn.Module:
    return nn.Sequential(*(nn.Sequential(BatchNormAct2d(3), nn.BatchNorm2d(3)) for _ in range(5)))


class TimmSync(TorchSyncBatchNorm):
    def apply(self, model: nn.Module) -> nn.Module:
        return convert_sync_batchnorm(model)


def set_up(path: Path, module: LitNet, **options: Any) -> None:
    """Call the callback's setup as the Trainer does, without starting processes."""
    run = trainer(path, **{"devices": 2, "strategy": "ddp", **options})
    run.strategy.connect(module)
    callback = RevisitedBatchNorm(monitor=False)
    callback.setup(run, module, "fit")
    run.strategy.model = module.configure_model() or module
    callback.teardown(run, module, "fit")


def test_the_trainer_takes_the_plugin_and_not_together_with_the_flag(tmp_path: Path) -> None:
    plugin = BatchNormSync()
    assert trainer(tmp_path, devices=2, strategy="ddp", plugins=[plugin]).strategy._layer_sync is plugin
    with pytest.raises(MisconfigurationException, match="provided a `BatchNormSync` plugin"):
        trainer(tmp_path, devices=2, strategy="ddp", plugins=[plugin], sync_batchnorm=True)


def test_it_applies_to_the_layers_that_are_not_excluded_and_reverts() -> None:
    module = LitNet()
    plugin = BatchNormSync(exclude=["*.stem.*"])
    assert plugin.apply(module) is module
    assert [name for name, layer in module.named_modules() if "forward" in vars(layer)] == [
        f"model.{name}" for name in BATCH_NORMS[1:]
    ]
    assert plugin.revert(module) is module
    assert not [name for name, layer in module.named_modules() if "forward" in vars(layer)]


def test_a_pattern_that_matches_nothing_is_refused_before_training() -> None:
    with pytest.raises(MisconfigurationException, match="BatchNormSync: exclude: the pattern 'nothing'"):
        BatchNormSync(exclude=["nothing"]).apply(LitNet())
    with pytest.raises(TypeError, match="exclude takes name patterns"):
        BatchNormSync(exclude=[3])  # type: ignore[list-item]


def test_a_function_makes_the_process_group_when_the_plugin_is_applied() -> None:
    group = object()
    module = BatchNormSync(lambda: group).apply(LitNet())
    assert module.model.bn1.forward.group is group


def test_the_flag_is_refused_where_torchs_converter_would_damage_the_model(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException) as raised:
        set_up(tmp_path, LitNet(model=with_activations()), sync_batchnorm=True)
    text = str(raised.value)
    assert "in place of 5 batch norm layers" in text
    assert re.findall(r"'(model\S+)' \(forward of BatchNormAct2d", text) == ["model.0.0", "model.1.0", "model.2.0"]
    assert "2 more" in text
    assert "Use Trainer(plugins=[BatchNormSync()])" in text


def test_layers_made_in_configure_model_are_looked_at_too(tmp_path: Path) -> None:
    class Later(LitNet):
        def configure_model(self) -> None:
            self.model = with_activations()

    with pytest.raises(MisconfigurationException, match="in place of 5 batch norm layers"):
        set_up(tmp_path, Later(), sync_batchnorm=True)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (residual_net, {"sync_batchnorm": True}),
        (with_activations, {"plugins": [BatchNormSync()]}),
        (with_activations, {"plugins": [TimmSync()]}),
        (with_activations, {"sync_batchnorm": True, "strategy": "auto", "devices": 1}),
        (with_activations, {}),
    ],
    ids=["torch's layers", "this plugin", "another converter", "one device", "no synchronisation"],
)
def test_nothing_is_refused_where_nothing_would_be_lost(
    make: Callable[[], nn.Module], options: dict[str, Any], tmp_path: Path
) -> None:
    set_up(tmp_path, LitNet(model=make()), **options)


@pytest.mark.parametrize(
    ("options", "asked"),
    [({"sync_batchnorm": True}, "sync_batchnorm=True"), ({"plugins": [BatchNormSync()]}, "BatchNormSync")],
)
def test_a_strategy_that_ignores_synchronisation_is_told_of(
    options: dict[str, Any], asked: str, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=f"ModelParallelStrategy ignores {asked}: each rank normalises"):
        set_up(tmp_path, LitNet(model=with_activations()), strategy=ModelParallelStrategy(), **options)


def test_a_fit_on_one_device_is_what_it_was(tmp_path: Path) -> None:
    results = []
    for plugins in ([BatchNormSync()], []):
        module = LitNet()
        trainer(tmp_path, plugins=plugins, max_epochs=1).fit(module, loader())
        results.append(module.model.head.weight)
    assert torch.equal(*results)
