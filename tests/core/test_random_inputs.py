"""Random settings, dtypes, layouts, masks and NaN against NumPy; `RANDOM_INPUTS=3000` in the environment tries more."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from helpers.raw import same_states
from numpy.typing import NDArray
from torch import Tensor

from lightning_revbn import InputNorm
from lightning_revbn.core.input_norm import OnlineStandardizer

CASES = int(os.environ.get("RANDOM_INPUTS", "200"))
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Array = NDArray[Any]


@dataclass
class Case:
    """Draws what is random, and keeps what was seen, channel by channel."""

    seed: int
    random: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        torch.manual_seed(self.seed)
        self.dtype: torch.dtype = self.one_of((*INTEGERS, *FLOATS))
        self.shape = [int(self.one_of((1, 2, 3, 5, 17, 70))) for _ in range(self.random.integers(1, 5))]
        dims = len(self.shape)
        self.channel_dim: int | None = self.one_of((None, *range(-dims, dims)))
        self.channels = 1 if self.channel_dim is None else self.shape[self.channel_dim]
        self.mode: Any = self.one_of(("batch", "running", "ema", "fixed"))
        self.ignores_nan = self.dtype.is_floating_point and self.random.random() < 0.3
        self.masks = self.random.random() < 0.3
        self.centre = torch.randn(self.channels) * float(self.one_of((0.0, 1.0, 100.0)))
        self.spread = torch.rand(self.channels) * float(self.one_of((1.0, 50.0))) + 0.1
        self.spread[torch.rand(self.channels) < 0.1] = 0  # constant channels
        self.settings = InputNorm(
            self.channels,
            scale=float(self.one_of((1.0, 0.058))),
            mode=self.mode,
            momentum=float(self.one_of((0.1, 0.5, 1.0))),
            eps=float(self.one_of((0.0, 1e-5, 0.1))),
            input_range=self.one_of(("auto", "auto", 2.0, 255.0)),
            channel_dim=self.channel_dim,
            nan_policy="ignore" if self.ignores_nan else "error",
            **({"mean": [0.3] * self.channels, "std": [0.7] * self.channels} if self.mode == "fixed" else {}),
            **self.selection(),
        )
        self.chosen = np.array([channel in self.chosen_channels() for channel in range(self.channels)])
        auto = 255.0 if self.dtype == torch.uint8 else 1.0
        self.unit = auto if self.settings.input_range == "auto" else self.settings.input_range

    def selection(self) -> dict[str, Any]:
        """Return the settings that leave values out, each in a third of all cases."""
        is_small = self.dtype in (torch.uint8, torch.int8)
        drawn: dict[str, Any] = {
            "clip": float(self.one_of((0.3, 2.0))),
            "fill": float(self.one_of((0.0, -3.0))),
            # As a byte -9999 would be 241, and half precision holds -10000 instead of it.
            "nodata": self.one_of((-9999, 7, (7, -9999), (7.5, 8))) if is_small else self.one_of((-9999, (7, -9999.0))),
        }
        if self.channel_dim is not None:
            drawn["channels"] = self.random.permutation(self.channels)[: self.random.integers(1, self.channels + 1)]
        return {name: value for name, value in drawn.items() if self.random.random() < 1 / 3}

    def chosen_channels(self) -> Any:
        return range(self.channels) if self.settings.channels is None else self.settings.channels

    def one_of(self, choices: Any) -> Any:
        return choices[self.random.integers(len(choices))]

    def batch(self) -> tuple[Tensor, Tensor | None]:
        """Return values in some layout of memory, and a mask or None; the batch may be empty."""
        shape = list(self.shape)
        others = [dim for dim in range(len(shape)) if self.channel_dim is None or dim != self.channel_dim % len(shape)]
        if others:
            shape[others[0]] = int(self.one_of((0, 1, 2, 9)))
        along = [1] * len(shape)
        if self.channel_dim is not None:
            along[self.channel_dim] = -1
        values = torch.randn(shape) * self.spread.view(along) + self.centre.view(along)
        values = (values * 20 if self.dtype in INTEGERS else values).clamp(-3e4, 3e4)
        if self.dtype in (torch.uint8, torch.int8):
            values = values.clamp(-100, 100) + (128 if self.dtype == torch.uint8 else 0)
        values = values.to(self.dtype)
        for number in self.settings.nodata_values:
            if self.holds(number):
                values[torch.rand(shape) < 0.1] = number
        if self.ignores_nan:
            values[torch.rand(shape) < 0.2] = torch.nan
        order = self.random.permutation(len(shape)).tolist()
        layout = self.random.integers(3)
        if layout == 1:
            values = values.permute(order).contiguous().permute(np.argsort(order).tolist())
        elif layout == 2:
            values = values.repeat_interleave(2, -1)[..., ::2]
        if not self.masks:
            return values, None
        sizes = [size if self.random.random() < 0.7 else 1 for size in shape]
        return values, torch.rand(sizes) < 0.7

    def holds(self, number: float) -> bool:
        limits = None if self.dtype.is_floating_point else torch.iinfo(self.dtype)
        return limits is None or (number == int(number) and limits.min <= number <= limits.max)

    def valid(self, values: Tensor, mask: Tensor | None) -> Array:
        """Return where values are data, channel by channel."""
        array = self.by_channel(values.double().numpy())
        result = np.ones(array.shape, bool) if mask is None else self.by_channel(mask.expand(values.shape).numpy())
        for number in self.settings.nodata_values:
            if self.holds(number):
                result = result & (array != torch.tensor([number]).to(self.dtype).item())
        return result

    def columns(self, values: Tensor, mask: Tensor | None) -> list[Array]:
        """Return the values of each channel that count, in units of the range."""
        array = self.by_channel(values.double().numpy()) / self.unit
        keep = ~np.isnan(array) & self.valid(values, mask) & self.chosen[:, None]
        return [row[kept] for row, kept in zip(array, keep, strict=True)]

    def by_channel(self, array: Array) -> Array:
        if self.channel_dim is None:
            return array.reshape(1, -1)
        return np.moveaxis(array, self.channel_dim, 0).reshape(self.channels, -1)

    def normalized(self, values: Tensor, mask: Tensor | None, means: Array, variances: Array) -> Array:
        """Return what normalising gives, channel by channel."""
        array = self.by_channel(values.double().numpy()) / self.unit
        constant = variances <= (8 * np.finfo(float).eps * means) ** 2
        divisors = np.where(constant, 1.0, np.sqrt(variances + self.settings.eps))
        result = (array - means[:, None]) / divisors[:, None]
        if self.settings.clip is not None:
            result = np.where(result > self.settings.clip, self.settings.clip, result)
            result = np.where(result < -self.settings.clip, -self.settings.clip, result)
        result *= self.settings.scale
        kept = self.valid(values, mask)
        if self.settings.fill is not None:
            kept = kept & ~np.isnan(array)
        result = np.where(kept, result, self.settings.fill or 0.0)
        return np.where(self.chosen[:, None], result, array * self.unit)


def means_and_variances(columns: list[Array]) -> tuple[Array, Array]:
    means = np.array([column.mean() if len(column) else 0.0 for column in columns])
    pairs = zip(columns, means, strict=True)
    return means, np.array([((column - mean) ** 2).mean() if len(column) else 0.0 for column, mean in pairs])


class Reference:
    """Mean and variance by the definition, from all values of all batches."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.batches: list[list[Array]] = []

    def add(self, columns: list[Array]) -> None:
        self.batches.append(columns)

    def everything(self) -> list[Array]:
        return [np.concatenate(parts) for parts in zip(*self.batches, strict=True)]

    def of_evaluation(self) -> tuple[Array, Array]:
        if self.case.mode == "fixed":
            return np.full(self.case.channels, 0.3), np.full(self.case.channels, 0.7**2)
        if self.case.mode != "ema":
            return means_and_variances(self.everything())
        pairs = [self._averaged([batch[channel] for batch in self.batches]) for channel in range(self.case.channels)]
        return np.array([mean for mean, _ in pairs]), np.array([variance for _, variance in pairs])

    def of_training(self) -> tuple[Array, Array]:
        if self.case.mode != "batch":
            return self.of_evaluation()
        lonely = np.array([len(column) <= 1 for column in self.batches[-1]])
        own, total = means_and_variances(self.batches[-1]), self.of_evaluation()
        return np.where(lonely, total[0], own[0]), np.where(lonely, total[1], own[1])

    def _averaged(self, columns: list[Array]) -> tuple[float, float]:
        momentum, weight = self.case.settings.momentum, 1.0
        weights: list[float] = []
        seen = [column for column in columns if len(column)]
        for _ in seen:
            weights.insert(0, weight * momentum)
            weight *= 1 - momentum
        if not seen:
            return 0.0, 0.0
        shares = np.array(weights) / sum(weights)
        mean = sum(share * column.mean() for share, column in zip(shares, seen, strict=True))
        return mean, sum(share * ((column - mean) ** 2).mean() for share, column in zip(shares, seen, strict=True))


