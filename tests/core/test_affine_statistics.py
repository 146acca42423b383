from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.models import BATCH_NORMS, residual_net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from lightning_revbn import find_batch_norms
from lightning_revbn.core.affine_statistics import AffineStatistics


def expected(name: str, value: np.ndarray, start: np.ndarray) -> dict[str, float]:
    """Layer by layer, in float64."""
    drift = np.sqrt(np.mean((value - start) ** 2))
    numbers = {"mean": value.mean(), "std": value.std(), "min": value.min(), "max": value.max(), "drift": drift}
    return {f"{name}_{statistic}": float(number) for statistic, number in numbers.items()}


def array(parameter: torch.Tensor) -> np.ndarray:
    return parameter.detach().double().numpy().copy()


@settings(max_examples=50, deadline=None)
@given(
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    without_affine=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_statistics_equal_numpys_layer_by_layer(
    widths: list[int], dtype: torch.dtype, without_affine: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layers = [nn.BatchNorm1d(width) for width in widths]
    model = nn.Sequential(*layers, nn.BatchNorm1d(3, affine=not without_affine)).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    start = {name: array(parameter) for name, parameter in model.named_parameters()}
    statistics = AffineStatistics(find_batch_norms(model))
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.1, 3.0)

    reference: dict[str, float] = {}
    pooled: dict[str, list[np.ndarray]] = {"weight": [], "bias": [], "from weight": [], "from bias": []}
    for name, parameter in model.named_parameters():
        layer, _, attribute = name.rpartition(".")
        kind = "scale" if attribute == "weight" else "shift"
        reference |= expected(f"{layer}/{kind}", array(parameter), start[name])
        pooled[attribute].append(array(parameter))
        pooled[f"from {attribute}"].append(start[name])
    joined = {key: np.concatenate(values) for key, values in pooled.items()}
    reference["scale_mean"] = float(joined["weight"].mean())
    reference["scale_drift"] = float(np.sqrt(np.mean((joined["weight"] - joined["from weight"]) ** 2)))
    reference["shift_drift"] = float(np.sqrt(np.mean((joined["bias"] - joined["from bias"]) ** 2)))

    computed = statistics.compute()
    assert computed.keys() == reference.keys()
    assert computed == pytest.approx(reference, rel=1e-12, abs=1e-12)


def test_only_the_whole_model_is_told_when_single_layers_are_not_wanted() -> None:
    computed = AffineStatistics(find_batch_norms(residual_net())).compute(per_layer=False)
    assert computed == {"scale_mean": 1.0, "scale_drift": 0.0, "shift_drift": 0.0}


def test_drift_goes_on_from_the_saved_start() -> None:
    model = residual_net()
    first = AffineStatistics(find_batch_norms(model))
    nn.init.constant_(model.bn1.weight, 1.5)
    second = AffineStatistics(find_batch_norms(model), first.state_dict())
    assert second.compute()["bn1/scale_drift"] == first.compute()["bn1/scale_drift"] == 0.5
    assert second.state_dict()["scale"]["values"].dtype == torch.float32


def test_the_start_of_other_layers_is_refused() -> None:
    start = AffineStatistics(find_batch_norms(residual_net(width=5))).state_dict()
    with pytest.raises(ValueError, match="values to measure drift from are of other layers"):
        AffineStatistics(find_batch_norms(residual_net()), start)


def test_a_model_without_scales_has_no_statistics() -> None:
    statistics = AffineStatistics(find_batch_norms(nn.Sequential(nn.BatchNorm1d(3, affine=False))))
    assert statistics.compute() == {}
    AffineStatistics(find_batch_norms(nn.Sequential()), statistics.state_dict())


def test_measuring_neither_changes_parameters_nor_records_gradients() -> None:
    model = residual_net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    statistics = AffineStatistics(find_batch_norms(model))
    statistics.compute()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {key.split("/")[0] for key in statistics.compute()} > set(BATCH_NORMS)


def test_layers_of_different_precision_are_measured_together() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3).to(torch.float16), nn.BatchNorm1d(2).double())
    nn.init.constant_(model[1].weight, 0.5)
    computed = AffineStatistics(find_batch_norms(model)).compute()
    assert computed["1/scale_mean"] == 0.5
    assert computed["scale_mean"] == pytest.approx((3 + 1.5 + 2) / 8)


def test_a_parametrised_scale_is_measured_as_the_layer_uses_it() -> None:
    class Double(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        def right_inverse(self, x: torch.Tensor) -> torch.Tensor:
            return x / 2

    layer = nn.BatchNorm1d(3)
    register_parametrization(layer, "weight", Double())
    layer.weight = torch.tensor([1.0, 2.0, 6.0])
    computed = AffineStatistics(find_batch_norms(nn.Sequential(layer, nn.BatchNorm1d(1)))).compute()
    assert (computed["0/scale_mean"], computed["0/scale_max"]) == (3.0, 6.0)
    assert computed["scale_mean"] == 2.5


def test_infinity_and_nan_are_told_as_they_are() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    statistics = AffineStatistics(find_batch_norms(model))
    model[0].weight.data = torch.tensor([float("inf"), 1.0])
    model[1].bias.data = torch.tensor([float("nan"), 1.0])
    computed = statistics.compute()
    assert computed["0/scale_max"] == computed["0/scale_drift"] == computed["scale_mean"] == math.inf
    assert math.isnan(computed["1/shift_mean"])
    assert computed["1/scale_mean"] == 1.0


def test_every_key_begins_with_the_prefix() -> None:
    statistics = AffineStatistics(find_batch_norms(residual_net()), prefix="a")
    assert all(key.startswith("a/") for key in [*statistics.compute(), *statistics.histograms()])


def test_histograms_are_of_the_values_themselves() -> None:
    model = residual_net()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    histograms = AffineStatistics(find_batch_norms(model)).histograms()
    assert histograms.keys() == {f"{layer}/{kind}" for layer in BATCH_NORMS for kind in ("scale", "shift")}
    np.testing.assert_array_equal(histograms["bn2/shift"], array(model.bn2.bias))
    np.testing.assert_array_equal(histograms["stem.1/scale"], array(model.stem[1].weight))


def test_values_reach_the_host_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = AffineStatistics(find_batch_norms(residual_net()))
    copies: list[torch.Size] = []

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        copies.append(tensor.shape)
        return tensor

    def refused(tensor: torch.Tensor) -> None:
        raise AssertionError("a copy of its own")

    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    for name in ("item", "tolist", "__float__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, refused, raising=False)
    statistics.compute()
    assert copies == [torch.Size([2 * 3 * 6])]
