"""Settings and standardiser on one process, against numpy, torch's batch norm, torchvision and scikit-learn."""

from __future__ import annotations

import copy
import io
import re
from dataclasses import FrozenInstanceError, asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.raw import IMAGES, raw_images
from sklearn.preprocessing import StandardScaler
from torch import nn
from torchvision.transforms import v2

from lightning_revbn import InputNorm
from lightning_revbn.core.input_norm import InputError, MissingStatisticsError, OnlineStandardizer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_features": 0}, "num_features=0 must be the number of channels"),
        ({"num_features": 2, "channel_dim": None}, "num_features must be 1, not 2"),
        ({"num_features": 2, "channel_dim": 1.5}, "channel_dim=1.5 must be an integer or None"),
        ({"num_features": 2, "scale": 0.0}, 'scale=0.0 must be "auto" or a finite number above 0'),
        ({"num_features": 2, "input_range": float("inf")}, "input_range=inf must be"),
        ({"num_features": 2, "mode": "minibatch"}, "mode='minibatch' is unknown: choose from 'batch', 'running'"),
        ({"num_features": 2, "nan_policy": "drop"}, "nan_policy='drop' is unknown"),
        ({"num_features": 2, "eps": -1.0}, "eps=-1.0 must be a finite number"),
        ({"num_features": 2, "momentum": 0.0}, "momentum=0.0 must be above 0 and at most 1"),
        ({"num_features": 2, "freeze_after": 0}, "freeze_after=0 must be a number of samples"),
        ({"num_features": 2, "mode": "fixed"}, 'mode="fixed" needs mean'),
        ({"num_features": 2, "mode": "fixed", "mean": [0.0, 0.0]}, 'mode="fixed" needs std'),
        ({"num_features": 2, "mode": "fixed", "mean": [0.0], "std": [1.0]}, "mean has 1 numbers, num_features is 2"),
        ({"num_features": 1, "mode": "fixed", "mean": [0.0], "std": [-1.0]}, "must be finite and not negative"),
        ({"num_features": 1, "mean": [0.0]}, 'mean is for mode="fixed"'),
        (
            {"num_features": 1, "mode": "fixed", "mean": [0.0], "std": [1.0], "freeze_after": 5},
            "nothing for freeze_after to freeze",
        ),
        ({"num_features": 3, "channels": []}, "channels=[] must be different numbers from 0 to 2, as [0, 2], or None"),
        ({"num_features": 3, "channels": [0, 3]}, "channels=[0, 3] must be different numbers from 0 to 2"),
        ({"num_features": 3, "channels": [2, -1]}, "channels=[2, -1] must be different numbers"),
        ({"num_features": 3, "channels": 1}, "channels=1 must be different numbers"),
        ({"num_features": 3, "channels": "01"}, "channels='01' must be different numbers"),
        (
            {"num_features": 3, "channels": [True, False, True]},
            "channels=[True, False, True] must be different numbers",
        ),
        (
            {"num_features": 1, "channel_dim": None, "channels": [0]},
            "channels=[0] needs a channel_dim: channel_dim=None",
        ),
        (
            {"num_features": 3, "channels": [0, 1], "mode": "fixed", "mean": [0.0] * 2, "std": [1.0] * 2},
            "num_features is 3. Channels that are left out have numbers too, which are not used",
        ),
        ({"num_features": 2, "clip": 0.0}, "clip=0.0 must be a number of standard deviations above 0, such as 10"),
        ({"num_features": 2, "clip": float("inf")}, "clip=inf must be a number of standard deviations above 0"),
        ({"num_features": 2, "clip": (-10, 10)}, "clip=(-10, 10) must be a number of standard deviations above 0"),
        ({"num_features": 2, "fill": float("nan")}, "fill=nan must be a number from -65504 to 65504"),
        (
            {"num_features": 2, "fill": 1e6},
            "fill=1000000.0 must be a number from -65504 to 65504, which half precision",
        ),
        ({"num_features": 2, "fill": "mean"}, "fill='mean' must be a number from -65504 to 65504"),
        (
            {"num_features": 2, "nodata": float("nan")},
            'nodata=nan matches no value: nan_policy="ignore" leaves NaN out',
        ),
        ({"num_features": 2, "nodata": [0, "none"]}, "nodata=[0, 'none'] must be a number such as -9999, several as"),
        ({"num_features": 2, "nodata": []}, "nodata=[] must be a number such as -9999"),
        ({"num_features": 2, "nodata": True}, "nodata=True must be a number such as -9999"),
        (
            {"num_features": 2, "nodata": [-9999, 2**53 + 1]},
            "nodata=9007199254740993 is rounded in float64",
        ),
    ],
)
def test_impossible_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        InputNorm(**arguments)


