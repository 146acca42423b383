"""Sums of integers per channel, exact for every dtype up to 32 bits, and the moments that follow from them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_revbn.core.channel_view import ChannelView, Scratch, pieces
from lightning_revbn.core.compiled import compile_once
from lightning_revbn.core.keep_rules import PieceMasks

__all__ = ["OUT_OF_RANGE", "integer_sums", "moments_of_sums"]

OUT_OF_RANGE = "integers beyond 32 bits cannot be summed exactly: convert them to float64"

_ROW = 256
"""How many squares of 8-bit integers float32 adds exactly: 256 * 255^2 < 2^24."""


def integer_sums(
    view: ChannelView, masks: PieceMasks | None, compile: bool, chosen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Add up integers per channel.

    Args:
        view: Integers or booleans of any width.
        masks: Which values count; None is all.
        compile: Whether 8-bit integers are added by a compiled kernel.
        chosen: True for the channels whose sums are used, shape `(C,)`; those of others mean nothing.

    Returns:
        Count, sum, sum of squares modulo 2^64, and its upper half, int64, shape `(4, C)`; and whether a value lies
        beyond 32 bits, so that the sums are wrong.
    """
    found: list[Tensor] = []
    scratch = Scratch()
    beyond = torch.zeros((), dtype=torch.bool, device=view.parts[0].device)
    for index, part in enumerate(view.parts):
        compiled = compile and masks is None and part.dtype in (torch.uint8, torch.int8)
        add_bytes = compile_once(_byte_sums) if compiled else _ByteSums()
        for at in pieces(part, part.numel() if compiled else None):
            piece = part[at]
            if piece.element_size() > 2 or (masks is not None and piece.dtype == torch.uint16):
                piece = piece.long()  # torch multiplies no uint16
            if masks is None:
                count = torch.full((part.shape[1],), piece.shape[0] * piece.shape[2], device=part.device)
            else:
                piece = piece.byte() if piece.dtype == torch.bool else piece
                kept = masks.kept(index, at, piece.dtype)
                piece = torch.mul(piece, kept, out=scratch.like(piece, piece.dtype))
                counts = scratch.like(piece, torch.float32).copy_(kept)
                count = counts.sum((0, 2)).long()  # faster than integers, and exact for the values of a piece
            if piece.element_size() > 2:
                if chosen is not None:  # what nobody adds up may lie beyond 32 bits
                    piece = piece * view.spread(chosen.long(), part)
                least, greatest = torch.aminmax(piece)
                beyond |= (least < -(2**31)) | (greatest > 2**31)
            columns = (count, *_sums_of_piece(piece, add_bytes, scratch))
            found.append(torch.stack([view.fold(column).sum(0) for column in columns]))
    return torch.stack(found).sum(0), beyond


