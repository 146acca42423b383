"""Which values of a batch count, and which are replaced: by a mask, `nodata`, `channels` and NaN together."""

# TorchScript cannot read postponed annotations, so they are not postponed here.

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_revbn.core.input_settings import InputNorm
from lightning_revbn.core.keep_rules import KeepRules

__all__ = ["InputMasks", "chosen_channels", "kept_by", "kept_values", "valid_values"]


def valid_values(values: Tensor, mask: Tensor | None, nodata: list[float]) -> Tensor | None:
    """Find the values that are data.

    Args:
        values: Raw values.
        mask: True where values count.
        nodata: Numbers that stand for no value. Integers must equal such a number exactly, floating-point values as
            their dtype rounds it.

    Returns:
        True where the mask is True and the value is none of the numbers; broadcasts to `values`. None if all are data.
    """
    for number in nodata:
        other = ~_equal(values, number)
        mask = other if mask is None else mask & other
    return mask


def kept_values(values: Tensor, valid: Tensor | None, replaces_nan: bool, chosen: Tensor | None) -> Tensor | None:
    """Find the values that are not replaced after the normalisation.

    Args:
        values: Raw values.
        valid: True where they are data.
        replaces_nan: Whether NaN is replaced.
        chosen: True for the channels that are normalised; broadcasts to `values`. Others keep every value.

    Returns:
        True where a value stays; broadcasts to `values`. None if all stay.
    """
    kept = valid
    if replaces_nan and values.is_floating_point():
        numbers = ~values.isnan()
        kept = numbers if kept is None else kept & numbers
    if chosen is not None and kept is not None:
        kept = kept | ~chosen
    return kept


def chosen_channels(settings: InputNorm, device: torch.device | None = None) -> Tensor | None:
    """Return which channels are normalised.

    Args:
        settings: The settings.
        device: Where the result is.

    Returns:
        Booleans of shape `(C,)`; None if all channels are.
    """
    if settings.channels is None:
        return None
    return torch.tensor([channel in settings.channels for channel in range(settings.num_features)], device=device)


def kept_by(settings: InputNorm, mask: Tensor | None, device: torch.device) -> KeepRules:
    """Return the rules by which values are not replaced after the normalisation.

    Args:
        settings: The settings.
        mask: True where values count.
        device: Where the values are.

    Returns:
        The rules; applied to whole tensors they are `InputMasks.kept`.
    """
    chosen = chosen_channels(settings, device)
    return KeepRules(mask, settings.nodata_values, settings.fill is not None, None if chosen is None else ~chosen)


def _equal(values: Tensor, number: float) -> Tensor:
    """Return where values are a number."""
    if values.is_floating_point():
        # Half precision would refuse a number beyond its range, of which the data hold an infinity.
        return values == torch.full((), number, dtype=torch.float64).to(values.dtype)
    if not math.isfinite(number) or number != math.floor(number) or abs(number) >= 2.0**63:
        return torch.zeros_like(values, dtype=torch.bool)
    # Compared with bytes, torch takes -9999 for 241, the number that a byte stores of it.
    whole = torch.full((), int(number), dtype=torch.int64)
    stored = whole.to(values.dtype)
    is_stored = stored.to(torch.int64) == whole
    return (values == stored.to(values.device)) & is_stored.to(values.device)


@dataclass(frozen=True)
class InputMasks:
    """Which values of one batch count, and which stay; all broadcast to the batch, and None stands for all values.

    Attributes:
        valid: True where a value is data, in channels that are left alone too.
        kept: True where the result is the normalised value, or the value itself in a channel that is left alone.
        chosen: True for the channels that are normalised.
    """

    valid: Tensor | None
    kept: Tensor | None
    chosen: Tensor | None = None

    @classmethod
    def of(cls, values: Tensor, mask: Tensor | None, settings: InputNorm) -> "InputMasks":
        """Find out which they are; without settings that ask for it, nothing reads the values.

        Args:
            values: Raw values.
            mask: True where values count.
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
        """True where a value adds to the statistics, unless it is NaN."""
        if self.valid is None or self.chosen is None:
            return self.chosen if self.valid is None else self.valid
        return self.valid & self.chosen

    @property
    def compared(self) -> Tensor | None:
        """True where a result is that of a value that counts."""
        counted = self.counted
        if counted is None or self.kept is None:
            return self.kept if counted is None else counted
        return counted & self.kept
