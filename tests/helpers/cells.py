"""The cells of the matrix that processes/scripts/matrix.py runs, and the cells that Lightning refuses."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import combinations, product
from typing import Any, NamedTuple

from helpers.strategies import RUNS_ON_CPU


class Cell(NamedTuple):
    """A combination of settings."""

    strategy: str
    precision: str
    optimization: str
    optimizers: int
    accumulation: int
    clipping: str

    @property
    def by_hand(self) -> bool:
        """Whether the module itself accumulates or clips: Lightning does neither under manual optimization."""
        return self.optimization == "manual" and (self.accumulation > 1 or self.clipping != "off")

    def __str__(self) -> str:
        """Return the cell as the name of a folder."""
        return re.sub(r"\W+", "-", "-".join(map(str, self)))


AXES: dict[str, list[Any]] = {
    "strategy": ["one device", "ddp", "ddp_spawn", "ddp_fork", *["fsdp2"] * RUNS_ON_CPU],
    "precision": ["32-true", "bf16-mixed", "bf16-true", "16-mixed"],
    "optimization": ["automatic", "manual"],
    "optimizers": [1, 2],
    "accumulation": [1, 3],
    "clipping": ["off", "norm", "value"],
}
CELLS = [Cell(*values) for values in product(*AXES.values())]


def impossible(cell: Cell) -> str | None:
    """Return a part of Lightning's error for a cell; None if Lightning allows the cell."""
    if cell.optimization == "automatic" and cell.optimizers > 1:
        return "multiple optimizers is only supported with manual optimization"
    return None


def sample(cells: Iterable[Cell]) -> list[Cell]:
    """Choose cells greedily that cover every pair of values of two axes that occurs in a possible cell.

    Args:
        cells: The cells to choose from.

    Returns:
        Nearly as few cells as possible, and for every strategy a cell of each impossible kind.
    """
    todo = {cell: _pairs(cell) for cell in cells}
    chosen: list[Cell] = []
    missing = set[Any]().union(*todo.values())
    while missing:
        best = max(todo, key=lambda cell: len(todo[cell] & missing))
        missing -= todo.pop(best)
        chosen.append(best)
    return chosen


def _pairs(cell: Cell) -> set[Any]:
    reason = impossible(cell)
    if reason is not None:
        return {(cell.strategy, reason)}
    return set(combinations(zip(AXES, cell, strict=True), 2))
