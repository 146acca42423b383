"""Reads the run that saved a checkpoint: its settings, epoch, start of scales and shifts, and input statistics."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor

from lightning_revbn.cli.checkpoint_layers import BatchNorm, Modules
from lightning_revbn.cli.checkpoints import as_dict, is_whole
from lightning_revbn.core.arguments import is_flat
from lightning_revbn.core.eps import EPS_KEY
from lightning_revbn.core.input_norm import InputNorm, OnlineStandardizer
from lightning_revbn.core.input_state import STATE_KEYS
from lightning_revbn.core.layers import Selection
from lightning_revbn.core.metric_keys import AFFINE_KINDS
from lightning_revbn.core.module_names import unwrapped

__all__ = ["OUTCOMES", "SavedRun", "read_run", "saved_eps"]

OUTCOMES = {
    "revisited": "the scale started where the settings say",
    "kept at 0": "the scale starts at 0 on purpose, and learns with the whole rate",
    "left out": "include, exclude or scale do not select it",
    "not rewritten": "the settings select it, and the scale started elsewhere: trained before, or restored",
    "start unknown": "the settings select it, and no monitor has noted where its scale started",
    "baseline": "the run has a monitor and no RevisitedBatchNorm",
}
"""The ways in which a run can treat a layer, and their meanings."""

_SELECTING = ("scale", "include", "exclude", "zero_scale", "trained")
_LEARNING = ("scale_lr_divisor", "shift_lr_multiplier", "eps", "weight_decay_exempt")
_ATTRIBUTES = {"scale": "weight", "shift": "bias"}


@dataclass(frozen=True)
class _Callback:
    """The state of a RevisitedBatchNorm: its arguments, and the layers that it kept at zero on purpose."""

    settings: dict[str, Any]
    selection: Selection
    zero_kept: frozenset[str]


@dataclass(frozen=True)
class SavedRun:
    """The facts that a checkpoint of Lightning holds about its run.

    Attributes:
        epoch: The epoch in which it was saved, counted from 0; None if the checkpoint does not tell.
        step: Number of optimizer steps; None if the checkpoint does not tell.
        callbacks: The RevisitedBatchNorm callbacks of the run.
        starts: Scales and shifts at the start of training, by kind and layer, as a monitor recorded them.
        inputs: Mean, standard deviation and count per channel of every standardised input, by its DataModule and key.
        problems: The parts that the checkpoint holds and that cannot be read.
    """

    epoch: int | None
    step: int | None
    callbacks: list[_Callback] = field(default_factory=list[_Callback])
    starts: dict[tuple[str, str], Tensor] = field(default_factory=dict[tuple[str, str], Tensor])
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    problems: list[str] = field(default_factory=list[str])

    @property
    def settings(self) -> list[dict[str, Any]]:
        """The arguments of every RevisitedBatchNorm of the run."""
        return [callback.settings for callback in self.callbacks]

    def tell_layers(self, layers: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Tell how the run treated layers.

        Args:
            layers: The layers of the checkpoint by name; odd layers are left out.

        Returns:
            By the layer's name: the range in which the scale started (`"start"`, None if unknown), the drifts of scale
            and shift, and the treatment (`"outcome"`, a key of `OUTCOMES`).
        """
        if not self.callbacks and not self.starts:
            return {}
        known = {unwrapped(name): layer for name, layer in layers.items() if isinstance(layer, BatchNorm)}
        targets: dict[str, float] = {}
        for callback in self.callbacks:
            for record in callback.selection.look(Modules(known)):
                if record.target is not None:
                    targets.setdefault(record.name, record.target)
        return {name: self._tell(name, layer, targets.get(name)) for name, layer in known.items()}

    def drift(self, layers: Mapping[str, Any], kind: str) -> float | None:
        """Measure the distance of all scales, or all shifts, from their start.

        Args:
            layers: The layers of the checkpoint by name.
            kind: `"scale"` or `"shift"`.

        Returns:
            The root mean square over all channels; None if no start is known.
        """
        # Each layer's mean square counts by its channels, so that the result is a mean over channels.
        squares = [
            (own * own * layer.num_features, layer.num_features)
            for name, layer in layers.items()
            if isinstance(layer, BatchNorm) and (own := self._drift(unwrapped(name), layer, kind)) is not None
        ]
        return math.sqrt(sum(square for square, _ in squares) / sum(count for _, count in squares)) if squares else None

    def _tell(self, name: str, layer: BatchNorm, target: float | None) -> dict[str, Any]:
        start = self.starts.get(("scale", name))
        bounds = None if start is None else (float(start.min()), float(start.max()))
        return {
            "start": None if bounds is None else {"min": bounds[0], "max": bounds[1]},
            **{f"{kind}_drift": self._drift(name, layer, kind) for kind in AFFINE_KINDS},
            "outcome": self._outcome(name, bounds, target),
        }

    def _outcome(self, name: str, bounds: tuple[float, float] | None, target: float | None) -> str:
        if not self.callbacks:
            return "baseline"
        if any(name in callback.zero_kept for callback in self.callbacks):
            return "kept at 0"
        if target is None:
            return "left out"
        if bounds is None:
            return "start unknown"
        rounded = all(math.isclose(bound, target, rel_tol=5e-3) for bound in bounds)  # bf16 rounds by up to 0.4 %
        return "revisited" if rounded else "not rewritten"

    def _drift(self, name: str, layer: BatchNorm, kind: str) -> float | None:
        start = self.starts.get((kind, name))
        values: Tensor | None = getattr(layer, _ATTRIBUTES[kind])
        if start is None or values is None or start.numel() != layer.num_features:
            return None
        return float((values.detach().double() - start.double()).square().mean().sqrt())