@pytest.mark.parametrize("form", [np.float32, np.array, torch.tensor, str], ids=["scalar", "array", "tensor", "text"])
def test_numbers_are_taken_in_every_form_and_kept_as_pythons(form: Any) -> None:
    settings = InputNorm(3, scale=form(0.5), momentum=form(0.25), eps=form(0.0), input_range=form(2.0), mode="ema")
    assert settings == InputNorm(3, scale=0.5, momentum=0.25, eps=0.0, input_range=2.0, mode="ema")
    assert {type(getattr(settings, name)) for name in ("scale", "momentum", "eps", "input_range")} == {float}


@pytest.mark.parametrize(
    "form", [np.int64, np.uint8, np.array, torch.tensor], ids=["int64", "uint8", "array", "tensor"]
)
def test_whole_numbers_are_taken_in_every_form_and_kept_as_pythons(form: Any) -> None:
    settings = InputNorm(form(3), channel_dim=form(2), freeze_after=form(8))
    assert settings == InputNorm(3, channel_dim=2, freeze_after=8)
    assert {type(getattr(settings, name)) for name in ("num_features", "channel_dim", "freeze_after")} == {int}
    for wrong in (form(3) * 1.5, form(3) > 2, "3"):
        with pytest.raises(ValueError, match="must be the number of channels, 1 or more"):
            InputNorm(wrong)


@pytest.mark.parametrize("form", [tuple, range, np.array, torch.tensor], ids=["tuple", "range", "array", "tensor"])
def test_several_numbers_are_taken_in_every_form_and_kept_as_pythons(form: Any) -> None:
    given = form(3) if form is range else form([2, 0, 1])
    settings = InputNorm(4, channels=given, nodata=given, clip=10, fill="-1e0")
    assert settings == InputNorm(4, channels=[-2, -3, -4], nodata=[*map(float, given)], clip=10.0, fill=-1.0)
    assert settings.channels == (0, 1, 2)
    assert settings == InputNorm(**asdict(settings)) == eval(repr(settings))
    assert InputNorm(4, nodata=form(3) if form in (np.array, torch.tensor) else 3).nodata == 3.0


def test_settings_do_not_change() -> None:
    settings = InputNorm(3)
    settings.num_features = 3  # what Lightning does when it copies hyperparameters
    for name, value in (("num_features", 4), ("num_features", 3.0), ("other", 1)):
        with pytest.raises(FrozenInstanceError, match=f"cannot assign to field '{name}'"):
            setattr(settings, name, value)
    with pytest.raises(FrozenInstanceError):
        del settings.scale
    assert replace(settings, num_features=4) == InputNorm(4) != settings
    assert {settings: 1}[copy.deepcopy(settings)] == 1
    assert eval(repr(settings)) == settings


def test_batch_mode_is_batch_norm_of_scaled_images() -> None:
    standardizer = OnlineStandardizer(InputNorm(3, scale=0.058))
    reference = nn.BatchNorm2d(3, momentum=None)
    nn.init.constant_(reference.weight, 0.058)
    for batch in IMAGES.split(8):
        torch.testing.assert_close(standardizer.train(batch), reference(batch / 255).detach(), rtol=0, atol=1e-7)
    mean, std, count = standardizer.statistics()
    torch.testing.assert_close(mean.float(), reference.running_mean, rtol=1e-6, atol=0)
    assert count.tolist() == [40 * 36] * 3
    np.testing.assert_allclose(std, (IMAGES.double() / 255).numpy().std((0, 2, 3)), rtol=1e-13)


def test_after_one_batch_the_statistics_are_the_running_statistics_of_batch_norm() -> None:
    standardizer, reference = OnlineStandardizer(InputNorm(3)), nn.BatchNorm2d(3, momentum=1.0)
    standardizer.train(IMAGES)
    reference(IMAGES / 255)
    mean, std, count = standardizer.statistics()
    torch.testing.assert_close(mean.float(), reference.running_mean)
    torch.testing.assert_close((std.square() * count / (count - 1)).float(), reference.running_var)


