"""Compiled networks and modules: trained as eager ones, under the same names, with the checkpoints of torch.compile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.aftermath import assert_rule_is_gone
from helpers.by_hand import textbook_sgd
from helpers.lit import LitNet, loader, sgd, trainer
from helpers.logs import rows
from helpers.models import BATCH_NORMS, assert_same_parameters, residual_net, scales
from helpers.rates import Rates, assert_ratio_everywhere, probing_sgd
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_revbn import RevisitedBatchNorm

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # inside torch's compilers


def compiled_network(configure: Any, **options: Any) -> LitNet:
    return LitNet(configure, torch.compile(residual_net(**options), backend="aot_eager"))


def compiled_module(configure: Any) -> Any:
    return torch.compile(LitNet(configure), backend="aot_eager")


def compiled_in_place(configure: Any) -> LitNet:
    module = LitNet(configure)
    module.model.compile(backend="aot_eager")
    return module


@pytest.fixture(autouse=True)
def compile_anew() -> Any:
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("make", [compiled_network, compiled_in_place, compiled_module])
def test_training_a_compiled_model_equals_training_it_by_hand(tmp_path: Path, make: Any) -> None:
    reference = make(textbook_sgd)
    for scale in scales(reference):
        nn.init.constant_(scale, 0.1)
    trainer(tmp_path).fit(reference, loader())

    seen: Rates = []
    module = make(probing_sgd(seen))
    run = trainer(tmp_path, callback := RevisitedBatchNorm(), logger=CSVLogger(tmp_path))
    run.fit(module, loader())
    hand, ours = reference.state_dict(), module.state_dict()
    assert hand.keys() == ours.keys()
    assert all(torch.equal(hand[key], ours[key]) for key in hand)
    assert_ratio_everywhere(seen, 12, moves=False)
    assert_rule_is_gone(getattr(module, "_orig_mod", module), run)

    names = [f"model.{name}" for name in BATCH_NORMS]
    assert [record.name for record in callback.report.rewritten] == names
    keys = {key for row in rows(tmp_path) for key in row}
    assert {f"revbn/{name}/scale_mean" for name in names} <= keys
    assert not [key for key in keys if "_orig_mod" in key]


def test_patterns_are_the_same_for_a_compiled_network(tmp_path: Path) -> None:
    callback = RevisitedBatchNorm({"model.stem.*": 0.2, "*": 0.3}, exclude=["model.bn2"], monitor=False)
    trainer(tmp_path, callback, max_epochs=1).fit(compiled_network(sgd), loader(1))
    assert {record.name: record.target for record in callback.report.rewritten} == {
        "model.stem.1": 0.2,
        "model.bn1": 0.3,
    }


def test_checkpoints_have_the_keys_of_a_run_without_the_callback(tmp_path: Path) -> None:
    files: list[dict[str, Any]] = []
    for name, callbacks in (("plain", []), ("ours", [RevisitedBatchNorm()])):
        save = ModelCheckpoint(tmp_path / name, "end")
        options = {"logger": CSVLogger(tmp_path), "enable_checkpointing": True}
        trainer(tmp_path, *callbacks, save, **options).fit(compiled_network(sgd), loader(2))
        files.append(torch.load(tmp_path / name / "end.ckpt", weights_only=True))
    plain, ours = files
    assert plain["state_dict"].keys() == ours["state_dict"].keys()
    assert "model._orig_mod.bn1.weight" in ours["state_dict"]


def test_a_compiled_run_is_resumed_by_a_network_that_is_not_compiled(tmp_path: Path) -> None:
    def module(compiled: bool) -> LitNet:
        network = residual_net(zero_init_residual=True)
        return LitNet(sgd, torch.compile(network, backend="eager") if compiled else network)

    save = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
    run = trainer(tmp_path, RevisitedBatchNorm(), save, enable_checkpointing=True, logger=CSVLogger(tmp_path))
    run.fit(whole := module(True), loader(3))

    saved = torch.load(tmp_path / "saved" / "step=2.ckpt", weights_only=True)
    # The prefix that torch.compile gives the weights is the user's to remove, with or without the callback.
    saved["state_dict"] = {key.replace("_orig_mod.", ""): value for key, value in saved["state_dict"].items()}
    torch.save(saved, tmp_path / "renamed.ckpt")
    again = trainer(tmp_path, callback := RevisitedBatchNorm(), logger=CSVLogger(tmp_path))
    again.fit(resumed := module(False), loader(3), ckpt_path=tmp_path / "renamed.ckpt")
    assert callback.state_dict()["zero_kept"] == ["model.bn2"]
    assert_same_parameters(whole.model._orig_mod, resumed.model)
