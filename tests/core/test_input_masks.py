"""Channels that stay, outliers that are cut, and values that are none."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from helpers.raw import IMAGES
from torch import Tensor

from lightning_revbn import InputNorm
from lightning_revbn.core.input_masks import InputMasks, _flags, chosen_channels
from lightning_revbn.core.input_norm import InputError, OnlineStandardizer

MODES = ("batch", "running", "ema", "fixed")
TABLE = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 20.0, 1.0, 300.0]) + 5
TABLE[:, 2] = torch.arange(64) % 2


def standardizer_of(width: int = 4, **settings: Any) -> OnlineStandardizer:
    if settings.get("mode") == "fixed":
        settings |= {"mean": [5.0] * width, "std": [2000.0] * width}
    return OnlineStandardizer(InputNorm(width, **{"scale": 1.0, "eps": 0.0, **settings}))


def test_without_such_settings_nothing_looks_at_the_values() -> None:
    mask = torch.ones(64, 1, dtype=torch.bool)
    assert InputMasks.of(TABLE, None, InputNorm(4)) == InputMasks(None, None)
    masks = InputMasks.of(TABLE, mask, InputNorm(4, clip=3.0))
    assert masks.counted is mask
    assert masks.kept is mask


@pytest.mark.parametrize("count", [1, 61, 62, 63, 64, 124, 130, 300])
def test_an_accelerator_gets_the_channels_as_bits(count: int) -> None:
    cpu = torch.device("cpu")
    for chosen in (range(count), [count - 1], [0], range(0, count, 3), range(count // 2, count)):
        expected = chosen_channels(InputNorm(count, channels=[*chosen]))
        assert expected is not None
        assert torch.equal(_flags([*chosen], count, cpu), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_channels_that_are_left_out_stay_as_they_are_in_the_dtype_of_the_result(mode: Any, dtype: torch.dtype) -> None:
    standardizer = standardizer_of(mode=mode, channels=[0, 1, -1], scale=0.058, clip=1.0, fill=9.0)
    everything = standardizer_of(mode=mode, scale=0.058, clip=1.0)
    for result, wanted in (
        (standardizer.train(TABLE, dtype=dtype), everything.train(TABLE, dtype=dtype)),
        (standardizer.evaluate(TABLE, dtype=dtype), everything.evaluate(TABLE, dtype=dtype)),
    ):
        assert result.dtype == dtype
        assert torch.equal(result[:, 2], TABLE[:, 2].to(dtype))
        assert torch.equal(result[:, [0, 1, 3]], wanted[:, [0, 1, 3]])
    mean, std, count = standardizer.statistics()
    assert (mean[2], std[2], count[2]) == (0.0, 1.0, 0.0)
    back = standardizer.denormalize(standardizer.evaluate(TABLE))
    assert torch.equal(back[:, 2], TABLE[:, 2])


def test_bytes_that_are_left_out_are_not_divided_and_nothing_in_them_is_a_fault() -> None:
    standardizer = standardizer_of(3, channels=[0, 1], nodata=200)
    assert torch.equal(standardizer.train(IMAGES)[:, 2], IMAGES[:, 2].float())
    assert torch.equal(standardizer.evaluate(IMAGES)[:, 2], IMAGES[:, 2].float())
    values, mask = TABLE.clone(), torch.arange(64).view(-1, 1) < 60
    values[3, 2], values[4, 2] = torch.nan, torch.inf
    table = standardizer_of(channels=[0, 1, 3], fill=0.0)
    result = table.train(values, mask)
    torch.testing.assert_close(result[:, 2], values[:, 2], equal_nan=True)
    assert (result[60:, [0, 1, 3]] == 0).all()
    values[5, 3] = torch.nan
    with pytest.raises(InputError, match=r"first at index \(5, 3\)"):
        table.train(values, mask)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_whatever_a_channel_that_is_left_out_holds_the_statistics_of_others_are_the_same_to_the_bit(
    dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    values = IMAGES.to(dtype).contiguous(memory_format=memory_format)
    some, everything = standardizer_of(3, channels=[0, 2]), standardizer_of(3)
    normalised = everything.train(values)
    odd = values.clone()
    odd[:, 1] = {torch.uint8: 255, torch.int16: -(2**15), torch.int64: 2**60, torch.float32: torch.nan}[dtype]
    if dtype.is_floating_point:
        odd[0, 1] = torch.inf
    assert torch.equal(some.train(odd)[:, ::2], normalised[:, ::2])
    state, wanted = some.state_dict(), everything.state_dict()
    for name in ("count", "mean", "rest", "m2"):
        assert torch.equal(state[name][::2], wanted[name][::2])
        assert state[name][1] == 0


@pytest.mark.parametrize("mode", MODES)
def test_outliers_are_cut_in_standard_deviations_before_the_scale(mode: Any) -> None:
    values = TABLE.clone()
    values[0], values[1] = 1e4, -1e4
    plain, cut = standardizer_of(mode=mode, scale=0.058), standardizer_of(mode=mode, scale=0.058, clip=3.0)
    assert torch.equal(cut.train(values), plain.train(values).clamp(-3 * 0.058, 3 * 0.058))
    assert torch.equal(cut.evaluate(values), plain.evaluate(values).clamp(-3 * 0.058, 3 * 0.058))
    assert cut.evaluate(values).abs().max() == torch.tensor(3 * 0.058)
    # Statistics count them in full, and what was cut comes back as the edge.
    assert torch.equal(cut.statistics().std, plain.statistics().std)
    mean, std, _ = cut.statistics()
    if mode != "ema":
        edge = (mean + 3 * std).float()
        torch.testing.assert_close(cut.denormalize(cut.evaluate(values))[0], edge, rtol=1e-5, atol=1e-5)


def test_what_is_cut_does_not_hide_that_a_batch_is_made_of_other_numbers() -> None:
    standardizer = standardizer_of(clip=2.0)
    standardizer.train(TABLE)
    with pytest.warns(UserWarning, match="lies in another range than the training data"):
        standardizer.evaluate(TABLE * 1e4)


def test_channels_and_filled_values_are_not_taken_for_other_numbers() -> None:
    standardizer = standardizer_of(channels=[0, 1], fill=-1000.0, nodata=-9999, nan_policy="ignore")
    values = TABLE.clone()
    values[:60, :2], values[60, :2], values[:, 3] = -9999, torch.nan, 1e6
    standardizer.train(TABLE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        standardizer.evaluate(values)


FLOAT_NODATA = -3.4028234663852886e38
CASES: list[tuple[torch.dtype, Any, list[float], list[float]]] = [
    (torch.uint8, -9999, [], [241, 0]),  # 241 is what a byte stores of -9999
    (torch.uint8, (0, 255), [0, 255], [1, 254]),
    (torch.uint8, 0.5, [], [0, 1]),
    (torch.int8, 241, [], [-15]),
    (torch.int16, (-9999, -32768), [-9999, -32768], [-9998, 0]),
    (torch.int16, float("-inf"), [], [-32768]),
    (torch.uint16, 65535, [65535], [0, 65534]),
    (torch.int32, 2**31 - 1, [2**31 - 1], [2**31 - 2]),
    (torch.int64, -(2**31), [-(2**31)], [-(2**31) + 1]),
    (torch.float32, FLOAT_NODATA, [FLOAT_NODATA], [-3.4e18]),
    (torch.float32, 0.1, [0.1, 0.1 + 1e-9], [0.1 + 1e-8]),
    (torch.float64, 0.1, [0.1], [0.1 + 1e-15, 0.10000000149011612]),
    (torch.bfloat16, -9999, [-9999, -9984], [-9920]),  # bfloat16 stores -9984 of both
    (torch.float16, FLOAT_NODATA, [float("-inf")], [-65504]),
    (torch.float32, float("-inf"), [float("-inf")], [-3e18]),
]


@pytest.mark.parametrize(("dtype", "nodata", "left_out", "counted"), CASES, ids=str)
def test_numbers_that_stand_for_no_value_are_told_exactly(
    dtype: torch.dtype, nodata: Any, left_out: list[float], counted: list[float]
) -> None:
    values = torch.tensor([*left_out, *counted], dtype=torch.float64 if dtype.is_floating_point else torch.int64).to(
        dtype
    )
    wanted = torch.tensor([False] * len(left_out) + [True] * len(counted))
    found = InputMasks.of(values, None, InputNorm(1, nodata=nodata, channel_dim=None)).counted
    assert found is not None
    assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.float32, torch.float64], ids=str)
def test_nodata_is_a_mask_that_needs_no_mask(mode: Any, dtype: torch.dtype) -> None:
    values = (TABLE * 50).to(dtype)
    mask = torch.rand(64, 4, generator=torch.Generator().manual_seed(1)) < 0.7
    holes = values.masked_fill(~mask, -9999)
    masked, by_value = standardizer_of(mode=mode), standardizer_of(mode=mode, nodata=-9999)
    assert torch.equal(by_value.train(holes), masked.train(values, mask))
    assert torch.equal(by_value.evaluate(holes), masked.evaluate(values, mask))
    assert torch.equal(by_value.statistics().count, masked.statistics().count)
    more = torch.arange(64).view(-1, 1) < 50  # a mask beside it
    assert torch.equal(by_value.evaluate(holes, more), masked.evaluate(values, mask & more))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fill", [None, 0.0, -7.0])
def test_masked_values_and_nan_become_the_fill_after_scale_and_clip(mode: Any, fill: float | None) -> None:
    values, mask = TABLE.clone(), torch.ones(64, 1, dtype=torch.bool)
    values[1, 0], mask[2], values[3, 1] = torch.nan, False, -9999
    standardizer = standardizer_of(mode=mode, fill=fill, nodata=-9999, nan_policy="ignore", scale=0.058, clip=1.0)
    for result in (
        standardizer.train(values, mask),
        standardizer.evaluate(values, mask),
        standardizer.preview(values, mask),
    ):
        assert result[3, 1] == (fill or 0.0)
        assert (result[2] == (fill or 0.0)).all()
        torch.testing.assert_close(result[1, 0], torch.tensor(torch.nan if fill is None else fill), equal_nan=True)
        others = torch.ones(64, 4, dtype=torch.bool)
        others[1, 0] = others[3, 1] = False
        assert (result[others & mask].abs() <= 0.0581).all()


def test_a_preview_before_training_leaves_the_same_out() -> None:
    values = TABLE.clone()
    values[:10, 0] = -9999
    result = standardizer_of(channels=[0, 1], nodata=-9999, clip=1.0, fill=3.0).preview(values)
    assert (result[:10, 0] == 3).all()
    np.testing.assert_allclose(
        result[10:, 0], ((x := values[10:, 0].numpy()) - x.mean()).clip(-x.std(), x.std()) / x.std(), 0, 1e-5
    )
    assert torch.equal(result[:, 2:], values[:, 2:])


def test_frozen_statistics_and_images_with_channels_last_leave_the_same_out() -> None:
    settings: dict[str, Any] = {"channels": [0, 2], "nodata": (100, 120), "clip": 1.5, "fill": -1.0}
    first, last = (
        standardizer_of(3, freeze_after=8, **settings),
        standardizer_of(3, freeze_after=8, channel_dim=-1, **settings),
    )
    for part in IMAGES.split(8):
        moved = part.movedim(1, -1)
        assert torch.equal(first.train(part), last.train(moved).movedim(-1, 1))
    assert first.is_frozen


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_compiled_kernels_leave_the_same_out_to_the_bit(dtype: torch.dtype) -> None:
    settings: dict[str, Any] = {"channels": [0, 2], "nodata": 100, "clip": 1.5, "fill": -1.0}
    results: list[Tensor] = []
    for compile in (False, True):
        standardizer = standardizer_of(3, compile=compile, **settings)
        results.append(torch.stack([standardizer.train(IMAGES.to(dtype)), standardizer.evaluate(IMAGES.to(dtype))]))
    assert torch.equal(*results)
