"""The batch norm layers of a run, as BatchNormMonitor logged them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lightning_revbn.core.metric_keys import DEFAULT_PREFIX, LAYER_QUANTITIES, WHOLE_MODEL_QUANTITIES, first_part
from lightning_revbn.runs.logs import Log, read_scalars
from lightning_revbn.runs.names import natural, one_line, shared_parts, suffixes
from lightning_revbn.runs.scalars import Advance, LogError, Scalars, Series

__all__ = ["Run", "batch_norm_run", "find_prefix", "read_runs"]


@dataclass(frozen=True, eq=False)
class Run:
    """What BatchNormMonitor logged in a run.

    Args:
        label: What the run is called.
        layers: Names of the layers from input to output; `("",)` for a model that is one batch norm layer itself,
            and for a run that logged the whole model only.
        series: By layer and quantity (`"scale_mean"`).
        by_depth: Whether the order of layers is known; otherwise they are sorted by name.
        whole_model: Whether single layers were not logged.
    """

    label: str
    layers: tuple[str, ...]
    series: Mapping[tuple[str, str], Series]
    by_depth: bool = True
    whole_model: bool = False

    @property
    def unnamed(self) -> str:
        """How to call the layer whose name is empty."""
        return "(all layers)" if self.whole_model else "(the model)"


def read_runs(
    logs: Sequence[Log], prefix: str | None = None, advance: Advance = lambda size: None
) -> tuple[list[Run], list[str]]:
    """Read runs; a run below a named directory that holds nothing of BatchNormMonitor is left out.

    Args:
        logs: Where they are.
        prefix: The monitor's; None looks for it.
        advance: Called with the number of bytes whenever some were read.

    Returns:
        The runs, called by the ends of their paths, and warnings.

    Raises:
        LogError: If a run that was named cannot be read, or none can.
    """
    labels = suffixes([log.path for log in logs])
    read = [_read(log, label, prefix, advance) for log, label in zip(logs, labels, strict=True)]
    runs = [run for run, _ in read if run is not None]
    if not runs:
        raise LogError(read[0][1][0])
    left_out = [f"left out: {warning}" for run, warnings in read if run is None for warning in warnings]
    return runs, [*left_out, *(warning for run, warnings in read if run is not None for warning in warnings)]


def batch_norm_run(label: str, scalars: Scalars, prefix: str | None = None) -> Run:
    """Pick what BatchNormMonitor logged.

    Args:
        label: What to call the run.
        scalars: All scalars of the run.
        prefix: The monitor's; None looks for it.

    Returns:
        The run.

    Raises:
        LogError: If there is nothing of BatchNormMonitor, or the prefix is ambiguous.
    """
    prefix = find_prefix(scalars.series) if prefix is None else prefix
    first = first_part(prefix)
    heads: dict[tuple[str, str], str] = {}
    for key in scalars.series:
        if key.startswith(first):
            layer, _, quantity = key[len(first) :].rpartition("/")
            if quantity in LAYER_QUANTITIES:
                heads[layer, quantity] = key
    if not heads:
        keys = [one_line(key) for key in scalars.series]
        there = f"{', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}"
        raise LogError(
            f"the log of {one_line(label)} has no keys {one_line(first)}... of batch norm layers (it has {there}): add "
            "BatchNormMonitor() to the Trainer's callbacks"
        )
    layers = _layers(heads)
    known = frozenset(layers)
    series = {head: scalars.series[key] for head, key in heads.items() if head[0] in known}
    by_depth = all(heads[head] in scalars.in_order for head in series)
    whole_model = layers == [""] and all(quantity in WHOLE_MODEL_QUANTITIES for _, quantity in series)
    return Run(label, tuple(layers if by_depth else sorted(layers, key=natural)), series, by_depth, whole_model)


def find_prefix(keys: Iterable[str]) -> str:
    """Find the prefix of BatchNormMonitor.

    Args:
        keys: All keys of a run.

    Returns:
        `"revbn"` if the keys do not tell.

    Raises:
        LogError: If several monitors logged, and none under `revbn`.

    Example:
        >>> find_prefix(["train_loss", "bn/affine/scale_mean", "bn/affine/layer1.bn/scale_mean"])
        'bn/affine'
    """
    heads = {head for head, _, quantity in (key.rpartition("/") for key in keys) if quantity in LAYER_QUANTITIES}
    tops = sorted(head for head in heads if not any(_is_above(other, head) for other in heads))
    if DEFAULT_PREFIX in tops or not tops:
        return DEFAULT_PREFIX
    if len(tops) == 1:
        return tops[0]
    common = shared_parts([top.split("/") for top in tops])  # without the keys of the model, layers are at the top
    if not common:
        raise LogError(f"keys of BatchNormMonitor under {', '.join(map(one_line, tops[:5]))}: choose by --prefix")
    return "/".join(common)


def _read(log: Log, label: str, prefix: str | None, advance: Advance) -> tuple[Run | None, tuple[str, ...]]:
    """Return a run and warnings; no run, and the reason, where a run that was not named cannot be read."""
    try:
        scalars = read_scalars(log, advance)
        return batch_norm_run(label, scalars, prefix), scalars.warnings
    except LogError as error:
        if log.named:
            raise
        return None, (str(error),)


def _layers(heads: Collection[tuple[str, str]]) -> list[str]:
    """Return the layers in the order of the quantity that most of them have: some have no scale, for example."""
    by_quantity: dict[str, list[str]] = {}
    for layer, quantity in heads:
        if layer:
            by_quantity.setdefault(quantity, []).append(layer)
    longest_first = sorted(by_quantity.values(), key=len, reverse=True)
    return list(dict.fromkeys(layer for layers in longest_first for layer in layers)) or [""]


def _is_above(one: str, other: str) -> bool:
    return one != other and (not one or other.startswith(f"{one}/"))
