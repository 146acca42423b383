"""References for the rule: parameter groups made by hand, and SGD written out for each parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from helpers.models import scales, shifts

LR, C = 0.05, 100.0
MULTIPLIERS = (1.0, 10.0)


def by_hand(
    model: nn.Module,
    lr: float = LR,
    weight_decay: float | None = 0.01,
    divisor: float = C,
    multiplier: float = 1.0,
    exempt: bool = True,
) -> list[dict[str, Any]]:
    """Return the groups a careful user writes: scales with lr / c and no decay, shifts with lr * k and decay / k."""
    fast = shifts(model) if multiplier != 1 else []
    own = {id(parameter) for parameter in [*scales(model), *fast]}
    rest: dict[str, Any] = {"params": [p for p in model.parameters() if id(p) not in own], "lr": lr}
    multiplied: dict[str, Any] = {"params": fast, "lr": lr * multiplier}
    divided: dict[str, Any] = {"params": scales(model), "lr": lr / divisor}
    if weight_decay is not None:
        rest["weight_decay"], multiplied["weight_decay"] = weight_decay, weight_decay / multiplier
        divided["weight_decay"] = 0.0 if exempt else weight_decay
    return [rest, *[multiplied] * bool(fast), divided]


def sgd_by_hand(module: nn.Module) -> Optimizer:
    """Return the optimizer, made from groups by hand, that `helpers.lit.sgd` with the callback must equal."""
    return torch.optim.SGD(by_hand(module), LR, momentum=0.9)


class TextbookSGD(Optimizer):
    """Textbook SGD with momentum, except that scales learn with lr / c and no decay.

    It applies the rule per parameter, not per group. So it is the reference where groups made by hand lose the ratio.
    """

    def __init__(self, params: Any, own: list[nn.Parameter], lr: float = LR) -> None:
        super().__init__(params, {"lr": lr})
        self.own = {id(scale) for scale in own}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                is_scale = id(p) in self.own
                gradient = p.grad if is_scale else p.grad.add(p, alpha=0.01)
                state = self.state[p]
                first = "momentum_buffer" not in state
                state["momentum_buffer"] = (
                    gradient.clone() if first else state["momentum_buffer"].mul_(0.9).add_(gradient)
                )
                p.add_(state["momentum_buffer"], alpha=-(group["lr"] / C if is_scale else group["lr"]))
        return loss


def textbook_sgd(module: Any) -> Optimizer:
    """Configure a `LitNet` with its own learning rate."""
    return TextbookSGD([p for p in module.parameters() if p.requires_grad], scales(module), module.lr)
