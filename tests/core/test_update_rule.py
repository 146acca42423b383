"""The rule against parameter groups made by hand, and against everything that could see or lose the division."""

from __future__ import annotations

import copy
import functools
import gc
import io
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from helpers.by_hand import LR, MULTIPLIERS, C, by_hand
from helpers.loop import STEPS, ruled_sgd, train
from helpers.models import assert_same_parameters, images, residual_net, scales, shifts
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim import lr_scheduler as sched

from lightning_revbn import InputBatchNorm, ScaleUpdateRule, init_batch_norms, scale_param_groups
from lightning_revbn.core.update_rule import active_rule, scale_learning_rates, shift_learning_rates

OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"weight_decay": 0.0}),
    "SGD-decay": (torch.optim.SGD, {"weight_decay": 0.01}),
    "SGD-momentum": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.0}),
    "SGD-nesterov-decay": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "Adam": (torch.optim.Adam, {"weight_decay": 0.01}),
    "Adam-amsgrad": (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.01}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "NAdam": (torch.optim.NAdam, {"weight_decay": 0.01}),
    "RAdam": (torch.optim.RAdam, {"weight_decay": 0.01}),
    "Adamax": (torch.optim.Adamax, {"weight_decay": 0.01}),
    "Adadelta": (torch.optim.Adadelta, {"weight_decay": 0.01}),
    "Adagrad": (torch.optim.Adagrad, {"weight_decay": 0.01}),
    "RMSprop": (torch.optim.RMSprop, {"weight_decay": 0.01, "momentum": 0.5, "centered": True}),
    "Rprop": (torch.optim.Rprop, {}),
    "ASGD": (torch.optim.ASGD, {"weight_decay": 0.01, "t0": 5}),
    "Adafactor": (torch.optim.Adafactor, {"weight_decay": 0.01}),
}
FUSED_ON_CPU = {torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad}
KINDS: list[tuple[str, dict[str, Any]]] = [
    (f"{name}-{kind}", {"cls": cls, **options, **flags})
    for name, (cls, options) in OPTIMIZERS.items()
    for kind, flags in (("for-loop", {"foreach": False}), ("foreach", {"foreach": True}), ("fused", {"fused": True}))
    if kind != "fused" or cls in FUSED_ON_CPU
]

SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "constant": lambda optimizer: None,
    "step": lambda optimizer: sched.StepLR(optimizer, 5, 0.5),
    "lambda": lambda optimizer: sched.LambdaLR(optimizer, lambda step: 0.9**step),
    "linear": lambda optimizer: sched.LinearLR(optimizer, 0.1, 1.0, 10),
    "cosine": lambda optimizer: sched.CosineAnnealingLR(optimizer, STEPS),
    "onecycle": lambda optimizer: sched.OneCycleLR(
        optimizer,
        [group["lr"] for group in optimizer.param_groups],  # one maximum a group, as a careful user writes it
        total_steps=STEPS + 1,
        cycle_momentum=False,
    ),
    "sequential": lambda optimizer: sched.SequentialLR(
        optimizer, [sched.LinearLR(optimizer, 0.1, 1.0, 5), sched.ExponentialLR(optimizer, 0.8)], [5]
    ),
}


def build(options: dict[str, Any], params: Any, **overrides: Any) -> Optimizer:
    options = {"lr": LR, **options, **overrides}
    return options.pop("cls")(params, **options)


