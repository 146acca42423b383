"""Count, mean and sum of squared deviations per channel: of a batch, merged, and over all ranks by one all-reduce.

Everything is float64. Integers are summed exactly in int64 before anything is rounded, so that their statistics do not
depend, to the bit, on how a batch is divided among ranks. Floating-point values are measured from a shift near their
mean that all ranks share, so that nothing cancels where the mean is large and the spread small.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, cast

import torch
import torch.distributed
from torch import Tensor

from lightning_revbn.core.channel_view import ChannelView, channel_view, dense, pieces
from lightning_revbn.core.integer_sums import OUT_OF_RANGE, integer_sums, moments_of_sums

__all__ = ["GlobalBatch", "Kind", "Moments", "global_moments", "moments"]

_HEADER = 5
"""Samples, three faults and the kind, before the sums that a rank sends."""


class Kind(IntEnum):
    """What sort of numbers batches are made of; it decides how they are summed and what 1 is."""

    UNKNOWN = 0
    UINT8 = 1
    INTEGER = 2
    FLOAT = 3

    @classmethod
    def of(cls, values: Tensor) -> Kind:
        """Return the kind of a tensor; of an empty one it is not known."""
        if not values.numel():
            return cls.UNKNOWN
        if values.dtype == torch.uint8:
            return cls.UINT8
        return cls.FLOAT if values.is_floating_point() else cls.INTEGER


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations from the mean, per channel.

    Attributes:
        count: How many values, float64, shape `(C,)`.
        mean: Their mean, float64, shape `(C,)`; 0 where there are none.
        m2: The sum of their squared deviations from the mean, float64, shape `(C,)`.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @property
    def variance(self) -> Tensor:
        """`m2 / count`, shape `(C,)`; 0 where there are no values."""
        return _divide(self.m2, self.count)

    @property
    def std(self) -> Tensor:
        """`sqrt(m2 / count)`, shape `(C,)`."""
        return self.variance.sqrt()

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets of values together.

        Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).

        Args:
            other: Moments of other values of the same channels.

        Returns:
            Those of all.

        Example:
            >>> first, second = (moments(torch.tensor([[0.0], [value]])) for value in (2.0, 6.0))
            >>> both = first.merge(second)
            >>> both.count.item(), both.mean.item(), both.m2.item()
            (4.0, 2.0, 24.0)
        """
        return _join(*(torch.stack(pair) for pair in zip(self.astuple(), other.astuple(), strict=True)))

    def astuple(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return count, mean and m2."""
        return self.count, self.mean, self.m2

    def scaled(self, factor: float) -> Moments:
        """Return the moments of the values divided by a factor."""
        return Moments(self.count, self.mean / factor, self.m2 / factor**2)

    def moved(self, shift: Tensor) -> Moments:
        """Return the moments of the values plus a shift, shape `(C,)`."""
        return Moments(self.count, self.mean + shift, self.m2)


@dataclass(frozen=True)
class GlobalBatch:
    """What all ranks together know of one batch.

    Attributes:
        moments: Of the values of all ranks, minus `shift`.
        shift: What was subtracted, float64, shape `(C,)`.
        kind: What sort of numbers they are; unknown where no rank has any.
        samples: Number of samples of all ranks, a float64 scalar.
        faults: How many ranks have NaN or infinity, integers beyond 32 bits, and another kind of numbers than the
            others or than before; float64, shape `(3,)`.
    """

    moments: Moments
    shift: Tensor
    kind: Kind
    samples: Tensor
    faults: Tensor


def moments(
    values: Tensor, channel_dim: int | None = 1, *, mask: Tensor | None = None, ignore_nan: bool = False
) -> Moments:
    """Measure count, mean and sum of squared deviations per channel.

    Args:
        values: A tensor of any rank and dtype with at least one dimension.
        channel_dim: Where the channels are. None takes all values as one channel.
        mask: True where values count; broadcast to the shape of `values`.
        ignore_nan: Whether NaN is left out.

    Returns:
        The moments. Those of integers are exact before the last rounding.

    Raises:
        ValueError: If an integer lies beyond 32 bits.

    Example:
        >>> measured = moments(torch.tensor([[250, 0], [252, 4]], dtype=torch.uint8))
        >>> measured.mean.tolist(), measured.std.tolist()
        ([251.0, 2.0], [1.0, 2.0])
    """
    batch = global_moments(values, channel_dim, mask=mask, ignore_nan=ignore_nan)
    if batch.faults[1]:
        raise ValueError(OUT_OF_RANGE)
    return batch.moments.moved(batch.shift)


def global_moments(
    values: Tensor,
    channel_dim: int | None = 1,
    *,
    kind: Kind = Kind.UNKNOWN,
    shift: Tensor | None = None,
    mask: Tensor | None = None,
    ignore_nan: bool = False,
    group: Any = None,
    ranks: int = 1,
    compile: bool = False,
) -> GlobalBatch:
    """Measure a batch over all ranks with at most one collective.

    Ranks may hold different numbers of samples, and none. A rank whose values are of another kind sends nothing but
    the fault, so that all ranks can complain together.

    Args:
        values: This rank's values.
        channel_dim: Where the channels are. None takes all values as one channel.
        kind: What kind of numbers the ranks have agreed on. Unknown finds out; on accelerators that waits for them.
        shift: A value near the mean of each channel, float64, shape `(C,)`, the same on all ranks; for floating-point
            values. None agrees on one in the same collective, which carries a row for every rank then, not their sum.
        mask: True where values count; broadcast to the shape of `values`.
        ignore_nan: Whether NaN is left out.
        group: The process group; None is the default group.
        ranks: How many ranks it has; with 1 there is no collective.
        compile: Whether 8-bit integers are added by a compiled kernel.

    Returns:
        What is known then, the same on all ranks.
    """
    if values.device.type == "mps":  # has no float64
        values, mask = values.cpu(), None if mask is None else mask.cpu()
    own = Kind.of(values)
    expected = own if kind is Kind.UNKNOWN else kind
    fits = own in (Kind.UNKNOWN, expected)
    row = _own_row(values, channel_dim, expected if fits else Kind.UNKNOWN, shift, mask, ignore_nan, compile)
    row[3:_HEADER] = torch.tensor([not fits, own])
    if ranks > 1:
        # Sums of integers add up, and so do moments from one shift. Before there is a shift, or a kind of numbers to
        # sum by, every rank must see the row of every other rank.
        if kind is Kind.UNKNOWN or (kind is Kind.FLOAT and shift is None):
            row = _all_rows(row, group, ranks)
        elif kind is Kind.FLOAT:
            return _sum_from_shift(row, group, kind, cast("Tensor", shift))
        else:
            torch.distributed.all_reduce(row, group=group)  # pyright: ignore[reportUnknownMemberType] # torch does not type it
    table = row.view(-1, len(row)) if row.dim() == 1 else row
    return _from_table(table, expected if ranks == 1 else kind)


def _own_row(
    values: Tensor,
    channel_dim: int | None,
    kind: Kind,
    shift: Tensor | None,
    mask: Tensor | None,
    ignore_nan: bool,
    compile: bool,
) -> Tensor:
    """Return what this rank knows as int64, shape `(5 + 4 C,)`.

    After the header come, for integers, count, sum, sum of squares modulo 2^64, and its upper half; for floating-point
    values the bits of count, shift, mean from there, and m2.
    """
    channels = 1 if channel_dim is None else values.shape[channel_dim]
    row = torch.zeros(_HEADER + 4 * channels, dtype=torch.int64, device=values.device)
    row[0] = _count_samples(values, channel_dim)
    if kind is Kind.UNKNOWN or not values.numel():
        return row
    tidy = dense(values)
    view = channel_view(tidy, channel_dim)
    valid = None if mask is None else channel_view(mask.expand(values.shape), channel_dim, like=tidy)
    if kind is Kind.FLOAT:
        if shift is None:
            # The mean of this rank, rounded to float32: numbers so short that the difference of the shifts of two ranks
            # is exact in float64.
            shift = torch.zeros(channels, dtype=torch.float64, device=values.device)
            shift = _float_moments(view, valid, shift, ignore_nan).mean.float().double()
        own = _float_moments(view, valid, shift, ignore_nan)
        body = torch.stack([own.count, shift, own.mean, own.m2])
        row[1] = ~body.isfinite().all()
        row[_HEADER:] = body.flatten().view(torch.int64)
    else:
        row[_HEADER:], row[2] = integer_sums(view, valid, compile)
    return row


def _count_samples(values: Tensor, channel_dim: int | None) -> int:
    """Return the size of the first dimension that holds no channels; 1 for a sample without a batch dimension."""
    if channel_dim is None or channel_dim % values.dim() != 0:
        return values.shape[0]
    return values.shape[1] if values.dim() > 1 else 1


def _all_rows(row: Tensor, group: Any, ranks: int) -> Tensor:
    """Return the rows of all ranks, shape `(ranks, L)`: zeros in all places but one's own, added up."""
    table = row.new_zeros(ranks, len(row))
    table[torch.distributed.get_rank(group)] = row
    torch.distributed.all_reduce(table, group=group)  # pyright: ignore[reportUnknownMemberType] # torch does not type it
    return table


def _sum_from_shift(row: Tensor, group: Any, kind: Kind, shift: Tensor) -> GlobalBatch:
    """Reduce floating-point moments that all ranks measured from one shift, by sums of powers."""
    count, _, mean, m2 = row[_HEADER:].view(torch.float64).view(4, -1)
    message = torch.cat([row[:_HEADER].double(), count, count * mean, m2 + count * mean.square()])
    torch.distributed.all_reduce(message, group=group)  # pyright: ignore[reportUnknownMemberType] # torch does not type it
    count, first, second = message[_HEADER:].view(3, -1)
    mean = _divide(first, count)
    # A difference of nearly equal numbers only where the shift is far from the mean, and the shift is the mean of the
    # first batch. Rounding may leave it below 0; NaN stays NaN.
    m2 = (second - first * mean).clamp(min=0)
    return GlobalBatch(Moments(count, mean, m2), shift, kind, message[0], message[1:4])


def _from_table(table: Tensor, kind: Kind) -> GlobalBatch:
    """Join what several ranks know, shape `(ranks, 5 + 4 C)`."""
    faults = table[:, 1:4].sum(0).double()
    if kind is Kind.UNKNOWN:
        found = {Kind(number) for number in cast("list[int]", table[:, 4].tolist())} - {Kind.UNKNOWN}  # pyright: ignore[reportUnknownMemberType] # torch does not type it
        if len(found) == 1:
            (kind,) = found
        else:
            faults[2] += len(found)
    body = table[:, _HEADER:].reshape(len(table), 4, -1)
    zero = torch.zeros(body.shape[2], dtype=torch.float64, device=table.device)
    if kind is Kind.UNKNOWN:
        joined, shift = Moments(zero, zero, zero), zero
    elif kind is Kind.FLOAT:
        count, shifts, mean, m2 = body.view(torch.float64).unbind(1)
        # Every rank has measured from its own shift. The first rank with values of a channel gives it to all.
        first = (count > 0).long().argmax(0, keepdim=True)
        shift = shifts.gather(0, first).squeeze(0)
        mean = torch.where(count > 0, mean + (shifts - shift), 0.0)
        joined = _join(count, mean, m2)
    else:
        joined, shift = Moments(*moments_of_sums(*body.sum(0))), zero
    return GlobalBatch(joined, shift, kind, table[:, 0].sum().double(), faults)


def _float_moments(view: ChannelView, valid: ChannelView | None, shift: Tensor, ignore_nan: bool) -> Moments:
    """Return the moments of floating-point values minus a shift.

    Every piece is read twice, the second time from its own mean, so that nothing cancels; it is in the cache by then.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for index, part in enumerate(view.parts):
        origin = view.spread(shift, part)
        for at in pieces(part):
            values = part[at].to(torch.float64, copy=True).sub_(origin)
            if valid is None and not ignore_nan:
                mean = values.mean((0, 2))
                m2 = values.sub_(mean.view(1, -1, 1)).square_().sum((0, 2))
                count = torch.full_like(mean, values.shape[0] * values.shape[2])
            else:
                keep = ~values.isnan() if ignore_nan else torch.ones_like(values, dtype=torch.bool)
                if valid is not None:
                    keep &= valid.parts[index][at]
                count = keep.sum((0, 2)).double()
                mean = _divide(torch.where(keep, values, 0.0).sum((0, 2)), count)
                m2 = torch.where(keep, values.sub_(mean.view(1, -1, 1)), 0.0).square_().sum((0, 2))
            found.append((view.fold(count), view.fold(mean), view.fold(m2)))
    count, mean, m2 = (torch.cat(column) for column in zip(*found, strict=True))
    return _join(count, mean, m2)


def _join(count: Tensor, mean: Tensor, m2: Tensor) -> Moments:
    """Return the moments of M sets of values together; every argument has shape `(M, C)`.

    Squared deviations from the common mean are those from the own mean, plus how far the own mean lies from it.
    """
    total = count.sum(0)
    middle = _divide((count * mean).sum(0), total)
    return Moments(total, middle, m2.sum(0) + (count * (mean - middle).square()).sum(0))


def _divide(values: Tensor, count: Tensor) -> Tensor:
    """Return the quotient, and 0 where the count is 0."""
    return torch.where(count > 0, values / count, 0.0)
