"""What Lightning's Trainer has and does not declare."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the callbacks of a Trainer.

    Args:
        trainer: The Trainer.

    Returns:
        Its own list, in the order in which they are called.
    """
    return getattr(trainer, "callbacks")  # noqa: B009 # made in a connector, where no type checker looks
