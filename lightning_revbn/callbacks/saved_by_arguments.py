"""Saves a callback among hyperparameters, in checkpoints and YAML files, as the arguments of its class."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from lightning.pytorch import Callback

__all__ = ["SavedByArguments", "restore", "save_by_arguments"]

_SAVING = 2
"""The pickle protocol of torch.save, `weights_only=True` and YAML; copies and processes use later protocols."""


class SavedByArguments(Callback):
    """A callback that is saved by the arguments of its class alone; each argument is an attribute too.

    Copies, and pickles for other processes, also hold the state of modules and fits. Files leave this state out: it
    needs private classes of this package's version, which `torch.load(weights_only=True)` refuses.
    """

    def _arguments(self) -> dict[str, Any]:
        """Return the arguments, as plain values or callbacks that are saved in the same way."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return the arguments where the callback is saved; a user's subclass is pickled as usual."""
        if protocol == _SAVING and type(self) in _kinds:
            return restore, (type(self), self._arguments())
        return super().__reduce_ex__(protocol)


def restore(kind: type[SavedByArguments], arguments: dict[str, Any]) -> SavedByArguments:
    """Make a callback that was saved.

    Args:
        kind: The class of the callback.
        arguments: The arguments of the class.

    Returns:
        A new callback.

    Raises:
        TypeError: If `save_by_arguments` has not registered the class: anybody may have made the checkpoint.
    """
    if kind not in _kinds:
        raise TypeError(f"{kind!r} is not a callback of lightning_revbn")
    return kind(**arguments)


_kinds: list[type[SavedByArguments]] = []


def save_by_arguments(kind: type[SavedByArguments]) -> None:
    """Register a class to be saved by arguments, and read with `weights_only=True`.

    Args:
        kind: The class.
    """
    _kinds.append(kind)
    torch.serialization.add_safe_globals([kind, restore])  # pyright: ignore[reportUnknownMemberType] # torch does not type it
