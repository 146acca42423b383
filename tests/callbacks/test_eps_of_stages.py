"""Which eps a network has in every stage, after a resume and in an export, and what is said where it is in doubt."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.eps import EPS, TORCHS, Evaluated, eps_of
from helpers.lit import loader, quiet, trainer
from helpers.models import assert_same_parameters, residual_net
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_revbn.core.eps import set_eps


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return a checkpoint of a run with eps=1e-3."""
    run = trainer(tmp_path, quiet(eps=EPS), max_epochs=1)
    run.fit(Evaluated(), loader())
    run.save_checkpoint(tmp_path / "saved.ckpt")
    return tmp_path / "saved.ckpt"


def test_every_stage_of_one_process_has_the_eps_and_it_trains_as_written_into_the_model(tmp_path: Path) -> None:
    module, by_hand = Evaluated(), Evaluated()
    for layer in by_hand.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = EPS
    run = trainer(tmp_path, quiet(eps=EPS))
    run.fit(module, loader())
    run.validate(module, loader(), verbose=False)
    run.test(module, loader(), verbose=False)
    run.predict(module, loader())
    assert module.seen == {stage: {EPS} for stage in ("validate", "fit", "test", "predict")}
    trainer(tmp_path, quiet()).fit(by_hand, loader())
    assert_same_parameters(module, by_hand)
    assert run.callbacks[-1].report.records[0].eps_before == TORCHS


def test_without_the_setting_no_layer_is_touched_and_the_state_has_no_eps(tmp_path: Path) -> None:
    module = Evaluated()
    module.model.bn1.eps = 0.5
    callback = quiet()
    trainer(tmp_path, callback).fit(module, loader())
    assert eps_of(module) == [TORCHS, 0.5, TORCHS]
    assert callback.state_dict()["eps"] is None
    assert "eps_by_layer" not in callback.state_dict()


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("options", [{"eps": EPS}, {"eps": 1e-2}, {}], ids=["same", "other", "none"])
def test_a_checkpoint_is_evaluated_with_the_eps_that_it_was_trained_with(
    stage: str, options: dict[str, Any], saved: Path, tmp_path: Path
) -> None:
    module = Evaluated()
    run = trainer(tmp_path, quiet(**options))
    evaluate = getattr(run, stage)
    arguments: dict[str, Any] = {"ckpt_path": saved} if stage == "predict" else {"ckpt_path": saved, "verbose": False}
    if options == {"eps": EPS}:
        evaluate(module, loader(), **arguments)
    else:
        with pytest.warns(UserWarning, match=r"trained with eps=0.001 and are evaluated with it, though this run"):
            evaluate(module, loader(), **arguments)
    assert module.seen == {stage: {EPS}}
    assert "on_load_checkpoint" not in vars(module)


def test_a_checkpoint_that_was_trained_without_is_evaluated_without(tmp_path: Path) -> None:
    run = trainer(tmp_path, quiet(), max_epochs=1)
    run.fit(Evaluated(), loader())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    module = Evaluated()
    with pytest.warns(UserWarning, match=r"trained without eps=0.001 in 3 layers"):
        trainer(tmp_path, quiet(eps=EPS)).test(module, loader(), ckpt_path=tmp_path / "plain.ckpt", verbose=False)
    assert module.seen == {"test": {TORCHS}}


def test_a_resumed_run_ends_as_the_undisturbed_one(saved: Path, tmp_path: Path) -> None:
    undisturbed, resumed = Evaluated(), Evaluated()
    trainer(tmp_path, quiet(eps=EPS), max_epochs=2).fit(undisturbed, loader())
    trainer(tmp_path, quiet(eps=EPS), max_epochs=2).fit(resumed, loader(), ckpt_path=saved)
    assert_same_parameters(resumed, undisturbed)
    assert resumed.seen == {"fit": {EPS}}


def test_a_resumed_module_that_is_not_fresh_has_the_eps_too(saved: Path, tmp_path: Path) -> None:
    module = Evaluated.load_from_checkpoint(saved)
    assert eps_of(module) == [TORCHS] * 3  # Lightning alone knows weights, and no eps
    trainer(tmp_path, quiet(eps=EPS), max_epochs=2).fit(module, loader(), ckpt_path=saved)
    assert module.seen == {"fit": {EPS}}


