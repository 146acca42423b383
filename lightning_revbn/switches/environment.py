"""The entry point that every Trainer calls: the callback, if `LIGHTNING_REVBN` in the environment asks for it."""

from __future__ import annotations

import os
from typing import Any

__all__ = ["VARIABLE", "asked", "callbacks"]

VARIABLE = "LIGHTNING_REVBN"
_OFF = ("", "0", "false", "no", "off")


def asked() -> str:
    """Return what the variable asks for now; "" where it switches the callback off.

    Returns:
        Its text.
    """
    text = os.environ.get(VARIABLE, "").strip()
    return "" if text.lower() in _OFF else text


def callbacks() -> list[Any]:
    """Return what `LIGHTNING_REVBN` asks for: one callback or none.

    `1` switches the callback on with its defaults, `scale=0.1,scale_lr_divisor=50` with these settings, and the path
    of a YAML file with those in the file. Unset, empty, `0` or `false`, nothing is imported.

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
