"""Finds the raw values to keep, piece by piece, while a piece is in the cache of the processor.

On CPUs `torch.where` and `masked_fill` branch at every value, and comparisons that write booleans are slow too. So the
rules use arithmetic alone. Comparisons write 0 and 1 in the dtype of the values; integers are multiplied by these;
floating-point numbers are cleared bit by bit, since NaN or infinity times 0 is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_revbn.core.channel_view import ChannelView, Scratch, channel_view

__all__ = ["KeepRules", "PieceMasks", "blank_"]

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MULTIPLIED = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *_FLOATS)
"""Dtypes whose tensors torch multiplies with each other; bool and the wide unsigned integers are not among them."""
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
"""The integer dtype of the same width."""


@dataclass(frozen=True)
class KeepRules:
    """Rules for the raw values to keep; without arguments they keep all.

    Attributes:
        mask: True where values are kept; broadcasts to them. None keeps all values.
        nodata: Numbers that stand for a missing value. Integers must equal such a number exactly, floating-point values
            as their dtype rounds it.
        drops_nan: Whether to drop NaN.
        spared: True for channels that keep every value, shape `(C,)`; None spares no channel.
    """

    mask: Tensor | None = None
    nodata: Sequence[float] = ()
    drops_nan: bool = False
    spared: Tensor | None = None

    def on(self, values: Tensor, view: ChannelView, channel_dim: int | None) -> PieceMasks | None:
        """Apply the rules to values.

        Args:
            values: A dense tensor.
            view: The channel view of `values`.
            channel_dim: The dimension of the channels, as in the view.

        Returns:
            The masks of the pieces of the view; None if the rules keep every value of this dtype.
        """
        found = [_stored(number, values.dtype) for number in self.nodata]
        numbers = tuple(number for number in found if number is not None)
        drops_nan = self.drops_nan and values.is_floating_point()
        if self.mask is None and not numbers and not drops_nan:
            return None
        mask = None if self.mask is None else channel_view(self.mask.expand(values.shape), channel_dim, like=values)
        return PieceMasks(view, mask, numbers, drops_nan, self.spared)


@dataclass(frozen=True)
class PieceMasks:
    """The rules for the values of a view; some rule can drop a value.

    Attributes:
        view: The values.
        mask: True where values are kept, in the memory order of the view; None keeps all values.
        numbers: Numbers to drop, as the dtype of the values stores them.
        drops_nan: Whether to drop NaN.
        spared: True for channels that keep every value, shape `(C,)`; None spares no channel.
    """

    view: ChannelView
    mask: ChannelView | None
    numbers: tuple[float, ...]
    drops_nan: bool
    spared: Tensor | None
    _scratch: Scratch = field(default_factory=Scratch)

    def kept(self, index: int, at: tuple[slice, slice, slice], dtype: torch.dtype) -> Tensor:
        """Find the values of a piece that are kept.

        Args:
            index: The index of the part of the view.
            at: The piece of the part.
            dtype: The dtype of the result, an integer dtype.

        Returns:
            1 where a value is kept, else 0, in the shape of the piece. The caller may change it; the next call
            overwrites it.
        """
        part = self.view.parts[index]
        piece = part[at]
        # For dtypes that torch cannot multiply, comparisons are written in the dtype of the result.
        own = piece.dtype if piece.dtype in _MULTIPLIED else dtype
        factors = [torch.ne(piece, n, out=self._scratch.like(piece, own, f"{n}")) for n in self.numbers]
        if self.drops_nan:
            factors.append(torch.eq(piece, piece, out=self._scratch.like(piece, own, "nan")))
        if self.mask is not None:
            factors.append(self._scratch.like(piece, dtype, "mask").copy_(self.mask.parts[index][at]))
        kept = factors[0] if factors[0].dtype == dtype else self._scratch.like(piece, dtype).copy_(factors[0])
        for factor in factors[1:]:
            kept.mul_(factor.to(dtype))
        return kept if self.spared is None else kept.bitwise_or_(self.view.spread(self.spared.to(dtype), part))

    def kept_bits(self, index: int, at: tuple[slice, slice, slice], dtype: torch.dtype) -> Tensor:
        """Find the values of a piece that are kept, for `blank_`.

        Args:
            index: The index of the part of the view.
            at: The piece of the part.
            dtype: The dtype of the numbers to blank, float32 or float64.

        Returns:
            Integers of the same width, in the shape of the piece: all bits are set where a value is kept, elsewhere no
            bit.
        """
        return self.kept(index, at, _BITS[dtype]).neg_()  # the integer -1 has all bits set


def blank_(values: Tensor, bits: Tensor, fill: float = 0.0) -> None:
    """Replace the values that are not kept, in place.

    Args:
        values: float32 or float64.
        bits: The result of `kept_bits`; changed in place if `fill` is not 0.
        fill: The number in place of values that are not kept.
    """
    whole = values.view(bits.dtype)
    whole.bitwise_and_(bits)
    if fill:
        pattern = torch.full((), fill, dtype=values.dtype, device=values.device).view(bits.dtype)
        whole.bitwise_or_(bits.bitwise_not_().bitwise_and_(pattern))


def _stored(number: float, dtype: torch.dtype) -> float | None:
    """Return a number as a dtype stores it; None if no value of that dtype equals it."""
    if dtype.is_floating_point:
        # torch refuses a Python number beyond the range of half precision; converted from float64 it is infinity, as it
        # is in data of half precision.
        return torch.full((), number, dtype=torch.float64).to(dtype).item()
    if not math.isfinite(number) or number != math.floor(number) or abs(number) >= 2.0**63:
        return None
    # In a comparison with uint8, torch converts -9999 to 241, its low byte. So the conversion is checked first.
    whole = int(number)
    return whole if int(torch.full((), whole, dtype=torch.int64).to(dtype)) == whole else None
