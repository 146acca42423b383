"""Several rules on one optimizer, each with numbers of its own, against parameter groups made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.by_hand import LR, MULTIPLIERS, C
from helpers.loop import STEPS, train
from helpers.models import ResidualNet, assert_same_parameters, residual_net, scales, shifts
from torch import nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as sched

from lightning_revbn import ScaleUpdateRule, scale_param_groups
from lightning_revbn.core.update_rule import active_rule, active_rules, scale_learning_rates, shift_learning_rates

OTHER_C = 10.0
DECAY = 0.01
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, LR, momentum=0.9, weight_decay=DECAY),
    "SGD-fused": lambda params: torch.optim.SGD(params, LR, momentum=0.9, weight_decay=DECAY, fused=True),
    "AdamW": lambda params: torch.optim.AdamW(params, LR, weight_decay=DECAY),
}
SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "constant": lambda optimizer: None,
    "lambda": lambda optimizer: sched.LambdaLR(optimizer, lambda step: 0.9**step),
    "onecycle": lambda optimizer: sched.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=STEPS + 1
    ),
}


def stem(model: ResidualNet) -> nn.BatchNorm2d:
    return model.stem[1]


def block(model: ResidualNet) -> list[nn.BatchNorm2d]:
    return [model.bn1, model.bn2]


def hand_made(model: ResidualNet, multiplier: float) -> list[dict[str, Any]]:
    """Return the groups of a careful user: the stem with lr / 100, the block with lr / 10 and shifts with lr * k."""
    slow = [layer.weight for layer in block(model)]
    fast = [layer.bias for layer in block(model)]
    own = {id(parameter) for parameter in [stem(model).weight, *slow, *fast]}
    return [
        {"params": [parameter for parameter in model.parameters() if id(parameter) not in own]},
        {"params": fast, "lr": LR * multiplier, "weight_decay": DECAY / multiplier},
        {"params": [stem(model).weight], "lr": LR / C, "weight_decay": 0.0},
        {"params": slow, "lr": LR / OTHER_C, "weight_decay": 0.0},
    ]


def stem_rule(optimizer: Optimizer, model: ResidualNet, **options: Any) -> ScaleUpdateRule:
    scale = stem(model).weight
    return ScaleUpdateRule(optimizer, [scale], C, [scale], shifts=[stem(model).bias], **options)


def block_rule(optimizer: Optimizer, model: ResidualNet, multiplier: float = 1.0) -> ScaleUpdateRule:
    own = [layer.weight for layer in block(model)]
    moved = [layer.bias for layer in block(model)]
    return ScaleUpdateRule(optimizer, own, OTHER_C, own, shifts=moved, shift_multiplier=multiplier)


def hooks_of(optimizer: Optimizer) -> int:
    return sum(len(value) for key, value in vars(optimizer).items() if key.endswith("_hooks"))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("multiplier", MULTIPLIERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_rules_equal_groups_made_by_hand_to_the_bit(
    optimizer: str, schedule: str, multiplier: float, split: bool
) -> None:
    hand, ruled = residual_net(), residual_net()
    made = OPTIMIZERS[optimizer](hand_made(hand, multiplier))
    train(hand, made, SCHEDULES[schedule](made), steps=10)

    held = list(ruled.parameters())
    made = OPTIMIZERS[optimizer]([{"params": held[:6]}, {"params": held[6:]}] if split else held)
    scheduler = SCHEDULES[schedule](made)
    with stem_rule(made, ruled), block_rule(made, ruled, multiplier):
        train(ruled, made, scheduler, steps=10)
    assert_same_parameters(hand, ruled)
    assert hooks_of(made) <= (2 if scheduler else 0)


def test_a_rule_that_is_removed_leaves_the_others_until_the_last() -> None:
    hand, ruled = residual_net(), residual_net()
    made = OPTIMIZERS["SGD"](hand_made(hand, 1.0))
    train(hand, made, steps=3)
    made.param_groups[2].update(lr=LR, weight_decay=DECAY)
    train(hand, made, steps=3)
    made.param_groups[3].update(lr=LR, weight_decay=DECAY)
    train(hand, made, steps=3)

    optimizer = OPTIMIZERS["SGD"](ruled.parameters())
    rules = first, second = stem_rule(optimizer, ruled), block_rule(optimizer, ruled)
    train(ruled, optimizer, steps=3)
    first.remove()
    assert active_rule(optimizer) is second
    train(ruled, optimizer, steps=3)
    first.remove()
    assert active_rules(optimizer) == [second]
    second.remove()
    assert (hooks_of(optimizer), active_rule(optimizer)) == (0, None)
    train(ruled, optimizer, steps=3)
    assert_same_parameters(hand, ruled)
    assert [rule.updates for rule in rules] == [3, 6]


def test_a_rule_that_is_made_later_acts_from_then_on_and_counts_its_own_updates() -> None:
    hand, ruled = residual_net(), residual_net()
    made = OPTIMIZERS["AdamW"](hand_made(hand, 1.0))
    made.param_groups[3].update(lr=LR, weight_decay=DECAY)
    train(hand, made, steps=3)
    made.param_groups[3].update(lr=LR / OTHER_C, weight_decay=0.0)
    train(hand, made, steps=4)

    optimizer = OPTIMIZERS["AdamW"](ruled.parameters())
    with stem_rule(optimizer, ruled) as first:
        train(ruled, optimizer, steps=3)
        with block_rule(optimizer, ruled) as second:
            train(ruled, optimizer, steps=4)
    assert_same_parameters(hand, ruled)
    assert (first.updates, second.updates) == (7, 4)


def test_learning_rates_are_told_rule_by_rule() -> None:
    model = residual_net()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    first, second = stem_rule(optimizer, model), block_rule(optimizer, model, multiplier=3.0)
    assert active_rules(optimizer) == [first, second]
    assert active_rule(optimizer) is first
    assert scale_learning_rates(optimizer, scales(model)) == [LR / C, LR / OTHER_C]
    assert shift_learning_rates(optimizer, shifts(model)) == [LR * 3]
    assert [(rule.covered, rule.covered_shifts) for rule in (first, second)] == [(1, 0), (2, 2)]
    assert [rule.learning_rates() for rule in (first, second)] == [[LR / C], [LR / OTHER_C]]


def test_a_parameter_decays_not_if_one_of_the_rules_exempts_it() -> None:
    hand, ruled = residual_net(), residual_net()
    own = {id(parameter) for parameter in [*scales(hand), hand.head.bias]}
    rest = [parameter for parameter in hand.parameters() if id(parameter) not in own]
    groups = [
        {"params": rest},
        {"params": [hand.head.bias], "weight_decay": 0.0},
        {"params": scales(hand), "lr": LR / C, "weight_decay": 0.0},
    ]
    train(hand, OPTIMIZERS["AdamW"](groups))

    optimizer = OPTIMIZERS["AdamW"](ruled.parameters())
    bias = ruled.head.bias
    with ScaleUpdateRule(optimizer, [], 1.0, [*scales(ruled), bias]), ScaleUpdateRule(optimizer, scales(ruled), C):
        train(ruled, optimizer)
    assert_same_parameters(hand, ruled)


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        (
            lambda model: {"scales": [stem(model).weight, model.bn2.weight], "divisor": OTHER_C},
            r"for 1 of these .*: 1 of shape \(6,\) \(a scale with lr / 100 there, a scale with lr / 10 here\)",
        ),
        (
            lambda model: {"scales": [], "shifts": [stem(model).bias], "shift_multiplier": 3.0},
            r"a shift with lr \* 1 there, a shift with lr \* 3 here",
        ),
        (
            lambda model: {"scales": [], "shifts": [stem(model).weight], "shift_multiplier": 3.0},
            r"a scale with lr / 100 there, a shift with lr \* 3 here",
        ),
    ],
)
def test_two_rules_for_one_parameter_are_refused_and_the_first_stays(
    claim: Callable[[ResidualNet], dict[str, Any]], said: str
) -> None:
    hand, ruled = residual_net(), residual_net()
    groups = hand_made(hand, 1.0)
    groups[0]["params"] += groups.pop(3)["params"]
    train(hand, OPTIMIZERS["SGD"](groups), steps=3)

    optimizer = OPTIMIZERS["SGD"](ruled.parameters())
    rule = stem_rule(optimizer, ruled)
    hooks = hooks_of(optimizer)
    with pytest.raises(ValueError, match=f"this SGD has a ScaleUpdateRule already .*{said}.*by include and exclude"):
        ScaleUpdateRule(optimizer, **claim(ruled))
    assert (active_rules(optimizer), hooks_of(optimizer)) == ([rule], hooks)
    train(ruled, optimizer, steps=3)
    assert_same_parameters(hand, ruled)


def test_a_second_rule_with_other_numbers_than_permanent_groups_is_refused_and_the_first_stays() -> None:
    model = residual_net()
    optimizer = torch.optim.SGD(scale_param_groups(model, LR, divisor=C), LR)
    with stem_rule(optimizer, model) as rule:
        with pytest.raises(ValueError, match="with a divisor of 100, but the rule has a divisor of 10"):
            block_rule(optimizer, model)
        assert active_rules(optimizer) == [rule]


def test_only_the_rule_whose_parameters_the_optimizer_does_not_hold_has_no_effect() -> None:
    model = residual_net()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    stem_rule(optimizer, model)
    block_rule(optimizer, residual_net())
    with pytest.warns(UserWarning, match=r"2 scales, divisor=10, .* has no effect") as told:
        train(model, optimizer, steps=2)
    assert len(told) == 1


@pytest.mark.parametrize("reads_first", [False, True])
def test_a_closure_may_make_and_end_rules(reads_first: bool) -> None:
    class Reading(torch.optim.SGD):
        """Reads its groups before the closure and holds on to them, as some optimizers do."""

        def step(self, closure: Any = None) -> Any:
            groups = self.param_groups if reads_first else None
            with torch.enable_grad():
                closure()
            for group in groups or self.param_groups:
                for parameter in group["params"]:
                    parameter.data.add_(parameter.grad, alpha=-group["lr"])

    model = residual_net()
    optimizer = Reading(model.parameters(), lr=LR)
    first = stem_rule(optimizer, model)
    rules: list[ScaleUpdateRule] = []

    def closure() -> None:
        optimizer.zero_grad()
        sum(parameter.square().sum() for parameter in model.parameters()).backward()
        rules.append(block_rule(optimizer, model))
        first.remove()

    optimizer.step(closure)
    assert active_rules(optimizer) == rules
    # Scales start at 1, and the gradient is 2.
    torch.testing.assert_close(model.bn1.weight, torch.full((6,), 1 - LR / OTHER_C * 2))
    torch.testing.assert_close(stem(model).weight, torch.full((6,), 1 - LR * 2))


def test_a_rule_may_be_removed_after_an_error_in_the_step_and_what_the_step_wrote_stays() -> None:
    class Failing(torch.optim.SGD):
        fails = True

        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["lr"] = 1.0
                if self.fails:
                    raise ZeroDivisionError
                group["lr"] = LR
            return super().step(closure)

    model = residual_net()
    optimizer = Failing(model.parameters(), lr=LR)
    first, second = stem_rule(optimizer, model), block_rule(optimizer, model)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    first.remove()
    assert [group["lr"] for group in optimizer.param_groups] == [1.0]  # as without a rule
    assert second.learning_rates() == [1.0 / OTHER_C]
    second.remove()
    assert hooks_of(optimizer) == 0
    Failing.fails = False
    train(model, optimizer, steps=1)


def test_a_state_may_be_loaded_into_an_optimizer_with_two_rules() -> None:
    whole, halves = residual_net(), residual_net()
    optimizer = OPTIMIZERS["AdamW"](whole.parameters())
    with stem_rule(optimizer, whole), block_rule(optimizer, whole):
        train(whole, optimizer, steps=4)
        train(whole, optimizer, steps=4)

    first = OPTIMIZERS["AdamW"](halves.parameters())
    with stem_rule(first, halves), block_rule(first, halves):
        train(halves, first, steps=4)
    second = OPTIMIZERS["AdamW"](halves.parameters())
    with block_rule(second, halves), stem_rule(second, halves):
        second.load_state_dict(first.state_dict())
        train(halves, second, steps=4)
    assert_same_parameters(whole, halves)
