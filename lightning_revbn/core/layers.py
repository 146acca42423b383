"""Finds the batch norm layers of a model, with a verdict on each.

`find_batch_norms` changes nothing; `lightning_revbn.core.initialization` acts on its records.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from lightning_revbn.core.arguments import (
    ScaleSpec,
    TrainedPolicy,
    ZeroScalePolicy,
    check_choice,
    check_patterns,
    check_patterns_match,
    check_scale,
    matching_names,
)
from lightning_revbn.core.copies import find_copies
from lightning_revbn.core.gathered import is_partitioned
from lightning_revbn.core.input_batch_norm import InputBatchNorm
from lightning_revbn.core.module_names import unwrapped
from lightning_revbn.core.torch_compat import BatchNormBase

__all__ = [
    "BatchNormRecord",
    "Selection",
    "State",
    "Verdict",
    "copies_in",
    "eps_of",
    "find_batch_norms",
    "is_flattened",
    "statistics_moved",
]

_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")

Verdict: TypeAlias = Literal["rewrite", "skip", "refuse"]
State: TypeAlias = Literal[
    "fresh",
    "zero",
    "trained",
    "frozen",
    "copy",
    "input",
    "no scale",
    "excluded",
    "lazy",
    "unmaterialized",
    "shared",
    "unsupported",
]


@dataclass(frozen=True)
class BatchNormRecord:
    """A batch norm layer of a model, its state, and the verdict on its scale.

    Attributes:
        name: Dotted name of the layer in the model, `""` for the model itself; the same whether or not parts of the
            model are wrapped by `torch.compile`.
        module: The layer.
        verdict: `"rewrite"`, `"skip"` (left as it is) or `"refuse"` (training must not start like this).
        reason: The reason for the verdict, in words for readers.
        state: The state of the layer, for programs: `"fresh"` (as torch initialises it, or already at the target),
            `"zero"` (scale 0 in every channel and never trained), `"trained"` (running statistics have moved, or the
            scale starts at other values), `"frozen"` (the scale is a buffer or does not require a gradient), `"copy"`
            (a frozen copy of a layer that is rewritten, as in target networks and momentum encoders), `"input"` (an
            `InputBatchNorm`, which starts at its own scale), `"no scale"` (`affine=False`), `"excluded"` (by `include`,
            `exclude` or a scale mapping), `"lazy"` (made by its first input), `"unmaterialized"` (on the meta device,
            or partitioned by ZeRO-3), `"shared"` (another kind of module holds the same scale) or `"unsupported"`
            (quantised, flattened by FSDP1, made by a hook, or parametrised in a way that cannot be set).
        target: The scale that the settings ask for in this layer; None if they ask for none. An `InputBatchNorm` has
            its own target, and a copy the target of its original.
        copy_of: Name of the original if the layer is a copy; otherwise None.
        eps_before: The layer's eps before `set_eps` or `init_batch_norms(eps=...)` set it; None if they did not.
    """

    name: str
    module: nn.Module
    verdict: Verdict
    reason: str
    state: State
    target: float | None
    copy_of: str | None = None
    eps_before: float | None = None

    @property
    def scale(self) -> nn.Parameter | None:
        """The scale (gamma, `weight`), shape `(C,)`, as an optimizer holds it; None if the layer has none.

        For a parametrised scale, it is the parameter behind the parametrisation.
        """
        return _parameter(self.module, "weight")

    @property
    def shift(self) -> nn.Parameter | None:
        """The shift (beta, `bias`), shape `(C,)`; None if the layer has none."""
        return _parameter(self.module, "bias")

    @property
    def values(self) -> Tensor | None:
        """The values that the layer multiplies with, shape `(C,)`; None if it has none, or none yet.

        A part of a flat parameter counts as none: FSDP1 frees its memory between uses.
        """
        value: object = None if is_flattened(self.module) else getattr(self.module, "weight", None)
        return value.detach() if isinstance(value, Tensor) and not is_lazy(value) else None

    @property
    def eps(self) -> float | None:
        """The number that the layer adds to variances now; None if the layer has no eps."""
        return eps_of(self.module)

    @property
    def channels(self) -> int:
        """Number of channels C; 0 for a lazy layer that has not seen its input yet."""
        statistics: object = getattr(self.module, "running_mean", None)
        known = statistics.numel() if isinstance(statistics, Tensor) and not is_lazy(statistics) else 0
        return int(getattr(self.module, "num_features", known))

    def has_scale(self, value: float) -> bool:
        """Tell whether every channel of the scale has a value, rounded to the scale's precision.

        Args:
            value: The value.

        Returns:
            True if so, or if this rank holds no channel; False for a layer without a scale.
        """
        values = self.values
        if values is None:
            return False
        return not values.numel() or _is_uniform(self.module, _bounds(values), value, values.dtype)


def find_batch_norms(
    module: nn.Module,
    scale: ScaleSpec = 0.1,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    zero_scale: ZeroScalePolicy = "keep",
    trained: TrainedPolicy = "keep",
) -> list[BatchNormRecord]:
    """List every batch norm layer of a model with the verdict on it; change nothing.

    Classes identify layers, never names: `BatchNorm1d`, `2d`, `3d`, `SyncBatchNorm`, all classes with the same base in
    torch, and `InputBatchNorm`. Frozen batch norm layers whose tensors are buffers are listed too. A layer that is used
    twice is listed once, and so are layers that share a scale. A frozen copy of a fresh network (`copy.deepcopy` with
    gradients off) gets the scales of that network; `lightning_revbn.core.copies` explains how a copy is proven.

    Args:
        module: The model, a part of it, or a single batch norm layer.
        scale: Target of the scale: a number, or a mapping from patterns to numbers. The first match counts; layers
            without a match are left alone.
        include: `fnmatch` patterns on dotted names; a layer must match one of them.
        exclude: Patterns of layers to leave alone; stronger than `include`.
        zero_scale: The policy for scales that start at 0 on purpose, as in the last batch norm of a residual branch.
        trained: The policy for layers that are not freshly initialised.

    Returns:
        A record per layer, in the order of `module.named_modules()`.

    Raises:
        ValueError: If a scale is not finite and positive, a policy is unknown, or a pattern matches no layer.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False))
        >>> for record in find_batch_norms(model):
        ...     print(record.name, record.verdict, record.state)
        1 rewrite fresh
        2 skip no scale
    """
    selection = Selection(scale, include, exclude, zero_scale, trained)
    records = selection.look(module)
    selection.check_patterns_match(records)
    return selection.follow_copies(module, records)


@dataclass(frozen=True)
class Selection:
    """The settings that decide on every layer, checked once; `find_batch_norms` explains them.

    Raises:
        ValueError: If a scale is not finite and positive, or a policy is unknown.
        TypeError: If a scale is not a number or a pattern not a string.
    """

    scale: ScaleSpec = 0.1
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    zero_scale: ZeroScalePolicy = "keep"
    trained: TrainedPolicy = "keep"

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", check_scale(self.scale))
        object.__setattr__(self, "include", check_patterns("include", self.include))
        object.__setattr__(self, "exclude", check_patterns("exclude", self.exclude))
        check_choice("zero_scale", self.zero_scale, get_args(ZeroScalePolicy))
        check_choice("trained", self.trained, get_args(TrainedPolicy))

    def look(self, module: nn.Module) -> list[BatchNormRecord]:
        """List the layers of a model with the verdict on each, whether or not every pattern matches.

        Args:
            module: The model.

        Returns:
            A record per layer.
        """
        layers, other_owners = _walk(module)
        targets = self._targets([name for name, _ in layers])
        records: list[BatchNormRecord] = []
        for name, layer in layers:
            target = targets.get(name)
            if target is not None and isinstance(layer, InputBatchNorm):
                target = layer.scale
            if target is None:
                state, reason = "excluded", "not selected by the patterns"
            else:
                state, reason = _state_of(layer, target, other_owners)
            verdict = self._judge(state)
            if target == 1.0 and verdict == "rewrite":
                verdict, reason = "skip", "scale=1 writes nothing"
            records.append(BatchNormRecord(name, layer, verdict, reason, state, target))
        return records

    def selected(self, names: Sequence[str]) -> set[str]:
        """Return the layers that the patterns and a scale mapping select.

        Args:
            names: Names of layers.

        Returns:
            The names of the selected layers.
        """
        return set(self._targets(names))

    def follow_copies(self, module: nn.Module, records: Sequence[BatchNormRecord]) -> list[BatchNormRecord]:
        """Give frozen copies of layers the verdict on their originals.

        Args:
            module: The model, before its scales are written.
            records: The records that `look` has returned.

        Returns:
            The records; a frozen copy has the verdict and the target of its original. Only `exclude` leaves out a copy:
            `include` and a scale mapping choose networks, and a network's copies follow its choice.
        """
        originals = {
            record.name: record
            for record in records
            if record.state in ("fresh", "zero") and (record.verdict == "rewrite" or record.target == 1.0)
        }
        excluded = matching_names(self.exclude, {record.name for record in records})
        frozen = [
            record.name
            for record in records
            if record.state == "frozen" or (record.state == "excluded" and record.name not in excluded)
        ]
        matches = find_copies(module, frozen, module, originals) if frozen else {}
        found: list[BatchNormRecord] = []
        for record in records:
            match = matches.get(record.name)
            if match is None:
                found.append(record)
            elif match.differs is None:
                found.append(_as_copy(record, originals[match.original]))
            else:
                reason = f"{record.reason}; no copy of {match.original}, since {match.differs} differs"
                found.append(replace(record, reason=reason))
        return found

    def check_patterns_match(self, records: Sequence[BatchNormRecord]) -> None:
        """Raise if a pattern matches no layer of a model that has layers.

        Args:
            records: The layers of the model.

        Raises:
            UnmatchedPatternError: If a pattern matches none; the message has the nearest names.
        """
        names = [record.name for record in records]
        mapped = tuple(self.scale) if isinstance(self.scale, Mapping) else ()
        for argument, patterns in (("include", self.include), ("exclude", self.exclude), ("scale", mapped)):
            check_patterns_match(argument, patterns, names)

    def _targets(self, names: Sequence[str]) -> dict[str, float]:
        """Return the target of each layer; a layer that the patterns leave out has none."""
        # A set, since `matching_names` first looks every pattern up among the names.
        known = set(names)
        selected = matching_names(self.include, known) - matching_names(self.exclude, known)
        if not isinstance(self.scale, Mapping):
            return dict.fromkeys(selected, self.scale)
        targets: dict[str, float] = {}
        for pattern, value in self.scale.items():  # the first match counts
            for name in matching_names([pattern], known) & selected:
                targets.setdefault(name, value)
        return targets

    def _judge(self, state: State) -> Verdict:
        if state == "zero":
            return "rewrite" if self.zero_scale == "overwrite" else "skip"
        if state == "trained":
            return {"keep": "skip", "overwrite": "rewrite", "error": "refuse"}[self.trained]  # pyright: ignore[reportReturnType]
        if state in ("unmaterialized", "shared", "unsupported"):
            return "refuse"
        return "rewrite" if state in ("fresh", "lazy") else "skip"


def copies_in(holder: nn.Module, module: nn.Module, originals: Sequence[BatchNormRecord]) -> list[BatchNormRecord]:
    """List the layers of another network that are copies of a module's layers.

    Args:
        holder: The other network, such as an average of weights that a callback keeps. It may be larger than the
            copy in it, and need not be frozen.
        module: The module, with the values that it was copied with.
        originals: The records of the module's layers to rewrite.

    Returns:
        A record for each copy, with the verdict `"rewrite"` and its original's target.
    """
    by_name = {record.name: record for record in originals if record.state != "lazy"}
    if holder is module or not by_name:
        return []
    layers = dict(_walk(holder)[0])
    return [
        _as_copy(BatchNormRecord(name, layers[name], "skip", "", "frozen", None), by_name[match.original])
        for name, match in find_copies(holder, layers, module, by_name).items()
        if match.differs is None
    ]


def _as_copy(record: BatchNormRecord, original: BatchNormRecord) -> BatchNormRecord:
    reason = f"copy of {original.name or 'the model'}"
    return replace(
        record, verdict=original.verdict, reason=reason, state="copy", target=original.target, copy_of=original.name
    )


def _walk(module: nn.Module) -> tuple[list[tuple[str, nn.Module]], dict[int, str]]:
    """Return the batch norm layers by name, and the names of all parameters of other modules by `id`."""
    layers: list[tuple[str, nn.Module]] = []
    other_owners: dict[int, str] = {}
    names: set[str] = set()
    seen: set[int] = set()
    modules = cast("Iterable[tuple[str, nn.Module]]", module.named_modules())
    for path, layer in modules:
        name = unwrapped(path)
        if isinstance(layer, (BatchNormBase, InputBatchNorm)) or _is_frozen_batch_norm(layer):
            names.add(name)
            parameter = _parameter(layer, "weight")
            # Layers that share a scale share its start and its learning rate, so the first layer stands for all.
            if parameter is not None and id(parameter) in seen:
                continue
            seen.add(id(parameter))
            layers.append((name, layer))
        elif not _belongs_to(name, names):
            for attribute, parameter in layer.named_parameters(recurse=False):
                other_owners.setdefault(id(parameter), f"{name}.{attribute}" if name else attribute)
    return layers, other_owners


def _belongs_to(name: str, batch_norms: set[str]) -> bool:
    """Tell whether a module holds the parametrisation of a batch norm layer; its parameters belong to the layer."""
    layer, found, _ = f".{name}.".partition(".parametrizations.")
    return bool(found) and layer[1:] in batch_norms


def _is_frozen_batch_norm(layer: nn.Module) -> bool:
    """Recognise the frozen batch norm of torchvision, timm and others: all four tensors are buffers."""
    buffers = {name for name, _ in layer.named_buffers(recurse=False)}
    return {"weight", "bias", "running_mean", "running_var"} <= buffers


def _state_of(layer: nn.Module, target: float, other_owners: Mapping[int, str]) -> tuple[State, str]:
    """Return the state of a selected layer, judged by its own values alone, and the reason."""
    if any(cls.__module__.startswith(_QUANTIZED) for cls in type(layer).__mro__):
        return "unsupported", "a quantised layer is for inference; it cannot be trained"
    if is_flattened(layer):
        reason = "its scale is not a parameter but part of a flat parameter, as FSDP1 makes with use_orig_params=False"
        return "unsupported", f"{reason}; wrap with use_orig_params=True, which is what FSDPStrategy does by itself"
    if sources := _hooked_sources(layer):
        reason = (
            f"its scale is not a parameter: a hook makes it from {' and '.join(sources)}, as torch.nn.utils.prune does"
        )
        return "unsupported", f"{reason}; remove the hook (prune.remove makes pruning permanent) or exclude the layer"
    if isinstance(layer, InputBatchNorm):
        return "input", "the input layer starts at a scale of its own"
    if not isinstance(layer, BatchNormBase):
        return "frozen", "frozen: its scale is a buffer"
    if is_parametrized(layer, "weight"):
        obstacle = _obstacle(layer)
        if obstacle:
            return "unsupported", f"{obstacle}; remove the parametrisation or exclude the layer"
    scale = _parameter(layer, "weight")
    if scale is None:
        return "no scale", "affine=False: the layer has no scale"
    # A learning rate of lr / c would also act on the other use of the parameter.
    if id(scale) in other_owners:
        owner = other_owners[id(scale)]
        return "shared", f"its scale is also {owner!r}, which is no batch norm; untie them or exclude the layer"
    if not scale.requires_grad:
        return "frozen", "its scale does not require a gradient"
    if is_lazy(scale):
        return "lazy", "lazy: written when its first input makes it"
    if scale.is_meta:
        return "unmaterialized", "on the meta device; its values exist only once it is materialised"
    if is_partitioned(scale) and not scale.numel():
        return "unmaterialized", "partitioned by DeepSpeed's ZeRO-3; gather it with deepspeed.zero.GatheredParameters"
    # Values are read only from here on: the layers above have none, or none to judge by. A layer that has seen data is
    # trained even if its scale still is 1, so the running statistics come first.
    if statistics_moved(layer):
        return "trained", "its running statistics are not fresh"
    if not scale.numel():
        return "fresh", "freshly initialised, as far as this rank can tell, which holds no part of its scale"
    bounds = _bounds(cast("Tensor", layer.weight))
    if bounds == (0.0, 0.0):
        return "zero", "its scale starts at 0 on purpose"
    if any(_is_uniform(layer, bounds, start, scale.dtype) for start in (1.0, target)):
        return "fresh", "freshly initialised"
    return "trained", f"its scale starts at values of its own, {bounds[0]:.4g} to {bounds[1]:.4g}"


def is_flattened(layer: nn.Module) -> bool:
    """Tell whether a layer's scale is a plain tensor, as FSDP leaves it with `use_orig_params=False`.

    Args:
        layer: The layer.

    Returns:
        True if so.
    """
    return _is_plain_tensor(layer) and not _hooked_sources(layer)


def _is_plain_tensor(layer: nn.Module) -> bool:
    scale: object = vars(layer).get("weight")  # plain tensors are in `vars`, parameters and buffers are not
    return isinstance(scale, Tensor)


def _hooked_sources(layer: nn.Module) -> list[str]:
    """List the parameters from which a hook makes a layer's scale before every forward pass."""
    names = [name for name, _ in layer.named_parameters(recurse=False) if name.startswith("weight_")]
    return names if _is_plain_tensor(layer) else []


