"""Does the work of input normalisation that is due per fit, logging step and epoch: settles the scale, logs, warns."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from typing_extensions import override

from lightning_revbn.callbacks.revisited import RevisitedBatchNorm
from lightning_revbn.core.input_norm import RELU_STD, OnlineStandardizer
from lightning_revbn.core.joint_training import InputParts
from lightning_revbn.core.rank_settings import RankSettings
from lightning_revbn.data.input_report import InputReport
from lightning_revbn.data.input_set import InputSet, NamedInput
from lightning_revbn.data.other_views import on_other_views
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

_GOES_ON = (
    "{name}: the statistics of the {label} begin with {samples} samples that were measured before{frozen}. "
    "reset_input_statistics() forgets them, for another fold or other data"
)
_BYPASSED = (
    "{name} normalises the input of its own data loaders alone: batches of the loaders that were handed to the Trainer "
    "reach the network as they are. Hand over datamodule={name}, or put its export_normalizer() in front of the network"
)


class InputFit(Callback):
    """Serves a DataModule in a Trainer; it adds itself to the Trainer's callbacks at the first batch.

    Args:
        trainer: The Trainer.
        data: The DataModule.
        inputs: The inputs of the DataModule.
        home: Sends the statistics to the process that spawned this process.
    """

    def __init__(self, trainer: Trainer, data: LightningDataModule, inputs: InputSet, home: SharedStatistics) -> None:
        # Weak references, since the Trainer and the DataModule refer to this object.
        self._trainer, self._data = weakref.ref(trainer), weakref.ref(data)
        self._owner = type(data).__name__
        self._inputs = inputs
        self._reports = [InputReport(self._owner, one) for one in inputs.inputs]
        self._home = home
        self._is_training = False
        self._hooked = False
        self._step: int | None = None
        self._looked_at: set[object] = set()
        self._is_told = False
        # The Trainer gets a new list: the user's list may go to another Trainer, which must not get this callback.
        setattr(trainer, "callbacks", [*callbacks_of(trainer), self])  # noqa: B010 # not typed, as in `callbacks_of`

    def __reduce__(self) -> Any:
        """Pickle as a callback that does nothing, since the process of the copied Trainer makes its own."""
        return Callback, ()

    def is_of(self, trainer: Trainer) -> bool:
        """Tell whether this object serves a Trainer, and is still among its callbacks."""
        return self._trainer() is trainer and any(callback is self for callback in callbacks_of(trainer))

    def before_batch(self, trainer: Trainer) -> None:
        """Settle the scale before the first batch; before the first training batch of a fit, check and inform too.

        Args:
            trainer: The Trainer.

        Raises:
            MisconfigurationException: If ranks have different settings, or the DataModule's `state_dict` drops the
                statistics.
        """
        self._hooked = True
        if trainer.training and not self._is_training:
            self._is_training, self._step = True, None
            for report in self._reports:
                # A fault in another input may have ended an earlier fit. The device has left out that batch here too,
                # and the host may have counted it.
                learner = report.online.learner
                learner.freeze.count(learner.learned.samples)
            _refuse_other_ranks(self._owner, self._inputs)
            data = self._data()
            if data is not None and STATE_NAME not in data.state_dict():
                raise MisconfigurationException(f"{self._owner}.state_dict must keep what super().state_dict() returns")
            for one in self._inputs.inputs:
                _settle_and_tell(self._owner, one, trainer)
        for report in self._reports:
            if not report.online.knows_scale:
                _settle_scale(report.online, trainer)
            report.on_scale()

    def look_at(self, trainer: Trainer, batch: Any) -> None:
        """Warn of tensors that look like the input and stay raw, in the first batch of each stage.

        Args:
            trainer: The Trainer.
            batch: The raw batch.
        """
        stage = trainer.state.stage
        if stage not in self._looked_at and len(self._reports) == 1:
            self._looked_at.add(stage)
            settings = self._reports[0].source.settings
            text = on_other_views(batch, settings, is_training=trainer.training)
            if text is not None:
                self._reports[0].tell("views", text)

    def after_batch(self, trainer: Trainer, inputs: Sequence[InputParts]) -> None:
        """Log the statistics at logging steps, once a step even if it has several batches, and warn of the data.

        Args:
            trainer: The Trainer, while training.
            inputs: The parts of each input in the batch.
        """
        known = [
            (report, own) for report, own in zip(self._reports, inputs, strict=True) if report.online.has_statistics
        ]
        if not known:
            return
        step = stepped_batches(trainer)
        is_due = is_logging_step(trainer) and step != self._step
        if is_due:
            self._step = step
            metrics: dict[str, float] = {}
            for report, _ in known:
                metrics |= report.metrics()
            publish(trainer, metrics)
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)
        for report, own in known:
            for values, _ in own.parts:
                report.on_dtype(values.dtype)
            # On an accelerator the host would wait for the statistics, so there the data are judged at logging steps
            # only, where the host waits anyway.
            if is_due or not own.parts or own.parts[0].values.device.type == "cpu":
                report.advise()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for report in self._reports:
            report.source.check()
            if self._is_training and report.online.has_statistics:
                report.advise(is_end=True)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_training:
            self._is_training = False
            self._home.send(trainer, self._inputs.state_dict())

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._is_training = False

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for report in self._reports:
            report.online.compare_again()

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
        """Warn if a batch reached the network without passing the DataModule's hook."""
        if not self._hooked and getattr(trainer, "datamodule", None) is self._data():
            if not self._is_told:
                rank_zero_warn(_BYPASSED.format(name=self._owner))
            self._is_told = True
        self._hooked = False


