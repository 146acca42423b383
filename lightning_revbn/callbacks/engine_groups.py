"""Checks groups made by `scale_param_groups` in optimizers that cannot take an update rule.

An engine such as DeepSpeed trains flat copies of the parameters, so scales cannot be identified in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, cast

from lightning.pytorch import Trainer

from lightning_revbn.callbacks.rule_settings import RuleSettings
from lightning_revbn.core.layers import Selection
from lightning_revbn.core.param_groups import MARKS, scale_param_groups
from lightning_revbn.core.rates import Rates
from lightning_revbn.lightning_compat import MisconfigurationException

__all__ = ["check_engine_groups", "permanent_groups", "what_groups_miss"]


def permanent_groups(optimizer: Any) -> list[dict[str, Any]]:
    """List an optimizer's groups that `scale_param_groups` has made.

    Args:
        optimizer: An optimizer of any kind.

    Returns:
        The groups.
    """
    return [group for group in optimizer.param_groups if any(mark in group for mark in MARKS)]


def what_groups_miss(optimizer: Any, settings: RuleSettings) -> str:
    """Describe the settings that an optimizer's groups from `scale_param_groups` do not cover.

    Args:
        optimizer: An optimizer of any kind.
        settings: How scales and shifts learn.

    Returns:
        The end of a sentence; empty without such groups.
    """
    if not permanent_groups(optimizer):
        return ""
    rates = Rates(settings.divisor, settings.shift_multiplier)
    kinds = [f"not every {role} is in such a group" for role in ("scale", "shift") if rates.change(role)]
    arguments = {"weight_decay_exempt": settings.weight_decay_exempt, **_unlike_defaults(settings)}
    return (
        f"; it has such groups, but {', or '.join([*kinds, 'some decay'])}: call scale_param_groups on the whole "
        f"module, with {_as_code(arguments)}"
    )


def check_engine_groups(
    owner: str, optimizer: Any, trainer: Trainer, selection: Selection, settings: RuleSettings
) -> None:
    """Check that an engine's optimizer has groups made by `scale_param_groups`.

    Args:
        owner: The callback's name, for the message.
        optimizer: The engine's optimizer.
        trainer: The Trainer.
        selection: The settings that decide on every layer.
        settings: How scales and shifts learn.

    Raises:
        MisconfigurationException: If it has none; the message holds the code to add.
    """
    if permanent_groups(optimizer):
        return
    # DeepSpeed's wrapper holds the user's optimizer, whose class the message names.
    inner = cast("type[object]", type(getattr(optimizer, "optimizer", optimizer)))
    name = f"torch.optim.{inner.__name__}" if inner.__module__.startswith("torch.optim.") else inner.__name__
    arguments = _arguments(optimizer.param_groups[0], selection, settings)
    config: object = getattr(trainer.strategy, "config", None)
    in_config = isinstance(config, Mapping) and "optimizer" in config
    replaced = ", and remove the optimizer from DeepSpeed's configuration, which takes its place" if in_config else ""
    raise MisconfigurationException(
        f"{owner}: {type(optimizer).__name__} trains copies of the parameters, in which batch norm "
        "scales and shifts cannot be identified. Give them their own groups, by two lines in configure_optimizers:\n\n"
        "    from lightning_revbn import scale_param_groups\n"
        f"    return {name}(scale_param_groups(self, "
        f"{_as_code(arguments)}))\n\n"
        f"with the other arguments of {inner.__name__} that you use{replaced}. "
        "To train without such groups: scale_lr_divisor=1, shift_lr_multiplier=1, weight_decay_exempt=None."
    )


def _arguments(group: Mapping[str, Any], selection: Selection, settings: RuleSettings) -> dict[str, Any]:
    """Return the arguments of `scale_param_groups` that match the callback's settings."""
    return {
        "lr": float(group.get("initial_lr", group["lr"])),  # a schedule has changed lr, and keeps the user's number
        "weight_decay": group.get("weight_decay", 0.0),
        **_unlike_defaults(settings, include=selection.include, exclude=selection.exclude),
    }


def _unlike_defaults(settings: RuleSettings, **patterns: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of `scale_param_groups` that differ from its defaults."""
    asked: dict[str, Any] = {
        "divisor": settings.divisor,
        "weight_decay_exempt": settings.weight_decay_exempt,
        "shift_multiplier": settings.shift_multiplier,
        **patterns,
    }
    defaults = signature(scale_param_groups).parameters
    return {name: value for name, value in asked.items() if value != defaults[name].default}


def _as_code(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())
