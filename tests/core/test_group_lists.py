"""Optimizers that pair lists with parameter groups by position: as AdaBound does, they are refused before an update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.by_hand import LR, C, by_hand
from helpers.loop import train
from helpers.models import assert_same_parameters, residual_net, scales
from torch import nn

from lightning_revbn import ScaleUpdateRule, scale_param_groups
from lightning_revbn.core.group_lists import lists_by_group


class Pairing(torch.optim.SGD):
    """Scales its step by what it keeps for each group, as `adabound.AdaBound` does with `base_lrs`."""

    def __init__(self, params: Any, lr: float = LR, **options: Any) -> None:
        super().__init__(params, lr=lr, **options)
        self.base_lrs = [group["lr"] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        with torch.enable_grad():
            closure()
        for group, base_lr in zip(self.param_groups, self.base_lrs, strict=False):
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=group["lr"] * group["lr"] / base_lr)


def in_one_group(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters())}]


def in_two_groups(model: Any) -> list[dict[str, Any]]:
    head = list(model.head.parameters())
    others = [p for p in model.parameters() if all(p is not own for own in head)]
    return [{"params": others}, {"params": head, "lr": LR / 2}]


@pytest.mark.parametrize("groups", [in_one_group, in_two_groups])
def test_it_is_refused_by_name_and_nothing_was_updated(groups: Callable[[nn.Module], Any]) -> None:
    model = residual_net()
    optimizer = Pairing(groups(model))
    count = len(optimizer.param_groups)
    said = rf"Pairing.step\(\) pairs its 'base_lrs', which has an entry for each of its {count} .*scale_param_groups"
    with ScaleUpdateRule(optimizer, scales(model), C), pytest.raises(RuntimeError, match=said):
        train(model, optimizer, steps=1)
    assert_same_values(model, residual_net())


def test_the_remedy_trains_as_groups_made_by_hand() -> None:
    model, other = residual_net(), residual_net()
    train(model, Pairing(scale_param_groups(model, LR)), steps=5)
    train(other, Pairing(by_hand(other)), steps=5)
    assert_same_parameters(model, other)


def test_where_scales_have_a_group_of_their_own_the_rule_works() -> None:
    def apart(model: nn.Module, divisor: float) -> list[dict[str, Any]]:
        rest, own = by_hand(model, divisor=divisor, weight_decay=None)
        return [rest, own]

    model, other = residual_net(), residual_net()
    optimizer = Pairing(apart(model, 1.0))
    with ScaleUpdateRule(optimizer, scales(model), C):
        train(model, optimizer, steps=1)
    by_hand_with_the_same_list = Pairing(apart(other, C))
    by_hand_with_the_same_list.base_lrs = [LR, LR]
    train(other, by_hand_with_the_same_list, steps=1)
    assert_same_parameters(model, other)


@pytest.mark.parametrize(
    "value",
    [(0.9, 0.999), [1, 2], ["a", "b"], torch.tensor([0.5, 0.25]), None, {"a": 1, "b": 2}],
    ids=["betas", "counts", "texts", "tensor", "nothing", "dict"],
)
def test_what_only_has_as_many_entries_as_there_are_groups_is_no_alarm(value: Any) -> None:
    model, other = residual_net(), residual_net()
    optimizer = torch.optim.SGD(in_two_groups(model), lr=LR)
    optimizer.own = value
    assert lists_by_group(optimizer) == []
    with ScaleUpdateRule(optimizer, scales(model), C):
        train(model, optimizer, steps=2)
    ruled = torch.optim.SGD(in_two_groups(other), lr=LR)
    with ScaleUpdateRule(ruled, scales(other), C):
        train(other, ruled, steps=2)
    assert_same_parameters(model, other)


def test_a_list_that_no_step_reads_is_no_alarm() -> None:
    model, other = residual_net(), residual_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    optimizer.first_lrs = [LR]
    assert lists_by_group(optimizer) == ["first_lrs"]
    with ScaleUpdateRule(optimizer, scales(model), C):
        train(model, optimizer, steps=2)
    assert optimizer.first_lrs == [LR]
    train(other, torch.optim.SGD(by_hand(other, weight_decay=None), LR), steps=2)
    assert_same_parameters(model, other)


def assert_same_values(first: nn.Module, second: nn.Module) -> None:
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
