"""Moments against exact integers, fractions and numpy's float64."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_revbn.core import channel_view as channels
from lightning_revbn.core.moments import Moments, global_moments, moments

SHAPES = [
    ((5, 3, 17, 19), 1),
    ((5, 17, 19, 3), -1),
    ((1000, 20), 1),
    ((7, 4, 10), 1),
    ((3, 50), 0),
    ((300, 5, 3), 2),
    ((6,), 0),
    ((9, 70), None),
    ((2, 3, 2, 4, 5), -4),
    ((1, 3, 1300, 1000), 1),  # more than one piece a row
]
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


@pytest.mark.parametrize(("shape", "channel_dim"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_floats_equal_numpy(shape: tuple[int, ...], channel_dim: int | None, dtype: torch.dtype) -> None:
    values = sample(shape, torch.float64).to(dtype)
    measured = moments(values, channel_dim)
    for channel, row in enumerate(by_channel(values, channel_dim)):
        assert measured.mean[channel].item() == pytest.approx(row.mean(), rel=1e-13)
        assert measured.std[channel].item() == pytest.approx(row.std(), rel=1e-13)


@pytest.mark.parametrize("elements", [300, 1000, 4500])
@pytest.mark.parametrize(
    ("shape", "channel_dim"),
    [((2300, 3), 1), ((7, 5, 700), 1), ((3, 2, 1900), 1), ((40, 30, 3), -1), ((90, 4, 11), 1), ((5000,), None)],
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.float64], ids=str)
def test_pieces_of_any_size_add_up(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    channel_dim: int | None,
    elements: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = sample(shape, dtype)
    monkeypatch.setattr(channels, "_CACHED", elements / torch.get_num_threads())
    measured = moments(values, channel_dim)
    for channel, row in enumerate(by_channel(values, channel_dim).astype(float)):
        assert measured.mean[channel].item() == pytest.approx(row.mean(), rel=1e-13)
        assert measured.std[channel].item() == pytest.approx(row.std(), rel=1e-13)


@pytest.mark.parametrize("mean", [1e4, 1e6])
def test_a_large_mean_does_not_cancel(mean: float) -> None:
    values = (torch.randn(64, 3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + mean).float()
    expected = (values.double() - mean).numpy().std((0, 2))
    np.testing.assert_allclose(moments(values).std, expected, rtol=1e-12)


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


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float32, torch.bool], ids=str)
@pytest.mark.parametrize("channel_dim", [1, 2, -1])
def test_a_mask_leaves_values_out(dtype: torch.dtype, channel_dim: int) -> None:
    values = sample((6, 4, 90), dtype)
    mask = torch.rand(6, 1, 90, generator=torch.Generator().manual_seed(1)) < 0.5
    measured = moments(values, channel_dim, mask=mask)
    chosen = by_channel(values, channel_dim)
    kept = by_channel(mask.expand(6, 4, 90), channel_dim).astype(bool)
    for channel, (row, keep) in enumerate(zip(chosen, kept, strict=True)):
        assert measured.count[channel] == keep.sum()
        if keep.any():
            assert measured.mean[channel].item() == pytest.approx(row[keep].mean(), rel=1e-13)
            assert measured.std[channel].item() == pytest.approx(row[keep].std(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_a_mask_for_all_channels_works_where_channels_are_last_in_memory(dtype: torch.dtype) -> None:
    values = (torch.randn(5, 3, 9, 11) * 9 + 99).to(dtype)
    mask = torch.rand(5, 1, 9, 11) < 0.7
    measured = moments(values.to(memory_format=torch.channels_last), mask=mask)
    chosen = values.double().permute(1, 0, 2, 3)[:, mask[:, 0]].numpy()
    np.testing.assert_array_equal(measured.count, chosen.shape[1])
    np.testing.assert_allclose(measured.mean, chosen.mean(1), rtol=1e-12)
    np.testing.assert_allclose(measured.std, chosen.std(1), rtol=1e-12)


def test_nan_is_left_out_where_asked_for_and_else_reported() -> None:
    values = sample((50, 3), torch.float32)
    values[::7, 1] = torch.nan
    np.testing.assert_allclose(moments(values, ignore_nan=True).std, np.nanstd(values.double().numpy(), 0), rtol=1e-13)
    assert global_moments(values).faults.tolist() == [1, 0, 0]


def test_the_order_of_memory_does_not_matter() -> None:
    values = sample((6, 3, 9, 8), torch.uint8)
    expected = moments(values)
    for other in (
        values.to(memory_format=torch.channels_last),
        values.flip(3)[..., ::1],
        values.transpose(2, 3),
        torch.cat([values, values], 3)[..., :8],
    ):
        assert all(torch.equal(*pair) for pair in zip(moments(other).astuple(), expected.astuple(), strict=True))
    repeated = values[:1].expand(6, 3, 9, 8)
    assert torch.equal(moments(repeated).mean, moments(values[:1]).mean)


def test_nothing_has_no_moments() -> None:
    for dtype in (torch.uint8, torch.int64, torch.float32):
        empty = moments(torch.empty(0, 3, 4, dtype=dtype))
        assert [value.tolist() for value in empty.astuple()] == [[0, 0, 0]] * 3
    some = moments(sample((5, 3), torch.uint8))
    nothing = moments(torch.empty(0, 3))
    for merged in (some.merge(nothing), nothing.merge(some)):
        assert all(torch.equal(*pair) for pair in zip(merged.astuple(), some.astuple(), strict=True))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(0, 2**31))
def test_parts_merge_to_the_whole_in_any_order(sizes: list[int], seed: int) -> None:
    values = 1e3 + torch.randn(sum(sizes) + 1, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    parts = [moments(part) for part in values.split([1, *sizes])]
    for order in (parts, parts[::-1]):
        merged = order[0]
        for part in order[1:]:
            merged = merged.merge(part)
        np.testing.assert_allclose(merged.mean, values.numpy().mean(0), rtol=1e-14)
        np.testing.assert_allclose(merged.m2, values.numpy().var(0) * len(values), rtol=1e-9, atol=1e-9)


def test_merged_moments_know_the_variance_between_batches() -> None:
    first, second = Moments(*(torch.tensor([value]).double() for value in (2, 0, 2))), moments(torch.full((2, 1), 6.0))
    assert first.merge(second).variance.item() == np.var([-1, 1, 6, 6])


def sample(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return 3 * torch.randn(shape, generator=generator, dtype=dtype) + 5
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.3
    info = torch.iinfo(dtype)
    least, greatest = max(info.min, -30_000), min(info.max, 30_000)
    return torch.randint(least, greatest + 1, shape, generator=generator).to(dtype)


def by_channel(values: Tensor, channel_dim: int | None) -> Any:
    """Return one row a channel."""
    array = values.to(torch.float64 if values.is_floating_point() else torch.int64).numpy()
    if channel_dim is None:
        return array.reshape(1, -1)
    return np.moveaxis(array, channel_dim, 0).reshape(array.shape[channel_dim], -1)
