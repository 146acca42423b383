from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm.layers
import torch
import torchvision
from helpers.models import BATCH_NORMS, images, residual_net
from torch import nn
from torch.nn.functional import batch_norm

from lightning_revbn import InputBatchNorm, find_batch_norms, init_batch_norms
from lightning_revbn.core.eps import choose_eps, set_eps, write_eps


def eps_of(model: nn.Module) -> list[float]:
    return [layer.eps for layer in model.modules() if hasattr(layer, "eps")]  # type: ignore[misc]


def trained(layer: nn.BatchNorm2d) -> nn.BatchNorm2d:
    layer(torch.randn(4, layer.num_features, 3, 3))
    return layer


# --- setting it -------------------------------------------------------------------------------------------------------


def test_fresh_layers_get_eps_and_nothing_else_changes() -> None:
    model = residual_net()
    model.bn1.eps = 1e-4
    before = copy.deepcopy(model.state_dict())
    report = set_eps(model, 1e-3)
    assert eps_of(model) == [1e-3] * 3
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert report.names == BATCH_NORMS
    assert [(layer.before, layer.after) for layer in report.layers] == [(1e-5, 1e-3), (1e-4, 1e-3), (1e-5, 1e-3)]


def test_the_forward_pass_uses_the_new_eps() -> None:
    model = nn.Sequential(nn.BatchNorm2d(6)).train()
    inputs = 0.01 * torch.randn(4, 6, 3, 3)
    set_eps(model, 1e-3)
    expected = batch_norm(inputs, None, None, training=True, eps=1e-3)
    torch.testing.assert_close(model(inputs), expected, rtol=1e-6, atol=1e-7)


def test_compiled_code_notices_a_new_eps() -> None:
    model = residual_net().eval()
    compiled = torch.compile(model, backend="eager")
    inputs, _ = images(4)
    before = compiled(inputs)
    set_eps(compiled, 1.0)
    assert torch.equal(compiled(inputs), model(inputs))
    assert (compiled(inputs) - before).abs().max() > 1e-3


def test_conversion_to_sync_batch_norm_keeps_eps() -> None:
    model = residual_net()
    set_eps(model, 1e-3)
    assert eps_of(nn.SyncBatchNorm.convert_sync_batchnorm(model)) == [1e-3] * 3


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: nn.BatchNorm1d(4), 1e-3),
        (lambda: nn.BatchNorm2d(4, affine=False), 1e-3),
        (lambda: nn.BatchNorm2d(4, track_running_stats=False), 1e-3),
        (lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False), 1e-3),
        (nn.LazyBatchNorm2d, 1e-3),
        (lambda: nn.LazyBatchNorm2d(affine=False), 1e-3),
        (lambda: timm.layers.BatchNormAct2d(4), 1e-3),
        (lambda: trained(nn.BatchNorm2d(4)), 1e-5),
        (lambda: trained(nn.BatchNorm2d(4, affine=False)), 1e-5),
        (lambda: nn.BatchNorm2d(4).requires_grad_(False), 1e-5),
        (lambda: nn.BatchNorm2d(4).to("meta"), 1e-5),
        (lambda: torchvision.ops.FrozenBatchNorm2d(4), 1e-5),
        (lambda: torch.ao.nn.quantized.BatchNorm2d(4), 1e-5),
        (lambda: InputBatchNorm(4), 1e-5),
        (lambda: nn.LayerNorm(4), 1e-5),
        (lambda: nn.InstanceNorm2d(4), 1e-5),
        (lambda: nn.GroupNorm(2, 4), 1e-5),
    ],
)
def test_only_fresh_layers_of_batch_norm_get_it(make: Callable[[], nn.Module], expected: float) -> None:
    model = nn.Sequential(make())
    set_eps(model, 1e-3)
    assert eps_of(model) == [expected]


def test_scales_that_start_at_values_of_their_own_do_not_make_a_layer_trained() -> None:
    model = residual_net(zero_init_residual=True)
    init_batch_norms(model, scale=0.25)
    assert set_eps(model, 1e-3).names == BATCH_NORMS


def test_a_layer_without_any_state_is_taken_for_trained_beside_a_trained_layer() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4, affine=False, track_running_stats=False), trained(nn.BatchNorm2d(4)))
    assert set_eps(model, 1e-3).names == []


def test_a_frozen_copy_of_a_network_gets_it_too() -> None:
    model = nn.ModuleDict({"net": residual_net()})
    model["target"] = copy.deepcopy(model["net"]).requires_grad_(False)
    set_eps(model, 1e-3)
    assert eps_of(model) == [1e-3] * 6


def test_layers_that_share_a_scale_all_get_it() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model[1].weight = model[0].weight
    set_eps(model, 1e-3)
    assert eps_of(model) == [1e-3] * 2


def test_patterns_select_layers() -> None:
    model = residual_net()
    set_eps(model, 1e-3, include=["bn*"], exclude=["bn2"])
    assert eps_of(model) == [1e-5, 1e-3, 1e-5]


