"""Which raw values are kept, found piece by piece while a piece is in the cache of the processor.

On CPUs `torch.where` and `masked_fill` branch at every value, and comparisons that write booleans are slow too. So the
rules are applied by arithmetic alone: comparisons write 0 and 1 in the dtype of the values, integers are multiplied by
that, and floating-point numbers are blanked by their bits, which is exact for NaN and infinity too.
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
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass(frozen=True)
class KeepRules:
    """Which raw values are kept; without arguments all are.

    Attributes:
        mask: True where values are kept; broadcasts to them.
        nodata: Numbers that stand for no value. Integers must equal such a number exactly, floating-point values as
            their dtype rounds it.
        drops_nan: Whether NaN is not kept.
        spared: True for channels that keep every value, shape `(C,)`; None is no channel.
    """

    mask: Tensor | None = None
    nodata: Sequence[float] = ()
    drops_nan: bool = False
    spared: Tensor | None = None

    def on(self, values: Tensor, view: ChannelView, channel_dim: int | None) -> PieceMasks | None:
        """Apply the rules to values.

        Args:
            values: A dense tensor.
            view: Its view.
            channel_dim: Where the channels are, as the view was made.

        Returns:
            What tells the pieces of the view; None if the rules keep every value of this dtype.
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
    """Rules on the values of one view.

    Attributes:
        view: The values.
        mask: True where they are kept.
        numbers: Numbers of their dtype that are not kept.
        drops_nan: Whether NaN is not kept.
        spared: True for channels that keep every value, shape `(C,)`.
    """

    view: ChannelView
    mask: ChannelView | None
    numbers: tuple[float, ...]
    drops_nan: bool
    spared: Tensor | None
    _scratch: Scratch = field(default_factory=Scratch)

    def kept(self, index: int, at: tuple[slice, slice, slice], dtype: torch.dtype) -> Tensor:
        """Tell which values of a piece are kept.

        Args:
            index: The part of the view.
            at: The piece of the part.
            dtype: An integer dtype.

        Returns:
            Shape of the piece: 1 where a value is kept, else 0. It may be changed, and holds until the next call.
        """
        part = self.view.parts[index]
        piece = part[at]
        # bool and the wide unsigned integers cannot be multiplied by themselves.
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
        """Tell which values of a piece are kept, for `blank_` of floating-point numbers of a dtype.

        Returns:
            Integers as wide as the dtype: every bit is set where a value is kept, and none else.
        """
        return self.kept(index, at, _BITS[dtype]).neg_()


def blank_(values: Tensor, bits: Tensor, fill: float = 0.0) -> None:
    """Replace values in place.

    Args:
        values: float32 or float64.
        bits: What `kept_bits` returns; it is used up where `fill` is not 0.
        fill: What values become that are not kept.
    """
    whole = values.view(bits.dtype)
    whole.bitwise_and_(bits)
    if fill:
        pattern = torch.full((), fill, dtype=values.dtype, device=values.device).view(bits.dtype)
        whole.bitwise_or_(bits.bitwise_not_().bitwise_and_(pattern))


def _stored(number: float, dtype: torch.dtype) -> float | None:
    """Return a number as a dtype stores it; None if no value of that dtype equals it."""
    if dtype.is_floating_point:
        # Half precision would refuse a number beyond its range, of which the data hold an infinity.
        return torch.full((), number, dtype=torch.float64).to(dtype).item()
    if not math.isfinite(number) or number != math.floor(number) or abs(number) >= 2.0**63:
        return None
    # Compared with bytes, torch takes -9999 for 241, the number that a byte stores of it.
    whole = int(number)
    return whole if int(torch.full((), whole, dtype=torch.int64).to(dtype)) == whole else None
