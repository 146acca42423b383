"""Refuses a fit whose ranks have different callbacks of this package, or different settings."""

from __future__ import annotations

import functools
from typing import Any

from lightning.pytorch import Callback, Trainer
from typing_extensions import override

from lightning_revbn.core.next_call import NextCall, followed_by
from lightning_revbn.core.rank_settings import RankSettings
from lightning_revbn.lightning_compat import END_OF_SETUP, MisconfigurationException, callbacks_of

__all__ = ["SameOnAllRanks"]


class SameOnAllRanks(Callback):
    """A callback that every rank must have, with the same settings."""

    _called = "callback"
    """The name that users know."""

    def _compared(self, trainer: Trainer) -> dict[str, Any] | None:
        """Return the settings that ranks must share, as plain values; None if the callback takes no part in the fit."""
        raise NotImplementedError

    def _compare_ranks(self, trainer: Trainer) -> list[NextCall]:
        """Post the settings of this rank, and compare once all ranks have been set up.

        A rank without the callback runs no code of this package, so ranks cannot wait for each other's settings. They
        post their settings while callbacks are set up. They compare at the barrier that ends Lightning's setup: a rank
        whose settings are missing then has no callback.

        Args:
            trainer: The Trainer, in the setup of a fit. Its first callback of this package speaks for all.

        Returns:
            The wrapped barrier, to be restored if the setup fails. It raises a MisconfigurationException if ranks
            differ.
        """
        ours = [found for found in callbacks_of(trainer) if isinstance(found, SameOnAllRanks)]
        compared = [(found, settings) for found in ours if (settings := found._compared(trainer)) is not None]
        if not compared or compared[0][0] is not self:
            return []
        comparison = RankSettings.open("callbacks")
        if comparison is None:
            return []
        parts: dict[str, dict[str, Any]] = {}
        for found, settings in compared:
            earlier = sum(name.partition(" ")[0] == found._called for name in parts)
            parts[f"{found._called} {earlier + 1}" if earlier else found._called] = settings
        comparison.post(parts)
        refuse = functools.partial(_refuse_differences, comparison)
        return [_AtEndOfSetup(trainer.strategy, "barrier", followed_by(refuse))]


class _AtEndOfSetup(NextCall):
    """Acts at the barrier that ends the setup, and lets barriers in user hooks pass."""

    @override
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if END_OF_SETUP in (*args, *kwargs.values()):
            return super().__call__(*args, **kwargs)
        return self.__wrapped__(*args, **kwargs)


def _refuse_differences(comparison: RankSettings) -> None:
    differences = comparison.differences()
    if differences:
        raise MisconfigurationException(
            f"ranks have different settings: {'; '.join(differences)}. They would train different networks, or wait "
            "for each other without end. Give every rank the same callbacks and settings; where LIGHTNING_REVBN "
            "switches the callback on, set it on every node"
        )
