"""The callback that an environment variable adds to a script, with no line of the script changed."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_revbn.callbacks.revisited import RevisitedBatchNorm
from lightning_revbn.core.printable import error_text, shortened
from lightning_revbn.lightning_compat import MisconfigurationException, callbacks_of, rank_zero_info, rank_zero_warn
from lightning_revbn.switches.environment import VARIABLE, asked
from lightning_revbn.switches.settings_text import KEYS, settings_from

__all__ = ["RevisitedBatchNormFromEnvironment", "callback_from"]


class RevisitedBatchNormFromEnvironment(RevisitedBatchNorm):
    """Acts unless the script has a `RevisitedBatchNorm` of its own, or the environment has added a newer callback.

    If it acts, its checkpoints equal the checkpoints of a `RevisitedBatchNorm` in the script: each resumes the other.
    Lightning adds it to the script's own list of callbacks, so the next Trainer with that list has it too.
    """

    follows_variable = False
    """Whether it acts only while the variable is on: a script's list may keep callbacks that it once added."""

    _numbers = itertools.count(1)

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._asked: bool = self.enabled
        self._number = next(self._numbers)
        self._fitted_in: weakref.WeakSet[Trainer] = weakref.WeakSet()

    @override
    def _key_of(self, told: Mapping[str, Any]) -> str:
        # The Trainer's constructor refuses two equal keys, and the other callbacks are unknown before setup.
        return f"{type(self).__qualname__} {self._number}"

    @property
    @override
    def _key_alone(self) -> str:
        return RevisitedBatchNorm.__qualname__

    @property
    @override
    def _is_asked(self) -> bool:
        return self._asked

    @property
    def _is_switched_off(self) -> bool:
        return self.follows_variable and not asked()

    def _is_newest(self, trainer: Trainer) -> bool:
        added = [other for other in callbacks_of(trainer) if isinstance(other, RevisitedBatchNormFromEnvironment)]
        # Another Trainer with the same list may have added a callback after this Trainer's first fit.
        there = [other for other in added if trainer in other._fitted_in] or added
        return self._number == max((other._number for other in there), default=self._number)

    @override
    def _gives_way(self, trainer: Trainer) -> bool:
        return self._is_switched_off or _has_own(trainer) or not self._is_newest(trainer)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self._is_busy(trainer):
            self.enabled = self._acts_in(trainer)
        if self._asked and stage == "fit" and self._is_newest(trainer):
            if self._is_switched_off:
                rank_zero_warn(
                    f"{VARIABLE} has no effect: it is off now, and was on when this Trainer or an earlier one was made"
                )
            elif _has_own(trainer):
                rank_zero_info(
                    f"{VARIABLE} has no effect: the script has a RevisitedBatchNorm of its own, whose settings apply"
                )
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self._belongs_to(trainer):
            self._fitted_in.add(trainer)

    @override
    def __getstate__(self) -> dict[str, Any]:
        # A WeakSet cannot be pickled, and a copy belongs to no Trainer yet.
        return {**super().__getstate__(), "_fitted_in": None}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._fitted_in = weakref.WeakSet()


def _has_own(trainer: Trainer) -> bool:
    """Tell whether the script itself has given a RevisitedBatchNorm."""
    ours = (callback for callback in callbacks_of(trainer) if isinstance(callback, RevisitedBatchNorm))
    return any(not isinstance(callback, RevisitedBatchNormFromEnvironment) for callback in ours)


def callback_from(text: str, variable: str) -> RevisitedBatchNormFromEnvironment:
    """Make the callback that a text describes.

    Args:
        text: `1`; settings as `key=value,key=value`; or the path of a YAML file of settings.
        variable: Name of the environment variable, for messages.

    Returns:
        The callback.

    Raises:
        MisconfigurationException: If the text cannot be read as settings, for any reason.
    """
    try:
        return RevisitedBatchNormFromEnvironment(**settings_from(text))
    except Exception as error:  # a bad variable must end a script with a clear error only
        # A text may be as long as a file, and an error may quote all of it.
        told = f"{variable}={shortened(repr(text), 200)}: {error_text(error, 400)}"
        raise MisconfigurationException(
            f"{told}. It takes 1, settings such as 'scale=0.1,scale_lr_divisor=50', or the path "
            f"of a YAML file of settings, out of: {', '.join(KEYS)}. Unset it to train without the callback."
        ) from error
