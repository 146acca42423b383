"""Writes training steps on an axis."""

from __future__ import annotations

__all__ = ["step_label"]


def step_label(value: float, position: int | None = None) -> str:
    """Return the label of a tick.

    Args:
        value: The step.
        position: The index of the tick, which matplotlib passes to its formatters.

    Returns:
        The step; multiples of 100 from 1,000 on as thousands with a k.

    Example:
        >>> step_label(12_000), step_label(450)
        ('12k', '450')
    """
    return f"{value / 1000:g}k" if abs(value) >= 1000 and value % 100 == 0 else f"{value:.0f}"
