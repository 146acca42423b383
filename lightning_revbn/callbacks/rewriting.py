"""Writes the scales of a module's layers, remembers their values from before, and restores them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_revbn.core.copies import networks_held_by
from lightning_revbn.core.gathered import gathered
from lightning_revbn.core.initialization import fill_scale, forget_lazy, refuse, write_scales, zero_kept_names
from lightning_revbn.core.layers import BatchNormRecord, Selection, copies_in
from lightning_revbn.lightning_compat import callbacks_of

__all__ = ["Rewriting", "copies_of_callbacks", "settled"]

_Look: TypeAlias = tuple[float, ...]


@dataclass
class _Memory:
    """The names of rewritten layers and of layers kept at zero, remembered for a module from fit to fit."""

    rewritten: set[str] = field(default_factory=lambda: set[str]())
    zero_kept: set[str] = field(default_factory=lambda: set[str]())


class Rewriting:
    """The batch norm layers of a module through its fits: records, verdicts and rewrites.

    `write` runs in setup, and again after hooks that make layers. `settle` runs once all layers are made, moved and
    restored. `end` closes the fit. If a fit ends before its first update, `give_back` undoes the rewrites.

    Args:
        selection: The settings that decide on every layer.
    """

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self.records: list[BatchNormRecord] = []
        # Weak keys: the memory of a module ends with the module.
        self._memories: weakref.WeakKeyDictionary[nn.Module, _Memory] = weakref.WeakKeyDictionary()
        self._memory = _Memory()
        self._carried: tuple[_Memory, dict[str, _Look]] | None = None
        self._earlier_fits: frozenset[str] = frozenset()
        self._before: dict[str, _Before] = {}
        self._copies: list[tuple[BatchNormRecord, _Before]] = []

    @property
    def zero_kept(self) -> set[str]:
        """Names of the layers whose scale was kept at a deliberate zero, in the module of the last fit."""
        return self._memory.zero_kept

    @zero_kept.setter
    def zero_kept(self, names: set[str]) -> None:
        self._memory.zero_kept = names

    def begin(self, module: LightningModule) -> None:
        """Start a fit with the memory of the module's earlier fits.

        Args:
            module: The module to be trained.
        """
        if module not in self._memories:
            self._memories[module] = self._recognized(module)
        self._memory = self._memories[module]
        self._earlier_fits = frozenset(self._memory.rewritten)
        self._forget_before()

    def write(self, trainer: Trainer, module: LightningModule) -> None:
        """Write the scales of the layers that exist now, in the module and in its copies in other callbacks.

        Args:
            trainer: The Trainer.
            module: The module to be trained.

        Raises:
            ValueError: If a layer cannot be rewritten; then no scale is written.
        """
        # FSDP1 is left out: it wraps the model only after setup.
        with gathered(module, write=True, fsdp=False):
            records = self._judge(module)
            refuse([record for record in records if record.state != "unmaterialized"])
            # Equal values identify a copy, so the search comes before the first write.
            copies = copies_of_callbacks(trainer, module, [r for r in records if r.verdict == "rewrite"])
            self._write(records)
            self._copies += [(copy, _Before(copy)) for copy in copies if not _has_target(copy)]
            write_scales(copies)
            self.records = records
            self._note_zeros(records)

    def write_new(self, module: LightningModule) -> list[BatchNormRecord]:
        """Write the scales of layers that were added or replaced during training.

        Args:
            module: The module in training.

        Returns:
            The records of the new layers.

        Raises:
            ValueError: If a new layer cannot be rewritten.
        """
        known = {record.name: record for record in self.records}
        new = {r.name: r for r in self._selection.look(module) if _is_other_layer(r, known.get(r.name))}
        refuse([*new.values()])
        for name in new:
            self._before.pop(name, None)  # these are values of the replaced layer
        self._write([*new.values()])
        self.records = [*{**known, **new}.values()]
        self._note_zeros([*new.values()])
        return [*new.values()]

    def settle(self, trainer: Trainer, module: LightningModule) -> None:
        """Update records and scales, once all layers were made, moved and perhaps restored.

        Args:
            trainer: The Trainer.
            module: The module to be trained.

        Raises:
            ValueError: If a pattern matches no layer, or a layer cannot be rewritten.
        """
        earlier = {record.name: record for record in self.records}
        with gathered(trainer.strategy.model or module, write=True):
            found = self._selection.look(module)
            # A callback that was set up after ours may have copied the new scales.
            self._note_copies(trainer, module, [record for record in found if record.name in self._before])
            # A hook or a later callback may have frozen a layer since: it gets its scale from before the fit back.
            copies = {record.name for record in self.records if record.copy_of is not None}
            frozen = {
                record.name for record in found if record.state == "frozen" and self._is_unchanged(record)
            } - copies
            self._fill_back(module, frozen | {r.name for r in self.records if r.copy_of in frozen})
            records = [settled(earlier.get(record.name), record) for record in found]
            self._selection.check_patterns_match(records)
            refuse(records)
            self._write(records)
        self.records = records
        # `give_back` leaves frozen layers, and layers from a checkpoint, as they are.
        ours = {record.name for record in records if record.verdict == "rewrite"}
        self._before = {name: before for name, before in self._before.items() if name in ours}

    def look(self, module: nn.Module) -> list[BatchNormRecord]:
        """List the layers as they are, for the update rule, and remember scales kept at zero.

        Args:
            module: The module to be trained.

        Returns:
            A record per layer.

        Raises:
            ValueError: If a layer is unsupported, such as a layer whose scale FSDP1 made part of a flat parameter.
        """
        records = self._selection.look(module)
        refuse([record for record in records if record.state == "unsupported"])
        self.zero_kept |= set(zero_kept_names(records))  # a restored state lacks layers that are newer
        return records

    def give_back(self, module: LightningModule) -> None:
        """Undo every rewrite of a fit that has ended before its first update.

        Ranks do not wait for each other here, since a single rank may have raised the exception. Scales that
        DeepSpeed's ZeRO-3 has partitioned, or FSDP1 has flattened, keep the new value: only all ranks together could
        fill them.

        Args:
            module: The module that was to be trained.
        """
        self._fill_back(module, set(self._before))
        self._memory.rewritten -= self._before.keys() - self._earlier_fits
        self._forget_before()

    def end(self) -> None:
        """Close the fit: forget the values from before it, and remove the hooks that wait to write lazy layers."""
        self._forget_before()
        for record in self.records:
            forget_lazy(record)

    def __getstate__(self) -> dict[str, object]:
        """Leave out the modules, which belong to this process; a copy recognises the layers by their values."""
        module = next((module for module, memory in self._memories.items() if memory is self._memory), None)
        looks = {} if module is None else {record.name: _look(record) for record in self._selection.look(module)}
        carried = self._carried if module is None else (self._memory, looks)
        kept = {name: value for name, value in self.__dict__.items() if name != "_memories"}
        return {**kept, "records": [], "_before": {}, "_copies": [], "_carried": carried}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._memories = weakref.WeakKeyDictionary()

    def _recognized(self, module: nn.Module) -> _Memory:
        """Return the memory of the callback that this callback was copied from, for layers with the same values."""
        if self._carried is None:
            return _Memory()
        memory, looks = self._carried
        same = {r.name for r in self._selection.look(module) if r.name in looks and looks[r.name] == _look(r)}
        return _Memory(memory.rewritten & same, memory.zero_kept & same)

    def _judge(self, module: nn.Module) -> list[BatchNormRecord]:
        """Judge the layers; skip trained layers that an earlier fit has written."""
        records = [
            replace(record, verdict="skip", reason="trained in an earlier fit")
            if record.state == "trained" and record.name in self._earlier_fits
            else record
            for record in self._selection.look(module)
        ]
        return self._selection.follow_copies(module, records)

    def _write(self, records: list[BatchNormRecord]) -> None:
        """Write scales, and remember their values from before."""
        for record in records:
            if record.verdict == "rewrite":
                self._memory.rewritten.add(record.name)
                if record.name not in self._before and not _has_target(record):
                    self._before[record.name] = _Before(record)
        write_scales(records)

    def _note_zeros(self, records: Sequence[BatchNormRecord]) -> None:
        # A fresh layer does not start at zero, so an earlier note that it was kept at zero is out of date.
        made_anew = {record.name for record in records if record.state == "fresh" and _is_held(record)}
        self.zero_kept = (self.zero_kept - made_anew) | set(zero_kept_names(records))

    def _is_unchanged(self, record: BatchNormRecord) -> bool:
        return record.name in self._before and self._before[record.name].is_same_layer(record)

    def _fill_back(self, module: LightningModule, names: set[str]) -> None:
        """Restore the values from before the fit where the new values are unchanged, in layers and in their copies."""
        targets = {record.name: record.target for record in self.records if record.verdict == "rewrite"}
        for record in self._selection.look(module) if names else ():
            target = targets.get(record.name)
            if record.name in names and target is not None and record.has_scale(target):
                fill_scale(record.module, self._before[record.name].scale)
        for copy, before in self._copies:
            if copy.copy_of in names and _has_target(copy):
                fill_scale(copy.module, before.scale)

    def _note_copies(self, trainer: Trainer, module: LightningModule, originals: Sequence[BatchNormRecord]) -> None:
        """Remember copies, to restore them with their originals."""
        known = {id(copy.module) for copy, _ in self._copies}
        for copy in copies_of_callbacks(trainer, module, originals) if originals else ():
            if copy.copy_of is not None and id(copy.module) not in known:
                self._copies.append((copy, self._before[copy.copy_of]))

    def _forget_before(self) -> None:
        self._before, self._copies = {}, []


def settled(earlier: BatchNormRecord | None, present: BatchNormRecord) -> BatchNormRecord:
    """Decide on a layer at the start of training from the record at setup and the record now.

    Args:
        earlier: The record at setup; None for a layer that did not exist then.
        present: The record now.

    Returns:
        The present record with the verdict and the reason that hold for this fit.
    """
    if earlier is None or earlier.target is None:
        return present
    if earlier.copy_of is not None and present.has_scale(earlier.target):
        # Copies are compared only at setup: later, weights may be sharded.
        return replace(earlier, module=present.module)
    if earlier.verdict == "rewrite" and present.has_scale(earlier.target):
        # It was written at setup. Its state now may be "trained" only because the policy for trained layers chose it.
        return replace(present, verdict="rewrite", reason=earlier.reason)
    if present.state != "trained":
        return present
    if earlier.state in ("fresh", "lazy", "unmaterialized"):
        # No training came in between, so its values were loaded, and loaded values win over ours.
        return replace(present, verdict="skip", reason="restored, from a checkpoint or by the model's hooks")
    return replace(present, verdict="skip", reason=earlier.reason)


class _Before:
    """The scale and running mean of a layer from before its scale was written."""

    def __init__(self, record: BatchNormRecord) -> None:
        # A single number also fits the shards of a scale, and needs no read of them.
        starts = {"fresh": 1.0, "lazy": 1.0, "zero": 0.0}
        self.scale: float | Tensor
        if record.state in starts:
            self.scale = starts[record.state]
        else:
            self.scale = cast("Tensor", record.values).clone()
        mean = _running_mean(record)
        self._mean = None if mean is None else mean.clone()

    def is_same_layer(self, record: BatchNormRecord) -> bool:
        """Tell, by the running mean, whether training and checkpoints have left the layer alone since."""
        mean = _running_mean(record)
        # The layer may have moved to another device or precision since.
        return mean is None or (self._mean is not None and torch.equal(self._mean.to(mean), mean))


def _is_other_layer(present: BatchNormRecord, earlier: BatchNormRecord | None) -> bool:
    """Tell whether a layer is new under its name; a converted layer keeps its scale, and is not new."""
    if earlier is None or present.module is earlier.module:
        return earlier is None
    return present.scale is None or present.scale is not earlier.scale


def _look(record: BatchNormRecord) -> _Look:
    """Return numbers that identify a trained layer; sharded and lazy layers have none."""
    tensors = (record.values, _running_mean(record), getattr(record.module, "running_var", None))
    plain = [tensor for tensor in tensors if type(tensor) in (Tensor, nn.Parameter) and isinstance(tensor, Tensor)]
    return tuple(float(tensor.detach().double().sum()) for tensor in plain if not tensor.is_meta)


def _is_held(record: BatchNormRecord) -> bool:
    """Tell whether this rank holds a part of the scale, and so knows its values."""
    return record.values is not None and record.values.numel() > 0


def _running_mean(record: BatchNormRecord) -> Tensor | None:
    mean: object = getattr(record.module, "running_mean", None)
    return mean if isinstance(mean, Tensor) and not is_lazy(mean) else None


def _has_target(record: BatchNormRecord) -> bool:
    return record.target is not None and record.has_scale(record.target)


def copies_of_callbacks(
    trainer: Trainer, module: LightningModule, originals: Sequence[BatchNormRecord]
) -> list[BatchNormRecord]:
    """List copies of layers in other callbacks, such as averages that they made before our setup.

    Args:
        trainer: The Trainer.
        module: The module to be trained.
        originals: The layers whose copies to find, with the values that were copied.

    Returns:
        A record for each copy, with the name and the target of its original.
    """
    networks = (network for callback in callbacks_of(trainer) for network in networks_held_by(callback))
    return [record for network in networks for record in copies_in(network, module, originals)]
