"""Refuses optimizers for which the update rule cannot hold, before anything is updated.

Some optimizers do not update in a step that reads `param_groups`; they are always refused. Others keep values that
belong to a whole group, or to a place in it; they are refused if the rule would divide a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from torch import Tensor
from torch.optim import Optimizer

from lightning_revbn.core.arguments import as_number
from lightning_revbn.core.group_lists import are_values_of, tensors_by_group
from lightning_revbn.core.param_groups import Group

__all__ = ["refuse_divided", "refuse_divided_group", "refuse_settings", "updates_in_backward", "wraps_another"]

_APART = "build the optimizer from scale_param_groups, so that batch norm scales have groups of their own"


_FROM_ALL_PARAMETERS = {
    "reps_rel": ("DoG", "step size"),  # with lists of values that its first step makes
    "amplifier": ("pytorch_optimizer.ASGD", "learning rate"),
}
"""Settings of optimizers that compute a single number for a group from the norms of all its parameters."""


def wraps_another(optimizer: Optimizer, name: str) -> str | None:
    """Return the reason to refuse an optimizer that holds another optimizer, in an attribute or in a container there.

    Args:
        optimizer: The optimizer.
        name: The name of the optimizer.

    Returns:
        The message; None if it holds no optimizer.
    """
    for key, value in vars(optimizer).items():
        if any(isinstance(each, Optimizer) for each in _with_entries(value)):
            return (
                f"{name} wraps another optimizer (its attribute {key!r}), which does the update: build the parameter "
                f"groups that {name} starts from with scale_param_groups; or, in a loop of your own, give the "
                "optimizer inside to ScaleUpdateRule"
            )
    return None


def updates_in_backward(optimizer: Optimizer, name: str) -> str | None:
    """Return the reason to refuse an optimizer that updates while gradients are computed: its `step` does nothing.

    It recognises the gradient release of flashoptim and of torch-optimi, and LOMO's `fused_backward`.

    Args:
        optimizer: The optimizer.
        name: The name of the optimizer.

    Returns:
        The message; None for all other optimizers.
    """
    if getattr(optimizer, "_gradient_release", False) or optimizer.defaults.get("gradient_release"):
        return (
            f"{name} updates during the backward pass (gradient release), not in step(): switch the gradient release "
            f"off, or {_APART}"
        )
    if callable(getattr(optimizer, "fused_backward", None)):
        return (
            f"{name} updates during the backward pass (fused_backward), with one learning rate for all parameters: "
            "scales and shifts cannot learn in their own way in it"
        )
    return None


def refuse_divided(optimizer: Optimizer) -> None:
    """Raise if dividing a group would make an optimizer find other parameters, or weigh them wrongly.

    Args:
        optimizer: The optimizer.

    Raises:
        ValueError: If so; the message has the attribute or setting, and the remedy.
    """
    name = type(optimizer).__name__
    # heavyball's class: other optimizers of heavyball have the setting, but do not read it.
    is_schedule_free = any(cls.__name__ == "ScheduleFree" for cls in type(optimizer).__mro__)
    if is_schedule_free and any(group.get("weight_lr_power") for group in optimizer.param_groups):
        raise ValueError(_averaged(name))
    kept = tensors_by_group(optimizer)
    if kept:
        raise ValueError(
            f"{name} keeps values of its parameters by their place in the parameter groups (its attribute "
            f"{kept[0]!r}), where a divided group puts other parameters: {_APART}"
        )
    if getattr(getattr(optimizer, "mng", None), "index2config", None):
        raise ValueError(
            f"{name} has settings for parameters by their place in the parameter groups (bitsandbytes, "
            "GlobalOptimManager.register_parameters after override_config), where a divided group puts other "
            f"parameters: call register_parameters before override_config, or {_APART}"
        )


def refuse_settings(group: Group, where: str, *, divides_lr: bool, changes_weight_decay: bool) -> None:
    """Raise if a group lacks a number from which to compute the number of a part.

    Args:
        group: The group.
        where: The group's name.
        divides_lr: Whether a part learns with another learning rate.
        changes_weight_decay: Whether a part has another weight decay.

    Raises:
        ValueError: If so.
    """
    if divides_lr and "lr" not in group:
        raise ValueError(
            f"{where} has no learning rate: this optimizer has no 'lr' to divide, so batch norm scales and shifts "
            "learn as it decides; use it with a divisor and a multiplier of 1, or take another optimizer"
        )
    decay = group.get("weight_decay")
    if not changes_weight_decay or decay is None or isinstance(decay, Tensor):
        return
    if isinstance(decay, str) or as_number(decay) is None:
        raise ValueError(
            f"{where} has weight_decay={decay!r}: to exempt a parameter, or to divide its weight decay, takes a "
            "number. Give the optimizer a number, or exempt no parameter from weight decay and use a multiplier of 1"
        )


def refuse_divided_group(group: Group, where: str, *, has_faster: bool) -> None:
    """Raise if a group to be divided holds values that belong to all its parameters together.

    Args:
        group: The group.
        where: The group's name.
        has_faster: Whether a part learns with lr * k.

    Raises:
        ValueError: If so; the message has the key and the remedy.
    """
    for key, value in group.items():
        if key not in ("params", "param_names") and are_values_of(value, group["params"]):
            raise ValueError(
                f"{where} holds {key!r}, values for its parameters in their order, which cannot be divided with "
                f"them: {_APART}"
            )
    for key, (owner, what) in _FROM_ALL_PARAMETERS.items():
        if key in group:
            raise ValueError(
                f"{where} estimates its {what} from all its parameters together ({owner}, {key!r}), so none of them "
                f"can learn apart from the others: {_APART}"
            )
    if group.get("weight_lr_power") and "lr_max" in group and has_faster:
        raise ValueError(_averaged(where))


def _averaged(where: str) -> str:
    # If the group keeps the largest learning rate (`lr_max`), scales get the weight of the rest of the group. A larger
    # learning rate has a weight of its own. Without `lr_max`, every learning rate has.
    return (
        f"{where} averages its parameters with weights that follow from their learning rate, and keeps one sum of "
        "these weights for all of them ('weight_lr_power'), so parts with other learning rates would be averaged "
        f"wrongly: {_APART}, or set weight_lr_power=0"
    )


def _with_entries(value: object) -> Iterator[object]:
    """Yield a value, and its entries if it is a Python container."""
    yield value
    if isinstance(value, Mapping):
        yield from cast("Mapping[Any, object]", value).values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from cast("Iterable[object]", value)
