"""Measures the moments of a batch over all ranks, by a single collective: every rank sends a row of float64.

The row of a rank, with C channels:

| entries | meaning |
|---|---|
| samples, nonfinite, beyond, mixed, kind | the number of samples; 1 for each fault, else 0; the `Kind` of the values |
| 4 x C: count, mean, rest, m2 | `Moments` of floating-point values |
| 8 x C: upper, then lower 32 bits of count, sum, squares, upper half | exact sums of integers, see `integer_sums` |

A row of float64 holds the 64 bits of an integer in two halves. In the first batch a rank does not know the kind of the
others' values, so all rows have the longer length. The rows of several inputs are joined into one row. Every
rank merges the rows in the order of ranks, so all get the same numbers to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed
from torch import Tensor

from lightning_revbn.core.integer_sums import moments_of_sums
from lightning_revbn.core.keep_rules import KeepRules
from lightning_revbn.core.moments import Kind, Moments, join, sums_or_moments

__all__ = ["GlobalBatch", "RankBatch", "count_samples", "gather", "global_moments", "measure", "share"]

_HEADER = 5
_LOWER = 0xFFFFFFFF


@dataclass(frozen=True)
class GlobalBatch:
    """The moments and faults of a batch over all ranks.

    Attributes:
        moments: The moments of the values of all ranks.
        kind: The kind of the values; unknown if no rank has a value, or ranks differ.
        samples: Number of samples of all ranks, a float64 scalar.
        faults: Number of ranks with each fault, float64, shape `(3,)`: NaN or infinity; an integer beyond 32 bits;
            another kind of numbers than other ranks or earlier batches.
        size: The number of samples, if the host knows it, as it does without other ranks; else None.
    """

    moments: Moments
    kind: Kind
    samples: Tensor
    faults: Tensor
    size: int | None = None


@dataclass(frozen=True)
class RankBatch:
    """The part of a rank in a batch, measured.

    Attributes:
        agreed: The kind of the earlier batches; unknown before the first.
        kind: The kind of this rank's values; unknown if it has none.
        header: Samples, three faults and the kind, float64, shape `(5,)`.
        body: The sums or moments of `sums_or_moments`, shape `(4, C)`.
        size: The number of samples.
    """

    agreed: Kind
    kind: Kind
    header: Tensor
    body: Tensor
    size: int = 0

    @classmethod
    def of_nothing(cls, agreed: Kind, channels: int, device: torch.device) -> RankBatch:
        """Return the measurement of a rank without a part of the batch."""
        header = torch.zeros(_HEADER, dtype=torch.float64, device=device)
        return cls(agreed, Kind.UNKNOWN, header, _no_body(agreed, channels, device))

    def join(self, other: RankBatch) -> RankBatch:
        """Join two parts of this rank's batch, which hold the same channels at two places.

        Args:
            other: The other part, with the same `agreed`.

        Returns:
            The measurement of both parts. Parts of different kinds are a fault, as between ranks.
        """
        header = self.header + other.header.to(self.header.device)
        header[1:4].clamp_(max=1)
        first, second = (part.body.to(header.device) for part in (self, other))
        kind = self.kind or other.kind
        header[4].fill_(kind)  # on an accelerator an assignment would copy the number, and the host would wait
        if other.kind not in (Kind.UNKNOWN, kind):
            header[3].fill_(1)
            second = torch.zeros_like(first)
        if first.dtype != second.dtype:  # a part without values has a body of float64
            body = second if self.kind is Kind.UNKNOWN else first
        elif first.dtype == torch.int64:
            body = first + second
        else:
            body = torch.stack(join(*torch.stack([first, second]).unbind(1)).astuple())
        return RankBatch(self.agreed, Kind(kind), header, body, self.size + other.size)

    def row(self) -> Tensor:
        """Return the row that this rank sends."""
        if self.body.dtype == torch.int64:
            body = torch.cat([self.body >> 32, self.body & _LOWER]).double()
        elif self.agreed is Kind.FLOAT:
            body = self.body
        else:
            body = torch.cat([self.body, torch.zeros_like(self.body)])
        return torch.cat([self.header, body.flatten()])

    def alone(self) -> GlobalBatch:
        """Return the batch without other ranks."""
        kind = self.kind if self.agreed is Kind.UNKNOWN else self.agreed
        moments = _merged(kind, self.body.unsqueeze(0))
        return GlobalBatch(moments, kind, self.header[0], self.header[1:4], self.size)

    def among(self, table: Tensor) -> GlobalBatch:
        """Return the batch of all ranks from their rows, shape `(ranks, L)`."""
        header, body = table[:, :_HEADER], table[:, _HEADER:].reshape(len(table), -1, self.body.shape[1])
        faults, kind = header[:, 1:4].sum(0), self.agreed
        if kind is Kind.UNKNOWN:  # in the first batch only; on an accelerator the host waits here
            found = {Kind(int(number)) for number in cast("list[float]", header[:, 4].tolist())} - {Kind.UNKNOWN}  # pyright: ignore[reportUnknownMemberType] # torch does not type it
            if len(found) == 1:
                (kind,) = found
            else:
                faults[2] += len(found)
        if kind is Kind.FLOAT:
            body = body[:, :4]
        elif kind is not Kind.UNKNOWN:
            body = (body[:, :4].long() << 32) + body[:, 4:].long()
        return GlobalBatch(_merged(kind, body), kind, header[:, 0].sum(), faults)


def measure(
    values: Tensor,
    channel_dim: int | None,
    kind: Kind = Kind.UNKNOWN,
    mask: Tensor | None = None,
    ignore_nan: bool = False,
    compile: bool = False,
    chosen: Tensor | None = None,
    nodata: Sequence[float] = (),
) -> RankBatch:
    """Measure this rank's part of a batch.

    Values of another kind than `kind` are not measured: the rank sends only the fault, so all ranks raise together.

    Args:
        values: This rank's values; they may be empty.
        channel_dim: The dimension of the channels; None takes all values as a single channel.
        kind: The kind of the earlier batches; unknown before the first.
        mask: True where values count; broadcasts to `values`. None counts all values.
        ignore_nan: Whether NaN is left out.
        compile: Whether a compiled kernel adds 8-bit integers.
        chosen: True for the channels to measure, shape `(C,)`; all other channels get count 0, even where they hold
            NaN. None is all channels.
        nodata: Numbers that stand for a missing value, and are left out.

    Returns:
        The measurement of this rank, for `share`.
    """
    if values.device.type == "mps":  # mps has no float64
        values, mask, chosen = values.cpu(), _on_cpu(mask), _on_cpu(chosen)
    own = Kind.of(values)
    mixed = Kind.UNKNOWN not in (own, kind) and own is not kind
    if mixed or own is Kind.UNKNOWN:
        channels = 1 if channel_dim is None else values.shape[channel_dim]
        body, beyond = _no_body(kind, channels, values.device), None
    else:
        body, beyond = sums_or_moments(values, channel_dim, KeepRules(mask, nodata, ignore_nan), compile, chosen)
    # fill_ passes a number as an argument of its kernel. A list would be copied to the accelerator, and the host would
    # wait for the copy.
    header, size = torch.zeros(_HEADER, dtype=torch.float64, device=values.device), count_samples(values, channel_dim)
    for index, number in enumerate((size, 0, 0, mixed, own)):
        if number:
            header[index].fill_(number)
    if beyond is not None:
        header[2] = beyond
    elif body.dtype == torch.float64:
        header[1] = ~body.isfinite().all()
    return RankBatch(kind, own, header, body, size)


def gather(row: Tensor, group: Any, ranks: int) -> Tensor:
    """Gather the rows of all ranks, by a single collective.

    Args:
        row: The row of this rank, float64, shape `(L,)`, of the same length on all ranks.
        group: The process group; None is the default group.
        ranks: Number of ranks in the group.

    Returns:
        The rows in the order of ranks, shape `(ranks, L)`.
    """
    # Not all_reduce: moments of floating-point values do not add up, and the order of its sums is not defined.
    table = row.new_empty(ranks, len(row))
    torch.distributed.all_gather([*table], row, group=group)  # pyright: ignore[reportUnknownMemberType] # torch does not type it
    return table


def share(own: Sequence[RankBatch], group: Any, ranks: int) -> list[GlobalBatch]:
    """Merge the batches of several inputs over all ranks, by a single collective.

    Args:
        own: This rank's measurement of each input, in the same order on all ranks.
        group: The process group; None is the default group.
        ranks: Number of ranks in the group; 1 needs no collective.

    Returns:
        The batch of all ranks of each input, equal to the bit on all ranks.
    """
    if ranks == 1 or not own:
        return [batch.alone() for batch in own]
    rows = [batch.row().to(own[0].header.device) for batch in own]
    tables = torch.split(gather(torch.cat(rows), group, ranks), [len(row) for row in rows], dim=1)
    return [batch.among(table) for batch, table in zip(own, tables, strict=True)]


def global_moments(
    values: Tensor,
    channel_dim: int | None = 1,
    *,
    kind: Kind = Kind.UNKNOWN,
    mask: Tensor | None = None,
    ignore_nan: bool = False,
    group: Any = None,
    ranks: int = 1,
    compile: bool = False,
) -> GlobalBatch:
    """Measure a batch over all ranks with at most one collective.

    Ranks may hold different numbers of samples, and some may hold none.

    Args:
        values: This rank's values.
        channel_dim: The dimension of the channels; None takes all values as a single channel.
        kind: The kind of numbers that all ranks hold. With `Kind.UNKNOWN` ranks tell each other their kinds, and the
            host waits for an accelerator.
        mask: True where values count; broadcasts to `values`. None counts all values.
        ignore_nan: Whether NaN is left out.
        group: The process group; None is the default group.
        ranks: Number of ranks in the group; 1 needs no collective.
        compile: Whether a compiled kernel adds 8-bit integers.

    Returns:
        The batch of all ranks, equal to the bit on all ranks.
    """
    (batch,) = share([measure(values, channel_dim, kind, mask, ignore_nan, compile)], group, ranks)
    return batch


def count_samples(values: Tensor, channel_dim: int | None) -> int:
    """Count the samples of a batch.

    Args:
        values: The batch.
        channel_dim: The dimension of the channels; None takes all values as a single channel.

    Returns:
        The size of the first dimension that is not the channels'; 1 if there is only that dimension.
    """
    if channel_dim is None or channel_dim % values.dim() != 0:
        return values.shape[0]
    return values.shape[1] if values.dim() > 1 else 1


def _on_cpu(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.cpu()


def _no_body(agreed: Kind, channels: int, device: torch.device) -> Tensor:
    """Return the sums or moments of a rank without values."""
    dtype = torch.float64 if agreed in (Kind.FLOAT, Kind.UNKNOWN) else torch.int64
    return torch.zeros(4, channels, dtype=dtype, device=device)


def _merged(kind: Kind, body: Tensor) -> Moments:
    """Merge the sums or moments of all ranks, shape `(ranks, 4, C)`."""
    if kind is Kind.UNKNOWN:
        return Moments(*torch.zeros_like(body[0], dtype=torch.float64)[:4])
    if kind is Kind.FLOAT:
        return Moments(*body[0]) if len(body) == 1 else join(*body.unbind(1))
    return Moments(*moments_of_sums(*body.sum(0)))