# SequentialLR of torch 2.5 passes an argument to the schedules inside it that these deprecate.
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
@pytest.mark.parametrize("multiplier", MULTIPLIERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("options", [pytest.param(options, id=name) for name, options in KINDS])
def test_the_rule_equals_groups_made_by_hand_to_the_bit(
    options: dict[str, Any], schedule: str, multiplier: float
) -> None:
    hand, ruled = residual_net(), residual_net()
    optimizer = build(options, by_hand(hand, LR, options.get("weight_decay"), multiplier=multiplier))
    train(hand, optimizer, SCHEDULES[schedule](optimizer), steps=10)

    optimizer = build(options, ruled.parameters())
    scheduler = SCHEDULES[schedule](optimizer)
    with ScaleUpdateRule(
        optimizer,
        scales(ruled),
        C,
        weight_decay_exempt=scales(ruled),
        shifts=shifts(ruled),
        shift_multiplier=multiplier,
    ):
        train(ruled, optimizer, scheduler, steps=10)

    assert_same_parameters(hand, ruled)
    assert not torch.equal(ruled.bn1.weight, torch.ones(6))


@settings(max_examples=40, deadline=None)
@given(
    options=st.sampled_from([options for _, options in KINDS]),
    lr=st.floats(1e-4, 0.2),
    divisor=st.floats(1.5, 1e4),
    multiplier=st.floats(0.1, 10.0),
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    exempt=st.booleans(),
    closure=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_rule_equals_groups_made_by_hand_for_random_models_and_settings(
    options: dict[str, Any],
    lr: float,
    divisor: float,
    multiplier: float,
    widths: list[int],
    exempt: bool,
    closure: bool,
    seed: int,
) -> None:
    def network() -> nn.Module:
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for before, after in zip([3, *widths], widths, strict=False):
            layers += [nn.Conv2d(before, after, 1), nn.BatchNorm2d(after), nn.LeakyReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 5))

    hand, ruled = network(), network()
    groups = by_hand(hand, lr, options.get("weight_decay"), divisor, multiplier, exempt)
    train(hand, build(options, groups, lr=lr), steps=5, closure=closure)
    optimizer = build(options, ruled.parameters(), lr=lr)
    undecayed = scales(ruled) if exempt else ()
    with ScaleUpdateRule(
        optimizer, scales(ruled), divisor, undecayed, shifts=shifts(ruled), shift_multiplier=multiplier
    ):
        train(ruled, optimizer, steps=5, closure=closure)
    assert_same_parameters(hand, ruled)


NUMBERS: dict[str, Callable[[float], Any]] = {
    "float32": np.float32,
    "float64": np.float64,
    "array of float32": lambda value: np.array(value, np.float32),
    "array of float64": np.array,
    "int": lambda value: 1,
    "NumPy's int": lambda value: np.int64(1),
}
TABLE = [1.0, 0.7, 0.3, 0.9, 0.1, 0.05]
ADAMS_AND_NUMBERS = [
    pytest.param(options, number, id=f"{name}-{number}")
    for name, options in KINDS
    for number in NUMBERS
    if "Adam" in name and not (options.get("fused") and "array" in number)  # torch's fused optimizers take no arrays
]


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")  # torch's array * tensor
@pytest.mark.parametrize(("options", "number"), ADAMS_AND_NUMBERS)
def test_learning_rates_may_be_numbers_of_any_kind(options: dict[str, Any], number: str) -> None:
    def follow_table(model: nn.Module, optimizer: Optimizer, changes: list[Callable[[Any], Any]]) -> None:
        for value in TABLE:
            for group, change in zip(optimizer.param_groups, changes, strict=True):
                group["lr"] = change(NUMBERS[number](value * LR))
            train(model, optimizer, steps=1)

    hand, ruled = residual_net(), residual_net()
    optimizer = build(options, by_hand(hand, LR, options.get("weight_decay"), 64.0, 4.0))
    follow_table(hand, optimizer, [lambda lr: lr, lambda lr: lr * 4.0, lambda lr: lr / 64.0])
    optimizer = build(options, ruled.parameters())
    with ScaleUpdateRule(optimizer, scales(ruled), 64, scales(ruled), shifts=shifts(ruled), shift_multiplier=4) as rule:
        follow_table(ruled, optimizer, [lambda lr: lr])
        assert rule.learning_rates() == [float(optimizer.param_groups[0]["lr"]) / 64]
    assert_same_parameters(hand, ruled)


def test_a_schedule_may_come_from_a_table_of_numpy() -> None:
    table = np.linspace(1.0, 0.1, STEPS + 1, dtype=np.float32)
    model = residual_net()
    optimizer = Spy(model.parameters(), model, lr=LR)
    scheduler = sched.LambdaLR(optimizer, lambda step: table[step])
    with ScaleUpdateRule(optimizer, scales(model), C):
        train(model, optimizer, scheduler)
    assert len(optimizer.seen) == STEPS
    assert all(scale == pytest.approx(rest / C) for rest, scale in optimizer.seen)


@pytest.mark.parametrize("number", [np.float32(100), np.array(100), "1e2", 100])
def test_divisor_and_multiplier_may_be_numbers_of_any_kind(number: Any) -> None:
    model = residual_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with ScaleUpdateRule(optimizer, scales(model), number, shifts=shifts(model), shift_multiplier=number) as rule:
        assert (rule.divisor, rule.shift_multiplier) == (100.0, 100.0)
    groups = scale_param_groups(model, LR, divisor=number, shift_multiplier=number)
    assert [group["lr"] for group in groups] == [LR, LR * 100, LR / 100]


class Spy(torch.optim.SGD):
    """SGD that notes the learning rates of scales and of the rest at every update, as the optimizer sees them."""

    def __init__(self, params: Any, of: nn.Module, **options: Any) -> None:
        super().__init__(params, **options)
        self.own = {id(scale) for scale in scales(of)}
        self.seen: list[tuple[float, float]] = []

    def step(self, closure: Callable[[], Tensor] | None = None) -> Any:
        result = super().step(closure)
        rates = {
            id(parameter) in self.own: float(group["lr"])
            for group in self.param_groups
            for parameter in group["params"]
        }
        self.seen.append((rates[False], rates[True]))
        return result


LOSSY: dict[str, Callable[[Optimizer], Any]] = {
    "OneCycleLR with a scalar": lambda optimizer: sched.OneCycleLR(optimizer, 0.1, total_steps=STEPS + 1),
    "CyclicLR with a scalar": lambda optimizer: sched.CyclicLR(optimizer, 0.01, 0.1, step_size_up=7),
    "SWALR": lambda optimizer: torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.02, anneal_epochs=5),
    "cosine with eta_min": lambda optimizer: sched.CosineAnnealingLR(optimizer, STEPS, eta_min=1e-4),
    "plateau with min_lr": lambda optimizer: Plateau(optimizer),
}


