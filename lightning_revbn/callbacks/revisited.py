"""The callback: rewrites the model's batch norm scales at setup and trains them with lr / c."""

# pyright: reportPrivateImportUsage=false
# Lightning's documented homes of rank_zero_* and MisconfigurationException re-export them without saying so.

from __future__ import annotations

import functools
import logging
import math
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from inspect import signature
from typing import Any, cast, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from typing_extensions import override

from lightning_revbn.callbacks import hyperparameters
from lightning_revbn.callbacks.monitor import BatchNormMonitor
from lightning_revbn.callbacks.next_call import NextCall, followed_by
from lightning_revbn.core.arguments import TrainedPolicy, ZeroScalePolicy, check_choice, check_divisor
from lightning_revbn.core.gathered import gathered
from lightning_revbn.core.initialization import (
    InitReport,
    fill_scale,
    forget_lazy,
    refuse,
    rule_scales,
    write_scales,
    zero_kept_names,
)
from lightning_revbn.core.layers import BatchNormRecord, Selection
from lightning_revbn.core.update_rule import (
    GROUP_MARK,
    ScaleUpdateRule,
    WeightDecayExempt,
    exempt_parameters,
    is_divided,
    scale_param_groups,
)
from lightning_revbn.lightning_compat import callbacks_of, overrides, twins
from lightning_revbn.plugins.batch_norm_sync import refuse_damage, warn_if_ignored


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
        self._own_monitor = (BatchNormMonitor() if monitor else None) if isinstance(monitor, bool) else monitor
        self._monitor = self._own_monitor
        self._records: list[BatchNormRecord] = []
        self._rewritten: set[str] = set()
        self._zero_kept: set[str] = set()
        self._before: dict[str, _Before] = {}
        self._module: weakref.ref[LightningModule] | None = None
        self._rules: list[ScaleUpdateRule] = []
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
        return InitReport(tuple(self._records))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or not self.enabled:
            return
        # Another callback's error in on_exception keeps Lightning from calling ours: what is left of that fit goes now.
        self.teardown(trainer, pl_module, stage)
        if self._module is None or self._module() is not pl_module:
            self._module = weakref.ref(pl_module)
            self._rewritten, self._zero_kept = set(), set()
        # Where the Trainer has a monitor of its own, one is enough.
        others = any(isinstance(callback, BatchNormMonitor) for callback in callbacks_of(trainer))
        self._monitor = None if others else self._own_monitor
        if self._monitor is not None:
            self._monitor.setup(trainer, pl_module, stage)
        warn_if_ignored(trainer.strategy)
        self._before = {}
        rewrite = functools.partial(self._rewrite, trainer, pl_module, done=frozenset(self._rewritten))
        rewrite()
        # Layers may be made, and weights loaded, in the module's own hooks, which come next. Only after the strategy
        # has made the optimizers do these exist, and the learning rate finder trains before our on_fit_start.
        for hook in ("setup", "configure_model"):
            if overrides(hook, pl_module):
                self._wraps.append(NextCall(pl_module, hook, followed_by(rewrite)))
        register = functools.partial(self._register_rules, trainer, pl_module)
        self._wraps.append(NextCall(trainer.strategy, "setup_optimizers", followed_by(register)))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.enabled:
            return
        self._unwrap()
        self._wraps += hyperparameters.announce(trainer, self._settings)
        self._settle(trainer, pl_module)
        self._register_rules(trainer, pl_module)
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._tell(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.enabled:
            return
        if trainer.strategy.restore_checkpoint_after_setup:
            # Weights, and the names of the scales kept at zero, may have come from a checkpoint only now.
            self._settle(trainer, pl_module)
            self._remove_rules()
            self._register_rules(trainer, pl_module)
            self._tell(trainer)
        hyperparameters.log(trainer, self._settings)
        if self._monitor is not None:
            self._monitor.on_train_start(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.enabled and self._monitor is not None:
            self._monitor.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.enabled and self._monitor is not None:
            self._monitor.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.enabled and self._monitor is not None:
            self._monitor.on_train_epoch_end(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.enabled and self._monitor is not None:
            self._monitor.on_train_end(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._unwrap()
        self._remove_rules()
        self._before = {}
        for record in self._records:
            forget_lazy(record)
        if self._monitor is not None:
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
            "zero_kept": sorted(self._zero_kept),
            "monitor": self._monitor.state_dict() if self._monitor is not None else {},
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
        self._zero_kept = set(state_dict.get("zero_kept", self._zero_kept))
        if self._monitor is not None:
            self._monitor.load_state_dict(state_dict.get("monitor", {}))

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what belongs to this process: the module that was seen, hooks, wraps."""
        return {**self.__dict__, "_module": None, "_before": {}, "_rules": [], "_wraps": []}

    def _rewrite(self, trainer: Trainer, pl_module: LightningModule, done: frozenset[str]) -> None:
        """Write the scales of the layers that exist now; of trained ones those in `done` are our own from before."""
        refuse_damage(trainer.strategy, pl_module)
        with gathered(pl_module, write=True, fsdp=False):
            records = self._judge(pl_module, done)
            refuse([record for record in records if record.state != "unmaterialized"])
            rewritten = [record for record in records if record.verdict == "rewrite"]
            for record in rewritten:
                if record.values is not None and not _has_target(record):
                    self._before[record.name] = _Before(record)
            write_scales(records)
            self._records = records
            names = {record.name for record in rewritten}
            self._rewritten |= names
            self._zero_kept |= set(zero_kept_names(records))
            for copy in _averages(trainer, pl_module):
                write_scales([r for r in self._judge(copy, done) if r.name in names and r.state != "lazy"])

    def _judge(self, module: nn.Module, done: frozenset[str]) -> list[BatchNormRecord]:
        return [
            replace(record, verdict="skip", reason="trained in an earlier fit")
            if record.state == "trained" and record.name in done
            else record
            for record in self._selection.look(module)
        ]

    def _settle(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the records up to what the layers are now that everything was made, moved and perhaps restored."""
        before = {record.name: record for record in self._records}
        records: list[BatchNormRecord] = []
        with gathered(trainer.strategy.model or pl_module, write=True):
            found = self._selection.look(pl_module)
            self._give_back(trainer, pl_module, [record for record in found if record.state == "frozen"])
            for record in found:
                earlier = before.get(record.name)
                if earlier is not None and earlier.target is not None:
                    if earlier.verdict == "rewrite" and record.has_scale(earlier.target):
                        record = replace(record, verdict="rewrite", reason=earlier.reason)
                    elif record.state == "trained":
                        was_untrained = earlier.state in ("fresh", "lazy", "unmaterialized")
                        restored = "restored, from a checkpoint or by the model's hooks"
                        record = replace(record, verdict="skip", reason=restored if was_untrained else earlier.reason)
                records.append(record)
            self._selection.check_patterns_match(records)
            refuse(records)
            write_scales(records)
        self._records = records

    def _give_back(self, trainer: Trainer, pl_module: LightningModule, frozen: Sequence[BatchNormRecord]) -> None:
        """Undo the rewrite of layers that were frozen since, by a hook or by a callback that comes after ours."""
        written = {
            record.name: self._before[record.name].scale
            for record in frozen
            if _has_target(record) and record.name in self._before and self._before[record.name].is_same_layer(record)
        }
        for module in (pl_module, *_averages(trainer, pl_module)) if written else ():
            for record in self._selection.look(module):
                if record.name in written and _has_target(record):
                    fill_scale(record.module, written[record.name])

    def _register_rules(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the update rule on every optimizer that does not have it yet.

        Raises:
            MisconfigurationException: If the rule cannot hold for an optimizer.
        """
        ruled = {id(rule.optimizer) for rule in self._rules}
        optimizers = [optimizer for optimizer in trainer.strategy.optimizers if id(optimizer) not in ruled]
        records = self._selection.look(pl_module) if optimizers else []
        refuse([record for record in records if record.state == "unsupported"])  # FSDP1's flat parameters, say
        self._zero_kept |= set(zero_kept_names(records))  # layers that are newer than a restored state, too
        divided = rule_scales(records, sorted(self._zero_kept))
        exempt = exempt_parameters(pl_module, records, self.weight_decay_exempt) if records else []
        if self.scale_lr_divisor <= 1:
            divided = []
        if not divided and not exempt:
            return
        for optimizer in optimizers:
            if not isinstance(optimizer, Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance] # an engine's own
                self._check_permanent_groups(optimizer, trainer)
                continue
            try:
                rule = ScaleUpdateRule(optimizer, divided, self.scale_lr_divisor, exempt, warn_if_unused=False)
            except (TypeError, ValueError) as error:
                if is_divided(optimizer, divided, exempt):
                    continue
                raise MisconfigurationException(f"{type(self).__name__}: {error}{self._missing(optimizer)}") from error
            self._rules.append(rule)

    def _missing(self, optimizer: Any) -> str:
        """Say what groups made by `scale_param_groups` leave to be done; nothing where there are none."""
        if not _permanent_groups(optimizer):
            return ""
        return (
            "; it has such groups, but not every scale is in one, or some decay: call scale_param_groups on the whole "
            f"module, with weight_decay_exempt={self.weight_decay_exempt!r}"
        )

    def _check_permanent_groups(self, optimizer: Any, trainer: Trainer) -> None:
        """Look for groups of `scale_param_groups` in an optimizer of DeepSpeed, which keeps nothing else of scales.

        Raises:
            MisconfigurationException: If there is none; the message has the code to add.
        """
        if _permanent_groups(optimizer):
            return
        group: dict[str, Any] = optimizer.param_groups[0]
        settings: dict[str, Any] = {
            "divisor": self.scale_lr_divisor,
            "weight_decay_exempt": self.weight_decay_exempt,
            "include": self.include,
            "exclude": self.exclude,
        }
        defaults = signature(scale_param_groups).parameters
        arguments = {
            "lr": float(group.get("initial_lr", group["lr"])),
            "weight_decay": group.get("weight_decay", 0.0),
            **{name: value for name, value in settings.items() if value != defaults[name].default},
        }
        inner = cast("type[object]", type(getattr(optimizer, "optimizer", optimizer)))
        name = f"torch.optim.{inner.__name__}" if inner.__module__.startswith("torch.optim.") else inner.__name__
        config: object = getattr(trainer.strategy, "config", None)
        in_config = isinstance(config, Mapping) and "optimizer" in config
        raise MisconfigurationException(
            f"{type(self).__name__}: {type(optimizer).__name__} trains copies of the parameters, among which no batch "
            "norm scale can be told. Make groups for them, by these two lines in configure_optimizers:\n\n"
            "    from lightning_revbn import scale_param_groups\n"
            f"    return {name}(scale_param_groups(self, "
            f"{', '.join(f'{key}={value!r}' for key, value in arguments.items())}))\n\n"
            f"with the other arguments of {inner.__name__} that you use"
            + (
                ", and remove the optimizer from DeepSpeed's configuration, which takes its place. "
                if in_config
                else ". "
            )
            + "To train without lr / c: scale_lr_divisor=1, weight_decay_exempt=None."
        )

    def _tell(self, trainer: Trainer) -> None:
        name = type(self).__name__
        if not self._records:
            rank_zero_warn(f"{name} has no effect: the model has no batch norm layers")
            return
        optimizers: list[Any] = trainer.strategy.optimizers
        permanent = [(own, group) for own in optimizers for group in _permanent_groups(own)]
        covered = sum(rule.covered for rule in self._rules)
        rate = f"{covered} scales learn with lr / {self.scale_lr_divisor:g}" if self.scale_lr_divisor > 1 else ""
        if permanent and not covered:
            # An engine's optimizer holds flat copies.
            held = sum(len(group["params"]) for own, group in permanent if isinstance(own, Optimizer))
            rate = f"{held or 'the'} scales learn with the learning rate of their groups, made by scale_param_groups"
        _print_report(name, self.report, rate)
        if not self.report.rewritten and not covered and not permanent:
            rank_zero_warn(
                f"{name} has no effect: no scale was rewritten, and none learns with lr / {self.scale_lr_divisor:g}"
            )
        elif self.scale_lr_divisor > 1 and not covered and not permanent:
            rank_zero_warn(f"{name}: no optimizer holds a batch norm scale, so none learns with lr / c")
        elif covered:  # an engine that trains 16-bit copies of its own numbers is not among them
            self._warn_of_rounding()

    def _warn_of_rounding(self) -> None:
        coarse = [
            record
            for record in self._records
            if record.verdict == "rewrite" and record.scale is not None and torch.finfo(record.scale.dtype).bits < 32
        ]
        if not coarse:
            return
        target, dtype = cast("float", coarse[0].target), cast("nn.Parameter", coarse[0].scale).dtype
        apart = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(target))
        rank_zero_warn(
            f"{type(self).__name__}: {len(coarse)} scales are {dtype}, that of {coarse[0].name!r} for one. Near "
            f"{target:g} such numbers are {apart:.2g} apart, and an update of less than half of that, as with "
            f"lr / {self.scale_lr_divisor:g} most are, is rounded away. Train with "
            "precision='bf16-mixed' or '16-mixed', or choose a smaller scale_lr_divisor"
        )

    def _remove_rules(self) -> None:
        while self._rules:
            self._rules.pop().remove()

    def _unwrap(self) -> None:
        while self._wraps:
            self._wraps.pop().undo()


@rank_zero_only
def _print_report(name: str, report: InitReport, rate: str) -> None:
    """Show the report by rich where it is installed and a person looks, else as a log message."""
    log = logging.getLogger("lightning.pytorch")  # whoever silences Lightning silences this
    if sys.stderr.isatty() and find_spec("rich") is not None and log.isEnabledFor(logging.INFO):
        from rich.console import Console

        Console(stderr=True, highlight=False).print(f"{name}:", report, rate)
    else:
        # Not rank_zero_info, which logs for whichever of the two packages was imported last.
        log.info("\n".join([f"{name}:", str(report), *[rate] * bool(rate)]))


class _Before:
    """What a layer was before its scale was written."""

    def __init__(self, record: BatchNormRecord) -> None:
        values = cast("Tensor", record.values)
        # One number does for the shards of a scale too.
        self.scale = values[0].item() if (values == values[0]).all() else values.clone()
        mean = _running_mean(record)
        self._mean = None if mean is None else mean.clone()

    def is_same_layer(self, record: BatchNormRecord) -> bool:
        """Tell whether the layer has neither been trained nor restored from a checkpoint since, by its statistics."""
        mean = _running_mean(record)
        return mean is None or (self._mean is not None and torch.equal(self._mean.to(mean), mean))


def _running_mean(record: BatchNormRecord) -> Tensor | None:
    return cast("Tensor | None", record.module.running_mean)


def _has_target(record: BatchNormRecord) -> bool:
    return record.target is not None and record.has_scale(record.target)


def _permanent_groups(optimizer: Any) -> list[dict[str, Any]]:
    """List the groups that `scale_param_groups` has made."""
    return [group for group in optimizer.param_groups if GROUP_MARK in group]


def _averages(trainer: Trainer, pl_module: LightningModule) -> list[nn.Module]:
    """List the copies of the module that other callbacks average weights in, and made before ours was set up."""
    found: list[nn.Module] = []
    for callback in callbacks_of(trainer):
        for value in vars(callback).values():
            if isinstance(value, AveragedModel):
                found.append(value.module)
            elif isinstance(callback, twins(StochasticWeightAveraging)) and isinstance(value, twins(LightningModule)):
                found.append(value)
    return [copy for copy in found if type(copy) is type(pl_module) and copy is not pl_module]
