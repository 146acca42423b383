"""Lightning's other callbacks beside ours, in both orders: the same as by hand, lr / c at every step, nothing left."""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import lightning.pytorch.callbacks as companions
import pytest
import pytorch_optimizer
import timm.optim
import torch
from helpers.aftermath import assert_rule_is_gone
from helpers.by_hand import C, TextbookSGD, textbook_sgd
from helpers.lit import LitNet, loader, quiet, sgd, trainer
from helpers.logs import rows
from helpers.models import assert_same_parameters, images, residual_net, scales
from helpers.rates import Rates, assert_ratio_everywhere, probing_sgd
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from lightning_revbn import BatchNormMonitor, RevisitedBatchNorm, scale_param_groups

both_orders = pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)], ids=["before", "after"])


class Together(LitNet):
    """Has what one callback or another asks for: a backbone, a batch size, validation."""

    def __init__(self, configure: Any = textbook_sgd, model: nn.Module | None = None) -> None:
        super().__init__(configure, model)
        self.batch_size = 8

    @property
    def backbone(self) -> nn.Module:
        return self.model.stem

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*images(48)), batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*images(16, seed=1)), batch_size=8)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(self.model(batch[0]), batch[1]))


def write_by_hand(module: LitNet, frozen: bool = False) -> None:
    """Write the scales as the callback does, but for those of a backbone that is frozen when training starts."""
    for scale in scales(module.model)[1 if frozen else 0 :]:
        nn.init.constant_(scale, 0.1)


def hand_made(frozen: bool = False) -> Together:
    write_by_hand(module := Together(textbook_sgd), frozen)
    return module


