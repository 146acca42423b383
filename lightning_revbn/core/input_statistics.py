"""What training batches have told about the input, as plain tensors that a checkpoint can hold."""

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
        count: How many values they are of, float64, shape `(C,)`; 0 for given constants.

    A channel that `InputNorm(channels=...)` leaves alone has mean 0, std 1 and count 0.
    """

    mean: Tensor
    std: Tensor
    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride] # the design's name; nobody counts in it

    def of(self, channels: Sequence[int] | None) -> InputStatistics:
        """Return the statistics of some channels; of all for None."""
        return self if channels is None else InputStatistics(*(column[[*channels]] for column in self))

    def fit_range(self) -> bool:
        """Tell whether the values can be floating-point numbers from 0 to 1, give or take some augmentation."""
        return bool(((self.mean > -0.5) & (self.mean < 1.5) & (self.std < 0.75)).all())


class MissingStatisticsError(RuntimeError):
    """There are no statistics yet."""


@dataclass(frozen=True)
class LearnedStatistics:
    """The statistics of all training batches so far, in raw units.

    Attributes:
        kind: What sort of numbers the batches are made of; unknown before the first.
        total: The moments of all values.
        average: The moving average over batches, its count the weight: 1 once the start of the average is forgotten.
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
            batch: What all ranks know of the batch.
            momentum: Weight of the batch in the moving average; None leaves the average alone.

        Returns:
            The statistics.
        """
        average = self.average
        if momentum is not None:
            newest = torch.where(batch.moments.count > 0, momentum, 0.0)
            # Merged with these weights, the variance between batches is in the average too.
            average = average.weighing((1 - newest) * average.count).merge(batch.moments.weighing(newest))
        return LearnedStatistics(batch.kind, self.total.merge(batch.moments), average, self.samples + batch.samples)

    def averaging_all(self) -> LearnedStatistics:
        """Return the statistics with a moving average that begins from all values so far."""
        seen = (self.total.count > 0).double()
        return LearnedStatistics(self.kind, self.total, self.total.weighing(seen), self.samples)

    def where(self, condition: Tensor, other: LearnedStatistics) -> LearnedStatistics:
        """Return these statistics where a boolean scalar is true, else the others; the host does not wait for it."""
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return self.with_tensors(*(torch.where(condition, own, foreign) for own, foreign in pairs))

    def to(self, device: torch.device) -> LearnedStatistics:
        """Return the statistics on a device: these, if they are there."""
        if self.samples.device == device:
            return self
        return self.with_tensors(*(tensor.to(device) for tensor in self.tensors()))

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all tensors: those of the total, those of the average, and the samples."""
        return (*self.total.astuple(), *self.average.astuple(), self.samples)

    def with_tensors(self, *tensors: Tensor) -> LearnedStatistics:
        """Return statistics of the same kind with other tensors, in the order of `tensors`."""
        return LearnedStatistics(self.kind, Moments(*tensors[:4]), Moments(*tensors[4:8]), tensors[8])
