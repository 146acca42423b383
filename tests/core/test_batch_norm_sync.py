"""Synchronising layers without replacing them: what stays, what is undone, what torch's converter would lose."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from helpers.models import BATCH_NORMS, assert_same_parameters, images, residual_net
from helpers.scripts import run_script
from lightning.pytorch.plugins.layer_sync import _BatchNormXd
from timm.layers import BatchNormAct2d, SplitBatchNorm2d, SyncBatchNormAct
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_revbn import InputBatchNorm, find_batch_norms
from lightning_revbn.core.batch_norm_sync import damaged_by_conversion, restore_batch_norms, synchronize_batch_norms


class OtherDefaults(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3)


class AlwaysEvaluating(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> AlwaysEvaluating:
        return super().train(False)


def with_hook() -> nn.Module:
    layer = nn.BatchNorm2d(3)
    layer.register_forward_hook(lambda module, args, output: output * 2)
    return layer


def with_forward() -> nn.Module:
    layer = nn.BatchNorm2d(3)
    layer.forward = lambda input: input  # type: ignore[method-assign]
    return layer


def synchronized(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if "forward" in vars(layer)]


def test_nothing_but_the_forward_pass_is_touched_and_one_process_trains_as_before() -> None:
    model, reference = (nn.Sequential(BatchNormAct2d(3), with_hook(), residual_net()) for _ in range(2))
    classes, keys = [type(layer) for layer in model.modules()], list(model.state_dict())
    parameters = list(model.parameters())
    assert synchronize_batch_norms(model) is model
    assert synchronized(model) == ["0", "1", *(f"2.{name}" for name in BATCH_NORMS)]
    assert [type(layer) for layer in model.modules()] == classes
    assert list(model.state_dict()) == keys
    assert all(ours is before for ours, before in zip(model.parameters(), parameters, strict=True))
    outputs = [network(images(8)[0]) for network in (model, reference)]
    for output in outputs:
        output.sum().backward()
    assert torch.equal(*outputs)
    assert_same_parameters(model, reference)
    assert torch.equal(model[0].weight.grad, reference[0].weight.grad)


def test_undone_it_is_as_if_nothing_had_been() -> None:
    model = nn.Sequential(BatchNormAct2d(3), with_forward(), residual_net())
    before = {name: vars(layer).copy() for name, layer in model.named_modules()}
    synchronize_batch_norms(synchronize_batch_norms(model))  # a second time changes nothing
    assert restore_batch_norms(model) is model
    assert {name: vars(layer) for name, layer in model.named_modules()} == before


def test_layers_that_synchronise_by_themselves_are_left_alone() -> None:
    model = nn.Sequential(InputBatchNorm(3), nn.SyncBatchNorm(3), SyncBatchNormAct(3), nn.InstanceNorm2d(3))
    assert not synchronized(synchronize_batch_norms(model))


def test_excluded_layers_are_left_alone_and_patterns_that_match_nothing_are_refused() -> None:
    assert synchronized(synchronize_batch_norms(residual_net(), exclude="bn*")) == ["stem.1"]
    with pytest.raises(ValueError, match=r"exclude: the pattern 'bm1' matches none of the model's 3.*'bn1'"):
        synchronize_batch_norms(residual_net(), exclude=["bm1"])


def test_a_copy_is_synchronised_by_itself_and_a_pickle_holds_the_plain_layer() -> None:
    model = synchronize_batch_norms(residual_net())
    duplicate = copy.deepcopy(model)
    assert synchronized(duplicate) == BATCH_NORMS
    duplicate.eval()(images(4)[0])
    duplicate.train()(images(4)[0])
    assert duplicate.bn1.num_batches_tracked == 1
    assert model.bn1.num_batches_tracked == 0
    assert not synchronized(restore_batch_norms(duplicate))
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded(images(4)[0]), residual_net()(images(4)[0]))
    assert b"lightning_revbn" not in pickle.dumps(model)


def test_layers_are_found_and_judged_as_before() -> None:
    def verdicts(model: nn.Module) -> list[tuple[str, str, str]]:
        return [(record.name, record.state, record.verdict) for record in find_batch_norms(model)]

    model = nn.Sequential(residual_net(zero_init_residual=True), BatchNormAct2d(3), weight_norm(nn.BatchNorm1d(3)))
    before = verdicts(model)
    assert verdicts(synchronize_batch_norms(model)) == before


@pytest.mark.parametrize(
    ("make", "lost"),
    [
        (lambda: BatchNormAct2d(3), "forward of BatchNormAct2d, its child 'drop', its child 'act'"),
        (lambda: SplitBatchNorm2d(3), "forward of SplitBatchNorm2d, its child 'aux_bn'"),
        (lambda: AlwaysEvaluating(3), "train of AlwaysEvaluating"),
        (lambda: weight_norm(nn.BatchNorm2d(3)), "its parametrisation"),
        (with_hook, "its hooks"),
        (with_forward, "a forward of its own"),
    ],
)
def test_what_torchs_converter_would_lose_is_named(make: Callable[[], nn.Module], lost: str) -> None:
    assert damaged_by_conversion(nn.Sequential(nn.BatchNorm2d(3), make()))["1"] == lost


def test_layers_that_torch_converts_without_loss_are_not_named() -> None:
    layers = [nn.BatchNorm1d(3), nn.BatchNorm3d(3), nn.LazyBatchNorm2d(), OtherDefaults(3), _BatchNormXd(3)]
    assert damaged_by_conversion(nn.Sequential(*layers, nn.SyncBatchNorm(3), SyncBatchNormAct(3))) == {}
    assert damaged_by_conversion(synchronize_batch_norms(residual_net())) == {}


def test_torchs_converter_drops_the_activation_that_is_kept_here() -> None:
    model, values = nn.Sequential(BatchNormAct2d(3)).eval(), images(8)[0]
    expected: Tensor = model(values)
    assert torch.equal(synchronize_batch_norms(model)(values), expected)
    assert expected.min() == 0
    assert nn.SyncBatchNorm.convert_sync_batchnorm(model)(values).min() < 0


def test_timm_models_keep_their_outputs_and_torchs_converter_changes_them() -> None:
    done = run_script("benchmarks/sync_zoo.py", "--only", "_lite0")
    assert "timm:efficientnet_lite0\tsame\tdiffers, 33 activations lost\n" in done.stdout, done.stdout
