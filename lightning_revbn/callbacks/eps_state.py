"""Chooses the eps of a module's layers in fits, evaluations, checkpoints and resumes.

There are three sources. The settings ask for an eps in fresh layers. A checkpoint holds the eps that its layers were
trained with, since the `state_dict` of a model does not. A note on a layer (`written_eps`) holds the eps that a
callback wrote, and the eps from the model's code. Only `StageEps` weighs the three.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer

from lightning_revbn.callbacks.rewriting import copies_of_callbacks
from lightning_revbn.callbacks.written_eps import WrittenEps, note_of
from lightning_revbn.core.eps import EPS_KEY, choose_eps, has_seen_data, proven_fresh
from lightning_revbn.core.input_batch_norm import InputBatchNorm
from lightning_revbn.core.layers import BatchNormRecord, Selection, eps_of
from lightning_revbn.core.next_call import EveryCall, NextCall
from lightning_revbn.lightning_compat import rank_zero_warn

__all__ = ["EpsState", "StageEps"]


class EpsState:
    """The eps setting of a callback, and the stages that apply it.

    Args:
        owner: The callback's name, for warnings.
        selection: The settings that decide on every layer.
        eps: The eps of the settings; None leaves the layers' own.
    """

    def __init__(self, owner: str, selection: Selection, eps: float | None) -> None:
        self._owner = owner
        self._selection = selection
        self.eps = eps
        self._fit: StageEps | None = None
        self._latest: StageEps | None = None

    @property
    def before(self) -> Mapping[str, float | None]:
        """The eps from the model's code by name, for layers whose eps the last fit has set."""
        return {} if self._fit is None else self._fit.before

    def begin(self, trainer: Trainer, module: LightningModule, others: Sequence[Selection], key: str) -> None:
        """Start a fit.

        Args:
            trainer: The Trainer.
            module: The module to be trained.
            others: The selections of the Trainer's other callbacks.
            key: The key of the callback's state in a checkpoint.
        """
        self.end()
        self._fit = self._latest = StageEps(self._owner, self.eps, trainer, module, others, saved_as=key)

    def evaluate(self, trainer: Trainer, module: LightningModule, others: Sequence[Selection]) -> StageEps:
        """Start an evaluation; another Trainer may evaluate in the middle of a fit.

        Args:
            trainer: The Trainer.
            module: The module.
            others: The selections of the Trainer's other callbacks.

        Returns:
            The stage, to be ended by the caller.
        """
        stage = StageEps(self._owner, self.eps, trainer, module, others)
        stage.choose(self._selection.look(module))
        # A checkpoint of a running fit must hold the eps of the fit, not of an evaluation in its middle.
        if self._fit is None or self._fit.is_over:
            self._latest = stage
        return stage

    def leave(self, trainer: Trainer, module: LightningModule, others: Sequence[Selection]) -> None:
        """Restore the eps from the model's code in fresh layers, for a fit with the callback disabled.

        Args:
            trainer: The Trainer.
            module: The module.
            others: The selections of the Trainer's other callbacks.
        """
        if WrittenEps(module).notes():
            stage = StageEps(self._owner, None, trainer, module, others)
            stage.choose(self._selection.look(module))
            stage.end()

    def choose(self, records: Sequence[BatchNormRecord]) -> None:
        """Set eps in fresh layers.

        Args:
            records: Layers of the module, as they are before training.
        """
        if self._fit is not None:
            self._fit.choose(records)

    def settle(self, records: Sequence[BatchNormRecord]) -> None:
        """Set the eps of restored layers, once all layers of the module exist.

        Args:
            records: The layers of the module, as they are at the start of training.
        """
        if self._fit is not None:
            self._fit.settle(records)

    def warn_if_not_set(self) -> None:
        """Warn where trained layers go on with another eps than the settings ask for."""
        if self._fit is not None:
            self._fit.warn_if_not_set()

    def give_back(self) -> None:
        """Undo the changes that the settings made since the fit began."""
        if self._fit is not None:
            self._fit.give_back()

    def end(self) -> None:
        """End the fit."""
        if self._fit is not None:
            self._fit.end()

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Return eps by layer, for layers whose eps comes from the settings or from a checkpoint."""
        layers = {} if self._latest is None else self._latest.eps_to_save()
        return {EPS_KEY: layers} if layers else {}

    def __getstate__(self) -> dict[str, object]:
        """Leave out the stages, whose modules belong to this process."""
        return {**self.__dict__, "_fit": None, "_latest": None}


class StageEps:
    """The eps of a module's layers in a stage of a Trainer: a fit, or an evaluation.

    A callback sets eps in the layers that it selects, and in layers that no callback of the Trainer selects: a
    checkpoint of other callbacks may hold their eps.

    Args:
        owner: The callback's name, for warnings.
        eps: The eps of the settings; None leaves the layers' own.
        trainer: The Trainer.
        module: The module.
        others: The selections of the Trainer's other callbacks.
        saved_as: The key of the callback's state in checkpoints of a fit; None for an evaluation. An evaluation uses
            the eps that the weights were trained with, whatever the settings say. A fit follows changed settings.
    """

    def __init__(
        self,
        owner: str,
        eps: float | None,
        trainer: Trainer,
        module: LightningModule,
        others: Sequence[Selection],
        saved_as: str | None = None,
    ) -> None:
        self._owner, self._eps, self._others, self._saved_as = owner, eps, others, saved_as
        # Weak references: a stage that is over still answers for checkpoints, but must not keep its module alive.
        self._trainer, self._module = weakref.ref(trainer), weakref.ref(module)
        self._written = WrittenEps(module)
        self._records: dict[str, BatchNormRecord] = {}
        self._selected: frozenset[str] = frozenset()
        self._told: dict[str, _Told] | None = None
        self._is_of_trials = False
        self._has_weights_alone = False
        self._said: set[str] = set()
        # Every strategy calls these hooks with the whole checkpoint, including states of callbacks that this run lacks.
        # Lightning saves no callback state in a weights-only checkpoint, so the hook adds the eps.
        self._wraps: list[EveryCall] = [NextCall(module, "on_load_checkpoint", self._around_load)]
        if saved_as is not None:
            self._wraps.append(EveryCall(module, "on_save_checkpoint", self._around_save))

    @property
    def before(self) -> Mapping[str, float | None]:
        """The eps from the model's code by name, for layers whose eps this stage has set."""
        return self._written.before

    @property
    def is_over(self) -> bool:
        """Whether the stage has ended."""
        return not self._wraps

    def choose(self, records: Sequence[BatchNormRecord]) -> None:
        """Give fresh layers the eps of the settings; without this setting, the eps from the model's code.

        Args:
            records: Layers of the module, as they are before training.
        """
        module = self._module()
        if module is None:
            return
        self._look(records)
        others = self._names_of_others()
        if self._eps is not None:
            chosen = choose_eps(module, records, self._eps)
            self._find_copies(chosen)
            self._written.set({name: eps for name, eps in chosen.items() if name not in others})
        elif notes := self._written.notes():
            # An earlier fit has set their eps, and their parameters were reset since.
            # Any number serves as eps here, since only the names are used.
            fresh = choose_eps(module, proven_fresh(records), 1.0).keys() & notes.keys() - others
            self._find_copies(fresh)
            self._written.leave_to_code(fresh)

    def settle(self, records: Sequence[BatchNormRecord] = ()) -> None:
        """Set the eps of restored layers, once all layers of the module exist; warn where settings differ.

        Args:
            records: New records of the module's layers; without them, the earlier records count.
        """
        self._look(records)
        told = self._told or {}
        layers, others = self._written.layers, self._names_of_others(told)
        mine = {name: layer for name, layer in told.items() if name not in others}
        missing = [name for name in mine if name not in layers]
        if missing:
            rank_zero_warn(
                f"{self._owner}: the checkpoint has {len(missing)} layers that were trained with "
                f"eps={_texts(told[name].eps for name in missing)}, and the model has no layers of their names, such "
                f"as {missing[0]!r}: set the eps of these layers by lightning_revbn.core.eps.set_eps"
            )
        self._restore({name: layer for name, layer in mine.items() if name in layers})
        foreign = self._find_foreign() - others
        if foreign:
            _warn_of_foreign(self._owner, [eps_of(layers[name]) for name in foreign])
            self._said |= foreign
            self._written.leave_to_code(foreign, stays=True)

    def warn_if_not_set(self) -> None:
        """Warn where trained layers have another eps than the settings ask for, or their eps in training is unknown."""
        written = [note.eps for note in self._written.notes().values() if note.code != note.eps]
        if self._has_weights_alone and written:
            rank_zero_warn(
                f"{self._owner}: the checkpoint holds weights alone, so the eps of their training is not known: "
                f"{len(written)} layers have eps={_texts(written)} now, not the eps of the model's code"
            )
        if self._eps is None:
            return
        # A layer may start from unusual scales without training, so the running statistics decide.
        trained = {n: r for n, r in self._records.items() if r.state == "trained" and has_seen_data(r)}
        left = {n: r.eps for n, r in trained.items() if r.eps not in (None, self._eps) and n not in self._said}
        noted = {name: eps for name, eps in left.items() if note_of(trained[name].module)}
        others = {name: eps for name, eps in left.items() if name not in noted}
        not_set = f"{self._owner}: eps={self._eps:g} is not set in "
        if noted:
            rank_zero_warn(
                f"{not_set}{len(noted)} layers, such as {next(iter(noted))!r}, which were trained with "
                f"eps={_texts(noted.values())} and keep it"
            )
        if others and self._told is not None:
            _warn_of_foreign(self._owner, [self._eps] * len(others))
        elif others:
            way = "Evaluate" if self._saved_as is None else "Resume"
            rank_zero_warn(
                f"{not_set}{len(others)} layers, such as {next(iter(others))!r}, which are trained and have "
                f"eps={_texts(others.values())}: the eps of their training is not known here. {way} by "
                f"ckpt_path, or call lightning_revbn.core.eps.set_eps(model, {self._eps:g}, trained='overwrite')"
            )

    def give_back(self) -> None:
        """Undo the changes from the settings in this stage; eps from a checkpoint stays with its weights."""
        self._find_copies(self._written.undone_by())  # other callbacks may have copied the changed layers
        self._written.give_back()

    def end(self) -> None:
        """Restore the module's own hooks, and release the records."""
        self._written.end()
        while self._wraps:
            self._wraps.pop().undo()
        self._records = {}

    def eps_to_save(self) -> dict[str, float]:
        """Return eps by layer, for layers whose eps a callback wrote, or whose eps the settings ask for."""
        noted, others = self._written.notes(), self._names_of_others()
        values = {name: eps_of(layer) for name, layer in sorted(self._written.layers.items()) if name not in others}
        return {
            name: eps
            for name, eps in values.items()
            if eps is not None and (name in noted or (name in self._selected and eps == self._eps))
        }

    def _look(self, records: Sequence[BatchNormRecord]) -> None:
        self._written.note_again()
        self._records |= {record.name: record for record in records}
        mine = (r.name for r in records if r.state != "excluded" and not isinstance(r.module, InputBatchNorm))
        self._selected = self._selected.union(mine)

    def _names_of_others(self, told: Iterable[str] = ()) -> set[str]:
        names = list({*self._written.layers, *told}) if self._others else []
        return {name for selection in self._others for name in selection.selected(names)}

    def _find_copies(self, names: Iterable[str]) -> None:
        """Find copies of layers in other callbacks, while equal values still identify them."""
        trainer, module = self._trainer(), self._module()
        originals = [self._records[name] for name in names if name in self._records]
        if trainer is not None and module is not None and originals:
            copies = copies_of_callbacks(trainer, module, originals)
            self._written.follow({copy.module: cast("str", copy.copy_of) for copy in copies})

    def _around_load(self, method: Any, checkpoint: dict[str, Any]) -> None:
        method(checkpoint)
        if "callbacks" not in checkpoint:
            self._has_weights_alone = True
            return
        self._told = _told_by(checkpoint["callbacks"])
        # After their trials, Lightning's finders load a checkpoint that they saved at step 0.
        self._is_of_trials = self._saved_as is not None and not checkpoint.get("global_step")
        self._find_copies(self._told)
        if self._saved_as is None:
            self.settle()  # before other callbacks start to evaluate

    def _around_save(self, method: Any, checkpoint: dict[str, Any]) -> None:
        method(checkpoint)
        eps = self.eps_to_save()
        # A checkpoint without optimizers holds weights alone, and Lightning leaves out the states of callbacks.
        if eps and "optimizer_states" not in checkpoint:
            checkpoint.setdefault("callbacks", {})[self._saved_as] = {"eps": self._eps, EPS_KEY: eps}

    def _restore(self, told: Mapping[str, _Told]) -> None:
        """Give restored layers the eps they were trained with; in a fit, a changed setting overrides it."""
        is_fit, code = self._saved_as is not None, self._written.code()
        asked = {name: self._eps for name in told if name in self._selected and self._eps is not None}
        changed = {name: eps for name, eps in asked.items() if is_fit and eps != told[name].setting}
        kept = [t.eps for name, t in told.items() if name not in changed and t.eps != asked.get(name, code[name])]
        left = [told[name].eps for name, eps in changed.items() if told[name].eps != eps]
        if kept:
            kept_in = f"{len(kept)} layers" if is_fit else "the weights"
            done = "keep it" if is_fit else "are evaluated with it"
            setting = "this run sets no eps" if self._eps is None else f"this run has eps={self._eps:g}"
            rank_zero_warn(
                f"{self._owner}: {kept_in} of the checkpoint were trained with eps={_texts(kept)} and {done}, "
                f"though {setting}"
            )
        if left:
            rank_zero_warn(
                f"{self._owner}: {len(left)} layers of the checkpoint were trained with eps={_texts(left)} and go on "
                f"with eps={self._eps:g}, the setting of this run"
            )
        self._said |= told.keys()
        self._written.set({name: layer.eps for name, layer in told.items()}, stays=not self._is_of_trials)
        self._written.set(changed)

    def _find_foreign(self) -> set[str]:
        """Find layers whose eps a callback wrote, but whose loaded weights were trained without it."""
        told = self._told or {}
        notes = self._written.notes().items()
        written = {name for name, note in notes if note.code != note.eps and name not in told}
        if self._saved_as is None:
            return written if self._told is not None else set()
        seen = {name for name, r in self._records.items() if r.verdict != "rewrite" and has_seen_data(r)}
        if self._told is None:
            # The module's hooks have loaded the weights, so only layers that were fresh before have new weights.
            return written & seen & self._written.undone_by()
        return written & (seen | (written - self._records.keys()))  # layers that share a scale share a record


@dataclass(frozen=True)
class _Told:
    """A layer's entry in a checkpoint: the eps it was trained with, and the eps that the settings asked for."""

    eps: float
    setting: float | None


def _told_by(callbacks: Mapping[str, Any]) -> dict[str, _Told]:
    """Return a checkpoint's entries by layer, from the states of all callbacks that have set eps."""
    states = (cast("Mapping[str, Any]", state) for state in callbacks.values() if isinstance(state, Mapping))
    return {
        name: _Told(eps, state.get("eps"))
        for state in states
        for name, eps in cast("Mapping[str, float]", state.get(EPS_KEY, {})).items()
    }


def _warn_of_foreign(owner: str, values: Sequence[float | None]) -> None:
    rank_zero_warn(
        f"{owner}: the weights that were loaded were trained without eps={_texts(values)} in "
        f"{len(values)} layers, which keep the eps of the model's code"
    )


def _texts(values: Iterable[float | None]) -> str:
    return " and ".join(f"{value:g}" for value in sorted({value for value in values if value is not None}))
