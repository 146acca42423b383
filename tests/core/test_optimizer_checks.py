"""Optimizers that divided groups would mislead: each is refused by name and with a remedy, before an update."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.by_hand import LR, MULTIPLIERS, C, by_hand
from helpers.loop import train
from helpers.models import assert_same_parameters, residual_net, scales, shifts
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from lightning_revbn import ScaleUpdateRule, scale_param_groups


class Keeping(SGD):
    """Keeps what a function makes of a group's parameters in the group, as IVON and DoG do."""

    def __init__(self, params: Any, key: str, make: Any, lr: float = LR) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group[key] = make(group["params"])


def flat(params: list[Tensor]) -> Tensor:
    return torch.zeros(sum(parameter.numel() for parameter in params))


def each(params: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(parameter) for parameter in params]


def rule_on(optimizer: Optimizer, model: nn.Module, **options: Any) -> ScaleUpdateRule:
    return ScaleUpdateRule(optimizer, scales(model), C, scales(model), **options)


@pytest.mark.parametrize("make", [flat, each])
def test_values_of_all_parameters_in_a_group_cannot_be_divided(make: Any) -> None:
    model = residual_net()
    with pytest.raises(ValueError, match=r"group 0 of Keeping holds 'hess', values for its .*scale_param_groups"):
        rule_on(Keeping(model.parameters(), "hess", make), model)


@pytest.mark.parametrize("make", [flat, each])
def test_values_of_all_parameters_are_no_obstacle_where_no_group_is_divided(make: Any) -> None:
    ruled, hand = residual_net(), residual_net()
    optimizer = Keeping(by_hand(ruled, divisor=1.0, weight_decay=None), "hess", make)
    with ScaleUpdateRule(optimizer, scales(ruled), C):
        train(ruled, optimizer, steps=2)
    train(hand, Keeping(by_hand(hand, weight_decay=None), "hess", make), steps=2)
    assert_same_parameters(ruled, hand)
    other = residual_net()
    rule_on(Keeping(scale_param_groups(other, LR), "hess", make), other).remove()


def test_values_that_a_step_makes_are_found_after_it() -> None:
    class Late(SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group.setdefault("start", each(group["params"]))
            return super().step(closure)

    model = residual_net()
    optimizer = Late(model.parameters(), lr=LR)
    said = r"changed 'start' of parameter group 0 of Late to values for each of its parameters.*scale_param_groups"
    with rule_on(optimizer, model), pytest.raises(RuntimeError, match=said):
        train(model, optimizer, steps=1)
    assert "start" not in optimizer.param_groups[0]


def test_one_step_size_for_a_group_is_refused() -> None:
    model = residual_net()
    with pytest.raises(ValueError, match=r"group 0 of Keeping estimates its step size from all .*scale_param_groups"):
        rule_on(Keeping(model.parameters(), "reps_rel", lambda params: 1e-6), model)


def test_values_by_the_place_of_a_group_are_refused_although_the_first_steps_do_not_read_them() -> None:
    class Lookahead(SGD):
        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, lr)
            self.slow_weights = [each(group["params"]) for group in self.param_groups]

    model = residual_net()
    with pytest.raises(ValueError, match=r"Lookahead keeps values .* \(its attribute 'slow_weights'\).*scale_param"):
        rule_on(Lookahead(model.parameters(), LR), model)
    rule_on(Lookahead(by_hand(model, divisor=1.0), LR), model).remove()


def test_settings_by_place_as_bitsandbytes_has_them_are_refused() -> None:
    model = residual_net()
    optimizer: Any = SGD(model.parameters(), lr=LR)
    optimizer.mng = SimpleNamespace(index2config={})
    rule_on(optimizer, model).remove()
    optimizer.mng.index2config[0, 3] = {"optim_bits": 32}
    with pytest.raises(ValueError, match=r"SGD has settings .* call register_parameters before override_config"):
        rule_on(optimizer, model)


