"""Logs how the scales and shifts of batch norm layers develop, in revisited runs and in baselines."""

from __future__ import annotations

import math
import weakref
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from numpy.typing import NDArray
from typing_extensions import override

from lightning_revbn.callbacks import hyperparameters
from lightning_revbn.callbacks.agreement import SameOnAllRanks
from lightning_revbn.callbacks.saved_by_arguments import SavedByArguments, save_by_arguments
from lightning_revbn.callbacks.scalar_layout import scalar_layout
from lightning_revbn.core.activations import ActivationHooks, NormalizedActivations
from lightning_revbn.core.affine_statistics import AffineStatistics
from lightning_revbn.core.gathered import gathered
from lightning_revbn.core.input_batch_norm import InputBatchNorm
from lightning_revbn.core.layers import BatchNormRecord, find_batch_norms, is_flattened
from lightning_revbn.core.metric_keys import (
    DEFAULT_PREFIX,
    NORMALIZED_ABSMAX,
    NORMALIZED_OVER_3,
    SCALE_LR,
    SCALE_MEAN,
    SHIFT_LR,
    WHOLE_MODEL_QUANTITIES,
    metric_key,
)
from lightning_revbn.core.next_call import NextCall
from lightning_revbn.core.printable import shortened
from lightning_revbn.core.setting_keys import BASELINE_SETTINGS
from lightning_revbn.core.torch_compat import BatchNormBase
from lightning_revbn.core.update_rule import scale_learning_rates, shift_learning_rates
from lightning_revbn.lightning_compat import (
    accumulates,
    adopt,
    callbacks_of,
    is_logging_step,
    publish,
    rank_zero_warn,
    stepped_batches,
    twins,
)

__all__ = ["COMPARED", "BatchNormMonitor"]

COMPARED = ("every_n_steps", "activations", "prefix")
"""The settings that ranks must share: measuring activations is a collective, and ranks log under the same keys."""


@dataclass
class _Event:
    """The metrics and histograms of a logging step."""

    step: int
    epoch: int
    metrics: dict[str, float]
    histograms: dict[str, NDArray[np.float64]]


@dataclass
class _Fit:
    """The measurements of a fit in this process.

    `event` waits for the activations of its step. `hooks` measure them, and exist only while a batch is in the network.
    """

    layers: Sequence[int]
    records: Sequence[BatchNormRecord]
    statistics: AffineStatistics
    metric: NormalizedActivations | None
    event: _Event | None = None
    hooks: ActivationHooks | None = None
    last_step: int | None = None

    def hook(self) -> None:
        """Measure activations, if an event waits for them."""
        self.unhook()
        if self.event is not None and self.metric is not None:
            self.hooks = ActivationHooks(self.records, self.metric)

    def unhook(self) -> None:
        """Stop measuring."""
        if self.hooks is not None:
            self.hooks.remove()
            self.hooks = None


