"""What training batches have told: restored from a state, averaged, and judged."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from helpers.raw import IMAGES

from lightning_revbn import InputNorm
from lightning_revbn.core.input_norm import OnlineStandardizer


def test_the_moving_average_is_debiased_and_has_the_variance_between_batches() -> None:
    standardizer = OnlineStandardizer(InputNorm(3, scale=1.0, mode="ema", momentum=0.3, eps=0.0))
    batches = [batch.double().numpy() / 255 for batch in IMAGES.split(8)]
    for step, batch in enumerate(IMAGES.split(8), start=1):
        result = standardizer.train(batch)
        weights = np.array([0.7 ** (step - 1 - index) for index in range(step)])
        weights /= weights.sum()
        first = sum(w * b.mean((0, 2, 3)) for w, b in zip(weights, batches, strict=False))
        second = sum(w * (b**2).mean((0, 2, 3)) for w, b in zip(weights, batches, strict=False))
        mean, std = first.reshape(3, 1, 1), np.sqrt(second - first**2).reshape(3, 1, 1)
        np.testing.assert_allclose(result, (batches[step - 1] - mean) / std, atol=3e-6)
    assert torch.equal(standardizer.evaluate(IMAGES[-8:]), result)


@pytest.mark.parametrize("mode", ["batch", "running", "ema"])
def test_a_restored_state_goes_on_to_the_bit(mode: Any) -> None:
    settings = InputNorm(3, mode=mode)
    through, first, second = (OnlineStandardizer(settings) for _ in range(3))
    values = IMAGES.float() + 1e4
    for batch in values.split(8):
        through.train(batch)
    for batch in values.split(8)[:3]:
        first.train(batch)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    for batch in values.split(8)[3:]:
        result = second.train(batch)
    assert torch.equal(second.evaluate(values), through.evaluate(values))
    assert all(torch.equal(*pair) for pair in zip(second.statistics(), through.statistics(), strict=True))
    assert result.isfinite().all()


def test_a_state_of_other_channels_is_refused_and_one_of_another_range_converted() -> None:
    standardizer = OnlineStandardizer(InputNorm(3))
    standardizer.train(IMAGES)
    with pytest.raises(ValueError, match="are of 3 channels, num_features is 4"):
        OnlineStandardizer(InputNorm(4)).load_state_dict(standardizer.state_dict())
    other = OnlineStandardizer(InputNorm(3, input_range=1.0))
    other.load_state_dict(standardizer.state_dict())
    torch.testing.assert_close(other.statistics().std, standardizer.statistics().std)
