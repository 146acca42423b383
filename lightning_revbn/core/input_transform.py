"""The transform `(x / input_range - mean) * gain` that an estimate asks for: applied, undone and exported."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_revbn.core.estimators import Estimate
from lightning_revbn.core.fixed_normalizer import Constants, FixedNormalizer, arithmetic_dtype, denormalize
from lightning_revbn.core.input_checks import check_input
from lightning_revbn.core.input_masks import chosen_channels
from lightning_revbn.core.input_settings import InputNorm
from lightning_revbn.core.moments import Kind

__all__ = ["InputTransform"]


@dataclass(frozen=True)
class InputTransform:
    """What a batch is normalised by, in float64; its constants are rounded once, at the end.

    Attributes:
        settings: The settings.
        scale: What standardised values are multiplied by.
        estimate: Mean and variance in units of the input range.
    """

    settings: InputNorm
    scale: float
    estimate: Estimate

    @property
    def gain(self) -> Tensor:
        """What deviations are multiplied by, in units of the input range, shape `(C,)`."""
        mean, variance = self.estimate.mean, self.estimate.variance
        # A channel that never changed has no spread to divide by, and the rounding of its mean is no spread either.
        constant = variance <= (8 * torch.finfo(torch.float64).eps * mean).square()
        return self.scale / torch.where(constant, 1.0, (variance + self.settings.eps).sqrt())

    def constants_for(self, values: Tensor) -> Constants:
        """Return constants in raw units and in the precision of the arithmetic, on the device of the values."""
        # What was learned from bytes also standardises floats from 0 to 1, and the other way round.
        unit = self.settings.unit(Kind.of_dtype(values.dtype))
        mean, rest, gain = self.columns(unit)
        constants = Constants.of(mean, rest, gain, arithmetic_dtype(values.dtype), self.scale, self._bound())
        return constants.to(values.device)

    def columns(self, unit: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Return what values are normalised by, channels that are left alone included.

        Args:
            unit: How much of the values is 1 of the input range.

        Returns:
            The mean, what it has lost by rounding, and the gain; float64, shape `(C,)` each.
        """
        columns = (self.estimate.mean * unit, self.estimate.rest * unit, self.gain / unit)
        chosen = chosen_channels(self.settings, self.estimate.mean.device)
        if chosen is None:
            return columns
        mean, rest, gain = columns
        return torch.where(chosen, mean, 0.0), torch.where(chosen, rest, 0.0), torch.where(chosen, gain, 1.0)

    def undo(self, values: Tensor, dims: int | None) -> Tensor:
        """Return values in units of the input range.

        Args:
            values: Standardised values: a batch, or a sample without the dimension of the batch.
            dims: How many dimensions a batch has, where that is known.

        Returns:
            A tensor of the same shape.
        """
        dim, channels = self.settings.channel_dim, self.settings.num_features
        if dim is not None and dim > 0:
            looks_single = values.shape[dim : dim + 1] != (channels,) == values.shape[dim - 1 : dim]
            dim -= looks_single if dims is None else values.dim() == dims - 1
        if dim is not None or values.dim():  # without channels a single number is a sample
            check_input(values, None, dim, channels)
        return denormalize(values, *self.columns(), dim)

    def module(self, kind: Kind) -> FixedNormalizer:
        """Return the transform as a module on the CPU.

        Args:
            kind: What the training batches were made of.

        Returns:
            The module.
        """
        mean, gain = (self.estimate.mean + self.estimate.rest).cpu(), self.gain.cpu()
        settings = self.settings
        return FixedNormalizer(
            mean,
            gain,
            settings.channel_dim,
            None if settings.input_range == "auto" else settings.input_range,
            kind.name.lower() if settings.input_range == "auto" else "unknown",
            bound=None if settings.clip is None else settings.clip * self.scale,
            fill=settings.fill,
            nodata=settings.nodata_values,
            channels=settings.channels,
        )

    def _bound(self) -> Tensor | None:
        """Return how far from 0 results may lie, shape `(C,)`."""
        clip = self.settings.clip
        if clip is None:
            return None
        bound = torch.full_like(self.estimate.mean, clip * self.scale)
        chosen = chosen_channels(self.settings, bound.device)
        return bound if chosen is None else torch.where(chosen, bound, torch.inf)
