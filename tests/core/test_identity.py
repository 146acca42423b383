"""The identity of docs/why.md: a small scale is a network of scale 1 with other learning rates, start and eps."""

from __future__ import annotations

import pytest
import torch
from helpers.models import ResidualNet, images, residual_net
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_revbn import ScaleUpdateRule, init_batch_norms
from lightning_revbn.core.identity import ScaleOneTerms, scale_1_terms

LR, MOMENTUM, DECAY, STEPS = 0.05, 0.9, 1e-3, 25
BEHIND_SCALED = ("bn1", "bn2")
"""Batch norm layers whose input comes from another batch norm layer; the stem's comes from the data."""


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return the logits of every step."""
    inputs, targets = images(32)
    logits: list[torch.Tensor] = []
    for _ in range(STEPS):
        logits.append(model(inputs.double()))
        optimizer.zero_grad()
        cross_entropy(logits[-1], targets).backward()
        optimizer.step()
    return logits


def sort_parameters(model: ResidualNet) -> dict[str, list[nn.Parameter]]:
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    named = {
        "scales": [layer.weight for layer in norms],
        "shifts": [layer.bias for layer in norms],
        "head": [model.head.weight],
    }
    taken = {id(parameter) for parameters in named.values() for parameter in parameters}
    return {**named, "rest": [p for p in model.parameters() if id(p) not in taken]}


@pytest.mark.parametrize(
    ("g", "c", "k", "eps"),
    [
        (0.1, 100.0, 1.0, 1e-5),
        (0.25, 100.0, 1.0, 1e-5),
        (0.5, 7.0, 1.0, 1e-5),
        (0.25, 100.0, 3.0, 1e-3),
        (1, 1, 10, 1e-3),
    ],
)
def test_a_small_scale_equals_scale_one_with_other_learning_rates_start_and_eps(
    g: float, c: float, k: float, eps: float
) -> None:
    revisited = residual_net().double()
    found = init_batch_norms(revisited, scale=g, eps=eps) if g < 1 else init_batch_norms(revisited, scale=1.0, eps=eps)
    own = sort_parameters(revisited)
    groups = [
        {"params": own["head"] + own["rest"], "weight_decay": DECAY},
        {"params": own["shifts"], "lr": LR * k, "weight_decay": DECAY / k},
        {"params": own["scales"]},
    ]
    optimizer = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM)
    with ScaleUpdateRule(optimizer, found.scales, divisor=c):
        logits = train(revisited, optimizer)

    terms = scale_1_terms(g, c, k, eps)
    equal = residual_net().double()
    with torch.no_grad():
        equal.head.weight.mul_(terms.head_start)
    equal.stem[1].eps = eps  # type: ignore[assignment]
    for name in BEHIND_SCALED:
        equal.get_submodule(name).eps = terms.eps  # type: ignore[assignment]
    other = sort_parameters(equal)
    groups = [
        {"params": other["scales"], "lr": LR * terms.scale_lr},
        {"params": other["shifts"], "lr": LR * terms.shift_lr, "weight_decay": DECAY / terms.shift_lr},
        {"params": other["head"], "lr": LR * terms.head_lr, "weight_decay": DECAY / terms.head_lr},
        {"params": other["rest"], "weight_decay": DECAY},
    ]
    expected = train(equal, torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM))

    for ours, theirs in zip(logits, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    for name in BEHIND_SCALED:
        left, right = revisited.get_submodule(name), equal.get_submodule(name)
        torch.testing.assert_close(left.weight, g * right.weight, rtol=1e-9, atol=0)  # type: ignore[arg-type,operator]
        start = (1 - 0.1) ** STEPS  # what is left of the 1 that running variances start from
        variances = left.running_var - start, g**2 * (right.running_var - start)  # type: ignore[operator]
        torch.testing.assert_close(*variances, rtol=1e-9, atol=0)
    moved = (equal.bn1.weight - 1).abs().max()
    assert moved > 1e-3  # the scales have learned


def test_values_of_the_divisor_that_switch_the_rule_off_count_as_one() -> None:
    assert scale_1_terms(0.5, 0.0) == scale_1_terms(0.5, 1.0) == ScaleOneTerms(4.0, 4.0, 0.5, 0.25, 4e-5)


def test_without_one_of_its_parts_the_identity_does_not_hold() -> None:
    """The comparison above would see a missing part: here eps is left as it was."""
    g = 0.1
    revisited, equal = residual_net().double(), residual_net().double()
    init_batch_norms(revisited, scale=g)
    with torch.no_grad():
        equal.head.weight.mul_(g)
    inputs = images(32)[0].double()
    assert (revisited(inputs) - equal(inputs)).abs().max() > 1e-5
