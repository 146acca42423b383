"""Divides a deep network into stages by the names of its layers, and chooses the stages to label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_revbn.runs.names import shared_parts

__all__ = ["Stage", "choose_labels", "common_prefix", "find_stages", "name_rows"]


@dataclass(frozen=True)
class Stage:
    """Consecutive layers whose names share a beginning.

    Args:
        name: The shared beginning; the layer's own name for a single layer.
        first: The first row.
        stop: The row after the last.
    """

    name: str
    first: int
    stop: int

    @property
    def middle(self) -> float:
        """The position of its label; rows are centred at whole numbers."""
        return (self.first + self.stop - 1) / 2


def find_stages(layers: Sequence[str], apart: int) -> list[Stage]:
    """Divide a network into stages by its layers' names.

    Args:
        layers: Dotted names in order.
        apart: Number of rows that a label needs. A stage is divided while its parts are large enough for labels.

    Returns:
        The stages, from the first layer to the last.

    Example:
        >>> [stage.name for stage in find_stages(["bn1", "layer1.0.bn1", "layer1.1.bn1", "layer2.0.bn1"], 2)]
        ['bn1', 'layer1', 'layer2.0.bn1']
    """
    parts = [layer.split(".") for layer in layers]
    stages = [Stage("", 0, len(layers))]
    for depth in range(max(map(len, parts))):
        divided = [_parts_of_stage(stage, parts, depth, apart) for stage in stages]
        stages = [part for own in divided for part in own]
    return stages


def choose_labels(stages: Sequence[Stage], apart: float) -> list[Stage]:
    """Choose the stages to label, the longest first.

    Args:
        stages: All stages.
        apart: Number of rows that a label needs.

    Returns:
        Stages whose middles are far enough from each other, in order.
    """
    chosen: list[Stage] = []
    for stage in sorted(stages, key=lambda stage: stage.first - stage.stop):
        if all(abs(stage.middle - other.middle) >= apart for other in chosen):
            chosen.append(stage)
    return sorted(chosen, key=lambda stage: stage.first)


def name_rows(layers: Sequence[str], apart: int) -> tuple[list[Stage], list[Stage]]:
    """Divide a network for its labels: into layers if all fit or fewer than three stages can be labelled, else stages.

    Args:
        layers: Dotted names in order.
        apart: Number of rows that a label needs.

    Returns:
        The parts, and the parts to label.

    Example:
        >>> blocks = [f"blocks.{i}.bn" for i in range(90)]
        >>> [part.name for part in name_rows(["stem", *blocks], 30)[1]]
        ['stem', 'blocks.29.bn', 'blocks.59.bn', 'blocks.89.bn']
    """
    stages = find_stages(layers, apart)
    labels = choose_labels(stages, apart)
    if len(labels) > 2 and apart > 1:
        return stages, labels
    single = [Stage(name, row, row + 1) for row, name in enumerate(layers)]
    return single, choose_labels(single, apart)


def common_prefix(layers: Sequence[str]) -> str:
    """Return the leading parts that all names share, so that labels can leave them out.

    Args:
        layers: Dotted names.

    Returns:
        The parts, each with its dot; empty if the names share no part, or there is a single name.

    Example:
        >>> common_prefix(["model.layer1.bn1", "model.layer2.bn1"])
        'model.'
    """
    parts = [layer.split(".")[:-1] for layer in layers]
    return "".join(f"{part}." for part in shared_parts(parts)) if len(layers) > 1 else ""


def _parts_of_stage(stage: Stage, names: Sequence[Sequence[str]], depth: int, apart: int) -> list[Stage]:
    """Divide a stage by the next part of the names, unless its parts would be too small for labels."""
    heads = [".".join(names[row][: depth + 1]) for row in range(stage.first, stage.stop)]
    begins = [i for i, head in enumerate(heads) if not i or head != heads[i - 1]]
    size = len(heads)
    if depth and size > 1 and (size < max(2, len(begins)) * apart):
        return [stage]
    ends = [*begins[1:], size]
    return [Stage(heads[i], stage.first + i, stage.first + end) for i, end in zip(begins, ends, strict=True)]
