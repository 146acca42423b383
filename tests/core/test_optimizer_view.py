"""Optimizers that look at themselves inside their step: each finds there what it finds without a rule."""

from __future__ import annotations

import abc
import copy
import functools
import gc
import pickle
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from helpers.by_hand import LR, C
from helpers.loop import train
from helpers.models import residual_net, scales
from torch import nn
from torch.optim import SGD, Optimizer

from lightning_revbn import ScaleUpdateRule


def with_rule(cls: Callable[..., Optimizer], steps: int = 1, **options: Any) -> tuple[nn.Module, Any, ScaleUpdateRule]:
    """Train with a rule, and make sure that scales have learned with lr / c: SGD without momentum adds steps up."""
    model = residual_net()
    optimizer = cls(model.parameters(), lr=LR, **options)
    rule = ScaleUpdateRule(optimizer, scales(model), C)
    for _ in range(steps):
        train(model, optimizer, steps=1)
        before, gradient = model.bn1.weight.detach().clone(), torch.ones(6)
        model.bn1.weight.grad = gradient
        optimizer.step()
        torch.testing.assert_close(before - model.bn1.weight, torch.full((6,), LR / C), rtol=1e-3, atol=0)
    assert len(optimizer.param_groups) == 1
    return model, optimizer, rule


def test_slots_belong_to_the_optimizer() -> None:
    class Slotted(SGD):
        __slots__ = ("__secret", "count", "gone", "me")

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.count = 0
            self.__secret = 1

        def step(self, closure: Any = None) -> Any:
            self.count += self.__secret
            self.gone = 1
            del self.gone
            assert not hasattr(self, "gone")
            self.me = self
            return super().step(closure)

    _, optimizer, _ = with_rule(Slotted)
    assert optimizer.count == 2
    assert optimizer.me is optimizer


def test_an_own_setattr_runs() -> None:
    class Noting(SGD):
        def __setattr__(self, name: str, value: Any) -> None:
            self.__dict__.setdefault("noted", []).append(name)
            object.__setattr__(self, name, value)

        def step(self, closure: Any = None) -> Any:
            self.used = True
            return super().step(closure)

    _, optimizer, _ = with_rule(Noting)
    assert optimizer.noted.count("used") == 2
    assert "__dict__" not in optimizer.noted


def test_an_own_setattr_that_writes_into_the_dict_cannot_replace_the_groups() -> None:
    class Direct(SGD):
        def __setattr__(self, name: str, value: Any) -> None:
            self.__dict__[name] = value

        def step(self, closure: Any = None) -> None:
            self.param_groups = [dict(group) for group in self.param_groups]

    model = residual_net()
    optimizer = Direct(model.parameters(), lr=LR)
    with ScaleUpdateRule(optimizer, scales(model), C), pytest.raises(RuntimeError, match="replaces its param_groups"):
        optimizer.step()
    assert len(optimizer.param_groups) == 1


def test_registers_of_subclasses_see_no_new_class() -> None:
    class Registered(SGD):
        names: ClassVar[list[str]] = []

        def __init_subclass__(cls, *, name: str) -> None:
            Registered.names.append(name)

    class Own(Registered, name="own"):
        pass

    with_rule(Own)
    assert Registered.names == ["own"]


def test_registers_of_metaclasses_see_no_new_class() -> None:
    made: list[str] = []

    class Register(type):
        def __new__(cls, name: str, bases: Any, namespace: Any, **options: Any) -> Any:
            made.append(name)
            return super().__new__(cls, name, bases, namespace)

        def __init__(cls, name: str, bases: Any, namespace: Any, *, tag: str) -> None:
            super().__init__(name, bases, namespace)

    class Own(SGD, metaclass=Register, tag="needed"):
        pass

    with_rule(Own)
    assert made == ["Own"]