class FrozenFinetuning(BaseFinetuning):
    """Freezes batch norm too, as for a pretrained backbone, and trains it from the second epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)


COMPANIONS: dict[str, Callable[[], L.Callback]] = {
    "StochasticWeightAveraging": lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=2),
    "BackboneFinetuning": lambda: BackboneFinetuning(1, lambda epoch: 1.5, verbose=False),
    "FrozenFinetuning": FrozenFinetuning,
    "LearningRateFinder": lambda: LearningRateFinder(1e-3, 0.5, num_training_steps=10),
    "BatchSizeFinder": lambda: BatchSizeFinder(init_val=8, max_trials=2, steps_per_trial=2),
    "Timer": lambda: Timer({"days": 1}, interval="step"),
}
if hasattr(companions, "EMAWeightAveraging"):  # Lightning 2.6
    COMPANIONS["WeightAveraging"] = lambda: companions.WeightAveraging()
    COMPANIONS["EMAWeightAveraging"] = lambda: companions.EMAWeightAveraging(decay=0.8)
    COMPANIONS["EMAWeightAveraging-late"] = lambda: companions.EMAWeightAveraging(decay=0.8, update_starting_at_step=9)
    COMPANIONS["EMAWeightAveraging-never"] = lambda: companions.EMAWeightAveraging(update_starting_at_step=99)
MOVES_RATES = {"StochasticWeightAveraging", "LearningRateFinder"}


@both_orders
@pytest.mark.parametrize("name", COMPANIONS)
# Says so of the batch norm layers that BackboneFinetuning leaves trainable, and that are in the optimizer already.
@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist:UserWarning")
def test_training_beside_another_callback_equals_training_by_hand(tmp_path: Path, name: str, order: slice) -> None:
    reference = hand_made(frozen=name == "FrozenFinetuning")
    alone = trainer(tmp_path, COMPANIONS[name](), max_epochs=3)
    alone.fit(reference)

    seen: Rates = []
    module = Together(probing_sgd(seen))
    run = trainer(tmp_path, *[COMPANIONS[name](), callback := quiet()][order], max_epochs=3)
    run.fit(module)

    assert_same_parameters(reference, module)
    assert_ratio_everywhere(seen, 18 if name != "BatchSizeFinder" else 9, moves=name in MOVES_RATES)
    assert_rule_is_gone(module, run)
    assert groups(run) == groups(alone)
    assert len(callback.report.rewritten) == (2 if name == "FrozenFinetuning" else 3)


def groups(run: L.Trainer) -> list[list[int]]:
    return [[len(group["params"]) for group in optimizer.param_groups] for optimizer in run.optimizers]


# --- averaged models --------------------------------------------------------------------------------------------------


def every_step(path: Path) -> ModelCheckpoint:
    return ModelCheckpoint(path, "{step}", every_n_train_steps=1, save_top_k=-1)


def saved(path: Path, step: int) -> dict[str, Any]:
    return torch.load(path / f"step={step}.ckpt", weights_only=True)


class LateAverage(L.Callback):
    """Averages as users did before Lightning had a callback for it: validates with what it has at any time."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.average = AveragedModel(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step > 9:
            self.average.update_parameters(pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.load_state_dict(self.average.module.state_dict())

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        checkpoint["average"] = self.average.state_dict()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        self.average.load_state_dict(checkpoint["average"])


RESUMABLE: dict[str, Callable[[], L.Callback]] = {"LateAverage": LateAverage} | {
    name: make for name, make in COMPANIONS.items() if name == "EMAWeightAveraging-late"
}


@both_orders
def test_an_average_holds_the_new_scales_before_its_first_update_too(tmp_path: Path, order: slice) -> None:
    save = {"enable_checkpointing": True, "max_epochs": 2}
    trainer(tmp_path, LateAverage(), every_step(tmp_path / "hand"), **save).fit(hand_made())
    callbacks = [LateAverage(), quiet()][order]
    trainer(tmp_path, *callbacks, every_step(tmp_path / "ours"), **save).fit(Together(sgd))
    for step in range(1, 13):
        hand, ours = (saved(tmp_path / name, step)["average"] for name in ("hand", "ours"))
        assert hand.keys() == ours.keys()
        assert all(torch.equal(hand[key], ours[key]) for key in hand), step


@both_orders
def test_an_average_of_layers_that_are_made_late_holds_the_new_scales(tmp_path: Path, order: slice) -> None:
    class Building(LateAverage):
        """Has the layers made before it copies them, as Lightning's own averages do."""

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            pl_module.configure_model()
            super().setup(trainer, pl_module, stage)

    class Built(Together):
        def configure_model(self) -> None:
            if isinstance(self.model, nn.Identity):
                self.model = residual_net()

    module = Built(sgd, nn.Identity())
    building = Building()
    run = trainer(tmp_path, *[building, quiet()][order], max_epochs=1)
    run.fit(module)
    assert all((scale == torch.tensor(0.1)).all() for scale in scales(building.average))
    assert_rule_is_gone(module, run)


@both_orders
def test_an_endless_run_that_ends_before_the_averaging_keeps_the_new_scales(tmp_path: Path, order: slice) -> None:
    def average() -> L.Callback:
        return StochasticWeightAveraging(0.01, swa_epoch_start=9)

    # Lightning hands out the average of an endless run even where nothing was averaged yet.
    trainer(tmp_path, average(), max_epochs=-1, max_steps=9).fit(reference := hand_made())
    run = trainer(tmp_path, *[average(), quiet()][order], max_epochs=-1, max_steps=9)
    run.fit(module := Together(sgd))
    assert_same_parameters(reference, module)
    assert module.model.bn1.weight[0].item() == pytest.approx(0.1)


@both_orders
@pytest.mark.parametrize("name", RESUMABLE)
def test_a_resumed_average_is_that_of_the_undisturbed_run(tmp_path: Path, name: str, order: slice) -> None:
    callbacks = [RESUMABLE[name](), quiet()][order]
    run = trainer(tmp_path, *callbacks, every_step(tmp_path / "saved"), enable_checkpointing=True, max_epochs=3)
    run.fit(undisturbed := Together(sgd))
    for step in (6, 12):  # before and after the first update of the average
        callbacks = [RESUMABLE[name](), quiet()][order]
        resumed = Together(sgd)
        trainer(tmp_path, *callbacks, max_epochs=3).fit(resumed, ckpt_path=tmp_path / "saved" / f"step={step}.ckpt")
        assert_same_parameters(undisturbed, resumed)


def test_only_copies_of_the_same_model_are_rewritten(tmp_path: Path) -> None:
    class Others(L.Callback):
        def __init__(self) -> None:
            self.teacher = AveragedModel(LitNet(model=residual_net(1)))
            self.trained = AveragedModel(trained)
            self.plain = Together(model=residual_net(2))

    trained = Together()
    trained.model(images(8)[0])
    others = Others()
    trainer(tmp_path, others, quiet(), max_epochs=1).fit(Together(sgd))
    for model in (others.teacher, others.trained, others.plain):
        assert all((scale == 1).all() for scale in scales(model))


@pytest.mark.parametrize("callbacks", [*itertools.permutations("amf")], ids="".join)
def test_what_is_frozen_when_training_starts_keeps_its_scale_in_the_average_too(
    tmp_path: Path, callbacks: tuple[str, ...]
) -> None:
    made = {"a": LateAverage(), "m": quiet(), "f": FrozenFinetuning()}
    run = trainer(tmp_path, *[made[letter] for letter in callbacks], max_steps=1, max_epochs=-1)
    run.fit(module := Together(sgd))
    for model in (module, made["a"].average):
        assert (model.get_submodule("model" if model is module else "module.model").stem[1].weight == 1).all()
    assert (made["a"].average.module.model.bn1.weight == torch.tensor(0.1)).all()
    assert [record.state for record in made["m"].report.left_alone] == ["frozen"]


@pytest.mark.parametrize("first", [True, False])
def test_trained_scales_that_are_frozen_are_not_overwritten(tmp_path: Path, first: bool) -> None:
    module = Together(sgd)
    module.model(images(8)[0])
    trained = nn.init.uniform_(module.backbone[1].weight).detach().clone()
    callbacks = [FrozenFinetuning(), quiet(trained="overwrite")]
    trainer(tmp_path, *callbacks[:: 1 if first else -1], max_steps=1, max_epochs=-1).fit(module)
    assert torch.equal(module.backbone[1].weight, trained)


def test_a_restored_scale_is_kept_though_it_is_frozen_and_just_what_is_written(tmp_path: Path) -> None:
    class Restored(FrozenFinetuning):
        def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
            nn.init.constant_(pl_module.backbone[1].weight, 0.1)

        def finetune_function(self, *args: Any) -> None: ...

    save = every_step(tmp_path / "saved")
    trainer(tmp_path, quiet(), save, max_epochs=1, enable_checkpointing=True).fit(Together(sgd))
    module = Together(sgd)
    run = trainer(tmp_path, quiet(), Restored(), max_epochs=2)
    run.fit(module, ckpt_path=tmp_path / "saved" / "step=6.ckpt")
    assert (module.backbone[1].weight == torch.tensor(0.1)).all()


# --- stops and exceptions ---------------------------------------------------------------------------------------------


EXCEPTION_SAVERS: dict[str, Callable[[Path], L.Callback]] = {
    "OnExceptionCheckpoint": lambda path: OnExceptionCheckpoint(path, "saved")
}
if "save_on_exception" in inspect.signature(ModelCheckpoint).parameters:  # Lightning 2.6
    EXCEPTION_SAVERS["ModelCheckpoint"] = lambda path: ModelCheckpoint(path, "saved", save_on_exception=True)


class Failing(LitNet):
    fails = True

    def on_train_batch_end(self, *args: Any) -> None:
        if self.fails and self.trainer.global_step == 4:
            raise RuntimeError("no power")


@both_orders
@pytest.mark.parametrize("name", EXCEPTION_SAVERS)
# What Lightning says beside any checkpoint callback but ModelCheckpoint.
@pytest.mark.filterwarnings("ignore:.?.fit\\(ckpt_path=:UserWarning")
def test_a_checkpoint_of_an_exception_resumes_as_one_made_by_hand_does(tmp_path: Path, name: str, order: slice) -> None:
    finals: list[LitNet] = []
    for kind in ("hand", "ours"):
        configure = sgd if kind == "ours" else textbook_sgd
        module = Failing(configure)
        if kind == "hand":
            write_by_hand(module)
        save = EXCEPTION_SAVERS[name](tmp_path / kind)
        callbacks = [save] if kind == "hand" else [save, RevisitedBatchNorm()][order]
        run = trainer(tmp_path, *callbacks, enable_checkpointing=True, logger=CSVLogger(tmp_path))
        with pytest.raises(RuntimeError, match="no power"):
            run.fit(module, loader())
        assert_rule_is_gone(module, run)
        assert groups(run) == [[12]]

        (file,) = (tmp_path / kind).glob("*.ckpt")
        assert len(torch.load(file, weights_only=True)["optimizer_states"][0]["param_groups"]) == 1
        finals.append(resumed := Failing(configure))
        resumed.fails = False
        callbacks = [] if kind == "hand" else [RevisitedBatchNorm()]
        again = trainer(tmp_path, *callbacks, logger=CSVLogger(tmp_path))
        again.fit(resumed, loader(), ckpt_path=file)
        assert again.global_step == 12
    assert_same_parameters(*finals)


@both_orders
def test_early_stopping_follows_a_key_of_the_monitor(tmp_path: Path, order: slice) -> None:
    def stopping() -> L.Callback:
        return EarlyStopping(
            "revbn/scale_drift", mode="max", stopping_threshold=threshold, check_on_train_epoch_end=True
        )

    logger = CSVLogger(tmp_path)
    trainer(tmp_path, BatchNormMonitor(), logger=logger, max_epochs=5).fit(hand_made())
    drifts = [float(row["revbn/scale_drift"]) for row in rows(tmp_path) if "revbn/scale_drift" in row]
    threshold = (drifts[11] + drifts[17]) / 2  # reached in the third epoch of six batches
    assert max(drifts[:12]) < threshold
    callbacks = [stopping(), RevisitedBatchNorm()][order]
    run = trainer(tmp_path, *callbacks, logger=CSVLogger(tmp_path, "stopped"), max_epochs=5)
    run.fit(Together(sgd))
    assert run.current_epoch == 3


@both_orders
def test_a_timer_stops_both_runs_at_the_same_step(
    tmp_path: Path, order: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A clock that goes on by a second each time somebody looks.
    looks = itertools.count()
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time", SimpleNamespace(monotonic=lambda: next(looks)))

    def timer() -> Timer:
        return Timer({"seconds": 5}, interval="step")

    alone = trainer(tmp_path, timer())
    alone.fit(reference := hand_made())
    run = trainer(tmp_path, *[timer(), quiet()][order])
    run.fit(module := Together(sgd))
    assert run.global_step == alone.global_step < 12
    assert_same_parameters(reference, module)


# --- optimizers around another one ------------------------------------------------------------------------------------


class Sharp(LitNet):
    """Sharpness-aware minimisation as its users write it: two passes, by manual optimization."""

    def __init__(self, configure: Any) -> None:
        super().__init__(configure)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.first_step(zero_grad=True)
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.second_step(zero_grad=True)


def momentum(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.01)


WRAPPERS: dict[str, tuple[type[LitNet], Callable[[Any], Any]]] = {
    "timm-Lookahead": (LitNet, lambda params: timm.optim.Lookahead(momentum(params), k=2)),
    "pytorch_optimizer-Lookahead": (LitNet, lambda params: pytorch_optimizer.Lookahead(momentum(params), k=2)),
    "pytorch_optimizer-SAM": (
        Sharp,
        lambda params: pytorch_optimizer.SAM(params, torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    ),
}
each_wrapper = pytest.mark.parametrize(("kind", "wrap"), WRAPPERS.values(), ids=WRAPPERS)


@each_wrapper
def test_an_optimizer_around_another_is_refused_before_training(tmp_path: Path, kind: Any, wrap: Any) -> None:
    module = kind(lambda m: wrap(m.parameters()))
    run = trainer(tmp_path, quiet())
    with pytest.raises(MisconfigurationException, match=r"RevisitedBatchNorm: \w+ wraps another .* scale_param_groups"):
        run.fit(module, loader())
    assert run.global_step == 0
    assert_rule_is_gone(module, run)


@each_wrapper
def test_the_remedy_for_an_optimizer_around_another_trains_as_groups_made_by_hand(
    tmp_path: Path, kind: Any, wrap: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def two_groups(module: Any) -> Any:
        own = {id(scale) for scale in scales(module)}
        rest = [p for p in module.parameters() if id(p) not in own]
        return wrap([{"params": rest}, {"params": scales(module), "lr": 0.05 / C, "weight_decay": 0.0}])

    write_by_hand(reference := kind(two_groups))
    trainer(tmp_path).fit(reference, loader())

    module = kind(lambda m: wrap(scale_param_groups(m, 0.05, 0.01)))
    run = trainer(tmp_path, callback := RevisitedBatchNorm(), logger=CSVLogger(tmp_path))
    with caplog.at_level(logging.INFO):
        run.fit(module, loader())
    assert_same_parameters(reference, module)
    assert len(callback.report.rewritten) == 3
    assert "3 scales learn with the learning rate of their groups, made by scale_param_groups" in caplog.text
    assert run.callback_metrics["revbn/scale_lr"].item() == pytest.approx(0.05 / C)
    assert_rule_is_gone(module, run)


@pytest.mark.parametrize("options", [{"weight_decay_exempt": None}, {"exclude": ["model.bn1"]}], ids=str)
def test_permanent_groups_that_leave_something_to_be_done_are_refused(tmp_path: Path, options: Any) -> None:
    module = LitNet(lambda m: timm.optim.Lookahead(momentum(scale_param_groups(m, 0.05, 0.01, **options))))
    with pytest.raises(MisconfigurationException, match="not every scale is in such a group, or some decay: call"):
        trainer(tmp_path, quiet()).fit(module, loader())


# --- two optimizers, one of them frozen at a time ---------------------------------------------------------------------


class Adversaries(LitNet):
    """Generator and discriminator, both with batch norm, that train in turns."""

    def __init__(self, configure: Any) -> None:
        super().__init__(configure, model=nn.Identity())
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.generator = nn.Sequential(nn.Linear(4, 108), nn.BatchNorm1d(108), nn.ReLU(), nn.Linear(108, 108))
            self.discriminator = nn.Sequential(nn.Linear(108, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        real = batch[0].flatten(1)
        noise = real[:, :4]
        for network, optimizer in zip((self.generator, self.discriminator), self.optimizers(), strict=True):
            self.toggle_optimizer(optimizer)
            fake = self.generator(noise)
            loss = -self.discriminator(fake).mean()
            if network is self.discriminator:
                loss = -loss - self.discriminator(real).tanh().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)


def test_two_optimizers_that_are_toggled_follow_the_rule_in_both(tmp_path: Path) -> None:
    def both(configure: Any) -> Any:
        return lambda module: [configure(module.generator), configure(module.discriminator)]

    reference = Adversaries(both(lambda network: TextbookSGD(network.parameters(), scales(network))))
    for scale in scales(reference):
        nn.init.constant_(scale, 0.1)
    trainer(tmp_path).fit(reference, loader())

    seen: Rates = []
    module = Adversaries(both(probing_sgd(seen)))
    run = trainer(tmp_path, RevisitedBatchNorm(), logger=CSVLogger(tmp_path))
    run.fit(module, loader())
    assert_same_parameters(reference, module)
    assert_ratio_everywhere(seen, 24, moves=False)
    assert_rule_is_gone(module, run)
    assert {"revbn/generator.1/scale_mean", "revbn/discriminator.1/scale_mean"} <= rows(tmp_path)[0].keys()
    assert all(parameter.requires_grad for parameter in module.parameters())
