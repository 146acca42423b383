"""What an optimizer writes into its groups inside its step: carried over to its own groups, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.by_hand import LR, C, by_hand
from helpers.loop import train
from helpers.models import assert_same_parameters, residual_net, scales, shifts
from torch import Tensor, nn

from lightning_revbn import ScaleUpdateRule

K = 10.0
Write = Callable[[torch.optim.Optimizer], None]


class Writing(torch.optim.SGD):
    """SGD that runs a function on itself after the closure and before the update."""

    def __init__(self, params: Any, write: Write, **options: Any) -> None:
        super().__init__(params, **{"lr": LR, **options})
        self.write = write
        self.seen: list[list[dict[str, Any]]] = []

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        self.write(self)
        self.seen.append([dict(group) for group in self.param_groups])
        super().step()
        return loss


def ruled(
    write: Write, split: bool = False, steps: int = 1, **options: Any
) -> tuple[nn.Module, Writing, ScaleUpdateRule]:
    """Train with a rule on scales and shifts; `split` gives scales a group of their own."""
    model = residual_net()
    own = {id(scale) for scale in scales(model)}
    groups: list[Any] = [{"params": [p for p in model.parameters() if id(p) not in own]}, {"params": scales(model)}]
    optimizer = Writing(groups if split else model.parameters(), write, **options)
    rule = ScaleUpdateRule(optimizer, scales(model), C, scales(model), shifts=shifts(model), shift_multiplier=K)
    train(model, optimizer, steps=steps)
    return model, optimizer, rule


def in_all_groups(change: Callable[[dict[str, Any]], Any]) -> Write:
    def write(optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            change(group)

    return write


# --- keys of the optimizer's own --------------------------------------------------------------------------------------


def test_a_key_written_after_the_closure_into_a_group_read_before_it_is_kept() -> None:
    class ReadingFirst(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            first = self.param_groups[0]
            closure()
            first["written"] = first["lr"]

    model = residual_net()
    optimizer = ReadingFirst(model.parameters(), lr=LR)

    def closure() -> None:
        optimizer.param_groups[0]["lr"] = 0.5

    with ScaleUpdateRule(optimizer, scales(model), C):
        optimizer.step(closure)
    assert optimizer.param_groups[0]["written"] == 0.5


def test_groups_are_the_same_objects_in_every_step() -> None:
    held: list[Any] = []

    def hold(optimizer: torch.optim.Optimizer) -> None:
        held.append((optimizer.param_groups, *optimizer.param_groups, *[g["params"] for g in optimizer.param_groups]))

    ruled(hold, steps=3, nesterov=True, momentum=0.9)
    assert len(held[0]) == 7
    assert all(first is later for step in held for first, later in zip(held[0], step, strict=True))


def test_a_deleted_key_is_deleted() -> None:
    _, optimizer, _ = ruled(in_all_groups(lambda group: group.pop("first", None)), steps=2)
    optimizer.param_groups[0]["first"] = True
    optimizer.step()
    assert "first" not in optimizer.param_groups[0]


def test_a_key_that_is_written_for_one_part_alone_is_kept() -> None:
    def write(optimizer: torch.optim.Optimizer) -> None:
        optimizer.param_groups[-1]["is_last"] = True

    _, optimizer, _ = ruled(write)
    assert optimizer.param_groups[0]["is_last"] is True


def test_if_the_copies_disagree_those_that_are_neither_scales_nor_shifts_count() -> None:
    _, optimizer, _ = ruled(in_all_groups(lambda group: group.update(size=len(group["params"]))))
    assert optimizer.param_groups[0]["size"] == len(list(residual_net().parameters())) - 6


def test_a_count_is_counted_once_though_the_state_is_saved_between_the_copies() -> None:
    saved: list[Any] = []

    def count(optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            group["count"] = group.get("count", 0) + 1
            saved.append(optimizer.state_dict()["param_groups"][0]["count"])

    _, optimizer, _ = ruled(count, steps=3)
    assert optimizer.param_groups[0]["count"] == 3
    assert saved == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_a_number_may_become_a_tensor_and_a_number_again() -> None:
    rates = [LR, torch.tensor(LR / 2), torch.tensor(LR / 3), LR / 4, LR / 4]
    seen: list[list[float]] = []

    def look(optimizer: torch.optim.Optimizer) -> None:
        seen.append([float(group["lr"]) for group in optimizer.param_groups])

    model = residual_net()
    optimizer = Writing(model.parameters(), look, foreach=False)
    with ScaleUpdateRule(optimizer, scales(model), C):
        for rate in rates:
            optimizer.param_groups[0]["lr"] = rate
            train(model, optimizer, steps=1)
            if isinstance(rate, Tensor):
                rate.mul_(0.1)  # in place, after which it is found anew
                train(model, optimizer, steps=1)
    found = [LR, LR / 2, LR / 20, LR / 3, LR / 30, LR / 4, LR / 4]
    assert seen == [pytest.approx([rate, rate / C]) for rate in found]


def test_a_tensor_that_is_changed_in_place_is_changed_once() -> None:
    def count(group: dict[str, Any]) -> None:
        group.setdefault("count", torch.zeros(())).add_(1)

    _, optimizer, _ = ruled(in_all_groups(count), steps=3)
    assert optimizer.param_groups[0]["count"].item() == 3


def test_a_tensor_that_is_changed_in_place_for_one_part_alone_is_changed() -> None:
    """As an optimizer does that passes over groups without gradients."""

    def count(optimizer: torch.optim.Optimizer) -> None:
        optimizer.param_groups[-1]["count"].add_(1)

    model = residual_net()
    optimizer = Writing([{"params": list(model.parameters()), "count": torch.zeros(())}], count)
    tensor = optimizer.param_groups[0]["count"]
    with ScaleUpdateRule(optimizer, scales(model), C):
        train(model, optimizer, steps=3)
    assert optimizer.param_groups[0]["count"] is tensor
    assert tensor.item() == 3


def lower_first(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["lr"] *= 0.5


def lower_all(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= 0.5


def count_first(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["count"] = 3


def delete_first(optimizer: torch.optim.Optimizer) -> None:
    del optimizer.param_groups[0]["spare"]


def add_group(optimizer: torch.optim.Optimizer) -> None:
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.7})


@pytest.mark.parametrize("write", [lower_first, lower_all, count_first, delete_first, add_group])
@pytest.mark.parametrize("asked", ["state_dict", "remove", "step"])
def test_what_a_step_wrote_before_it_failed_is_as_without_a_rule(write: Any, asked: str) -> None:
    def fail(optimizer: torch.optim.Optimizer) -> None:
        write(optimizer)
        raise OSError("in the update")

    plain, model = residual_net(), residual_net()
    expected, optimizer = Writing(plain.parameters(), fail), Writing(model.parameters(), fail)
    for own in (expected, optimizer):
        own.param_groups[0]["spare"] = None
    with pytest.raises(OSError, match="in the update"):
        expected.step()
    rule = ScaleUpdateRule(optimizer, scales(model), C)
    with pytest.raises(OSError, match="in the update"):
        optimizer.step()
    if asked == "state_dict":
        assert optimizer.state_dict()["param_groups"] == expected.state_dict()["param_groups"]
    if asked == "step":
        optimizer.write = lambda own: None
        optimizer.step()
        assert [group["lr"] for group in optimizer.seen[-1]][:2] == [
            rate := expected.param_groups[0]["lr"],
            pytest.approx(rate / C),
        ]
    rule.remove()
    assert optimizer.state_dict()["param_groups"] == expected.state_dict()["param_groups"]


def test_what_a_step_wrote_for_scales_alone_before_it_failed_is_dropped() -> None:
    def fail(optimizer: torch.optim.Optimizer) -> None:
        optimizer.param_groups[-1]["lr"] = 0.7
        optimizer.param_groups[-1]["params"].pop()
        raise OSError("in the update")

    model = residual_net()
    optimizer = Writing(model.parameters(), fail)
    with ScaleUpdateRule(optimizer, scales(model), C), pytest.raises(OSError, match="in the update"):
        optimizer.step()
    assert [(group["lr"], len(group["params"])) for group in optimizer.param_groups] == [
        (LR, len(list(model.parameters())))
    ]


def test_a_key_that_the_user_changes_or_deletes_is_so_in_the_next_step() -> None:
    _, optimizer, _ = ruled(lambda own: None)
    group = optimizer.param_groups[0]
    del group["dampening"]
    group["added"] = 1
    group["momentum"] = 0.5
    optimizer.write = in_all_groups(lambda group: group.setdefault("dampening", 0))
    optimizer.step()
    seen = optimizer.seen[-1]
    assert [(g["added"], g["momentum"]) for g in seen] == [(1, 0.5)] * 3
    assert [g["lr"] for g in seen] == [LR, LR * K, LR / C]


# --- learning rate and weight decay -----------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [False, True])
def test_a_learning_rate_that_the_optimizer_lowers_in_every_group_is_lowered(split: bool) -> None:
    def lower(group: dict[str, Any]) -> None:
        group["lr"] *= 0.5

    model, optimizer, rule = ruled(in_all_groups(lower), split, steps=3)
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(LR / 8)] * (1 + split)
    assert [[g["lr"] for g in seen][-1] for seen in optimizer.seen] == pytest.approx(
        [LR / C / 2, LR / C / 4, LR / C / 8]
    )
    assert rule.learning_rates() == [pytest.approx(LR / 8 / C)]
    hand = residual_net()
    train(hand, Writing(by_hand(hand, LR, None, multiplier=K), in_all_groups(lower)), steps=3)
    for ours, theirs in zip(model.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("split", [False, True])
def test_a_tensor_learning_rate_that_the_optimizer_lowers_in_place_is_lowered(split: bool) -> None:
    def lower(group: dict[str, Any]) -> None:
        group["lr"].mul_(0.5)

    model = residual_net()
    own = scales(model)
    rest = [p for p in model.parameters() if all(p is not scale for scale in own)]
    params: list[list[Tensor]] = [rest, own] if split else [[*rest, *own]]
    groups = [{"params": some, "lr": torch.tensor(LR)} for some in params]
    optimizer = Writing(groups, in_all_groups(lower), foreach=False)
    held = [group["lr"] for group in optimizer.param_groups]
    with ScaleUpdateRule(optimizer, scales(model), C):
        train(model, optimizer, steps=2)
    assert [group["lr"] for group in optimizer.param_groups] == held
    assert [lr.item() for lr in held] == [pytest.approx(LR / 4)] * len(held)
    assert optimizer.seen[-1][-1]["lr"].item() == pytest.approx(LR / 4 / C)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("lr", [LR, 0.3])
def test_one_learning_rate_for_all_groups_is_refused(lr: float, split: bool) -> None:
    with pytest.raises(RuntimeError, match=r"changed 'lr' of parameter group \d of Writing .* use scale_param_groups"):
        ruled(in_all_groups(lambda group: group.update(lr=lr)), split)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_learning_rate_that_changes_for_one_part_alone_is_refused(part: int) -> None:
    def write(optimizer: torch.optim.Optimizer) -> None:
        optimizer.param_groups[part]["lr"] *= 0.9

    with pytest.raises(RuntimeError, match="changed 'lr' of parameter group 0 of Writing"):
        ruled(write)


def test_a_learning_rate_of_zero_is_no_conflict() -> None:
    _, optimizer, _ = ruled(in_all_groups(lambda group: group.update(lr=0.0)), split=True, steps=2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]


@pytest.mark.parametrize("key", ["lr", "params"])
def test_a_key_that_no_group_can_do_without_cannot_be_deleted(key: str) -> None:
    class Deleting(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                del group[key]

    model = residual_net()
    optimizer = Deleting(model.parameters(), lr=LR)
    ScaleUpdateRule(optimizer, scales(model), C)
    with pytest.raises(RuntimeError, match=f"changed '{key}' of parameter group 0 of Deleting"):
        optimizer.step()


def test_a_learning_rate_that_is_written_as_it_was_found_stays_what_it_was() -> None:
    def rewrite(group: dict[str, Any]) -> None:
        group["lr"] = group["lr"] * 1.0

    lr = next(lr for lr in (1 / n for n in range(3, 100)) if lr / C * C != lr)
    _, optimizer, _ = ruled(in_all_groups(rewrite), split=True, lr=lr)
    assert [group["lr"] for group in optimizer.param_groups] == [lr, lr]


def test_a_weight_decay_that_follows_in_every_part_is_carried_over() -> None:
    def halve(group: dict[str, Any]) -> None:
        group["weight_decay"] *= 0.5

    _, optimizer, _ = ruled(in_all_groups(halve), steps=2, weight_decay=0.4)
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.1)
    assert [group["weight_decay"] for group in optimizer.seen[-1]] == pytest.approx([0.1, 0.1 / K, 0.0])


def test_a_weight_decay_for_exempt_parameters_is_refused() -> None:
    with pytest.raises(RuntimeError, match="changed 'weight_decay' of parameter group 0 of Writing"):
        ruled(in_all_groups(lambda group: group.update(weight_decay=0.2)), weight_decay=0.4)


# --- parameters and groups --------------------------------------------------------------------------------------------


def test_parameters_that_the_step_takes_out_of_a_group_are_refused() -> None:
    with pytest.raises(RuntimeError, match="changed 'params' of parameter group 0 of Writing"):
        ruled(in_all_groups(lambda group: group["params"].pop()))


@pytest.mark.parametrize("change", [lambda groups: groups.pop(), lambda groups: groups.reverse()])
def test_removed_and_reordered_groups_are_refused(change: Callable[[list[Any]], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"Writing.step\(\) has removed or reordered its param_groups"):
        ruled(lambda optimizer: change(optimizer.param_groups))


@pytest.mark.parametrize("add", ["add_param_group", "+="])
def test_a_group_that_the_step_adds_is_the_optimizers_and_its_scales_learn_with_lr_over_c(add: str) -> None:
    late = nn.BatchNorm1d(4)
    late.weight.grad, late.bias.grad = torch.ones(4), torch.ones(4)

    def write(optimizer: torch.optim.Optimizer) -> None:
        if any(parameter is late.weight for group in optimizer.param_groups for parameter in group["params"]):
            return
        new = {**optimizer.param_groups[0], "params": list(late.parameters()), "lr": 0.2}
        if add == "+=":
            optimizer.param_groups += [new]
        else:
            optimizer.add_param_group(new)

    model = residual_net()
    optimizer = Writing(model.parameters(), write)
    with ScaleUpdateRule(optimizer, [*scales(model), late.weight], C) as rule:
        train(model, optimizer, steps=1)
        assert [len(group["params"]) for group in optimizer.param_groups] == [len(list(model.parameters())), 2]
        assert optimizer.param_groups[1]["lr"] == 0.2
        assert rule.covered == 4
    torch.testing.assert_close(1 - late.weight, torch.full((4,), 0.2 / C), rtol=1e-3, atol=0)
    torch.testing.assert_close(late.bias, torch.full((4,), -0.2))
    assert [len(group["params"]) for group in optimizer.seen[-1]] == [len(list(model.parameters())) - 3, 3, 1, 1]


def test_groups_that_separate_scales_already_are_shown_in_the_same_number_and_order() -> None:
    model, multiplier = residual_net(), K
    groups = by_hand(model, LR, 0.1, multiplier=multiplier)
    plain = [{"params": group["params"], "lr": LR * (1 + index)} for index, group in enumerate(groups)]
    optimizer = Writing(plain[::-1], lambda own: None)
    with ScaleUpdateRule(optimizer, scales(model), C, shifts=shifts(model), shift_multiplier=multiplier):
        train(model, optimizer, steps=1)
    (seen,) = optimizer.seen
    assert [[id(p) for p in group["params"]] for group in seen] == [
        [id(p) for p in group["params"]] for group in optimizer.param_groups
    ]
    assert [group["lr"] for group in seen] == [LR * 3 / C, LR * 2 * K, LR]


# --- state that an optimizer keeps in its groups ----------------------------------------------------------------------


def test_state_in_a_group_is_shared_by_its_parts_where_groups_made_by_hand_have_their_own() -> None:
    """The documented difference: here every group sums up the learning rates that it has had."""

    def remember(group: dict[str, Any]) -> None:
        group["sum"] = group.get("sum", 0.0) + group["lr"]

    _, optimizer, _ = ruled(in_all_groups(remember), steps=3)
    hand = residual_net()
    by_themselves = Writing(by_hand(hand, LR, None, multiplier=K), in_all_groups(remember))
    train(hand, by_themselves, steps=3)
    assert [group["sum"] for group in by_themselves.param_groups] == pytest.approx([3 * LR, 3 * LR * K, 3 * LR / C])
    assert [group["sum"] for group in optimizer.param_groups] == pytest.approx([3 * LR])
    assert_same_parameters(hand, ruled(in_all_groups(remember), steps=3)[0])  # as long as no update uses the sum
