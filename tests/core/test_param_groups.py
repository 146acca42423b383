"""Permanent groups: what is in which, that the rule leaves them as they are, and that their marks are kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.by_hand import LR, C, by_hand
from helpers.loop import train
from helpers.models import assert_same_parameters, residual_net, scales, shifts
from torch import nn

from lightning_revbn import ScaleUpdateRule, init_batch_norms, scale_param_groups
from lightning_revbn.core.param_groups import (
    GROUP_MARK,
    MARKS,
    SHIFT_MARK,
    exempt_parameters,
    is_divided,
    keep_marks,
)

K = 10.0


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
    exempt = {id(p) for p in exempt_parameters(model, "vectors")}
    assert {name for name, p in model.named_parameters() if id(p) in exempt} == {
        "attention.in_proj_bias",
        "attention.out_proj.bias",
        "lstm.bias_ih_l0",
        "lstm.bias_hh_l0",
        "norm.bias",
    }


def test_an_unknown_exemption_is_refused() -> None:
    with pytest.raises(ValueError, match="weight_decay_exempt='all' is unknown: choose from 'scale', 'norm'"):
        scale_param_groups(residual_net(), 0.1, weight_decay_exempt="all")  # type: ignore[arg-type]


# --- shifts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay_exempt", ["scale", "norm", "vectors", None])
def test_shifts_get_a_multiplied_rate_and_a_divided_decay(weight_decay_exempt: Any) -> None:
    model = residual_net(zero_init_residual=True)
    groups = scale_param_groups(
        model, 0.1, 0.01, weight_decay_exempt=weight_decay_exempt, exclude=["bn1"], shift_multiplier=K
    )
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(id(p) for p in model.parameters())
    (own,) = [group for group in groups if SHIFT_MARK in group]
    assert {id(p) for p in own["params"]} == {id(model.stem[1].bias), id(model.bn2.bias)}  # of the scale at zero, too
    decay = 0.0 if weight_decay_exempt in ("norm", "vectors") else 0.01 / K
    assert {key: own[key] for key in own if key != "params"} == {"lr": 0.1 * K, "weight_decay": decay, SHIFT_MARK: K}
    (divided,) = [group for group in groups if GROUP_MARK in group]
    assert [id(p) for p in divided["params"]] == [id(model.stem[1].weight)]


def test_permanent_groups_of_fast_shifts_and_the_rule_train_alike() -> None:
    permanent, ruled = residual_net(), residual_net()
    groups = scale_param_groups(permanent, LR, 0.01, shift_multiplier=K)
    train(permanent, torch.optim.SGD(groups, momentum=0.9))
    optimizer = torch.optim.SGD(ruled.parameters(), lr=LR, momentum=0.9, weight_decay=0.01)
    with ScaleUpdateRule(optimizer, scales(ruled), C, scales(ruled), shifts=shifts(ruled), shift_multiplier=K):
        train(ruled, optimizer)
    assert_same_parameters(permanent, ruled)


def test_the_rule_leaves_permanent_groups_of_shifts_as_they_are() -> None:
    once, twice = residual_net(), residual_net()
    train(once, torch.optim.SGD(scale_param_groups(once, LR, 0.01, shift_multiplier=K)))
    optimizer = torch.optim.SGD(scale_param_groups(twice, LR, 0.01, shift_multiplier=K))
    with ScaleUpdateRule(optimizer, scales(twice), C, scales(twice), shifts=shifts(twice), shift_multiplier=K):
        train(twice, optimizer)
    assert_same_parameters(once, twice)


def test_the_rule_multiplies_the_shifts_that_permanent_groups_of_scales_leave_alone() -> None:
    hand, ruled = residual_net(), residual_net()
    train(hand, torch.optim.SGD(scale_param_groups(hand, LR, 0.01, shift_multiplier=K)))
    optimizer = torch.optim.SGD(scale_param_groups(ruled, LR, 0.01))
    with ScaleUpdateRule(optimizer, scales(ruled), C, scales(ruled), shifts=shifts(ruled), shift_multiplier=K):
        train(ruled, optimizer)
    assert_same_parameters(hand, ruled)


def test_groups_are_divided_only_if_the_shifts_are_in_groups_of_their_own_too() -> None:
    model = residual_net()
    fast = torch.optim.SGD(scale_param_groups(model, LR, shift_multiplier=K))
    slow = torch.optim.SGD(scale_param_groups(model, LR))
    only_shifts = torch.optim.SGD(scale_param_groups(model, LR, divisor=1, shift_multiplier=K))
    assert is_divided(fast, scales(model), [], shifts(model))
    assert not is_divided(slow, scales(model), [], shifts(model))
    assert is_divided(slow, scales(model), [])
    assert is_divided(only_shifts, [], [], shifts(model))
    assert not is_divided(only_shifts, scales(model), [], shifts(model))


# --- what takes no weight decay ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay_exempt", ["scale", "norm", "vectors", None])
def test_the_choices_of_exemption_are_there_for_the_rule_as_for_permanent_groups(weight_decay_exempt: Any) -> None:
    permanent, ruled = residual_net(), residual_net()
    init_batch_norms(permanent), init_batch_norms(ruled)
    train(permanent, torch.optim.SGD(scale_param_groups(permanent, LR, 0.1, C, weight_decay_exempt)))
    optimizer = torch.optim.SGD(ruled.parameters(), lr=LR, weight_decay=0.1)
    exempt = exempt_parameters(ruled, weight_decay_exempt)
    with ScaleUpdateRule(optimizer, scales(ruled), C, weight_decay_exempt=exempt):
        train(ruled, optimizer)
    assert_same_parameters(permanent, ruled)


def test_exemption_follows_patterns() -> None:
    model = residual_net()
    exempt = exempt_parameters(model, "norm", include=["bn*"], exclude=["bn1"])
    assert [id(p) for p in exempt] == [id(model.bn2.weight), id(model.bn2.bias)]
    with pytest.raises(ValueError, match="'backbone' matches none"):
        exempt_parameters(model, "norm", include=["backbone"])


# --- marks ------------------------------------------------------------------------------------------------------------


def hand_made_state(**options: Any) -> dict[str, Any]:
    """The state of an optimizer with groups of the same parameters as `scale_param_groups` gives, without marks."""
    return torch.optim.SGD(by_hand(residual_net(), LR, 0.0, multiplier=K), **options).state_dict()


@pytest.mark.parametrize("with_rule", [True, False], ids=["rule", "keep_marks"])
def test_a_checkpoint_of_hand_made_groups_leaves_the_marks(with_rule: bool) -> None:
    model = residual_net()
    optimizer = torch.optim.SGD(scale_param_groups(model, LR, shift_multiplier=K))
    own = {"shifts": shifts(model), "shift_multiplier": K}
    handle = ScaleUpdateRule(optimizer, scales(model), C, **own) if with_rule else keep_marks(optimizer)
    for _ in range(2):
        optimizer.load_state_dict(hand_made_state())
        assert [(group.get(GROUP_MARK), group.get(SHIFT_MARK)) for group in optimizer.param_groups] == [
            (None, None),
            (None, K),
            (C, None),
        ]
    if with_rule:
        model.bn1.weight.grad = torch.ones(6)
        optimizer.step()
        torch.testing.assert_close(1 - model.bn1.weight, torch.full((6,), LR / C), rtol=1e-3, atol=0)
    handle.remove()
    optimizer.load_state_dict(hand_made_state())
    assert not any(GROUP_MARK in group for group in optimizer.param_groups)
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks


def test_a_mark_that_a_checkpoint_brings_counts_more_than_the_own() -> None:
    model = residual_net()
    optimizer = torch.optim.SGD(scale_param_groups(model, LR))
    keep_marks(optimizer)
    optimizer.load_state_dict(torch.optim.SGD(scale_param_groups(residual_net(), LR, divisor=10.0)).state_dict())
    assert [group.get(GROUP_MARK) for group in optimizer.param_groups] == [None, 10.0]


CONFLICTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "divisor": ({"divisor": 10.0}, {}, r"with a divisor of 10, but the rule has a divisor of 100: give both the same"),
    "divisor off": ({}, {"divisor": 1}, r"with a divisor of 100, but the rule has a divisor of 1:"),
    "multiplier": (
        {"shift_multiplier": 3.0},
        {"shift_multiplier": K},
        r"with a shift multiplier of 3, but the rule has a shift multiplier of 10:",
    ),
    "multiplier off": (
        {"shift_multiplier": 3.0},
        {},
        r"with a shift multiplier of 3, but the rule has a shift mul.* 1:",
    ),
}
each_conflict = pytest.mark.parametrize(("made", "ruled", "said"), CONFLICTS.values(), ids=CONFLICTS)


@each_conflict
def test_groups_made_with_another_number_are_refused(made: dict[str, Any], ruled: dict[str, Any], said: str) -> None:
    model = residual_net()
    optimizer = torch.optim.SGD(scale_param_groups(model, LR, **made))
    with pytest.raises(ValueError, match=rf"parameter group \d of SGD was made by scale_param_groups {said}"):
        ScaleUpdateRule(optimizer, scales(model), **{"divisor": C, "shifts": shifts(model), **ruled})
    assert not optimizer._optimizer_step_pre_hooks


@each_conflict
def test_a_checkpoint_of_groups_made_with_another_number_is_refused(
    made: dict[str, Any], ruled: dict[str, Any], said: str
) -> None:
    model = residual_net()
    groups = scale_param_groups(model, LR, **made)
    saved = copy.deepcopy(torch.optim.SGD(groups).state_dict())
    unmarked = [{key: value for key, value in group.items() if key not in MARKS} for group in groups]
    optimizer = torch.optim.SGD(unmarked)
    ScaleUpdateRule(optimizer, scales(model), **{"divisor": C, "shifts": shifts(model), **ruled})
    with pytest.raises(ValueError, match=said):
        optimizer.load_state_dict(saved)


def test_groups_of_other_layers_may_have_another_divisor() -> None:
    model = residual_net()
    optimizer = torch.optim.SGD(scale_param_groups(model, LR, divisor=10.0, include=["bn1"]))
    with ScaleUpdateRule(optimizer, [model.bn2.weight], C) as rule:
        assert rule.learning_rates() == [LR / C]