class BatchNormMonitor(SameOnAllRanks, SavedByArguments):
    """Log statistics of the scale and shift of every batch norm layer during training.

    Keys of a layer, with its dotted name: `revbn/{layer}/scale_mean`, `scale_std`, `scale_min`, `scale_max`,
    `scale_drift`, and the same for `shift_`. Keys of the whole model: `revbn/scale_mean`, `revbn/scale_drift`,
    `revbn/shift_drift` and `revbn/scale_lr`, the learning rate that updates the scales (the mean over parameter groups
    where they differ). Where shifts learn with lr * k, `revbn/shift_lr` is their learning rate. Drift is the root mean
    square distance from the value at the start of training; a resumed run goes on measuring from there. The keys of
    the whole model are in `trainer.callback_metrics` too, for ModelCheckpoint and EarlyStopping.

    Every logger gets a dict per logging step, with `epoch` as in Lightning's own metrics. The values are from before
    the step's update, on the step axis of Lightning's LearningRateMonitor. If a logger fails to take them, a warning
    names the logger once, and training goes on. With lazy layers, logging begins at the first logging step after they
    are initialised. TensorBoard groups the layers on its page "Custom Scalars". A layout that you write there after the
    start of training replaces this layout.

    Without RevisitedBatchNorm, the monitor logs hyperparameters as that callback does: the settings of a baseline, and
    the seed of `seed_everything`. So TensorBoard and `lightning-revbn compare` tell the runs apart.

    With `activations`, forward passes of logging steps measure the normalised values of every layer (x_hat, before
    scale and shift). `revbn/{layer}/normalized_absmax` is the greatest `|x_hat|`, and `normalized_over_3` the share of
    `|x_hat| > 3`. Both cover the global batch (all ranks, all accumulated batches), and exist for the whole model too.
    Every layer is measured in its present mode: with batch statistics or with running statistics.

    Args:
        every_n_steps: Optimizer steps between two logging steps, beginning at step 0. None follows the Trainer's
            `log_every_n_steps` on Lightning's own steps, beginning at step `log_every_n_steps - 1`.
        per_layer: Whether to log every layer, or the whole model only.
        activations: Whether to measure normalised activations on logging steps.
        histograms: Whether to log the values of every layer's scale and shift as histograms `revbn/{layer}/scale` and
            `revbn/{layer}/shift`; for TensorBoardLogger and WandbLogger.
        prefix: First part of every key.
        progress_bar: Whether to show the mean of all scales, `revbn/scale_mean`, in the progress bar.

    Raises:
        ValueError: If `every_n_steps` is not a positive whole number.

    Example::

        trainer = Trainer(callbacks=[BatchNormMonitor()])
    """

    _called = "BatchNormMonitor"

    def __init__(
        self,
        every_n_steps: int | None = None,
        per_layer: bool = True,
        activations: bool = False,
        histograms: bool = False,
        prefix: str = DEFAULT_PREFIX,
        *,
        progress_bar: bool = False,
    ) -> None:
        # `type`, since True is an instance of int.
        if every_n_steps is not None and (type(every_n_steps) is not int or every_n_steps < 1):
            raise ValueError(f"every_n_steps={every_n_steps!r} must be a positive whole number, or None")
        self.every_n_steps = every_n_steps
        self.per_layer = per_layer
        self.activations = activations
        self.histograms = histograms
        self.prefix = prefix
        self.progress_bar = progress_bar
        self._start: dict[str, Any] | None = None
        self._module: weakref.ref[LightningModule] | None = None
        self._trainer: weakref.ref[Trainer] | None = None
        self._fit: _Fit | None = None
        self._warned_unseen = False
        self._needs_logger = True
        self._is_of_baseline = False
        self._failed: set[str] = set()
        self._wraps: list[NextCall] = []
        adopt(BatchNormMonitor)  # pytorch_lightning may have been imported since the class was made

    @classmethod
    def by_default(cls) -> BatchNormMonitor:
        """Make a monitor that the user has not asked for: it does not warn if the Trainer has no logger.

        Returns:
            The monitor with default settings.
        """
        monitor = cls()
        monitor._needs_logger = False
        return monitor

    @property
    def is_asked_for(self) -> bool:
        """Whether the user made this monitor, rather than a callback by default."""
        return self._needs_logger

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._close()  # an earlier fit may have ended without teardown
        self._trainer = weakref.ref(trainer)
        self._wraps += self._compare_ranks(trainer)
        if self._module is None or self._module() is not pl_module:
            self._start = None  # another model has another start to measure drift from

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # RevisitedBatchNorm does not call this hook of its own monitor; beside that callback, its settings are logged.
        self._is_of_baseline = not _is_revisited(trainer)
        if self._is_of_baseline:
            self._wraps += hyperparameters.announce(trainer, BASELINE_SETTINGS, type(self).__name__)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name = type(self).__name__
        if self._is_of_baseline:
            hyperparameters.log(trainer, BASELINE_SETTINGS, name)
        if not trainer.loggers:
            if self._needs_logger:
                rank_zero_warn(f"{name}: the Trainer has no logger, so per-layer batch norm statistics are not logged")
        elif self.histograms and not _with_histograms(trainer):
            rank_zero_warn(f"{name}: histograms need a TensorBoardLogger or a WandbLogger, and the Trainer has neither")
        self._module = weakref.ref(pl_module)
        self._begin(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = stepped_batches(trainer)
        due = self._is_due(trainer, step)
        # Layers may be added or replaced while training.
        if due and (self._fit is None or self._fit.layers != _layers_of(pl_module)):
            self._begin(trainer, pl_module)
        if self._fit is None:
            return
        if due and step != self._fit.last_step:  # once per step: accumulated batches share it
            self._fit.last_step = step
            self._fit.event = self._measure(trainer, self._fit, step)
            if self._fit.metric is None:
                self._finish(trainer, self._fit)
        self._fit.hook()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._fit is not None and self._fit.event is not None:
            self._fit.unhook()
            # With accumulated gradients, the event needs the activations of every batch of the step.
            if not accumulates(trainer, batch_idx):
                self._finish(trainer, self._fit, has_run=True)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._fit is not None:  # a user's hook may have skipped the last batch and its on_train_batch_end
            self._fit.unhook()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._fit is not None:  # an event may still wait for a skipped batch
            self._finish(trainer, self._fit)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Another Trainer may validate or test with the same callback in the middle of a fit.
        if stage == "fit" and self._trainer is not None and self._trainer() is trainer:
            self._close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    @override
    def _compared(self, trainer: Trainer) -> dict[str, Any]:
        return {name: getattr(self, name) for name in COMPARED}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._start is None else {"start": self._start}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._start = state_dict.get("start")

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the module, its parameters and hooks, which belong to this process."""
        return {**self.__dict__, "_module": None, "_trainer": None, "_fit": None, "_wraps": []}

    def _close(self) -> None:
        """Release everything that a fit holds."""
        self._trainer = None
        while self._wraps:
            self._wraps.pop().undo()
        self._is_of_baseline = False
        if self._fit is not None:
            self._fit.unhook()
            self._fit = None

    def _is_due(self, trainer: Trainer, step: int) -> bool:
        if self.every_n_steps is None:
            return is_logging_step(trainer)
        return step % self.every_n_steps == 0

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the layers and the values that drift is measured from; with lazy layers, wait for a later event."""
        self._fit = None
        records = self._measurable(find_batch_norms(pl_module))
        if any(record.state == "lazy" for record in records):
            return
        with gathered(trainer.strategy.model or pl_module):
            try:
                statistics = AffineStatistics(records, self._start, self.prefix)
            except ValueError as error:
                rank_zero_warn(f"{type(self).__name__}: drift starts again from the present values, since {error}")
                statistics = AffineStatistics(records, prefix=self.prefix)
            self._start = statistics.state_dict()
        metric = NormalizedActivations(len(records)).to(pl_module.device) if self.activations and records else None
        self._fit = _Fit(_layers_of(pl_module), records, statistics, metric)
        layers = [record.name for record in records]
        layout = scalar_layout(self.prefix, layers, activations=self.activations, per_layer=self.per_layer)
        for logger in trainer.loggers:
            if records and isinstance(logger, twins(TensorBoardLogger)):
                with self._failures_told(logger):
                    cast("Any", logger).experiment.add_custom_scalars(layout)

    def _measure(self, trainer: Trainer, fit: _Fit, step: int) -> _Event:
        """Measure scales and shifts at a logging step."""
        # Every rank measures, though only rank 0 logs: gathering sharded parameters is a collective.
        with gathered(trainer.strategy.model or trainer.lightning_module):
            # Without a logger, only callbacks read the metrics, and they get the metrics of the whole model.
            metrics = fit.statistics.compute(per_layer=self.per_layer and bool(trainer.loggers))
            histograms = fit.statistics.histograms() if self.histograms else {}
        scales = [record.scale for record in fit.records if record.scale is not None]
        rates = [rate for optimizer in trainer.optimizers for rate in scale_learning_rates(optimizer, scales)]
        fast = [rate for optimizer in trainer.optimizers for rate in shift_learning_rates(optimizer, ())]
        for quantity, found in ((SCALE_LR, rates), (SHIFT_LR, fast)):
            if found:
                metrics[metric_key(self.prefix, "", quantity)] = sum(found) / len(found)
        return _Event(step, trainer.current_epoch, metrics, histograms)

    def _measurable(self, records: Sequence[BatchNormRecord]) -> list[BatchNormRecord]:
        """Leave out the layers whose scale FSDP1 has made part of a flat parameter."""
        measurable = [record for record in records if not is_flattened(record.module)]
        flattened = len(records) - len(measurable)
        if flattened:
            rank_zero_warn(
                f"{type(self).__name__}: {flattened} batch norm layers are not measured: FSDP made their scales parts "
                "of flat parameters; wrap with use_orig_params=True"
            )
        return measurable

    def _finish(self, trainer: Trainer, fit: _Fit, has_run: bool = False) -> None:
        """Log the waiting event, if any; `has_run` tells that batches went through the network for it."""
        event, fit.event = fit.event, None
        if event is None:
            return
        metrics = event.metrics
        if fit.metric is not None:
            activations = self._activation_metrics(fit.records, fit.metric)
            metrics = metrics | activations
            if has_run and not activations and not self._warned_unseen:
                self._warned_unseen = True
                rank_zero_warn(
                    f"{type(self).__name__}: no batch norm layer was seen at work, so there are no activations to log; "
                    "layers inside torch.compile and torch.func transforms cannot be seen"
                )
        if metrics:  # without batch norm layers, a logger would get rows with nothing but the step
            for logger in trainer.loggers:
                with self._failures_told(logger):
                    _log(logger, replace(event, metrics=metrics))
        whole_model = (metric_key(self.prefix, "", quantity) for quantity in WHOLE_MODEL_QUANTITIES)
        summary = {key: metrics[key] for key in whole_model if key in metrics}
        shown = metric_key(self.prefix, "", SCALE_MEAN)  # a progress bar has room for a single number
        publish(trainer, summary, in_progress_bar=(shown,) if self.progress_bar and shown in summary else ())

    @contextmanager
    def _failures_told(self, logger: Logger) -> Generator[None, None, None]:
        """Let training go on if a logger fails on the monitor's keys; warn once per kind of logger."""
        try:
            yield
        except Exception as error:  # such as a service that is down, or a full disk
            name = type(logger).__name__
            if name not in self._failed:
                self._failed.add(name)
                rank_zero_warn(
                    f"{type(self).__name__}: {name} did not take the batch norm metrics, and training goes on without "
                    f"them. This is said once. It says: {type(error).__name__}: {shortened(error, 300)}"
                )

    def _activation_metrics(
        self, records: Sequence[BatchNormRecord], metric: NormalizedActivations
    ) -> dict[str, float]:
        """Return the activation metrics since the event began, reduced across ranks, and reset them."""
        computed = metric.compute()
        metric.reset()
        layers = [record.name for record in records] if self.per_layer else []
        rows = cast("list[tuple[float, float]]", torch.stack([*computed], dim=1).tolist())  # pyright: ignore[reportUnknownMemberType] # torch does not type it
        result: dict[str, float] = {}
        for layer, (absmax, over_3) in [*zip(layers, rows, strict=False), ("", rows[-1])]:
            if not math.isnan(over_3):  # NaN: this step did not use the layer
                result[metric_key(self.prefix, layer, NORMALIZED_ABSMAX)] = absmax
                result[metric_key(self.prefix, layer, NORMALIZED_OVER_3)] = over_3
        return result


adopt(BatchNormMonitor)
save_by_arguments(BatchNormMonitor)


def _is_revisited(trainer: Trainer) -> bool:
    """Tell whether an enabled RevisitedBatchNorm takes part in the run."""
    from lightning_revbn.callbacks.revisited import RevisitedBatchNorm  # that module imports this module

    return any(isinstance(callback, RevisitedBatchNorm) and callback.enabled for callback in callbacks_of(trainer))


def _layers_of(module: LightningModule) -> list[int]:
    """Return the ids of batch norm layers; every event compares them to find added, replaced or removed layers."""
    return [id(layer) for layer in module.modules() if isinstance(layer, (BatchNormBase, InputBatchNorm))]


def _with_histograms(trainer: Trainer) -> bool:
    return any(isinstance(logger, (*twins(TensorBoardLogger), *twins(WandbLogger))) for logger in trainer.loggers)


def _log(logger: Logger, event: _Event) -> None:
    """Pass an event to a logger, with histograms if the logger takes them."""
    metrics: dict[str, Any] = {**event.metrics, "epoch": event.epoch}
    for key, values in event.histograms.items():
        # No bin holds infinity or NaN: np.histogram, which W&B calls, raises on them.
        finite = values[np.isfinite(values)]
        if not finite.size:
            continue
        if isinstance(logger, twins(TensorBoardLogger)):
            cast("Any", logger.experiment).add_histogram(key, finite, event.step)
        elif isinstance(logger, twins(WandbLogger)):
            wandb: Any = import_module("wandb")  # an optional dependency, which a WandbLogger proves to be there
            metrics[key] = wandb.Histogram(finite)
    logger.log_metrics(metrics, step=event.step)
