"""Applying constants, and the module that is exported, against float64."""

from __future__ import annotations

import io
import math
import warnings
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_revbn import InputNorm
from lightning_revbn.core.fixed_normalizer import Constants, FixedNormalizer, arithmetic_dtype, standardize
from lightning_revbn.core.input_norm import OnlineStandardizer
from lightning_revbn.core.keep_rules import KeepRules
from lightning_revbn.core.moments import moments

MEAN, GAIN = torch.tensor([100.3, 120.7, 90.1]).double(), torch.tensor([0.01, 0.02, 0.03]).double()
DTYPES = [torch.uint8, torch.int16, torch.int32, torch.int64, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "channel_dim"), [((4, 3, 20, 9), 1), ((4, 20, 9, 3), -1), ((50, 3), 1), ((3, 7), 0)])
def test_every_dtype_and_shape_equals_float64(dtype: torch.dtype, shape: tuple[int, ...], channel_dim: int) -> None:
    values = torch.randint(0, 255, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = values.clone()
    for result_dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float64, 1e-6)):
        result = standardize(values, constants(values.dtype), channel_dim, result_dtype)
        assert result.dtype == result_dtype
        torch.testing.assert_close(result.double(), expected(values, channel_dim), rtol=tolerance, atol=tolerance)
    assert torch.equal(values, before)


