"""The moments of a batch over all ranks, by one collective in which every rank sends one row of float64.

The row of a rank, with C channels:

| entries | meaning |
|---|---|
| samples, nonfinite, beyond, mixed, kind | the number of samples; 1 for each fault; the `Kind` of the values |
| 4 x C: count, mean, rest, m2 | `Moments` of floating-point values |
| 8 x C: upper, then lower 32 bits of count, sum, squares, upper half | exact sums of integers, see `integer_sums` |

Where the ranks have not agreed on a kind, all rows have the longer length. Rows of several inputs follow each other, in
one collective. Sums and moments of all ranks are merged in
the order of ranks, so that every rank gets the same numbers to the bit.
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

__all__ = ["GlobalBatch", "RankBatch", "gather", "global_moments", "measure", "share"]

_HEADER = 5
_LOWER = 0xFFFFFFFF


@dataclass(frozen=True)
class GlobalBatch:
    """What all ranks together know of one batch.

    Attributes:
        moments: Of the values of all ranks.
        kind: What sort of numbers they are; unknown where no rank has any, and where ranks differ.
        samples: Number of samples of all ranks, a float64 scalar.
        faults: How many ranks have NaN or infinity, integers beyond 32 bits, and another kind of numbers than the
            others or than before; float64, shape `(3,)`.
    """

    moments: Moments
    kind: Kind
    samples: Tensor
    faults: Tensor


@dataclass(frozen=True)
class RankBatch:
    """What one rank knows of a batch.

    Attributes:
        agreed: The kind of numbers that ranks have agreed on before.
        kind: That of this rank's values.
        header: Samples, three faults and the kind, float64, shape `(5,)`.
        body: What `sums_or_moments` returns, shape `(4, C)`.
    """

    agreed: Kind
    kind: Kind
    header: Tensor
    body: Tensor

    @classmethod
    def of_nothing(cls, agreed: Kind, channels: int, device: torch.device) -> RankBatch:
        """Return what a rank knows that has no part of the batch."""
        header = torch.zeros(_HEADER, dtype=torch.float64, device=device)
        return cls(agreed, Kind.UNKNOWN, header, _no_body(agreed, channels, device))

    def join(self, other: RankBatch) -> RankBatch:
        """Return what the rank knows of two parts of a batch, which hold the same channels at two places.

        Args:
            other: The other part, of which the ranks have agreed on the same kind.

        Returns:
            What it knows of both; parts of different kinds are a fault, as they are between ranks.
        """
        header = self.header + other.header.to(self.header.device)
        header[1:4].clamp_(max=1)
        first, second = (part.body.to(header.device) for part in (self, other))
        kind = self.kind or other.kind
        header[4].fill_(kind)  # an argument of the kernel, where an assignment would copy it and wait
        if other.kind not in (Kind.UNKNOWN, kind):
            header[3].fill_(1)
            second = torch.zeros_like(first)
        if first.dtype != second.dtype:  # one of them is of no values
            body = second if self.kind is Kind.UNKNOWN else first
        elif first.dtype == torch.int64:
            body = first + second
        else:
            body = torch.stack(join(*torch.stack([first, second]).unbind(1)).astuple())
        return RankBatch(self.agreed, Kind(kind), header, body)

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
        """Return what is known where there is no other rank."""
        kind = self.kind if self.agreed is Kind.UNKNOWN else self.agreed
        return GlobalBatch(_merged(kind, self.body.unsqueeze(0)), kind, self.header[0], self.header[1:4])

    def among(self, table: Tensor) -> GlobalBatch:
        """Return what is known from the rows of all ranks, shape `(ranks, L)`."""
        header, body = table[:, :_HEADER], table[:, _HEADER:].reshape(len(table), -1, self.body.shape[1])
        faults, kind = header[:, 1:4].sum(0), self.agreed
        if kind is Kind.UNKNOWN:  # on an accelerator the host waits for it
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

    A rank whose values are of another kind than agreed sends nothing but the fault, so that all ranks can complain
    together.

    Args:
        values: This rank's values; there may be none.
        channel_dim: Where the channels are. None takes all values as one channel.
        kind: What kind of numbers the ranks have agreed on.
        mask: True where values count; broadcast to the shape of `values`.
        ignore_nan: Whether NaN is left out.
        compile: Whether 8-bit integers are added by a compiled kernel.
        chosen: True for the channels to measure, shape `(C,)`; others have count 0, whatever they hold. None is all.
        nodata: Numbers that stand for no value.

    Returns:
        What this rank knows.
    """
    if values.device.type == "mps":  # has no float64
        values, mask, chosen = values.cpu(), _on_cpu(mask), _on_cpu(chosen)
    own = Kind.of(values)
    mixed = Kind.UNKNOWN not in (own, kind) and own is not kind
    if mixed or own is Kind.UNKNOWN:
        channels = 1 if channel_dim is None else values.shape[channel_dim]
        body, beyond = _no_body(kind, channels, values.device), None
    else:
        body, beyond = sums_or_moments(values, channel_dim, KeepRules(mask, nodata, ignore_nan), compile, chosen)
    # Each number is an argument of a kernel. A list would be copied to an accelerator, and the host would wait for it.
    header = torch.zeros(_HEADER, dtype=torch.float64, device=values.device)
    for index, number in enumerate((_count_samples(values, channel_dim), 0, 0, mixed, own)):
        if number:
            header[index].fill_(number)
    if beyond is not None:
        header[2] = beyond
    elif body.dtype == torch.float64:
        header[1] = ~body.isfinite().all()
    return RankBatch(kind, own, header, body)


