"""Writes the scales of batch norm layers, and reports which layers were written and which were left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lightning_revbn.core.arguments import ScaleSpec, TrainedPolicy, ZeroScalePolicy, check_eps
from lightning_revbn.core.eps import choose_eps, write_eps
from lightning_revbn.core.gathered import gathered
from lightning_revbn.core.layers import BatchNormRecord, Verdict, find_batch_norms
from lightning_revbn.core.table import first_to_last, plain_table, rich_table
from lightning_revbn.core.torch_compat import forward_pre_hooks

__all__ = [
    "InitReport",
    "fill_scale",
    "forget_lazy",
    "init_batch_norms",
    "note_eps",
    "refuse",
    "rule_scales",
    "rule_shifts",
    "write_scales",
    "zero_kept_names",
]


@dataclass(frozen=True)
class InitReport:
    """The batch norm layers of a model, with the verdict on each.

    `str(report)` is a table with equal layers folded into a single row; `records` has every layer.

    Attributes:
        records: A record per batch norm layer, in the order of the model.
    """

    records: tuple[BatchNormRecord, ...]

    @property
    def rewritten(self) -> list[BatchNormRecord]:
        """The layers whose scale was written."""
        return [record for record in self.records if record.verdict == "rewrite"]

    @property
    def left_alone(self) -> list[BatchNormRecord]:
        """The layers whose scale was not written."""
        return [record for record in self.records if record.verdict != "rewrite"]

    @property
    def counts(self) -> dict[str, int]:
        """How many layers got each verdict."""
        found = Counter(record.verdict for record in self.records)
        return {verdict: found[verdict] for verdict in get_args(Verdict)}

    def to_dict(self) -> dict[str, Any]:
        """Return the whole report as plain values for JSON: the counts, and every layer unfolded."""
        layers = [
            {
                "name": record.name,
                "class": type(record.module).__name__,
                "channels": record.channels,
                "verdict": record.verdict,
                "state": record.state,
                "reason": record.reason,
                "target": record.target,
                "copy_of": record.copy_of,
                "eps": record.eps,
                "eps_before": record.eps_before,
            }
            for record in self.records
        ]
        return {"counts": self.counts, "layers": layers}

    @property
    def scales(self) -> list[nn.Parameter]:
        """The scales for `ScaleUpdateRule`: every scale that the patterns select, rewritten or not.

        Scales kept at a deliberate zero are left out: at lr / 100, a residual branch that starts closed would stay
        closed.
        """
        return rule_scales(self.records)

    @property
    def shifts(self) -> list[nn.Parameter]:
        """The shifts for `ScaleUpdateRule(shifts=...)`: every shift that the patterns select.

        Shifts of layers whose scale was kept at a deliberate zero are included.
        """
        return rule_shifts(self.records)

    def __str__(self) -> str:
        """Return the table as plain text."""
        return plain_table(*_table(self.records))

    def __rich__(self) -> object:
        """Return the table for rich's console."""
        return rich_table(*_table(self.records))


