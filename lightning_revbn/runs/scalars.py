"""Scalars of a run over training, independent of the file format."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_STEP", "Advance", "Columns", "LogError", "Scalars", "Series"]

MAX_STEP = 2**53
"""The largest step: no run is longer, and float64, as on a figure's axis, holds steps exactly up to here."""

Advance: TypeAlias = Callable[[int], object]
"""A function that readers call with the number of bytes after every read."""


class LogError(Exception):
    """A log cannot be read, or runs cannot be compared; the message gives the reason in a single line."""


@dataclass(frozen=True, eq=False)  # arrays compare to arrays, not to True or False
class Series:
    """A scalar over training.

    Args:
        steps: Strictly ascending, shape `(N,)`.
        values: The values as logged, including NaN and infinity, shape `(N,)`.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Scalars:
    """All scalars of a run.

    Args:
        series: Series by key: first the keys whose order is known, as they were logged, then the others by name.
        in_order: The keys whose order is known. A metrics.csv does not keep the order: its columns are sorted.
        warnings: A line for each part of the log that is missing or was left out.
        on_other_axes: Keys whose steps the user counts on another axis than the run's, such as epochs or seconds.
    """

    series: Mapping[str, Series]
    in_order: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()
    on_other_axes: frozenset[str] = frozenset()

    @property
    def last_step(self) -> int:
        """The last step of the run at which anything was logged."""
        own = [one for key, one in self.series.items() if key not in self.on_other_axes]
        return max(int(one.steps[-1]) for one in own or self.series.values() if len(one.steps))


class Columns:
    """Collects the points of a file by key, and turns them into series."""

    def __init__(self) -> None:
        self._points: dict[str, tuple[array[int], array[float]]] = {}

    def add(self, key: str, step: int, value: float) -> None:
        """Add a point, unless its step is beyond MAX_STEP.

        Args:
            key: The key of the scalar.
            step: The step at which it was logged.
            value: The logged value.
        """
        if abs(step) > MAX_STEP:
            return
        if key not in self._points:
            self._points[key] = array("q"), array("d")
        steps, values = self._points[key]
        steps.append(step)
        values.append(value)

    def series(self) -> dict[str, Series]:
        """Return the series by key, in the order of their first points; the last value of a step counts."""
        made: dict[str, Series] = {}
        for key, (steps, values) in self._points.items():
            all_steps = np.array(steps, dtype=np.int64)
            # np.unique returns the first place of each step, which is the last in the reversed steps.
            unique, from_end = np.unique(all_steps[::-1], return_index=True)
            made[key] = Series(unique, np.array(values, dtype=np.float64)[len(values) - 1 - from_end])
        return made
