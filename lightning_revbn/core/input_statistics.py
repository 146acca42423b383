"""What training batches have told about the input, as plain tensors that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lightning_revbn.core.moments import GlobalBatch, Kind, Moments

__all__ = ["InputStatistics", "LearnedStatistics", "MissingStatisticsError"]

_NAMES = ("count", "mean", "m2", "average_weight", "average_mean", "average_variance", "shift", "samples")
"""Names of the tensors in a state, in the order of `LearnedStatistics._tensors`."""


class InputStatistics(NamedTuple):
    """Statistics per channel in units of the input range: for uint8 in [0, 1], as torchvision's Normalize wants them.

    Attributes:
        mean: float64, shape `(C,)`.
        std: `sqrt(m2 / count)`, float64, shape `(C,)`.
        count: How many values they are of, float64, shape `(C,)`; 0 for given constants.
    """

    mean: Tensor
    std: Tensor
    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride] # the design's name; nobody counts in it

    def look_normalized(self) -> bool:
        """Tell whether every channel has about mean 0 and standard deviation 1."""
        return bool((self.mean.abs() < 0.25).all() and ((self.std > 0.8) & (self.std < 1.25)).all())

    def lost_channels(self, dtype: torch.dtype) -> list[int]:
        """List the channels whose spread is below two steps between neighbouring numbers of a dtype near the mean."""
        spacing = self.mean.abs() * torch.finfo(dtype).eps
        lost = (self.std < 2 * spacing) & (self.count > 1)
        return [channel for channel, is_lost in enumerate(cast("list[bool]", lost.tolist())) if is_lost]  # pyright: ignore[reportUnknownMemberType] # torch does not type it


class MissingStatisticsError(RuntimeError):
    """There are no statistics yet."""


@dataclass(frozen=True)
class _MovingAverage:
    """An exponential moving average of mean and variance, float64, shape `(C,)` each.

    `weight` is 1 once the start of the average is forgotten; until then its rest is missing from mean and variance.
    """

    weight: Tensor
    mean: Tensor
    variance: Tensor

    def astuple(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return weight, mean and variance."""
        return self.weight, self.mean, self.variance

    def add(self, batch: Moments, momentum: float) -> _MovingAverage:
        """Return the average with one more batch, the variance between batches included."""
        newest = torch.where(batch.count > 0, momentum, 0.0)
        weight = (1 - newest) * self.weight + newest
        # The share of the newest batch in what the average has seen: 1 for the first batch, momentum in the long run.
        share = torch.where(weight > 0, newest / weight, 0.0)
        moved = batch.mean - self.mean
        variance = (1 - share) * self.variance + share * batch.variance + share * (1 - share) * moved.square()
        return _MovingAverage(weight, self.mean + share * moved, variance)


@dataclass(frozen=True)
class LearnedStatistics:
    """The statistics of all training batches so far, in raw units.

    Attributes:
        kind: What sort of numbers the batches are made of; unknown before the first.
        shift: What was subtracted from the values before they were summed, float64, shape `(C,)`; 0 for integers.
        total: The moments of all values, minus `shift`.
        average: The moving average over batches, minus `shift`.
        samples: Number of samples of all ranks, a float64 scalar.
    """

    kind: Kind
    shift: Tensor
    total: Moments
    average: _MovingAverage
    samples: Tensor

    @classmethod
    def of_nothing(cls, channels: int) -> LearnedStatistics:
        """Return the statistics before the first batch."""
        zero = torch.zeros(channels, dtype=torch.float64)
        samples = torch.zeros((), dtype=torch.float64)
        return cls(Kind.UNKNOWN, zero, Moments(zero, zero, zero), _MovingAverage(zero, zero, zero), samples)

    @classmethod
    def from_state(cls, state: dict[str, Any], channels: int, factor: float) -> LearnedStatistics:
        """Return saved statistics, in other units.

        Args:
            state: What `state` returned.
            channels: Number of channels C.
            factor: How many of the new units the old one is.

        Returns:
            The statistics; no tensor is one of the state.

        Raises:
            ValueError: If the state is of another number of channels.
        """
        saved = len(state["count"])
        if saved != channels:
            raise ValueError(f"the saved input statistics are of {saved} channels, num_features is {channels}")
        average = [state[f"average_{name}"] for name in ("weight", "mean", "variance")]
        return cls(
            Kind[state["kind"]],
            state["shift"] * factor,
            Moments(state["count"].clone(), state["mean"], state["m2"]).scaled(1 / factor),
            _MovingAverage(average[0].clone(), average[1] * factor, average[2] * factor**2),
            state["samples"].clone(),
        )

    def state(self) -> dict[str, Any]:
        """Return everything in plain values and tensors on the CPU."""
        tensors = {name: tensor.cpu().clone() for name, tensor in zip(_NAMES, self._tensors(), strict=True)}
        return {"kind": self.kind.name, **tensors}

    def add(self, batch: GlobalBatch, is_sound: Tensor, momentum: float | None) -> LearnedStatistics:
        """Return the statistics with one more batch.

        Args:
            batch: What all ranks know of the batch, measured from `shift` if there was a batch before.
            is_sound: Whether the batch counts, a boolean scalar. It stays on the device, since on an accelerator the
                host would have to wait for it.
            momentum: Weight of the batch in the moving average; None leaves the average alone.

        Returns:
            The statistics, those of before where `is_sound` is false.
        """
        known = self if self.kind is not Kind.UNKNOWN else replace(self, kind=batch.kind, shift=batch.shift)
        added = replace(
            known,
            total=self.total.merge(batch.moments),
            average=self.average if momentum is None else self.average.add(batch.moments, momentum),
            samples=self.samples + batch.samples,
        )
        pairs = zip(added._tensors(), known._tensors(), strict=True)
        return known._with([torch.where(is_sound, after, before) for after, before in pairs])

    def to(self, device: torch.device) -> LearnedStatistics:
        """Return the statistics on a device: these, if they are there."""
        return self if self.shift.device == device else self._with([tensor.to(device) for tensor in self._tensors()])

    def _tensors(self) -> tuple[Tensor, ...]:
        return (*self.total.astuple(), *self.average.astuple(), self.shift, self.samples)

    def _with(self, tensors: Sequence[Tensor]) -> LearnedStatistics:
        """Return statistics of the same kind with other tensors, in the order of `_tensors`."""
        *sums, shift, samples = tensors
        return LearnedStatistics(self.kind, shift, Moments(*sums[:3]), _MovingAverage(*sums[3:]), samples)
