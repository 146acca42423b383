"""A whole training step in a CUDA graph: replays follow a schedule in a tensor, and the ratio lr / c holds in each.

On a CPU a record of kernels takes the place of the graph, for optimizers whose kernels read the learning rate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.by_hand import LR, by_hand
from helpers.devices import DEVICES, GPU, assert_close_parameters, captured
from helpers.models import images, residual_net, scales, shifts
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_revbn import ScaleUpdateRule

DIVISOR, MULTIPLIER = 64.0, 8.0  # powers of two, so that lr / c is one number whether float32 or float64 did it
DECAY = 0.01
REPLAYS = 4
Make = Callable[[Any, Any], Optimizer]


def fused_sgd(groups: Any, lr: Any) -> Optimizer:
    return torch.optim.SGD(groups, lr, momentum=0.9, weight_decay=DECAY, fused=True)


def fused(cls: Any) -> Make:
    """Return an Adam, capturable where that is asked for: torch has it on GPUs alone."""

    def make(groups: Any, lr: Any) -> Optimizer:
        first = groups[0]["params"][0] if isinstance(groups[0], dict) else groups[0]
        return cls(groups, lr, weight_decay=DECAY, fused=True, capturable=first.is_cuda)

    return make


def capturable(cls: Any, *, foreach: bool) -> Make:
    return lambda groups, lr: cls(groups, lr, weight_decay=DECAY, foreach=foreach, capturable=True)


FUSED: dict[str, Make] = {"SGD": fused_sgd, "Adam": fused(Adam), "AdamW": fused(AdamW)}
CAPTURABLE: dict[str, Make] = {
    "Adam": capturable(Adam, foreach=True),
    "Adam, for-loop": capturable(Adam, foreach=False),
    "AdamW": capturable(AdamW, foreach=True),
    "AdamW, for-loop": capturable(AdamW, foreach=False),
}


def schedule(optimizer: Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 0.5**step)


def stepping(model: nn.Module, optimizer: Optimizer, device: str) -> Callable[[], None]:
    """Return a training step on one batch that stays where it is."""
    inputs, targets = (values.to(device) for values in images(8))
    inputs = inputs.to(next(model.parameters()).dtype)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    return step


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def check_replays(make: Make, device: str, *, is_tensor: bool) -> None:
    """Replay a step with the rule under a schedule, against steps of hand-made groups that nobody has captured."""
    # In float64: Adam makes a whole step of a gradient that is only rounding, as that of a bias before batch norm.
    hand, ruled = (residual_net().double().to(device) for _ in range(2))

    def lr() -> Any:
        return torch.tensor(LR, device=device) if is_tensor else LR

    optimizer = make(list(ruled.parameters()), lr())
    plan = schedule(optimizer)
    rule = ScaleUpdateRule(
        optimizer, scales(ruled), DIVISOR, scales(ruled), shifts=shifts(ruled), shift_multiplier=MULTIPLIER
    )
    replay, steps = captured(stepping(ruled, optimizer, device), device)

    groups = by_hand(hand, lr(), DECAY, DIVISOR, MULTIPLIER)
    groups[0]["lr"] = lr()
    reference = make(groups, lr())
    reference_plan = schedule(reference)
    step = stepping(hand, reference, device)
    for _ in range(steps):
        step()
    assert_close_parameters(hand, ruled, device)
    for count in range(1, REPLAYS + 1):
        plan.step()
        replay()
        if is_tensor:  # a number is in the graph for good, for every optimizer and whoever makes the groups
            reference_plan.step()
        step()
        assert_close_parameters(hand, ruled, device)
        expected = LR * 0.5**count
        assert rule.learning_rates() == [pytest.approx(expected / DIVISOR)]
    rule.remove()


@pytest.mark.parametrize("is_tensor", [True, False])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FUSED)
def test_replays_follow_a_schedule_in_a_tensor_with_lr_over_c_in_each(name: str, device: str, is_tensor: bool) -> None:
    check_replays(FUSED[name], device, is_tensor=is_tensor)


@pytest.mark.parametrize("is_tensor", [True, False])
@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("name", CAPTURABLE)
def test_replays_of_capturable_optimizers_do_so_too(name: str, device: str, is_tensor: bool) -> None:
    check_replays(CAPTURABLE[name], device, is_tensor=is_tensor)


@pytest.mark.parametrize("device", [GPU])
def test_an_optimizer_that_is_not_capturable_is_refused_by_its_name(device: str) -> None:
    model = residual_net().to(device)
    optimizer = Adam(list(model.parameters()), LR)
    with ScaleUpdateRule(optimizer, scales(model)), pytest.raises(RuntimeError, match=r"Adam.*capturable is False"):
        captured(stepping(model, optimizer, device), device)
    torch.cuda.synchronize()
