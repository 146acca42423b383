"""Several callbacks in one Trainer, each for layers of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.lit import LitNet, loader, quiet, trainer
from helpers.logs import rows
from helpers.models import BATCH_NORMS, images, residual_net, scales
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_revbn import BatchNormMonitor, RevisitedBatchNorm


def without_rule(**settings: Any) -> RevisitedBatchNorm:
    return RevisitedBatchNorm(scale_lr_divisor=1, weight_decay_exempt=None, **settings)


def pair(**settings: Any) -> list[RevisitedBatchNorm]:
    return [
        without_rule(scale=0.5, include=["*.stem.*"], **settings),
        without_rule(scale=0.25, exclude=["*.stem.*"], **settings),
    ]


class Starts(LitNet):
    """Notes the scales that training starts from."""

    def on_train_start(self) -> None:
        self.starts = [scale[0].item() for scale in scales(self)]


def keys_in(path: Path) -> set[str]:
    return set(torch.load(path, weights_only=True)["callbacks"])


def test_each_callback_rewrites_its_layers_and_one_monitor_logs(tmp_path: Path) -> None:
    module, logger = Starts(), CSVLogger(tmp_path)
    run = trainer(tmp_path, *pair(), logger=logger, max_epochs=1)
    run.fit(module, loader(2))
    assert module.starts == [0.5, 0.25, 0.25]
    assert [row["step"] for row in rows(tmp_path) if "revbn/scale_mean" in row] == ["0", "1"]
    logged = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())
    assert json.loads(logged["revbn/scale"]) == [0.5, 0.25]
    assert logged["revbn/zero_scale"] == "keep"


def test_a_monitor_with_a_prefix_of_its_own_logs_too(tmp_path: Path) -> None:
    first, second = pair(monitor=True)
    other = without_rule(exclude=["*.stem.*"], monitor=BatchNormMonitor(prefix="other"))
    trainer(tmp_path, first, other, logger=CSVLogger(tmp_path), max_epochs=1).fit(LitNet(), loader(2))
    logged = rows(tmp_path)
    assert [len([row for row in logged if f"{prefix}/scale_mean" in row]) for prefix in ("revbn", "other")] == [2, 2]
    assert second.monitor is not None


@pytest.mark.filterwarnings("ignore:RevisitedBatchNorm has no effect.*none learns with lr / 1:UserWarning")
def test_states_of_several_are_saved_and_loaded_each_by_its_layers(tmp_path: Path) -> None:
    run = trainer(tmp_path, *pair(monitor=False), max_epochs=1)
    run.fit(LitNet(model=residual_net(zero_init_residual=True)), loader(2))
    run.save_checkpoint(tmp_path / "end.ckpt")
    assert keys_in(tmp_path / "end.ckpt") == {
        "RevisitedBatchNorm{'include': ['*.stem.*']}",
        "RevisitedBatchNorm{'exclude': ['*.stem.*']}",
    }
    first, second = resumed = pair(monitor=False)
    run = trainer(tmp_path, *reversed(resumed), max_epochs=2)
    run.fit(LitNet(), loader(2), ckpt_path=tmp_path / "end.ckpt")
    assert first.state_dict()["zero_kept"] == []
    assert second.state_dict()["zero_kept"] == ["model.bn2"]


@pytest.mark.parametrize("settings", [{}, {"scale": 0.2}, {"exclude": ["*.bn2"]}, {"scale": {"*": 0.2}}])
def test_a_callback_alone_has_the_name_of_the_class_for_a_key(settings: dict[str, Any], tmp_path: Path) -> None:
    run = trainer(tmp_path, quiet(**settings), quiet(enabled=False), max_epochs=1)
    run.fit(LitNet(), loader(1))
    run.save_checkpoint(tmp_path / "end.ckpt")
    assert keys_in(tmp_path / "end.ckpt") == {"RevisitedBatchNorm"}


def test_a_subclass_has_a_key_of_its_own(tmp_path: Path) -> None:
    class Mine(RevisitedBatchNorm):
        pass

    run = trainer(tmp_path, Mine(scale=0.2, monitor=False), max_epochs=1)
    run.fit(LitNet(), loader(1))
    run.save_checkpoint(tmp_path / "end.ckpt")
    assert keys_in(tmp_path / "end.ckpt") == {Mine.__qualname__}


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ([{}, {"scale": 0.2}], "'model.stem.1', 'model.bn1', 'model.bn2'"),
        ([{"include": ["*.bn*"]}, {"scale": {"*.bn2": 0.2}}], "'model.bn2'"),
    ],
)
def test_two_callbacks_for_one_layer_are_refused_by_its_name_and_write_nothing(
    settings: list[dict[str, Any]], shown: str, tmp_path: Path
) -> None:
    module = LitNet()
    run = trainer(tmp_path, *(quiet(**own) for own in settings))
    said = f"2 callbacks RevisitedBatchNorm in one Trainer select the same layers: {shown}. Give each layer to one"
    with pytest.raises(MisconfigurationException, match=said):
        run.fit(module, loader(1))
    assert all((scale == 1).all() for scale in scales(module))


def test_many_shared_layers_are_counted(tmp_path: Path) -> None:
    module = LitNet(model=torch.nn.Sequential(residual_net(), torch.nn.BatchNorm1d(5)))
    assert len(BATCH_NORMS) == 3
    with pytest.raises(MisconfigurationException, match=r"'model\.0\.bn2' and 1 more. Give"):
        trainer(tmp_path, quiet(), quiet(scale=0.2)).fit(module, [images(8)])
