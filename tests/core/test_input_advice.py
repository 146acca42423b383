"""What the user is told about raw data."""

from __future__ import annotations

import torch

from lightning_revbn.core.input_advice import on_half_precision, on_normalized_data, on_small_features
from lightning_revbn.core.input_statistics import InputStatistics
from lightning_revbn.core.moments import moments


def statistics_of(values: torch.Tensor) -> InputStatistics:
    found = moments(values)
    return InputStatistics(found.mean, found.std, found.count)


def test_it_tells_data_that_are_normalised_already() -> None:
    noise = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    assert "already" in str(on_normalized_data(statistics_of(noise)))
    assert on_normalized_data(statistics_of(noise * 0.3 + 0.5)) is None


def test_it_tells_channels_whose_spread_is_lost_in_half_precision() -> None:
    values = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 1e4, 5.0])
    statistics = statistics_of(values.bfloat16())
    assert "channels [1]" in str(on_half_precision(statistics, torch.bfloat16))
    assert on_half_precision(statistics, torch.float32) is None
    assert on_half_precision(statistics, torch.uint8) is None


def test_it_tells_features_that_are_small_against_eps() -> None:
    # By hand: of a std of 1e-3 eps=1e-5 leaves 1e-3 / sqrt(1e-6 + 1e-5) = 0.302, of 1e-4 it leaves 0.0316.
    statistics = InputStatistics(*(torch.tensor(row).double() for row in ([5, 0, 0, 7], [1, 1e-3, 1e-4, 0], [9] * 4)))
    text = str(on_small_features(statistics, 1e-5))
    assert "channels 1 (std 0.001, 0.302 left), 2 (std 0.0001, 0.0316 left):" in text
    assert on_small_features(statistics, 1e-12) is None
    many = InputStatistics(*(torch.full((50,), value).double() for value in (0.0, 1e-3, 9.0)))
    assert "and 42 more" in str(on_small_features(many, 1e-5))