def test_a_run_resumed_without_the_setting_keeps_the_eps_and_says_so(saved: Path, tmp_path: Path) -> None:
    module = Evaluated()
    with pytest.warns(UserWarning, match=r"3 layers of the checkpoint were trained with eps=0.001 and keep it"):
        trainer(tmp_path, quiet(), max_epochs=2).fit(module, loader(), ckpt_path=saved)
    assert module.seen == {"fit": {EPS}}


def test_a_run_resumed_without_the_callback_has_the_eps_of_its_code_and_lightning_names_the_callback(
    saved: Path, tmp_path: Path
) -> None:
    module = Evaluated()
    with pytest.warns(UserWarning, match=r"(?s)callbacks used to create the checkpoint.*RevisitedBatchNorm"):
        trainer(tmp_path, max_epochs=2).fit(module, loader(), ckpt_path=saved)
    assert module.seen == {"fit": {TORCHS}}


def test_weights_that_were_loaded_by_hand_are_evaluated_with_a_warning(saved: Path, tmp_path: Path) -> None:
    module = Evaluated.load_from_checkpoint(saved)
    said = r"eps=0.001 is not set in 3 layers, such as 'model.stem.1', which are trained and have eps=1e-05"
    with pytest.warns(UserWarning, match=said):
        trainer(tmp_path, quiet(eps=EPS)).test(module, loader(), verbose=False)
    assert module.seen == {"test": {TORCHS}}