def _sums_of_piece(
    piece: Tensor, add_bytes: Callable[[Tensor], tuple[Tensor, Tensor]], scratch: Scratch
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sum, sum of squares modulo 2^64 and its upper half per column, by the fastest arithmetic that is exact."""
    if piece.element_size() > 2:
        # A square of 32 bits fits into 64, but a sum of squares may not: it wraps around, and nothing tells how often.
        # The upper halves cannot overflow, so they tell the sum to within 2^32 a value; see `moments_of_sums`.
        square = piece * piece
        return piece.sum((0, 2)), square.sum((0, 2)), (square >> 32).sum((0, 2))
    if piece.element_size() == 1:
        total, squares = add_bytes(piece)
    else:
        # float64 adds faster than int64, and whole numbers exactly up to 2^53: that is 2^21 squares of 16 bits. A piece
        # of one channel may have more.
        fits = piece.shape[0] * piece.shape[2] <= 2**21
        exact = scratch.like(piece, torch.float64 if fits else torch.int64, "exact").copy_(piece)
        total, squares = exact.sum((0, 2)).long(), exact.square_().sum((0, 2)).long()
    return total, squares, squares >> 32


def moments_of_sums(
    count: Tensor, total: Tensor, squares: Tensor, upper: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute moments from exact sums, rounded once.

    The textbook formula, sum(x^2) - sum(x)^2 / n, takes the difference of two numbers of more than 64 bits that are
    nearly equal. With the integer q nearest to the mean, m2 = sum((x - q)^2) - n (mean - q)^2, of which the second is
    never more than half of the first, so hardly anything cancels. The first, sum(x^2) - 2 q sum(x) + n q^2, is known
    modulo 2^64 from wrapping arithmetic, and nearly from floating-point numbers; together these determine it.

    Args:
        count: Number of values, int64, shape `(C,)`, as everything here.
        total: Their sum.
        squares: The sum of their squares, modulo 2^64.
        upper: The sum of their squares divided by 2^32, rounded down as a whole or square by square.

    Returns:
        Count, mean, what the mean has lost by rounding, and sum of squared deviations from the mean, float64, shape
        `(C,)` each.
    """
    filled = count.clamp(min=1)
    # Integer division, since float64 could not hold the sum. The rounded-down quotient becomes the nearest one, so the
    # rest that is left for floating-point numbers lies within half of the count.
    nearest = torch.div(total, filled, rounding_mode="floor")
    rest = total - nearest * filled
    above = (2 * rest >= filled).long()
    nearest, rest = nearest + above, rest - above * filled
    wrapped = squares - 2 * nearest * total + count * nearest * nearest
    n, q = filled.double(), nearest.double()
    nearly = upper.double() * 2.0**32 - 2 * q * total.double() + n * q * q
    # Both are the same number, the first but for a multiple of 2^64, the second but for an error far below 2^64. So the
    # multiple is the one nearest to their difference.
    deviations = wrapped.double() + torch.round((nearly - wrapped.double()) / 2.0**64) * 2.0**64
    fraction = rest.double() / n
    mean = q + fraction
    return count.double(), mean, (q - mean) + fraction, deviations - rest.double().square() / n


def _byte_sums(part: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `_ByteSums` returns, by a kernel that reads every byte once."""
    values = part.int()
    return values.sum(2, dtype=torch.int64).sum(0), (values * values).sum(2, dtype=torch.int64).sum(0)


class _ByteSums:
    """Adds 8-bit integers and their squares exactly in float32, in memory that is used again.

    float32 takes half of the memory of int64, and CPUs add it fastest. It holds the sum of a row of 256 squares
    exactly; the sums of the rows are added in float64.
    """

    def __init__(self) -> None:
        self._values = torch.empty(0)

    def __call__(self, piece: Tensor) -> tuple[Tensor, Tensor]:
        """Return sum and sum of squares per column, int64, of a piece of shape `(outer, width, inner)`."""
        outer, width, inner = piece.shape
        # Rows of 256 run inside a column if its values lie side by side, else across columns that lie side by side.
        side_by_side = inner > 1
        rows, length = (outer * width, inner) if side_by_side else (width, outer)
        padded = -(-length // _ROW) * _ROW
        shape = (rows, padded // _ROW, _ROW) if side_by_side else (padded // _ROW, _ROW, width)
        # All pieces but the last have one shape; to ask the system for new memory takes longer than to fill it.
        if self._values.shape != shape:
            self._values = torch.zeros(shape, device=piece.device)
        flat = self._values.view(rows, padded).t() if side_by_side else self._values.view(padded, width)
        flat[:length].copy_(piece.reshape(rows, length).t() if side_by_side else piece.squeeze(2))
        flat[length:] = 0  # what a longer piece may have left
        total = self._add(outer if side_by_side else None)
        self._values.square_()
        return total, self._add(outer if side_by_side else None)

    def _add(self, outer: int | None) -> Tensor:
        """Return the sum of every column: at most 256 values in float32, and what comes of that in float64."""
        if outer is None:
            return self._values.sum(1).sum(0, dtype=torch.float64).long()
        return self._values.sum(2).sum(1, dtype=torch.float64).view(outer, -1).sum(0).long()
