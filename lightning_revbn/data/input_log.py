"""Logs the input statistics while training, and warns of data that ought to be handed over in another way."""

from __future__ import annotations

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_revbn.core.input_norm import OnlineStandardizer
from lightning_revbn.core.metric_keys import input_key
from lightning_revbn.lightning_compat import is_logging_step, publish, rank_zero_warn, stepped_batches

__all__ = ["InputLog"]

_SINGLE_CHANNELS = 16
"""Up to how many channels single ones are logged too."""


class InputLog:
    """What was logged and said of the input in a fit.

    Args:
        owner: Name of the DataModule's class, for warnings.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._step: int | None = None
        self._advised = False

    def begin(self) -> None:
        """Start a fit, or go on from a checkpoint."""
        self._step = None

    def after_batch(self, trainer: Trainer, online: OnlineStandardizer, values: Tensor) -> None:
        """Log the statistics at logging steps, once however many batches a step has, and warn where it is due.

        Args:
            trainer: The Trainer, while training.
            online: The standardiser, which has seen the batch.
            values: The raw input of the batch.
        """
        if not online.has_statistics:
            return
        first = self._step is None
        step = stepped_batches(trainer)
        is_due = is_logging_step(trainer) and step != self._step
        self._step = step if is_due else -1 if first else self._step
        if is_due:
            online.check(values)
            metrics = _metrics(online)
            publish(trainer, metrics)
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)
        if first:
            self._warn_of_lost_channels(online, values)
        # On an accelerator the answer waits for the device, so it is asked for at logging steps alone.
        if not self._advised and (is_due or values.device.type == "cpu"):
            self._advise(online)

    def _warn_of_lost_channels(self, online: OnlineStandardizer, values: Tensor) -> None:
        lost = online.lost_channels(values.dtype)
        if lost:
            rank_zero_warn(
                f"{self._owner}: {values.dtype} cannot hold the spread of the input in channels {lost}, whose mean is "
                "too large. Hand it over as integers, or train with a mixed precision, which leaves it in float32"
            )

    def _advise(self, online: OnlineStandardizer) -> None:
        answer = online.looks_normalized()
        self._advised = answer is not None
        if answer:
            rank_zero_warn(
                f"{self._owner}: the input has mean 0 and standard deviation 1 already. Normalising it again does no "
                "harm, but one in the data set is not needed any more, and the statistics are not those of raw data"
            )


def _metrics(online: OnlineStandardizer) -> dict[str, float]:
    statistics, prefix = online.statistics(), online.settings.prefix
    metrics: dict[str, float] = {}
    for name, values in (("mean", statistics.mean), ("std", statistics.std)):
        metrics[input_key(prefix, name)] = values.mean().item()
        if 1 < len(values) <= _SINGLE_CHANNELS:
            metrics |= {input_key(prefix, f"{name}_{channel}"): value.item() for channel, value in enumerate(values)}
    return metrics
