"""Optimizers that read their `param_groups` and update scales with another rate all the same: told at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.by_hand import LR, C
from helpers.loop import train
from helpers.models import residual_net, scales
from torch.optim import Optimizer

from lightning_revbn import ScaleUpdateRule


class Plain(Optimizer):
    """What the optimizers have in common."""

    def __init__(self, params: Any, lr: float = LR) -> None:
        super().__init__(params, {"lr": lr, "count": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss

    def update(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.grad


class KeepsParameters(Plain):
    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self._params = self.param_groups[0]["params"]

    def update(self) -> None:
        for parameter in self._params:
            parameter -= self.param_groups[0]["lr"] * parameter.grad


class KeepsGroups(Plain):
    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.flat = [(parameter, group) for group in self.param_groups for parameter in group["params"]]

    def update(self) -> None:
        for parameter, group in self.flat:
            parameter -= group["lr"] * parameter.grad
        self.param_groups[0]["count"] += 1


class TakesOneRate(Plain):
    def update(self) -> None:
        held = [parameter for group in self.param_groups for parameter in group["params"]]
        torch._foreach_add_(held, [parameter.grad for parameter in held], alpha=-self.param_groups[0]["lr"])


class TakesTheDefault(Plain):
    def update(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= self.defaults["lr"] * parameter.grad


class CopiesGroups(Plain):
    def update(self) -> None:
        for group in [{**group} for group in self.param_groups]:
            self.of_group(**group)

    def of_group(self, params: Any, lr: float, **others: Any) -> None:
        for parameter in params:
            parameter -= lr * parameter.grad


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (KeepsParameters, "KeepsParameters.step.. takes one learning rate .* scale_param_groups does not help"),
        (KeepsGroups, "KeepsGroups.step.. updates parameters that it has kept .* use scale_param_groups"),
        (TakesOneRate, "TakesOneRate.step.. takes one learning rate .* scale_param_groups does not help"),
        (TakesTheDefault, "TakesTheDefault.step.. takes one learning rate .* scale_param_groups does not help"),
    ],
)
def test_an_update_that_reads_no_rate_of_scales_is_refused_at_once(make: Callable[[Any], Optimizer], said: str) -> None:
    model = residual_net()
    optimizer = make(model.parameters())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with ScaleUpdateRule(optimizer, scales(model), C, scales(model)), pytest.raises(RuntimeError, match=said):
        train(model, optimizer, steps=1)
    assert all(map(torch.equal, model.parameters(), before))
    assert optimizer.param_groups[0]["count"] == 0
    assert not optimizer.state


@pytest.mark.parametrize("make", [Plain, CopiesGroups, lambda params: torch.optim.SGD(params, LR)])
def test_an_update_that_reads_every_group_in_its_own_way_learns_as_it_is_to(make: Callable[[Any], Optimizer]) -> None:
    model = residual_net()
    before = [scale.detach().clone() for scale in scales(model)]
    optimizer = make(model.parameters())
    with ScaleUpdateRule(optimizer, scales(model), C, scales(model)):
        train(model, optimizer, steps=1)
    for scale, old in zip(scales(model), before, strict=True):
        assert torch.allclose(old - scale, LR / C * scale.grad, atol=1e-6)
    assert all(type(key) is str for group in optimizer.param_groups for key in group)


def test_rprop_goes_on_with_the_rates_in_its_state() -> None:
    model = residual_net()
    optimizer = torch.optim.Rprop(model.parameters(), lr=LR)
    with ScaleUpdateRule(optimizer, scales(model), C):
        train(model, optimizer, steps=1)
    with ScaleUpdateRule(optimizer, scales(model), C) as rule:
        train(model, optimizer, steps=2)
    assert rule.updates == 2


def test_a_step_without_gradients_is_no_update_and_the_next_is_looked_at() -> None:
    model = residual_net()

    class Waits(TakesOneRate):
        waits = True

        def update(self) -> None:
            if self.waits:
                self.waits = bool(self.param_groups[0]["count"])
                return
            super().update()

    optimizer = Waits(model.parameters())
    with ScaleUpdateRule(optimizer, scales(model), C):
        train(model, optimizer, steps=1)
        with pytest.raises(RuntimeError, match="takes one learning rate"):
            train(model, optimizer, steps=1)
