"""Makes the steps of an optimizer run on the parts of its groups, for all update rules on it together."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from operator import is_
from typing import Any, Protocol

from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_revbn.core.coverage import Coverage
from lightning_revbn.core.group_parts import GroupPlan
from lightning_revbn.core.optimizer_checks import refuse_divided
from lightning_revbn.core.optimizer_view import OptimizerView
from lightning_revbn.core.param_groups import MARKS, Group, MarkKeeper, keep_marks
from lightning_revbn.core.torch_compat import step_pre_hooks
from lightning_revbn.core.update_doubts import UpdateDoubts
from lightning_revbn.core.update_watch import UpdateWatch

__all__ = ["Joined", "RuleEngine", "engine_of"]


class Joined(Protocol):
    """A rule, as the engine knows it.

    Attributes:
        coverage: The parameters that the rule covers.
        warn_if_unused: Whether to warn, at the next step, that the optimizer holds none of these parameters.
    """

    coverage: Coverage
    warn_if_unused: bool


class RuleEngine:
    """The view of an optimizer, the plans of its groups and the hooks of its step.

    The engine stays on the optimizer as long as a rule does.

    Args:
        optimizer: The optimizer.

    Attributes:
        optimizer: The optimizer.
        rules: The rules, in the order in which they have joined.
        updates: How many steps have read their groups from the view.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.rules: list[Joined] = []
        self.updates = 0
        self._coverage = Coverage()
        self._in_step = self._was_read = self._is_stale = self._is_new = False
        self._shown: list[Group] = []
        self._expected: list[Group] = []
        self._plans: list[GroupPlan] = []
        self._doubts = UpdateDoubts(optimizer)
        self._candidates: list[Tensor] = []
        self._chosen: Tensor | None = None
        self._watch = UpdateWatch()
        self._view = OptimizerView(optimizer, self._read_groups, self._hand_back, self._is_own_hook)
        self._handles: list[RemovableHandle | MarkKeeper] = []

    def join(self, rule: Joined) -> None:
        """Let a rule act on the optimizer from now on; if it cannot, nothing changes.

        Args:
            rule: The rule.

        Raises:
            ValueError: If another rule covers its scales or shifts, or the rule cannot hold for a group.
        """
        rules = [*self.rules, rule]  # a new list: if a group refuses the rule, the engine stays as it was
        coverage = self._joined(rules)
        self._cover(rules, coverage, self._planned(self.optimizer.param_groups, [], coverage))
        self._is_new = True
        if not self._handles:
            self._handles = [
                self.optimizer.register_step_pre_hook(self._before_step),
                self.optimizer.register_step_post_hook(self._after_step),
                keep_marks(self.optimizer),
                self.optimizer.register_load_state_dict_post_hook(self._after_load),
                self.optimizer.register_state_dict_pre_hook(lambda _: self._salvage()),  # exception checkpoints
            ]

    def leave(self, rule: Joined) -> None:
        """End a rule; the end of the last rule restores the optimizer.

        Args:
            rule: The rule.
        """
        self._salvage()
        rules = [joined for joined in self.rules if joined is not rule]
        if rules:
            # The end of a rule must not fail, so the plans are made in the next step.
            self._cover(rules, self._joined(rules), [])
            return
        self.recover()
        self.rules = []
        while self._handles:
            self._handles.pop().remove()

    def recover(self) -> None:
        """Clean up after a step that an exception has ended; do nothing after any other step."""
        if self._in_step:
            self._salvage()
            self._in_step = False
            self._view.leave()

    def _joined(self, rules: Sequence[Joined]) -> Coverage:
        return Coverage.joined([rule.coverage for rule in rules], type(self.optimizer).__name__)

    def _cover(self, rules: list[Joined], coverage: Coverage, plans: list[GroupPlan]) -> None:
        self.rules, self._coverage = rules, coverage
        self._take(plans)
        self._is_stale = True  # a closure may make or end a rule
        self._find_candidates()

    def _take(self, plans: list[GroupPlan]) -> None:
        self._plans = plans
        self._doubts.take(plans)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self.recover()  # an exception in the last step has kept `_after_step` from running
        self._in_step, self._was_read, self._is_stale = True, False, True
        if self._chosen is None or not self._chosen.requires_grad:
            self._choose_watched()
        # Until a step has read its groups, changes between steps count: gradient hooks may do the update.
        self._watch.start(self._chosen, since_before=not self.updates)
        if self._doubts.watches:  # asked first in every step, since a call in vain takes time too
            self._doubts.start()
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
            if self._doubts.watches:
                self._doubts.settle()
            self._write_back()
            self.updates += 1
            self._watch.by_value = False
            return
        # A step may do nothing at all, but a step that updates must have read its groups.
        if self._chosen is not None and (args[0] is not self._view.view or self._watch.has_changed()):
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() did not update from its param_groups, so {self._coverage.missed}: "
                "use scale_param_groups for this optimizer, and look for a step hook that replaces the step's arguments"
            )
        self._watch.by_value = True

    def _after_load(self, optimizer: Optimizer) -> None:
        """Refuse groups that were made with other numbers, as soon as a checkpoint has brought them."""
        self._plan(optimizer.param_groups)

    def _is_own_hook(self, hook: Callable[..., Any]) -> bool:
        return getattr(hook, "__self__", None) is self

    def _choose_watched(self) -> None:
        """Choose a covered parameter of the optimizer, whose change shows that a step has updated."""
        # FSDP1 leaves some ranks no part of a scale.
        self._candidates = [p for p in self._candidates if is_lazy(p) or p.numel()]
        self._chosen = next((p for p in self._candidates if not is_lazy(p) and p.requires_grad), None)

    def _wrap(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """Let the closure run on the optimizer's own groups, since it may change learning rates or add groups."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._doubts.pause()
            self._hand_back()
            result = closure(*args, **kwargs)
            if self._was_read and self._in_step:
                self._refresh()  # the optimizer may hold the groups that it read before
            self._watch.start_again()
            if self._doubts.watches:
                self._doubts.start()
            return result

        return run

    def _read_groups(self) -> list[Group]:
        """Return the view's `param_groups`: in a step the parts of the groups, otherwise the groups."""
        if not self._in_step:
            return self.optimizer.param_groups
        self._was_read = True
        if self._is_stale:
            self._refresh()
        elif len(self._shown) != len(self._expected):
            self._hand_back()
            self._refresh()
        return self._shown

    def _refresh(self) -> None:
        """Update the view's groups from the optimizer's groups."""
        groups = self.optimizer.param_groups
        self._plan(groups)
        shown: list[Group] = []
        for plan, group in zip(self._plans, groups, strict=True):
            shown += plan.show(group)
        self._shown[:] = self._expected = shown
        self._is_stale = False
        if self._is_new:
            self._is_new = False
            _warn_if_unused(self.rules, groups)
        if self._doubts.watches:
            self._doubts.listen()

    def _plan(self, groups: list[Group]) -> None:
        """Find the parts of every group, anew where its parameters have changed."""
        plans = self._plans
        if len(plans) != len(groups) or not all(map(GroupPlan.fits, plans, groups)):
            self._take(self._planned(groups, plans, self._coverage))
            self._find_candidates()

    def _planned(self, groups: list[Group], plans: Sequence[GroupPlan], coverage: Coverage) -> list[GroupPlan]:
        """Return a plan for each group; a present plan that fits is kept."""
        name = type(self.optimizer).__name__
        planned = [
            plans[index]
            if index < len(plans) and plans[index].fits(group)
            else GroupPlan(group, coverage, f"parameter group {index} of {name}")
            for index, group in enumerate(groups)
        ]
        if any(plan.is_divided for plan in planned):
            refuse_divided(self.optimizer)
        return planned

    def _find_candidates(self) -> None:
        covered = self._coverage.covered
        held = (parameter for group in self.optimizer.param_groups for parameter in group["params"])
        self._candidates = [parameter for parameter in held if id(parameter) in covered]
        self._chosen = None

    def _hand_back(self) -> None:
        """Update the optimizer's groups before other code uses them; the next read shows what that code wrote."""
        if self._in_step and self._was_read and not self._is_stale:
            self._write_back()
            self._is_stale = True

    def _write_back(self) -> None:
        """Carry over to the groups the values that the optimizer wrote into their copies."""
        if self._doubts.watches:
            self._doubts.pause()
        shown, expected = self._shown, self._expected
        if len(shown) != len(expected) or not all(map(is_, shown, expected)):
            self._adopt(shown, expected)
        for plan in self._plans:
            plan.write_back(self._undivided_rates)

    def _salvage(self) -> None:
        """Carry over the values written into the groups' copies, in a step that an exception may have ended."""
        self._doubts.pause()
        if not self._in_step or not self._was_read or self._is_stale:
            return
        self._is_stale = True
        with contextlib.suppress(RuntimeError):  # the user must see the step's own exception
            self._adopt(self._shown, self._expected)
        for plan in self._plans:
            plan.salvage(self._undivided_rates)

    def _adopt(self, shown: list[Group], expected: list[Group]) -> None:
        """Add the groups that the step has added to the optimizer's own groups."""
        if len(shown) < len(expected) or not all(map(is_, shown, expected)):
            name = type(self.optimizer).__name__
            raise RuntimeError(f"{name}.step() has removed or reordered its param_groups: use scale_param_groups")
        self.optimizer.param_groups.extend(shown[len(expected) :])
        self._expected = shown.copy()

    def _undivided_rates(self) -> Iterator[Any]:
        return (rate for plan in self._plans if (rate := plan.undivided_lr) is not None)


def _warn_if_unused(rules: Sequence[Joined], groups: Sequence[Group]) -> None:
    held = {id(parameter) for group in groups for parameter in group["params"]}
    is_marked = any(mark in group for group in groups for mark in MARKS)
    for rule in rules:
        if rule.warn_if_unused and not is_marked and held.isdisjoint(rule.coverage.covered):
            warnings.warn(
                f"{rule!r} has no effect: the optimizer holds none of these parameters. Was the model moved or "
                "wrapped after the scales were taken from it?",
                stacklevel=2,
            )
        rule.warn_if_unused = False


def engine_of(optimizer: Optimizer) -> RuleEngine | None:
    """Find the engine that is on an optimizer.

    Args:
        optimizer: The optimizer, or the object that Fabric or Lightning hand out in its place.

    Returns:
        The engine, or None.
    """
    # Hooks are the only record of the engine: copies and pickles of the optimizer lose both together.
    owners = (getattr(hook, "__self__", None) for hook in step_pre_hooks(optimizer))
    return next((owner for owner in owners if isinstance(owner, RuleEngine)), None)
