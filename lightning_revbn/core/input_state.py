"""Writes the state of an `OnlineStandardizer` for a checkpoint, and checks a state before it is loaded.

| key | value |
|---|---|
| mode, kind | `InputNorm.mode`, and the name of the `Kind` of the training batches |
| scale | the number that standardised values were multiplied by; None before it is known |
| input_range | the number that raw values were divided by |
| channels | the indices of the normalised channels; None for all |
| samples | number of samples, a float64 scalar |
| count, mean, rest, m2 | `Moments` of all values in raw units, float64, shape `(C,)` each |
| average_weight, average_mean, average_rest, average_m2 | `Moments` of the moving average |
| constants | mean and std of mode "fixed" in units of the range, float64, shape `(2, C)`; None in other modes |
| frozen | whether `freeze_input_statistics` holds the statistics |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lightning_revbn.core.input_settings import MODES, InputNorm
from lightning_revbn.core.input_statistics import LearnedStatistics
from lightning_revbn.core.moments import Kind, Moments

__all__ = ["STATE_KEYS", "SavedInput", "read_state", "write_state"]

_TOTAL = ("count", "mean", "rest", "m2")
_AVERAGE = ("average_weight", "average_mean", "average_rest", "average_m2")
_TENSORS = (*_TOTAL, *_AVERAGE, "samples")
"""Names in the order of `LearnedStatistics.tensors`."""
STATE_KEYS = ("mode", "kind", "scale", "input_range", "channels", "constants", "frozen", *_TENSORS)
"""All keys of a state."""
_NEVER_NEGATIVE = {"count", "m2", "average_weight", "average_m2", "samples"}


@dataclass(frozen=True)
class SavedInput:
    """A state that was read and checked.

    Attributes:
        mode: The mode that saved the state.
        scale: The number that standardised values were multiplied by; None if it was not known.
        constants: Mean and std of mode `"fixed"`, float64, shape `(2, C)`; None in other modes.
        learned: The statistics, in the raw units of the settings that read the state.
        is_held: Whether `freeze_input_statistics` had frozen the statistics.
    """

    mode: str
    scale: float | None
    constants: Tensor | None
    learned: LearnedStatistics
    is_held: bool = False

    def lacks(self, mode: str) -> str | None:
        """Explain why a mode cannot evaluate with this state.

        Args:
            mode: The mode.

        Returns:
            The reason, as a clause that names both modes; None if the mode can.
        """
        if mode == "fixed" or self.learned.kind is not Kind.UNKNOWN:
            return None
        if self.constants is not None:
            return f'they were saved in mode "fixed", which learns no statistics, and this is mode "{mode}"'
        return f'they were saved in mode "{self.mode}" before the first training batch, and this is mode "{mode}"'


def write_state(
    settings: InputNorm, scale: float | None, learned: LearnedStatistics, *, is_held: bool = False
) -> dict[str, Any]:
    """Write a state as plain values and tensors on the CPU, which `torch.load` reads with `weights_only=True`.

    Args:
        settings: The settings.
        scale: The number that standardised values are multiplied by; None if it is not known.
        learned: The statistics.
        is_held: Whether `freeze_input_statistics` has frozen the statistics.

    Returns:
        The state, with the keys of the table above.
    """
    constants = None
    if settings.mode == "fixed":
        constants = torch.tensor([settings.mean, settings.std], dtype=torch.float64)
    return {
        "mode": settings.mode,
        "kind": learned.kind.name,
        "scale": scale,
        "input_range": settings.unit(learned.kind),
        "channels": None if settings.channels is None else [*settings.channels],
        "constants": constants,
        "frozen": is_held,
        **{name: tensor.cpu().clone() for name, tensor in zip(_TENSORS, learned.tensors(), strict=True)},
    }


def read_state(state: object, settings: InputNorm) -> SavedInput:
    """Check a state, and convert it to the raw units of the present settings.

    Args:
        state: The result of `write_state`.
        settings: The present settings; their `input_range` may differ from the saved number.

    Returns:
        The state; its tensors are copies.

    Raises:
        ValueError: If the state is damaged, contradicts itself, or is of an input with other channels. The message has
            a single line.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"the saved input statistics are a {type(state).__name__}, not a mapping")
    values = cast("Mapping[str, Any]", state)
    missing = [name for name in STATE_KEYS if name not in values]
    if missing:
        raise ValueError(f"the saved input statistics lack {', '.join(missing)}")
    _expect(isinstance(values["mode"], str) and values["mode"] in MODES, "mode", repr(values["mode"]))
    _expect(isinstance(values["kind"], str) and values["kind"] in Kind.__members__, "kind", repr(values["kind"]))
    _expect(values["scale"] is None or _is_positive(values["scale"]), "scale", repr(values["scale"]))
    _expect(_is_positive(values["input_range"]), "input_range", repr(values["input_range"]))
    count: Any = values["count"]
    if isinstance(count, Tensor) and count.dim() == 1 and len(count) != settings.num_features:
        raise ValueError(
            f"the saved input statistics are of {len(count)} channels, num_features is {settings.num_features}"
        )
    _check_channels(values["channels"], settings)
    tensors = {name: _tensor(values, name, () if name == "samples" else (settings.num_features,)) for name in _TENSORS}
    kind = Kind[values["kind"]]
    _check_together(tensors, kind)
    constants = None
    if values["mode"] == "fixed":
        constants = _tensor(values, "constants", (2, settings.num_features))
        _expect(bool((constants[1] >= 0).all()), "constants", "a negative std")
        _expect(kind is Kind.UNKNOWN, "kind", f"{kind.name} in mode 'fixed', which learns nothing")
    else:
        _expect(values["constants"] is None, "constants", f"given in mode {values['mode']!r}, which learns them")
    factor = values["input_range"] / settings.unit(kind)
    total, average = (Moments(*(tensors[name] for name in names)).scaled(factor) for names in (_TOTAL, _AVERAGE))
    learned = LearnedStatistics(kind, total, average, tensors["samples"])
    finite = all(bool(tensor.isfinite().all()) for tensor in learned.tensors())
    _expect(finite, "input_range", f"{values['input_range']!r}, too far from {settings.unit(kind)!r} of this run")
    scale = None if values["scale"] is None else float(values["scale"])
    is_held = values["frozen"]
    _expect(isinstance(is_held, bool), "frozen", repr(is_held))
    _expect(not is_held or kind is not Kind.UNKNOWN, "frozen", "True, although nothing was learned")
    return SavedInput(values["mode"], scale, constants, learned, is_held)


