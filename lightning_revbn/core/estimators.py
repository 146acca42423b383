"""Chooses the mean and variance that each mode normalises by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_revbn.core.input_settings import InputNorm
from lightning_revbn.core.input_statistics import LearnedStatistics
from lightning_revbn.core.moments import Kind, Moments

__all__ = ["Estimate", "Estimator", "estimator_of"]


class Estimate(NamedTuple):
    """The mean and variance to normalise a batch by, in units of the input range; float64, shape `(C,)` each.

    Attributes:
        mean: The mean.
        rest: The part of the mean that rounding has lost.
        variance: The variance.
    """

    mean: Tensor
    rest: Tensor
    variance: Tensor

    @classmethod
    def of(cls, found: Moments, unit: float) -> Estimate:
        """Return the mean and variance of raw values, in units of the range."""
        scaled = found.scaled(unit)
        return cls(scaled.mean, scaled.rest, scaled.variance)

    def to(self, device: torch.device) -> Estimate:
        """Return the estimate on a device."""
        return Estimate(*(column.to(device) for column in self))


class Estimator(Protocol):
    """The way in which a mode uses the statistics."""

    @property
    def learns(self) -> bool:
        """Whether training batches change the statistics."""
        ...

    @property
    def momentum(self) -> float | None:
        """Weight of the newest batch in the moving average; None without a moving average."""
        ...

    def estimate(self, learned: LearnedStatistics, unit: float, batch: Moments | None) -> Estimate | None:
        """Return the estimate to normalise by.

        Args:
            learned: The statistics of all training batches, in raw units, the present batch included.
            unit: The divisor of raw values.
            batch: The moments of the present training batch, in raw units; None in evaluation.

        Returns:
            The estimate; None before the first statistics.
        """
        ...

    def adopt(self, learned: LearnedStatistics, mode: str) -> LearnedStatistics:
        """Convert saved statistics for this mode.

        Args:
            learned: The saved statistics.
            mode: The mode that saved them.

        Returns:
            The statistics that this mode goes on with.
        """
        ...


class _Everything:
    """Mode `"running"`: everything seen so far."""

    learns = True
    momentum: float | None = None

    def estimate(self, learned: LearnedStatistics, unit: float, batch: Moments | None) -> Estimate | None:
        return None if learned.kind is Kind.UNKNOWN else Estimate.of(learned.total, unit)

    def adopt(self, learned: LearnedStatistics, mode: str) -> LearnedStatistics:
        nothing = Moments.of_nothing(len(learned.total.count))
        return LearnedStatistics(learned.kind, learned.total, nothing, learned.samples)


class _Batch(_Everything):
    """Mode `"batch"`: the global batch in training, everything seen so far in evaluation."""

    def estimate(self, learned: LearnedStatistics, unit: float, batch: Moments | None) -> Estimate | None:
        total = super().estimate(learned, unit, None)
        if total is None or batch is None:
            return total
        # A single value has no spread: its channel is standardised by everything seen so far.
        lonely = batch.count <= 1
        pairs = zip(Estimate.of(batch, unit), total, strict=True)
        return Estimate(*(torch.where(lonely, of_all, of_batch) for of_batch, of_all in pairs))


@dataclass(frozen=True)
class _Average:
    """Mode `"ema"`: an exponential moving average; it begins from the total of another mode."""

    momentum: float | None
    learns: bool = True

    def estimate(self, learned: LearnedStatistics, unit: float, batch: Moments | None) -> Estimate | None:
        return None if learned.kind is Kind.UNKNOWN else Estimate.of(learned.average, unit)

    def adopt(self, learned: LearnedStatistics, mode: str) -> LearnedStatistics:
        return learned if mode == "ema" else learned.averaging_all()


class _Fixed:
    """Mode `"fixed"`: given constants alone."""

    learns = False
    momentum: float | None = None

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self._mean, self._std = (torch.tensor(given, dtype=torch.float64) for given in (mean, std))

    def estimate(self, learned: LearnedStatistics, unit: float, batch: Moments | None) -> Estimate | None:
        return Estimate(self._mean, torch.zeros_like(self._mean), self._std.square())

    def adopt(self, learned: LearnedStatistics, mode: str) -> LearnedStatistics:
        return LearnedStatistics.of_nothing(len(self._mean))


def estimator_of(settings: InputNorm) -> Estimator:
    """Return the estimator of the mode.

    Args:
        settings: The settings.

    Returns:
        The estimator.
    """
    if settings.mode == "fixed" and settings.mean is not None and settings.std is not None:
        return _Fixed(settings.mean, settings.std)
    if settings.mode == "ema":
        return _Average(settings.momentum)
    return _Batch() if settings.mode == "batch" else _Everything()
