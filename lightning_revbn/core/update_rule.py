"""The update rule: scales learn with lr / c and shifts with lr * k, inside the optimizer's own step.

The optimizer itself never changes. During an update, its code runs on a *view*: an object that shares the optimizer's
`__dict__` and behaves like the optimizer. Only `param_groups` differs: the view shows each group with scales or shifts
as several groups, the scales with lr / c. Schedulers, gradient clipping, loggers, `state_dict()` and exception handlers
hold the optimizer itself. So they never meet a divided group, whatever happens inside the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Self

from lightning_revbn.core.coverage import Coverage
from lightning_revbn.core.optimizer_checks import updates_in_backward, wraps_another
from lightning_revbn.core.param_groups import GROUP_MARK, SHIFT_MARK
from lightning_revbn.core.rates import Rates, Role
from lightning_revbn.core.rule_engine import RuleEngine, engine_of
from lightning_revbn.core.torch_compat import runs_step_hooks

__all__ = ["ScaleUpdateRule", "active_rule", "active_rules", "scale_learning_rates", "shift_learning_rates"]


class ScaleUpdateRule:
    """Divide the learning rate of batch norm scales by a constant c at every step of an optimizer.

    The rule divides the learning rate in force at each update, so lr / c holds under every schedule. A checkpoint of
    the optimizer is the same with and without the rule. If a schedule keeps the ratio of permanent parameter groups
    (see `scale_param_groups`), these give the same updates to the bit. Scales may be added to the optimizer later.
    Groups made by `scale_param_groups` are left as they are.

    Batch norm shifts can learn faster in the same way, with lr * k. Their weight decay becomes weight_decay / k, so
    that a step shrinks them as before.

    Several rules may act on an optimizer, each for its own layers with its own c and k. A parameter takes no weight
    decay if any rule exempts it.

    The rule ends with `remove()`, at the end of a `with` block, or with the optimizer. Copies and pickles of the
    optimizer do not carry it.

    During a step, the optimizer finds a copy of a group for each part that learns differently. It may write into the
    copies:

    - Setting, deleting or changing a key in place does the same in the group. If the copies disagree, the first
      written copy counts. The copy of parameters other than scales and shifts comes first.
    - A learning rate or weight decay becomes the group's if all parts follow from it, as with `group["lr"] *= 0.9` in
      every group. The same number for scales and other parameters, or a change in a single part, is a RuntimeError.
    - A group that `add_param_group` adds becomes a group of the optimizer. Removed, replaced or reordered groups, and
      other parameters in a group, are a RuntimeError.
    - If an exception ends a step, the values written before reach the group by the next step, `state_dict()` or
      `remove()`. Values that no single number for the group can give all parts are dropped.
    - All parts share the state that an optimizer keeps in a group: a count of steps, the d of D-Adaptation, the sum of
      weights of schedule-free optimizers. Permanent groups would each have their own state: the only difference.

    Args:
        optimizer: Any optimizer that derives from `torch.optim.Optimizer` and updates from its `param_groups`, also as
            `Fabric.setup` returns it.
        scales: The scales, as the optimizer holds them: take them after the model was moved or wrapped.
        divisor: The constant c. Any sufficiently large value works in the paper, which uses 100
            (https://arxiv.org/abs/2110.13989). Values up to 1 leave the learning rate of scales alone.
        weight_decay_exempt: Parameters that take no weight decay, scales or others; `exempt_parameters` lists the
            usual choices.
        shifts: The shifts, as the optimizer holds them.
        shift_multiplier: The factor k; 1 leaves shifts alone.
        warn_if_unused: Whether to warn, at the first step, that the optimizer holds none of these parameters.

    Raises:
        TypeError: If `optimizer` is not a torch optimizer, a scale or shift not a tensor, or c or k not a number.
        ValueError: If c or k is not finite and positive, or the rule cannot hold for the optimizer (the message says
            why). Also if another rule on it covers a scale or shift, a group with scales or shifts has no learning
            rate, or `scale_param_groups` has made the group with other numbers.

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
        self._rates = rates
        self.coverage = Coverage.of(scales, shifts, weight_decay_exempt, rates)
        self.warn_if_unused = warn_if_unused and bool(self.coverage)
        self._engine = engine_of(optimizer) or RuleEngine(optimizer)
        self._engine.join(self)
        self._updates_before = self._engine.updates
        self._updates: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        """Return the class, the optimizer's class and the settings."""
        scales = len(self._claimed("scale")) if self._rates.divides_scales else 0
        shifts = f"{len(self._claimed('shift'))} shifts, shift_multiplier={self.shift_multiplier:g}, "
        return (
            f"{type(self).__name__}({type(self.optimizer).__name__}, {scales} scales, divisor={self.divisor:g}, "
            f"{shifts if self._rates.multiplies_shifts else ''}{len(self.coverage.exempt)} without weight decay)"
        )

    def remove(self) -> None:
        """End the rule; a second call does nothing. The last rule to end leaves the optimizer as it was before."""
        if self._updates is None:
            self._updates = self.updates
            self._engine.leave(self)

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer that the rule is on."""
        return self._engine.optimizer

    @property
    def divisor(self) -> float:
        """The constant c."""
        return self._rates.divisor

    @property
    def shift_multiplier(self) -> float:
        """The factor k."""
        return self._rates.multiplier

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

        The count stands still if `optimizer.step` was replaced by a function that calls no step hooks.
        """
        return self._engine.updates - self._updates_before if self._updates is None else self._updates

    def learning_rates(self) -> list[float]:
        """Return the learning rates that the scales would be updated with now.

        Returns:
            A number for every parameter group that holds scales, in the order of the groups; empty if the optimizer
            holds none.
        """
        return self._learning_rates("scale", GROUP_MARK)

    def shift_learning_rates(self) -> list[float]:
        """Return the learning rates that the shifts would be updated with now.

        Returns:
            A number for every parameter group that holds shifts, in the order of the groups; empty if the optimizer
            holds none.
        """
        return self._learning_rates("shift", SHIFT_MARK)

    def _claimed(self, role: Role) -> set[int]:
        return {found for found, (claimed, _) in self.coverage.ways.items() if claimed == role}

    def _count(self, role: Role) -> int:
        return sum(
            parameter.requires_grad and self.coverage.way(parameter, group)[0] == role
            for group in self.optimizer.param_groups
            for parameter in group["params"]
        )

    def _learning_rates(self, role: Role, mark: str) -> list[float]:
        own = self._claimed(role) if self._rates.change(role) else set[int]()
        return [
            # A mark shows that `scale_param_groups` has already changed the rate in the group.
            float(group["lr"] if mark in group else self._rates.lr(role, group["lr"], type(self.optimizer).__name__))
            for group in self.optimizer.param_groups
            if any(id(parameter) in own for parameter in group["params"])
        ]


def scale_learning_rates(optimizer: Optimizer, scales: Iterable[Tensor]) -> list[float]:
    """Return the learning rates that an optimizer would update scales with now, with or without a rule.

    Args:
        optimizer: The optimizer, with or without a `ScaleUpdateRule`.
        scales: The scales; on an optimizer with rules, the scales that the rules cover count instead.

    Returns:
        A number for every parameter group that holds scales, rule by rule; empty if the optimizer holds none.
    """
    rules = [rule for rule in active_rules(optimizer) if rule.divisor > 1]
    if rules:
        return [rate for rule in rules for rate in rule.learning_rates()]
    return _group_rates(optimizer, scales, GROUP_MARK)


def shift_learning_rates(optimizer: Optimizer, shifts: Iterable[Tensor]) -> list[float]:
    """Return the learning rates that an optimizer would update shifts with now, with or without a rule.

    Args:
        optimizer: The optimizer, with or without a `ScaleUpdateRule`.
        shifts: The shifts; on an optimizer with rules, the shifts that the rules cover count instead.

    Returns:
        A number for every parameter group that holds shifts, rule by rule; empty if the optimizer holds none.
    """
    rules = [rule for rule in active_rules(optimizer) if rule.shift_multiplier != 1]
    if rules:
        return [rate for rule in rules for rate in rule.shift_learning_rates()]
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
        The first rule, or None.
    """
    return next(iter(active_rules(optimizer)), None)


def active_rules(optimizer: Optimizer) -> list[ScaleUpdateRule]:
    """List the rules that are in force on an optimizer.

    Args:
        optimizer: The optimizer.

    Returns:
        The rules, in the order in which they were made.
    """
    engine = engine_of(optimizer)
    return [] if engine is None else [rule for rule in engine.rules if isinstance(rule, ScaleUpdateRule)]


def _behind_stand_in(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer itself if Fabric or Lightning handed out another object in its place.

    Such an object derives from the optimizer's class but holds no groups: it only passes calls on.
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
    return (
        f"{name} takes one step for all parameters in one group: scales and shifts cannot learn in their own way in it"
    )


def _runs_no_hooks(optimizer: Optimizer, name: str) -> str | None:
    if runs_step_hooks(optimizer):
        return None
    return (
        f"{name}.step() does not run torch's step hooks (it does not call Optimizer.__init__): "
        "use scale_param_groups for this optimizer"
    )


_OBSTACLES: tuple[Callable[[Optimizer, str], str | None], ...] = (
    _is_lbfgs,
    wraps_another,
    _runs_no_hooks,
    updates_in_backward,
)
"""Each returns the reason why the rule cannot hold for an optimizer, or None. The first reason is raised."""
