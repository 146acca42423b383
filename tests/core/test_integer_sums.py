"""Sums of integers against exact integers and fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers.channels import SHAPES, by_channel, sample
from torch import Tensor

from lightning_revbn.core import channel_view as channels
from lightning_revbn.core.moments import moments

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64, torch.bool]


@pytest.mark.parametrize(("shape", "channel_dim"), SHAPES)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers_are_exact_but_for_the_last_rounding(
    shape: tuple[int, ...], channel_dim: int | None, dtype: torch.dtype
) -> None:
    values = sample(shape, dtype)
    measured = moments(values, channel_dim)
    for channel, row in enumerate(by_channel(values, channel_dim)):
        row = row.astype(object) if row.size < 2000 else row.astype(np.int64)
        count, total, squares = row.size, int(row.sum()), int((row * row).sum())
        assert measured.count[channel] == count
        assert measured.mean[channel].item() == pytest.approx(float(Fraction(total, count)), rel=4e-16, abs=1e-300)
        exact = float(Fraction(count * squares - total * total, count))
        assert measured.m2[channel].item() == pytest.approx(exact, rel=1e-15, abs=1e-300)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (torch.tensor([[-(2**31)], [2**31 - 1]], dtype=torch.int32), Fraction((2**32 - 1) ** 2, 2)),
        (torch.tensor([[2**31], [2**31 - 1]]).repeat(50_000, 1), Fraction(25_000)),
        (torch.tensor([[-(2**31)], [2**31]]).repeat(50_000, 1), Fraction(100_000 * 2**62)),
    ],
)
def test_the_largest_integers_are_exact(values: Tensor, expected: Fraction) -> None:
    assert moments(values).m2.item() == float(expected)


@pytest.mark.parametrize("count", [2_600_000, 9_999_999])
def test_millions_of_16_bit_values_of_one_channel_are_exact(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "_CACHED", count)  # a piece has them all, as on a CPU with many threads
    values = torch.full((count, 1), 2**16 - 1, dtype=torch.int32).to(torch.uint16)
    values[0] = 2**16 - 2
    assert moments(values, None).m2.item() == pytest.approx(float(Fraction(count - 1, count)), rel=1e-15)


def test_a_rare_value_does_not_cancel() -> None:
    values = torch.ones(1_000_000, 1, dtype=torch.uint8)
    values[123] = 0
    assert moments(values).m2.item() == pytest.approx(float(Fraction(999_999, 1_000_000)), rel=1e-15)


def test_integers_beyond_32_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="beyond 32 bits cannot be summed exactly: convert them to float64"):
        moments(torch.tensor([[2**31 + 1]]))
