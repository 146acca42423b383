"""The update rule: batch norm scales learn with lr / c, inside the optimizer's own step.

The optimizer that everybody holds is never changed. For the time of one update its code runs on a *view* of it: the
same object in every respect (they share one `__dict__`), except that `param_groups` shows each group that holds scales
as two, the scales with lr / c. Schedulers, gradient clipping, loggers, `state_dict()` and exception handlers hold the
optimizer itself, so none of them can ever meet a divided group, whatever happens inside the step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from lightning_revbn.core.arguments import check_divisor
from lightning_revbn.core.group_plan import GroupPlan
from lightning_revbn.core.param_groups import GROUP_MARK, Group, divide_lr
from lightning_revbn.core.torch_compat import runs_step_hooks, step_pre_hooks

__all__ = ["ScaleUpdateRule", "active_rule", "scale_learning_rates"]


class ScaleUpdateRule:
    """Divide the learning rate of batch norm scales by a constant c at every step of an optimizer.

    The division happens while the optimizer updates, on the learning rate that is in force then, so lr / c holds under
    every schedule, and a checkpoint of the optimizer is the same with and without the rule. It equals permanent
    parameter groups (see `scale_param_groups`) to the bit, where a schedule lets those keep their ratio. Scales may
    be added to the optimizer later; groups made by `scale_param_groups` are left as they are.

    The rule ends with `remove()`, at the end of a `with` block, or with the optimizer. Copies and pickles of the
    optimizer do not carry it.

    Args:
        optimizer: Any optimizer that derives from `torch.optim.Optimizer` and updates from its `param_groups`; or what
            `Fabric.setup` returned for one.
        scales: The scales, as the optimizer holds them: take them after the model was moved or wrapped.
        divisor: The constant c. Any sufficiently large value works in the paper, which uses 100
            (https://arxiv.org/abs/2110.13989). Values up to 1 leave the learning rate alone.
        weight_decay_exempt: Parameters that take no weight decay, scales or others.
        warn_if_unused: Whether to warn, at the first step, that the optimizer holds none of these parameters.

    Raises:
        TypeError: If `optimizer` is no torch optimizer, or a scale is no tensor.
        ValueError: If the divisor is not finite and positive, the optimizer is one for which the rule cannot hold
            (the message names it), it has a rule already, or a group with scales has no learning rate.

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
        warn_if_unused: bool = True,
    ) -> None:
        self.divisor = check_divisor(divisor)
        optimizer = _behind_stand_in(optimizer)
        _refuse_unsupported(optimizer)
        self._optimizer = optimizer
        # By identity, since == of tensors compares values. The tensors are kept, so no other tensor takes over an id.
        self._scales = _by_id("scales", scales) if self.divisor > 1 else {}
        self._exempt = _by_id("weight_decay_exempt", weight_decay_exempt)
        self._warn_if_unused = warn_if_unused
        self._plans: list[GroupPlan] = []
        self._shown: list[Group] | None = None
        self._was_read = False
        self._probe: tuple[Tensor, Tensor] | None = None
        for index, group in enumerate(optimizer.param_groups):
            if any(id(parameter) in self._scales for parameter in group["params"]) and GROUP_MARK not in group:
                divide_lr(group.get("lr"), self.divisor, f"parameter group {index} of {type(optimizer).__name__}")
        self._view_class = _view_class(type(optimizer), self._read_groups)
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        """Return the class, the optimizer's class and the settings."""
        return (
            f"{type(self).__name__}({type(self._optimizer).__name__}, {len(self._scales)} scales, "
            f"divisor={self.divisor:g}, {len(self._exempt)} without weight decay)"
        )

    def remove(self) -> None:
        """End the rule and leave the optimizer as if it had never been there; a second call does nothing."""
        for handle in self._handles:
            handle.remove()

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer that the rule is on."""
        return self._optimizer

    @property
    def covered(self) -> int:
        """How many of the optimizer's parameters learn with lr / c now."""
        return sum(
            id(parameter) in self._scales
            for group in self._optimizer.param_groups
            if GROUP_MARK not in group
            for parameter in group["params"]
        )

    def learning_rates(self) -> list[float]:
        """Return the learning rates that the scales would be updated with now.

        Returns:
            One number for every parameter group that holds scales, in the order of the groups; empty if the optimizer
            holds none.
        """
        where = type(self._optimizer).__name__
        return [
            float(group["lr"] if GROUP_MARK in group else divide_lr(group["lr"], self.divisor, where))
            for group in self._optimizer.param_groups
            if any(id(parameter) in self._scales for parameter in group["params"])
        ]

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if optimizer is not self._optimizer:
            return None  # a subclass has called super().step() on the view
        self._shown = None
        if not self._was_read:
            self._probe = self._take_probe()
        # With one `__dict__` for both, what the step sets on the view is set on the optimizer.
        view = object.__new__(self._view_class)
        view.__dict__ = optimizer.__dict__
        # torch calls the step with what this hook returns: with the view in place of the optimizer.
        if len(args) > 1 and callable(args[1]):
            return (view, self._wrap(args[1]), *args[2:]), kwargs
        if callable(kwargs.get("closure")):
            kwargs = {**kwargs, "closure": self._wrap(kwargs["closure"])}
        return (view, *args[1:]), kwargs

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer is not self._optimizer:
            return
        self._write_back()
        if self._was_read or self._probe is None:
            return
        # A step may do nothing at all, on overflow say. A step that updates must have read the groups: else parameters
        # are held elsewhere, and the rule would have no effect without a word.
        parameter, before = self._probe
        if not torch.equal(parameter, before):
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() did not update from its param_groups, so the scales did not learn "
                "with lr / c: use scale_param_groups for this optimizer, and look for a step hook that replaces "
                "the step's arguments"
            )

    def _take_probe(self) -> tuple[Tensor, Tensor] | None:
        """Remember one covered parameter's values, until an update has been seen to read the divided groups."""
        held = (parameter for group in self._optimizer.param_groups for parameter in group["params"])
        covered = (p for p in held if (id(p) in self._scales or id(p) in self._exempt) and not is_lazy(p))
        parameter = next((p for p in covered if p.numel()), None)  # FSDP1 leaves some ranks no part of a scale
        return None if parameter is None else (parameter, parameter.detach().clone())

    def _wrap(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """Let the closure run before the groups are divided, since it may change learning rates or add groups."""

        def write_back_and_run(*args: Any, **kwargs: Any) -> Any:
            self._write_back()
            return closure(*args, **kwargs)

        return write_back_and_run

    def _read_groups(self) -> list[Group]:
        """Return what the view shows as `param_groups`: the same objects until the next closure or step."""
        # An optimizer may read its groups more than once in a step, and must find there what it has written.
        self._was_read, self._probe = True, None
        if self._shown is None:
            self._shown = self._copy_groups()
        return self._shown

    def _copy_groups(self) -> list[Group]:
        """Return the groups with every group that holds covered parameters copied into its parts."""
        groups = self._optimizer.param_groups
        # Groups and parameters may come and go while training, so every plan is held against its group at every step.
        del self._plans[len(groups) :]
        shown: list[Group] = []
        for index, group in enumerate(groups):
            if index == len(self._plans):
                self._plans.append(GroupPlan(group, self._scales, self._exempt))
            elif not self._plans[index].fits(group):
                self._plans[index] = GroupPlan(group, self._scales, self._exempt)
            shown += self._plans[index].copy_into_parts(group, self.divisor)
        if self._warn_if_unused and (self._scales or self._exempt):
            self._warn_if_unused = False
            if all(plan.is_plain for plan in self._plans):
                warnings.warn(
                    f"{self!r} has no effect: the optimizer holds none of these parameters. Was the model moved or "
                    "wrapped after the scales were taken from it?",
                    stacklevel=2,
                )
        return shown

    def _write_back(self) -> None:
        """Carry over to the groups what the optimizer wrote into their copies, and drop the copies."""
        if self._shown is not None:
            for plan in self._plans:
                plan.write_back()
            self._shown = None


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
    ids = {id(scale) for scale in scales}
    return [
        float(group["lr"])
        for group in optimizer.param_groups
        if GROUP_MARK in group or any(id(parameter) in ids for parameter in group["params"])
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
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"ScaleUpdateRule needs a torch.optim.Optimizer, got {name}; where an engine has taken over the optimizer, "
            "build the optimizer from scale_param_groups"
        )
    # Its step is a search along one direction for all parameters together, with one learning rate.
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            f"{name} takes one step for all parameters in one group: scales cannot learn with lr / c in it"
        )
    inner = [key for key, value in vars(optimizer).items() if isinstance(value, Optimizer)]
    if inner:
        raise ValueError(
            f"{name} wraps another optimizer (its attribute {inner[0]!r}), which does the update: build the parameter "
            f"groups that {name} starts from with scale_param_groups; or, in a loop of your own, give the optimizer "
            "inside to ScaleUpdateRule"
        )
    if not runs_step_hooks(optimizer):
        raise ValueError(
            f"{name}.step() does not run torch's step hooks (it does not call Optimizer.__init__): "
            "use scale_param_groups for this optimizer"
        )
    if active_rule(optimizer) is not None:
        raise ValueError(f"this {name} has a ScaleUpdateRule already: remove() that one first")


def _by_id(argument: str, parameters: Iterable[Tensor]) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for parameter in parameters:
        if not isinstance(parameter, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{argument} takes parameters, got {type(parameter).__name__}")
        found[id(parameter)] = parameter
    return found


def _view_class(cls: type[Optimizer], read_groups: Callable[[], list[Group]]) -> type[Optimizer]:
    """Derive a class whose `param_groups` come from a function."""

    def refuse_write(view: Optimizer, groups: Any) -> None:
        raise RuntimeError(
            f"{cls.__name__}.step() replaces its param_groups, which ScaleUpdateRule cannot follow: "
            "use scale_param_groups"
        )

    # A property outranks the instance's `__dict__`, which holds the optimizer's own groups. The view is of a subclass
    # rather than a proxy, since a step calls `super()`, private methods and `isinstance`.
    namespace = {"param_groups": property(lambda view: read_groups(), refuse_write), "__module__": cls.__module__}
    make_class: Any = type(cls)  # the optimizer may have a metaclass, such as ABCMeta
    return make_class(cls.__name__, (cls,), namespace)
