"""What is refused as raw input, and what the error says."""

from __future__ import annotations

import pytest
import torch
from helpers.raw import IMAGES
from torch import Tensor

from lightning_revbn import InputNorm
from lightning_revbn.core.input_norm import InputError, OnlineStandardizer


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("seen", [0, 2])
def test_one_bad_sample_stops_training_and_leaves_the_statistics(bad: float, seen: int) -> None:
    standardizer = OnlineStandardizer(InputNorm(3))
    values = IMAGES.float()
    for batch in values.split(8)[:seen]:
        standardizer.train(batch)
    before = standardizer.state_dict()
    poisoned = values[16:24].clone()
    poisoned[3, 1, 2, 4] = bad
    with pytest.raises(InputError, match=r"NaN or infinity in a training batch, first at index \(3, 1, 2, 4\)"):
        standardizer.train(poisoned)
    after = standardizer.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if isinstance(before[name], Tensor))
    standardizer.train(values[16:24])
    assert standardizer.samples == 8 * seen + 8


def test_values_whose_squares_overflow_are_an_error() -> None:
    with pytest.raises(InputError, match="with values too large to be squared"):
        OnlineStandardizer(InputNorm(1)).train(torch.tensor([[1e200], [-1e200]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("values", "mask", "message"),
    [
        (torch.zeros(4, 5, 5, 3), None, r"its dimension channel_dim=1 has 5 channels, and num_features is 3"),
        (torch.zeros(3), None, r"shape \(3,\): it has no dimension channel_dim=1"),
        (torch.tensor(1.0), None, r"shape \(\): it has no dimension"),
        (torch.zeros(2, 3, dtype=torch.complex64), None, "complex"),
        (torch.zeros(2, 3), torch.ones(2, 3), "the mask is torch.float32: it must be boolean"),
        (torch.zeros(2, 3), torch.ones(5, dtype=torch.bool), r"mask of shape \(5,\) does not broadcast"),
    ],
)
def test_what_cannot_be_measured_is_refused(values: Tensor, mask: Tensor | None, message: str) -> None:
    for call in ("train", "preview"):
        with pytest.raises(InputError, match=message):
            getattr(OnlineStandardizer(InputNorm(3)), call)(values, mask)


def test_bytes_and_floats_do_not_mix() -> None:
    standardizer = OnlineStandardizer(InputNorm(3))
    standardizer.train(IMAGES)
    with pytest.raises(InputError, match=r"must all be uint8, .* so far of kind uint8"):
        standardizer.train(IMAGES / 255)
    assert standardizer.samples == 40