def test_trained_layers_get_it_where_asked_for_and_are_refused_where_asked_for() -> None:
    model = residual_net()
    model(images(4)[0])
    with pytest.raises(ValueError, match=r"eps is not set: stem.1, bn1, bn2 are not freshly initialised"):
        set_eps(model, 1e-3, trained="error")
    assert eps_of(model) == [1e-5] * 3
    set_eps(model, 1e-3, trained="overwrite")
    assert eps_of(model) == [1e-3] * 3


def test_the_table_folds_equal_layers_and_tells_what_was_kept() -> None:
    model = residual_net()
    trained(model.bn2)
    header, _, *rows, _, summary = str(set_eps(model, 1e-3)).splitlines()
    assert [[cell.strip() for cell in row.split("|")] for row in [header, *rows]] == [
        ["Layers", "Type", "eps", "Why"],
        ["stem.1 ... bn1 (2)", "BatchNorm2d", "1e-05 -> 0.001", "freshly initialised"],
        ["bn2", "BatchNorm2d", "1e-05, kept", "its running statistics are not fresh"],
    ]
    assert summary == "eps is set in 2 of 3 batch norm layers"


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1, np.float32(1e-3), np.float64(1e-3), np.array(1e-3), "1e-3", 1e-3])
def test_every_form_of_a_number_is_taken_as_a_float(eps: Any) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4))
    set_eps(model, eps)
    assert type(model[0].eps) is float
    assert model[0].eps == float(eps)


@pytest.mark.parametrize("eps", [0, -1e-3, float("nan"), float("inf")])
@pytest.mark.parametrize("function", [set_eps, lambda model, eps: init_batch_norms(model, eps=eps)])
def test_a_number_that_is_not_finite_and_positive_is_refused(function: Any, eps: float) -> None:
    model = residual_net()
    with pytest.raises(ValueError, match=r"must be finite and positive: torch's default is 1e-5, TensorFlow's 1e-3"):
        function(model, eps)
    assert eps_of(model) == [1e-5] * 3
    assert (model.bn1.weight == 1).all()


@pytest.mark.parametrize("eps", [True, "small", [1e-3], None])
def test_what_is_no_number_is_refused(eps: Any) -> None:
    with pytest.raises(TypeError, match="number"):
        set_eps(residual_net(), eps)


# --- with the scales --------------------------------------------------------------------------------------------------


def test_init_batch_norms_sets_eps_and_its_table_shows_it() -> None:
    model = residual_net(zero_init_residual=True)
    trained(model.bn1)
    report = init_batch_norms(model, eps=1e-3)
    assert eps_of(model) == [1e-3, 1e-5, 1e-3]
    assert [(record.eps_before, record.eps) for record in report.records] == [(1e-5, 1e-3), (None, 1e-5), (1e-5, 1e-3)]
    header, _, *rows, _, summary = str(report).splitlines()
    assert [[cell.strip() for cell in row.split("|")][3:] for row in [header, *rows]] == [
        ["Scale", "eps", "Why"],
        ["-> 0.1", "1e-05 -> 0.001", "freshly initialised"],
        ["kept", "1e-05", "its running statistics are not fresh"],
        ["kept", "1e-05 -> 0.001", "its scale starts at 0 on purpose"],
    ]
    assert summary == "1 of 3 batch norm layers start from a new scale, eps is set in 2"
    assert [layer["eps"] for layer in report.to_dict()["layers"]] == [1e-3, 1e-5, 1e-3]


def test_without_eps_the_layers_keep_theirs_and_the_table_says_nothing() -> None:
    model = residual_net()
    model.bn1.eps = 1e-4
    report = init_batch_norms(model)
    assert eps_of(model) == [1e-5, 1e-4, 1e-5]
    assert "eps" not in str(report)


def test_a_refused_model_keeps_its_eps() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4).to("meta"))
    with pytest.raises(ValueError, match="meta"):
        init_batch_norms(model, eps=1e-3)
    assert eps_of(model) == [1e-5] * 2


# --- by name ----------------------------------------------------------------------------------------------------------


def test_what_was_written_by_name_can_be_taken_back() -> None:
    model = residual_net()
    model.bn1.eps = 1e-4
    chosen = choose_eps(model, find_batch_norms(model), 1e-3)
    assert chosen == dict.fromkeys(BATCH_NORMS, 1e-3)
    before = write_eps(model, chosen)
    assert eps_of(model) == [1e-3] * 3
    write_eps(model, before)
    assert eps_of(model) == [1e-5, 1e-4, 1e-5]


def test_a_name_that_the_model_does_not_have_is_refused_and_nothing_is_set() -> None:
    model = residual_net()
    with pytest.raises(ValueError, match=r"eps cannot be set in 'bn7': the model has no such batch norm layer"):
        write_eps(model, {"bn1": 1e-3, "bn7": 1e-3})
    assert eps_of(model) == [1e-5] * 3


def test_a_layer_that_does_not_keep_its_eps_is_told() -> None:
    class Fixed(nn.BatchNorm2d):
        @property
        def eps(self) -> float:
            return 1e-5

        @eps.setter
        def eps(self, value: float) -> None: ...

    with pytest.raises(RuntimeError, match=r"the eps of '0' did not take the value 0.001"):
        set_eps(nn.Sequential(Fixed(4)), 1e-3)
