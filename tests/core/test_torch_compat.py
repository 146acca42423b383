"""What is left where a version of torch lacks a private name."""

from __future__ import annotations

import pytest
import torch
from helpers.models import images, residual_net, scales
from torch import nn

from lightning_revbn import ScaleUpdateRule, find_batch_norms
from lightning_revbn.core.activations import ActivationHooks, NormalizedActivations
from lightning_revbn.core.torch_compat import (
    forward_pre_hooks,
    has_hooks,
    is_functorch_wrapped,
    runs_step_hooks,
    step_pre_hooks,
)


def test_tensors_inside_transforms_are_told_from_plain_tensors() -> None:
    seen: list[bool] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(is_functorch_wrapped(x))
        return x.square().sum()

    torch.func.vmap(torch.func.grad(function))(torch.ones(2, 3))
    function(torch.ones(3))
    assert seen == [True, False]


def test_without_functorchs_name_a_model_trains_and_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C._functorch, "is_functorch_wrapped_tensor")
    model = residual_net()
    records = find_batch_norms(model)
    metric = NormalizedActivations(len(records))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ActivationHooks(records, metric), ScaleUpdateRule(optimizer, scales(model)):
        model(images(4)[0]).sum().backward()
        optimizer.step()
    assert (metric.compute().absmax > 0).all()
    assert not torch.equal(model.bn1.weight, torch.ones(6))


def test_hooks_are_listed_in_their_order() -> None:
    optimizer = torch.optim.SGD(residual_net().parameters(), lr=0.1)
    hooks = [lambda *args: None, lambda *args: None]
    for hook in hooks:
        optimizer.register_step_pre_hook(hook)
    assert runs_step_hooks(optimizer)
    assert step_pre_hooks(optimizer) == hooks

    layer = nn.BatchNorm1d(3)
    assert not has_hooks(layer)
    for hook in hooks:
        layer.register_forward_pre_hook(hook)
    assert has_hooks(layer)
    assert forward_pre_hooks(layer) == hooks