def _obstacle(layer: nn.Module) -> str | None:
    """Return the reason why a parametrised scale cannot be set by assignment; None if it can."""
    steps = cast("ParametrizationList", getattr(layer.parametrizations, "weight"))  # noqa: B009 # typed as a module
    if not steps.is_tensor:
        return "its scale is made from several parameters"
    names = [type(step).__name__ for step in steps if not hasattr(step, "right_inverse")]
    return f"its scale is parametrised by {names[0]}, which has no right_inverse" if names else None


def statistics_moved(layer: nn.Module) -> bool:
    """Tell whether a layer's running statistics differ from torch's initial values.

    Args:
        layer: The layer.

    Returns:
        True if so; False for a layer without running statistics.
    """
    # A model may have thousands of layers: make few calls, and check the cheapest sign first.
    batches, mean, variance = (
        cast("Tensor | None", getattr(layer, name, None))
        for name in ("num_batches_tracked", "running_mean", "running_var")
    )
    if batches is not None and batches.item() != 0:
        return True
    if mean is not None and _bounds(mean) != (0.0, 0.0):
        return True
    return variance is not None and _bounds(variance) != (1.0, 1.0)


def _bounds(values: Tensor) -> tuple[float, float]:
    lowest, highest = torch.aminmax(values.detach())
    return lowest.item(), highest.item()


