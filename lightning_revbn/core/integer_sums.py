"""Sums integers per channel, exactly for values of up to 32 bits, and computes moments from the sums."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_revbn.core.channel_view import NARROW, ChannelView, Scratch, joined_rows, pieces
from lightning_revbn.core.compiled import compile_once
from lightning_revbn.core.keep_rules import PieceMasks

__all__ = ["OUT_OF_RANGE", "byte_sums", "integer_sums", "moments_of_sums"]

OUT_OF_RANGE = "integers beyond 32 bits cannot be summed exactly: convert them to float64"

_ROW = 256
"""Number of squares of 8-bit integers that float32 adds exactly: 256 * 255^2 < 2^24."""


def integer_sums(
    view: ChannelView, masks: PieceMasks | None, compile: bool, chosen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Add up integers and their squares per channel.

    Args:
        view: Integers or booleans of any width.
        masks: The values that count; None is all.
        compile: Whether a compiled kernel adds 8-bit integers.
        chosen: True for the channels that the caller uses, shape `(C,)`; the sums of other channels may be wrong. None
            is all channels.

    Returns:
        Count, sum, sum of squares modulo 2^64, and the upper half of that sum (see `moments_of_sums`), int64, shape
        `(4, C)`; and a boolean scalar, True if an integer beyond 32 bits makes the sums wrong.
    """
    found: list[Tensor] = []
    scratch = Scratch()
    beyond = torch.zeros((), dtype=torch.bool, device=view.parts[0].device)
    for index, part in enumerate(view.parts):
        compiled = compile and masks is None and part.dtype in (torch.uint8, torch.int8)
        add_bytes = compile_once(_part_sums) if compiled else _ByteSums()
        for at in pieces(part, part.numel() if compiled else None):
            piece = part[at]
            if piece.element_size() > 2 or (masks is not None and piece.dtype == torch.uint16):
                piece = piece.long()  # torch cannot multiply uint16 by the mask, and squares need 64 bits
            if masks is None:
                count = torch.full((part.shape[1],), piece.shape[0] * piece.shape[2], device=part.device)
            else:
                piece = piece.byte() if piece.dtype == torch.bool else piece
                kept = masks.kept(index, at, piece.dtype)
                piece = torch.mul(piece, kept, out=scratch.like(piece, piece.dtype))
                counts = scratch.like(piece, torch.float32).copy_(kept)
                count = counts.sum((0, 2)).long()  # float32 adds faster than integers, and exactly up to 2^24 values
            if piece.element_size() > 2:
                if chosen is not None:  # channels that are not used may hold integers beyond 32 bits
                    piece = piece * view.spread(chosen.long(), part)
                least, greatest = torch.aminmax(piece)
                beyond |= (least < -(2**31)) | (greatest > 2**31)
            columns = (count, *_sums_of_piece(piece, add_bytes, scratch))
            found.append(torch.stack([view.fold(column).sum(0) for column in columns]))
    return torch.stack(found).sum(0), beyond


