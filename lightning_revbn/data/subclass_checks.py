"""Checks, when a subclass is defined, that Lightning will call the mixin."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import CodeType
from typing import Any

from lightning.pytorch.core.hooks import DataHooks

from lightning_revbn.lightning_compat import twins

__all__ = ["check_subclass"]


def check_subclass(cls: type, mixin: type, hooks: Sequence[str]) -> None:
    """Raise if a subclass of the mixin would bypass it without an error.

    Args:
        cls: The new class.
        mixin: The mixin among its bases.
        hooks: Names of the methods that must reach the mixin.

    Raises:
        TypeError: If the mixin comes after `LightningDataModule`, or an overridden method does not call the mixin's.
    """
    order = cls.__mro__
    before = order[: order.index(mixin)]
    name = mixin.__name__
    if not {*twins(DataHooks)}.isdisjoint(before):
        raise TypeError(
            f"{cls.__name__}: {name} must come before LightningDataModule among the bases, or "
            f"Lightning never calls it: class {cls.__name__}({name}, LightningDataModule)"
        )
    for owner in before:
        for hook in hooks:
            if hook in vars(owner) and not _calls_super(vars(owner)[hook], name):
                raise TypeError(f"{owner.__name__}.{hook} must call super().{hook}(...), or {name} does nothing")


def _calls_super(function: Any, mixin: str) -> bool:
    """Tell whether the code of a method mentions `super` or the mixin; True for callables whose code is not Python."""
    # A decorator that uses functools.wraps hides the code of the method.
    code = getattr(inspect.unwrap(function), "__code__", None)
    return not isinstance(code, CodeType) or _mentions(code, {"super", mixin})


def _mentions(code: CodeType, names: set[str]) -> bool:
    # Inner functions and comprehensions have code objects of their own.
    nested = (part for part in code.co_consts if isinstance(part, CodeType))
    return bool(names & set(code.co_names)) or any(_mentions(part, names) for part in nested)
