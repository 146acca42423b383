"""Writes the scales of batch norm layers, and reports what was written and what was left alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lightning_revbn.core.layers import (
    BatchNormRecord,
    ScaleSpec,
    TrainedPolicy,
    ZeroScalePolicy,
    find_batch_norms,
)


@dataclass(frozen=True)
class InitReport:
    """What was found in a model and what was done about it.

    `str(report)` is a table with equal layers folded into one row; `records` has every layer.

    Attributes:
        records: One record a batch norm layer, in the order of the model.
    """

    records: tuple[BatchNormRecord, ...]

    @property
    def rewritten(self) -> list[BatchNormRecord]:
        """The layers whose scale was written."""
        return [record for record in self.records if record.verdict == "rewrite"]

    @property
    def left_alone(self) -> list[BatchNormRecord]:
        """The layers that kept what they had."""
        return [record for record in self.records if record.verdict != "rewrite"]

    @property
    def scales(self) -> list[nn.Parameter]:
        """The scales for `ScaleUpdateRule`: every one that the patterns select, rewritten or not.

        Scales kept at a deliberate zero are not among them: at a hundredth of the learning rate a residual branch that
        starts closed would stay closed.
        """
        return rule_scales(self.records)

    def __str__(self) -> str:
        """Return the table."""
        return format_records(self.records)


def init_batch_norms(
    module: nn.Module,
    scale: ScaleSpec = 0.1,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    zero_scale: ZeroScalePolicy = "keep",
    trained: TrainedPolicy = "keep",
) -> InitReport:
    """Start the scale of every fresh batch norm layer below 1 (the method of https://arxiv.org/abs/2110.13989).

    Only scales are written, in place and without gradient; shifts, running statistics, hooks and classes stay as they
    are. Call it once the model has its final values, and before training. Trained layers and scales started at 0 on
    purpose are kept, unless asked for otherwise.

    Args:
        module: The model; its layers are found by `find_batch_norms`.
        scale: The value to start from, or a mapping from name patterns to values. 0.1 is the paper's starting point;
            it is a hyperparameter, to be chosen on validation data.
        include: `fnmatch` patterns on dotted names; a layer must match one of them.
        exclude: Patterns of layers to leave alone; stronger than `include`.
        zero_scale: `"keep"` or `"overwrite"` scales that start at 0.
        trained: `"keep"`, `"overwrite"` or `"error"` for layers that are not freshly initialised.

    Returns:
        The report. `report.scales` is what `ScaleUpdateRule` takes.

    Raises:
        ValueError: If an argument is wrong or a layer cannot be rewritten; nothing has been written then.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> report = init_batch_norms(model, scale=0.1)
        >>> len(report.rewritten), round(model[1].weight[0].item(), 4)
        (1, 0.1)
    """
    records = find_batch_norms(module, scale, include=include, exclude=exclude, zero_scale=zero_scale, trained=trained)
    refuse(records)
    write_scales(records)
    return InitReport(tuple(records))


def refuse(records: Sequence[BatchNormRecord]) -> None:
    """Raise if any layer must not be trained like this.

    Args:
        records: What `find_batch_norms` returned.

    Raises:
        ValueError: If a verdict is `"refuse"`; the message names the layers and the reasons.
    """
    refused = [record for record in records if record.verdict == "refuse"]
    if refused:
        lines = [
            f"  {record.name or '(the model)'} ({type(record.module).__name__}): {record.reason}" for record in refused
        ]
        raise ValueError("batch norm scales cannot be rewritten in\n" + "\n".join(lines))


def write_scales(records: Sequence[BatchNormRecord]) -> None:
    """Write the target into the scale of every layer whose verdict is `"rewrite"`.

    Args:
        records: What `find_batch_norms` returned.

    Raises:
        RuntimeError: If a written value does not read back from the layer.
    """
    with torch.no_grad():
        for record in records:
            if record.verdict != "rewrite" or record.target is None:
                continue
            scale = record.scale
            if scale is not None:
                scale.fill_(record.target)
            if scale is None or not scale_is(record, record.target):
                raise RuntimeError(f"the scale of {record.name!r} did not take the value {record.target}")


def scale_is(record: BatchNormRecord, value: float) -> bool:
    """Tell whether every channel of a layer's scale has a value.

    Args:
        record: The layer.
        value: The value, rounded to the scale's dtype for the comparison.

    Returns:
        True if all channels have it; False also for a layer without a scale.
    """
    scale = record.scale
    return scale is not None and bool((scale.detach() == torch.tensor(value, dtype=scale.dtype)).all())


def rule_scales(records: Sequence[BatchNormRecord], zero_kept: Sequence[str] | None = None) -> list[nn.Parameter]:
    """List the scales that the update rule covers.

    Args:
        records: The layers.
        zero_kept: Names of layers whose scale was kept at a deliberate zero; None reads them from the records.

    Returns:
        Every scale that the patterns select, frozen ones too (they may be unfrozen later), without those of
        `zero_kept`.
    """
    kept = set(zero_kept_names(records) if zero_kept is None else zero_kept)
    return [
        record.scale
        for record in records
        if record.target is not None and record.scale is not None and record.name not in kept
    ]


def zero_kept_names(records: Sequence[BatchNormRecord]) -> list[str]:
    """List the layers whose scale was kept at a deliberate zero.

    Args:
        records: The layers.

    Returns:
        Their dotted names.
    """
    return [record.name for record in records if record.state == "zero" and record.verdict == "skip"]


def format_records(records: Sequence[BatchNormRecord]) -> str:
    """Draw the table of a report.

    Args:
        records: The layers.

    Returns:
        Lines of text without a closing line break.
    """
    header = ("Layers", "Type", "Channels", "Scale", "Why")
    folded: dict[tuple[object, ...], list[BatchNormRecord]] = {}
    for record in records:
        folded.setdefault(_fold_key(record), []).append(record)
    rows = [_row(group) for group in folded.values()]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header) - 1)]
    lines = [_draw(row, widths) for row in [header, *rows]]
    rule = "-" * max(map(len, lines))
    rewritten = sum(record.verdict == "rewrite" for record in records)
    summary = f"{rewritten} of {len(records)} batch norm layers start from a new scale"
    return "\n".join([lines[0], rule, *lines[1:], rule, summary])


def _draw(row: Sequence[str], widths: Sequence[int]) -> str:
    return " | ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])


def _fold_key(record: BatchNormRecord) -> tuple[object, ...]:
    return type(record.module), record.verdict, record.target if record.verdict == "rewrite" else None, record.reason


def _row(group: list[BatchNormRecord]) -> tuple[str, str, str, str, str]:
    first, last = group[0], group[-1]
    name = first.name or "(the model)"
    layers = name if len(group) == 1 else f"{name} ... {last.name} ({len(group)})"
    channels = sorted({record.channels for record in group})
    width = str(channels[0]) if len(channels) == 1 else f"{channels[0]}-{channels[-1]}"
    scale = f"-> {first.target:g}" if first.verdict == "rewrite" else "kept"
    return layers, type(first.module).__name__, width, scale, first.reason
