"""The classes of `lightning.pytorch` under their other name: `pytorch_lightning` has copies that share no base."""

from __future__ import annotations

import sys

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden


def twins(kind: type) -> tuple[type, ...]:
    """Return a class of `lightning.pytorch`, and its copy if `pytorch_lightning` is in use: for `isinstance`.

    Args:
        kind: The class.

    Returns:
        One class or two; `pytorch_lightning` is never imported for it.
    """
    module = sys.modules.get(kind.__module__.replace("lightning.pytorch", "pytorch_lightning", 1))
    copy = getattr(module, kind.__name__, kind)
    return (kind,) if copy is kind else (kind, copy)


def overrides(hook: str, module: object) -> bool:
    """Tell whether a LightningModule of either package has a hook of its own.

    Args:
        hook: Name of the method.
        module: The module.

    Returns:
        Whether it does.
    """
    parent = next((kind for kind in twins(LightningModule) if isinstance(module, kind)), LightningModule)
    return is_overridden(hook, module, parent)


def adopt(kind: type[Callback]) -> None:
    """Make a callback a `pytorch_lightning.Callback` too, if `pytorch_lightning` is in use: for its LightningCLI.

    A Trainer takes a callback for what it does, a configuration file only for what it is. Methods of
    `lightning.pytorch` stay the first.

    Args:
        kind: A class derived from `lightning.pytorch.Callback`.
    """
    copy = twins(Callback)[-1]
    if not issubclass(kind, copy):
        kind.__bases__ = (*kind.__bases__, copy)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the callbacks of a Trainer.

    Args:
        trainer: The Trainer.

    Returns:
        Its own list, in the order in which they are called.
    """
    return getattr(trainer, "callbacks")  # noqa: B009 # made in a connector, where no type checker looks
