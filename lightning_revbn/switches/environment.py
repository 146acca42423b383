"""The entry point that every Trainer calls: returns the callback if the variable `LIGHTNING_REVBN` asks for it."""

from __future__ import annotations

import os
from typing import Any

__all__ = ["VARIABLE", "asked", "callbacks"]

VARIABLE = "LIGHTNING_REVBN"
_OFF = ("", "0", "false", "no", "off")


def asked() -> str:
    """Return the present text of the variable; "" if it switches the callback off.

    Returns:
        The text without spaces around it.
    """
    text = os.environ.get(VARIABLE, "").strip()
    return "" if text.lower() in _OFF else text


def callbacks() -> list[Any]:
    """Return the callback that `LIGHTNING_REVBN` asks for, if any.

    `1` switches the callback on with its defaults, `scale=0.1,scale_lr_divisor=50` with these settings, and the path of
    a YAML file with the settings in the file. If it is unset, empty, `0`, `false`, `no` or `off`, no callback is
    imported.

    Returns:
        The callbacks for the Trainer to add.
    """
    text = asked()
    if not text:
        return []
    from lightning_revbn.switches.environment_callback import callback_from

    callback = callback_from(text, VARIABLE)
    callback.follows_variable = True
    return [callback]
