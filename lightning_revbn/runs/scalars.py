"""Scalars of a run over training, whichever kind of file holds them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_STEP", "Advance", "Columns", "LogError", "Scalars", "Series"]

MAX_STEP = 2**53
"""No run is longer, and up to here steps are exact on a figure's axis too."""

Advance: TypeAlias = Callable[[int], object]
"""Readers call it with the number of bytes whenever they have read some."""


class LogError(Exception):
    """Logs that cannot be read; the message is one line and says why."""


@dataclass(frozen=True, eq=False)
class Series:
    """One scalar over training.

    Args:
        steps: Ascending, each once, shape `(N,)`.
        values: As they were logged, NaN and infinity too, shape `(N,)`.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Scalars:
    """All scalars of a run.

    Args:
        series: By key; in the order they were logged in as far as that is known, then by name.
        in_order: The keys whose order is known. A metrics.csv does not tell: its columns are sorted.
        warnings: What is missing or was left out, a line each.
        on_other_axes: The keys whose steps the user counts otherwise than the run's: by epochs or seconds, say.
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
    """Collects the points of a file by key, and makes series of them."""

    def __init__(self) -> None:
        self._points: dict[str, tuple[array[int], array[float]]] = {}

    def add(self, key: str, step: int, value: float) -> None:
        """Add a point, unless no run can reach its step.

        Args:
            key: The scalar's.
            step: When it was logged.
            value: What was logged.
        """
        if abs(step) > MAX_STEP:
            return
        if key not in self._points:
            self._points[key] = array("q"), array("d")
        steps, values = self._points[key]
        steps.append(step)
        values.append(value)

    def series(self) -> dict[str, Series]:
        """Return the series by key, in the order of their first points."""
        made: dict[str, Series] = {}
        for key, (steps, values) in self._points.items():
            all_steps = np.array(steps, dtype=np.int64)
            unique, from_end = np.unique(all_steps[::-1], return_index=True)
            made[key] = Series(unique, np.array(values, dtype=np.float64)[len(values) - 1 - from_end])
        return made