def _is_uniform(layer: nn.Module, bounds: tuple[float, float], value: float, dtype: torch.dtype) -> bool:
    """Tell whether all channels have a value, given the least and greatest of them."""
    if is_parametrized(layer, "weight"):  # a parametrisation rounds values
        return all(math.isclose(bound, value, rel_tol=1e-3) for bound in bounds)
    return bounds[0] == bounds[1] and bounds[0] in _roundings(value, dtype)


@lru_cache
def _roundings(value: float, dtype: torch.dtype) -> frozenset[float]:
    """Return the roundings of a written value: a model may be converted to another precision after the write."""
    written = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    return frozenset(torch.tensor(value, dtype=first).to(dtype).item() for first in written)


def eps_of(layer: nn.Module) -> float | None:
    """Return the eps of a batch norm layer.

    Args:
        layer: The layer.

    Returns:
        The number; None if the layer has no attribute `eps`, or no number there.
    """
    eps: object = getattr(layer, "eps", None)
    return float(eps) if isinstance(eps, (int, float)) else None


def _parameter(layer: nn.Module, name: str) -> nn.Parameter | None:
    if is_parametrized(layer, name):
        value: object = getattr(getattr(layer.parametrizations, name), "original", None)
    else:
        value = getattr(layer, name, None)
    return value if isinstance(value, nn.Parameter) else None
