"""Views a tensor as (outer, channels, inner) in the order of its memory, in pieces that fit into the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["NARROW", "ChannelView", "Scratch", "by_memory", "channel_view", "dense", "joined_rows", "pieces"]

_CACHED = 5 << 17
"""Elements of a piece on a CPU, per thread: few enough for its caches, and many enough to outweigh the calls."""
_LAUNCHED = 1 << 23
"""Most elements of a piece. On an accelerator it bounds the memory for intermediate values; and float32 counts twice as
many exactly (see `integer_sums`)."""
NARROW = 64
"""Channels with fewer values side by side are joined into wide rows, since starting a short loop costs more than the
loop."""


@dataclass(frozen=True)
class ChannelView:
    """A dense tensor as parts of shape `(outer, width, inner)`, views of its memory.

    Where the values of a channel lie side by side, width is the number of channels. Where channels alternate (as in
    tables, and in images with the channels last), several rows are joined: inner is 1, and width a multiple of the
    number of channels.

    So a reduction over `outer` and `inner` reads memory from its beginning to its end, for any rank, memory format and
    position of the channels. Sums and elementwise loops need the same code for all, and run at the speed of memory.

    Attributes:
        parts: At most two views that together hold every element once.
        channels: Number of channels C.
        repeat: Number of neighbours in `width` that belong to a channel before the next channel begins.
    """

    parts: tuple[Tensor, ...]
    channels: int
    repeat: int

    def spread(self, values: Tensor, part: Tensor) -> Tensor:
        """Return per-channel values in a shape that broadcasts against a part.

        Args:
            values: A value per channel, shape `(C,)`.
            part: An element of `parts`.

        Returns:
            Shape `(1, width, 1)`.
        """
        period = self.channels * self.repeat
        return values.repeat_interleave(self.repeat).repeat(part.shape[1] // period).view(1, -1, 1)

    def fold(self, values: Tensor) -> Tensor:
        """Sort values per column by channel.

        Args:
            values: Shape `(width,)` or `(K, width)`.

        Returns:
            Shape `(M, C)`: the M values of each channel.
        """
        # Columns are ordered by joined row, then by channel, then by neighbour within the channel.
        rows = values.reshape(-1, self.channels, self.repeat)
        return rows.transpose(1, 2).reshape(-1, self.channels)


def dense(values: Tensor) -> Tensor:
    """Return a tensor that fills its memory without gaps or overlaps.

    Args:
        values: Any tensor.

    Returns:
        The tensor itself if it is dense, in any order of dimensions; else a contiguous copy.
    """
    return values if values.permute(_memory_order(values)).is_contiguous() else values.contiguous()


def channel_view(values: Tensor, channel_dim: int | None, like: Tensor | None = None) -> ChannelView:
    """View a dense tensor by channel.

    Args:
        values: A dense tensor (see `dense`) of any rank.
        channel_dim: The dimension of the channels; a negative number counts from the end. None takes all values as one
            channel.
        like: A tensor of the same shape whose memory order the view takes; `values` is copied if its order differs.
            None takes the order of `values`.

    Returns:
        The view.
    """
    table = by_memory(values, channel_dim, like)
    outer, channels, inner = table.shape
    if inner >= NARROW or not values.numel():
        return ChannelView((table,), channels, 1)
    # Starting a loop over few values costs more than the loop. So many short rows become few long rows: each long row
    # joins `joined` short rows, and the channels repeat in it every `period` columns.
    period, joined = channels * inner, joined_rows(table)
    rows = table.reshape(outer, period)
    whole = outer - outer % joined  # the remaining rows are the second part
    parts = [rows[:whole].reshape(-1, period * joined, 1)]  # a view, except for an expanded mask
    if whole < outer:
        parts.append(rows[whole:].unsqueeze(2))
    return ChannelView(tuple(parts), channels, inner)


def by_memory(values: Tensor, channel_dim: int | None, like: Tensor | None = None) -> Tensor:
    """View a dense tensor as `(outer, channels, inner)` in the order of its memory.

    Args:
        values: A dense tensor.
        channel_dim: The dimension of the channels; None takes all values as one channel.
        like: A tensor of the same shape whose memory order the view takes; None takes the order of `values`.

    Returns:
        The view; a copy if the order of `like` differs.
    """
    order = _memory_order(values if like is None else like)
    # Permuted into the order of its memory, a dense tensor is contiguous, so `reshape` below returns views.
    permuted = values.permute(order)
    sizes = list(permuted.shape)
    if channel_dim is None:
        return permuted.reshape(1, 1, values.numel())
    at = order.index(channel_dim % values.dim())
    return permuted.reshape(math.prod(sizes[:at]), sizes[at], math.prod(sizes[at + 1 :]))


def joined_rows(table: Tensor) -> int:
    """Return how many rows of a table make a long row, if its channels alternate.

    Args:
        table: A table of `by_memory`, with values.

    Returns:
        The number of rows, of `C * inner` values each.
    """
    outer, channels, inner = table.shape
    return max(1, min(outer, NARROW * 16 // (channels * inner)))


def pieces(part: Tensor, elements: int | None = None) -> Iterator[tuple[slice, slice, slice]]:
    """Divide a part of a view into pieces small enough to stay in the cache of a processor.

    Args:
        part: Shape `(outer, width, inner)`.
        elements: The approximate number of elements in a piece; None takes a number for the device.

    Yields:
        The index of each piece; no index for an empty part.
    """
    cached = min(int(_CACHED * torch.get_num_threads()), _LAUNCHED)
    size = elements or (cached if part.device.type == "cpu" else _LAUNCHED)
    outer, width, inner = part.shape
    if not part.numel():
        return
    # A piece holds as many whole rows as fit. A row longer than two pieces is cut too, into runs of at least 256 values
    # per channel, so that the runs outweigh the start of their loop.
    rows = max(1, size // (width * inner))
    columns = inner if width * inner <= 2 * size else max(256, size // width // 256 * 256)
    for row in range(0, outer, rows):
        for column in range(0, inner, columns):
            yield slice(row, row + rows), slice(None), slice(column, column + columns)


class Scratch:
    """Memory that pieces use in turn, since asking the system for new memory takes longer than filling it."""

    def __init__(self) -> None:
        self._rooms: dict[tuple[str, torch.dtype], Tensor] = {}

    def like(self, piece: Tensor, dtype: torch.dtype, name: str = "") -> Tensor:
        """Return memory for a piece; its content is undefined.

        Args:
            piece: The piece.
            dtype: The dtype of the memory.
            name: A name that tells this memory from other memory of the same dtype; each name has its own memory.

        Returns:
            A contiguous tensor of the shape of the piece.
        """
        room = self._rooms.get((name, dtype))
        if room is None or room.numel() < piece.numel():  # all pieces but the last have the same size
            room = self._rooms[name, dtype] = torch.empty(piece.numel(), dtype=dtype, device=piece.device)
        return room[: piece.numel()].view(piece.shape)


def _memory_order(values: Tensor) -> list[int]:
    """Return the dimensions by stride, from the largest to the smallest."""
    dims = list(range(values.dim()))
    if values.is_contiguous():
        return dims
    strides = values.stride()
    return sorted(dims, key=lambda dim: -strides[dim])