def test_the_memory_format_is_kept() -> None:
    values = torch.randint(0, 255, (4, 3, 20, 9)).float()
    for other in (values, values.to(memory_format=torch.channels_last), values.transpose(2, 3)):
        result = standardize(other, constants(torch.float32), 1, torch.float32)
        assert result.stride() == other.stride()
        torch.testing.assert_close(result.double(), expected(other, 1), rtol=1e-6, atol=1e-6)
    cropped = values[:, :, 2:-2, 3:]  # has gaps in its memory
    result = standardize(cropped, constants(torch.float32), 1, torch.float32)
    torch.testing.assert_close(result.double(), expected(cropped, 1), rtol=1e-6, atol=1e-6)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_layout_of_memory_gives_the_same(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 5))
    sizes = st.lists(st.sampled_from([1, 2, 3, 5, 65]), min_size=rank, max_size=rank)
    shape = data.draw(sizes.filter(lambda shape: math.prod(shape) < 100_000))  # five times 65 would be gigabytes
    channel_dim = data.draw(st.integers(0, rank - 1))
    order = data.draw(st.permutations(range(rank)))
    values = torch.arange(float(math.prod(shape))).view(shape).permute(order)[..., :: data.draw(st.integers(1, 2))]
    values = data.draw(st.sampled_from([values, values.clone(), values[:1].expand(values.shape), values.contiguous()]))
    mean = torch.arange(float(values.shape[channel_dim]), dtype=torch.float64)
    chosen = Constants.of(torch.zeros_like(mean), mean, 1 / (1 + mean), torch.float32)
    along = [1] * rank
    along[channel_dim] = -1
    result = standardize(values, chosen, channel_dim, torch.float32)
    wanted = (values.double() - mean.view(along)) / (1 + mean.view(along))
    torch.testing.assert_close(result.double(), wanted, rtol=1e-6, atol=1e-6)
    measured = moments(values, channel_dim)
    by_channel = values.double().movedim(channel_dim, 0).reshape(len(mean), -1)
    torch.testing.assert_close(measured.mean, by_channel.mean(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(measured.variance, by_channel.var(1, correction=0), rtol=1e-11, atol=1e-9)


def test_a_large_mean_keeps_the_precision_of_the_values() -> None:
    values = (1e6 + torch.randn(1000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).float()
    mean, gain = torch.tensor([1e6 + 0.03], dtype=torch.float64), torch.ones(1).double()
    chosen = Constants.of(torch.zeros(1).double(), mean, gain, torch.float32)
    assert chosen.rest is not None
    torch.testing.assert_close(
        standardize(values, chosen, 1, torch.float32).double(), values.double() - mean, rtol=1e-6, atol=1e-8
    )


def test_masked_values_become_zero_and_nothing_stays_nothing() -> None:
    values = torch.randint(0, 255, (4, 3, 20)).float()
    mask = torch.rand(4, 1, 20) < 0.5
    result = standardize(values, constants(torch.float32), 1, torch.float32, KeepRules(mask))
    assert (result[~mask.expand_as(result)] == 0).all()
    torch.testing.assert_close(result.double(), expected(values, 1) * mask, rtol=1e-6, atol=1e-6)
    assert standardize(values[:0], constants(torch.float32), 1, torch.float32).shape == (0, 3, 20)


@pytest.mark.parametrize("channel_dim", [1, -1, None])
def test_the_exported_module_does_what_evaluation_does(channel_dim: int | None) -> None:
    shape = (6, 3, 8, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    standardizer = OnlineStandardizer(InputNorm(1 if channel_dim is None else 3, channel_dim=channel_dim))
    standardizer.train(images)
    module = standardizer.normalizer().eval()
    assert not list(module.parameters())
    for values in (images, images / 255):
        wanted = standardizer.evaluate(values)
        forms: list[Any] = [module, scripted(module), torch.export.export(module, (values,)).module()]
        for form in forms:
            torch.testing.assert_close(form(values), wanted, rtol=1e-6, atol=1e-6)
        (from_onnx,) = onnx_session(module, values).run(None, {"values": values.numpy()})
        np.testing.assert_allclose(from_onnx, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("channels", [None, [0, 2]])
@pytest.mark.parametrize(("dtype", "nodata"), [(torch.uint8, (0, -9999)), (torch.int16, -9999), (torch.float32, -9999)])
def test_every_form_of_the_exported_module_leaves_out_what_evaluation_leaves_out(
    dtype: torch.dtype, nodata: Any, channels: Any
) -> None:
    given = InputNorm(3, clip=1.0, fill=-2.0, nodata=nodata, channels=channels, nan_policy="ignore")
    standardizer = OnlineStandardizer(given)
    values = torch.randint(0, 256, (6, 3, 8), generator=torch.Generator().manual_seed(0)).to(dtype)
    values[::2, :, :3] = 0 if dtype == torch.uint8 else -9999
    if dtype == torch.float32:
        values[1, :, 4] = torch.nan
    standardizer.train(values)
    module, mask = standardizer.normalizer().eval(), torch.arange(8) > 1
    wanted, masked = standardizer.evaluate(values), standardizer.evaluate(values, mask)
    assert (wanted == -2).any()
    assert not torch.equal(masked.nan_to_num(), wanted.nan_to_num())
    forms: list[Any] = [module, scripted(module), torch.export.export(module, (values, mask)).module()]
    for form in forms:
        torch.testing.assert_close(form(values, mask), masked, rtol=1e-6, atol=1e-6, equal_nan=True)
    for form in (module, scripted(module), torch.export.export(module, (values,)).module()):
        torch.testing.assert_close(form(values), wanted, rtol=1e-6, atol=1e-6, equal_nan=True)
    (from_onnx,) = onnx_session(module, values).run(None, {"values": values.numpy()})
    np.testing.assert_allclose(from_onnx, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(module.half()(values), wanted.half(), rtol=1e-3, atol=1e-3, equal_nan=True)


def test_the_exported_module_knows_a_given_range() -> None:
    module = FixedNormalizer(torch.tensor([0.5]).double(), torch.tensor([2.0]).double(), input_range=1000.0)
    assert module(torch.tensor([[1000]], dtype=torch.int16)).item() == pytest.approx(1.0)


def scripted(module: nn.Module) -> Any:
    with warnings.catch_warnings():
        # Torch 2.14 deprecates TorchScript, which users with older versions still use.
        warnings.simplefilter("ignore")
        return torch.jit.script(module)


def onnx_session(module: nn.Module, values: Tensor) -> Any:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The exporter that all supported versions of torch have is deprecated in the newest.
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (values,), buffer, input_names=["values"], dynamo=False)
    return onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])


def constants(dtype: torch.dtype) -> Constants:
    return Constants.of(torch.zeros(3).double(), MEAN, GAIN, arithmetic_dtype(dtype))


def expected(values: Tensor, channel_dim: int) -> Tensor:
    shape = [1] * values.dim()
    shape[channel_dim] = -1
    return (values.double() - MEAN.view(shape)) * GAIN.view(shape)