def read_run(content: Mapping[Any, Any]) -> SavedRun | None:
    """Read the facts that a checkpoint holds about its run.

    Args:
        content: The content of the file.

    Returns:
        The run; None if the file is not a checkpoint of a Trainer.
    """
    states = [*(as_dict(content.get("callbacks")) or {}).values()]
    if "callbacks" not in content and "pytorch-lightning_version" not in content:
        return None
    run = SavedRun(_whole_number(content.get("epoch")), _whole_number(content.get("global_step")))
    for state in filter(None, map(as_dict, states)):
        if "scale_lr_divisor" in state and "scale" in state:
            callback = _callback(state)
            if callback is None:
                run.problems.append("the settings of RevisitedBatchNorm in it cannot be read")
            else:
                run.callbacks.append(callback)
        # The state of a monitor is inside the state of a RevisitedBatchNorm, or stands alone.
        monitor = as_dict(state.get("monitor")) or state
        run.starts.update(_starts(as_dict(monitor.get("start")) or {}))
    for where, state in _input_states(content):
        statistics = _input_statistics(state)
        if statistics is None:
            run.problems.append(f"the input statistics of {where} in it cannot be read")
        elif statistics:
            run.inputs[where] = statistics
    return run


def _whole_number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else None


def _callback(state: Mapping[Any, Any]) -> _Callback | None:
    settings = {name: state[name] for name in (*_SELECTING, *_LEARNING) if name in state}
    kept: object = state.get("zero_kept", [])
    if not all(map(is_flat, settings.values())) or not isinstance(kept, (list, tuple)):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run itself warned of scales above 1
            selection = Selection(**{name: value for name, value in settings.items() if name in _SELECTING})
    except (TypeError, ValueError):
        return None
    return _Callback(settings, selection, frozenset(name for name in cast("list[Any]", kept) if isinstance(name, str)))


def _starts(saved: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """Yield the start of each layer's scale and shift, from the state of an `AffineStatistics`."""
    for kind in AFFINE_KINDS:
        part = as_dict(saved.get(kind)) or {}
        names, channels, values = part.get("layers"), part.get("channels"), part.get("values")
        if not (isinstance(names, list) and isinstance(channels, list) and is_whole(values)):
            continue
        names, channels = cast("list[Any]", names), cast("list[Any]", channels)
        # A damaged file may hold any value under these names.
        whole = all(type(count) is int and count > 0 for count in channels)
        if len(names) != len(channels) or not whole or not all(isinstance(name, str) for name in names):
            continue
        flat: Any = cast("Tensor", values).flatten()
        if sum(channels) == flat.numel():
            yield from (((kind, name), own) for name, own in zip(names, flat.split(channels), strict=True))


def _input_states(content: Mapping[Any, Any]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Yield the states of standardisers, identified by their keys, with the names of their DataModules and inputs."""
    for name, part in content.items():
        for state in filter(None, map(as_dict, (as_dict(part) or {}).values())):
            several = {key: own for key, inner in state.items() if (own := as_dict(inner)) and isinstance(key, str)}
            for key, own in {"": state, **several}.items():
                if own.keys() >= {*STATE_KEYS} and isinstance(name, str):
                    yield f"{name} ({key})" if key else name, own


def _input_statistics(state: Mapping[Any, Any]) -> dict[str, Any] | None:
    """Return mean, standard deviation and count per channel; empty before the first batch; None if unreadable."""
    # Sums over an expanded tensor would take gigabytes.
    if not all(is_whole(value) for value in state.values() if isinstance(value, Tensor)):
        return None
    try:
        mean, std = (None, None) if state["constants"] is None else state["constants"].tolist()
        options: dict[str, Any] = {name: state[name] for name in ("mode", "input_range")}
        settings = InputNorm(len(state["count"]), mean=mean, std=std, **options)
        standardizer = OnlineStandardizer(settings)
        standardizer.load_state_dict(dict(state))
        if not standardizer.has_statistics:
            return {}
        statistics: Any = standardizer.statistics()
        per_channel = {name: getattr(statistics, name).tolist() for name in ("mean", "std", "count")}
        return {**per_channel, "samples": standardizer.samples, "scale": standardizer.scale}
    except Exception:  # a file may hold any value under these names
        return None


def saved_eps(content: Mapping[Any, Any]) -> dict[str, float]:
    """Return the eps that RevisitedBatchNorm set, from its state in a checkpoint of Lightning.

    Args:
        content: The content of the file.

    Returns:
        eps by the layer's name; empty for a file without such a state.
    """
    states = (as_dict(state) or {} for state in (as_dict(content.get("callbacks")) or {}).values())
    found = (item for state in states for item in (as_dict(state.get(EPS_KEY)) or {}).items())
    return {name: eps for name, eps in found if isinstance(name, str) and isinstance(eps, float)}
