from __future__ import annotations

import copy
import io
import json

import pytest
import torch
import torchvision
from helpers.models import Softplus, residual_net, scales
from rich.console import Console
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from lightning_revbn import find_batch_norms, init_batch_norms


def test_scales_are_written_and_nothing_else() -> None:
    model = residual_net()
    before = copy.deepcopy(model.state_dict())
    identities = [id(parameter) for parameter in model.parameters()]
    report = init_batch_norms(model, 0.1)
    own = {"stem.1.weight", "bn1.weight", "bn2.weight"}
    for key, value in model.state_dict().items():
        expected = torch.full_like(value, 0.1) if key in own else before[key]
        assert torch.equal(value, expected), key
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert all(scale.requires_grad and scale.grad is None for scale in scales(model))
    assert [record.name for record in report.rewritten] == ["stem.1", "bn1", "bn2"]
    assert report.left_alone == []


def test_the_whole_of_a_torchvision_resnet_is_rewritten_as_by_hand() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=3).eval()
    by_hand = copy.deepcopy(model)
    for layer in by_hand.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.constant_(layer.weight, 0.1)
    assert len(init_batch_norms(model).rewritten) == 20
    inputs = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(inputs), by_hand(inputs))


def test_each_layer_takes_the_scale_of_its_pattern() -> None:
    model = residual_net()
    init_batch_norms(model, {"bn1": 0.5, "bn*": 0.25})
    assert [scale[0].item() for scale in scales(model)] == [1.0, 0.5, 0.25]


def test_a_second_call_finds_the_layers_fresh_and_changes_nothing() -> None:
    model = residual_net()
    init_batch_norms(model)
    before = copy.deepcopy(model.state_dict())
    assert len(init_batch_norms(model).rewritten) == 3
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_pretrained_layer_keeps_its_scale_unless_asked_for() -> None:
    model = residual_net()
    model(torch.randn(8, 3, 6, 6))
    nn.init.uniform_(model.bn1.weight)
    trained = model.bn1.weight.detach().clone()
    report = init_batch_norms(model)
    assert torch.equal(model.bn1.weight, trained)
    assert {record.reason for record in report.left_alone} == {"its running statistics are not fresh"}
    init_batch_norms(model, trained="overwrite")
    assert torch.equal(model.bn1.weight, torch.full((6,), 0.1))


def test_refusal_names_every_layer_and_writes_nothing() -> None:
    model = residual_net()
    nn.init.constant_(model.bn1.weight, 0.3)
    nn.init.constant_(model.bn2.weight, 0.4)
    with pytest.raises(ValueError, match=r"(?s)bn1 \(BatchNorm2d\): its scale starts.*0.3 to 0.3.*bn2 \(BatchNorm2d\)"):
        init_batch_norms(model, trained="error")
    assert torch.equal(model.stem[1].weight, torch.ones(6))


def lazy_net() -> nn.Sequential:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyBatchNorm2d(affine=False))


@pytest.mark.parametrize("training", [True, False])
def test_a_lazy_layer_starts_from_the_scale_in_the_forward_pass_that_makes_it(training: bool) -> None:
    model = lazy_net().train(training)
    report = init_batch_norms(model)
    inputs = torch.randn(2, 3, 6, 6)
    outputs = model[:2](inputs)
    assert torch.equal(model[1].weight, torch.full((4,), 0.1))
    assert type(model[1]) is nn.BatchNorm2d
    assert not model[1]._forward_pre_hooks
    assert report.scales == [model[1].weight]  # the same object, so an optimizer made before holds it
    by_hand = copy.deepcopy(model[:2])
    assert training or torch.equal(by_hand(inputs), outputs)


def test_a_lazy_layer_made_by_a_checkpoint_keeps_what_the_checkpoint_holds() -> None:
    trained = lazy_net()
    trained(torch.randn(2, 3, 6, 6))
    nn.init.constant_(trained[1].weight, 0.7)
    model = lazy_net()
    init_batch_norms(model)
    model.load_state_dict(trained.state_dict())
    model(torch.randn(2, 3, 6, 6))
    assert torch.equal(model[1].weight, torch.full((4,), 0.7))


def test_of_two_calls_the_second_decides_on_a_lazy_layer() -> None:
    model = lazy_net()
    init_batch_norms(model, 0.1)
    waiting = len(model[1]._forward_pre_hooks)
    init_batch_norms(model, 0.2)
    assert len(model[1]._forward_pre_hooks) == waiting
    model(torch.randn(2, 3, 6, 6))
    assert torch.equal(model[1].weight, torch.full((4,), 0.2))
    assert not model[1]._forward_pre_hooks


def test_a_layer_on_the_meta_device_is_refused_by_name() -> None:
    with torch.device("meta"):
        model = residual_net()
    with pytest.raises(ValueError, match=r"bn1 \(BatchNorm2d\): on the meta device"):
        init_batch_norms(model)


def test_a_parametrised_scale_is_set_through_its_parametrisation() -> None:
    model = residual_net()
    register_parametrization(model.bn1, "weight", Softplus())
    report = init_batch_norms(model, 0.1)
    torch.testing.assert_close(model.bn1.weight, torch.full((6,), 0.1))
    assert report.scales[1] is model.bn1.parametrizations.weight.original
    assert len(init_batch_norms(model, 0.1).rewritten) == 3
    model(torch.randn(4, 3, 6, 6)).sum().backward()
    assert report.scales[1].grad is not None


