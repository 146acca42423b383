"""What a checkpoint or a YAML file holds of a callback among hyperparameters: the arguments that make the same one."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from lightning.pytorch import Callback

__all__ = ["SavedByArguments", "restore", "save_by_arguments"]

_SAVING = 2
"""The pickle protocol of torch.save, of what `weights_only=True` reads, and of YAML; copies and processes use later."""


class SavedByArguments(Callback):
    """A callback that is saved by the arguments of its class alone, of which each is an attribute too.

    Copies, and pickles for other processes, hold what the callback knows of modules and fits. Saved, that would be
    private classes of this version of the package, which `torch.load(weights_only=True)` refuses.
    """

    def _arguments(self) -> dict[str, Any]:
        """Return the arguments, as plain values or callbacks that are saved in the same way."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return the arguments where the callback is saved; a subclass of a user's is pickled as usual."""
        if protocol == _SAVING and type(self) in _kinds:
            return restore, (type(self), self._arguments())
        return super().__reduce_ex__(protocol)


def restore(kind: type[SavedByArguments], arguments: dict[str, Any]) -> SavedByArguments:
    """Make a callback that was saved.

    Args:
        kind: Its class.
        arguments: Those of the class.

    Returns:
        A new callback.

    Raises:
        TypeError: If the class is none that is saved so; checkpoints come from anywhere.
    """
    if kind not in _kinds:
        raise TypeError(f"{kind!r} is no callback of lightning_revbn")
    return kind(**arguments)


_kinds: list[type[SavedByArguments]] = []


def save_by_arguments(kind: type[SavedByArguments]) -> None:
    """Let a class be saved by arguments, and read with `weights_only=True`.

    Args:
        kind: The class.
    """
    _kinds.append(kind)
    torch.serialization.add_safe_globals([kind, restore])  # pyright: ignore[reportUnknownMemberType] # torch does not type it
