"""Measures and merges moments per channel: count, mean and sum of squared deviations, in float64.

A mean is two numbers: `mean`, and the `rest` that rounding took from it. Together they are precise enough for data with
a large mean and a small spread. Sums about a fixed shift would need the shift before the data are known, and would lose
precision where the data move away from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from lightning_revbn.core.channel_view import ChannelView, Scratch, channel_view, dense, pieces
from lightning_revbn.core.integer_sums import OUT_OF_RANGE, integer_sums, moments_of_sums
from lightning_revbn.core.keep_rules import KeepRules, PieceMasks, blank_

__all__ = ["Kind", "Moments", "join", "moments", "sums_or_moments", "two_sum"]


class Kind(IntEnum):
    """The kind of numbers in a batch. It decides how they are summed, and the divisor of `input_range="auto"`."""

    UNKNOWN = 0
    UINT8 = 1
    INTEGER = 2
    FLOAT = 3

    @classmethod
    def of(cls, values: Tensor) -> Kind:
        """Return the kind of a tensor; unknown for an empty tensor."""
        return cls.of_dtype(values.dtype) if values.numel() else cls.UNKNOWN

    @classmethod
    def of_dtype(cls, dtype: torch.dtype) -> Kind:
        """Return the kind of the values of a dtype."""
        if dtype == torch.uint8:
            return cls.UINT8
        return cls.FLOAT if dtype.is_floating_point else cls.INTEGER


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations from the mean, per channel; float64, shape `(C,)` each.

    Attributes:
        count: Number of values; in a moving average, their weight.
        mean: Their mean; 0 where there are no values.
        rest: The part of the mean that rounding has lost: `mean + rest` is the mean in twice the precision.
        m2: The sum of their squared deviations from the mean.
    """

    count: Tensor
    mean: Tensor
    rest: Tensor
    m2: Tensor

    @classmethod
    def of_nothing(cls, channels: int) -> Moments:
        """Return the moments of no values."""
        zero = torch.zeros(channels, dtype=torch.float64)
        return cls(zero, zero, zero, zero)

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

        Args:
            other: Moments of other values of the same channels.

        Returns:
            The moments of all values.

        Example:
            >>> first, second = (moments(torch.tensor([[0.0], [value]])) for value in (2.0, 6.0))
            >>> both = first.merge(second)
            >>> both.count.item(), both.mean.item(), both.m2.item()
            (4.0, 2.0, 24.0)
        """
        # `join` for two sets, element by element: a compiled graph fuses this into a single kernel.
        is_larger = self.count >= other.count
        origin, origin_rest = (
            torch.where(is_larger, self.mean, other.mean),
            torch.where(is_larger, self.rest, other.rest),
        )
        first, second = (
            torch.where(one.count > 0, (one.mean - origin) + (one.rest - origin_rest), 0.0) for one in (self, other)
        )
        total = self.count + other.count
        middle = _divide(self.count * first + other.count * second, total)
        spread = self.count * (first - middle).square() + other.count * (second - middle).square()
        return Moments(total, *two_sum(origin, origin_rest + middle), (self.m2 + other.m2) + spread)

    def weighing(self, weight: Tensor) -> Moments:
        """Return moments with the same mean and variance and another count, shape `(C,)`; merging count 0 adds 0."""
        return Moments(weight, self.mean, self.rest, self.variance * weight)

    def astuple(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return count, mean, rest and m2."""
        return self.count, self.mean, self.rest, self.m2

    def scaled(self, factor: float) -> Moments:
        """Return the moments of the values divided by a factor."""
        if factor == 1:
            return self
        return Moments(self.count, self.mean / factor, self.rest / factor, self.m2 / factor**2)


def moments(
    values: Tensor, channel_dim: int | None = 1, *, mask: Tensor | None = None, ignore_nan: bool = False
) -> Moments:
    """Measure count, mean and sum of squared deviations per channel.

    Args:
        values: A tensor of any real dtype, with at least one dimension.
        channel_dim: The dimension of the channels; None takes all values as a single channel.
        mask: True where values count; broadcasts to `values`. None counts all values.
        ignore_nan: Whether NaN is left out; else it makes the moments of its channel NaN.

    Returns:
        The moments. For integers they are computed from exact sums, and rounded once.

    Raises:
        ValueError: If an integer lies beyond 32 bits.

    Example:
        >>> measured = moments(torch.tensor([[250, 0], [252, 4]], dtype=torch.uint8))
        >>> measured.mean.tolist(), measured.std.tolist()
        ([251.0, 2.0], [1.0, 2.0])
    """
    table, beyond = sums_or_moments(values, channel_dim, KeepRules(mask, drops_nan=ignore_nan), compile=False)
    if beyond is not None and beyond:
        raise ValueError(OUT_OF_RANGE)
    return Moments(*(moments_of_sums(*table) if table.dtype == torch.int64 else table))


