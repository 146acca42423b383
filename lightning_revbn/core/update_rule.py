"""The update rule: scales learn with lr / c and shifts with lr * k, inside the optimizer's own step.

The optimizer that everybody holds is never changed. For the time of one update its code runs on a *view* of it: the
same object in every respect (they share one `__dict__`), except that `param_groups` shows each group that holds scales
or shifts as several, the scales with lr / c. Schedulers, gradient clipping, loggers, `state_dict()` and exception
handlers hold the optimizer itself, so none of them can ever meet a divided group, whatever happens inside the step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from typing_extensions import Self

from lightning_revbn.core.group_parts import Coverage, GroupPlan
from lightning_revbn.core.optimizer_view import OptimizerView
from lightning_revbn.core.param_groups import GROUP_MARK, SHIFT_MARK, Group, keep_marks
from lightning_revbn.core.rates import Rates, Role
from lightning_revbn.core.torch_compat import runs_step_hooks, step_pre_hooks
from lightning_revbn.core.update_watch import UpdateWatch

__all__ = ["ScaleUpdateRule", "active_rule", "scale_learning_rates", "shift_learning_rates"]


class ScaleUpdateRule:
    """Divide the learning rate of batch norm scales by a constant c at every step of an optimizer.

    The division happens while the optimizer updates, on the learning rate that is in force then, so lr / c holds under
    every schedule, and a checkpoint of the optimizer is the same with and without the rule. It equals permanent
    parameter groups (see `scale_param_groups`) to the bit, where a schedule lets those keep their ratio. Scales may
    be added to the optimizer later; groups made by `scale_param_groups` are left as they are.

    Batch norm shifts can learn faster in the same way, with lr * k. Their weight decay becomes weight_decay / k, so
    that a step shrinks them as before.

    The rule ends with `remove()`, at the end of a `with` block, or with the optimizer. Copies and pickles of the
    optimizer do not carry it.

    During a step, the optimizer finds a copy of a group for each part that learns differently. What becomes of the
    values that it writes there:

    - A key that is set, deleted or changed in place is so in the group. If the copies disagree, the first copy that was
      written counts, and parameters that are neither scales nor shifts come first.
    - A learning rate or weight decay becomes the group's if the parts follow from it: `group["lr"] *= 0.9` in every
      group does. One number for scales and other parameters alike, or a change in one part alone, is a RuntimeError.
    - A group that `add_param_group` adds is the optimizer's. Removed, replaced or reordered groups, and other
      parameters in a group, are a RuntimeError.
    - State that an optimizer keeps in a group (a count of steps, the d of D-Adaptation, the sum of weights of
      schedule-free optimizers) is shared by all parts. Permanent groups would each have their own. This is the one
      difference to them.

    Args:
        optimizer: Any optimizer that derives from `torch.optim.Optimizer` and updates from its `param_groups`; or what
            `Fabric.setup` returned for one.
        scales: The scales, as the optimizer holds them: take them after the model was moved or wrapped.
        divisor: The constant c. Any sufficiently large value works in the paper, which uses 100
            (https://arxiv.org/abs/2110.13989). Values up to 1 leave the learning rate of scales alone.
        weight_decay_exempt: Parameters that take no weight decay, scales or others; `exempt_parameters` lists the
            usual choices.
        shifts: The shifts, as the optimizer holds them.
        shift_multiplier: The factor k; 1 leaves shifts alone.
        warn_if_unused: Whether to warn, at the first step, that the optimizer holds none of these parameters.

    Raises:
        TypeError: If `optimizer` is no torch optimizer, a scale or shift is no tensor, or a number is none.
        ValueError: If the divisor or the multiplier is not finite and positive, the optimizer is one for which the rule
            cannot hold (the message names it), it has a rule already, a group with scales or shifts has no learning
            rate, or `scale_param_groups` has made it with another divisor or multiplier.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with ScaleUpdateRule(optimizer, [model[1].weight], divisor=100.0):
        ...     model(torch.ones(2, 4)).sum().backward()
        ...     model[1].weight.grad.fill_(1.0)
        ...     optimizer.step()
        tensor([1., 1., 1., 1., 1., 1., 1., 1.])
        >>> round(model[1].weight[0].item(), 4)  # 1 - 0.1 / 100
        0.999
    """

    def __init__(
        self,
        optimizer: Optimizer,
        scales: Iterable[Tensor],
        divisor: float = 100.0,
        weight_decay_exempt: Iterable[Tensor] = (),
        *,
        shifts: Iterable[Tensor] = (),
        shift_multiplier: float = 1.0,
        warn_if_unused: bool = True,
    ) -> None:
        rates = Rates(divisor, shift_multiplier)
        optimizer = _behind_stand_in(optimizer)
        _refuse_unsupported(optimizer)
        self._optimizer = optimizer
        # The tensors are kept so that no other one can take over an id.
        self._coverage = Coverage(
            _by_id("scales", scales),
            _by_id("shifts", shifts),
            _by_id("weight_decay_exempt", weight_decay_exempt),
            rates,
        )
        if not self._coverage.scales.keys().isdisjoint(self._coverage.shifts):
            raise ValueError("a parameter is among the scales and among the shifts: it can learn in one way only")
        self._warn_if_unused = warn_if_unused and bool(self._coverage)
        self._updates = 0
        self._in_step = self._was_read = self._is_stale = False
        self._shown: list[Group] = []
        self._expected: list[Group] = []
        self._plans: list[GroupPlan] = []
        self._candidates: list[Tensor] = []
        self._chosen: Tensor | None = None
        self._plan(optimizer.param_groups)
        self._watch = UpdateWatch()
        self._view = OptimizerView(optimizer, self._read_groups, self._hand_back, self._is_own_hook)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            keep_marks(optimizer),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        """Return the class, the optimizer's class and the settings."""
        coverage = self._coverage
        scales = len(coverage.scales) if coverage.rates.divides_scales else 0
        shifts = f"{len(coverage.shifts)} shifts, shift_multiplier={self.shift_multiplier:g}, "
        return (
            f"{type(self).__name__}({type(self._optimizer).__name__}, {scales} scales, divisor={self.divisor:g}, "
            f"{shifts if coverage.rates.multiplies_shifts else ''}{len(coverage.exempt)} without weight decay)"
        )

    def remove(self) -> None:
        """End the rule and leave the optimizer as if it had never been there; a second call does nothing."""
        self._in_step = False
        for handle in self._handles:
            handle.remove()

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer that the rule is on."""
        return self._optimizer

    @property
    def divisor(self) -> float:
        """The constant c."""
        return self._coverage.rates.divisor

    @property
    def shift_multiplier(self) -> float:
        """The factor k."""
        return self._coverage.rates.multiplier

    @property
    def covered(self) -> int:
        """How many of the optimizer's parameters learn with lr / c now."""
        return self._count("scale")

    @property
    def covered_shifts(self) -> int:
        """How many of the optimizer's parameters learn with lr * k now."""
        return self._count("shift")

    @property
    def updates(self) -> int:
        """How many steps have read their groups from the rule.

        It stands still where `optimizer.step` was replaced by a function that calls no step hooks.
        """
        return self._updates

    def learning_rates(self) -> list[float]:
        """Return the learning rates that the scales would be updated with now.

        Returns:
            One number for every parameter group that holds scales, in the order of the groups; empty if the optimizer
            holds none.
        """
        return self._learning_rates("scale")

    def shift_learning_rates(self) -> list[float]:
        """Return the learning rates that the shifts would be updated with now.

        Returns:
            One number for every parameter group that holds shifts, in the order of the groups; empty if the optimizer
            holds none.
        """
        return self._learning_rates("shift")

    def _count(self, role: Role) -> int:
        return sum(
            parameter.requires_grad and self._coverage.role(parameter, group) == role
            for group in self._optimizer.param_groups
            for parameter in group["params"]
        )

    def _learning_rates(self, role: Role) -> list[float]:
        rates = self._coverage.rates
        if role == "scale":
            own, mark, is_changed = self._coverage.scales, GROUP_MARK, rates.divides_scales
        else:
            own, mark, is_changed = self._coverage.shifts, SHIFT_MARK, rates.multiplies_shifts
        return [
            float(group["lr"] if mark in group else rates.lr(role, group["lr"], type(self._optimizer).__name__))
            for group in self._optimizer.param_groups
            if is_changed and any(id(parameter) in own for parameter in group["params"])
        ]

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if self._in_step:  # an exception has ended the last step
            for plan in self._plans:
                plan.forget()
        self._in_step, self._was_read, self._is_stale = True, False, True
        if self._chosen is None or not self._chosen.requires_grad:
            self._choose_watched()
        self._watch.start(self._chosen)
        view = self._view.enter()
        if len(args) > 1 and callable(args[1]):
            return (view, self._wrap(args[1]), *args[2:]), kwargs
        if callable(kwargs.get("closure")):
            kwargs = {**kwargs, "closure": self._wrap(kwargs["closure"])}
        return (view, *args[1:]), kwargs

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._in_step = False
        if self._was_read:
            if self._view.was_stored:
                self._view.leave()
            self._write_back()
            self._updates += 1
            self._watch.by_value = False
            return
        # A step that does nothing at all is the optimizer's right; one that updates must have read its groups.
        if self._chosen is not None and (args[0] is not self._view.view or self._watch.has_changed()):
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() did not update from its param_groups, so the scales did not learn "
                "with lr / c: use scale_param_groups for this optimizer, and look for a step hook that replaces "
                "the step's arguments"
            )
        self._watch.by_value = True

    def _after_load(self, optimizer: Optimizer) -> None:
        """Refuse groups that were made with other numbers, as soon as a checkpoint has brought them."""
        self._plan(optimizer.param_groups)

    def _is_own_hook(self, hook: Callable[..., Any]) -> bool:
        return getattr(hook, "__self__", None) is self

    def _choose_watched(self) -> None:
        """Choose the parameter by which to tell whether a step has updated: a covered one that the optimizer holds."""
        # FSDP1 leaves some ranks no part of a scale.
        self._candidates = [p for p in self._candidates if is_lazy(p) or p.numel()]
        self._chosen = next((p for p in self._candidates if not is_lazy(p) and p.requires_grad), None)

    def _wrap(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """Let the closure run on the optimizer's own groups, since it may change learning rates or add groups."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._hand_back()
            result = closure(*args, **kwargs)
            if self._was_read and self._in_step:
                self._refresh()  # the optimizer may hold the groups that it read before
            self._watch.start_again()
            return result

        return run

    def _read_groups(self) -> list[Group]:
        """Return what the view shows as its `param_groups`: in a step the parts of the groups, else the groups."""
        if not self._in_step:
            return self._optimizer.param_groups
        self._was_read = True
        if self._is_stale:
            self._refresh()
        elif len(self._shown) != len(self._expected):
            self._hand_back()
            self._refresh()
        return self._shown

    def _refresh(self) -> None:
        """Bring the view's groups up to the optimizer's."""
        groups = self._optimizer.param_groups
        self._plan(groups)
        shown: list[Group] = []
        for plan, group in zip(self._plans, groups, strict=True):
            shown += plan.show(group)
        self._shown[:] = self._expected = shown
        self._is_stale = False
        if self._warn_if_unused:
            self._warn_if_unused = False
            if all(plan.is_plain for plan in self._plans):
                warnings.warn(
                    f"{self!r} has no effect: the optimizer holds none of these parameters. Was the model moved or "
                    "wrapped after the scales were taken from it?",
                    stacklevel=2,
                )

    def _plan(self, groups: list[Group]) -> None:
        """Find the parts of every group, anew where its parameters have changed."""
        plans = self._plans
        if len(plans) == len(groups) and all(map(GroupPlan.fits, plans, groups)):
            return
        self._plans = [
            plans[index]
            if index < len(plans) and plans[index].fits(group)
            else GroupPlan(group, self._coverage, f"parameter group {index} of {type(self._optimizer).__name__}")
            for index, group in enumerate(groups)
        ]
        covered = self._coverage.covered
        self._candidates = [p for group in groups for p in group["params"] if id(p) in covered]
        self._chosen = None

    def _hand_back(self) -> None:
        """Let code that is not the optimizer's find its groups up to date, and the optimizer what that code writes."""
        if self._in_step and self._was_read and not self._is_stale:
            self._write_back()
            self._is_stale = True

    def _write_back(self) -> None:
        """Carry over to the groups what the optimizer wrote into their copies."""
        shown, expected = self._shown, self._expected
        if len(shown) != len(expected) or not all(map(is_, shown, expected)):
            self._adopt(shown, expected)
        for plan in self._plans:
            plan.write_back(self._undivided_rates)

    def _adopt(self, shown: list[Group], expected: list[Group]) -> None:
        """Make groups that the step has added the optimizer's own."""
        if len(shown) < len(expected) or not all(map(is_, shown, expected)):
            raise RuntimeError(
                f"{type(self._optimizer).__name__}.step() has removed or reordered its param_groups, which "
                "ScaleUpdateRule cannot follow: use scale_param_groups"
            )
        self._optimizer.param_groups.extend(shown[len(expected) :])
        self._expected = shown.copy()

    def _undivided_rates(self) -> Iterator[Any]:
        return (rate for plan in self._plans if (rate := plan.undivided_lr) is not None)


def scale_learning_rates(optimizer: Optimizer, scales: Iterable[Tensor]) -> list[float]:
    """Return the learning rates that an optimizer would update scales with now, whoever set them.

    Args:
        optimizer: The optimizer, with or without a `ScaleUpdateRule`.
        scales: The scales; with a rule those that it covers count instead.

    Returns:
        One number for every parameter group that holds scales; empty if the optimizer holds none.
    """
    rule = active_rule(optimizer)
    if rule is not None and rule.divisor > 1:
        return rule.learning_rates()
    return _group_rates(optimizer, scales, GROUP_MARK)


def shift_learning_rates(optimizer: Optimizer, shifts: Iterable[Tensor]) -> list[float]:
    """Return the learning rates that an optimizer would update shifts with now, whoever set them.

    Args:
        optimizer: The optimizer, with or without a `ScaleUpdateRule`.
        shifts: The shifts; with a rule those that it covers count instead.

    Returns:
        One number for every parameter group that holds shifts; empty if the optimizer holds none.
    """
    rule = active_rule(optimizer)
    if rule is not None and rule.shift_multiplier != 1:
        return rule.shift_learning_rates()
    return _group_rates(optimizer, shifts, SHIFT_MARK)


def _group_rates(optimizer: Optimizer, parameters: Iterable[Tensor], mark: str) -> list[float]:
    ids = {id(parameter) for parameter in parameters}
    return [
        float(group["lr"])
        for group in optimizer.param_groups
        if mark in group or any(id(parameter) in ids for parameter in group["params"])
    ]


def active_rule(optimizer: Optimizer) -> ScaleUpdateRule | None:
    """Find the rule that is in force on an optimizer.

    Args:
        optimizer: The optimizer.

    Returns:
        The rule, or None.
    """
    owners = (getattr(hook, "__self__", None) for hook in step_pre_hooks(optimizer))
    return next((owner for owner in owners if isinstance(owner, ScaleUpdateRule)), None)


def _behind_stand_in(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer itself where Fabric or Lightning hand out another object in its place.

    Such an object has the class of the optimizer among its own and no groups: it only passes calls on.
    """
    behind: object = getattr(optimizer, "optimizer", None)
    has_groups = "param_groups" in getattr(optimizer, "__dict__", {})
    if isinstance(behind, Optimizer) and isinstance(optimizer, type(behind)) and not has_groups:
        return behind
    return optimizer


def _refuse_unsupported(optimizer: object) -> None:
    """Raise if the rule cannot hold for an optimizer, before anything is changed."""
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"ScaleUpdateRule needs a torch.optim.Optimizer, got {name}; where an engine has taken over the optimizer, "
            "build the optimizer from scale_param_groups"
        )
    for obstacle in _OBSTACLES:
        problem = obstacle(optimizer, name)
        if problem is not None:
            raise ValueError(problem)


def _is_lbfgs(optimizer: Optimizer, name: str) -> str | None:
    if not isinstance(optimizer, torch.optim.LBFGS):
        return None
    return f"{name} takes one step for all parameters in one group: scales cannot learn with lr / c in it"


def _wraps_another(optimizer: Optimizer, name: str) -> str | None:
    inner = [key for key, value in vars(optimizer).items() if isinstance(value, Optimizer)]
    if not inner:
        return None
    return (
        f"{name} wraps another optimizer (its attribute {inner[0]!r}), which does the update: build the parameter "
        f"groups that {name} starts from with scale_param_groups; or, in a loop of your own, give the optimizer "
        "inside to ScaleUpdateRule"
    )


def _runs_no_hooks(optimizer: Optimizer, name: str) -> str | None:
    if runs_step_hooks(optimizer):
        return None
    return (
        f"{name}.step() does not run torch's step hooks (it does not call Optimizer.__init__): "
        "use scale_param_groups for this optimizer"
    )


def _has_a_rule(optimizer: Optimizer, name: str) -> str | None:
    if active_rule(optimizer) is None:
        return None
    return f"this {name} has a ScaleUpdateRule already: remove() that one first"


_OBSTACLES: tuple[Callable[[Optimizer, str], str | None], ...] = (
    _is_lbfgs,
    _wraps_another,
    _runs_no_hooks,
    _has_a_rule,
)
"""Each says why the rule cannot hold for an optimizer, or returns None. The first that objects is heard."""


def _by_id(argument: str, parameters: Iterable[Tensor]) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for parameter in parameters:
        if not isinstance(parameter, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{argument} takes parameters, got {type(parameter).__name__}")
        found[id(parameter)] = parameter
    return found