def test_an_export_has_the_eps_of_the_fit(tmp_path: Path) -> None:
    module = Evaluated()
    trainer(tmp_path, quiet(eps=EPS), max_epochs=1).fit(module, loader())
    network, inputs = module.model.eval(), torch.randn(2, 3, 6, 6)
    exported = torch.export.export(network, (inputs,)).module()
    other = copy.deepcopy(network)
    for layer in other.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = TORCHS
    with torch.no_grad():
        torch.testing.assert_close(exported(inputs), network(inputs))
        assert not torch.allclose(exported(inputs), other(inputs), atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*eps=0.001 is not set in 3 layers")
def test_a_second_fit_leaves_the_eps_and_other_modules_have_their_own(tmp_path: Path) -> None:
    callback, module = quiet(eps=EPS), Evaluated()
    trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    assert module.seen == {"fit": {EPS}}
    assert set(callback.state_dict()["eps_by_layer"].values()) == {EPS}
    pretrained = Evaluated()
    trainer(tmp_path, max_epochs=1).fit(pretrained, loader())
    with pytest.warns(UserWarning, match="half of the method"):
        trainer(tmp_path, callback, max_epochs=1).fit(pretrained, loader())
    assert eps_of(pretrained) == [TORCHS] * 3
    assert "eps_by_layer" not in callback.state_dict()


def test_a_fit_that_fails_before_its_first_update_gives_the_eps_back(tmp_path: Path) -> None:
    class Failing(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            raise OSError("no")

    module = Evaluated()
    module.model.bn1.eps = 0.5
    with pytest.raises(OSError, match="no"):
        trainer(tmp_path, quiet(eps=EPS), Failing()).fit(module, loader())
    assert eps_of(module) == [TORCHS, 0.5, TORCHS]


def test_excluded_and_zero_started_layers(tmp_path: Path) -> None:
    module = Evaluated(model=residual_net(zero_init_residual=True))
    trainer(tmp_path, quiet(eps=EPS, exclude=["model.bn1"]), max_epochs=1).fit(module, loader())
    assert eps_of(module) == [EPS, TORCHS, EPS]


def test_another_trainer_may_evaluate_in_the_middle_of_a_fit(saved: Path, tmp_path: Path) -> None:
    callback = quiet(eps=1e-2)
    others: list[Evaluated] = []

    class Evaluating(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            others.append(Evaluated())
            with pytest.warns(UserWarning, match=r"evaluated with it"):
                trainer_of(tmp_path, callback).test(others[-1], loader(), ckpt_path=saved, verbose=False)

    trainer_of = trainer
    module = Evaluated()
    checkpoints = ModelCheckpoint(tmp_path / "made", save_top_k=-1)
    run = trainer(tmp_path, callback, Evaluating(), checkpoints, enable_checkpointing=True)
    run.fit(module, loader())
    assert module.seen == {"fit": {1e-2}}
    assert all(other.seen == {"test": {EPS}} for other in others)
    state = torch.load(run.checkpoint_callback.best_model_path, weights_only=True)["callbacks"]["RevisitedBatchNorm"]
    assert set(state["eps_by_layer"].values()) == {1e-2}


@pytest.mark.parametrize("eps", [0, -1.0, float("nan"), float("inf"), "small", True])
def test_a_wrong_eps_is_refused_when_the_callback_is_made(eps: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="eps"):
        quiet(eps=eps)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Return a checkpoint of a run without the callback."""
    run = trainer(tmp_path, max_epochs=1)
    run.fit(Evaluated(), loader())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    return tmp_path / "plain.ckpt"


WITHOUT = r"trained without eps=0.001 in 3 layers"


@pytest.mark.filterwarnings("ignore:.*half of the method")
@pytest.mark.parametrize("other", [None, {"eps": EPS}, {}], ids=["same", "other", "no eps"])
@pytest.mark.parametrize("stage", ["test", "fit"])
def test_a_module_that_has_had_eps_gives_it_up_for_weights_that_were_trained_without(
    stage: str, other: dict[str, Any] | None, plain: Path, tmp_path: Path
) -> None:
    module, callback = Evaluated(), quiet(eps=EPS)
    trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    module.seen.clear()
    run = trainer(tmp_path, callback if other is None else quiet(**other), max_epochs=2)
    with pytest.warns(UserWarning, match=WITHOUT):
        getattr(run, stage)(module, loader(), ckpt_path=plain)
    assert module.seen == {stage: {TORCHS}}
    assert "on_load_checkpoint" not in vars(module)


@pytest.mark.filterwarnings("ignore:.*half of the method")
def test_a_fresh_module_that_goes_on_from_a_run_without_eps_trains_without(plain: Path, tmp_path: Path) -> None:
    module, callback = Evaluated(), quiet(eps=EPS)
    with pytest.warns(UserWarning, match=WITHOUT):
        trainer(tmp_path, callback).fit(module, loader(), ckpt_path=plain)
    assert module.seen == {"fit": {TORCHS}}
    assert "eps_by_layer" not in callback.state_dict()


@pytest.mark.filterwarnings("ignore:.*half of the method")
def test_weights_that_the_module_loads_in_setup_keep_their_eps(plain: Path, tmp_path: Path) -> None:
    class Loading(Evaluated):
        def setup(self, stage: str) -> None:
            self.load_state_dict(torch.load(plain, weights_only=True)["state_dict"])

    module, callback = Loading(), quiet(eps=EPS)
    with pytest.warns(UserWarning, match=WITHOUT):
        trainer(tmp_path, callback).fit(module, loader())
    assert module.seen == {"fit": {TORCHS}}
    assert "eps_by_layer" not in callback.state_dict()


@pytest.mark.filterwarnings("ignore:.*half of the method")
@pytest.mark.parametrize("options", [{"eps": EPS}, {}], ids=["same eps", "no eps"])
def test_another_callback_records_the_eps_that_layers_have(options: dict[str, Any], tmp_path: Path) -> None:
    module, callback = Evaluated(), quiet(**options)
    trainer(tmp_path, quiet(eps=EPS), max_epochs=1).fit(module, loader())
    trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    assert list(callback.state_dict()["eps_by_layer"].values()) == [EPS] * 3


@pytest.mark.filterwarnings("ignore:.*half of the method")
def test_eps_that_was_set_by_hand_after_loading_is_recorded(saved: Path, tmp_path: Path) -> None:
    module, callback = Evaluated.load_from_checkpoint(saved), quiet(eps=EPS)
    set_eps(module, EPS, trained="overwrite")
    trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    assert list(callback.state_dict()["eps_by_layer"].values()) == [EPS] * 3


def test_a_second_fit_that_fails_leaves_what_the_first_has_recorded(saved: Path, tmp_path: Path) -> None:
    class Failing(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            raise OSError("no")

    module, callback = Evaluated(), quiet(eps=EPS)
    trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    with pytest.raises(OSError, match="no"):
        trainer(tmp_path, callback, Failing()).fit(module, loader(), ckpt_path=saved)
    assert list(callback.state_dict()["eps_by_layer"].values()) == [EPS] * 3


@pytest.mark.filterwarnings("ignore:.*half of the method")
def test_fine_tuning_of_weights_that_were_loaded_by_hand_warns_of_their_eps(saved: Path, tmp_path: Path) -> None:
    module = Evaluated.load_from_checkpoint(saved)
    with pytest.warns(UserWarning, match=r"eps=0.001 is not set in 3 layers.*trained and have eps=1e-05"):
        trainer(tmp_path, quiet(eps=EPS), max_epochs=1).fit(module, loader())
    assert module.seen == {"fit": {TORCHS}}