def test_an_abstract_base_class_keeps_its_answers() -> None:
    class Abstract(SGD, abc.ABC):
        @abc.abstractmethod
        def factor(self) -> float: ...

    class Concrete(Abstract):
        def factor(self) -> float:
            return 1.0

        def step(self, closure: Any = None) -> Any:
            seen.append((isinstance(self, Concrete), isinstance(other, type(self)), isinstance(other, Concrete)))
            return super().step(closure)

    class Derived(Concrete):
        pass

    seen: list[Any] = []
    other = Derived(residual_net().parameters(), lr=LR)
    with_rule(Concrete)
    assert seen[-1] == (True, False, True)
    assert isinstance(other, Concrete)


def test_super_may_be_asked_by_the_class_of_the_object() -> None:
    class Asking(SGD):
        def step(self, closure: Any = None) -> Any:
            assert self.__class__ is Asking
            return super(self.__class__, self).step(closure)  # what is tried

    with_rule(Asking)


def test_one_object_is_stepped_on_in_all_steps() -> None:
    class Looking(SGD):
        def step(self, closure: Any = None) -> Any:
            ids.add(id(self))
            references.append(weakref.ref(self))
            return super().step(closure)

        @functools.lru_cache  # noqa: B019 # what is tried
        def cached(self) -> object:
            return object()

    ids: set[int] = set()
    references: list[Any] = []
    _, optimizer, rule = with_rule(Looking, steps=3)
    gc.collect()
    assert len(ids) == 1
    assert all(reference() == optimizer for reference in references)
    assert rule.updates == 6


def test_the_object_counts_as_the_optimizer() -> None:
    class Keyed(SGD):
        def step(self, closure: Any = None) -> Any:
            assert self == optimizers[0]
            assert optimizers[0] == self
            assert self != optimizers[1]
            values[self] += self.cached()
            return super().step(closure)

        @functools.lru_cache  # noqa: B019 # what is tried
        def cached(self) -> int:
            calls.append(self)
            return 1

    calls: list[Any] = []
    model = residual_net()
    optimizers = [Keyed(model.parameters(), lr=LR), Keyed(residual_net().parameters(), lr=LR)]
    values = weakref.WeakKeyDictionary({optimizers[0]: optimizers[0].cached()})
    with ScaleUpdateRule(optimizers[0], scales(model), C):
        train(model, optimizers[0], steps=2)
    assert values[optimizers[0]] == 3
    assert len(calls) == 1


def test_an_optimizer_that_keeps_itself_in_an_attribute_keeps_itself() -> None:
    class Selfish(SGD):
        def step(self, closure: Any = None) -> Any:
            self.me = self
            assert self.me is self
            return super().step(closure)

    _, optimizer, rule = with_rule(Selfish)
    assert optimizer.me is optimizer
    rule.remove()
    assert optimizer.me.param_groups is optimizer.param_groups


def test_a_reference_that_outlives_the_step_shows_the_optimizers_own_groups() -> None:
    class Leaking(SGD):
        def step(self, closure: Any = None) -> Any:
            self.read = lambda: self.param_groups
            assert len(self.read()) == 2
            return super().step(closure)

    _, optimizer, rule = with_rule(Leaking)
    assert optimizer.read() is optimizer.param_groups
    rule.remove()
    assert optimizer.read() is optimizer.param_groups


