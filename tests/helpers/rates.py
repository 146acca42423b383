"""The learning rates that an optimizer sees for shifts and scales, at every update."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from helpers.by_hand import LR, C
from lightning_revbn import find_batch_norms

Rates = list[list[tuple[float, float]]]
"""For every update, a pair of learning rates (shift, scale) for each layer that the optimizer holds."""


def probing_sgd(seen: Rates, lr: float = LR) -> Any:
    """Configure an SGD that records the learning rates of its batch norm layers at every update."""

    def configure(module: nn.Module) -> Any:
        layers = [(id(record.shift), id(record.scale)) for record in find_batch_norms(module)]

        class Probing(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                result = super().step(closure)
                rates = {id(p): float(group["lr"]) for group in self.param_groups for p in group["params"]}
                seen.append([(rates[shift], rates[scale]) for shift, scale in layers if {shift, scale} <= rates.keys()])
                return result

        return Probing(
            [p for p in module.parameters() if p.requires_grad],
            lr=getattr(module, "lr", lr),
            momentum=0.9,
            weight_decay=0.01,
        )

    return configure


def assert_ratio_everywhere(seen: Rates, steps: int, moves: bool = True) -> None:
    """Assert that every update saw lr / c for the scales, and, unless `moves` is False, that the rate changed."""
    assert len(seen) >= steps
    assert all(seen)
    assert all(math.isclose(scale, base / C, rel_tol=1e-12) for rates in seen for base, scale in rates)
    if moves:
        assert len({base for rates in seen for base, _ in rates}) > 2, "the learning rate was expected to move"