def _check_channels(saved: object, settings: InputNorm) -> None:
    """Raise unless the saved run and this run normalise the same channels."""
    everything = [*range(settings.num_features)]
    of_saved = everything if saved is None else saved
    is_list = isinstance(of_saved, list) and {type(channel) for channel in cast("list[object]", of_saved)} <= {int}
    _expect(is_list, "channels", repr(saved))
    if of_saved != (everything if settings.channels is None else [*settings.channels]):
        own = None if settings.channels is None else [*settings.channels]
        raise ValueError(
            f"the saved input statistics are of a run with InputNorm(channels={saved}), and this run has "
            f"channels={own}: the network was trained on other input. Give both runs the same channels"
        )


def _check_together(tensors: Mapping[str, Tensor], kind: Kind) -> None:
    """Raise where tensors contradict each other."""
    for name in ("count", "samples"):
        _expect(bool((tensors[name] == tensors[name].round()).all()), name, "not whole numbers")
    _expect(bool((tensors["average_weight"] <= 1 + 1e-9).all()), "average_weight", "above 1")
    for weight, *others in (_TOTAL, _AVERAGE):
        for name in others:
            empty = (tensors[weight] == 0) & (tensors[name] != 0)
            _expect(not bool(empty.any()), name, f"of channels in which {weight} is 0")
    seen = bool(tensors["count"].any() or tensors["average_weight"].any())
    _expect(not seen or kind is not Kind.UNKNOWN, "kind", "UNKNOWN, although values were seen")
    _expect(not seen or bool(tensors["samples"] > 0), "samples", "0, although values were seen")


def _tensor(values: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Tensor:
    """Return a copy of a tensor on the CPU, after checking its dtype, shape and values."""
    value = values[name]
    _expect(isinstance(value, Tensor), name, f"a {type(value).__name__}, not a tensor")
    _expect(value.layout == torch.strided and not value.is_meta, name, f"a tensor without values ({value.layout})")
    _expect(value.dtype == torch.float64, name, f"{value.dtype}, not torch.float64")
    _expect(tuple(value.shape) == shape, name, f"of shape {tuple(value.shape)}, not {shape}")
    tensor = cast("Tensor", value).detach().cpu().clone()
    _expect(bool(tensor.isfinite().all()), name, "not finite")
    _expect(name not in _NEVER_NEGATIVE or bool((tensor >= 0).all()), name, "negative")
    return tensor


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _expect(holds: bool, name: str, found: str) -> None:
    if not holds:
        raise ValueError(f"the saved input statistics cannot be loaded: {name} is {found}")
