"""Evaluation with another kind of numbers than training, and what evaluation, export and denormalising make of them."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from helpers.raw import IMAGES
from torch import Tensor

from lightning_revbn import InputNorm
from lightning_revbn.core.input_norm import InputError, OnlineStandardizer


def trained(values: Tensor, **settings: Any) -> OnlineStandardizer:
    standardizer = OnlineStandardizer(InputNorm(3, **{"scale": 1.0, **settings}))
    standardizer.train(values)
    return standardizer


@pytest.mark.parametrize(
    ("before", "after"), [(torch.uint8, torch.int16), (torch.int16, torch.uint8), (torch.uint8, torch.int64)]
)
def test_integers_against_bytes_are_an_error(before: torch.dtype, after: torch.dtype) -> None:
    standardizer = trained(IMAGES.to(before))
    with pytest.raises(InputError, match=f"the input is {after}, but the training batches were .* factor of 255"):
        standardizer.evaluate(IMAGES.to(after))
    with pytest.raises(ValueError, match="the statistics are of integers of another dtype and range"):
        standardizer.normalizer()(IMAGES.to(after))
    # With a range that holds for all of them they are the same numbers.
    ranged = trained(IMAGES.to(before), input_range=255.0)
    torch.testing.assert_close(
        ranged.evaluate(IMAGES.to(after)), ranged.evaluate(IMAGES.to(before)), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(ranged.normalizer()(IMAGES.to(after)), ranged.evaluate(IMAGES.to(before)))


@pytest.mark.parametrize(
    ("before", "after", "ranges"),
    [
        (
            IMAGES.float(),
            IMAGES,
            r"uint8, 0 to 255\).* floating-point numbers with mean 1\d\d.* standard deviation \d\d",
        ),
        (IMAGES, IMAGES.float(), r"float32, 0 to 255\).* uint8 with mean 1\d\d.* standard deviation \d\d"),
        (IMAGES, IMAGES / 255 * 6 - 3, r"float32, -3 to 3\)"),
        (IMAGES / 255, IMAGES.float(), r"float32, 0 to 255\)"),
        (IMAGES.int(), IMAGES.int() * 200, r"int32, 0 to 51000\)"),
    ],
    ids=["floats then bytes", "bytes then floats", "bytes then symmetric", "unit then 255", "8 then 16 bits"],
)
def test_values_of_another_range_are_told_once_with_both_ranges(before: Tensor, after: Tensor, ranges: str) -> None:
    standardizer = trained(before)
    with pytest.warns(UserWarning, match=ranges):
        standardizer.evaluate(after)
    standardizer.compare_again()
    standardizer.evaluate(after)


@pytest.mark.parametrize(
    ("before", "after"),
    [(IMAGES, IMAGES / 255), (IMAGES / 255, IMAGES), (IMAGES.float(), IMAGES.float() * 1.5), (IMAGES, IMAGES[:1] // 4)],
    ids=["unit floats", "bytes after unit floats", "brighter", "a dark picture"],
)
def test_values_of_the_same_range_are_not_told(before: Tensor, after: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(before).evaluate(after)


def test_constants_of_another_range_are_told() -> None:
    standardizer = OnlineStandardizer(InputNorm(3, mode="fixed", mean=[0.5] * 3, std=[0.2] * 3))
    with pytest.warns(UserWarning, match=r"float32, 0 to 255\).* constants are of data with mean 0.5"):
        standardizer.train(IMAGES.float())


def test_masked_values_and_nan_do_not_count_in_the_comparison() -> None:
    standardizer = trained(IMAGES.float())
    other = IMAGES.float()
    mask = torch.ones_like(other, dtype=torch.bool)
    other[:, :, 3:], mask[:, :, 3:] = 1e9, False
    standardizer.evaluate(other, mask)
    other[:, :, 3:] = torch.nan
    standardizer.compare_again()
    standardizer.evaluate(other)


def test_channels_that_training_has_never_seen_are_named_in_evaluation() -> None:
    standardizer = OnlineStandardizer(InputNorm(3))
    standardizer.train(IMAGES, torch.tensor([True, False, True]).view(1, 3, 1, 1))
    with pytest.warns(UserWarning, match=r"no value of the channels \[1\], all masked or NaN"):
        standardizer.evaluate(IMAGES)


WIDE = {
    torch.int32: torch.randint(1_700_000_000 - 20, 1_700_000_000 + 21, (200, 3), dtype=torch.int32),
    torch.int64: torch.randint(1_700_000_000 - 20, 1_700_000_000 + 21, (200, 3)),
    torch.float64: 1.7e9 + 20 * torch.randn(200, 3, dtype=torch.float64),
}


@pytest.mark.parametrize("convert", ["", "half", "bfloat16", "float", "double"])
@pytest.mark.parametrize("dtype", [*WIDE, torch.uint8, torch.int16, torch.float32], ids=str)
def test_the_exported_module_is_evaluation(dtype: torch.dtype, convert: str) -> None:
    values = WIDE[dtype] if dtype in WIDE else (torch.randint(0, 250, (200, 3)) // 50 + 200).to(dtype)
    standardizer = trained(values)
    module = standardizer.normalizer()
    constants = {name: buffer.clone() for name, buffer in module.named_buffers() if buffer.numel()}
    if convert:
        getattr(module, convert)()
    assert all(torch.equal(buffer, constants[name]) for name, buffer in module.named_buffers() if name in constants)
    reference = values.double().numpy()
    expected = (reference - reference.mean(0)) / np.sqrt(
        reference.var(0) / (255**2 if dtype == torch.uint8 else 1) + 1e-5
    )
    expected /= 255 if dtype == torch.uint8 else 1
    result = module(values)
    assert result.dtype == {"half": torch.half, "bfloat16": torch.bfloat16, "double": torch.double}.get(
        convert, torch.float
    )
    step = {"half": 2**-11, "bfloat16": 2**-8}.get(convert, 1e-6)
    np.testing.assert_allclose(result.double(), expected, rtol=step, atol=2e-6)
    np.testing.assert_allclose(result.double(), standardizer.evaluate(values).double(), rtol=step, atol=2e-6)


def test_it_works_in_front_of_a_network_of_another_dtype() -> None:
    network = torch.nn.Sequential(trained(IMAGES).normalizer(), torch.nn.Conv2d(3, 4, 3)).to(torch.bfloat16)
    assert network(IMAGES).dtype == torch.bfloat16


@pytest.mark.parametrize("channel_dim", [1, -1, 0])
def test_a_single_picture_is_denormalised(channel_dim: int) -> None:
    images = IMAGES.movedim(1, channel_dim)
    standardizer = OnlineStandardizer(InputNorm(3, channel_dim=channel_dim))
    standardizer.train(images)
    result = standardizer.evaluate(images)
    batch_dim = 1 if channel_dim == 0 else 0
    single, expected = result.select(batch_dim, 5), images.select(batch_dim, 5) / 255
    torch.testing.assert_close(standardizer.denormalize(single), expected)
    torch.testing.assert_close(standardizer.denormalize(result), images / 255)
    fresh = OnlineStandardizer(InputNorm(3, channel_dim=channel_dim))
    fresh.load_state_dict(standardizer.state_dict())
    torch.testing.assert_close(fresh.denormalize(single), expected)


def test_a_training_batch_comes_back_by_the_statistics_that_normalised_it() -> None:
    standardizer = OnlineStandardizer(InputNorm(3))
    standardizer.train(IMAGES[:20] // 2)
    result = standardizer.train(IMAGES[20:])
    torch.testing.assert_close(standardizer.denormalize(result, is_training=True), IMAGES[20:] / 255)
    assert (standardizer.denormalize(result) - IMAGES[20:] / 255).abs().max() > 0.05
    frozen = OnlineStandardizer(InputNorm(3, freeze_after=20))
    frozen.train(IMAGES[:20])
    result = frozen.train(IMAGES[20:])
    torch.testing.assert_close(frozen.denormalize(result, is_training=True), IMAGES[20:] / 255)