def init_batch_norms(
    module: nn.Module,
    scale: ScaleSpec = 0.1,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    zero_scale: ZeroScalePolicy = "keep",
    trained: TrainedPolicy = "keep",
    eps: float | None = None,
) -> InitReport:
    """Start the scale of every fresh batch norm layer below 1 (the method of https://arxiv.org/abs/2110.13989).

    Scales are written in place and without gradient, and eps is set if given. Shifts, running statistics, hooks and
    classes stay as they are. Call it once the model has its final values, and before training. Trained layers, and
    scales that start at 0 on purpose, are kept by default. Frozen copies of a network get the scales of the network.

    Args:
        module: The model; `find_batch_norms` finds its layers.
        scale: The starting value, or a mapping from name patterns to values. 0.1 is the paper's starting point; choose
            this hyperparameter on validation data.
        include: `fnmatch` patterns on dotted names; a layer must match one of them.
        exclude: Patterns of layers to leave alone; stronger than `include`.
        zero_scale: `"keep"` or `"overwrite"` scales that start at 0.
        trained: `"keep"`, `"overwrite"` or `"error"` for layers that are not freshly initialised.
        eps: The eps to set in fresh layers, as `lightning_revbn.core.eps.set_eps` does; None leaves it. No `state_dict`
            holds eps.

    Returns:
        The report. `ScaleUpdateRule` takes its `scales`.

    Raises:
        ValueError: If an argument is wrong or a layer cannot be rewritten; then nothing is written.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> report = init_batch_norms(model, scale=0.1)
        >>> len(report.rewritten), round(model[1].weight[0].item(), 4)
        (1, 0.1)
    """
    eps = check_eps(eps)
    # FSDP1 is left out: before the whole model is wrapped, a gather would make a part of it the root.
    with gathered(module, write=True, fsdp=False):
        records = find_batch_norms(
            module, scale, include=include, exclude=exclude, zero_scale=zero_scale, trained=trained
        )
        refuse(records)
        chosen = {} if eps is None else choose_eps(module, records, eps)
        write_scales(records)
    return InitReport(tuple(note_eps(records, write_eps(module, chosen))))


def note_eps(records: Sequence[BatchNormRecord], before: Mapping[str, float | None]) -> list[BatchNormRecord]:
    """Add the earlier eps of layers to their records.

    Args:
        records: The layers.
        before: The earlier eps by name, as `write_eps` returns it.

    Returns:
        The records, whose table now shows eps.
    """
    return [replace(record, eps_before=before[record.name]) if record.name in before else record for record in records]


def refuse(records: Sequence[BatchNormRecord]) -> None:
    """Raise if the verdict on any layer is `"refuse"`.

    Args:
        records: The records from `find_batch_norms`.

    Raises:
        ValueError: If so; the message names the layers and the reasons.
    """
    refused = [record for record in records if record.verdict == "refuse"]
    if refused:
        lines = [
            f"  {record.name or '(the model)'} ({type(record.module).__name__}): {record.reason}" for record in refused
        ]
        raise ValueError("batch norm scales cannot be rewritten in\n" + "\n".join(lines))


def write_scales(records: Sequence[BatchNormRecord]) -> None:
    """Write the target into the scale of every layer whose verdict is `"rewrite"`.

    A hook writes a lazy layer when its first input has made it, unless a checkpoint has made it before.

    Args:
        records: The records from `find_batch_norms`.

    Raises:
        RuntimeError: If a written value does not read back from the layer.
    """
    for record in records:
        if record.verdict != "rewrite" or record.target is None:
            continue
        if record.state == "lazy":
            forget_lazy(record)  # a hook of an earlier call may have another target
            _WhenMade(record.module, record.target)
            continue
        fill_scale(record.module, record.target)
        # A parametrisation may map the written values to other values: only reading them back shows it.
        if not record.has_scale(record.target):
            raise RuntimeError(f"the scale of {record.name!r} did not take the value {record.target}")


def forget_lazy(record: BatchNormRecord) -> None:
    """Remove the hook that waits to write a lazy layer, if there is such a hook.

    Args:
        record: The layer.
    """
    for hook in forward_pre_hooks(record.module):
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, _WhenMade):
            owner.remove()


class _WhenMade:
    """Writes the scale of a lazy layer in the forward pass that makes it, then removes itself."""

    def __init__(self, layer: nn.Module, target: float) -> None:
        self._target = target
        self._was_lazy = False
        # torch's own hook, which makes the parameters, runs between these two.
        self._handles = [
            layer.register_forward_pre_hook(self.before, prepend=True),
            layer.register_forward_pre_hook(self.after),
        ]

    def before(self, layer: nn.Module, inputs: Any) -> None:
        # If a checkpoint has made the layer since, its values are not fresh.
        self._was_lazy = is_lazy(cast("Tensor", layer.weight))

    def after(self, layer: nn.Module, inputs: Any) -> None:
        self.remove()
        if self._was_lazy:
            fill_scale(layer, self._target)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
