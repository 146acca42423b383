"""The rule against hand-made groups, for every kernel that torch's optimizers have on a device."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from helpers.by_hand import LR, by_hand
from helpers.devices import DEVICES, GPU, assert_close_parameters
from helpers.loop import train
from helpers.models import images, residual_net, scales, shifts
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from lightning_revbn import ScaleUpdateRule

DIVISOR, MULTIPLIER = 64.0, 8.0  # powers of two, so that lr / c is one number whether float32 or float64 did it
DECAY = 0.01
OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda *args, **options: torch.optim.SGD(*args, momentum=0.9, weight_decay=DECAY, **options),
    "Adam": lambda *args, **options: torch.optim.Adam(*args, weight_decay=DECAY, **options),
    "AdamW": lambda *args, **options: torch.optim.AdamW(*args, weight_decay=DECAY, **options),
}
KERNELS: dict[str, dict[str, bool]] = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
CAPTURABLE: dict[str, dict[str, bool]] = {
    "for-loop": {"foreach": False, "capturable": True},
    "foreach": {"foreach": True, "capturable": True},
    "fused": {"fused": True, "capturable": True},
}


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def lr_of(device: str, *, is_tensor: bool) -> Any:
    return torch.tensor(LR, device=device) if is_tensor else LR


def hand_made(module: nn.Module, lr: Any) -> list[dict[str, Any]]:
    """Return groups by hand, each with a tensor of its own where the learning rate is one."""
    groups = by_hand(module, lr, DECAY, DIVISOR, MULTIPLIER)
    return [{**group, "lr": group["lr"].clone()} if isinstance(lr, torch.Tensor) else group for group in groups]


def rule_on(optimizer: Optimizer, module: nn.Module) -> ScaleUpdateRule:
    return ScaleUpdateRule(
        optimizer, scales(module), DIVISOR, scales(module), shifts=shifts(module), shift_multiplier=MULTIPLIER
    )


def check(name: str, options: dict[str, bool], device: str, *, is_tensor: bool) -> None:
    # In float64: Adam makes a whole step of a gradient that is only rounding, as that of a bias before batch norm.
    hand, ruled = (residual_net().double().to(device) for _ in range(2))
    make = OPTIMIZERS[name]
    reference = make(hand_made(hand, lr_of(device, is_tensor=is_tensor)), lr_of(device, is_tensor=is_tensor), **options)
    train(hand, reference, steps=5, closure=False)
    optimizer = make(ruled.parameters(), lr_of(device, is_tensor=is_tensor), **options)
    with rule_on(optimizer, ruled) as rule:
        train(ruled, optimizer, steps=5, closure=False)
        assert rule.updates == 5
    assert_close_parameters(hand, ruled, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "kernel", "is_tensor"),
    [
        case
        for case in product(OPTIMIZERS, KERNELS, (False, True))
        # torch takes a tensor for foreach with capturable=True alone
        if case not in (("Adam", "foreach", True), ("AdamW", "foreach", True))
    ],
)
def test_the_rule_equals_hand_made_groups_with_every_kernel(
    name: str, kernel: str, is_tensor: bool, device: str
) -> None:
    check(name, KERNELS[kernel], device, is_tensor=is_tensor)


@pytest.mark.parametrize("is_tensor", [False, True])
@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("kernel", CAPTURABLE)
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_the_rule_equals_hand_made_groups_with_every_capturable_kernel(
    name: str, kernel: str, device: str, is_tensor: bool
) -> None:
    check(name, CAPTURABLE[kernel], device, is_tensor=is_tensor)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_that_a_scaler_has_unscaled_train_scales_with_lr_over_c(device: str) -> None:
    hand, ruled = (residual_net().to(device) for _ in range(2))
    inputs, targets = (values.to(device) for values in images(8))
    reference = OPTIMIZERS["SGD"](hand_made(hand, LR), LR, fused=True)
    optimizer = OPTIMIZERS["SGD"](ruled.parameters(), LR, fused=True)
    with rule_on(optimizer, ruled):
        for model, own in ((hand, reference), (ruled, optimizer)):
            scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
            for step in range(4):
                own.zero_grad()
                loss = cross_entropy(model(inputs), targets) * (float("inf") if step == 1 else 1.0)  # a step to skip
                scaler.scale(loss).backward()
                scaler.step(own)
                scaler.update()
    assert_close_parameters(hand, ruled, device)
    assert all(parameter.isfinite().all() for parameter in ruled.parameters())


@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_step_trains_scales_with_lr_over_c_under_a_schedule(device: str) -> None:
    hand, ruled = (residual_net().to(device) for _ in range(2))
    inputs, targets = (values.to(device) for values in images(8))
    reference = torch.optim.SGD(hand_made(hand, LR), LR)
    optimizer = torch.optim.SGD(ruled.parameters(), LR, weight_decay=DECAY)
    torch.compiler.reset()
    with rule_on(optimizer, ruled) as rule:
        for model, own, compiles in ((hand, reference, False), (ruled, optimizer, True)):
            plan = OneCycleLR(own, [group["lr"] for group in own.param_groups], total_steps=4)

            def step(model: Any = model, own: Any = own) -> None:
                own.zero_grad()
                cross_entropy(model(inputs), targets).backward()
                own.step()

            run = torch.compile(step, backend="eager" if device == "cpu" else "inductor") if compiles else step
            for _ in range(3):
                run()
                plan.step()
        assert rule.updates == 3
    for (key, value), other in zip(hand.state_dict().items(), ruled.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
