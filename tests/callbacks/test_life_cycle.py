"""The rule and the rewrite through what a fit may do: other optimizers and Trainers, refusals, layers added late."""

from __future__ import annotations

import copy
import gc
import re
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.aftermath import assert_rule_is_gone
from helpers.by_hand import LR, C, TextbookSGD, by_hand, textbook_sgd
from helpers.lit import LitNet, loader, quiet, sgd, trainer
from helpers.logs import rows
from helpers.models import assert_same_parameters, residual_net, scales
from lightning.pytorch.callbacks import Callback, LearningRateFinder, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_revbn import BatchNormMonitor, RevisitedBatchNorm, find_batch_norms

HOOKS = ("on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start")


class Starts(LitNet):
    """Starts from the scales by itself, and trains by groups made by hand."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"configure": textbook_sgd, **options})
        for scale in scales(self):
            nn.init.constant_(scale, 0.1)


class Replacing(Callback):
    """Puts another optimizer in the Trainer's place, once, at a hook in the second epoch or before."""

    def __init__(self, hook: str, replace: Callable[[L.Trainer], None]) -> None:
        self.replace: Callable[[L.Trainer], None] | None = replace
        setattr(self, hook, self._at_hook)

    def _at_hook(self, trainer: L.Trainer, *args: Any) -> None:
        is_late = trainer.current_epoch == 1 or trainer.state.stage is None or trainer.global_step == 0
        if self.replace is not None and is_late:
            self.replace(trainer)
            self.replace = None


def by_trainer(trainer: L.Trainer) -> None:
    trainer.optimizers = [trainer.lightning_module.configure_optimizers()]


def by_strategy(trainer: L.Trainer) -> None:
    trainer.strategy.optimizers = [trainer.lightning_module.configure_optimizers()]


def by_setup(trainer: L.Trainer) -> None:
    trainer.strategy.setup_optimizers(trainer)


# --- kind 2: the rule follows the optimizers --------------------------------------------------------------------------


@pytest.mark.parametrize("replace", [by_trainer, by_strategy, by_setup])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_the_rule_follows_an_optimizer_that_is_replaced_in_any_hook(
    hook: str, replace: Any, first: bool, tmp_path: Path
) -> None:
    module, other = LitNet(), Starts()
    callbacks = [Replacing(hook, replace), RevisitedBatchNorm()][:: 1 if first else -1]
    trainer(tmp_path, *callbacks, logger=CSVLogger(tmp_path)).fit(module, loader())
    trainer(tmp_path, Replacing(hook, replace)).fit(other, loader())
    for key, value in other.state_dict().items():
        torch.testing.assert_close(module.state_dict()[key], value, rtol=1e-6, atol=1e-7, msg=key)
    assert {float(row["revbn/scale_lr"]) for row in rows(tmp_path)} == {LR / C}