def _sums_of_piece(
    piece: Tensor, add_bytes: Callable[[Tensor], tuple[Tensor, Tensor]], scratch: Scratch
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sum, sum of squares modulo 2^64 and its upper half per column, by the fastest exact arithmetic."""
    if piece.element_size() > 2:
        # The square of a 32-bit integer fits 64 bits, but a sum of squares may wrap around an unknown number of times.
        # The sum of the upper halves cannot overflow, and gives the sum to within 2^32 per value: `moments_of_sums`
        # combines the two.
        square = piece * piece
        return piece.sum((0, 2)), square.sum((0, 2)), (square >> 32).sum((0, 2))
    if piece.element_size() == 1:
        total, squares = add_bytes(piece)
    else:
        # float64 adds faster than int64, and adds integers exactly up to 2^53, which is 2^21 squares of 16 bits. A
        # piece may hold more values of a channel; then int64 adds them.
        fits = piece.shape[0] * piece.shape[2] <= 2**21
        exact = scratch.like(piece, torch.float64 if fits else torch.int64, "exact").copy_(piece)
        total, squares = exact.sum((0, 2)).long(), exact.square_().sum((0, 2)).long()
    return total, squares, squares >> 32


def moments_of_sums(
    count: Tensor, total: Tensor, squares: Tensor, upper: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute moments from exact sums, rounded once.

    The textbook formula, sum(x^2) - sum(x)^2 / n, subtracts two numbers of more than 64 bits that are nearly equal.
    Instead, let q be the integer nearest to the mean: m2 = D - n (mean - q)^2, with D = sum((x - q)^2). The second term
    is at most half of D, so little cancels. D = sum(x^2) - 2 q sum(x) + n q^2 is computed twice: exactly modulo 2^64 by
    wrapping integers, and approximately in float64. Both together determine it.

    Args:
        count: Number of values, int64, shape `(C,)` as all arguments.
        total: Their sum.
        squares: The sum of their squares, modulo 2^64.
        upper: The sum of their squares divided by 2^32, rounded down as a whole or square by square.

    Returns:
        Count, mean, the rest of the mean that rounding has lost, and sum of squared deviations from the mean, float64,
        shape `(C,)` each.
    """
    filled = count.clamp(min=1)
    # Integers divide, since float64 cannot hold the sum. The floor becomes the nearest integer, so that the remainder,
    # which float64 divides, is at most half of the count.
    nearest = torch.div(total, filled, rounding_mode="floor")
    rest = total - nearest * filled
    above = (2 * rest >= filled).long()
    nearest, rest = nearest + above, rest - above * filled
    wrapped = squares - 2 * nearest * total + count * nearest * nearest
    n, q = filled.double(), nearest.double()
    nearly = upper.double() * 2.0**32 - 2 * q * total.double() + n * q * q
    # `wrapped` differs from D by a multiple of 2^64, `nearly` by an error far below 2^64. So the difference of the two,
    # rounded to a multiple of 2^64, is the multiple to add.
    deviations = wrapped.double() + torch.round((nearly - wrapped.double()) / 2.0**64) * 2.0**64
    fraction = rest.double() / n
    mean = q + fraction
    return count.double(), mean, (q - mean) + fraction, deviations - rest.double().square() / n


def byte_sums(table: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add up 8-bit integers and their squares per channel, for a compiled graph, which reads every byte once.

    Args:
        table: Integers of 8 bits, shape `(outer, C, inner)`, in the order of their memory.

    Returns:
        Count, sum, sum of squares and its upper half, as `integer_sums` returns them, int64, shape `(C,)` each.
    """
    wide = table.int()
    sums = torch.stack([_short_sums(wide), _short_sums(wide * wide)])
    total, squares = sums.sum((1, 2, 4)).unbind()
    return torch.full_like(total, table.numel() // table.shape[1]), total, squares, squares >> 32


def _short_sums(table: Tensor) -> Tensor:
    """Return sums of at most 2^13 squares of bytes in int32, which cannot overflow, shape `(runs, joined, C, inner)`.

    A kernel for a GPU adds neighbours in memory, in 32 bits, without a division for each index, and in as many short
    sums as keep the GPU busy. Zeros fill the last sum.
    """
    outer, channels, inner = table.shape
    if inner >= NARROW:  # the values of a channel lie side by side
        runs = -(-inner // 2**13)
        run = -(-inner // runs)
        cut = pad(table, (0, runs * run - inner)).view(outer, channels, runs, run)
        return cut.sum(3, dtype=torch.int32).unsqueeze(1)
    # Channels alternate: neighbours in memory are the neighbouring columns of a table with joined rows.
    period, joined = channels * inner, joined_rows(table)
    run = min(2**9, -(-outer // joined))
    runs = -(-outer // (joined * run))
    cut = pad(table.view(outer, period), (0, 0, 0, runs * run * joined - outer)).view(runs, run, joined * period)
    return cut.sum(1, dtype=torch.int32).view(runs, joined, channels, inner)


def _part_sums(part: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of `_ByteSums`, by a compiled kernel that reads every byte once."""
    values = part.int()
    return values.sum(2, dtype=torch.int64).sum(0), (values * values).sum(2, dtype=torch.int64).sum(0)


class _ByteSums:
    """Adds 8-bit integers and their squares exactly in float32, in memory that it reuses.

    float32 takes half the memory of int64, and CPUs add it fastest. It holds the sum of a row of 256 squares exactly;
    the sums of the rows are added in float64.
    """

    def __init__(self) -> None:
        self._values = torch.empty(0)

    def __call__(self, piece: Tensor) -> tuple[Tensor, Tensor]:
        """Return sum and sum of squares per column, int64, shape `(width,)`, of a piece `(outer, width, inner)`."""
        outer, width, inner = piece.shape
        # A row of 256 values of a column lies side by side in memory if inner > 1. Else the columns lie side by side,
        # and 256 rows of the table are added for all columns at once.
        side_by_side = inner > 1
        rows, length = (outer * width, inner) if side_by_side else (width, outer)
        padded = -(-length // _ROW) * _ROW
        shape = (rows, padded // _ROW, _ROW) if side_by_side else (padded // _ROW, _ROW, width)
        # All pieces but the last have the same shape. Asking the system for new memory takes longer than filling it.
        if self._values.shape != shape:
            self._values = torch.zeros(shape, device=piece.device)
        flat = self._values.view(rows, padded).t() if side_by_side else self._values.view(padded, width)
        flat[:length].copy_(piece.reshape(rows, length).t() if side_by_side else piece.squeeze(2))
        flat[length:] = 0  # padding, where a longer piece may have left values
        total = self._add(outer if side_by_side else None)
        self._values.square_()
        return total, self._add(outer if side_by_side else None)

    def _add(self, outer: int | None) -> Tensor:
        """Return the sum of every column: rows of 256 values are added in float32, their sums in float64."""
        if outer is None:
            return self._values.sum(1).sum(0, dtype=torch.float64).long()
        return self._values.sum(2).sum(1, dtype=torch.float64).view(outer, -1).sum(0).long()
