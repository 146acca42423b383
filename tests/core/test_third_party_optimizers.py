"""Optimizers of other libraries: the rule equals groups made by hand, to the bit, or says what to do instead.

A sample of each package; `benchmarks/optimizer_zoo.py` tries every class of many more, and writes docs/optimizers.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import adabound
import heavyball
import lion_pytorch
import prodigyopt
import pytest
import pytorch_optimizer
import schedulefree
import timm.optim
import torch
import torch_optimizer
from helpers.by_hand import LR, MULTIPLIERS, C, by_hand
from helpers.loop import train
from helpers.models import assert_same_parameters, images, residual_net, scales, shifts
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from lightning_revbn import ScaleUpdateRule, scale_param_groups
from lightning_revbn.core.param_groups import is_divided

Make = Callable[[Any], Optimizer]

NEED_CUDA = ("bnb", "fused")  # bitsandbytes and apex
SECOND_ORDER = {"adahessian"}  # needs backward(create_graph=True)
COMPILED = "kron"  # for minutes
NAMES = [
    name
    for name in timm.optim.list_optimizers()
    if not name.startswith((*NEED_CUDA, COMPILED)) and name not in SECOND_ORDER
]

SAMPLE = {
    torch.optim: (
        *("Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
    ),
    pytorch_optimizer: (
        *("AdaBelief", "AdamP", "Adan", "ADOPT", "CAME", "Lamb", "LARS", "Lion", "MADGRAD", "SOAP", "StableAdamW"),
    ),
    torch_optimizer: (
        *("AccSGD", "AdaBelief", "AdamP", "AggMo", "DiffGrad", "Lamb", "MADGRAD", "NovoGrad", "QHAdam", "RAdam"),
        *("SGDW", "SWATS", "Yogi"),
    ),
    heavyball: ("SGD", "AdamW", "NAdam", "ADOPT", "LaProp", "Muon", "RMSprop", "SOAP"),
    lion_pytorch: ("Lion",),
}
NO_DECAY = {"Rprop"}


def made(make: Callable[..., Optimizer], **options: Any) -> Make:
    return lambda params: make(params, lr=LR, **options)


def of_sample(package: Any, name: str) -> Make:
    return made(getattr(package, name), **({} if name in NO_DECAY else {"weight_decay": 0.01}))


SAMPLED: dict[str, Make] = {
    f"{package.__name__}-{name}": of_sample(package, name) for package, names in SAMPLE.items() for name in names
}
# Without `normalize_lr=False` it divides by 3 the learning rate of its argument, and not those of groups made by hand.
SAMPLED["pytorch_optimizer-GrokFastAdamW"] = made(
    pytorch_optimizer.GrokFastAdamW, weight_decay=0.01, normalize_lr=False
)
for _each in ("SGDScheduleFree", "AdamWScheduleFree", "RAdamScheduleFree"):  # weights that follow from no learning rate
    SAMPLED[f"schedulefree-{_each}"] = made(getattr(schedulefree, _each), weight_decay=0.01, weight_lr_power=0.0)


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heavyball.utils, "compile_mode", None)


def trained(make: Make, multiplier: float, with_rule: bool, decay: float | None = 0.01, scheduled: bool = False) -> Any:
    """Train by the rule, or with groups made by hand; with a warm-up if `scheduled`."""
    model = residual_net()
    optimizer: Any = make(list(model.parameters()) if with_rule else by_hand(model, LR, decay, multiplier=multiplier))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2) if scheduled else None
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()  # schedule-free optimizers
    torch.manual_seed(0)  # some draw random numbers
    if with_rule:
        own = {"shifts": shifts(model), "shift_multiplier": multiplier}
        with ScaleUpdateRule(optimizer, scales(model), C, scales(model), **own):
            train(model, optimizer, schedule, steps=6)
    else:
        train(model, optimizer, schedule, steps=6)
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")  # deprecations inside some of them
@pytest.mark.parametrize(
    ("name", "multiplier"), [(name, 10.0) for name in NAMES] + [(name, 1.0) for name in NAMES[::3]]
)
def test_the_rule_equals_groups_made_by_hand(name: str, multiplier: float) -> None:
    def make(params: Any) -> Optimizer:
        return timm.optim.create_optimizer_v2(params, opt=name, lr=LR, weight_decay=0.01)

    assert_same_parameters(trained(make, multiplier, False), trained(make, multiplier, True))


def test_most_of_timms_optimizers_are_tried() -> None:
    assert len(NAMES) > 80


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("multiplier", MULTIPLIERS)
@pytest.mark.parametrize("name", SAMPLED)
def test_a_sample_of_each_package_equals_groups_made_by_hand(name: str, multiplier: float) -> None:
    make = SAMPLED[name]
    decay = None if "weight_decay" not in make(residual_net().parameters()).param_groups[0] else 0.01
    hand, ruled = trained(make, multiplier, False, decay), trained(make, multiplier, True, decay)
    assert not torch.equal(hand.bn1.weight, residual_net().bn1.weight)
    assert_same_parameters(hand, ruled)


# --- state that an optimizer keeps in a group -------------------------------------------------------------------------

IN_GROUPS: dict[str, tuple[Make, tuple[float, ...]]] = {  # with the multipliers that the rule takes
    "SGDScheduleFree": (made(schedulefree.SGDScheduleFree), (1.0,)),
    "AdamWScheduleFree": (made(schedulefree.AdamWScheduleFree), (1.0,)),
    "ScheduleFreeSGD": (made(pytorch_optimizer.ScheduleFreeSGD), (1.0,)),
    "AvaGrad": (made(pytorch_optimizer.AvaGrad), MULTIPLIERS),
}


@pytest.mark.parametrize(
    ("name", "multiplier"), [(name, each) for name, (_, multipliers) in IN_GROUPS.items() for each in multipliers]
)
def test_state_in_a_group_is_shared_which_moves_scales_a_little_otherwise(name: str, multiplier: float) -> None:
    make, _ = IN_GROUPS[name]
    hand = trained(make, multiplier, False, 0.0, scheduled=True)
    ruled = trained(make, multiplier, True, 0.0, scheduled=True)
    with torch.no_grad():
        apart = sum(float((a - b).square().sum()) for a, b in zip(scales(hand), scales(ruled), strict=True))
        moved = sum(float((a - 1.0).square().sum()) for a in scales(hand))
    assert 0 < (apart / moved) ** 0.5 < 0.1


@pytest.mark.parametrize(
    ("make", "multiplier"),
    [
        (made(schedulefree.SGDScheduleFree), 10.0),
        (made(schedulefree.RAdamScheduleFree), 10.0),
        (made(pytorch_optimizer.ScheduleFreeAdamW), 10.0),
        (made(heavyball.SFAdamW), 1.0),
    ],
)
def test_averages_that_would_be_weighed_wrongly_are_refused(make: Make, multiplier: float) -> None:
    with pytest.raises(ValueError, match=r"averages its parameters .*scale_param_groups.* or set weight_lr_power=0"):
        trained(make, multiplier, True)


def test_heavyballs_schedule_free_adamw_works_without_the_weights() -> None:
    make = made(heavyball.SFAdamW, weight_lr_power=0.0)
    assert_same_parameters(trained(make, 10.0, False, 0.0), trained(make, 10.0, True, 0.0))


# --- optimizers that take no divided groups ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", [made(adabound.AdaBound), made(torch_optimizer.AdaBound)])
def test_adabound_is_refused_before_it_has_updated(make: Make) -> None:
    model = residual_net()
    optimizer = make(model.parameters())
    with (
        ScaleUpdateRule(optimizer, scales(model), C),
        pytest.raises(RuntimeError, match=r"pairs its 'base_lrs'.* Nothing was updated"),
    ):
        train(model, optimizer, steps=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), residual_net().parameters(), strict=True))


@pytest.mark.parametrize("with_rule", [False, True], ids=["by hand", "by the rule"])
def test_prodigy_takes_one_learning_rate_alone(with_rule: bool) -> None:
    with pytest.raises(RuntimeError, match="Setting different lr values in different parameter groups"):
        trained(prodigyopt.Prodigy, 1.0, with_rule)


def test_a_learning_rate_that_follows_from_the_norm_of_a_group_is_refused() -> None:
    model = residual_net()
    said = r"group 0 of ASGD estimates its learning rate from all its parameters together .*scale_param_groups"
    with pytest.raises(ValueError, match=said):
        ScaleUpdateRule(pytorch_optimizer.ASGD(model.parameters(), lr=LR), scales(model))


def test_optimizers_in_a_list_are_found() -> None:
    model = residual_net()
    optimizer = heavyball.SplitOpt([{"params": list(model.parameters()), "optimizer": heavyball.AdamW, "lr": LR}])
    with pytest.raises(ValueError, match=r"SplitOpt wraps another optimizer \(its attribute 'optimizers'\)"):
        ScaleUpdateRule(optimizer, scales(model))


def test_an_optimizer_without_a_learning_rate_is_told_so() -> None:
    model = residual_net()
    with pytest.raises(ValueError, match=r"parameter group 0 of AliG has no learning rate: .* no 'lr' to divide"):
        ScaleUpdateRule(pytorch_optimizer.AliG(model.parameters()), scales(model))


@pytest.mark.filterwarnings("ignore:you need to install `transformers`:ImportWarning")
@pytest.mark.parametrize("cls", [pytorch_optimizer.LOMO, pytorch_optimizer.AdaLOMO])
def test_an_optimizer_that_updates_in_the_backward_pass_is_refused(cls: type[Any]) -> None:
    model = residual_net()
    with pytest.raises(ValueError, match=rf"{cls.__name__} updates during the backward pass \(fused_backward\)"):
        ScaleUpdateRule(cls(model, lr=LR), scales(model))


# --- optimizers around another one ------------------------------------------------------------------------------------


def inner(params: Any) -> Optimizer:
    return torch.optim.SGD(params, lr=LR, momentum=0.9, weight_decay=0.01)


Wrap = Callable[[Any], Any]
WRAPPERS: dict[str, tuple[Wrap, str]] = {  # from parameters, and the attribute that holds the optimizer inside
    "timm-Lookahead": (lambda params: timm.optim.Lookahead(inner(params), k=2), "_base_optimizer"),
    "pytorch_optimizer-Lookahead": (lambda params: pytorch_optimizer.Lookahead(inner(params), k=2), "optimizer"),
    "pytorch_optimizer-SAM": (
        lambda params: pytorch_optimizer.SAM(params, torch.optim.SGD, lr=LR, momentum=0.9, weight_decay=0.01),
        "base_optimizer",
    ),
}
each_wrapper = pytest.mark.parametrize(("wrap", "attribute"), WRAPPERS.values(), ids=WRAPPERS)


def train_twice_a_step(model: nn.Module, optimizer: Any) -> nn.Module:
    """Compute gradients before the step and in its closure, as sharpness-aware minimisation wants it."""
    inputs, targets = images(48)
    for x, y in zip(inputs.split(8), targets.split(8), strict=True):

        def compute(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        compute()
        optimizer.step(compute)
    return model


def in_order(model: nn.Module) -> list[dict[str, Any]]:
    """A group for each parameter: SAM sums the norm of the gradients in the order of the groups."""
    own = {id(scale) for scale in scales(model)}
    return [
        {"params": [p], "lr": LR / C, "weight_decay": 0.0} if id(p) in own else {"params": [p]}
        for p in model.parameters()
    ]


@each_wrapper
def test_an_optimizer_around_another_is_refused_by_name_with_the_remedy(wrap: Wrap, attribute: str) -> None:
    model = residual_net()
    optimizer = wrap(model.parameters())
    said = rf"{type(optimizer).__name__} wraps another optimizer \(its attribute '{attribute}'\).* scale_param_groups"
    with pytest.raises(ValueError, match=said):
        ScaleUpdateRule(optimizer, scales(model))


@each_wrapper
def test_the_rule_on_the_optimizer_inside_equals_groups_made_by_hand(wrap: Wrap, attribute: str) -> None:
    hand, ruled = residual_net(), residual_net()
    train_twice_a_step(hand, wrap(in_order(hand)))
    optimizer = wrap(ruled.parameters())
    with ScaleUpdateRule(getattr(optimizer, attribute), scales(ruled), C, scales(ruled)):
        train_twice_a_step(ruled, optimizer)
    assert_same_parameters(hand, ruled)


@each_wrapper
def test_a_wrapper_built_from_permanent_groups_needs_no_rule(wrap: Wrap, attribute: str) -> None:
    model = residual_net()
    own = scales(model)
    assert is_divided(wrap(scale_param_groups(model, LR, 0.01)), own, own)
    assert not is_divided(wrap(model.parameters()), own, own)
    assert not is_divided(wrap(by_hand(model, LR, 0.01)), own, own)  # whatever the reason for groups like these is
    assert not is_divided(wrap(residual_net().parameters()), own, own)  # holds none now, but may be given some later
    decaying = scale_param_groups(model, LR, 0.01, weight_decay_exempt=None)
    assert not is_divided(wrap(decaying), own, own)
    assert is_divided(wrap(decaying), own, [])
    some = scale_param_groups(model, LR, exclude=["bn1"])
    assert not is_divided(wrap(some), own, [])