class Outer(SGD):
    """Its base's step runs the hooks a second time."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_hooks_of_the_inner_step_get_the_optimizer_with_its_own_groups() -> None:
    SGD(residual_net().parameters(), lr=LR)  # from now on SGD.step runs hooks of its own
    model = residual_net()
    optimizer = Outer(model.parameters(), lr=LR)
    seen: list[Any] = []

    def note(opt: Optimizer, args: Any, kwargs: Any) -> None:
        seen.append((opt is optimizer, len(opt.param_groups), args[0] is optimizer))

    rule = ScaleUpdateRule(optimizer, scales(model), C)
    optimizer.register_step_pre_hook(note)
    optimizer.register_step_post_hook(note)
    train(model, optimizer, steps=1)
    # torch hands a hook of the outer step the arguments as earlier hooks have left them, here with the view.
    assert seen == [(True, 1, False), (True, 1, True), (True, 1, True), (True, 1, False)]
    assert rule.updates == 1


def test_hooks_of_the_inner_step_may_replace_its_arguments_and_change_the_learning_rate() -> None:
    SGD(residual_net().parameters(), lr=LR)
    model = residual_net()
    optimizer = Outer(model.parameters(), lr=LR)
    calls: list[int] = []

    def change(opt: Optimizer, args: Any, kwargs: Any) -> Any:
        calls.append(len(calls))
        if len(calls) < 2:  # the outer step
            return None
        opt.param_groups[0]["lr"] = 0.5
        return (opt, lambda: calls.append(-1)), kwargs

    model.bn1.weight.grad = model.bn1.bias.grad = torch.ones(6)
    with ScaleUpdateRule(optimizer, scales(model), C):
        optimizer.register_step_pre_hook(change)
        optimizer.step()
    assert calls == [0, 1, -1]
    assert optimizer.param_groups[0]["lr"] == 0.5
    torch.testing.assert_close(1 - model.bn1.weight, torch.full((6,), 0.5 / C), rtol=1e-3, atol=0)
    torch.testing.assert_close(model.bn1.bias, torch.full((6,), -0.5))


def test_a_hook_that_a_step_registers_is_the_optimizers() -> None:
    class Registering(SGD):
        def step(self, closure: Any = None) -> Any:
            if not self.__dict__.get("handle"):
                self.handle = self.register_step_post_hook(lambda opt, args, kwargs: calls.append(opt))
            return super().step(closure)

    calls: list[Any] = []
    _, optimizer, _ = with_rule(Registering)
    assert all(call is optimizer for call in calls)
    assert len(calls) >= 2
    optimizer.handle.remove()
    calls.clear()
    optimizer.step()
    assert not calls


def test_a_state_saved_in_the_step_is_the_optimizers_and_may_be_loaded_there() -> None:
    class Saving(SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["saved"] = True
            state = self.state_dict()
            assert [len(group["params"]) for group in state["param_groups"]] == [12]
            assert state["param_groups"][0]["saved"]
            state["param_groups"][0]["lr"] = 0.5
            self.load_state_dict(state)
            assert [group["lr"] for group in self.param_groups] == [0.5, 0.5 / C]
            for group in self.param_groups:
                group["lr"] *= 1
            state["param_groups"][0]["lr"] = LR
            self.load_state_dict(state)
            return super().step(closure)

    model, optimizer, _ = with_rule(Saving)
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
    assert optimizer.param_groups[0]["lr"] == LR


class Copying(SGD):
    copies: ClassVar[list[Any]] = []

    def step(self, closure: Any = None) -> Any:
        Copying.copies[:] = [
            copy.copy(self),
            copy.deepcopy(self),
            pickle.loads(pickle.dumps(self)),
            type(self)(self.param_groups[0]["params"], lr=1.0),
        ]
        return super().step(closure)


def test_copies_that_a_step_makes_are_copies_of_the_optimizer() -> None:
    with_rule(Copying)
    assert [type(made) for made in Copying.copies] == [Copying] * 4
    assert [len(made.param_groups) for made in Copying.copies] == [1] * 4
    assert all(not made._optimizer_step_pre_hooks for made in Copying.copies)


def test_an_optimizer_with_a_finaliser_is_not_finalised_with_its_view() -> None:
    class Final(SGD):
        def __del__(self) -> None:
            gone.append(True)

    gone: list[bool] = []
    model, optimizer, rule = with_rule(Final)
    rule.remove()
    del rule
    gc.collect()
    assert not gone
    del model, optimizer
    gc.collect()
    assert gone == [True]


def test_a_dict_that_is_given_to_the_optimizer_later_is_the_one_that_counts() -> None:
    model, optimizer, _ = with_rule(SGD)
    optimizer.__dict__ = {**optimizer.__dict__, "state": defaultdict(dict)}
    optimizer.param_groups[0]["momentum"] = 0.9
    train(model, optimizer, steps=1)
    assert len(optimizer.state) == len(list(model.parameters()))