@pytest.mark.parametrize("multiplier", MULTIPLIERS)
def test_a_weight_decay_that_is_no_number_is_refused(multiplier: float) -> None:
    model = residual_net()
    optimizer = SGD(model.parameters(), lr=LR)
    optimizer.param_groups[0]["weight_decay"] = [0.1]
    exempt = scales(model) if multiplier == 1 else []
    with pytest.raises(ValueError, match=r"group 0 of SGD has weight_decay=\[0.1\]: .* takes a number"):
        ScaleUpdateRule(optimizer, scales(model), C, exempt, shifts=shifts(model), shift_multiplier=multiplier)


def test_a_group_without_a_learning_rate_is_refused_only_where_scales_are_in_it() -> None:
    class Free(Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"eps": 1e-8})

        def step(self, closure: Any = None) -> None: ...

    model = residual_net()
    with pytest.raises(ValueError, match=r"group 0 of Free has no learning rate: .* no 'lr' to divide"):
        rule_on(Free(model.parameters()), model)
    rule_on(Free(model.head.parameters()), model).remove()


@pytest.mark.parametrize("hold", [lambda inner: [inner], lambda inner: (inner,), lambda inner: {"adam": inner}])
def test_an_optimizer_in_a_container_is_found(hold: Any) -> None:
    model = residual_net()
    optimizer: Any = SGD(model.parameters(), lr=LR)
    optimizer.others = hold(Adam(model.parameters()))
    with pytest.raises(ValueError, match=r"SGD wraps another optimizer \(its attribute 'others'\)"):
        rule_on(optimizer, model)


@pytest.mark.parametrize("release", ["attribute", "default"])
def test_gradient_release_is_refused(release: str) -> None:
    model = residual_net()
    optimizer: Any = SGD(model.parameters(), lr=LR)
    if release == "attribute":  # flashoptim
        optimizer._gradient_release = True
    else:  # torch-optimi
        optimizer.defaults["gradient_release"] = True
    with pytest.raises(ValueError, match=r"SGD updates during the backward pass \(gradient release\), not in step"):
        rule_on(optimizer, model)


def test_an_update_by_gradient_hooks_that_nothing_announces_is_found_at_the_second_step() -> None:
    class InHooks(SGD):
        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, lr)
            for parameter in self.param_groups[0]["params"]:
                parameter.register_post_accumulate_grad_hook(self.update)

        @torch.no_grad()
        def update(self, parameter: Tensor) -> None:
            parameter.sub_(parameter.grad, alpha=LR)
            parameter.grad = None

        def step(self, closure: Any = None) -> None: ...

    model = residual_net()
    optimizer = InHooks(model.parameters(), LR)
    with rule_on(optimizer, model):
        train(model, optimizer, steps=1, closure=False)
        with pytest.raises(RuntimeError, match="did not update from its param_groups"):
            train(model, optimizer, steps=1, closure=False)


@pytest.mark.parametrize("multiplier", MULTIPLIERS)
def test_state_that_a_step_makes_for_each_parameter_in_a_group_is_joined(multiplier: float) -> None:
    class InGroup(SGD):
        """Momentum with its buffers in the group, as GrokAdamW has its state."""

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            with torch.enable_grad():
                closure()
            for group in self.param_groups:
                for parameter in group["params"]:
                    buffers = group.setdefault("buffers", {})
                    buffers[parameter] = buffers.get(parameter, 0.0) * 0.9 + parameter.grad
                    parameter.sub_(buffers[parameter], alpha=group["lr"])

    ruled, hand = residual_net(), residual_net()
    optimizer = InGroup(ruled.parameters(), LR)
    with ScaleUpdateRule(optimizer, scales(ruled), C, shifts=shifts(ruled), shift_multiplier=multiplier):
        train(ruled, optimizer, steps=3)
    train(hand, InGroup(by_hand(hand, weight_decay=None, multiplier=multiplier), LR), steps=3)
    assert_same_parameters(ruled, hand)
    assert len(optimizer.param_groups[0]["buffers"]) == len(list(ruled.parameters()))