def test_a_parametrisation_that_does_not_take_the_value_is_found_out() -> None:
    class Clamped(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.clamp(min=0.5)

        def right_inverse(self, y: torch.Tensor) -> torch.Tensor:
            return y

    model = residual_net()
    register_parametrization(model.bn1, "weight", Clamped())
    with pytest.raises(RuntimeError, match=r"the scale of 'bn1' did not take the value 0.1"):
        init_batch_norms(model, 0.1)


def test_tied_layers_are_written_once_and_stay_tied() -> None:
    layer, twin = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    twin.weight = layer.weight
    model = nn.ModuleDict({"first": layer, "again": layer, "twin": twin})
    report = init_batch_norms(model)
    assert model["twin"].weight is model["first"].weight
    assert torch.equal(twin.weight, torch.full((4,), 0.1))
    assert len(report.scales) == 1


def test_scales_kept_at_zero_stay_zero_and_are_left_out_of_the_update_rule() -> None:
    model = residual_net(zero_init_residual=True)
    report = init_batch_norms(model)
    assert torch.equal(model.bn2.weight, torch.zeros(6))
    assert [id(scale) for scale in report.scales] == [id(model.stem[1].weight), id(model.bn1.weight)]
    report = init_batch_norms(residual_net(zero_init_residual=True), zero_scale="overwrite")
    assert len(report.scales) == 3


def test_the_update_rule_covers_kept_and_frozen_scales_but_no_excluded_ones() -> None:
    model = residual_net()
    nn.init.constant_(model.stem[1].weight, 0.7)
    model.bn1.weight.requires_grad_(False)
    report = init_batch_norms(model, exclude=["bn2"])
    assert [id(scale) for scale in report.scales] == [id(model.stem[1].weight), id(model.bn1.weight)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_point_precision_is_written(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4)).to(dtype)
    init_batch_norms(model, 0.1)
    assert torch.equal(model[0].weight, torch.full((4,), 0.1, dtype=dtype))


def test_scales_can_be_written_inside_inference_mode_code() -> None:
    model = residual_net()
    with torch.no_grad():
        init_batch_norms(model)
    model(torch.randn(4, 3, 6, 6)).sum().backward()
    assert model.bn1.weight.grad is not None


def test_the_table_folds_equal_layers_and_names_the_reasons() -> None:
    model = torchvision.models.resnet50(zero_init_residual=True)
    model.bn1.weight.requires_grad_(False)
    header, rule, *rows, last_rule, summary = str(init_batch_norms(model)).splitlines()
    assert [cell.strip() for cell in header.split("|")] == ["Layers", "Type", "Channels", "Scale", "Why"]
    assert rule == last_rule == "-" * max(map(len, [header, *rows]))
    assert [[cell.strip() for cell in row.split("|")] for row in rows] == [
        ["bn1", "BatchNorm2d", "64", "kept", "its scale does not require a gradient"],
        ["layer1.0.bn1 ... layer4.2.bn2 (36)", "BatchNorm2d", "64-2048", "-> 0.1", "freshly initialised"],
        ["layer1.0.bn3 ... layer4.2.bn3 (16)", "BatchNorm2d", "256-2048", "kept", "its scale starts at 0 on purpose"],
    ]
    assert summary == "36 of 53 batch norm layers start from a new scale"


def test_the_table_of_one_state_is_one_row() -> None:
    lines = str(init_batch_norms(torchvision.models.resnet50())).splitlines()
    assert len(lines) == 5
    assert lines[2].startswith("bn1 ... layer4.2.bn3 (53) | BatchNorm2d | 64-2048  | -> 0.1")


def test_a_model_without_batch_norm_gives_an_empty_report() -> None:
    assert find_batch_norms(nn.Linear(2, 2)) == []
    assert str(init_batch_norms(nn.Linear(2, 2))).endswith("0 of 0 batch norm layers start from a new scale")


def test_the_report_in_plain_values_has_every_layer_and_the_counts() -> None:
    model = residual_net(zero_init_residual=True)
    report = json.loads(json.dumps(init_batch_norms(model).to_dict()))
    assert report["counts"] == {"rewrite": 2, "skip": 1, "refuse": 0}
    assert report["layers"][2] == {
        "name": "bn2",
        "class": "BatchNorm2d",
        "channels": 6,
        "verdict": "skip",
        "state": "zero",
        "reason": "its scale starts at 0 on purpose",
        "target": 0.1,
        "copy_of": None,
        "eps": 1e-5,
        "eps_before": None,
    }
    assert len(report["layers"]) == 3


def test_a_model_of_500_layers_fits_a_screen() -> None:
    model = nn.Sequential(*(nn.BatchNorm1d(1 + index % 7) for index in range(500)))
    report = init_batch_norms(model)
    assert len(str(report).splitlines()) == 5
    assert "0 ... 499 (500)" in str(report)
    assert len(report.records) == 500


def test_rich_draws_the_same_rows() -> None:
    report = init_batch_norms(residual_net(zero_init_residual=True))
    console = Console(file=io.StringIO(), width=150)
    console.print(report)
    drawn = console.file.getvalue()
    assert "stem.1 ... bn1 (2)" in drawn
    assert "its scale starts at 0 on purpose" in drawn
    assert "2 of 3 batch norm layers start from a new scale" in drawn
