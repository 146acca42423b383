"""Training without Lightning: a loop, and an optimizer with the rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from helpers.by_hand import LR, C
from helpers.models import images, residual_net, scales
from lightning_revbn import ScaleUpdateRule

STEPS = 20


def train(
    model: nn.Module, optimizer: Optimizer, scheduler: Any = None, steps: int = STEPS, closure: bool = True
) -> None:
    """Train on a batch of 8 images per step, equal in every call; `closure` passes the optimizer a closure."""
    first = next(model.parameters())
    inputs, targets = images(8 * steps)
    inputs, targets = inputs.to(first.device, first.dtype), targets.to(first.device)

    for step in range(steps):
        batch = slice(8 * step, 8 * step + 8)

        def compute(batch: slice = batch) -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(model(inputs[batch]), targets[batch])
            loss.backward()
            return loss

        if closure:
            optimizer.step(compute)
        else:
            compute()
            optimizer.step()
        if scheduler is not None:
            scheduler.step()


def ruled_sgd(**options: Any) -> tuple[nn.Module, torch.optim.SGD, ScaleUpdateRule]:
    """Return a network, its optimizer and the rule on the optimizer."""
    model = residual_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, **options)
    return model, optimizer, ScaleUpdateRule(optimizer, scales(model), C, scales(model))