def _refuse_other_ranks(name: str, inputs: InputSet) -> None:
    """Raise if ranks have different settings or statistics; each rank waits for all others.

    Raises:
        MisconfigurationException: On every rank, if so.
    """
    comparison = RankSettings.open("input_norm")
    if comparison is None:
        return
    parts: dict[str, dict[str, Any]] = {}
    for one in inputs.inputs:
        parts[f"InputNorm of {one.label}" if one.name else "InputNorm"] = asdict(one.settings)
        parts[f"statistics of the {one.label}"] = _rounded(one.online)
    comparison.post(parts)
    comparison.wait()
    differences = comparison.differences()
    if differences:
        raise MisconfigurationException(
            f"{name}: ranks normalise the input by different settings: {'; '.join(differences)}. They would train "
            "different networks, or wait for each other without end. Give every rank the same InputNorm, and the same "
            "statistics if there are any: call collect_input_statistics() in setup(), where ranks share the pass"
        )


def _rounded(online: OnlineStandardizer) -> dict[str, Any]:
    """Return values that are equal on ranks with the same statistics up to rounding."""
    found: dict[str, Any] = {"frozen": online.is_frozen}
    if online.learns and online.has_statistics:
        statistics = online.statistics()
        # The mean is left out: near 0 all its digits may be rounding. Other data differ in count or spread as well.
        found["count"] = statistics.count.tolist()  # pyright: ignore[reportUnknownMemberType] # torch does not type it
        found["std"] = [f"{value:.6g}" for value in statistics.std]
    return found


def _settle_and_tell(name: str, one: NamedInput, trainer: Trainer) -> None:
    """Settle the scale of an input before its first training batch, and inform of scale and earlier statistics."""
    online, label = one.online, one.label
    origin = _settle_scale(online, trainer)
    rank_zero_info(f"{name}: the standardised {label} is multiplied by {online.scale:g} ({origin})")
    if online.learns and online.has_statistics:
        frozen = ", and are frozen" if online.is_frozen else ""
        rank_zero_info(_GOES_ON.format(name=name, label=label, samples=online.samples, frozen=frozen))


def _settle_scale(online: OnlineStandardizer, trainer: Trainer) -> str:
    """Set the scale of the settings, and return its origin in words."""
    if online.settings.scale != "auto":
        return "InputNorm(scale=...)"
    scale, origin = _automatic_scale(trainer)
    online.set_scale(scale)
    return origin


def _automatic_scale(trainer: Trainer) -> tuple[float, str]:
    """Return the scale of the input for the callback of a Trainer, and its origin in words."""
    ours = (found for found in callbacks_of(trainer) if isinstance(found, RevisitedBatchNorm))
    callback = next((found for found in ours if found.enabled), None)
    scale = None if callback is None else _first_scale(callback)
    if scale is None:
        return RELU_STD, f"{RELU_STD}, as there is no RevisitedBatchNorm in the Trainer"
    return RELU_STD * scale, f"{RELU_STD} times the scale {scale:g} of RevisitedBatchNorm"


def _first_scale(callback: RevisitedBatchNorm) -> float | None:
    """Return g; from a mapping, the scale of the first layer that has a scale and is not an `InputBatchNorm`."""
    if not isinstance(callback.scale, Mapping):
        return callback.scale
    return next(
        (record.target for record in callback.report.records if record.target and record.state != "input"), None
    )
