"""Moments against exact integers, fractions and numpy's float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.channels import SHAPES, by_channel, sample
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_revbn.core.global_moments import global_moments
from lightning_revbn.core.moments import Moments, moments


@pytest.mark.parametrize(("shape", "channel_dim"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_floats_equal_numpy(shape: tuple[int, ...], channel_dim: int | None, dtype: torch.dtype) -> None:
    values = sample(shape, torch.float64).to(dtype)
    measured = moments(values, channel_dim)
    for channel, row in enumerate(by_channel(values, channel_dim)):
        assert measured.mean[channel].item() == pytest.approx(row.mean(), rel=1e-13)
        assert measured.std[channel].item() == pytest.approx(row.std(), rel=1e-13)


@pytest.mark.parametrize("mean", [1e4, 1e6])
def test_a_large_mean_does_not_cancel(mean: float) -> None:
    values = (torch.randn(64, 3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + mean).float()
    expected = (values.double() - mean).numpy().std((0, 2))
    np.testing.assert_allclose(moments(values).std, expected, rtol=1e-12)


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


def test_nothing_has_no_moments() -> None:
    for dtype in (torch.uint8, torch.int64, torch.float32):
        empty = moments(torch.empty(0, 3, 4, dtype=dtype))
        assert [value.tolist() for value in empty.astuple()] == [[0, 0, 0]] * 4
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
    first, second = (
        Moments(*(torch.tensor([value]).double() for value in (2, 0, 0, 2))),
        moments(torch.full((2, 1), 6.0)),
    )
    assert first.merge(second).variance.item() == np.var([-1, 1, 6, 6])
