"""What is left where a version of torch lacks a private name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.models import images, residual_net, scales
from torch import nn

from lightning_revbn import ScaleUpdateRule, find_batch_norms
from lightning_revbn.core import update_watch
from lightning_revbn.core.activations import ActivationHooks, NormalizedActivations
from lightning_revbn.core.torch_compat import (
    forward_pre_hooks,
    has_hooks,
    is_functorch_wrapped,
    runs_step_hooks,
    step_pre_hooks,
    version_of,
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


def test_changes_in_place_are_counted_where_torch_counts_them() -> None:
    tensor = torch.ones(2)
    before = version_of(tensor)
    assert before is not None
    tensor.add_(1)
    assert version_of(tensor) != before
    with torch.inference_mode():
        assert version_of(torch.ones(2)) is None


def test_without_torchs_count_an_update_that_passes_the_rule_by_is_found_one_step_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Wandering(torch.optim.SGD):
        groups = None

        def step(self, closure: Any = None) -> Any:
            with torch.no_grad():
                for group in self.groups or self.param_groups:
                    for parameter in group["params"]:
                        parameter.sub_(group["lr"])

    monkeypatch.setattr(update_watch, "version_of", lambda tensor: None)
    model = residual_net()
    optimizer = Wandering(model.parameters(), lr=0.1)
    with ScaleUpdateRule(optimizer, scales(model)):
        optimizer.step()
        optimizer.groups = optimizer.param_groups
        optimizer.step()
        with pytest.raises(RuntimeError, match="did not update from its param_groups"):
            optimizer.step()