def test_running_mode_uses_everything_seen_so_far() -> None:
    standardizer = OnlineStandardizer(InputNorm(3, scale=1.0, mode="running"))
    for end in range(8, 41, 8):
        result = standardizer.train(IMAGES[end - 8 : end])
        seen = IMAGES[:end].double().numpy() / 255
        mean, variance = (value.reshape(3, 1, 1) for value in (seen.mean((0, 2, 3)), seen.var((0, 2, 3))))
        np.testing.assert_allclose(result, (seen[-8:] - mean) / np.sqrt(variance + 1e-5), atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_a_class_sorted_stream_has_the_statistics_of_the_data_set(dtype: torch.dtype) -> None:
    images, labels = raw_images(500)
    images = images[labels.argsort()].to(dtype)
    standardizer = OnlineStandardizer(InputNorm(3, mode="running"))
    for batch in images.split(16):
        standardizer.train(batch)
    mean, std, _ = standardizer.statistics()
    unit = 255 if dtype == torch.uint8 else 1
    np.testing.assert_allclose(mean, images.double().numpy().mean((0, 2, 3)) / unit, rtol=1e-10)
    np.testing.assert_allclose(std, images.double().numpy().std((0, 2, 3)) / unit, rtol=1e-10)


def test_fixed_mode_is_torchvisions_normalize() -> None:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    standardizer = OnlineStandardizer(InputNorm(3, scale=1.0, mode="fixed", mean=mean, std=std, eps=0.0))
    reference = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    for values in (IMAGES, IMAGES / 255):
        for result in (standardizer.train(values), standardizer.evaluate(values)):
            torch.testing.assert_close(result, reference(values), rtol=1e-5, atol=2e-6)
    assert standardizer.statistics().mean.tolist() == mean
    assert standardizer.samples == 0


def test_fixed_mode_takes_batches_on_another_device() -> None:
    # The meta device refuses tensors of the CPU as accelerators do, and is there on every machine.
    standardizer = OnlineStandardizer(InputNorm(3, mode="fixed", mean=[0.1, 0.2, 0.3], std=[0.5] * 3))
    for values in (IMAGES.to("meta"), IMAGES.to("meta").float()):
        assert standardizer.train(values).device.type == "meta"
        assert standardizer.evaluate(values).shape == IMAGES.shape


def test_frozen_statistics_stay_and_batches_are_normalised_by_them() -> None:
    standardizer = OnlineStandardizer(InputNorm(3, freeze_after=16))
    for batch in IMAGES.split(8)[:2]:
        standardizer.train(batch)
    before = standardizer.statistics()
    assert standardizer.is_frozen
    assert torch.equal(standardizer.train(IMAGES[16:]), standardizer.evaluate(IMAGES[16:]))
    assert all(torch.equal(*pair) for pair in zip(standardizer.statistics(), before, strict=True))
    longer = OnlineStandardizer(InputNorm(3, freeze_after=24))
    longer.load_state_dict(standardizer.state_dict())
    assert not longer.is_frozen


def test_evaluation_follows_training() -> None:
    standardizer = OnlineStandardizer(InputNorm(3))
    for batch in IMAGES.split(8):
        standardizer.train(batch)
        fresh = OnlineStandardizer(InputNorm(3))
        fresh.load_state_dict(standardizer.state_dict())
        assert torch.equal(standardizer.evaluate(IMAGES), fresh.evaluate(IMAGES))


def test_what_was_learned_from_bytes_fits_floats_from_0_to_1() -> None:
    standardizer = OnlineStandardizer(InputNorm(3))
    standardizer.train(IMAGES)
    torch.testing.assert_close(standardizer.evaluate(IMAGES / 255), standardizer.evaluate(IMAGES), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int32, torch.float32], ids=str)
def test_a_range_is_the_unit_of_statistics_and_eps(dtype: torch.dtype) -> None:
    values = (IMAGES.int() * 200).to(dtype)
    standardizer = OnlineStandardizer(InputNorm(3, scale=1.0, input_range=65535))
    reference = nn.BatchNorm2d(3)
    torch.testing.assert_close(
        standardizer.train(values), reference(values.float() / 65535).detach(), rtol=0, atol=1e-5
    )
    expected = (IMAGES.double() * 200 / 65535).numpy().mean((0, 2, 3))
    np.testing.assert_allclose(standardizer.statistics().mean, expected, rtol=1e-12)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("value", [0.1, 1e6, 0.0])
def test_a_constant_channel_becomes_zero_and_comes_back(eps: float, value: float) -> None:
    values = torch.stack([torch.full((64,), value), torch.arange(64.0)], 1)
    standardizer = OnlineStandardizer(InputNorm(2, scale=1.0, eps=eps))
    for batch in values.split(16):
        assert (standardizer.train(batch)[:, 0] == 0).all()
    other = torch.tensor([[value + 1, 3.0]])
    result = standardizer.evaluate(other)
    assert result[0, 0].item() == pytest.approx(1.0, abs=0.07)  # float32 has steps of 0.06 at 1e6
    torch.testing.assert_close(standardizer.denormalize(result), other)


