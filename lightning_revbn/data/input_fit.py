"""What a DataModule with input normalisation does once a fit, at logging steps and at the end of an epoch."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_revbn.callbacks.revisited import RevisitedBatchNorm
from lightning_revbn.core.input_advice import on_half_precision, on_normalized_data, on_small_features
from lightning_revbn.core.input_norm import RELU_STD, InputNorm, OnlineStandardizer
from lightning_revbn.core.metric_keys import input_key
from lightning_revbn.core.rank_settings import RankSettings
from lightning_revbn.data.saved_statistics import STATE_NAME
from lightning_revbn.data.spawned_statistics import SharedStatistics
from lightning_revbn.lightning_compat import (
    MisconfigurationException,
    callbacks_of,
    is_logging_step,
    publish,
    rank_zero_info,
    rank_zero_warn,
    stepped_batches,
)

__all__ = ["InputFit"]

_SINGLE_CHANNELS = 16
"""Up to how many channels single ones are logged too."""
_ENOUGH = 256
"""After how many samples the statistics tell what the data are like; the end of an epoch is enough too."""
_OTHER_SCALE = (
    "{name}: the checkpoint was made with an input scale of {loaded:g}, this run has {scale:g}. From here on this "
    "run's applies."
)
_BYPASSED = (
    "{name} normalises the input of its own data loaders alone: batches of the loaders that were handed to the Trainer "
    "reach the network as they are. Hand over datamodule={name}, or put its export_normalizer() in front of the network"
)


class InputFit(Callback):
    """What one DataModule does with one Trainer; it stands among the Trainer's callbacks from the first batch on.

    Args:
        trainer: The Trainer.
        data: The DataModule.
        online: Its standardiser.
        home: Takes what is learned to the process that spawned this one.
    """

    def __init__(
        self, trainer: Trainer, data: LightningDataModule, online: OnlineStandardizer, home: SharedStatistics
    ) -> None:
        self._trainer, self._data = weakref.ref(trainer), weakref.ref(data)
        self._owner = type(data).__name__
        self._online = online
        self._home = home
        self._is_training = False
        self._hooked = False
        self._step: int | None = None
        self._told: set[object] = set()
        # The user's own list stays as it is, since it may go to another Trainer.
        setattr(trainer, "callbacks", [*callbacks_of(trainer), self])  # noqa: B010 # not typed, as in `callbacks_of`

    def __reduce__(self) -> Any:
        """Leave a callback that does nothing in a copy of the Trainer, whose process makes its own."""
        return Callback, ()

    def is_of(self, trainer: Trainer) -> bool:
        """Tell whether this belongs to a Trainer, and stands among its callbacks."""
        return self._trainer() is trainer and any(callback is self for callback in callbacks_of(trainer))

    def before_batch(self, trainer: Trainer) -> None:
        """Settle the scale before the first batch, and what is due in a fit before its first training batch.

        Args:
            trainer: The Trainer.

        Raises:
            MisconfigurationException: If ranks have different settings, or checkpoints would lack the statistics.
        """
        self._hooked = True
        online = self._online
        if trainer.training and not self._is_training:
            self._is_training, self._step = True, None
            _refuse_other_ranks(self._owner, online.settings)
            data = self._data()
            if data is not None and STATE_NAME not in data.state_dict():
                raise MisconfigurationException(f"{self._owner}.state_dict must keep what super().state_dict() returns")
            origin = _settle_scale(online, trainer)
            rank_zero_info(f"{self._owner}: the standardised input is multiplied by {online.scale:g} ({origin})")
        elif not online.knows_scale:
            _settle_scale(online, trainer)
        loaded = None if online.saved is None else online.saved.scale
        if loaded not in (None, online.scale):
            told = _OTHER_SCALE.format(name=self._owner, loaded=loaded, scale=online.scale)
            self._tell(("scale", loaded, online.scale), told)

    def after_batch(self, trainer: Trainer, values: Tensor) -> None:
        """Log the statistics at logging steps, once however many batches a step has, and warn where it is due.

        Args:
            trainer: The Trainer, while training.
            values: The raw input of the batch.
        """
        online = self._online
        if not online.has_statistics:
            return
        first = self._step is None
        step = stepped_batches(trainer)
        is_due = is_logging_step(trainer) and step != self._step
        self._step = step if is_due else -1 if first else self._step
        if is_due:
            online.check()
            metrics = _metrics(online)
            publish(trainer, metrics)
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)
        if first and online.learns:
            self._tell("half", on_half_precision(online.statistics(), values.dtype))
        # On an accelerator the answer waits for the device, so it is asked for at logging steps alone.
        if is_due or values.device.type == "cpu":
            self._advise()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._online.check()
        if self._is_training and self._online.has_statistics:
            self._advise(is_end=True)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_training:
            self._is_training = False
            self._home.send(trainer, self._online.state_dict())

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._is_training = False

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._online.compare_again()

    on_test_start = on_predict_start = on_validation_start

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._warn_of_bypass(trainer)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._warn_of_bypass(trainer)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def _warn_of_bypass(self, trainer: Trainer) -> None:
        """Warn if a batch comes from a loader of which Lightning has not asked the DataModule."""
        if not self._hooked and getattr(trainer, "datamodule", None) is self._data():
            self._tell("bypassed", _BYPASSED.format(name=self._owner))
        self._hooked = False

    def _advise(self, *, is_end: bool = False) -> None:
        """Say what the data are like, as soon as enough were seen, or at the end of an epoch."""
        online = self._online
        if {"eps", "normalized"} <= self._told:
            return
        enough = not online.learns or online.samples >= _ENOUGH
        if (enough or is_end) and "eps" not in self._told:
            self._tell("eps", on_small_features(online.statistics(), online.settings.eps))
        if enough and "normalized" not in self._told:
            self._tell("normalized", on_normalized_data(online.statistics()) if online.is_float else None)

    def _tell(self, subject: object, text: str | None) -> None:
        """Warn of a subject once with one Trainer."""
        if text is not None and subject not in self._told:
            rank_zero_warn(text if text.startswith(self._owner) else f"{self._owner}: {text}")
        self._told.add(subject)


def _metrics(online: OnlineStandardizer) -> dict[str, float]:
    statistics, prefix = online.statistics(), online.settings.prefix
    metrics: dict[str, float] = {}
    for name, values in (("mean", statistics.mean), ("std", statistics.std)):
        metrics[input_key(prefix, name)] = values.mean().item()
        if 1 < len(values) <= _SINGLE_CHANNELS:
            metrics |= {input_key(prefix, f"{name}_{channel}"): value.item() for channel, value in enumerate(values)}
    return metrics


def _refuse_other_ranks(name: str, settings: InputNorm) -> None:
    """Raise if ranks normalise by different settings; each waits for all others here, as it does in every step.

    Raises:
        MisconfigurationException: If so, on every rank.
    """
    comparison = RankSettings.open("input_norm")
    if comparison is None:
        return
    comparison.post({"InputNorm": asdict(settings)})
    comparison.wait()
    differences = comparison.differences()
    if differences:
        raise MisconfigurationException(
            f"{name}: ranks normalise the input by different settings: {'; '.join(differences)}. They would train "
            "different networks, or wait for each other without end. Give every rank the same InputNorm"
        )


def _settle_scale(online: OnlineStandardizer, trainer: Trainer) -> str:
    """Take the scale that the settings ask for, and return in words where it is from."""
    if online.settings.scale != "auto":
        return "InputNorm(scale=...)"
    scale, origin = _automatic_scale(trainer)
    online.set_scale(scale)
    return origin


def _automatic_scale(trainer: Trainer) -> tuple[float, str]:
    """Return the scale of the input that suits the callback of a Trainer, and in words where it is from."""
    ours = (found for found in callbacks_of(trainer) if isinstance(found, RevisitedBatchNorm))
    callback = next((found for found in ours if found.enabled), None)
    scale = None if callback is None else _first_scale(callback)
    if scale is None:
        return RELU_STD, f"{RELU_STD}, as there is no RevisitedBatchNorm in the Trainer"
    return RELU_STD * scale, f"{RELU_STD} times the scale {scale:g} of RevisitedBatchNorm"


def _first_scale(callback: RevisitedBatchNorm) -> float | None:
    """Return g: of a mapping by name, that of the first layer which has one and is not an input layer itself."""
    if not isinstance(callback.scale, Mapping):
        return callback.scale
    return next(
        (record.target for record in callback.report.records if record.target and record.state != "input"), None
    )
