"""Holds the statistics of the input over all training batches, as plain tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_revbn.core.global_moments import GlobalBatch
from lightning_revbn.core.moments import Kind, Moments

__all__ = ["InputStatistics", "LearnedStatistics", "MissingStatisticsError"]


class InputStatistics(NamedTuple):
    """Statistics per channel in units of the input range: for uint8 in [0, 1], as torchvision's Normalize wants them.

    Attributes:
        mean: float64, shape `(C,)`.
        std: `sqrt(m2 / count)`, float64, shape `(C,)`.
        count: Number of values, float64, shape `(C,)`; 0 for given constants.

    A channel that `InputNorm(channels=...)` does not normalise has mean 0, std 1 and count 0.
    """

    mean: Tensor
    std: Tensor
    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride] # the design's name; nobody counts in it

    def of(self, channels: Sequence[int] | None) -> InputStatistics:
        """Return the statistics of the channels with these indices; None is all channels."""
        return self if channels is None else InputStatistics(*(column[[*channels]] for column in self))

    def fit_range(self) -> bool:
        """Tell whether the data may be floating-point numbers from 0 to 1, with a margin for augmentation."""
        return bool(((self.mean > -0.5) & (self.mean < 1.5) & (self.std < 0.75)).all())


class MissingStatisticsError(RuntimeError):
    """Statistics are needed, and no training batch was measured yet."""


@dataclass(frozen=True)
class LearnedStatistics:
    """The statistics of all training batches so far, in raw units.

    Attributes:
        kind: The kind of numbers in the batches; unknown before the first batch.
        total: The moments of all values.
        average: The moments of the moving average. Its count is the sum of the weights of all batches, which tends to
            1; dividing by it corrects the start of the average. 0 in modes without an average.
        samples: Number of samples of all ranks, a float64 scalar.
    """

    kind: Kind
    total: Moments
    average: Moments
    samples: Tensor

    @classmethod
    def of_nothing(cls, channels: int) -> LearnedStatistics:
        """Return the statistics before the first batch."""
        nothing = Moments.of_nothing(channels)
        return cls(Kind.UNKNOWN, nothing, nothing, torch.zeros((), dtype=torch.float64))

    def add(self, batch: GlobalBatch, momentum: float | None) -> LearnedStatistics:
        """Return the statistics with one more batch.

        Args:
            batch: The batch of all ranks.
            momentum: Weight of the batch in the moving average; None leaves the average unchanged.

        Returns:
            New statistics; these stay as they are.
        """
        average = self.average
        if momentum is not None:
            newest = torch.where(batch.moments.count > 0, momentum, 0.0)
            # An average of variances would lose the variance between batches. A merge with weights as counts keeps it.
            average = average.weighing((1 - newest) * average.count).merge(batch.moments.weighing(newest))
        return LearnedStatistics(batch.kind, self.total.merge(batch.moments), average, self.samples + batch.samples)

    def averaging_all(self) -> LearnedStatistics:
        """Return the statistics with a moving average that begins from all values so far."""
        seen = (self.total.count > 0).double()
        return LearnedStatistics(self.kind, self.total, self.total.weighing(seen), self.samples)

    def where(self, condition: Tensor, other: LearnedStatistics) -> LearnedStatistics:
        """Return these statistics if a boolean scalar is True, else the others, without a wait for the device."""
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return self.with_tensors(*(torch.where(condition, own, foreign) for own, foreign in pairs))

    def to(self, device: torch.device) -> LearnedStatistics:
        """Return the statistics on a device."""
        if self.samples.device == device:
            return self
        return self.with_tensors(*(tensor.to(device) for tensor in self.tensors()))

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all tensors: four of the total, four of the average, and the samples."""
        return (*self.total.astuple(), *self.average.astuple(), self.samples)

    def with_tensors(self, *tensors: Tensor) -> LearnedStatistics:
        """Return statistics of the same kind with other tensors, in the order of `tensors`."""
        return LearnedStatistics(self.kind, Moments(*tensors[:4]), Moments(*tensors[4:8]), tensors[8])