@pytest.mark.filterwarnings("ignore:a batch of evaluation|training has seen no value:UserWarning")
@pytest.mark.parametrize("seeds", [range(start, min(start + 50, CASES)) for start in range(0, CASES, 50)], ids=str)
def test_random_inputs_equal_numpy(seeds: range) -> None:
    for seed in seeds:
        case = Case(seed)
        try:
            run(case)
        except Exception as error:
            raise AssertionError(f"case {seed}: {case.mode}, {case.dtype}, {case.shape}, {case.channel_dim}") from error


def run(case: Case) -> None:
    standardizer, reference = OnlineStandardizer(case.settings), Reference(case)
    for _ in range(case.random.integers(1, 5)):
        values, mask = case.batch()
        result = standardizer.train(values, mask, dtype=torch.float64)
        reference.add(case.columns(values, mask))
        assert result.shape == values.shape
        close(case, result, case.normalized(values, mask, *reference.of_training()))
    if not standardizer.has_statistics:
        return
    means, variances = reference.of_evaluation()
    if case.mode != "fixed":
        columns = reference.everything()
        found, expected = standardizer.statistics(), means_and_variances(columns)
        assert found.count.tolist() == [len(column) for column in columns]
        np.testing.assert_allclose(found.mean, expected[0], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(found.std, np.where(case.chosen, np.sqrt(expected[1]), 1), rtol=1e-9, atol=1e-12)
    other = OnlineStandardizer(case.settings)
    other.load_state_dict(standardizer.state_dict())
    assert same_states(other.state_dict(), standardizer.state_dict())
    values, mask = case.batch()
    result, again = (one.evaluate(values, mask) for one in (other, standardizer))
    assert torch.equal(result.nan_to_num(7.0), again.nan_to_num(7.0))
    close(case, result, case.normalized(values, mask, means, variances))
    exported = standardizer.normalizer()(values)
    close(case, exported, case.normalized(values, None, means, variances))
    close(case, standardizer.normalizer()(values, mask), case.normalized(values, mask, means, variances))
    array = case.by_channel(values.double().numpy())
    wanted = np.where(case.chosen[:, None], array / case.unit, array)
    size = np.abs(wanted) + np.abs(means[:, None])
    error = np.abs(case.by_channel(standardizer.denormalize(exported).double().numpy()) - wanted)
    if case.settings.clip is not None:
        limit = case.settings.clip * case.settings.scale * (1 - 1e-5)
        error[case.chosen[:, None] & (np.abs(case.by_channel(exported.double().numpy())) > limit)] = 0.0
    error[case.chosen[:, None] & ~case.valid(values, None)] = 0.0
    if case.settings.fill is not None:
        error[np.isnan(array)] = 0.0
    assert (np.nan_to_num(error) <= 1e-5 * np.nan_to_num(size) + 1e-5).all()


def close(case: Case, result: Tensor, expected: Array) -> None:
    np.testing.assert_allclose(case.by_channel(result.double().numpy()), expected, rtol=2e-5, atol=2e-5)
