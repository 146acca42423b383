"""Which eps layers have where several tell: two callbacks, the model's code, averages, earlier fits of the module."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.eps import EPS, TORCHS, Evaluated, eps_of
from helpers.lit import loader, quiet, trainer
from helpers.models import residual_net
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_revbn import RevisitedBatchNorm

OTHER = 1e-2
STEM, REST = ["*.stem.*"], ["*.bn?"]  # layer 1, and layers 2 and 3, of the network

half = pytest.mark.filterwarnings("ignore:.*half of the method")


def two(stem: float | None, rest: float | None) -> list[RevisitedBatchNorm]:
    return [quiet(include=STEM, eps=stem), quiet(include=REST, eps=rest)]


def run_of(path: Path, module: Evaluated, *callbacks: L.Callback, **options: Any) -> Path:
    """Train for one epoch, and save a checkpoint."""
    run = trainer(path, *callbacks, max_epochs=1)
    run.fit(module, loader())
    run.save_checkpoint(path / "run.ckpt", **options)
    return path / "run.ckpt"


def with_eps(eps: float) -> Evaluated:
    """Return a module whose code has an eps of its own."""
    module = Evaluated()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = eps
    return module


def said(path: Path, module: Evaluated, stage: str, checkpoint: Path | None, *callbacks: L.Callback) -> list[str]:
    """Run a stage and return what was said of eps; half of the method is another matter."""
    run = trainer(path, *callbacks, max_epochs=2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        getattr(run, stage)(module, loader(), ckpt_path=checkpoint)
    return [str(warning.message) for warning in told if "eps=" in str(warning.message)]


# --- checkpoints of several callbacks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["validate", "test", "predict", "fit"])
@pytest.mark.parametrize("rest", [OTHER, None], ids=["two eps", "one eps"])
def test_two_callbacks_go_on_from_their_checkpoint_without_a_word(
    rest: float | None, stage: str, tmp_path: Path
) -> None:
    saved = run_of(tmp_path, Evaluated(), *two(EPS, rest))
    module = Evaluated()
    assert said(tmp_path, module, stage, saved, *two(EPS, rest)) == []
    assert eps_of(module) == [EPS, rest or TORCHS, rest or TORCHS]
    assert module.seen == {stage: {EPS, rest or TORCHS}}


ONE: dict[str, dict[str, Any]] = {
    "no eps": {},
    "eps of another callback": {"eps": OTHER},
    "other patterns": {"eps": EPS, "exclude": REST},
}


@half
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("options", ONE.values(), ids=ONE)
@pytest.mark.parametrize("stage", ["test", "fit"])
def test_a_callback_that_finds_the_checkpoint_of_two_has_their_eps_and_says_where_it_has_another(
    stage: str, options: dict[str, Any], tmp_path: Path
) -> None:
    saved = run_of(tmp_path, Evaluated(), *two(EPS, OTHER))
    module, callback = Evaluated(), quiet(**options)
    texts = said(tmp_path, module, stage, saved, callback)
    if stage == "fit" and options.get("eps") == OTHER:
        assert len(texts) == 1
        assert "1 layers of the checkpoint were trained with eps=0.001 and go on with eps=0.01" in texts[0]
        assert eps_of(module) == [OTHER] * 3
        return
    trained_with = {"no eps": "0.001 and 0.01", "eps of another callback": "0.001", "other patterns": "0.01"}
    name = next(name for name, given in ONE.items() if given == options)
    assert len(texts) == 1
    assert f"trained with eps={trained_with[name]} and " in texts[0]
    assert eps_of(module) == [EPS, OTHER, OTHER]
    assert list(callback.state_dict()["eps_by_layer"].values()) == [OTHER, OTHER, EPS]  # by name


@half
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_layer_that_no_callback_selects_any_more_keeps_its_eps_from_run_to_run(tmp_path: Path) -> None:
    saved = run_of(tmp_path, Evaluated(), quiet(eps=EPS))
    for fit in range(2):
        module = Evaluated()
        run = trainer(tmp_path, *two(None, None), max_epochs=2 + fit)
        with pytest.warns(UserWarning, match="keep it, though this run sets no eps"):
            run.fit(module, loader(), ckpt_path=saved)
        assert eps_of(module) == [EPS] * 3
        run.save_checkpoint(saved)


@half
def test_a_layer_that_is_left_out_gives_up_an_eps_that_its_new_weights_have_not_been_trained_with(
    tmp_path: Path,
) -> None:
    saved = run_of(tmp_path, Evaluated())
    module = Evaluated()
    run_of(tmp_path / "other", module, quiet(eps=EPS))
    texts = said(tmp_path, module, "fit", saved, quiet(eps=EPS, exclude=STEM))
    assert len(texts) == 1
    assert "trained without eps=0.001 in 3 layers" in texts[0]
    assert eps_of(module) == [TORCHS] * 3


def test_layers_that_the_model_has_by_other_names_are_named(tmp_path: Path) -> None:
    class Renamed(Evaluated):
        def __init__(self) -> None:
            super().__init__()
            self.model.norm = self.model.bn1
            del self.model.bn1
            self.model.forward = lambda inputs: inputs.flatten(1)[:, :6]

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            weights = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name.replace("bn1", "norm"): value for name, value in weights.items()}

    saved = run_of(tmp_path, Evaluated(), quiet(eps=EPS))
    texts = said(tmp_path, Renamed(), "predict", saved, quiet(eps=EPS))
    assert (
        "1 layers that were trained with eps=0.001, and the model has no layers of their names, such as 'model.bn1'"
        in texts[0]
    )


@pytest.mark.parametrize("options", [{}, {"eps": OTHER}], ids=["no eps", "other eps"])
def test_a_checkpoint_of_weights_alone_tells_its_eps_too(options: dict[str, Any], tmp_path: Path) -> None:
    class Saving(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)

    trainer(tmp_path, *two(EPS, None), Saving(), max_epochs=1).fit(Evaluated(), loader())
    weights, module = tmp_path / "weights.ckpt", Evaluated()
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        trainer(tmp_path).test(Evaluated(), loader(), ckpt_path=weights, verbose=False)
    texts = said(tmp_path, module, "test", weights, quiet(include=STEM, **options))
    assert len([text for text in texts if "trained with eps=0.001 and are evaluated with it" in text]) == 1
    assert eps_of(module) == [EPS, TORCHS, TORCHS]
    assert "optimizer_states" not in torch.load(weights, weights_only=True)


def test_weights_alone_that_do_not_tell_are_evaluated_with_a_warning(tmp_path: Path) -> None:
    saved = run_of(tmp_path, Evaluated(), weights_only=True)
    assert said(tmp_path, Evaluated(), "test", saved, quiet()) == []
    module = Evaluated()
    texts = said(tmp_path, module, "test", saved, quiet(eps=EPS))
    assert len(texts) == 1
    assert "holds weights alone, so the eps of their training is not known: 3 layers have eps=0.001" in texts[0]


# --- eps in the model's code ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"eps": EPS}, {}], ids=["in the settings too", "in the code alone"])
@pytest.mark.parametrize("stage", ["test", "fit"])
def test_an_eps_that_was_written_into_the_code_since_is_no_reason_for_a_warning(
    stage: str, options: dict[str, Any], tmp_path: Path
) -> None:
    saved = run_of(tmp_path, Evaluated(), quiet(eps=EPS))
    module, callback = with_eps(EPS), quiet(**options)
    assert said(tmp_path, module, stage, saved, callback) == []
    assert module.seen == {stage: {EPS}}
    assert set(callback.state_dict()["eps_by_layer"].values()) == {EPS}


def test_the_report_asks_for_no_eps_in_code_that_has_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "lightning.pytorch"):
        trainer(tmp_path, quiet(eps=EPS), max_epochs=1).fit(with_eps(EPS), loader())
    assert "start from a new scale" in caplog.text
    assert "No state_dict holds eps" not in caplog.text
    with caplog.at_level("INFO", "lightning.pytorch"):
        trainer(tmp_path, quiet(eps=EPS), max_epochs=1).fit(Evaluated(), loader())
    assert "write eps=0.001 into its layers" in caplog.text


@half
def test_trained_layers_of_which_nothing_tells_raise_no_warning_where_their_code_has_the_eps(tmp_path: Path) -> None:
    module = with_eps(EPS)
    saved = run_of(tmp_path, module)
    for checkpoint in (None, saved):
        for stage in ("test", "fit"):
            assert said(tmp_path, module, stage, checkpoint, quiet(eps=EPS)) == []
    assert eps_of(module) == [EPS] * 3


# --- copies that callbacks keep ---------------------------------------------------------------------------------------


class Averaging(L.Callback):
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.average = AveragedModel(pl_module)
        self.seen: set[float] = set()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.seen.update(eps_of(self.average))

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen.update(eps_of(self.average))


SETTINGS: dict[str, dict[str, Any]] = {"paper": {}, "eps alone": {"scale": 1.0, "scale_lr_divisor": 1}}


@pytest.mark.filterwarnings("ignore:.*has no effect")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("ours_first", [True, False])
def test_an_average_has_the_eps_of_the_network(ours_first: bool, settings: dict[str, Any], tmp_path: Path) -> None:
    averaging, callback = Averaging(), quiet(eps=EPS, **settings)
    callbacks = [callback, averaging] if ours_first else [averaging, callback]
    trainer(tmp_path, *callbacks, max_epochs=1).fit(Evaluated(), loader())
    assert averaging.seen == {EPS}


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_an_average_has_the_eps_that_a_checkpoint_tells(stage: str, tmp_path: Path) -> None:
    saved = run_of(tmp_path, Evaluated(), quiet(eps=EPS))
    averaging = Averaging()
    assert len(said(tmp_path, Evaluated(), stage, saved, averaging, quiet())) == 1
    assert averaging.seen == {EPS}


@pytest.mark.parametrize("ours_first", [True, False])
def test_lightnings_average_is_trained_and_evaluated_with_the_eps(ours_first: bool, tmp_path: Path) -> None:
    averaging, callback, module = WeightAveraging(), quiet(eps=EPS), Evaluated()
    callbacks = [callback, averaging] if ours_first else [averaging, callback]
    seen: list[float] = []

    class Looking(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            seen.extend(eps_of(averaging._average_model))

    trainer(tmp_path, *callbacks, Looking(), max_epochs=1).fit(module, loader(), loader())
    assert set(seen) == {EPS}
    assert module.seen == {"fit": {EPS}}


@pytest.mark.parametrize("ours_first", [True, False])
def test_an_average_gives_the_eps_back_when_a_fit_fails_before_its_first_update(
    ours_first: bool, tmp_path: Path
) -> None:
    class Failing(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            raise OSError("no")

    averaging, callback, module = Averaging(), quiet(eps=EPS), Evaluated()
    module.model.bn1.eps = 0.5
    callbacks = [callback, averaging] if ours_first else [averaging, callback]
    with pytest.raises(OSError, match="no"):
        trainer(tmp_path, *callbacks, Failing()).fit(module, loader())
    assert eps_of(module) == eps_of(averaging.average) == [TORCHS, 0.5, TORCHS]


# --- earlier fits of the module ---------------------------------------------------------------------------------------

NEXT: dict[str, tuple[Callable[[], RevisitedBatchNorm], float]] = {
    "the same eps": (lambda: quiet(eps=EPS), EPS),
    "another eps": (lambda: quiet(eps=OTHER), OTHER),
    "no eps": (quiet, TORCHS),
    "switched off": (lambda: quiet(enabled=False), TORCHS),
}


@pytest.mark.parametrize(("after", "expected"), NEXT.values(), ids=NEXT)
def test_a_module_that_was_reset_starts_with_the_eps_of_the_next_run(
    after: Callable[[], RevisitedBatchNorm], expected: float, tmp_path: Path
) -> None:
    module = Evaluated()
    initial = copy.deepcopy(module.state_dict())
    trainer(tmp_path, quiet(eps=EPS), max_epochs=1).fit(module, loader())
    module.load_state_dict(initial)
    module.seen.clear()
    callback = after()
    trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    assert module.seen == {"fit": {expected}}
    assert set(callback.state_dict().get("eps_by_layer", {}).values()) == {expected} - {TORCHS}


@pytest.mark.filterwarnings("ignore:.*no optimizer holds a batch norm scale", "ignore:.*has no effect")
def test_a_module_that_was_not_reset_keeps_the_eps_that_it_was_trained_with(tmp_path: Path) -> None:
    for model in (residual_net(), nn.Sequential(nn.Conv2d(3, 10, 6), nn.BatchNorm2d(10, affine=False), nn.Flatten())):
        module = Evaluated(model=model)
        trainer(tmp_path, quiet(eps=EPS), max_epochs=1).fit(module, loader())
        assert set(eps_of(module)) == {EPS}
        trainer(tmp_path, quiet()).test(module, loader(), verbose=False)
        assert module.seen == {"fit": {EPS}, "test": {EPS}}


@half
@pytest.mark.parametrize("stage", ["test", "fit"])
def test_another_eps_than_that_of_an_earlier_fit_is_told(stage: str, tmp_path: Path) -> None:
    module, callback = Evaluated(), quiet(eps=OTHER)
    trainer(tmp_path, quiet(eps=EPS), max_epochs=1).fit(module, loader())
    texts = said(tmp_path, module, stage, None, callback)
    assert len(texts) == 1
    assert "eps=0.01 is not set in 3 layers, such as 'model.stem.1', which were trained with eps=0.001" in texts[0]
    assert eps_of(module) == [EPS] * 3


@half
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_of_a_trained_module_saves_the_eps_that_it_was_trained_with(copied: Any, tmp_path: Path) -> None:
    module = Evaluated()
    trainer(tmp_path, quiet(eps=EPS), max_epochs=1).fit(module, loader())
    saved = run_of(tmp_path, copied(module), quiet())
    other = Evaluated()
    assert len(said(tmp_path, other, "test", saved, quiet())) == 1
    assert other.seen == {"test": {EPS}}


def test_a_checkpoint_that_is_saved_after_an_evaluation_tells_the_eps_too(tmp_path: Path) -> None:
    saved = run_of(tmp_path, Evaluated(), quiet(eps=EPS))
    run = trainer(tmp_path, quiet(eps=EPS))
    run.test(Evaluated(), loader(), ckpt_path=saved, verbose=False)
    run.save_checkpoint(tmp_path / "again.ckpt")
    state = torch.load(tmp_path / "again.ckpt", weights_only=True)["callbacks"]["RevisitedBatchNorm"]
    assert set(state["eps_by_layer"].values()) == {EPS}


@half
def test_layers_that_were_converted_to_sync_batch_norm_give_their_eps_up_too(tmp_path: Path) -> None:
    class Converting(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            nn.SyncBatchNorm.convert_sync_batchnorm(pl_module)

    module, saved = Evaluated(), run_of(tmp_path, Evaluated())
    texts = said(tmp_path, module, "fit", saved, Converting(), quiet(eps=EPS))
    assert len(texts) == 1
    assert "trained without eps=0.001 in 3 layers" in texts[0]
    assert {layer.eps for layer in module.modules() if isinstance(layer, nn.SyncBatchNorm)} == {TORCHS}
