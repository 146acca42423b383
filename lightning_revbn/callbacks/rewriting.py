"""What was found in a module, what was written into its scales, what was kept, and what is given back."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_revbn.core.copies import networks_held_by
from lightning_revbn.core.gathered import gathered
from lightning_revbn.core.initialization import fill_scale, forget_lazy, refuse, write_scales, zero_kept_names
from lightning_revbn.core.layers import BatchNormRecord, Selection, copies_in
from lightning_revbn.lightning_compat import callbacks_of

__all__ = ["Rewriting", "settled"]


class Rewriting:
    """The batch norm layers of one module through its fits: records, verdicts, and what was written.

    `write` runs in setup, and again after hooks that make layers. `settle` runs once everything was made, moved and
    restored, and `end` when the fit is over.

    Args:
        selection: The settings that decide on every layer.
    """

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self.records: list[BatchNormRecord] = []
        self.zero_kept: set[str] = set()
        self._rewritten: set[str] = set()
        self._earlier_fits: frozenset[str] = frozenset()
        self._before: dict[str, _Before] = {}
        self._module: weakref.ref[LightningModule] | None = None

    def begin(self, module: LightningModule) -> None:
        """Start a fit; of another module than before, nothing is known yet.

        Args:
            module: The module to be trained.
        """
        if self._module is None or self._module() is not module:
            self._module = weakref.ref(module)
            self._rewritten, self.zero_kept = set(), set()
        self._earlier_fits = frozenset(self._rewritten)
        self._before = {}

    def write(self, trainer: Trainer, module: LightningModule) -> None:
        """Write the scales of the layers that exist now, in the module and in copies that callbacks have made of it.

        Args:
            trainer: The Trainer.
            module: The module to be trained.

        Raises:
            ValueError: If a layer cannot be rewritten; no scale was written then.
        """
        with gathered(module, write=True, fsdp=False):
            records = self._judge(module)
            refuse([record for record in records if record.state != "unmaterialized"])
            rewritten = [record for record in records if record.verdict == "rewrite"]
            for record in rewritten:
                if record.values is not None and not _has_target(record):
                    self._before[record.name] = _Before(record)
            copies = _copies_of_callbacks(trainer, module, rewritten)
            write_scales([*records, *copies])
            self.records = records
            self._rewritten |= {record.name for record in rewritten}
            self.zero_kept |= set(zero_kept_names(records))

    def settle(self, trainer: Trainer, module: LightningModule) -> None:
        """Bring the records up to the layers as they are now that all were made, moved and perhaps restored.

        Args:
            trainer: The Trainer.
            module: The module to be trained.

        Raises:
            ValueError: If a pattern matches no layer, or a layer cannot be rewritten.
        """
        earlier = {record.name: record for record in self.records}
        with gathered(trainer.strategy.model or module, write=True):
            found = self._selection.look(module)
            copies = {record.name for record in self.records if record.copy_of is not None}
            frozen = [record for record in found if record.state == "frozen" and record.name not in copies]
            self._give_back(trainer, module, frozen)
            records = [settled(earlier.get(record.name), record) for record in found]
            self._selection.check_patterns_match(records)
            refuse(records)
            write_scales(records)
        self.records = records

    def look(self, module: nn.Module) -> list[BatchNormRecord]:
        """List the layers as they are, for the update rule; scales kept at zero are remembered.

        Args:
            module: The module to be trained.

        Returns:
            One record a layer.

        Raises:
            ValueError: If a scale is part of a flat parameter, as FSDP1 makes them.
        """
        records = self._selection.look(module)
        refuse([record for record in records if record.state == "unsupported"])
        self.zero_kept |= set(zero_kept_names(records))  # layers that are newer than a restored state, too
        return records

    def end(self) -> None:
        """Forget the values from before the fit, and take back the orders to write lazy layers."""
        self._before = {}
        for record in self.records:
            forget_lazy(record)

    def __getstate__(self) -> dict[str, object]:
        """Leave behind the module and its values, which belong to this process."""
        return {**self.__dict__, "_module": None, "_before": {}}

    def _judge(self, module: nn.Module) -> list[BatchNormRecord]:
        """Look at the layers; trained ones that an earlier fit has written are not new to us."""
        records = [
            replace(record, verdict="skip", reason="trained in an earlier fit")
            if record.state == "trained" and record.name in self._earlier_fits
            else record
            for record in self._selection.look(module)
        ]
        return self._selection.follow_copies(module, records)

    def _give_back(self, trainer: Trainer, module: LightningModule, frozen: Sequence[BatchNormRecord]) -> None:
        """Undo the rewrite of layers that were frozen since, by a hook or by a callback that comes after ours."""
        written = [
            record
            for record in frozen
            if _has_target(record) and record.name in self._before and self._before[record.name].is_same_layer(record)
        ]
        in_module = [record for record in self.records if record.copy_of in {record.name for record in written}]
        for copy in (*in_module, *_copies_of_callbacks(trainer, module, written)):
            if copy.copy_of is not None and _has_target(copy):
                fill_scale(copy.module, self._before[copy.copy_of].scale)
        for record in written:
            fill_scale(record.module, self._before[record.name].scale)


def settled(earlier: BatchNormRecord | None, present: BatchNormRecord) -> BatchNormRecord:
    """Decide on a layer at the start of training from the record at setup and the record now.

    Args:
        earlier: What was found and decided at setup; None for a layer that did not exist then.
        present: What is found now.

    Returns:
        The present record with the verdict and the reason that hold for this fit.
    """
    if earlier is None or earlier.target is None:
        return present
    if earlier.copy_of is not None and present.has_scale(earlier.target):
        # Copies are compared at setup alone: later on, weights may be sharded.
        return replace(earlier, module=present.module)
    if earlier.verdict == "rewrite" and present.has_scale(earlier.target):
        # Written at setup: it looks "trained" only where its reason to be rewritten was the policy for trained layers.
        return replace(present, verdict="rewrite", reason=earlier.reason)
    if present.state != "trained":
        return present
    if earlier.state in ("fresh", "lazy", "unmaterialized"):
        # Nothing has trained it in between, so its values were loaded; they win over ours.
        return replace(present, verdict="skip", reason="restored, from a checkpoint or by the model's hooks")
    return replace(present, verdict="skip", reason=earlier.reason)


class _Before:
    """What a layer was before its scale was written."""

    def __init__(self, record: BatchNormRecord) -> None:
        values = cast("Tensor", record.values)
        # One number does for the shards of a scale too.
        self.scale = values[0].item() if (values == values[0]).all() else values.clone()
        mean = _running_mean(record)
        self._mean = None if mean is None else mean.clone()

    def is_same_layer(self, record: BatchNormRecord) -> bool:
        """Tell whether the layer has neither been trained nor restored from a checkpoint since, by its statistics."""
        mean = _running_mean(record)
        return mean is None or (self._mean is not None and torch.equal(self._mean.to(mean), mean))


def _running_mean(record: BatchNormRecord) -> Tensor | None:
    return cast("Tensor | None", record.module.running_mean)


def _has_target(record: BatchNormRecord) -> bool:
    return record.target is not None and record.has_scale(record.target)


def _copies_of_callbacks(
    trainer: Trainer, module: LightningModule, originals: Sequence[BatchNormRecord]
) -> list[BatchNormRecord]:
    """List the copies of layers that other callbacks keep, in averages that they made before ours was set up."""
    networks = (network for callback in callbacks_of(trainer) for network in networks_held_by(callback))
    return [record for network in networks for record in copies_in(network, module, originals)]