def sums_or_moments(
    values: Tensor,
    channel_dim: int | None,
    rules: KeepRules,
    compile: bool,
    chosen: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Measure values in the form that ranks merge: integers by exact sums, floating-point values by moments.

    Args:
        values: A tensor of any real dtype, with at least one dimension.
        channel_dim: The dimension of the channels; None takes all values as a single channel.
        rules: The rules for the values that count.
        compile: Whether a compiled kernel adds 8-bit integers.
        chosen: True for the channels to measure, shape `(C,)`; all other channels get count 0, even where they hold
            NaN. None is all channels.

    Returns:
        The sums of `integer_sums`, int64, or count, mean, rest and m2, float64, shape `(4, C)`; and for integers a
        boolean scalar, True if an integer beyond 32 bits makes the sums wrong, else None.
    """
    is_float = values.is_floating_point()
    if not values.numel():
        channels = 1 if channel_dim is None else values.shape[channel_dim]
        return torch.zeros(4, channels, dtype=torch.float64 if is_float else torch.int64, device=values.device), None
    tidy = dense(values)
    view = channel_view(tidy, channel_dim)
    masks = rules.on(tidy, view, channel_dim)
    if is_float:
        table, beyond = torch.stack(_float_moments(view, masks).astuple()), None
    else:
        table, beyond = integer_sums(view, masks, compile, chosen)
    # Measuring a channel and dropping its result is cheaper than a mask, and safe: NaN in a channel stays in it.
    return table if chosen is None else torch.where(chosen, table, 0), beyond


def join(count: Tensor, mean: Tensor, rest: Tensor, m2: Tensor) -> Moments:
    """Return the moments of M sets of values together.

    With d_i = mean_i - mean, m2 = sum(m2_i + count_i * d_i^2): Chan, Golub and LeVeque, "Updating formulae and a
    pairwise algorithm for computing sample variances" (1979). Means are first measured from the mean of the largest
    set, since differences of neighbouring floating-point numbers are exact.

    Args:
        count: Number of values of each set, shape `(M, C)` as all arguments.
        mean: Means of the sets.
        rest: The parts of the means that rounding has lost.
        m2: Sums of squared deviations of the sets.

    Returns:
        The moments of all, shape `(C,)`.
    """
    largest = count.argmax(0, keepdim=True)
    origin, origin_rest = mean.gather(0, largest), rest.gather(0, largest)
    offset = torch.where(count > 0, (mean - origin) + (rest - origin_rest), 0.0)
    total = count.sum(0)
    middle = _divide((count * offset).sum(0), total)
    m2 = m2.sum(0) + (count * (offset - middle).square()).sum(0)
    return Moments(total, *two_sum(origin[0], origin_rest[0] + middle), m2)


def two_sum(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Add two numbers without loss: `total + rest` equals `first + second` exactly.

    Knuth, "The Art of Computer Programming", volume 2, section 4.2.2.

    Args:
        first: A floating-point tensor.
        second: A tensor of the same shape and dtype.

    Returns:
        The rounded sum `total`, and the `rest` that rounding has lost.
    """
    total = first + second
    part = total - first
    return total, (first - (total - part)) + (second - part)


def _float_moments(view: ChannelView, masks: PieceMasks | None) -> Moments:
    """Return the moments of floating-point values.

    Each piece is read twice: for its mean, and then, while it is in the cache, for its deviations from the mean. So no
    large sums of squares cancel. The mean of the deviations is the part of the mean that rounding has lost.
    """
    found: list[tuple[Tensor, ...]] = []
    scratch = Scratch()
    for index, part in enumerate(view.parts):
        for at in pieces(part):
            values = scratch.like(part[at], torch.float64).copy_(part[at])
            if masks is None:
                number = values.shape[0] * values.shape[2]
                mean = values.mean((0, 2))
                rest = values.sub_(mean.view(1, -1, 1)).mean((0, 2))
                count = torch.full_like(mean, number)
            else:
                bits = masks.kept_bits(index, at, torch.float64)
                count = -bits.sum((0, 2)).double()  # the bits of a kept value are the integer -1
                blank_(values, bits)
                mean = _divide(values.sum((0, 2)), count)
                blank_(values.sub_(mean.view(1, -1, 1)), bits)
                rest = _divide(values.sum((0, 2)), count)
            m2 = (values.square_().sum((0, 2)) - count * rest.square()).clamp_(min=0)  # NaN stays NaN
            found.append(tuple(view.fold(column) for column in (count, *two_sum(mean, rest), m2)))
    return join(*(torch.cat(column) for column in zip(*found, strict=True)))


def _divide(values: Tensor, count: Tensor) -> Tensor:
    """Return the quotient, and 0 where the count is 0."""
    return torch.where(count > 0, values / count, 0.0)