def test_one_value_a_channel_is_normalised_by_what_was_seen_before() -> None:
    standardizer = OnlineStandardizer(InputNorm(2))
    assert standardizer.train(torch.tensor([[3.0, 4.0]])).tolist() == [[0.0, 0.0]]
    standardizer.train(torch.arange(20.0).view(10, 2))
    single = torch.tensor([[30.0, 40.0]])
    assert torch.equal(standardizer.train(single), standardizer.evaluate(single))


def test_nan_can_be_ignored_as_scikit_learn_does() -> None:
    table = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)) * 3 + 7
    table[torch.rand(table.shape, generator=torch.Generator().manual_seed(1)) < 0.1] = torch.nan
    standardizer = OnlineStandardizer(InputNorm(4, scale=1.0, eps=0.0, mode="running", nan_policy="ignore"))
    for batch in table.split(50):
        standardizer.train(batch)
    expected = StandardScaler().fit_transform(table.double().numpy())
    np.testing.assert_allclose(standardizer.evaluate(table), expected, atol=2e-6)
    with pytest.raises(InputError, match="NaN or infinity"):
        standardizer.train(torch.full((2, 4), torch.inf))


def test_a_mask_is_for_statistics_and_result() -> None:
    spectrograms = torch.rand(6, 5, 30, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(30) < torch.tensor([30, 20, 10, 5, 25, 15]).view(-1, 1)).unsqueeze(1)
    garbage = spectrograms.masked_fill(~mask, 1e9)
    standardizer = OnlineStandardizer(InputNorm(5))
    result = standardizer.train(garbage, mask)
    kept = np.where(mask.expand_as(spectrograms), spectrograms.double(), np.nan)
    np.testing.assert_allclose(standardizer.statistics().std, np.nanstd(kept, (0, 2)), rtol=1e-13)
    assert (result.masked_select(~mask) == 0).all()
    assert result.abs().max() < 2


def test_nothing_is_known_before_training() -> None:
    standardizer = OnlineStandardizer(InputNorm(3))
    for call in (lambda: standardizer.evaluate(IMAGES), standardizer.statistics, standardizer.normalizer):
        with pytest.raises(MissingStatisticsError, match="input statistics are missing: train first"):
            call()
    own = OnlineStandardizer(InputNorm(3)).train(IMAGES)
    assert torch.equal(standardizer.preview(IMAGES), own)
    assert not standardizer.has_statistics
    assert standardizer.train(IMAGES[:0]).shape == (0, 3, 6, 6)
    assert not standardizer.has_statistics


def test_settings_can_be_saved_in_hyperparameters() -> None:
    buffer = io.BytesIO()
    torch.save({"input_norm": InputNorm(3, mode="running")}, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True)["input_norm"] == InputNorm(3, mode="running")


def test_gradients_end_here_and_a_second_backward_works() -> None:
    weight = torch.ones(3, 1, 1, requires_grad=True)
    result = OnlineStandardizer(InputNorm(3)).train((IMAGES / 255).requires_grad_())
    assert not result.requires_grad
    for _ in range(2):
        (result * weight).sum().backward()


def test_inference_mode_before_training_does_no_harm() -> None:
    standardizer, other = OnlineStandardizer(InputNorm(3)), OnlineStandardizer(InputNorm(3))
    other.train(IMAGES)
    with torch.inference_mode():
        standardizer.preview(IMAGES)
        standardizer.load_state_dict(other.state_dict())
        standardizer.evaluate(IMAGES)
    weight = torch.ones(3, 1, 1, requires_grad=True)
    (standardizer.train(IMAGES) * weight).sum().backward()
    assert standardizer.samples == 80


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.float32, torch.float64], ids=str)
def test_compiled_kernels_learn_and_give_the_same_to_the_bit(dtype: torch.dtype, layout: torch.memory_format) -> None:
    torch.compiler.reset()  # torch makes a limited number of kernels of one function
    eager, compiled = (OnlineStandardizer(InputNorm(3, scale=0.058, compile=compile)) for compile in (False, True))
    for size, mean in ((8, 100), (5, 60)):
        values = (torch.randn(size, 3, 9, 11) * 9 + mean).to(dtype).to(memory_format=layout)
        mask = torch.rand(size, 1, 9, 11) < 0.7 if size == 5 else None
        expected, result = (one.train(values, mask) for one in (eager, compiled))
        assert torch.equal(result, expected)
        assert result.stride() == expected.stride()
    learned, state = compiled.state_dict(), eager.state_dict()
    assert all(torch.equal(learned[key], state[key]) for key in ("count", "mean", "rest", "m2", "samples"))
