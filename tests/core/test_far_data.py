"""Precision where data are far away, blank, long or large, and what becomes of faults that are found later."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_revbn import InputNorm
from lightning_revbn.core import input_learner
from lightning_revbn.core.input_norm import InputError, OnlineStandardizer
from lightning_revbn.core.moments import moments


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


FAR = [
    ("far", [1e8 + noise(50, 3, seed=seed) for seed in range(4)]),
    ("blank first", [torch.zeros(10, 3).double(), *(1e8 + noise(50, 3, seed=seed) for seed in range(4))]),
    ("moving away", [10.0**seed + noise(50, 3, seed=seed) for seed in range(9)]),
]


@pytest.mark.parametrize(("name", "batches"), FAR, ids=[name for name, _ in FAR])
@pytest.mark.parametrize("mode", ["running", "ema"])
def test_nothing_cancels(name: str, batches: list[Tensor], mode: Any) -> None:
    standardizer = OnlineStandardizer(InputNorm(3, scale=1.0, mode=mode, momentum=0.5, eps=0.0))
    for batch in batches:
        result = standardizer.train(batch, dtype=torch.float64)
    if mode == "running":
        weights = [Fraction(len(batch)) for batch in batches]
    else:
        weights = [Fraction(1, 2 ** (len(batches) - index)) for index in range(len(batches))]
    used = standardizer.learner.estimate()
    for channel in range(3):
        columns = [[Fraction(value) for value in batch[:, channel].tolist()] for batch in batches]
        mean, variance = exactly(columns, weights)
        assert used.variance[channel].item() == pytest.approx(float(variance), rel=1e-12)
        offset = Fraction(used.mean[channel].item()) - mean + Fraction(used.rest[channel].item())
        assert abs(offset) < 1e-12 * float(variance) ** 0.5
        expected = [float(value - mean) / float(variance) ** 0.5 for value in columns[-1]]
        np.testing.assert_allclose(result[:, channel], expected, rtol=0, atol=1e-6)


def exactly(columns: list[list[Fraction]], weights: list[Fraction]) -> tuple[Fraction, Fraction]:
    """Return mean and variance of weighted batches without rounding."""
    pairs = list(zip(columns, weights, strict=True))
    mean = sum((weight * sum(column) / len(column) for column, weight in pairs), Fraction()) / sum(weights)
    squares = (weight * sum((value - mean) ** 2 for value in column) / len(column) for column, weight in pairs)
    return mean, sum(squares, Fraction()) / sum(weights)


def test_float64_beyond_float32_is_measured_until_squares_overflow() -> None:
    values = 1e50 * noise(40, 2)
    np.testing.assert_allclose(moments(values).std, values.numpy().std(0), rtol=1e-13)
    with pytest.raises(InputError, match="with values too large to be squared"):
        OnlineStandardizer(InputNorm(2)).train(values * 1e120)


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint16], ids=str)
@pytest.mark.parametrize(("shape", "channel_dim"), [((1, 5_000_000), 0), ((5_000_000, 1), 1), ((3, 1_700_000), 0)])
def test_16_bit_integers_are_exact_in_long_columns(
    dtype: torch.dtype, shape: tuple[int, int], channel_dim: int
) -> None:
    info = torch.iinfo(dtype)
    values = torch.randint(info.max - 3000, info.max + 1, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    measured = moments(values, channel_dim)
    for channel, column in enumerate(values.long().movedim(channel_dim, 0)):
        number, total, squares = len(column.flatten()), int(column.sum()), int((column * column).sum())
        assert measured.mean[channel].item() == total / number
        assert measured.m2[channel].item() == pytest.approx((number * squares - total**2) / number, rel=1e-15)


def test_the_place_of_nan_respects_the_mask() -> None:
    values, mask = torch.ones(4, 3), torch.ones(4, 3, dtype=torch.bool)
    values[0, 0], mask[0, 0] = torch.nan, False
    values[2, 1] = torch.nan
    with pytest.raises(InputError, match=r"first at index \(2, 1\)"):
        OnlineStandardizer(InputNorm(3)).train(values, mask)


def test_a_batch_with_a_fault_that_is_found_later_does_not_count_for_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_learner, "_answers_at_once", lambda device: False)
    batch, bad = noise(8, 3).float(), torch.full((8, 3), torch.nan)
    standardizer = OnlineStandardizer(InputNorm(3, freeze_after=24))
    for values in (batch, bad, batch):
        standardizer.train(values)
    with pytest.raises(InputError, match="NaN or infinity"):
        standardizer.check()
    assert (standardizer.samples, standardizer.is_frozen) == (16, False)
    standardizer.train(batch)
    assert (standardizer.samples, standardizer.is_frozen) == (24, True)


@pytest.mark.parametrize("mode", ["batch", "ema"])
@pytest.mark.parametrize("first", [0, 2])
def test_a_fault_that_is_found_later_costs_its_own_batch_alone(
    mode: Any, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_learner, "_answers_at_once", lambda device: False)
    batches = [noise(8, 3, seed=seed).float() for seed in range(6)]
    bad = torch.full((8, 3), torch.nan)
    standardizer, clean = (OnlineStandardizer(InputNorm(3, mode=mode)) for _ in range(2))
    for batch in batches[:first]:
        standardizer.train(batch)
    if first == 0:  # the kind of the first batch is asked for, so its faults are told with it
        with pytest.raises(InputError, match="NaN or infinity"):
            standardizer.train(bad)
    else:
        standardizer.train(bad)
    for batch in batches[first:]:
        standardizer.train(batch)
    for batch in batches:
        clean.train(batch)
    assert all(torch.equal(*pair) for pair in zip(standardizer.statistics(), clean.statistics(), strict=True))
    assert torch.equal(standardizer.evaluate(batches[0]), clean.evaluate(batches[0]))
    if first:
        with pytest.raises(InputError, match="NaN or infinity"):
            standardizer.check()
    standardizer.check()
