"""Views a tensor as (outer, channels, inner) in the order of its memory, in pieces that stay in the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ChannelView", "Scratch", "channel_view", "dense", "pieces"]

_CACHED = 5 << 17
"""Elements of a piece on a CPU, per thread: few enough for its caches, enough to be worth the calls."""
_LAUNCHED = 1 << 23
"""Elements of a piece on an accelerator, where the memory for intermediate values counts, not the cache. Float32 counts
twice as many exactly."""
_NARROW = 64
"""Channels with fewer values side by side are joined to wide rows, since short loops are not worth their start."""


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
        repeat: How many neighbours in `width` belong to a channel, before the next channel begins.
    """

    parts: tuple[Tensor, ...]
    channels: int
    repeat: int

    def spread(self, values: Tensor, part: Tensor) -> Tensor:
        """Return per-channel values so that they broadcast against a part.

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
        # Columns are ordered by joined rows, then channels, then the neighbours of a channel.
        rows = values.reshape(-1, self.channels, self.repeat)
        return rows.transpose(1, 2).reshape(-1, self.channels)


def dense(values: Tensor) -> Tensor:
    """Return a tensor that fills its memory without gaps or overlaps: the same tensor if it does.

    Args:
        values: Any tensor.

    Returns:
        The tensor, or a contiguous copy.
    """
    return values if values.permute(_memory_order(values)).is_contiguous() else values.contiguous()


def channel_view(values: Tensor, channel_dim: int | None, like: Tensor | None = None) -> ChannelView:
    """Look at a dense tensor by channel.

    Args:
        values: A dense tensor (see `dense`) of any rank.
        channel_dim: The dimension of its channels; negative counts from the end. None takes all values as a single
            channel.
        like: A tensor of the same shape whose memory order to take instead; `values` is copied if its order differs.

    Returns:
        The view.
    """
    order = _memory_order(values if like is None else like)
    # In the order of memory a dense tensor is contiguous, so `reshape` below gives views and copies nothing.
    permuted = values.permute(order)
    sizes = list(permuted.shape)
    if channel_dim is None:
        outer, channels, inner = 1, 1, values.numel()
    else:
        at = order.index(channel_dim % values.dim())
        outer, channels, inner = math.prod(sizes[:at]), sizes[at], math.prod(sizes[at + 1 :])
    if inner >= _NARROW or not values.numel():
        return ChannelView((permuted.reshape(outer, channels, inner),), channels, 1)
    # A loop over a handful of values costs more to start than to run. So many short rows become few long rows, each of
    # `joined` periods: along a row the channels come round every `period` columns.
    period = channels * inner
    joined = max(1, min(outer, _NARROW * 16 // period))
    rows = permuted.reshape(outer, period)
    whole = outer - outer % joined  # the remaining rows are the second part
    parts = [rows[:whole].reshape(-1, period * joined, 1)]  # a view, unless it is a mask that was expanded
    if whole < outer:
        parts.append(rows[whole:].unsqueeze(2))
    return ChannelView(tuple(parts), channels, inner)


def pieces(part: Tensor, elements: int | None = None) -> Iterator[tuple[slice, slice, slice]]:
    """Divide a part of a view into pieces small enough to stay in the cache of a processor.

    Args:
        part: Shape `(outer, width, inner)`.
        elements: The approximate number of elements in a piece; None chooses by the device.

    Yields:
        The index of each piece.
    """
    cached = min(int(_CACHED * torch.get_num_threads()), _LAUNCHED)
    size = elements or (cached if part.device.type == "cpu" else _LAUNCHED)
    outer, width, inner = part.shape
    if not part.numel():
        return
    # As many whole rows as fit. A row longer than two pieces is cut as well, into runs that are worth the start of
    # their loop.
    rows = max(1, size // (width * inner))
    columns = inner if width * inner <= 2 * size else max(256, size // width // 256 * 256)
    for row in range(0, outer, rows):
        for column in range(0, inner, columns):
            yield slice(row, row + rows), slice(None), slice(column, column + columns)


class Scratch:
    """Memory for one piece after another: to ask the system for new memory takes longer than to fill it."""

    def __init__(self) -> None:
        self._rooms: dict[tuple[str, torch.dtype], Tensor] = {}

    def like(self, piece: Tensor, dtype: torch.dtype, name: str = "") -> Tensor:
        """Return memory for a piece, with whatever it holds.

        Args:
            piece: The piece.
            dtype: The dtype of the memory.
            name: What tells it from other memory of that dtype that is in use; the same name gives the same memory.

        Returns:
            A contiguous tensor of the shape of the piece.
        """
        room = self._rooms.get((name, dtype))
        if room is None or room.numel() < piece.numel():  # all pieces but the last have one size
            room = self._rooms[name, dtype] = torch.empty(piece.numel(), dtype=dtype, device=piece.device)
        return room[: piece.numel()].view(piece.shape)


def _memory_order(values: Tensor) -> list[int]:
    """Return the dimensions in the order of memory, from the largest stride to the smallest."""
    dims = list(range(values.dim()))
    if values.is_contiguous():
        return dims
    strides = values.stride()
    return sorted(dims, key=lambda dim: -strides[dim])
