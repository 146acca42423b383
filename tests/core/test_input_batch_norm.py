"""The front layer against torch's batch norm."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.models import images, residual_net, scales
from helpers.raw import raw_images
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_revbn import InputBatchNorm, ScaleUpdateRule, find_batch_norms, init_batch_norms
from lightning_revbn.core.activations import ActivationHooks, NormalizedActivations


@pytest.mark.parametrize(
    ("torchs", "shape"),
    [
        (nn.BatchNorm1d, (8, 3)),
        (nn.BatchNorm1d, (8, 3, 5)),
        (nn.BatchNorm2d, (8, 3, 5, 6)),
        (nn.BatchNorm3d, (8, 3, 2, 2, 2)),
    ],
)
def test_it_is_batch_norm_to_the_bit(torchs: type[nn.Module], shape: tuple[int, ...]) -> None:
    layer, reference = InputBatchNorm(3), torchs(3)
    nn.init.constant_(reference.weight, 0.1 * 0.58)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        values, upstream = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
        first, second = (values.clone().requires_grad_() for _ in range(2))
        assert torch.equal(layer(first), reference(second))
        layer(first).backward(upstream)
        reference(second).backward(upstream)
        assert torch.equal(first.grad, second.grad)
        assert torch.equal(layer.weight.grad, reference.weight.grad)
    assert all(torch.equal(value, reference.state_dict()[name]) for name, value in layer.state_dict().items())
    assert torch.equal(layer.eval()(values), reference.eval()(values))


def test_states_go_both_ways() -> None:
    layer, reference = InputBatchNorm(3), nn.BatchNorm2d(3)
    reference(images(8)[0])
    layer.load_state_dict(reference.state_dict())
    assert torch.equal(layer.running_var, reference.running_var)
    nn.BatchNorm2d(3).load_state_dict(layer.state_dict())


def test_bytes_are_divided_by_255() -> None:
    values = raw_images(8)[0]
    first, second = InputBatchNorm(3), InputBatchNorm(3)
    assert torch.equal(first(values), second(values / 255))
    assert torch.equal(first.running_mean, second.running_mean)


def test_half_precision_keeps_the_running_statistics_in_float32() -> None:
    layer = InputBatchNorm(3).to(torch.bfloat16)
    assert (layer.weight.dtype, layer.running_mean.dtype, layer.running_var.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )
    assert layer(images(8)[0].bfloat16()).dtype == torch.bfloat16
    assert InputBatchNorm(3).double().running_var.dtype == torch.float64


def test_only_the_scale_is_trained_and_sync_batchnorm_leaves_the_layer_alone() -> None:
    layer = InputBatchNorm(3, scale=0.25 * 0.58)
    assert {name: value.tolist() for name, value in layer.named_parameters()} == {"weight": pytest.approx([0.145] * 3)}
    assert isinstance(nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer))[0], InputBatchNorm)


@pytest.mark.parametrize("shape", [(3,), (8, 4, 5, 5), (8, 5, 5, 3)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"InputBatchNorm\(3\) takes inputs of shape \(N, 3, \*\), got"):
        InputBatchNorm(3)(torch.zeros(shape))


def test_numbers_are_taken_from_numpy() -> None:
    given, plain = (
        InputBatchNorm(np.int64(3), np.array(0.5), np.float32(0.25), np.float64(0.5)),
        InputBatchNorm(3, 0.5, 0.25, 0.5),
    )
    values = torch.rand(4, 3, 5, 5)
    assert torch.equal(given(values), plain(values))
    assert repr(given) == repr(plain)


@pytest.mark.parametrize("arguments", [{"num_features": 0}, {"num_features": 3, "scale": 0.0}])
def test_impossible_arguments_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"num_features=0|scale=0.0"):
        InputBatchNorm(**arguments)  # type: ignore[arg-type]


def test_it_trains_as_the_papers_recipe_does_by_hand() -> None:
    g, lr, c = 0.1, 0.05, 100.0

    front = nn.BatchNorm2d(3)
    nn.init.constant_(front.weight, g * 0.58)
    front.bias.requires_grad_(False)
    by_hand = nn.Sequential(front, residual_net())
    for layer in scales(by_hand[1]):
        nn.init.constant_(layer, g)
    divided = {id(scale) for scale in scales(by_hand)}
    rest = [value for value in by_hand.parameters() if id(value) not in divided and value.requires_grad]
    reference = torch.optim.SGD([{"params": rest}, {"params": scales(by_hand), "lr": lr / c}], lr=lr, momentum=0.9)

    model = nn.Sequential(InputBatchNorm(3, scale=g * 0.58), residual_net())
    report = init_batch_norms(model, g)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    ScaleUpdateRule(optimizer, report.scales, c)

    inputs, labels = images(32)
    for step in range(4):
        rows = slice(8 * step, 8 * step + 8)
        for network, descent in ((by_hand, reference), (model, optimizer)):
            descent.zero_grad()
            cross_entropy(network(inputs[rows]), labels[rows]).backward()
            descent.step()
    expected = by_hand.state_dict()
    assert not [name for name, value in model.state_dict().items() if not torch.equal(value, expected[name])]
    assert not torch.equal(model[0].weight, torch.full((3,), g * 0.58))


def test_the_report_has_it_as_a_layer_that_keeps_its_scale() -> None:
    model = nn.Sequential(InputBatchNorm(3), residual_net())
    for policy in ("keep", "overwrite", "error"):
        record = find_batch_norms(model, 0.5, trained=policy)[0]  # type: ignore[arg-type]
        assert (record.name, record.verdict, record.state, record.target) == ("0", "skip", "input", 0.1 * 0.58)
    assert record.scale is model[0].weight
    assert record.shift is None
    report = init_batch_norms(model, 0.5)
    assert model[0].weight.tolist() == pytest.approx([0.058] * 3)
    assert report.scales[0] is model[0].weight
    assert id(model[0].weight) not in map(id, init_batch_norms(model, 0.5, exclude="0").scales)


def test_its_normalised_values_are_measured() -> None:
    values = raw_images(8)[0]
    layer = InputBatchNorm(3)
    records = find_batch_norms(layer)
    metric = NormalizedActivations(1)
    with ActivationHooks(records, metric):
        output: Tensor = layer(values)
    expected = (output.detach() / 0.058).abs().max().item()
    assert metric.compute()[0][0].item() == pytest.approx(expected, rel=1e-5)
