"""Logs how the scales and shifts of batch norm layers develop, for a baseline run as well as a revisited one."""

# pyright: reportPrivateImportUsage=false
# Lightning's documented homes of rank_zero_warn re-exports it without saying so.

from __future__ import annotations

import weakref
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_revbn.core.layers import find_batch_norms
from lightning_revbn.core.statistics import AffineStatistics
from lightning_revbn.core.update_rule import scale_learning_rates


class BatchNormMonitor(Callback):
    """Log statistics of the scale and shift of every batch norm layer while training.

    Keys, with the dotted name of the layer: `revbn/{layer}/scale_mean`, `scale_std`, `scale_min`, `scale_max`,
    `scale_drift`, the same for `shift_`; for the whole model `revbn/scale_mean`, `revbn/scale_drift`,
    `revbn/shift_drift` and `revbn/scale_lr`, the learning rate that the scales are updated with (the mean over
    parameter groups where they differ). Drift is the root mean square distance from the value at the start of
    training; a resumed run goes on measuring from there. The keys of the whole model are in
    `trainer.callback_metrics` too, for ModelCheckpoint and EarlyStopping.

    Values are those before the step they are logged at, on the step axis of Lightning's LearningRateMonitor. In a model
    with lazy layers everything starts with the first event after they were made.

    Args:
        every_n_steps: How many optimizer steps between two events, the first at step 0. None takes the Trainer's
            `log_every_n_steps` and Lightning's own steps, the first of which is `log_every_n_steps - 1`.
        per_layer: Whether to log single layers, or the whole model only.
        prefix: First part of every key.

    Raises:
        ValueError: If `every_n_steps` is not a positive whole number.

    Example::

        trainer = Trainer(callbacks=[BatchNormMonitor()])
    """

    def __init__(self, every_n_steps: int | None = None, per_layer: bool = True, *, prefix: str = "revbn") -> None:
        if every_n_steps is not None and (isinstance(every_n_steps, bool) or every_n_steps < 1):
            raise ValueError(f"every_n_steps={every_n_steps!r} must be a positive whole number, or None")
        self.every_n_steps = every_n_steps
        self.per_layer = per_layer
        self.prefix = prefix
        self._start: dict[str, Any] | None = None
        self._statistics: AffineStatistics | None = None
        self._scales: list[torch.Tensor] = []
        self._module: weakref.ref[LightningModule] | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and (self._module is None or self._module() is not pl_module):
            self._start = None  # another model: what its drift is measured from is not known yet

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.loggers:
            rank_zero_warn(
                f"{type(self).__name__}: the Trainer has no logger, so per-layer batch norm statistics are not logged"
            )
        self._module = weakref.ref(pl_module)
        self._begin(pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # pyright: ignore[reportPrivateUsage] # the step axis of LearningRateMonitor
        if not self._is_due(trainer, step):
            return
        if self._statistics is None:
            self._begin(pl_module)
        if self._statistics is None:
            return
        metrics = self._statistics.compute(per_layer=self.per_layer and bool(trainer.loggers))
        rates = [rate for optimizer in trainer.optimizers for rate in scale_learning_rates(optimizer, self._scales)]
        if rates:
            metrics["scale_lr"] = sum(rates) / len(rates)
        metrics = {f"{self.prefix}/{key}": value for key, value in metrics.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
        summary = {key: value for key, value in metrics.items() if key.count("/") == self.prefix.count("/") + 1}
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in summary.items()})

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._statistics = None
        self._scales = []

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._start is None else {"start": self._start}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._start = state_dict.get("start")

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what belongs to this process: the module that was seen and its parameters."""
        return {**self.__dict__, "_module": None, "_statistics": None, "_scales": []}

    def _begin(self, pl_module: LightningModule) -> None:
        """Note the layers and where their drift is measured from; lazy layers are waited for."""
        records = find_batch_norms(pl_module)
        if any(record.state == "lazy" for record in records):
            return
        self._scales = [record.scale for record in records if record.scale is not None]
        try:
            self._statistics = AffineStatistics(records, self._start)
        except ValueError as error:
            rank_zero_warn(f"{type(self).__name__}: drift starts again from the present values, since {error}")
            self._statistics = AffineStatistics(records)
        self._start = self._statistics.state_dict()

    def _is_due(self, trainer: Trainer, step: int) -> bool:
        if self.every_n_steps is None:
            return bool(trainer._logger_connector.should_update_logs)  # pyright: ignore[reportPrivateUsage] # no public name
        return step % self.every_n_steps == 0
