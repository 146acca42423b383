"""Which frozen networks are copies of the network that is rewritten, and which are networks of their own."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import timm.utils
import torch
import torchvision
from helpers.models import BATCH_NORMS, ResidualNet, Softplus, images, residual_net, scales
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from torch.optim.swa_utils import AveragedModel

from lightning_revbn import find_batch_norms, init_batch_norms
from lightning_revbn.core.copies import networks_held_by
from lightning_revbn.core.layers import copies_in

NEW = torch.tensor(0.1)


class Pair(nn.Module):
    """A network, and a second one that is frozen."""

    def __init__(self, net: nn.Module, target: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.target = target.requires_grad_(False)


def pair(net: nn.Module | None = None) -> Pair:
    net = residual_net() if net is None else net
    return Pair(net, copy.deepcopy(net))


def is_written(network: nn.Module) -> bool:
    """Tell whether all scales are new; raise if only some are."""
    written = [bool((scale == NEW).all()) for scale in scales(network)]
    assert len(set(written)) == 1, written
    return written[0]


# --- copies -----------------------------------------------------------------------------------------------------------


def test_a_frozen_copy_starts_from_the_same_scales_and_says_of_which_layers_it_is_a_copy() -> None:
    model = pair()
    report = init_batch_norms(model)
    inputs, _ = images(8)
    assert is_written(model.net)
    assert is_written(model.target)
    assert torch.equal(model.net(inputs), model.target(inputs))
    copies = {record.name: record for record in report.records if record.state == "copy"}
    assert {name: record.copy_of for name, record in copies.items()} == {f"target.{n}": f"net.{n}" for n in BATCH_NORMS}
    assert all(record.verdict == "rewrite" and record.target == 0.1 for record in copies.values())
    assert copies["target.bn1"].reason == "copy of net.bn1"
    row = str(report).splitlines()[3]
    assert [cell.strip() for cell in row.split("|")] == [
        *("target.stem.1 ... target.bn2 (3)", "BatchNorm2d", "6", "-> 0.1", "copy of net.stem.1 ... net.bn2 (3)")
    ]


def test_a_second_call_finds_the_same_copies() -> None:
    model = pair()
    first, second = (init_batch_norms(model).to_dict() for _ in range(2))
    assert first == second


@pytest.mark.parametrize("training", [True, False])
def test_whether_the_copy_is_in_training_mode_does_not_matter(training: bool) -> None:
    model = pair()
    model.target.train(training)
    init_batch_norms(model)
    assert is_written(model.target)
    assert model.target.training is training


def test_copies_of_parts_are_found_wherever_they_are_kept() -> None:
    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = residual_net()
            self.projection = nn.Sequential(nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))
            self.prediction = nn.Sequential(nn.Linear(3, 7, bias=False), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))
            parts = copy.deepcopy([self.backbone, self.projection])
            self.teacher = nn.ModuleList(parts).requires_grad_(False)

    model = Student()
    report = init_batch_norms(model)
    assert is_written(model)
    assert {record.copy_of for record in report.records} == {None, "projection.1"} | {
        f"backbone.{name}" for name in BATCH_NORMS
    }


def test_of_two_networks_each_copy_names_its_own() -> None:
    model = nn.ModuleDict({"first": residual_net(1), "second": residual_net(2)})
    for name in ("second", "first"):
        model[f"{name}_target"] = copy.deepcopy(model[name]).requires_grad_(False)
    found = {record.name: record.copy_of for record in find_batch_norms(model) if record.copy_of}
    assert len(found) == 6
    assert all(original == name.replace("_target", "") for name, original in found.items())


def test_a_copy_of_a_network_that_got_another_head_since_is_written_as_a_whole() -> None:
    model = pair(torchvision.models.resnet18(num_classes=4))
    for head in (nn.Identity(), nn.Linear(512, 3), nn.Sequential(nn.Linear(512, 4), nn.ReLU())):
        changed = copy.deepcopy(model)
        changed.target.fc = head
        init_batch_norms(changed)
        assert is_written(changed.target)


def test_a_copy_whose_tensors_are_all_buffers_is_written() -> None:
    model = pair()
    for name in BATCH_NORMS:
        frozen = torchvision.ops.FrozenBatchNorm2d(6)
        frozen.load_state_dict(model.target.get_submodule(name).state_dict())
        model.target.set_submodule(name, frozen)
    init_batch_norms(model)
    assert all((model.target.get_submodule(name).weight == NEW).all() for name in BATCH_NORMS)


def test_a_copy_of_a_compiled_network_is_written() -> None:
    model = pair()
    model.net = torch.compile(model.net, backend="eager")
    report = init_batch_norms(model)
    assert is_written(model.target)
    assert [record.copy_of for record in report.records][3:] == [f"net.{name}" for name in BATCH_NORMS]


def test_a_parametrised_scale_is_written_in_the_copy_too() -> None:
    net = residual_net()
    register_parametrization(net.bn1, "weight", Softplus())
    model = pair(net)
    init_batch_norms(model)
    torch.testing.assert_close(model.target.bn1.weight, torch.full((6,), 0.1))
    assert torch.equal(model.target.bn1.weight, model.net.bn1.weight)


def test_an_average_whose_gradients_are_on_is_written_as_any_layer() -> None:
    net = residual_net()
    model = nn.ModuleDict({"net": net, "ema": AveragedModel(net)})
    assert {record.state for record in init_batch_norms(model).records} == {"fresh"}
    assert is_written(model)


def test_a_copy_follows_its_original_and_not_the_patterns_of_networks() -> None:
    model = pair()
    init_batch_norms(model, {"net.stem*": 0.5, "net.bn*": 0.25}, include=["net.*"], exclude=["net.bn2"])
    assert [record.values[0].item() for record in find_batch_norms(model)] == [0.5, 0.25, 1.0] * 2


def test_an_excluded_copy_is_left_alone() -> None:
    model = pair()
    report = init_batch_norms(model, exclude=["target.*"])
    assert is_written(model.net)
    assert not is_written(model.target)
    assert [record.state for record in report.records[3:]] == ["excluded"] * 3


def test_a_scale_at_zero_is_kept_or_overwritten_in_both() -> None:
    for policy, value in (("keep", 0.0), ("overwrite", 0.1)):
        model = pair(residual_net(zero_init_residual=True))
        init_batch_norms(model, zero_scale=policy)  # type: ignore[arg-type]
        assert model.net.bn2.weight[0].item() == model.target.bn2.weight[0].item() == pytest.approx(value)


# --- networks of their own --------------------------------------------------------------------------------------------


def pretrained() -> Pair:
    model = pair()
    model.target(images(8)[0])
    return model


def both_pretrained() -> Pair:
    net = residual_net()
    net(images(8)[0])
    return pair(net)


def one_weight_differs() -> Pair:
    model = pair()
    with torch.no_grad():
        model.target.conv2.weight[3, 2, 1, 1] += 1e-6
    return model


def one_shift_differs() -> Pair:
    model = pair()
    for name in BATCH_NORMS:
        nn.init.constant_(model.target.get_submodule(name).bias, 1e-6)
    return model


def shared_weights() -> Pair:
    model = pair()
    for name in ("stem.0", "conv1", "conv2", "head"):
        model.target.set_submodule(name, model.net.get_submodule(name))
    return Pair(model.net, model.target)


def constant_weights() -> Pair:
    model = pair()
    for name, parameter in model.named_parameters():
        if "bn" not in name and "stem.1" not in name:
            nn.init.constant_(parameter, 0.5)
    return model


def only_batch_norm_is_frozen() -> Pair:
    model = pair()
    model.target.requires_grad_(True)
    for scale in scales(model.target):
        scale.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    "make",
    [
        pretrained,
        both_pretrained,
        lambda: Pair(residual_net(0), residual_net(1)),
        one_weight_differs,
        one_shift_differs,
        shared_weights,
        constant_weights,
        only_batch_norm_is_frozen,
    ],
    ids=lambda make: make.__name__,
)
def test_a_frozen_network_that_is_no_copy_is_left_alone(make: Any) -> None:
    model = make()
    before = copy.deepcopy(model.target.state_dict())
    report = init_batch_norms(model)
    assert all(torch.equal(value, before[key]) for key, value in model.target.state_dict().items())
    assert {record.state for record in report.records if record.name.startswith("target")} == {"frozen"}


def test_a_network_of_which_one_weight_differs_is_left_alone_and_the_weight_is_named() -> None:
    report = init_batch_norms(one_weight_differs())
    assert {record.reason for record in report.left_alone} == {
        f"its scale does not require a gradient; no copy of net.{name}, since target.conv2.weight differs"
        for name in BATCH_NORMS
    }


def test_a_frozen_scale_in_a_network_without_a_twin_is_left_alone() -> None:
    model = residual_net()
    model.bn1.weight.requires_grad_(False)
    init_batch_norms(model)
    assert (model.bn1.weight == 1).all()


def test_a_kernel_that_is_fixed_in_every_network_proves_no_copy_and_hides_none() -> None:
    class Sharpened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, 3, 3, bias=False), nn.BatchNorm2d(3))
            nn.init.dirac_(self.first[0].weight.requires_grad_(False))
            self.second = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))

    model = nn.ModuleDict({"net": Sharpened(), "other": Sharpened().requires_grad_(False)})
    init_batch_norms(model)
    assert not is_written(model["other"])
    model["other"] = copy.deepcopy(model["net"]).requires_grad_(False)
    init_batch_norms(model)
    assert is_written(model["other"])


def test_networks_without_values_have_no_copies_yet() -> None:
    # Lazy layers have none either, but torch can neither copy nor freeze a lazy batch norm layer.
    states = [record.state for record in find_batch_norms(pair().to("meta"))]
    assert states == ["unmaterialized"] * 3 + ["frozen"] * 3


# --- networks held by another object ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [copy.deepcopy, AveragedModel, timm.utils.ModelEmaV2, timm.utils.ModelEmaV3])
def test_copies_in_another_network_are_found_whether_or_not_they_are_frozen(make: Any) -> None:
    model = residual_net()
    average = make(model)
    before = find_batch_norms(model)
    found = copies_in(average, model, before)
    assert [record.copy_of for record in found] == BATCH_NORMS
    assert {id(record.module) for record in found} <= {id(layer) for layer in average.modules()}


def test_copies_in_another_precision_or_of_a_part_are_found() -> None:
    model = pair().net
    whole = nn.ModuleDict({"network": model})
    records = find_batch_norms(whole)
    for average in (copy.deepcopy(model).bfloat16(), copy.deepcopy(model).double()):
        assert [record.copy_of for record in copies_in(average, whole, records)] == [
            f"network.{name}" for name in BATCH_NORMS
        ]
    (stem,) = copies_in(copy.deepcopy(model.stem), whole, records)
    assert (stem.name, stem.copy_of) == ("1", "network.stem.1")


def test_a_module_and_its_parts_are_no_copies_of_it() -> None:
    model = pair().net
    records = find_batch_norms(model)
    for network in (model, model.stem, nn.Sequential(model), residual_net(1), nn.Linear(2, 2)):
        assert copies_in(network, model, records) == []


def test_the_networks_of_an_object_are_found_in_its_attributes_containers_and_plain_objects() -> None:
    networks = [ResidualNet() for _ in range(5)]
    owner = SimpleNamespace(
        name="ema",
        average=networks[0],
        several=[networks[1], 3],
        by_name={"x": networks[2]},
        keeper=SimpleNamespace(ema=networks[3], decay=0.9),
        kind=ResidualNet,
        library=torch,
        pair=(networks[4],),
    )
    assert [id(network) for network in networks_held_by(owner)] == [id(networks[index]) for index in (0, 1, 2, 3, 4)]
