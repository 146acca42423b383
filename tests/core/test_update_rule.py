"""The rule against parameter groups made by hand, and against everything that could see or lose the division."""

from __future__ import annotations

import copy
import gc
import io
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest
import torch
from helpers.by_hand import LR, C, by_hand
from helpers.loop import STEPS, ruled_sgd, train
from helpers.models import assert_same_parameters, images, residual_net, scales
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim import lr_scheduler as sched

from lightning_revbn import ScaleUpdateRule, scale_param_groups
from lightning_revbn.core.update_rule import active_rule, scale_learning_rates

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
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("options", [pytest.param(options, id=name) for name, options in KINDS])
def test_the_rule_equals_groups_made_by_hand_to_the_bit(options: dict[str, Any], schedule: str) -> None:
    hand, ruled = residual_net(), residual_net()
    optimizer = build(options, by_hand(hand, LR, options.get("weight_decay")))
    train(hand, optimizer, SCHEDULES[schedule](optimizer))

    optimizer = build(options, ruled.parameters())
    scheduler = SCHEDULES[schedule](optimizer)
    with ScaleUpdateRule(optimizer, scales(ruled), C, weight_decay_exempt=scales(ruled)):
        train(ruled, optimizer, scheduler)

    assert_same_parameters(hand, ruled)
    assert not torch.equal(ruled.bn1.weight, torch.ones(6))


@settings(max_examples=40, deadline=None)
@given(
    options=st.sampled_from([options for _, options in KINDS]),
    lr=st.floats(1e-4, 0.2),
    divisor=st.floats(1.5, 1e4),
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    exempt=st.booleans(),
    closure=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_rule_equals_groups_made_by_hand_for_random_models_and_settings(
    options: dict[str, Any], lr: float, divisor: float, widths: list[int], exempt: bool, closure: bool, seed: int
) -> None:
    def network() -> nn.Module:
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for before, after in zip([3, *widths], widths, strict=False):
            layers += [nn.Conv2d(before, after, 1), nn.BatchNorm2d(after), nn.LeakyReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 5))

    hand, ruled = network(), network()
    groups = by_hand(hand, lr, options.get("weight_decay") if exempt else None, divisor)
    train(hand, build(options, groups, lr=lr), steps=5, closure=closure)
    optimizer = build(options, ruled.parameters(), lr=lr)
    with ScaleUpdateRule(optimizer, scales(ruled), divisor, scales(ruled) if exempt else ()):
        train(ruled, optimizer, steps=5, closure=closure)
    assert_same_parameters(hand, ruled)


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


def test_a_hook_that_replaces_the_arguments_of_the_step_is_found_out() -> None:
    model, optimizer, _ = ruled_sgd()
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, *args[1:]), kwargs))
    with pytest.raises(RuntimeError, match="look for a step hook that replaces the step's arguments"):
        train(model, optimizer, steps=1)


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


def test_a_second_rule_on_one_optimizer_is_refused() -> None:
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
