"""The callback: rewrites the model's batch norm scales at setup and trains them with lr / c."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_revbn.callbacks import hyperparameters
from lightning_revbn.callbacks.monitor import BatchNormMonitor
from lightning_revbn.callbacks.next_call import NextCall, followed_by
from lightning_revbn.callbacks.rewriting import Rewriting
from lightning_revbn.callbacks.rules import UpdateRules
from lightning_revbn.callbacks.telling import tell
from lightning_revbn.core.arguments import TrainedPolicy, ZeroScalePolicy, check_choice, check_divisor
from lightning_revbn.core.initialization import InitReport
from lightning_revbn.core.layers import Selection
from lightning_revbn.core.param_groups import WeightDecayExempt
from lightning_revbn.lightning_compat import callbacks_of, overrides, rank_zero_warn
from lightning_revbn.plugins.batch_norm_sync import refuse_damage, warn_if_ignored

__all__ = ["RevisitedBatchNorm"]


class RevisitedBatchNorm(Callback):
    """Start batch norm scales below 1 and train them with lr / c (Davis and Frank, ECCV 2022, arXiv 2110.13989).

    At the start of a fit the scale of every freshly initialised batch norm layer becomes `scale`; trained, restored
    and frozen layers keep theirs, as do scales started at 0 on purpose. While training, every optimizer updates the
    scales with its own current learning rate divided by `scale_lr_divisor`. A table says once what was rewritten, what
    was left alone and why. Parameter groups, schedules, optimizer state and the keys of the model's `state_dict` are
    those of a run without the callback, so checkpoints can be resumed with it or without it.

    Args:
        scale: The value the scales start from, or a mapping from name patterns to values of which the first match
            counts. 0.1 is the paper's starting point; it is a hyperparameter, to be chosen on validation data.
        scale_lr_divisor: The constant c. Values up to 1 switch the division off.
        weight_decay_exempt: What takes no weight decay: `"scale"`, `"norm"` (scales and shifts of batch norm),
            `"vectors"` (the paper's recipe: batch norm and every bias) or None. Independent of `scale_lr_divisor`.
        include: `fnmatch` patterns on dotted module names; a layer must match one of them.
        exclude: Patterns of layers to leave alone; stronger than `include`.
        zero_scale: `"keep"` or `"overwrite"` scales that start at 0, as in the last batch norm of a residual branch.
            Kept ones learn with the full learning rate.
        trained: `"keep"`, `"overwrite"` or `"error"` for layers that are not freshly initialised.
        monitor: Whether to log statistics of every layer's scale and shift; or the `BatchNormMonitor` to do it with.
        enabled: The switch for configuration files: False makes the callback do nothing at all.

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
        weight_decay_exempt: WeightDecayExempt | None = "scale",
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        zero_scale: ZeroScalePolicy = "keep",
        trained: TrainedPolicy = "keep",
        monitor: bool | BatchNormMonitor = True,
        enabled: bool = True,
    ) -> None:
        self._selection = Selection(scale, include, exclude, zero_scale, trained)
        self.scale_lr_divisor = check_divisor(scale_lr_divisor)
        check_choice("weight_decay_exempt", weight_decay_exempt, [*get_args(WeightDecayExempt), None])
        self.weight_decay_exempt: WeightDecayExempt | None = weight_decay_exempt
        self.enabled: bool = enabled
        if not isinstance(monitor, (bool, BatchNormMonitor)):  # pyright: ignore[reportUnnecessaryIsInstance] # from a file
            raise TypeError(
                f"monitor must be True, False or a BatchNormMonitor, got {monitor!r}; in a configuration with targets "
                "(Hydra, for one) give a mapping with _target_: lightning_revbn.BatchNormMonitor"
            )
        own = (BatchNormMonitor() if monitor else None) if isinstance(monitor, bool) else monitor
        self._own_monitor: BatchNormMonitor | None = own
        # Where nothing is logged, a callback that does nothing takes the monitor's place.
        self._monitor: Callback = own if enabled and own is not None else Callback()
        self._rewriting = Rewriting(self._selection)
        name = type(self).__name__
        self._rules = UpdateRules(name, self._selection, self.scale_lr_divisor, self.weight_decay_exempt)
        self._wraps: list[NextCall] = []

    @property
    def scale(self) -> float | Mapping[str, float]:
        """The value, or values by name pattern, that scales start from."""
        return self._selection.scale

    @property
    def include(self) -> Sequence[str]:
        """Name patterns of which a layer must match one."""
        return self._selection.include

    @property
    def exclude(self) -> Sequence[str]:
        """Name patterns of layers that are left alone."""
        return self._selection.exclude

    @property
    def zero_scale(self) -> ZeroScalePolicy:
        """What is done with scales that start at 0."""
        return self._selection.zero_scale

    @property
    def trained(self) -> TrainedPolicy:
        """What is done with layers that are not freshly initialised."""
        return self._selection.trained

    @property
    def _settings(self) -> dict[str, Any]:
        """The arguments that decide what is trained, as plain values for checkpoints and loggers."""
        scale = self.scale
        return {
            "scale": dict(scale) if isinstance(scale, Mapping) else scale,
            "scale_lr_divisor": self.scale_lr_divisor,
            "weight_decay_exempt": self.weight_decay_exempt,
            "include": list(self.include),
            "exclude": list(self.exclude),
            "zero_scale": self.zero_scale,
            "trained": self.trained,
        }

    @property
    def monitor(self) -> BatchNormMonitor | None:
        """What logs the statistics; None if nothing does."""
        return self._own_monitor

    @property
    def report(self) -> InitReport:
        """What was found in the model and what was done about it; complete once a fit has started."""
        return InitReport(tuple(self._rewriting.records))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        # Another callback's error in on_exception keeps Lightning from calling ours: what is left of that fit goes now.
        self.teardown(trainer, pl_module, stage)
        # Where the Trainer has a monitor of its own, one is enough.
        others = any(isinstance(callback, BatchNormMonitor) for callback in callbacks_of(trainer))
        own = self._own_monitor if self.enabled and not others else None
        self._monitor = Callback() if own is None else own
        if not self.enabled:
            return
        self._rewriting.begin(pl_module)
        self._monitor.setup(trainer, pl_module, stage)
        warn_if_ignored(trainer.strategy)
        rewrite = functools.partial(self._rewrite, trainer, pl_module)
        rewrite()
        # Layers may be made, and weights loaded, in the module's own hooks, which come next. Only after the strategy
        # has made the optimizers do these exist, and the learning rate finder trains before our on_fit_start.
        for hook in ("setup", "configure_model"):
            if overrides(hook, pl_module):
                self._wraps.append(NextCall(pl_module, hook, followed_by(rewrite)))
        attach = functools.partial(self._rules.attach, trainer, pl_module, self._rewriting)
        self._wraps.append(NextCall(trainer.strategy, "setup_optimizers", followed_by(attach)))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.enabled:
            return
        self._unwrap()
        self._wraps += hyperparameters.announce(trainer, self._settings)
        self._rewriting.settle(trainer, pl_module)
        self._rules.attach(trainer, pl_module, self._rewriting)
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._tell(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.enabled:
            return
        if trainer.strategy.restore_checkpoint_after_setup:
            # Weights, and the names of the scales kept at zero, may have come from a checkpoint only now.
            self._rewriting.settle(trainer, pl_module)
            self._rules.remove()
            self._rules.attach(trainer, pl_module, self._rewriting)
            self._tell(trainer)
        hyperparameters.log(trainer, self._settings)
        self._monitor.on_train_start(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._monitor.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._monitor.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._monitor.on_train_epoch_end(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._monitor.on_train_end(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._unwrap()
        self._rules.remove()
        self._rewriting.end()
        self._monitor.teardown(trainer, pl_module, stage)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    @override
    def state_dict(self) -> dict[str, Any]:
        if not self.enabled:
            return {}
        return {
            **self._settings,
            "zero_kept": sorted(self._rewriting.zero_kept),
            "monitor": self._monitor.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self.enabled:
            return
        for name, own in self._settings.items():
            if name in state_dict and state_dict[name] != own:
                rank_zero_warn(
                    f"{type(self).__name__}: the checkpoint was made with {name}={state_dict[name]!r}, this run has "
                    f"{name}={own!r}. Restored scales keep their values; from here on this run's settings apply."
                )
        if "zero_kept" in state_dict:
            self._rewriting.zero_kept = set(state_dict["zero_kept"])
        self._monitor.load_state_dict(state_dict.get("monitor", {}))

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind the wrapped methods, since their owners belong to this process."""
        return {**self.__dict__, "_wraps": []}

    def _rewrite(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_damage(trainer.strategy, pl_module)
        self._rewriting.write(trainer, pl_module)

    def _tell(self, trainer: Trainer) -> None:
        name, optimizers = type(self).__name__, trainer.strategy.optimizers
        tell(name, self.report, optimizers, self._rules.covered, self.scale_lr_divisor)

    def _unwrap(self) -> None:
        while self._wraps:
            self._wraps.pop().undo()
