"""The callback: rewrites the model's batch norm scales at setup and trains them with lr / c."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_revbn.callbacks import hyperparameters
from lightning_revbn.callbacks.companions import Companion
from lightning_revbn.callbacks.eps_state import EpsState, StageEps
from lightning_revbn.callbacks.monitor import BatchNormMonitor
from lightning_revbn.callbacks.rewriting import Rewriting
from lightning_revbn.callbacks.rule_settings import RuleSettings
from lightning_revbn.callbacks.rules import UpdateRules
from lightning_revbn.callbacks.saved_by_arguments import SavedByArguments, save_by_arguments
from lightning_revbn.callbacks.short_trainings import tell_if_too_short
from lightning_revbn.callbacks.telling import tell
from lightning_revbn.core.arguments import (
    TrainedPolicy,
    ZeroScalePolicy,
    check_choice,
    check_divisor,
    check_eps,
    check_multiplier,
)
from lightning_revbn.core.initialization import InitReport, note_eps
from lightning_revbn.core.layers import Selection
from lightning_revbn.core.next_call import EveryCall, NextCall, followed_by
from lightning_revbn.core.param_groups import WeightDecayExempt
from lightning_revbn.lightning_compat import (
    MisconfigurationException,
    adopt,
    overrides,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_revbn.plugins.batch_norm_sync import refuse_damage, warn_if_ignored

__all__ = ["RevisitedBatchNorm"]


class RevisitedBatchNorm(Companion, SavedByArguments):
    """Start batch norm scales below 1 and train them with lr / c (Davis and Frank, ECCV 2022, arXiv 2110.13989).

    At the start of a fit, the scale of every freshly initialised batch norm layer becomes `scale`. Trained, restored
    and frozen layers keep their scales, and so do scales that start at 0 on purpose. Every optimizer updates the scales
    with its own current learning rate divided by `scale_lr_divisor`. A table lists once which layers were rewritten,
    which were left alone, and why. Parameter groups, schedules, optimizer state and the keys of `state_dict` stay the
    same, so checkpoints can be resumed with or without the callback.

    A Trainer may hold several, each for its own layers with its own settings; they may share an optimizer.

    Args:
        scale: The starting value of the scales, or a mapping from name patterns to values; the first match counts. 0.1
            is the paper's starting point; choose this hyperparameter on validation data.
        scale_lr_divisor: The constant c. Values up to 1 switch the division off.
        shift_lr_multiplier: The constant k: shifts learn with lr * k at every step, and decay as before. 1 leaves them
            alone, as the paper does.
        eps: The eps for layers that are fresh when they are first met; None leaves it. Every stage of a Trainer with
            the callback sets it. No `state_dict` holds eps, so write it into the model's code for good.
        weight_decay_exempt: The parameters without weight decay: `"scale"`, `"norm"` (scales and shifts of batch norm),
            `"vectors"` (the paper's recipe: batch norm and every bias) or None. Independent of `scale_lr_divisor`.
        include: `fnmatch` patterns on dotted module names; a layer must match one of them.
        exclude: Patterns of layers to leave alone; stronger than `include`.
        zero_scale: `"keep"` or `"overwrite"` scales that start at 0, as in the last batch norm of a residual branch.
            Kept scales learn with the full learning rate.
        trained: `"keep"`, `"overwrite"` or `"error"` for layers that are not freshly initialised.
        monitor: Whether to log statistics of every layer's scale and shift; or the `BatchNormMonitor` that logs them.
        enabled: The switch for configuration files: with False the callback does nothing.

    Raises:
        ValueError: If a number is not finite and positive, or a choice is unknown.
        TypeError: If an argument has the wrong type.

    Example::

        trainer = Trainer(callbacks=[RevisitedBatchNorm()])
    """

    def __init__(
        self,
        scale: float | Mapping[str, float] = 0.1,
        scale_lr_divisor: float = 100.0,
        shift_lr_multiplier: float = 1.0,
        eps: float | None = None,
        weight_decay_exempt: WeightDecayExempt | None = "scale",
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        zero_scale: ZeroScalePolicy = "keep",
        trained: TrainedPolicy = "keep",
        monitor: bool | BatchNormMonitor = True,
        enabled: bool = True,
    ) -> None:
        super().__init__()
        self._selection = Selection(scale, include, exclude, zero_scale, trained)
        self.scale_lr_divisor = check_divisor(scale_lr_divisor)
        self.shift_lr_multiplier = check_multiplier(shift_lr_multiplier)
        check_choice("weight_decay_exempt", weight_decay_exempt, [*get_args(WeightDecayExempt), None])
        self.weight_decay_exempt: WeightDecayExempt | None = weight_decay_exempt
        self.enabled: bool = enabled
        if not isinstance(monitor, (bool, BatchNormMonitor)):  # pyright: ignore[reportUnnecessaryIsInstance] # from a file
            raise TypeError(
                f"monitor must be True, False or a BatchNormMonitor, got {monitor!r}; in a configuration with targets "
                "(such as Hydra) give a mapping with _target_: lightning_revbn.BatchNormMonitor"
            )
        own = (BatchNormMonitor.by_default() if monitor else None) if isinstance(monitor, bool) else monitor
        self._own_monitor: BatchNormMonitor | None = own
        # Without a monitor, an empty callback takes its place, so no hook has to ask.
        self._monitor: Callback = own if enabled and own is not None else Callback()
        self._rewriting = Rewriting(self._selection)
        name = type(self).__name__
        self._eps = EpsState(name, self._selection, check_eps(eps))
        learning = RuleSettings(self.scale_lr_divisor, self.shift_lr_multiplier, self.weight_decay_exempt)
        self._rules = UpdateRules(name, self._selection, learning)
        self._wraps: list[NextCall] = []
        self._guards: list[EveryCall] = []
        self._is_resumed = False
        self._evaluations: weakref.WeakKeyDictionary[Trainer, StageEps] = weakref.WeakKeyDictionary()
        adopt(RevisitedBatchNorm)  # pytorch_lightning may have been imported since the class was made

    @property
    def scale(self) -> float | Mapping[str, float]:
        """The starting value of scales, or values by name pattern."""
        return self._selection.scale

    @property
    def eps(self) -> float | None:
        """The eps that fresh layers get; None if they keep their own."""
        return self._eps.eps

    @property
    def include(self) -> Sequence[str]:
        """Name patterns; a layer must match at least one of them."""
        return self._selection.include

    @property
    def exclude(self) -> Sequence[str]:
        """Name patterns of layers that are left alone."""
        return self._selection.exclude

    @property
    def zero_scale(self) -> ZeroScalePolicy:
        """The policy for scales that start at 0."""
        return self._selection.zero_scale

    @property
    def trained(self) -> TrainedPolicy:
        """The policy for layers that are not freshly initialised."""
        return self._selection.trained

    @property
    @override
    def _settings(self) -> dict[str, Any]:
        """The arguments that decide on the training, as plain values for checkpoints and loggers."""
        scale = self.scale
        return {
            "scale": dict(scale) if isinstance(scale, Mapping) else scale,
            "scale_lr_divisor": self.scale_lr_divisor,
            "shift_lr_multiplier": self.shift_lr_multiplier,
            "eps": self.eps,
            "weight_decay_exempt": self.weight_decay_exempt,
            "include": list(self.include),
            "exclude": list(self.exclude),
            "zero_scale": self.zero_scale,
            "trained": self.trained,
        }

    @property
    def monitor(self) -> BatchNormMonitor | None:
        """The monitor that logs the statistics; None if nothing is logged."""
        return self._own_monitor

    @property
    def report(self) -> InitReport:
        """Every batch norm layer of the model, with the verdict on it; complete once a fit has started."""
        return InitReport(tuple(note_eps(self._rewriting.records, self._eps.before)))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._join(trainer)
        if stage != "fit":
            if self._acts_in(trainer):
                others = self._selections_of_others(trainer)
                self._evaluations[trainer] = self._eps.evaluate(trainer, pl_module, others)
            return
        if self._gives_way(trainer):
            return
        self._begin(trainer)
        self._wraps += self._compare_ranks(trainer)
        # The Trainer's own monitor is enough: two monitors would log the same keys.
        own = self._own_monitor if self.enabled and not self._has_other_monitor(trainer) else None
        self._monitor = Callback() if own is None else own
        others = self._selections_of_others(trainer)
        if not self.enabled:
            self._eps.leave(trainer, pl_module, others)
            return
        self._guard(trainer, pl_module)
        self._rewriting.begin(pl_module)
        self._eps.begin(trainer, pl_module, others, self.state_key)
        # The Trainer does not know our own monitor, so this callback calls its hooks.
        self._monitor.setup(trainer, pl_module, stage)
        # FSDP2 and DeepSpeed ignore sync_batchnorm silently.
        warn_if_ignored(trainer.strategy)
        rewrite = functools.partial(self._rewrite, trainer, pl_module)
        rewrite()
        # The module's own hooks come next, and may make layers or load weights. The rules need the optimizers, which
        # the strategy makes later; on_fit_start is too late, since the learning rate finder trains before it.
        for hook in ("setup", "configure_model"):
            if overrides(hook, pl_module):
                self._wraps.append(NextCall(pl_module, hook, followed_by(rewrite)))
        attach = functools.partial(self._rules.attach, trainer, pl_module, self._rewriting)
        self._wraps.append(NextCall(trainer.strategy, "setup_optimizers", followed_by(attach)))
        self._rules.begin(trainer, functools.partial(self._follow, trainer, pl_module))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._is_fitting(trainer):
            return
        self._unwrap()
        self._wraps += hyperparameters.announce(trainer, self._joined_settings(trainer))
        self._settle(trainer, pl_module)
        # Strategies that restore later get their report in `on_train_start`, once the weights are final.
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._tell(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._is_fitting(trainer):
            return
        if trainer.strategy.restore_checkpoint_after_setup:
            # These strategies restore weights, and the names of scales kept at zero, only after on_fit_start.
            self._settle(trainer, pl_module)
            self._tell(trainer)
        tell_if_too_short(type(self).__name__, self.report, self._rules.settings, trainer)
        hyperparameters.log(trainer, self._joined_settings(trainer))
        self._monitor.on_train_start(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._is_fitting(trainer):
            return
        # A user's loop may step optimizers past the strategy: this hook is the last chance to find such optimizers.
        self._follow(trainer, pl_module)
        self._monitor.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._is_fitting(trainer):
            self._monitor.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_fitting(trainer):
            self._monitor.on_train_epoch_end(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_fitting(trainer):
            self._monitor.on_train_end(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_evaluation(trainer)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_evaluation(trainer)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_evaluation(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Another Trainer may validate or test with the same callback in the middle of a fit.
        self._end_evaluation(trainer)
        if stage == "fit" and self._belongs_to(trainer):
            self._end(trainer, pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end_evaluation(trainer)
        if self._belongs_to(trainer):
            self._abandon(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        if not self.enabled:
            return {}
        return {
            **self._settings,
            "zero_kept": sorted(self._rewriting.zero_kept),
            **self._eps.state_dict(),
            "monitor": self._monitor.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # An evaluating Trainer loads the state too, but a running fit must not take it.
        if not self.enabled or self._evaluations:
            return
        for name, own in self._settings.items():
            if name == "eps":
                continue  # `EpsState` reports on a restored eps once the layers exist
            if name in state_dict and state_dict[name] != own:
                rank_zero_warn(
                    f"{type(self).__name__}: the checkpoint was made with {name}={state_dict[name]!r}, this run has "
                    f"{name}={own!r}. Restored scales keep their values; from here on this run's settings apply."
                )
        # After their trials, Lightning's finders load a checkpoint of their own, which does not count as a resume.
        self._is_resumed = self._is_resumed or not self._rules.has_ever_updated
        if "zero_kept" in state_dict:
            self._rewriting.zero_kept = set(state_dict["zero_kept"])
        self._monitor.load_state_dict(state_dict.get("monitor", {}))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out Trainers and wrapped methods, which belong to this process."""
        return {**super().__getstate__(), "_wraps": [], "_guards": [], "_evaluations": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._evaluations = weakref.WeakKeyDictionary()  # which cannot be pickled

    def _is_fitting(self, trainer: Trainer) -> bool:
        """Tell whether this Trainer runs the fit that the callback acts in; Trainers may share a list of callbacks."""
        return self.enabled and self._belongs_to(trainer)

    def _begin(self, trainer: Trainer) -> None:
        """Bind the callback to a fit.

        Raises:
            MisconfigurationException: If another Trainer is in the middle of a fit with this callback.
        """
        if self._is_busy(trainer):
            raise MisconfigurationException(
                f"{type(self).__name__} is in the middle of a fit of another Trainer: give each Trainer its own"
            )
        other = None if self._trainer is None else self._trainer()
        if other is not None:
            # If another callback fails in on_exception, Lightning does not call ours. So that fit ends here.
            self._abandon(other, other.lightning_module)
        self._trainer = weakref.ref(trainer)
        self._is_resumed = False

    def _guard(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the fit while Lightning's finders have removed all callbacks from the Trainer."""

        def load(method: Callable[..., None], checkpoint: dict[str, Any]) -> None:
            method(checkpoint)
            # A checkpoint of step 0 brings back the weights from before the first update.
            if not checkpoint.get("global_step"):
                self._rules.set_back()

        def fail(method: Callable[..., None], exception: BaseException) -> None:
            self.on_exception(trainer, pl_module, exception)
            method(exception)

        self._guards += [EveryCall(pl_module, "on_load_checkpoint", load)]
        self._guards += [EveryCall(trainer.strategy, "on_exception", fail)]

    def _abandon(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a failed fit; if it made no update, restore the module."""
        try:
            if not self._rules.has_updated:
                self._rewriting.give_back(pl_module)
                self._eps.give_back()
        finally:  # restoring may fail as well: a failed device cannot be read
            self._end(trainer, pl_module)

    def _end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trainer = None
        self._unwrap()
        while self._guards:
            self._guards.pop().undo()
        self._rules.remove()
        self._rewriting.end()
        self._eps.end()
        self._monitor.teardown(trainer, pl_module, "fit")

    @override
    def _arguments(self) -> dict[str, Any]:
        monitor = self._own_monitor
        # A default monitor is saved as True, so that loading makes a default monitor again.
        return {**super()._arguments(), "monitor": monitor if monitor and monitor.is_asked_for else monitor is not None}

    def _rewrite(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Both refusals come before the first write, so a refused fit leaves the model as it was.
        refuse_damage(trainer.strategy, pl_module)
        self._refuse_shared_layers(trainer, pl_module)
        self._rewriting.write(trainer, pl_module)
        self._eps.choose(self._rewriting.records)

    def _settle(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rewriting.settle(trainer, pl_module)
        self._eps.choose(self._rewriting.records)
        self._eps.settle(self._rewriting.records)
        self._rules.attach(trainer, pl_module, self._rewriting)

    def _follow(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep up with replaced optimizers and with layers that were added to them."""
        # This runs before every step: a cheap check spares the walk through the model.
        if self._rules.are_current(trainer):
            return
        new = self._rewriting.write_new(pl_module)
        self._eps.choose(new)
        self._rules.attach(trainer, pl_module, self._rewriting)
        if new:
            rewritten = sum(record.verdict == "rewrite" for record in new)
            rank_zero_info(
                f"{type(self).__name__}: {len(new)} batch norm layers were added or replaced, such as {new[0].name!r}; "
                f"{rewritten} of them start from a new scale"
            )

    def _start_evaluation(self, trainer: Trainer) -> None:
        if trainer in self._evaluations:
            self._evaluations[trainer].warn_if_not_set()

    def _end_evaluation(self, trainer: Trainer) -> None:
        evaluation = self._evaluations.pop(trainer, None)
        if evaluation is not None:
            evaluation.end()

    def _tell(self, trainer: Trainer) -> None:
        self._eps.warn_if_not_set()
        sets_eps = bool(self._eps.state_dict())
        tell(type(self).__name__, self.report, trainer, self._rules, sets_eps=sets_eps, is_resumed=self._is_resumed)

    def _unwrap(self) -> None:
        while self._wraps:
            self._wraps.pop().undo()


adopt(RevisitedBatchNorm)
save_by_arguments(RevisitedBatchNorm)
