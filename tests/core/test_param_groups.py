"""Permanent groups hold every parameter once, with its own learning rate and decay, and train as the rule does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.by_hand import LR, C
from helpers.loop import train
from helpers.models import assert_same_parameters, residual_net, scales
from torch import nn

from lightning_revbn import ScaleUpdateRule, scale_param_groups
from lightning_revbn.core.param_groups import exempt_parameters


@pytest.mark.parametrize("weight_decay_exempt", ["scale", "norm", "vectors", None])
def test_permanent_groups_hold_every_parameter_once_with_its_own_decay(weight_decay_exempt: Any) -> None:
    model = residual_net()
    groups = scale_param_groups(model, 0.1, weight_decay=0.01, weight_decay_exempt=weight_decay_exempt)
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(id(p) for p in model.parameters())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(p)]: (group["lr"], group["weight_decay"], group.get("scale_lr_divisor"))
        for group in groups
        for p in group["params"]
    }
    norm_scales, norm_shifts = {"stem.1.weight", "bn1.weight", "bn2.weight"}, {"stem.1.bias", "bn1.bias", "bn2.bias"}
    undecayed = {
        "scale": norm_scales,
        "norm": norm_scales | norm_shifts,
        "vectors": norm_scales | norm_shifts | {"stem.0.bias", "head.bias"},
        None: set[str](),
    }[weight_decay_exempt]
    assert found == {
        name: (
            0.1 / 100 if name in norm_scales else 0.1,
            0.0 if name in undecayed else 0.01,
            100.0 if name in norm_scales else None,
        )
        for name in names.values()
    }


def test_a_class_head_with_one_output_is_no_scale() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.LayerNorm(8), nn.Linear(8, 1))
    groups = scale_param_groups(model, 0.1)
    assert [[tuple(p.shape) for p in group["params"]] for group in groups if "scale_lr_divisor" in group] == [[(8,)]]


def test_permanent_groups_and_the_rule_train_alike() -> None:
    permanent, ruled = residual_net(), residual_net()
    train(permanent, torch.optim.SGD(scale_param_groups(permanent, LR, 0.01), momentum=0.9))
    optimizer = torch.optim.SGD(ruled.parameters(), lr=LR, momentum=0.9, weight_decay=0.01)
    with ScaleUpdateRule(optimizer, scales(ruled), C, scales(ruled)):
        train(ruled, optimizer)
    assert_same_parameters(permanent, ruled)


def test_the_rule_leaves_permanent_groups_as_they_are() -> None:
    once, twice = residual_net(), residual_net()
    train(once, torch.optim.SGD(scale_param_groups(once, LR)))
    optimizer = torch.optim.SGD(scale_param_groups(twice, LR))
    with ScaleUpdateRule(optimizer, scales(twice), C):
        train(twice, optimizer)
    assert_same_parameters(once, twice)


def test_scales_started_at_zero_keep_the_full_learning_rate_in_permanent_groups() -> None:
    model = residual_net(zero_init_residual=True)
    groups = scale_param_groups(model, 0.1)
    divided = {id(p) for group in groups if "scale_lr_divisor" in group for p in group["params"]}
    assert divided == {id(model.stem[1].weight), id(model.bn1.weight)}


def test_permanent_groups_take_a_tensor_learning_rate() -> None:
    groups = scale_param_groups(residual_net(), torch.tensor(0.5), divisor=50.0)
    assert groups[-1]["lr"].item() == pytest.approx(0.01)


def test_attention_and_recurrent_biases_count_as_vectors() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "lstm": nn.LSTM(3, 4), "norm": nn.LayerNorm(4)})
    exempt = {id(p) for p in exempt_parameters(model, [], "vectors")}
    assert {name for name, p in model.named_parameters() if id(p) in exempt} == {
        "attention.in_proj_bias",
        "attention.out_proj.bias",
        "lstm.bias_ih_l0",
        "lstm.bias_hh_l0",
        "norm.bias",
    }


def test_an_unknown_exemption_is_refused() -> None:
    with pytest.raises(ValueError, match="weight_decay_exempt='all' is unknown: use one of 'scale', 'norm'"):
        scale_param_groups(residual_net(), 0.1, weight_decay_exempt="all")  # type: ignore[arg-type]
