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
    """The scalars that BatchNormMonitor logged in a run.

    Args:
        label: The name of the run.
        layers: Names of the layers from input to output; `("",)` if the model itself is a batch norm layer, or if the
            run logged only the whole model.
        series: Scalars by layer and quantity (`"scale_mean"`).
        by_depth: Whether the order of the layers is known; otherwise they are sorted by name.
        whole_model: Whether the run logged only the whole model, and no single layer.
    """

    label: str
    layers: tuple[str, ...]
    series: Mapping[tuple[str, str], Series]
    by_depth: bool = True
    whole_model: bool = False

    @property
    def unnamed(self) -> str:
        """The text shown for the layer whose name is empty."""
        return "(all layers)" if self.whole_model else "(the model)"


def read_runs(
    logs: Sequence[Log], prefix: str | None = None, advance: Advance = lambda size: None
) -> tuple[list[Run], list[str]]:
    """Read runs; below a named directory, leave out runs without scalars of BatchNormMonitor.

    Args:
        logs: The logs of the runs.
        prefix: The monitor's prefix; None finds it in the keys.
        advance: Called with the number of bytes after every read.

    Returns:
        The runs, named by the ends of their paths, and warnings.

    Raises:
        LogError: If a run that the user named cannot be read, or no run can be read.
    """
    labels = suffixes([log.path for log in logs])
    read = [_read(log, label, prefix, advance) for log, label in zip(logs, labels, strict=True)]
    runs = [run for run, _ in read if run is not None]
    if not runs:
        raise LogError(read[0][1][0])
    left_out = [f"left out: {warning}" for run, warnings in read if run is None for warning in warnings]
    return runs, [*left_out, *(warning for run, warnings in read if run is not None for warning in warnings)]


def batch_norm_run(label: str, scalars: Scalars, prefix: str | None = None) -> Run:
    """Pick the scalars that BatchNormMonitor logged.

    Args:
        label: The name of the run.
        scalars: All scalars of the run.
        prefix: The monitor's prefix; None finds it in the keys.

    Returns:
        The run.

    Raises:
        LogError: If no scalar is from BatchNormMonitor, or the prefix is ambiguous.
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
        The prefix; `"revbn"` if no key is from BatchNormMonitor.

    Raises:
        LogError: If several monitors logged, and `revbn` is not among their prefixes.

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
    common = shared_parts([top.split("/") for top in tops])  # without the model's own keys, layers are at the top
    if not common:
        raise LogError(f"keys of BatchNormMonitor under {', '.join(map(one_line, tops[:5]))}: choose by --prefix")
    return "/".join(common)


def _read(log: Log, label: str, prefix: str | None, advance: Advance) -> tuple[Run | None, tuple[str, ...]]:
    """Return a run and warnings; if a run that the user did not name cannot be read, return None and the reason."""
    try:
        scalars = read_scalars(log, advance)
        return batch_norm_run(label, scalars, prefix), scalars.warnings
    except LogError as error:
        if log.named:
            raise
        return None, (str(error),)


def _layers(heads: Collection[tuple[str, str]]) -> list[str]:
    """Return the layers in the order of the quantity that most layers have: a layer may lack a scale, for example."""
    by_quantity: dict[str, list[str]] = {}
    for layer, quantity in heads:
        if layer:
            by_quantity.setdefault(quantity, []).append(layer)
    longest_first = sorted(by_quantity.values(), key=len, reverse=True)
    return list(dict.fromkeys(layer for layers in longest_first for layer in layers)) or [""]


def _is_above(one: str, other: str) -> bool:
    return one != other and (not one or other.startswith(f"{one}/"))
