"""The transform `(x / input_range - mean) * gain` of an estimate: its constants, its inverse, and its export."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_revbn.core.estimators import Estimate
from lightning_revbn.core.fixed_normalizer import Constants, FixedNormalizer, arithmetic_dtype, denormalize, standardize
from lightning_revbn.core.input_checks import check_input
from lightning_revbn.core.input_masks import chosen_channels, kept_by
from lightning_revbn.core.input_settings import InputNorm
from lightning_revbn.core.moments import Kind

__all__ = ["InputTransform", "standardize_kept"]


@dataclass(frozen=True)
class InputTransform:
    """The transform of a batch, kept in float64: constants are rounded once, to the precision of the arithmetic.

    Attributes:
        settings: The settings.
        scale: The number that standardised values are multiplied by.
        estimate: Mean and variance in units of the input range.
    """

    settings: InputNorm
    scale: float
    estimate: Estimate

    @property
    def gain(self) -> Tensor:
        """Factor of deviations from the mean, `scale / sqrt(var + eps)`, per input range, shape `(C,)`."""
        mean, variance = self.estimate.mean, self.estimate.variance
        # A constant channel has only the rounding of its mean for a spread. Divided by it, a value of evaluation that
        # differs would become huge; so such a channel is centred and scaled, but not divided.
        constant = variance <= (8 * torch.finfo(torch.float64).eps * mean).square()
        return self.scale / torch.where(constant, 1.0, (variance + self.settings.eps).sqrt())

    def constants_for(self, values: Tensor, *, is_traced: bool = False) -> Constants:
        """Return constants in raw units and in the precision of the arithmetic, on the device of the values.

        Args:
            values: The values to standardise.
            is_traced: Whether a compiled graph computes the constants.

        Returns:
            The constants.
        """
        # The unit follows the dtype of these values, so statistics of uint8 also standardise floats from 0 to 1.
        unit = self.settings.unit(Kind.of_dtype(values.dtype))
        mean, rest, gain = self.columns(unit)
        dtype = arithmetic_dtype(values.dtype)
        constants = Constants.of(mean, rest, gain, dtype, self.scale, self._bound(), is_traced=is_traced)
        return constants.to(values.device)

    def columns(self, unit: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, rest and gain per channel; channels that are not normalised have 0, 0 and 1.

        Args:
            unit: The number of raw units in the input range, 255 for uint8.

        Returns:
            The mean, its rest (the part lost by rounding), and the gain; float64, shape `(C,)` each.
        """
        columns = (self.estimate.mean * unit, self.estimate.rest * unit, self.gain / unit)
        chosen = chosen_channels(self.settings, self.estimate.mean.device)
        if chosen is None:
            return columns
        mean, rest, gain = columns
        return torch.where(chosen, mean, 0.0), torch.where(chosen, rest, 0.0), torch.where(chosen, gain, 1.0)

    def undo(self, values: Tensor, dims: int | None) -> Tensor:
        """Undo the transform.

        Args:
            values: Standardised values: a batch, or a sample without the batch dimension.
            dims: Number of dimensions of a batch; None if it is not known, then the sizes decide.

        Returns:
            Values in units of the input range, of the same shape.

        Raises:
            InputError: If the values have other channels than the settings.
        """
        dim, channels = self.settings.channel_dim, self.settings.num_features
        if dim is not None and dim > 0:
            looks_single = values.shape[dim : dim + 1] != (channels,) == values.shape[dim - 1 : dim]
            dim -= looks_single if dims is None else values.dim() == dims - 1
        if dim is not None or values.dim():  # with channel_dim=None, a 0-d tensor is a sample of a 1-d batch
            check_input(values, None, dim, channels)
        return denormalize(values, *self.columns(), dim)

    def module(self, kind: Kind) -> FixedNormalizer:
        """Return the transform as a module on the CPU.

        Args:
            kind: The kind of the training batches.

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
        """Return the largest absolute value of results, shape `(C,)`; None without `clip`."""
        clip = self.settings.clip
        if clip is None:
            return None
        bound = torch.full_like(self.estimate.mean, clip * self.scale)
        chosen = chosen_channels(self.settings, bound.device)
        return bound if chosen is None else torch.where(chosen, bound, torch.inf)


def standardize_kept(
    values: Tensor, mask: Tensor | None, constants: Constants, settings: InputNorm, dtype: torch.dtype
) -> Tensor:
    """Standardise values, and put `fill` where mask and settings leave a value out.

    Args:
        values: Raw values.
        mask: True where values count; None counts all values.
        constants: The constants of the transform for these values.
        settings: The settings.
        dtype: The dtype of the result.

    Returns:
        The standardised values, in the shape and memory format of `values`.
    """
    rules = kept_by(settings, mask, values.device)
    with torch.no_grad():
        return standardize(
            values, constants, settings.channel_dim, dtype, rules, settings.compile, settings.fill or 0.0
        )