def fill_scale(layer: nn.Module, value: float | Tensor) -> None:
    """Set the scale of a layer in place, or through its parametrisation.

    Args:
        layer: A batch norm layer that has a scale.
        value: A value for all channels, or values of shape `(C,)`.
    """
    scale = cast("Tensor", layer.weight)
    values = value.to(scale) if isinstance(value, Tensor) else torch.full_like(scale, value)
    if is_parametrized(layer, "weight"):
        layer.weight = values  # through right_inverse: a value filled in place would be lost
    else:
        scale.copy_(values)


def rule_scales(records: Sequence[BatchNormRecord], zero_kept: Sequence[str] | None = None) -> list[nn.Parameter]:
    """List the scales that the update rule covers.

    Args:
        records: The layers.
        zero_kept: Names of layers whose scale was kept at a deliberate zero; None reads them from the records.

    Returns:
        Every scale that the patterns select, except in layers of `zero_kept`. Frozen scales are included, since they
        may be unfrozen later.
    """
    kept = set(zero_kept_names(records) if zero_kept is None else zero_kept)
    return [
        record.scale
        for record in records
        if record.target is not None and record.scale is not None and record.name not in kept
    ]


def rule_shifts(records: Sequence[BatchNormRecord]) -> list[nn.Parameter]:
    """List the shifts that the update rule covers.

    Args:
        records: The layers.

    Returns:
        Every shift that the patterns select. Frozen shifts are included, since they may be unfrozen later. The shift
        of an `InputBatchNorm` is fixed, so it has no parameter.
    """
    return [record.shift for record in records if record.target is not None and record.shift is not None]


def zero_kept_names(records: Sequence[BatchNormRecord]) -> list[str]:
    """List the layers whose scale was kept at a deliberate zero.

    Args:
        records: The layers.

    Returns:
        Their dotted names.
    """
    return [record.name for record in records if record.state == "zero" and record.verdict == "skip"]


def _table(records: Sequence[BatchNormRecord]) -> tuple[tuple[str, ...], list[tuple[str, ...]], str]:
    """Return header, rows and closing sentence of a report, with equal layers folded into a single row."""
    shows_eps = any(record.eps_before is not None for record in records)
    folded: dict[tuple[object, ...], list[BatchNormRecord]] = {}
    for record in records:
        folded.setdefault((*_fold_key(record), _eps_cell(record) if shows_eps else None), []).append(record)
    rewritten = sum(record.verdict == "rewrite" for record in records)
    summary = f"{rewritten} of {len(records)} batch norm layers start from a new scale"
    header = ["Layers", "Type", "Channels", "Scale", "Why"]
    rows = [_row(group) for group in folded.values()]
    if shows_eps:
        header.insert(4, "eps")
        rows = [(*row[:4], _eps_cell(group[0]), *row[4:]) for row, group in zip(rows, folded.values(), strict=True)]
        summary += f", eps is set in {sum(record.eps_before is not None for record in records)}"
    return tuple(header), rows, summary


def _fold_key(record: BatchNormRecord) -> tuple[object, ...]:
    reason = record.reason if record.copy_of is None else record.state  # copies differ in the originals they name
    return type(record.module), record.verdict, record.target if record.verdict == "rewrite" else None, reason


def _row(group: list[BatchNormRecord]) -> tuple[str, ...]:
    first = group[0]
    channels = sorted({record.channels for record in group})
    width = str(channels[0]) if len(channels) == 1 else f"{channels[0]}-{channels[-1]}"
    scale = f"-> {first.target:g}" if first.verdict == "rewrite" else "kept"
    originals = [record.copy_of for record in group if record.copy_of is not None]
    reason = f"copy of {first_to_last(originals)}" if originals else first.reason
    return first_to_last([record.name for record in group]), type(first.module).__name__, width, scale, reason


def _eps_cell(record: BatchNormRecord) -> str:
    if record.eps is None:
        return "-"
    new = f"{record.eps:g}"
    return new if record.eps_before in (None, record.eps) else f"{record.eps_before:g} -> {new}"
