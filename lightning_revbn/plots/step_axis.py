"""Writes training steps on an axis."""

from __future__ import annotations

__all__ = ["step_label"]


def step_label(value: float, position: int | None = None) -> str:
    """Return the label of a tick.

    Args:
        value: The step.
        position: Which tick it is, as matplotlib's formatters are told.

    Returns:
        Thousands with a k where that is no longer.

    Example:
        >>> step_label(12_000), step_label(450)
        ('12k', '450')
    """
    return f"{value / 1000:g}k" if abs(value) >= 1000 and value % 100 == 0 else f"{value:.0f}"