def test_the_rule_is_gone_from_an_optimizer_that_was_replaced(tmp_path: Path) -> None:
    made: list[Optimizer] = []

    def configure(module: nn.Module) -> Optimizer:
        made.append(sgd(module))
        return made[-1]

    class Looking(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            assert [bool(optimizer._optimizer_step_pre_hooks) for optimizer in made] == [False, True]

    trainer(tmp_path, quiet(), Replacing("on_train_start", by_trainer), Looking()).fit(LitNet(configure), loader())


def test_a_step_that_was_replaced_on_the_optimizer_is_an_error_at_that_update(tmp_path: Path) -> None:
    class Patching(Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch:
                (optimizer,) = trainer.optimizers

                def step(closure: Any = None) -> None:
                    closure()
                    with torch.no_grad():
                        for parameter in optimizer.param_groups[0]["params"]:
                            parameter -= 0.05 * parameter.grad

                optimizer.step = step

    run = trainer(tmp_path, quiet(), Patching())
    with pytest.raises(MisconfigurationException, match=r"SGD has updated without running torch's step hooks"):
        run.fit(LitNet(), loader())
    assert run.global_step in (6, 7)  # Lightning counts the update at which it was found, or does not


def test_a_step_that_was_wrapped_and_calls_the_classs_own_follows_the_rule(tmp_path: Path) -> None:
    def configure(module: nn.Module) -> Optimizer:
        optimizer = TextbookSGD(module.parameters(), []) if isinstance(module, Starts) else sgd(module)
        own = optimizer.step
        optimizer.step = lambda closure=None: own(closure)  # type: ignore[method-assign,misc,assignment]
        return optimizer

    module = LitNet(configure)
    trainer(tmp_path, quiet()).fit(module, loader())
    other = Starts()
    trainer(tmp_path).fit(other, loader())
    torch.testing.assert_close(module.state_dict(), other.state_dict(), rtol=1e-6, atol=1e-7)


def test_a_hook_that_hands_on_the_optimizer_itself_is_an_error_at_that_update(tmp_path: Path) -> None:
    class Undoing(Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch:
                (optimizer,) = trainer.optimizers
                optimizer.register_step_pre_hook(lambda own, args, kwargs: ((own, *args[1:]), kwargs))

    with pytest.raises(RuntimeError, match=r"SGD.step\(\) did not update from its param_groups"):
        trainer(tmp_path, quiet(), Undoing()).fit(LitNet(), loader())


# --- kind 3: another Trainer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_another_trainer_may_evaluate_with_the_same_callback_in_the_middle_of_a_fit(stage: str, tmp_path: Path) -> None:
    class Evaluated(LitNet):
        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

        def test_step(self, batch: Any, batch_idx: int) -> None: ...

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.model(batch[0])

    callback = RevisitedBatchNorm()

    class Evaluating(Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            other = trainer_of(tmp_path / "other", callback)
            getattr(other, stage)(Evaluated(), loader(), **({} if stage == "predict" else {"verbose": False}))

    trainer_of = trainer
    module, undisturbed = LitNet(), LitNet()
    trainer(tmp_path, callback, Evaluating(), logger=CSVLogger(tmp_path)).fit(module, loader())
    trainer(tmp_path, quiet()).fit(undisturbed, loader())
    assert_same_parameters(module, undisturbed)
    assert {float(row["revbn/scale_lr"]) for row in rows(tmp_path)} == {LR / C}


def test_another_trainer_with_other_callbacks_leaves_the_state_of_a_running_fit_its_key(tmp_path: Path) -> None:
    class Evaluated(LitNet):
        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    stem, rest = quiet(include=["*.stem.*"]), quiet(exclude=["*.stem.*"])

    class Evaluating(Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            keys = stem.state_key, rest.state_key
            trainer_of(tmp_path / "other", stem).validate(Evaluated(), loader(), verbose=False)
            assert (stem.state_key, rest.state_key) == keys
            trainer.save_checkpoint(tmp_path / "middle.ckpt")

    trainer_of = trainer
    trainer(tmp_path, stem, rest, Evaluating(), max_epochs=1).fit(LitNet(), loader())
    states = torch.load(tmp_path / "middle.ckpt", weights_only=True)["callbacks"]
    assert {key: [*state["include"]] for key, state in states.items()} == {
        "RevisitedBatchNorm{'include': ['*.stem.*']}": ["*.stem.*"],
        "RevisitedBatchNorm{'exclude': ['*.stem.*']}": ["*"],
    }


def test_a_fit_of_another_trainer_in_the_middle_of_a_fit_is_refused(tmp_path: Path) -> None:
    callback = quiet()

    class Nesting(Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            with pytest.raises(MisconfigurationException, match="in the middle of a fit of another Trainer"):
                trainer_of(tmp_path / "other", callback).fit(LitNet(), loader())

    trainer_of = trainer
    module, undisturbed = LitNet(), LitNet()
    trainer(tmp_path, callback, Nesting()).fit(module, loader())
    trainer(tmp_path, quiet()).fit(undisturbed, loader())
    assert_same_parameters(module, undisturbed)


# --- kind 4: a refused fit has written nothing ------------------------------------------------------------------------


class Failing(Callback):
    """Raises at a hook."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self._fail)

    def _fail(self, *args: Any, **kwargs: Any) -> None:
        raise OSError("no")


@pytest.mark.parametrize("zero_scale", ["keep", "overwrite"])
def test_after_a_pattern_was_refused_the_module_is_as_it_was_and_the_right_one_trains_alike(
    zero_scale: Any, tmp_path: Path
) -> None:
    module = LitNet(model=residual_net(zero_init_residual=True))
    before = copy.deepcopy(module.state_dict())
    wrong = quiet(exclude=["bn2"], zero_scale=zero_scale)
    with pytest.raises(ValueError, match=r"exclude: the pattern 'bn2' matches none .* 'model.bn2'"):
        trainer(tmp_path, wrong).fit(module, loader())
    assert all(torch.equal(module.state_dict()[key], value) for key, value in before.items())

    other = LitNet(model=residual_net(zero_init_residual=True))
    for one in (module, other):
        trainer(tmp_path, quiet(exclude=["model.bn2"], zero_scale=zero_scale)).fit(one, loader())
    assert_same_parameters(module, other)


def test_after_an_optimizer_was_refused_a_baseline_trains_from_one(tmp_path: Path) -> None:
    module, baseline = LitNet(lambda module: torch.optim.LBFGS(module.parameters())), LitNet()
    with pytest.raises(MisconfigurationException, match="LBFGS"):
        trainer(tmp_path, quiet()).fit(module, loader())
    module.configure = sgd
    for one in (module, baseline):
        trainer(tmp_path).fit(one, loader())
    assert_same_parameters(module, baseline)


@pytest.mark.parametrize(
    "hook", [*HOOKS, "setup", "on_before_backward", "on_after_backward", "on_before_optimizer_step"]
)
@pytest.mark.parametrize("trained", ["keep", "overwrite"])
def test_an_exception_before_the_first_update_gives_back_every_scale(hook: str, trained: Any, tmp_path: Path) -> None:
    module = LitNet()
    with torch.no_grad():
        module.model.bn1.weight.uniform_(0.5, 1.5)  # a layer with values of its own
    before = [scale.detach().clone() for scale in scales(module)]
    with pytest.raises(OSError, match="no"):
        trainer(tmp_path, quiet(trained=trained), Failing(hook)).fit(module, loader())
    assert all(torch.equal(scale, value) for scale, value in zip(scales(module), before, strict=True))


def test_an_exception_after_the_first_update_loses_nothing_that_was_trained(tmp_path: Path) -> None:
    module, other = LitNet(), LitNet()
    with pytest.raises(OSError, match="no"):
        trainer(tmp_path, quiet(), Failing("on_train_batch_end")).fit(module, loader())
    trainer(tmp_path, quiet(), max_steps=1).fit(other, loader())
    assert_same_parameters(module, other)


def test_the_copy_of_a_callback_that_averages_is_given_back_too(tmp_path: Path) -> None:
    average = StochasticWeightAveraging(0.01)
    with pytest.raises(OSError, match="no"):
        trainer(tmp_path, average, quiet(), Failing("on_train_start")).fit(LitNet(), loader())
    assert average._average_model is not None
    assert all(torch.equal(scale, torch.ones_like(scale)) for scale in scales(average._average_model))


def finder() -> LearningRateFinder:
    """Trains for some steps at the start of a fit, and loads what was before."""
    return LearningRateFinder(min_lr=1e-4, max_lr=0.1, num_training_steps=4)


@pytest.mark.parametrize(
    ("before", "settings", "after", "said"),
    [
        ([finder], {"exclude": ["bn2"]}, [], "the pattern 'bn2' matches none"),
        ([finder], {}, [lambda: Failing("on_train_start")], "no"),
        ([], {}, [finder, lambda: Failing("on_train_start")], "no"),
    ],
    ids=["pattern", "finder-ours", "ours-finder"],
)
def test_steps_of_the_learning_rate_finder_are_no_reason_to_keep_the_scales(
    before: Any, settings: dict[str, Any], after: Any, said: str, tmp_path: Path
) -> None:
    module = LitNet()
    callbacks = [*(make() for make in before), quiet(eps=1e-3, **settings), *(make() for make in after)]
    with pytest.raises((ValueError, OSError), match=said):
        trainer(tmp_path, *callbacks).fit(module, loader())
    assert_same_parameters(module, LitNet())
    assert {layer.eps for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)} == {1e-5}


# What Lightning says of all the callbacks that it has put away.
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
@pytest.mark.parametrize("first", [True, False])
def test_an_exception_in_a_step_of_the_learning_rate_finder_gives_back_every_scale(first: bool, tmp_path: Path) -> None:
    class Failing(LitNet):
        """Fails in the second step, when Lightning has put away all callbacks but the finder's."""

        def on_before_optimizer_step(self, *args: Any) -> None:
            if self.trainer.global_step:
                raise OSError("no")

    module = Failing()
    run = trainer(tmp_path, *[finder(), quiet()][:: 1 if first else -1])
    with pytest.raises(OSError, match="no"):
        run.fit(module, loader())
    assert_same_parameters(module, LitNet())
    assert_rule_is_gone(module, run)


def test_a_fit_without_a_step_that_ends_well_keeps_the_new_scales(tmp_path: Path) -> None:
    module = LitNet()
    trainer(tmp_path, quiet(), max_steps=0).fit(module, loader())
    assert all(torch.equal(scale, torch.full_like(scale, 0.1)) for scale in scales(module))


# --- kind 6: memory of other modules ----------------------------------------------------------------------------------


def fit(callback: RevisitedBatchNorm, module: LitNet, path: Path) -> LitNet:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*half of the method.*")
        trainer(path, callback, max_epochs=1).fit(module, loader())
    return module


def zero_net() -> LitNet:
    return LitNet(model=residual_net(zero_init_residual=True))


def test_layers_kept_at_zero_are_remembered_while_another_module_is_trained(tmp_path: Path) -> None:
    callback, alone = quiet(), quiet()
    first = fit(callback, zero_net(), tmp_path)
    fit(callback, LitNet(), tmp_path)
    other = fit(alone, zero_net(), tmp_path)
    for owner, module in ((callback, first), (alone, other)):
        fit(owner, module, tmp_path)
    assert_same_parameters(first, other)


def test_a_layer_that_was_zero_and_is_fresh_again_learns_as_a_fresh_one(tmp_path: Path) -> None:
    callback, module, fresh = quiet(), zero_net(), LitNet()
    fit(callback, module, tmp_path)
    module.load_state_dict(fresh.state_dict())  # the same weights as one that never was zero
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_parameters()
    for owner, one in ((callback, module), (quiet(), fresh)):
        fit(owner, one, tmp_path)
    assert_same_parameters(module, fresh)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
def test_a_copied_callback_does_not_overwrite_what_the_first_has_trained(copied: Any, tmp_path: Path) -> None:
    callback = quiet(trained="overwrite")
    module, other = zero_net(), zero_net()
    fit(callback, module, tmp_path)
    fit(other_callback := quiet(trained="overwrite"), other, tmp_path)
    fit(copied(callback), module, tmp_path)
    fit(other_callback, other, tmp_path)
    assert_same_parameters(module, other)


def test_a_copied_callback_overwrites_another_trained_module_where_asked_for(tmp_path: Path) -> None:
    callback, pretrained = quiet(trained="overwrite"), LitNet()
    fit(callback, LitNet(), tmp_path)
    trainer(tmp_path, max_epochs=1).fit(pretrained, loader())
    fit(copied := copy.deepcopy(callback), pretrained, tmp_path)
    assert [record.verdict for record in copied.report.records] == ["rewrite"] * 3


@pytest.mark.parametrize("eps", [None, 1e-3])
def test_a_module_that_is_gone_is_not_kept_alive(eps: float | None, tmp_path: Path) -> None:
    callback, module = quiet(eps=eps), LitNet()
    gone = weakref.ref(module)
    fit(callback, module, tmp_path)
    fit(callback, LitNet(), tmp_path)
    del module
    gc.collect()
    assert gone() is None


# --- kind 13: half of the method --------------------------------------------------------------------------------------


def test_a_pretrained_network_is_told_that_only_half_of_the_method_applies(tmp_path: Path) -> None:
    module = LitNet()
    trainer(tmp_path, max_epochs=1).fit(module, loader())
    with pytest.warns(
        UserWarning, match=r"half of the method: no scale was rewritten.*'model.stem.1'.*running"
    ) as told:
        trainer(tmp_path, quiet()).fit(module, loader())
    assert "trained='overwrite'" in str(told[0].message)
    assert "scale_lr_divisor=1" in str(told[0].message)


def test_the_learning_rate_finder_keeps_nobody_from_hearing_of_half_of_the_method(tmp_path: Path) -> None:
    module = LitNet()
    trainer(tmp_path, max_epochs=1).fit(module, loader())
    with pytest.warns(UserWarning, match="half of the method: no scale was rewritten"):
        trainer(tmp_path, finder(), quiet()).fit(module, loader())


def test_the_learning_rate_finder_in_a_resumed_fit_is_no_reason_for_a_warning(tmp_path: Path) -> None:
    run = trainer(tmp_path, quiet(), max_epochs=1)
    run.fit(LitNet(), loader())
    run.save_checkpoint(tmp_path / "half.ckpt")
    run = trainer(tmp_path, finder(), quiet())
    run.fit(LitNet(), loader(), ckpt_path=tmp_path / "half.ckpt")


@pytest.mark.parametrize(
    "options",
    [
        {"trained": "overwrite"},
        {"scale": 1.0},
        {"scale": 1.0, "scale_lr_divisor": 1, "weight_decay_exempt": None, "shift_lr_multiplier": 10},
    ],
)
def test_the_ways_out_of_half_of_the_method_are_silent(options: dict[str, Any], tmp_path: Path) -> None:
    module = LitNet()
    trainer(tmp_path, max_epochs=1).fit(module, loader())
    trainer(tmp_path, quiet(**options)).fit(module, loader())


@pytest.mark.parametrize(
    ("options", "yet", "before"),
    [
        (
            {"shift_lr_multiplier": 10},
            "3 scales learn with lr / 100 and 3 shifts learn with lr * 10 and 3 parameters take no weight decay",
            "scale_lr_divisor=1 and shift_lr_multiplier=1 and weight_decay_exempt=None",
        ),
        (
            {"scale_lr_divisor": 1, "weight_decay_exempt": None, "shift_lr_multiplier": 10},
            "3 shifts learn with lr * 10",
            "shift_lr_multiplier=1",
        ),
        (
            {"scale_lr_divisor": 1, "weight_decay_exempt": "norm"},
            "6 parameters take no weight decay",
            "weight_decay_exempt=None",
        ),
    ],
)
def test_half_of_the_method_is_told_as_what_it_is(
    options: dict[str, Any], yet: str, before: str, tmp_path: Path
) -> None:
    module = LitNet()
    trainer(tmp_path, max_epochs=1).fit(module, loader())
    said = f"running statistics are not fresh), yet {yet}. To start these scales anew, set trained='overwrite'"
    with pytest.warns(UserWarning, match=re.escape(said)) as told:
        trainer(tmp_path, quiet(**options)).fit(module, loader())
    assert str(told[0].message).endswith(f"to train as before, set {before} or leave the callback out")


@pytest.mark.parametrize("options", [{"eps": 1e-3}, {"weight_decay_exempt": "norm"}], ids=["eps", "exempt"])
def test_eps_and_exemption_from_weight_decay_are_effects_of_their_own(options: dict[str, Any], tmp_path: Path) -> None:
    alone: dict[str, Any] = {"scale": 1.0, "scale_lr_divisor": 1, "weight_decay_exempt": None}
    callback, module, plain = quiet(**{**alone, **options}), LitNet(), LitNet()
    for _ in range(2):  # layers that an earlier fit has trained have the eps still
        trainer(tmp_path, callback).fit(module, loader())
        trainer(tmp_path).fit(plain, loader())
    assert not torch.equal(module.model.head.weight, plain.model.head.weight)


def test_nothing_is_exempt_from_a_weight_decay_that_is_not_there(tmp_path: Path) -> None:
    module = LitNet(lambda m: torch.optim.SGD(m.parameters(), lr=0.05))
    said = "has no effect: no scale was rewritten, and no parameter learns or decays differently"
    with pytest.warns(UserWarning, match=said):
        trainer(tmp_path, quiet(scale=1.0, scale_lr_divisor=1), max_epochs=1).fit(module, loader())


def test_a_new_head_on_a_pretrained_backbone_is_no_half(tmp_path: Path) -> None:
    module = LitNet()
    trainer(tmp_path, max_epochs=1).fit(module, loader())
    module.model.bn2.reset_parameters()
    trainer(tmp_path, quiet()).fit(module, loader())


# --- kind 17: layers that are added while training --------------------------------------------------------------------


class Grown(nn.Module):
    """A network that may get a further layer in front."""

    def __init__(self) -> None:
        super().__init__()
        self.net = residual_net()
        self.front: nn.Module = nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(self.front(inputs))


class Growing(Callback):
    def __init__(self, scale: float | None = None, divide: bool = False) -> None:
        self.scale, self.divide = scale, divide

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch != 1:
            return
        layer = pl_module.model.front = nn.BatchNorm2d(3)
        if self.scale is not None:
            nn.init.constant_(layer.weight, self.scale)
        (optimizer,) = trainer.optimizers
        if not self.divide:
            optimizer.add_param_group({"params": layer.parameters()})
            return
        optimizer.add_param_group({"params": [layer.weight], "lr": LR / C, "weight_decay": 0.0})
        optimizer.add_param_group({"params": [layer.bias]})


def test_a_layer_that_is_added_while_training_is_rewritten_and_learns_with_the_rule(tmp_path: Path) -> None:
    class Started(LitNet):
        def configure_optimizers(self) -> Optimizer:
            return torch.optim.SGD(by_hand(self), LR, momentum=0.9, weight_decay=0.01)

    module, other = LitNet(model=Grown()), Started(model=Grown())
    for scale in scales(other):
        nn.init.constant_(scale, 0.1)
    callback = quiet()
    trainer(tmp_path, callback, Growing()).fit(module, loader())
    trainer(tmp_path, Growing(0.1, divide=True)).fit(other, loader())
    assert_same_parameters(module, other)
    assert [record.name for record in callback.report.rewritten] == [r.name for r in find_batch_norms(module)]


class Swapping(Callback):
    """Puts a new layer in the place of one, in the second epoch, and its parameters into the optimizer."""

    def __init__(self, into_group: bool, scale: float | None = None, divide: bool = False) -> None:
        self.into_group, self.scale, self.divide = into_group, scale, divide

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch != 1:
            return
        old, new = pl_module.model.bn2, nn.BatchNorm2d(6)
        pl_module.model.bn2 = new
        if self.scale is not None:
            nn.init.constant_(new.weight, self.scale)
        (optimizer,) = trainer.optimizers
        if self.into_group:
            places = {id(old.weight): new.weight, id(old.bias): new.bias}
            for group in optimizer.param_groups:
                group["params"] = [places.get(id(parameter), parameter) for parameter in group["params"]]
        elif self.divide:
            optimizer.add_param_group({"params": [new.weight], "lr": LR / C, "weight_decay": 0.0})
            optimizer.add_param_group({"params": [new.bias]})
        else:
            optimizer.add_param_group({"params": new.parameters()})


@pytest.mark.parametrize("into_group", [True, False], ids=["in its group", "in a new group"])
@pytest.mark.parametrize("zero", [True, False], ids=["zero before", "fresh before"])
def test_a_layer_that_takes_the_place_of_another_is_rewritten_and_learns_with_the_rule(
    zero: bool, into_group: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    class Started(LitNet):
        def configure_optimizers(self) -> Optimizer:
            groups = by_hand(self)
            if zero:  # with the full learning rate, until it is replaced
                *groups[1]["params"], kept = groups[1]["params"]
                groups.append({"params": [kept], "weight_decay": 0.0})
            return torch.optim.SGD(groups, LR, momentum=0.9, weight_decay=0.01)

    class Ruled(Callback):
        """Lets the new scale take the rate of scales, whose group the scale kept at zero was not in."""

        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            if zero and into_group and trainer.current_epoch == 1:
                trainer.optimizers[0].param_groups[2].update(lr=LR / C)

    module, other = (kind(model=residual_net(zero_init_residual=zero)) for kind in (LitNet, Started))
    for scale in scales(other)[: -1 if zero else None]:
        nn.init.constant_(scale, 0.1)
    callback = quiet()
    trainer(tmp_path, Swapping(into_group), callback, BatchNormMonitor(), logger=CSVLogger(tmp_path)).fit(
        module, loader()
    )
    trainer(tmp_path, Swapping(into_group, 0.1, divide=True), Ruled()).fit(other, loader())
    assert_same_parameters(module, other)
    assert [record.module for record in callback.report.rewritten][-1] is module.model.bn2
    assert "1 batch norm layers were added or replaced, such as 'model.bn2'; 1 of them start from" in caplog.text
    logged = [float(row["revbn/model.bn2/scale_mean"]) for row in rows(tmp_path)]
    assert logged[6] == pytest.approx(0.1)
    assert logged[-1] == pytest.approx(module.model.bn2.weight.mean().item(), rel=1e-2)


# --- fast shifts alone ------------------------------------------------------------------------------------------------


def test_fast_shifts_alone_write_nothing_and_train_as_hand_made_groups(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lightning.pytorch")

    class Fast(LitNet):
        def configure_optimizers(self) -> Optimizer:
            groups = by_hand(self, divisor=1.0, multiplier=10.0)
            return torch.optim.SGD(groups, LR, momentum=0.9)

    module, other = LitNet(), Fast()
    callback = RevisitedBatchNorm(scale=1.0, scale_lr_divisor=1, shift_lr_multiplier=10)
    trainer(tmp_path, callback, logger=CSVLogger(tmp_path)).fit(module, loader())
    trainer(tmp_path).fit(other, loader())
    assert_same_parameters(module, other)
    assert {float(row["revbn/shift_lr"]) for row in rows(tmp_path)} == {10 * LR}
    assert "3 shifts learn with lr * 10" in caplog.text
    assert [record.verdict for record in callback.report.records] == ["skip"] * 3


def test_the_report_says_what_the_settings_amount_to_at_scale_1(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lightning.pytorch")
    trainer(tmp_path, quiet(), max_epochs=1).fit(LitNet(), loader())
    assert "At scale 1 a ReLU network trained by SGD would learn the same" in caplog.text
    assert (
        "scales lr x 1, shifts lr x 100, last linear layer x 0.1 at the start and lr x 0.01, eps 0.001" in caplog.text
    )
    caplog.clear()
    trainer(tmp_path, quiet(include=["model.bn1"]), max_epochs=1).fit(LitNet(), loader())
    assert "At scale 1" not in caplog.text  # scales that start differently have no such terms


def test_the_plain_log_has_no_rate_of_shifts(tmp_path: Path) -> None:
    trainer(tmp_path, RevisitedBatchNorm(), logger=CSVLogger(tmp_path)).fit(LitNet(), loader())
    assert all("revbn/shift_lr" not in row for row in rows(tmp_path))


@pytest.mark.parametrize("unwrap", [False, True], ids=["use_pl_optimizer=False", "LightningOptimizer.optimizer"])
def test_updates_that_pass_by_the_strategy_count_when_a_fit_fails(unwrap: bool, tmp_path: Path) -> None:
    class ByHand(LitNet):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            if self.current_epoch:
                raise OSError("no")
            optimizer: Any = self.optimizers().optimizer if unwrap else self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    module = ByHand()
    with pytest.raises(OSError, match="no"):
        trainer(tmp_path, quiet(eps=1e-3)).fit(module, loader())
    assert {layer.eps for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)} == {1e-3}
