"""Sets eps, the number that batch norm layers add to variances.

eps is an attribute of the layers, read at every forward pass. No `state_dict` holds it, so a network that is built
again has the eps of its code, whatever it was trained with. Write eps into the code, or set it again after loading.

eps is set in layers that are freshly initialised, lazy or without a scale (`affine=False`), and in their frozen copies.
Their scale may start at 0 or at unusual values. Trained, frozen and quantised layers keep their eps, and so do layers
on the meta device. `InputBatchNorm` keeps its own eps, since it sees data. A layer without scale and running statistics
does not show whether it is fresh: its eps is set unless another layer of the model was trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_revbn.core.arguments import TrainedPolicy, check_eps
from lightning_revbn.core.input_batch_norm import InputBatchNorm
from lightning_revbn.core.layers import BatchNormRecord, eps_of, find_batch_norms, statistics_moved
from lightning_revbn.core.module_names import unwrapped
from lightning_revbn.core.table import first_to_last, plain_table, rich_table

__all__ = [
    "EPS_KEY",
    "EpsReport",
    "LayerEps",
    "choose_eps",
    "has_seen_data",
    "layers_with_eps",
    "proven_fresh",
    "set_eps",
    "write_eps",
]

EPS_KEY = "eps_by_layer"
"""Key in a callback's saved state: the eps that was set, by the layer's name."""


@dataclass(frozen=True)
class LayerEps:
    """The eps of a batch norm layer, before and after `set_eps`.

    Attributes:
        name: Dotted name of the layer, as in `BatchNormRecord`.
        kind: Name of the layer's class.
        before: eps before; None if the layer has none.
        after: eps now.
        is_set: Whether eps was set, even to the number that it had.
        reason: The reason from the layer's record, which explains whether eps is set.
    """

    name: str
    kind: str
    before: float | None
    after: float | None
    is_set: bool
    reason: str


@dataclass(frozen=True)
class EpsReport:
    """The eps of every batch norm layer of a model, before and now.

    `str(report)` is a table with equal layers folded into a single row.

    Attributes:
        layers: An entry per layer, in the order of the model.
    """

    layers: tuple[LayerEps, ...]

    @property
    def names(self) -> list[str]:
        """Names of the layers whose eps was set."""
        return [layer.name for layer in self.layers if layer.is_set]

    def __str__(self) -> str:
        """Return the table as plain text."""
        return plain_table(*self._table())

    def __rich__(self) -> object:
        """Return the table for rich's console."""
        return rich_table(*self._table())

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]], str]:
        folded: dict[tuple[object, ...], list[LayerEps]] = {}
        for layer in self.layers:
            key = (layer.kind, layer.before, layer.after, layer.is_set, layer.reason)
            folded.setdefault(key, []).append(layer)
        rows: list[tuple[str, ...]] = []
        for group in folded.values():
            first = group[0]
            before = "-" if first.before is None else f"{first.before:g}"
            cell = f"{before} -> {first.after:g}" if first.is_set else f"{before}, kept"
            rows.append((first_to_last([layer.name for layer in group]), first.kind, cell, first.reason))
        summary = f"eps is set in {len(self.names)} of {len(self.layers)} batch norm layers"
        return ("Layers", "Type", "eps", "Why"), rows, summary


def set_eps(
    module: nn.Module,
    eps: float,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    trained: TrainedPolicy = "keep",
) -> EpsReport:
    """Set the eps of every fresh batch norm layer.

    eps matters where the variance of a layer's input is small. Behind scales that start at g, variances are g² times
    as large as behind scales of 1. So such a network equals a network of scale 1 with eps / g²
    (`lightning_revbn.core.identity`). eps 1e-3 is TensorFlow's default, 1e-5 torch's.

    Args:
        module: The model, or any part of it.
        eps: The number to add to variances.
        include: `fnmatch` patterns on dotted names; a layer must match one of them.
        exclude: Patterns of layers to leave alone; stronger than `include`.
        trained: `"overwrite"` sets eps in trained layers too, for loaded weights that were trained with another eps
            than the eps in the code; `"error"` refuses trained layers.

    Returns:
        The report: the eps of every layer, before and now.

    Raises:
        ValueError: If eps is not finite and positive, a pattern matches no layer, or a trained layer is refused;
            then nothing is set.
        TypeError: If eps is not a number.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> print(set_eps(model, 1e-3))
        Layers | Type        | eps            | Why
        -----------------------------------------------------------
        1      | BatchNorm2d | 1e-05 -> 0.001 | freshly initialised
        -----------------------------------------------------------
        eps is set in 1 of 1 batch norm layers
        >>> model[1].eps
        0.001
    """
    number = check_eps(eps)
    if number is None:
        raise TypeError("set_eps needs a number such as 1e-3, got None")
    records = find_batch_norms(module, include=include, exclude=exclude, trained=trained)
    refused = [record.name for record in records if record.verdict == "refuse" and _is_trained(record)]
    if refused:
        raise ValueError(f"eps is not set: {', '.join(refused)} are not freshly initialised")
    before = write_eps(module, choose_eps(module, records, number))
    return EpsReport(tuple(_layer_eps(record, before) for record in records))


