"""The callback that a variable of the environment switches on, in a script that does not know of it."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_revbn.callbacks.monitor import BatchNormMonitor
from lightning_revbn.callbacks.revisited import RevisitedBatchNorm
from lightning_revbn.lightning_compat import MisconfigurationException, callbacks_of, rank_zero_info

__all__ = ["RevisitedBatchNormFromEnvironment", "callback_from"]

_KEYS = tuple(inspect.signature(RevisitedBatchNorm).parameters)
_WORDS = {"true": True, "false": False, "none": None, "null": None}


class RevisitedBatchNormFromEnvironment(RevisitedBatchNorm):
    """Does nothing beside a `RevisitedBatchNorm` of the script's own.

    Alone, its checkpoints are those of a `RevisitedBatchNorm` in the script: each is resumed by the other.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._asked: bool = self.enabled
        self._alone = False

    @property
    @override
    def state_key(self) -> str:
        # The Trainer's constructor refuses two equal keys, and who else is there is not known before setup.
        return (RevisitedBatchNorm if self._alone else type(self)).__qualname__

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        others = (other for other in callbacks_of(trainer) if other is not self)
        self._alone = not any(isinstance(other, RevisitedBatchNorm) for other in others)
        self.enabled = self._asked and self._alone
        if self._asked and not self._alone and stage == "fit":
            rank_zero_info(
                "LIGHTNING_REVBN has no effect: the script has a RevisitedBatchNorm of its own, whose settings apply"
            )
        super().setup(trainer, pl_module, stage)


def callback_from(text: str, variable: str) -> RevisitedBatchNormFromEnvironment:
    """Make the callback that a text describes.

    Args:
        text: `1`; settings as `key=value,key=value`; or the path of a YAML file of settings.
        variable: Where the text is from, for messages.

    Returns:
        The callback.

    Raises:
        MisconfigurationException: If the text is not understood, whatever the reason.
    """
    try:
        return RevisitedBatchNormFromEnvironment(**_settings(text))
    except Exception as error:  # a variable of the environment must not end a script by anything but one clear error
        raise MisconfigurationException(
            f"{variable}={text!r}: {error}. It takes 1, settings such as 'scale=0.1,scale_lr_divisor=50', or the path "
            f"of a YAML file of settings, out of: {', '.join(_KEYS)}. Unset it to train without the callback."
        ) from error


def _settings(text: str) -> dict[str, Any]:
    if text.lower() in ("1", "true", "yes", "on"):
        return {}
    if text.endswith((".yaml", ".yml")) or Path(text).is_file():
        settings = _read(Path(text).expanduser())
    else:
        settings = dict(_pair(part) for part in text.split(","))
    for key in settings:
        if key not in _KEYS:
            raise ValueError(f"unknown key {key!r}")
    for key in ("enabled", "monitor"):
        if key == "monitor" and isinstance(settings.get(key), Mapping):
            settings[key] = BatchNormMonitor(**settings[key])
        elif not isinstance(settings.get(key, True), bool):
            raise TypeError(f"{key} must be true or false, got {settings[key]!r}")
    return settings


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path.absolute())!r}")
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise TypeError(f"{str(path)!r} must hold a mapping of settings, it holds {found!r}")
    return cast("dict[str, Any]", found)


def _pair(part: str) -> tuple[str, Any]:
    key, equals, value = (piece.strip() for piece in part.partition("="))
    if not equals:
        raise ValueError(f"{part!r} is no key=value")
    try:
        return key, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return key, _WORDS.get(value.lower(), value)
