"""Finds the values of a batch that count, and those that are replaced, from mask, `nodata`, `channels` and NaN."""

# No `from __future__ import annotations` here: TorchScript cannot read postponed annotations.

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_revbn.core.input_settings import InputNorm
from lightning_revbn.core.keep_rules import KeepRules

__all__ = ["InputMasks", "chosen_channels", "kept_by", "kept_values", "valid_values"]

_BITS = 62
"""Number of booleans in an integer: at most 63 in 64 bits with a sign."""


def valid_values(values: Tensor, mask: Tensor | None, nodata: list[float]) -> Tensor | None:
    """Find the values that are data.

    Args:
        values: Raw values.
        mask: True where values count; None counts all values.
        nodata: Numbers that stand for a missing value. Integers must equal such a number exactly, floating-point values
            as their dtype rounds it.

    Returns:
        True where the mask is True and the value equals none of the numbers; broadcasts to `values`. None without a
        mask and numbers.
    """
    for number in nodata:
        other = ~_equal(values, number)
        mask = other if mask is None else mask & other
    return mask


def kept_values(values: Tensor, valid: Tensor | None, replaces_nan: bool, chosen: Tensor | None) -> Tensor | None:
    """Find the values that `fill` does not replace after the normalisation.

    Args:
        values: Raw values.
        valid: The result of `valid_values`.
        replaces_nan: Whether NaN is replaced.
        chosen: True for the channels that are normalised, broadcasts to `values`; other channels keep every value. None
            is all channels.

    Returns:
        True where a value stays; broadcasts to `values`. None if every value stays.
    """
    kept = valid
    if replaces_nan and values.is_floating_point():
        numbers = ~values.isnan()
        kept = numbers if kept is None else kept & numbers
    if chosen is not None and kept is not None:
        kept = kept | ~chosen
    return kept


def chosen_channels(settings: InputNorm, device: torch.device | None = None) -> Tensor | None:
    """Return the channels that are normalised.

    Args:
        settings: The settings.
        device: The device of the result; None is the CPU.

    Returns:
        Booleans of shape `(C,)`; None for all channels.
    """
    if settings.channels is None:
        return None
    if device is None or device.type in ("cpu", "mps"):
        return torch.tensor([channel in settings.channels for channel in range(settings.num_features)], device=device)
    return _flags(settings.channels, settings.num_features, device)


def _flags(chosen: Sequence[int], count: int, device: torch.device) -> Tensor:
    """Return booleans that are True at the given indices, without a wait for the device.

    A list would be copied to the device, and the host would wait for the copy. The bits of an integer are an argument
    of a kernel.
    """
    bits = sum(1 << index for index in chosen)
    words = [
        ((bits >> start) % 2**_BITS) >> torch.arange(min(_BITS, count - start), device=device)
        for start in range(0, count, _BITS)
    ]
    return (torch.cat(words) & 1).bool()


def kept_by(settings: InputNorm, mask: Tensor | None, device: torch.device) -> KeepRules:
    """Return the rules for the values that `fill` does not replace after the normalisation.

    Args:
        settings: The settings.
        mask: True where values count; None counts all values.
        device: The device of the values.

    Returns:
        The rules. They work piece by piece; `InputMasks.kept` is the same for a whole tensor.
    """
    chosen = chosen_channels(settings, device)
    return KeepRules(mask, settings.nodata_values, settings.fill is not None, None if chosen is None else ~chosen)


def _equal(values: Tensor, number: float) -> Tensor:
    """Return True where values equal a number as their dtype stores it."""
    if values.is_floating_point():
        # torch refuses a Python number beyond the range of half precision; converted from float64 it is infinity, as it
        # is in data of half precision.
        return values == torch.full((), number, dtype=torch.float64).to(values.dtype)
    if not math.isfinite(number) or number != math.floor(number) or abs(number) >= 2.0**63:
        return torch.zeros_like(values, dtype=torch.bool)
    # In a comparison with uint8, torch converts -9999 to 241, its low byte. So the conversion is checked first.
    whole = torch.full((), int(number), dtype=torch.int64)
    stored = whole.to(values.dtype)
    is_stored = stored.to(torch.int64) == whole
    # Scalars stay on the CPU: a kernel takes them as arguments, and a copy to an accelerator would make the host wait.
    return (values == stored) & is_stored


@dataclass(frozen=True)
class InputMasks:
    """The masks of a batch; each broadcasts to the batch, and None is True everywhere.

    Attributes:
        valid: True where a value is data, also in channels that are not normalised.
        kept: True where `fill` does not replace the value.
        chosen: True for the channels that are normalised.
    """

    valid: Tensor | None
    kept: Tensor | None
    chosen: Tensor | None = None

    @classmethod
    def of(cls, values: Tensor, mask: Tensor | None, settings: InputNorm) -> "InputMasks":
        """Make the masks of a batch. The values are read only if `nodata` or `fill` is set.

        Args:
            values: Raw values.
            mask: True where values count; None counts all values.
            settings: The settings.

        Returns:
            The masks.
        """
        valid = valid_values(values, mask, settings.nodata_values)
        chosen = chosen_channels(settings, values.device)
        if chosen is not None and settings.channel_dim is not None:
            shape = [1] * values.dim()
            shape[settings.channel_dim] = -1
            chosen = chosen.view(shape)
        return cls(valid, kept_values(values, valid, settings.fill is not None, chosen), chosen)

    @property
    def counted(self) -> Tensor | None:
        """True where the statistics count a value, unless it is NaN."""
        if self.valid is None or self.chosen is None:
            return self.chosen if self.valid is None else self.valid
        return self.valid & self.chosen

    @property
    def compared(self) -> Tensor | None:
        """True where the statistics count a value and `fill` does not replace it."""
        counted = self.counted
        if counted is None or self.kept is None:
            return self.kept if counted is None else counted
        return counted & self.kept