def choose_eps(module: nn.Module, records: Sequence[BatchNormRecord], eps: float) -> dict[str, float]:
    """Choose the layers whose eps to set; the rules are at the top of this file.

    Args:
        module: The model.
        records: The records that `find_batch_norms` returned before training.
        eps: The number.

    Returns:
        eps by name for `write_eps`, also for layers without a record that share the scale of a chosen layer.
    """
    untrained = not any(map(_is_trained, records))
    chosen = {record.name: eps for record in records if _takes_eps(record, untrained)}
    scales = {id(record.scale) for record in records if record.name in chosen and record.scale is not None}
    layers = layers_with_eps(module).items()
    return chosen | {name: eps for name, layer in layers if id(getattr(layer, "weight", None)) in scales}


def write_eps(module: nn.Module, values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Set the eps of layers by name, whatever their state.

    Args:
        module: The model.
        values: eps by the layer's dotted name.

    Returns:
        The earlier eps by name; given to this function again, it undoes the first call.

    Raises:
        ValueError: If the model has no such layer; then nothing is set.
        RuntimeError: If a layer does not keep the new eps.
    """
    if not values:
        return {}
    layers = layers_with_eps(module)
    missing = [name for name in values if name not in layers]
    if missing:
        raise ValueError(
            f"eps cannot be set in {', '.join(map(repr, missing))}: the model has no such batch norm layer"
        )
    before = {name: eps_of(layers[name]) for name in values}
    for name, eps in values.items():
        layer = layers[name]
        layer.eps = eps  # pyright: ignore[reportArgumentType] # an attribute that torch does not declare
        if eps_of(layer) != eps:
            raise RuntimeError(f"the eps of {name!r} did not take the value {eps}")
    return before


def _layer_eps(record: BatchNormRecord, before: Mapping[str, float | None]) -> LayerEps:
    is_set = record.name in before
    old = before[record.name] if is_set else record.eps
    return LayerEps(record.name, type(record.module).__name__, old, record.eps, is_set, record.reason)


def _takes_eps(record: BatchNormRecord, untrained: bool) -> bool:
    if record.eps is None or isinstance(record.module, InputBatchNorm):
        return False
    if record.state == "no scale":
        statistics = _running_mean(record)
        if statistics is None:
            return untrained
        return is_lazy(statistics) or (not statistics.is_meta and not statistics_moved(record.module))
    if record.state == "trained" and record.verdict == "skip":
        return not _is_trained(record)
    return record.verdict == "rewrite" or record.state in ("fresh", "lazy", "zero", "copy")


def _is_trained(record: BatchNormRecord) -> bool:
    """Tell whether a layer has seen data."""
    # A scale may start at unusual values, such as 0.25, so it counts only in layers without running statistics.
    return record.state == "trained" and (_running_mean(record) is None or statistics_moved(record.module))


def has_seen_data(record: BatchNormRecord) -> bool:
    """Tell whether the running statistics of a layer have moved; without running statistics, the scale decides.

    Args:
        record: The layer's record.

    Returns:
        Whether they have; False on the meta device and for lazy layers.
    """
    mean = _running_mean(record)
    if mean is None:
        return record.state == "trained"
    return not is_lazy(mean) and not mean.is_meta and statistics_moved(record.module)


def proven_fresh(records: Sequence[BatchNormRecord]) -> list[BatchNormRecord]:
    """List the layers whose values prove that they were not trained.

    Fewer layers than take an eps: a layer that starts at unusual values, or has no state, may have been trained.

    Args:
        records: The layers of a model.

    Returns:
        The records of these layers.
    """
    untrained = not any(record.state == "trained" for record in records)
    return [
        record
        for record in records
        if record.state in ("fresh", "zero", "copy")
        or (
            record.state == "no scale" and untrained and _running_mean(record) is not None and not has_seen_data(record)
        )
    ]


def _running_mean(record: BatchNormRecord) -> Tensor | None:
    return cast("Tensor | None", record.module.running_mean)


def layers_with_eps(module: nn.Module) -> dict[str, nn.Module]:
    """List every module that has an eps; only the records show which are batch norm layers.

    Args:
        module: The model.

    Returns:
        The modules by dotted name.
    """
    modules = cast("Iterable[tuple[str, nn.Module]]", module.named_modules())
    return {unwrapped(path): layer for path, layer in modules if hasattr(layer, "eps")}
