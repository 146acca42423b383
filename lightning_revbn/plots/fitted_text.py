"""Fits names into the space of a figure: measures them, leaves out their middle, breaks them into lines."""

from __future__ import annotations

import re

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from lightning_revbn.plots.output import NORMAL
from lightning_revbn.runs.names import one_line

__all__ = ["elided", "text_width", "wrapped"]

_MOST_CHARACTERS = 32  # of a layer's name


def text_width(text: str, size: float) -> float:
    """Measure a text.

    Args:
        text: The text.
        size: Font size in points.

    Returns:
        The width in inches.
    """
    return text_to_path.get_text_width_height_descent(text, FontProperties(size=size), ismath=False)[0] / 72


def elided(text: str) -> str:
    """Leave out the middle of a name that is too long.

    Args:
        text: The name.

    Returns:
        At most 32 characters.
    """
    over, kept = len(text) - _MOST_CHARACTERS, _MOST_CHARACTERS // 3
    return text if over <= 0 else f"{text[:kept]}\N{HORIZONTAL ELLIPSIS}{text[over + kept + 1 :]}"


def wrapped(text: str, width: float, lines: int = 3) -> str:
    """Break a name into lines, after a slash or dash if possible, and drop its beginning if it is too long.

    Args:
        text: The name, drawn at the normal font size.
        width: Width of a line in inches.
        lines: Largest number of lines.

    Returns:
        The lines.
    """
    done: list[str] = [""]
    for piece in re.findall(r"[^/_\s-]*[/_\s-]?", one_line(text)):
        if done[-1] and text_width(done[-1] + piece, NORMAL) > width:
            done.append("")
        for char in piece:
            if done[-1] and text_width(done[-1] + char, NORMAL) > width:
                done.append("")
            done[-1] += char
    kept = done[-lines:]
    return "\n".join(kept) if len(done) <= lines else "\n".join(["\N{HORIZONTAL ELLIPSIS}" + kept[0][1:], *kept[1:]])
