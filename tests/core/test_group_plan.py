"""What an update sees of a parameter group, and what is left in the group afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.by_hand import LR, C
from helpers.loop import ruled_sgd, train
from helpers.models import assert_same_parameters, residual_net, scales
from torch import nn

from lightning_revbn import ScaleUpdateRule
from lightning_revbn.core.group_plan import GroupPlan
from lightning_revbn.core.param_groups import Part, parts_of


def parameters(count: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2)) for _ in range(count)]


def test_parts_are_sorted_and_the_part_without_a_treatment_comes_first() -> None:
    params = parameters(6)
    ids = [id(parameter) for parameter in params]
    assert parts_of(params, {ids[0], ids[3]}, {ids[3], ids[4]}) == [
        Part((1, 2, 5), divided=False, exempt=False),
        Part((4,), divided=False, exempt=True),
        Part((0,), divided=True, exempt=False),
        Part((3,), divided=True, exempt=True),
    ]
    assert parts_of([], {ids[0]}, ()) == []


def test_a_group_is_copied_into_its_parts_and_gets_back_what_was_written_into_the_first() -> None:
    params = parameters(3)
    group = {"params": params, "lr": 0.5, "weight_decay": 0.1, "step": torch.zeros(()), "k": 0}
    plan = GroupPlan(group, {id(params[1])}, {id(params[1])})
    rest, divided = plan.copy_into_parts(group, 100.0)
    assert (rest["params"], rest["lr"], rest["weight_decay"]) == ([params[0], params[2]], 0.5, 0.1)
    assert (divided["params"], divided["lr"], divided["weight_decay"]) == ([params[1]], 0.005, 0.0)
    for copy in (rest, divided):
        copy["step"] += 1
        copy["k"] += 1
        copy["new"] = "value"
    plan.write_back()
    assert group == {"params": params, "lr": 0.5, "weight_decay": 0.1, "step": 1.0, "k": 1, "new": "value"}


def test_a_group_of_scales_alone_keeps_its_own_learning_rate_and_decay() -> None:
    params = parameters(2)
    group = {"params": params, "lr": 0.5, "weight_decay": 0.1}
    plan = GroupPlan(group, set(map(id, params)), set(map(id, params)))
    (copy,) = plan.copy_into_parts(group, 100.0)
    copy["k"] = 1
    plan.write_back()
    assert group == {"params": params, "lr": 0.5, "weight_decay": 0.1, "k": 1}


def test_a_group_without_any_of_the_parameters_is_shown_as_it_is() -> None:
    group = {"params": parameters(2), "lr": 0.5}
    plan = GroupPlan(group, {1}, {2})
    assert plan.is_plain
    (shown,) = plan.copy_into_parts(group, 100.0)
    assert shown is group


def test_a_plan_fits_only_the_parameters_that_it_was_made_for() -> None:
    params = parameters(2)
    group = {"params": params, "lr": 0.5}
    plan = GroupPlan(group, {id(params[0])}, ())
    assert plan.fits({"params": list(params)})
    assert not plan.fits({"params": params[:1]})
    assert not plan.fits({"params": [params[0], nn.Parameter(torch.ones(2))]})
    assert not plan.fits({"params": params, "scale_lr_divisor": 100.0})


class GroupCounter(torch.optim.SGD):
    """Keeps a step count and a running figure in its groups, as Lion, Prodigy or schedule-free optimizers do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            group.setdefault("counter", torch.zeros(())).add_(1)
        return super().step(closure)


def test_what_an_optimizer_writes_into_its_groups_is_kept_once() -> None:
    model = residual_net()
    optimizer = GroupCounter(model.parameters(), lr=LR)
    with ScaleUpdateRule(optimizer, scales(model), C):
        train(model, optimizer, steps=3)
        group = optimizer.param_groups[0]
        assert (group["k"], group["counter"].item(), group["lr"]) == (3, 3.0, LR)
        assert len(group["params"]) == len(list(model.parameters()))


def test_a_group_of_scales_alone_is_not_given_an_empty_twin() -> None:
    model = residual_net()
    sizes: list[int] = []

    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            sizes.extend(len(group["params"]) for group in self.param_groups)
            return super().step(closure)

    optimizer = Counting([{"params": [model.head.weight]}, {"params": scales(model)}], lr=LR)
    with ScaleUpdateRule(optimizer, scales(model), C):
        train(model, optimizer, steps=1)
    assert sizes == [1, 3]


def test_parameter_names_stay_beside_their_parameters() -> None:
    model = residual_net()
    seen: dict[int, str] = {}

    class Named(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                seen.update(zip(map(id, group["params"]), group["param_names"], strict=True))
            return super().step(closure)

    optimizer = Named([{"params": list(model.parameters()), "param_names": [n for n, _ in model.named_parameters()]}])
    with ScaleUpdateRule(optimizer, scales(model), C):
        train(model, optimizer, steps=1)
    assert seen == {id(p): name for name, p in model.named_parameters()}


def test_a_parameter_put_in_the_place_of_another_is_the_one_that_is_updated() -> None:
    model, optimizer, _ = ruled_sgd()
    train(model, optimizer, steps=1)
    params = optimizer.param_groups[0]["params"]
    place = next(index for index, parameter in enumerate(params) if parameter is model.bn1.weight)
    params[place] = nn.Parameter(torch.ones(6))
    params[place].grad = torch.ones(6)
    old = model.bn1.weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.bn1.weight, old)
    torch.testing.assert_close(1 - params[place], torch.full((6,), LR), rtol=1e-3, atol=0)  # it is no scale


def test_a_group_that_is_marked_as_divided_later_is_left_alone_from_then_on() -> None:
    model, optimizer, _ = ruled_sgd()
    train(model, optimizer, steps=1)
    optimizer.param_groups[0]["scale_lr_divisor"] = C
    old = model.bn1.weight.detach().clone()
    model.bn1.weight.grad = torch.ones(6)
    optimizer.step()
    torch.testing.assert_close(old - model.bn1.weight, torch.full((6,), LR), rtol=1e-3, atol=0)


@pytest.mark.parametrize("options", [{"foreach": False}, {"fused": True}])
def test_one_tensor_learning_rate_shared_by_all_groups_is_never_divided_in_place(options: dict[str, Any]) -> None:
    hand, ruled = residual_net(), residual_net()
    # A power of two, so that lr / c is the same number whether float32 or float64 did the division.
    shared, divisor = torch.tensor(LR), 64.0
    optimizer = torch.optim.Adam(
        [{"params": p, "lr": shared} for p in (list(ruled.stem.parameters()), list(ruled.bn1.parameters()))],
        lr=shared,
        **options,
    )
    assert optimizer.param_groups[0]["lr"] is optimizer.param_groups[1]["lr"]
    with ScaleUpdateRule(optimizer, scales(ruled), divisor):
        train(ruled, optimizer, steps=4)
    assert shared.item() == torch.tensor(LR).item()
    assert optimizer.param_groups[0]["lr"] is shared

    rest = [*hand.stem[0].parameters(), hand.stem[1].bias, hand.bn1.bias]
    optimizer = torch.optim.Adam(
        [
            {"params": rest, "lr": torch.tensor(LR)},
            {"params": [hand.stem[1].weight, hand.bn1.weight], "lr": torch.tensor(LR) / divisor},
        ],
        **options,
    )
    train(hand, optimizer, steps=4)
    assert_same_parameters(hand, ruled)
