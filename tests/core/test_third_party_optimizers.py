"""Optimizers of other libraries: the rule equals groups made by hand, to the bit, or says what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_optimizer
import timm.optim
import torch
from helpers.by_hand import LR, MULTIPLIERS, C, by_hand
from helpers.loop import train
from helpers.models import assert_same_parameters, images, residual_net, scales, shifts
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from lightning_revbn import ScaleUpdateRule, scale_param_groups
from lightning_revbn.core.param_groups import is_divided

NEED_CUDA = ("bnb", "fused")  # bitsandbytes and apex
SECOND_ORDER = {"adahessian"}  # needs backward(create_graph=True)
NAMES = [n for n in timm.optim.list_optimizers() if not n.startswith(NEED_CUDA) and n not in SECOND_ORDER]


@pytest.mark.filterwarnings("ignore::UserWarning")  # deprecations inside some of them
@pytest.mark.parametrize("multiplier", MULTIPLIERS)
@pytest.mark.parametrize("name", NAMES)
def test_the_rule_equals_groups_made_by_hand(name: str, multiplier: float) -> None:
    def trained(model: nn.Module, with_rule: bool) -> nn.Module:
        groups = list(model.parameters()) if with_rule else by_hand(model, LR, 0.01, multiplier=multiplier)
        optimizer = timm.optim.create_optimizer_v2(groups, opt=name, lr=LR, weight_decay=0.01)
        torch.manual_seed(0)  # kron draws random numbers
        if with_rule:
            own = {"shifts": shifts(model), "shift_multiplier": multiplier}
            with ScaleUpdateRule(optimizer, scales(model), C, scales(model), **own):
                train(model, optimizer, steps=6)
        else:
            train(model, optimizer, steps=6)
        return model

    assert_same_parameters(trained(residual_net(), False), trained(residual_net(), True))


def test_most_of_timms_optimizers_are_tried() -> None:
    assert len(NAMES) > 80


# --- optimizers around another one ------------------------------------------------------------------------------------


def inner(params: Any) -> Optimizer:
    return torch.optim.SGD(params, lr=LR, momentum=0.9, weight_decay=0.01)


Wrap = Callable[[Any], Any]
WRAPPERS: dict[str, tuple[Wrap, str]] = {  # from parameters, and the attribute that holds the optimizer inside
    "timm-Lookahead": (lambda params: timm.optim.Lookahead(inner(params), k=2), "_base_optimizer"),
    "pytorch_optimizer-Lookahead": (lambda params: pytorch_optimizer.Lookahead(inner(params), k=2), "optimizer"),
    "pytorch_optimizer-SAM": (
        lambda params: pytorch_optimizer.SAM(params, torch.optim.SGD, lr=LR, momentum=0.9, weight_decay=0.01),
        "base_optimizer",
    ),
}
each_wrapper = pytest.mark.parametrize(("wrap", "attribute"), WRAPPERS.values(), ids=WRAPPERS)


def train_twice_a_step(model: nn.Module, optimizer: Any) -> nn.Module:
    """Compute gradients before the step and in its closure, as sharpness-aware minimisation wants it."""
    inputs, targets = images(48)
    for x, y in zip(inputs.split(8), targets.split(8), strict=True):

        def compute(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        compute()
        optimizer.step(compute)
    return model


def in_order(model: nn.Module) -> list[dict[str, Any]]:
    """A group for each parameter: SAM sums the norm of the gradients in the order of the groups."""
    own = {id(scale) for scale in scales(model)}
    return [
        {"params": [p], "lr": LR / C, "weight_decay": 0.0} if id(p) in own else {"params": [p]}
        for p in model.parameters()
    ]


@each_wrapper
def test_an_optimizer_around_another_is_refused_by_name_with_the_remedy(wrap: Wrap, attribute: str) -> None:
    model = residual_net()
    optimizer = wrap(model.parameters())
    said = rf"{type(optimizer).__name__} wraps another optimizer \(its attribute '{attribute}'\).* scale_param_groups"
    with pytest.raises(ValueError, match=said):
        ScaleUpdateRule(optimizer, scales(model))


@each_wrapper
def test_the_rule_on_the_optimizer_inside_equals_groups_made_by_hand(wrap: Wrap, attribute: str) -> None:
    hand, ruled = residual_net(), residual_net()
    train_twice_a_step(hand, wrap(in_order(hand)))
    optimizer = wrap(ruled.parameters())
    with ScaleUpdateRule(getattr(optimizer, attribute), scales(ruled), C, scales(ruled)):
        train_twice_a_step(ruled, optimizer)
    assert_same_parameters(hand, ruled)


@each_wrapper
def test_a_wrapper_built_from_permanent_groups_needs_no_rule(wrap: Wrap, attribute: str) -> None:
    model = residual_net()
    own = scales(model)
    assert is_divided(wrap(scale_param_groups(model, LR, 0.01)), own, own)
    assert not is_divided(wrap(model.parameters()), own, own)
    assert not is_divided(wrap(by_hand(model, LR, 0.01)), own, own)  # whatever the reason for groups like these is
    assert not is_divided(wrap(residual_net().parameters()), own, own)  # holds none now, but may be given some later
    decaying = scale_param_groups(model, LR, 0.01, weight_decay_exempt=None)
    assert not is_divided(wrap(decaying), own, own)
    assert is_divided(wrap(decaying), own, [])
    some = scale_param_groups(model, LR, exclude=["bn1"])
    assert not is_divided(wrap(some), own, [])