def gather(row: Tensor, group: Any, ranks: int) -> Tensor:
    """Return the rows of all ranks, which have one length, by one collective.

    Args:
        row: That of this rank, float64, shape `(L,)`.
        group: The process group; None is the default group.
        ranks: How many ranks it has.

    Returns:
        Shape `(ranks, L)`.
    """
    table = row.new_empty(ranks, len(row))
    torch.distributed.all_gather([*table], row, group=group)  # pyright: ignore[reportUnknownMemberType] # torch does not type it
    return table


def share(own: Sequence[RankBatch], group: Any, ranks: int) -> list[GlobalBatch]:
    """Return what all ranks know of the batches of several inputs, by one collective for all of them.

    Args:
        own: What this rank knows of the batch of each input, the same inputs on all ranks.
        group: The process group; None is the default group.
        ranks: How many ranks it has; with 1 there is no collective.

    Returns:
        What is known then of each batch, the same on all ranks.
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

    Ranks may hold different numbers of samples, and none.

    Args:
        values: This rank's values.
        channel_dim: Where the channels are. None takes all values as one channel.
        kind: What kind of numbers the ranks have agreed on. Unknown finds out; on accelerators that waits for them.
        mask: True where values count; broadcast to the shape of `values`.
        ignore_nan: Whether NaN is left out.
        group: The process group; None is the default group.
        ranks: How many ranks it has; with 1 there is no collective.
        compile: Whether 8-bit integers are added by a compiled kernel.

    Returns:
        What is known then, the same on all ranks.
    """
    (batch,) = share([measure(values, channel_dim, kind, mask, ignore_nan, compile)], group, ranks)
    return batch


def _on_cpu(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.cpu()


def _no_body(agreed: Kind, channels: int, device: torch.device) -> Tensor:
    """Return the sums or moments of no values."""
    dtype = torch.float64 if agreed in (Kind.FLOAT, Kind.UNKNOWN) else torch.int64
    return torch.zeros(4, channels, dtype=dtype, device=device)


def _merged(kind: Kind, body: Tensor) -> Moments:
    """Merge what all ranks have measured, shape `(ranks, 4, C)`."""
    if kind is Kind.UNKNOWN:
        return Moments(*torch.zeros_like(body[0], dtype=torch.float64)[:4])
    if kind is Kind.FLOAT:
        return Moments(*body[0]) if len(body) == 1 else join(*body.unbind(1))
    return Moments(*moments_of_sums(*body.sum(0)))


def _count_samples(values: Tensor, channel_dim: int | None) -> int:
    """Return the size of the first dimension that holds no channels; 1 for a sample without a batch dimension."""
    if channel_dim is None or channel_dim % values.dim() != 0:
        return values.shape[0]
    return values.shape[1] if values.dim() > 1 else 1