class Plateau(sched.ReduceLROnPlateau):
    """Always on a plateau; its floor is one number for all groups."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer, factor=0.3, patience=0, min_lr=1e-3)

    def step(self, metrics: Any = 1.0, epoch: int | None = None) -> None:
        super().step(1.0)


@pytest.mark.parametrize("schedule", LOSSY)
def test_the_ratio_holds_at_every_step_where_permanent_groups_lose_it(schedule: str) -> None:
    hand = residual_net()
    optimizer = Spy(by_hand(hand, LR, 0.0), hand, lr=LR, momentum=0.9)
    train(hand, optimizer, LOSSY[schedule](optimizer))
    assert any(abs(rest / scale - C) > 1 for rest, scale in optimizer.seen), "permanent groups were expected to lose it"

    ruled = residual_net()
    optimizer = Spy(ruled.parameters(), ruled, lr=LR, momentum=0.9)
    scheduler = LOSSY[schedule](optimizer)
    with ScaleUpdateRule(optimizer, scales(ruled), C):
        train(ruled, optimizer, scheduler)
    assert len(optimizer.seen) == STEPS
    assert all(scale == rest / C for rest, scale in optimizer.seen)
    assert len({rest for rest, _ in optimizer.seen}) > 1, "the schedule was expected to move"


def test_the_closure_may_change_the_learning_rate_of_its_own_step() -> None:
    model = residual_net()
    optimizer = Spy(model.parameters(), model, lr=LR)

    def closure() -> Tensor:
        optimizer.param_groups[0]["lr"] = 0.5
        loss = model(images(4)[0]).sum()
        loss.backward()
        return loss

    with ScaleUpdateRule(optimizer, scales(model), C):
        optimizer.step(closure=closure)
    assert optimizer.seen == [(0.5, 0.005)]


def test_a_change_in_the_closure_counts_even_if_the_optimizer_looked_at_its_groups_before() -> None:
    class LookingFirst(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            before = [group["lr"] for group in self.param_groups]
            closure()
            seen.append((before, [group["lr"] for group in self.param_groups]))

    seen: list[Any] = []
    model = residual_net()
    optimizer = LookingFirst(model.parameters(), lr=LR)

    def closure() -> None:
        optimizer.param_groups[0]["lr"] = 0.5

    with ScaleUpdateRule(optimizer, scales(model), C):
        optimizer.step(closure)
    assert seen == [([LR, LR / C], [0.5, 0.5 / C])]
    assert optimizer.param_groups[0]["lr"] == 0.5


def snapshot(optimizer: Optimizer) -> list[tuple[int, list[int], dict[str, Any]]]:
    """Identity of each group and its parameters, and its other values."""
    return [
        (id(group), [id(p) for p in group["params"]], {key: value for key, value in group.items() if key != "params"})
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("error", [RuntimeError("user's"), KeyboardInterrupt()])
def test_an_exception_in_the_closure_leaves_the_groups_and_the_state_dict_alone(error: BaseException) -> None:
    model, optimizer, _ = ruled_sgd(momentum=0.9)
    train(model, optimizer, steps=2)
    before, state = snapshot(optimizer), copy.deepcopy(optimizer.state_dict())

    def closure() -> Tensor:
        assert snapshot(optimizer) == before
        raise error

    with pytest.raises(type(error)):
        optimizer.step(closure)
    assert snapshot(optimizer) == before
    assert optimizer.state_dict()["param_groups"] == state["param_groups"]
    train(model, optimizer, steps=1)  # and the rule is still in force
    assert optimizer.param_groups[0]["lr"] == LR


def test_an_exception_in_the_middle_of_the_update_leaves_the_groups_alone() -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            assert len(self.param_groups) == 2
            raise RuntimeError("in the update")

    model = residual_net()
    optimizer = Failing(model.parameters(), lr=LR)
    before = snapshot(optimizer)
    with ScaleUpdateRule(optimizer, scales(model), C), pytest.raises(RuntimeError, match="in the update"):
        optimizer.step()
    assert snapshot(optimizer) == before


def test_a_state_dict_taken_inside_the_closure_is_that_of_an_optimizer_without_the_rule() -> None:
    def run(with_rule: bool) -> list[Any]:
        model = residual_net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        rule = ScaleUpdateRule(optimizer, scales(model), C) if with_rule else None
        taken: list[Any] = []

        def closure() -> Tensor:
            taken.append(copy.deepcopy(optimizer.state_dict()))
            loss = model(images(4)[0]).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        taken.append(optimizer.state_dict())
        assert rule is None or active_rule(optimizer) is rule
        return taken

    for plain, ruled in zip(run(False), run(True), strict=True):
        assert ruled["param_groups"] == plain["param_groups"]
        assert ruled["state"].keys() == plain["state"].keys()


def test_optimizer_state_moves_freely_between_runs_with_and_without_the_rule() -> None:
    model, optimizer, rule = ruled_sgd(momentum=0.9)
    train(model, optimizer, steps=3)
    plain = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=1.0, momentum=0.9)
    plain.load_state_dict(optimizer.state_dict())
    assert plain.param_groups[0]["lr"] == LR
    optimizer.load_state_dict(plain.state_dict())
    train(model, optimizer, steps=1)
    assert rule.learning_rates() == [LR / C]


def test_a_run_that_is_stopped_and_loaded_ends_as_one_that_was_not_stopped() -> None:
    whole, optimizer, _ = ruled_sgd(momentum=0.9, weight_decay=0.01)
    train(whole, optimizer, steps=STEPS)
    half, optimizer, _ = ruled_sgd(momentum=0.9, weight_decay=0.01)
    inputs, targets = images(8 * STEPS)
    for step in range(STEPS):
        if step == 7:
            file = io.BytesIO()
            torch.save((half.state_dict(), optimizer.state_dict()), file)
            file.seek(0)
            half, optimizer, _ = ruled_sgd(momentum=0.9, weight_decay=0.01)
            weights, state = torch.load(file, weights_only=True)
            half.load_state_dict(weights)
            optimizer.load_state_dict(state)
        optimizer.zero_grad()
        cross_entropy(half(inputs[8 * step : 8 * step + 8]), targets[8 * step : 8 * step + 8]).backward()
        optimizer.step()
    assert_same_parameters(whole, half)


def test_groups_that_are_added_later_are_covered() -> None:
    hand, ruled = residual_net(), residual_net()
    late = {id(p) for p in ruled.bn2.parameters()}
    optimizer = torch.optim.SGD([p for p in ruled.parameters() if id(p) not in late], lr=LR)
    with ScaleUpdateRule(optimizer, scales(ruled), C):
        train(ruled, optimizer, steps=2)
        optimizer.add_param_group({"params": list(ruled.bn2.parameters()), "lr": 0.3})
        train(ruled, optimizer, steps=2)
    assert len(optimizer.param_groups) == 2

    own, late = {id(p) for p in scales(hand)}, {id(p) for p in hand.bn2.parameters()}
    optimizer = torch.optim.SGD(
        [
            {"params": [p for p in hand.parameters() if id(p) not in own | late]},
            {"params": [hand.stem[1].weight, hand.bn1.weight], "lr": LR / C},
        ],
        lr=LR,
    )
    train(hand, optimizer, steps=2)
    optimizer.add_param_group({"params": [hand.bn2.weight], "lr": 0.3 / C})
    optimizer.add_param_group({"params": [hand.bn2.bias], "lr": 0.3})
    train(hand, optimizer, steps=2)
    assert_same_parameters(hand, ruled)


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


def test_only_exempt_parameters_escape_weight_decay() -> None:
    model = residual_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    with ScaleUpdateRule(optimizer, [model.bn1.weight], C, weight_decay_exempt=[model.bn1.weight, model.head.weight]):
        optimizer.step()
    # SGD with gradient 0: p <- p - lr * decay * p
    factors = {"bn1.weight": 1.0, "head.weight": 1.0}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name] * factors.get(name, 1 - LR * 0.5))


def test_without_exemption_decay_acts_on_scales_at_their_own_learning_rate() -> None:
    model = residual_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with ScaleUpdateRule(optimizer, scales(model), C):
        optimizer.step()
    torch.testing.assert_close(model.bn1.weight, torch.full((6,), 1 - LR / C * 0.5))


@pytest.mark.parametrize("divisor", [1, 1.0, 0.5])
def test_a_divisor_up_to_one_switches_the_division_off(divisor: float) -> None:
    plain, ruled = residual_net(), residual_net()
    train(plain, torch.optim.SGD(plain.parameters(), lr=LR))
    optimizer = torch.optim.SGD(ruled.parameters(), lr=LR)
    with ScaleUpdateRule(optimizer, scales(ruled), divisor):
        train(ruled, optimizer)
    assert_same_parameters(plain, ruled)


@pytest.mark.parametrize("multiplier", [1, 1.0, np.float32(1)])
def test_a_multiplier_of_one_leaves_shifts_alone(multiplier: float) -> None:
    plain, ruled = residual_net(), residual_net()
    train(plain, torch.optim.SGD(plain.parameters(), lr=LR, weight_decay=0.1))
    optimizer = torch.optim.SGD(ruled.parameters(), lr=LR, weight_decay=0.1)
    with ScaleUpdateRule(optimizer, [], shifts=shifts(ruled), shift_multiplier=multiplier) as rule:
        assert rule.covered_shifts == 0
        train(ruled, optimizer)
    assert_same_parameters(plain, ruled)


def test_shifts_learn_faster_and_decay_as_before() -> None:
    model = residual_net()
    with torch.no_grad():
        for shift in shifts(model):
            shift.fill_(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model.bn1.bias.grad = torch.ones(6)
    exempt = [*scales(model), model.bn2.bias]
    with ScaleUpdateRule(optimizer, scales(model), C, exempt, shifts=shifts(model), shift_multiplier=10.0):
        optimizer.step()
    torch.testing.assert_close(model.bn1.bias, torch.full((6,), 1 - LR * 10 - LR * 0.5))
    torch.testing.assert_close(model.stem[1].bias, torch.full((6,), 1 - LR * 0.5))
    assert torch.equal(model.bn2.bias, torch.ones(6))
    assert torch.equal(model.bn1.weight, torch.ones(6))


def test_a_multiplier_below_one_slows_shifts() -> None:
    model = residual_net()
    model.bn1.bias.grad = torch.ones(6)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with ScaleUpdateRule(optimizer, [], shifts=shifts(model), shift_multiplier=0.1):
        optimizer.step()
    torch.testing.assert_close(model.bn1.bias, torch.full((6,), -LR * 0.1))


@pytest.mark.parametrize("multiplier", [0, -1.0, float("nan"), float("inf")])
def test_a_multiplier_that_is_not_finite_and_positive_is_refused(multiplier: float) -> None:
    model = residual_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with pytest.raises(ValueError, match="the multiplier of the shifts' learning rate must be finite and positive"):
        ScaleUpdateRule(optimizer, [], shifts=shifts(model), shift_multiplier=multiplier)
    with pytest.raises(ValueError, match="the multiplier of the shifts' learning rate must be finite and positive"):
        scale_param_groups(model, LR, shift_multiplier=multiplier)
    assert hooks_of(optimizer) == 0


def test_a_parameter_cannot_be_scale_and_shift() -> None:
    model = residual_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with pytest.raises(ValueError, match="among the scales and among the shifts"):
        ScaleUpdateRule(optimizer, scales(model), shifts=scales(model), shift_multiplier=2.0)


def test_the_report_lists_the_shifts_that_the_rule_takes() -> None:
    model = residual_net(zero_init_residual=True)
    model.bn1.bias.requires_grad_(False)  # it may be unfrozen later
    report = init_batch_norms(model, exclude=["stem.1"])
    assert [id(p) for p in report.scales] == [id(model.bn1.weight)]
    assert [id(p) for p in report.shifts] == [id(model.bn1.bias), id(model.bn2.bias)]
    front = nn.Sequential(InputBatchNorm(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False))
    assert [id(p) for p in init_batch_norms(front).shifts] == [id(front[1].bias)]


def hooks_of(optimizer: Optimizer) -> int:
    return sum(len(value) for key, value in vars(optimizer).items() if key.endswith("_hooks"))


def test_remove_leaves_no_hook_and_the_full_learning_rate() -> None:
    model = residual_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    keys = set(vars(optimizer))
    rule = ScaleUpdateRule(optimizer, scales(model), C)
    assert active_rule(optimizer) is rule
    train(model, optimizer, steps=1)
    rule.remove()
    rule.remove()
    assert hooks_of(optimizer) == 0
    assert set(vars(optimizer)) == keys
    assert type(optimizer) is torch.optim.SGD
    assert active_rule(optimizer) is None
    before = model.bn1.weight.detach().clone()
    model.bn1.weight.grad = torch.ones(6)
    optimizer.step()
    torch.testing.assert_close(before - model.bn1.weight, torch.full((6,), LR), rtol=1e-3, atol=0)


def test_copies_and_pickles_of_the_optimizer_do_not_carry_the_rule() -> None:
    _, optimizer, _ = ruled_sgd()
    assert hooks_of(copy.deepcopy(optimizer)) == 0
    assert active_rule(copy.deepcopy(optimizer)) is None


def test_an_optimizer_with_a_rule_is_collected_like_any_other() -> None:
    model, optimizer, rule = ruled_sgd()
    train(model, optimizer, steps=2)
    gone = weakref.ref(optimizer)
    del optimizer, rule
    gc.collect()
    assert gone() is None


def test_memory_does_not_grow_with_steps() -> None:
    model, optimizer, rule = ruled_sgd(momentum=0.9)

    def objects_after(steps: int) -> int:
        for _ in range(steps):
            optimizer.step()
        gc.collect()
        return len(gc.get_objects())

    train(model, optimizer, steps=2)
    first = objects_after(50)
    assert objects_after(500) - first < 50
    assert rule.covered == 3


def test_lr_schedulers_made_after_or_before_the_rule_wrap_the_same_step() -> None:
    model, optimizer, _ = ruled_sgd()
    scheduler = sched.StepLR(optimizer, 1, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns if it does not see the optimizer step before the scheduler
        train(model, optimizer, scheduler, steps=2)
    assert optimizer.param_groups[0]["lr"] == LR / 4


def test_a_subclass_that_calls_the_step_of_its_base_divides_once() -> None:
    torch.optim.SGD(residual_net().parameters(), lr=LR)  # from now on SGD.step runs hooks of its own

    class Outer(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    model = residual_net()
    optimizer = Outer(model.parameters(), lr=LR)
    assert Outer.step is not torch.optim.SGD.step
    model.bn1.weight.grad = torch.ones(6)
    with ScaleUpdateRule(optimizer, scales(model), C):
        optimizer.step()
    torch.testing.assert_close(1 - model.bn1.weight, torch.full((6,), LR / C), rtol=1e-3, atol=0)


def test_hooks_of_the_user_see_the_optimizer_itself() -> None:
    model, optimizer, _ = ruled_sgd()
    seen: list[tuple[bool, int]] = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append((opt is optimizer, len(opt.param_groups))))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append((opt is optimizer, len(opt.param_groups))))
    train(model, optimizer, steps=1)
    assert seen == [(True, 1), (True, 1)]


def test_attributes_that_the_step_sets_reach_the_optimizer() -> None:
    class Remembering(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            self.steps = getattr(self, "steps", 0) + 1
            assert isinstance(self, Remembering)
            return super().step(closure)

    model = residual_net()
    optimizer = Remembering(model.parameters(), lr=LR)
    with ScaleUpdateRule(optimizer, scales(model), C):
        train(model, optimizer, steps=3)
    assert optimizer.steps == 3


def test_a_gradient_scaler_steps_through_the_rule_and_skips_on_overflow() -> None:
    hand, ruled = residual_net(), residual_net()
    pairs = [
        (hand, torch.optim.SGD(by_hand(hand, LR, 0.0), lr=LR, fused=True), None),
        (ruled, torch.optim.SGD(ruled.parameters(), lr=LR, fused=True), True),
    ]
    for model, optimizer, with_rule in pairs:
        rule = ScaleUpdateRule(optimizer, scales(model), C) if with_rule else None
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale(model(images(8, seed=step)[0]).square().mean()).backward()
            if step == 2:
                model.head.weight.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 4.0
        assert rule is None or len(optimizer.param_groups) == 1
    assert_same_parameters(hand, ruled)


def test_the_rule_says_when_the_optimizer_holds_none_of_the_scales() -> None:
    optimizer = torch.optim.SGD(residual_net().parameters(), lr=LR)
    with (
        ScaleUpdateRule(optimizer, scales(residual_net()), C),
        pytest.warns(UserWarning, match="has no effect: the optimizer holds none of these parameters"),
    ):
        optimizer.step()


@pytest.mark.parametrize("divisor", [0, -1.0, float("nan"), float("inf")])
def test_a_divisor_that_is_not_finite_and_positive_is_refused(divisor: float) -> None:
    model = residual_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with pytest.raises(ValueError, match="must be finite and positive, got"):
        ScaleUpdateRule(optimizer, scales(model), divisor)
    with pytest.raises(ValueError, match="must be finite and positive, got"):
        scale_param_groups(model, lr=LR, divisor=divisor)
    assert hooks_of(optimizer) == 0


@pytest.mark.parametrize("divisor", ["big", None, True])
def test_a_divisor_that_is_no_number_is_refused(divisor: Any) -> None:
    model = residual_net()
    with pytest.raises(TypeError, match="must be a number, got"):
        ScaleUpdateRule(torch.optim.SGD(model.parameters(), lr=LR), scales(model), divisor)


def test_lbfgs_is_refused_by_name() -> None:
    model = residual_net()
    with pytest.raises(ValueError, match="LBFGS takes one step for all parameters in one group"):
        ScaleUpdateRule(torch.optim.LBFGS(model.parameters()), scales(model))


def test_an_optimizer_around_an_optimizer_is_refused_with_the_remedy() -> None:
    class Wrapper(torch.optim.SGD):
        def __init__(self, inner: Optimizer) -> None:
            super().__init__(inner.param_groups, lr=LR)
            self.inner = inner

    model = residual_net()
    optimizer = Wrapper(torch.optim.SGD(model.parameters(), lr=LR))
    with pytest.raises(ValueError, match=r"Wrapper wraps another optimizer \(its attribute 'inner'\)"):
        ScaleUpdateRule(optimizer, scales(model))


@pytest.mark.parametrize(
    "stand_in", [lambda own: L.Fabric(accelerator="cpu").setup_optimizers(own), LightningOptimizer]
)
def test_the_stand_in_of_fabric_and_of_lightning_counts_as_the_optimizer_itself(stand_in: Any) -> None:
    model = residual_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    outer = stand_in(optimizer)
    rule = ScaleUpdateRule(outer, scales(model), C)
    assert rule.optimizer is optimizer
    assert scale_learning_rates(outer, []) == [LR / C]
    with pytest.raises(ValueError, match="this SGD has a ScaleUpdateRule already"):
        ScaleUpdateRule(outer, scales(model), C)


def test_an_optimizer_without_step_hooks_is_refused() -> None:
    class Unhooked(Optimizer):
        def __init__(self, params: Iterator[nn.Parameter]) -> None:
            self.param_groups = [{"params": list(params), "lr": LR}]

        def step(self, closure: Any = None) -> None:
            raise AssertionError

    model = residual_net()
    with pytest.raises(ValueError, match=r"Unhooked.step\(\) does not run torch's step hooks"):
        ScaleUpdateRule(Unhooked(model.parameters()), scales(model))


def test_an_optimizer_that_keeps_its_parameters_elsewhere_is_found_out_at_its_first_update() -> None:
    class Flat(torch.optim.SGD):
        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, lr=lr)
            self.flat = [p for group in self.param_groups for p in group["params"]]
            self.calls = 0

        def step(self, closure: Any = None) -> None:
            self.calls += 1
            if self.calls > 1:
                for parameter in self.flat:
                    parameter.data -= 0.1

    model = residual_net()
    elsewhere = nn.Parameter(torch.ones(0))  # a scale of which FSDP1 has put no part on this rank
    optimizer = Flat([elsewhere, *model.parameters()], lr=LR)
    ScaleUpdateRule(optimizer, [elsewhere, *scales(model)])
    optimizer.step()  # it may skip a step, on overflow say
    with pytest.raises(RuntimeError, match=r"Flat.step\(\) did not update from its param_groups"):
        optimizer.step()


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_a_hook_that_replaces_the_arguments_of_the_step_is_found_out_at_that_step(first: int, fused: bool) -> None:
    model, optimizer, _ = ruled_sgd(fused=fused)
    train(model, optimizer, steps=first)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, *args[1:]), kwargs))
    with pytest.raises(RuntimeError, match="look for a step hook that replaces the step's arguments"):
        train(model, optimizer, steps=1)


def test_a_hook_may_replace_the_arguments_where_the_rule_covers_nothing() -> None:
    model = residual_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, *args[1:]), kwargs))
    with ScaleUpdateRule(optimizer, scales(residual_net()), C, warn_if_unused=False) as rule:
        optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, *args[1:]), kwargs))
        train(model, optimizer, steps=2)
        assert rule.updates == 0


class Wandering(torch.optim.SGD):
    """SGD that reads its groups at first, and later updates what it has remembered of them."""

    def __init__(self, params: Any, lr: float, through_data: bool) -> None:
        super().__init__(params, lr=lr)
        self.remembered = [p for group in self.param_groups for p in group["params"]]
        self.through_data = through_data
        self.wanders = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if not self.wanders:
            super().step()
        for parameter in self.remembered if self.wanders else ():
            (parameter.data if self.through_data else parameter).sub_(parameter.grad, alpha=LR)


@pytest.mark.parametrize("through_data", [False, True])
def test_an_update_that_did_not_read_the_groups_is_found_out_whenever_it_comes(through_data: bool) -> None:
    model = residual_net()
    optimizer = Wandering(model.parameters(), LR, through_data)
    with ScaleUpdateRule(optimizer, scales(model), C) as rule:
        train(model, optimizer, steps=3, closure=False)
        optimizer.wanders = True
        if through_data:  # moves no version counter: this step leaves a doubt, and the next is looked at closely
            train(model, optimizer, steps=1, closure=False)
        with pytest.raises(RuntimeError, match=r"Wandering.step\(\) did not update from its param_groups"):
            train(model, optimizer, steps=1, closure=False)
        assert rule.updates == 3


def test_the_parameter_that_tells_of_updates_is_one_that_learns() -> None:
    model = residual_net()
    optimizer = Wandering(model.parameters(), LR, through_data=False)
    with ScaleUpdateRule(optimizer, scales(model), C):
        train(model, optimizer, steps=1, closure=False)
        model.stem[1].weight.requires_grad_(False)
        model.stem[1].weight.grad = None
        optimizer.remembered = [p for p in optimizer.remembered if p.requires_grad]
        optimizer.wanders = True
        with pytest.raises(RuntimeError, match="did not update from its param_groups"):
            optimizer.step()


def test_a_closure_may_change_parameters_in_a_step_that_is_skipped() -> None:
    class Skipping(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return closure()

    model = residual_net()
    optimizer = Skipping(model.parameters(), lr=LR)

    @torch.no_grad()
    def clamp() -> None:
        for scale in scales(model):
            scale.sub_(0.1)

    with ScaleUpdateRule(optimizer, scales(model), C) as rule:
        for _ in range(3):
            optimizer.step(clamp)
        assert rule.updates == 0


def test_updates_stand_still_where_the_step_was_replaced() -> None:
    model, optimizer, rule = ruled_sgd()
    train(model, optimizer, steps=2)
    assert rule.updates == 2
    optimizer.step = functools.partial(type(optimizer).step.__wrapped__, optimizer)
    train(model, optimizer, steps=2)
    assert rule.updates == 2


def test_an_optimizer_may_skip_steps_at_any_time() -> None:
    class Skipping(torch.optim.SGD):
        skip = True

        def step(self, closure: Any = None) -> Any:
            return None if self.skip else super().step(closure)

    model = residual_net()
    optimizer = Skipping(model.parameters(), lr=LR)
    with ScaleUpdateRule(optimizer, scales(model), C):
        for optimizer.skip in (True, False, True):
            train(model, optimizer, steps=1)
    assert not torch.equal(model.bn1.bias, torch.zeros(6))


def test_an_optimizer_that_replaces_its_groups_while_stepping_is_told_so() -> None:
    class Replacing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            self.param_groups = list(self.param_groups)

    model = residual_net()
    optimizer = Replacing(model.parameters(), lr=LR)
    ScaleUpdateRule(optimizer, scales(model))
    with pytest.raises(RuntimeError, match=r"Replacing.step\(\) replaces its param_groups"):
        optimizer.step()


def test_a_second_rule_for_the_same_scales_is_refused() -> None:
    model, optimizer, _ = ruled_sgd()
    with pytest.raises(ValueError, match="has a ScaleUpdateRule already"):
        ScaleUpdateRule(optimizer, scales(model))


def test_a_group_without_a_learning_rate_is_refused() -> None:
    model = residual_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match="parameter group 0 of SGD has lr=None"):
        ScaleUpdateRule(optimizer, scales(model))


def test_what_is_no_optimizer_or_no_parameter_is_refused() -> None:
    model = residual_net()
    with pytest.raises(TypeError, match=r"needs a torch.optim.Optimizer, got list"):
        ScaleUpdateRule([], scales(model))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="scales takes parameters, got str"):
        ScaleUpdateRule(torch.optim.SGD(model.parameters(), lr=LR), ["bn1"])  # type: ignore[list-item]


def test_true_learning_rates_are_told_with_and_without_the_rule() -> None:
    model, optimizer, rule = ruled_sgd()
    assert rule.learning_rates() == scale_learning_rates(optimizer, []) == [LR / C]
    rule.remove()
    assert scale_learning_rates(optimizer, scales(model)) == [LR]
    permanent = torch.optim.SGD(scale_param_groups(model, lr=LR), lr=LR)
    with ScaleUpdateRule(permanent, scales(model), C) as rule:
        assert rule.learning_rates() == [LR / C]
        assert rule.covered == 0


def test_true_learning_rates_of_shifts_are_told_with_and_without_the_rule() -> None:
    model = residual_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with ScaleUpdateRule(optimizer, [], shifts=shifts(model), shift_multiplier=10) as rule:
        assert rule.shift_learning_rates() == shift_learning_rates(optimizer, []) == [LR * 10]
        assert (rule.covered, rule.covered_shifts) == (0, 3)
        assert rule.learning_rates() == []
        assert repr(rule) == (
            "ScaleUpdateRule(SGD, 0 scales, divisor=100, 3 shifts, shift_multiplier=10, 0 without weight decay)"
        )
    assert shift_learning_rates(optimizer, shifts(model)) == [LR]
    permanent = torch.optim.SGD(scale_param_groups(model, lr=LR, shift_multiplier=10), lr=LR)
    with ScaleUpdateRule(permanent, scales(model), C, shifts=shifts(model), shift_multiplier=10) as rule:
        assert rule.shift_learning_rates() == [LR * 10]
        assert rule.covered_shifts == 0
