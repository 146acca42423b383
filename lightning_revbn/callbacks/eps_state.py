"""Which layers have the eps of the settings, through fits, evaluations, checkpoints and resumes.

No `state_dict` of a model holds eps. So the callback's state in a checkpoint tells which layers were trained with which
eps, and every stage of a Trainer sets it again.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from lightning.pytorch import LightningModule
from torch import nn

from lightning_revbn.callbacks.next_call import NextCall
from lightning_revbn.core.eps import EPS_KEY, choose_eps, has_seen_data, layers_with_eps, write_eps
from lightning_revbn.core.input_batch_norm import InputBatchNorm
from lightning_revbn.core.layers import BatchNormRecord, eps_of
from lightning_revbn.lightning_compat import rank_zero_warn

__all__ = ["EpsState", "EvaluationEps"]


@dataclass(frozen=True)
class _Written:
    """The eps that a layer had from its code, and the eps that a callback wrote."""

    own: float | None
    eps: float | None


# Shared by all callbacks, since a module may be trained with one and evaluated with another.
_WRITTEN: weakref.WeakKeyDictionary[nn.Module, _Written] = weakref.WeakKeyDictionary()


class EpsState:
    """The eps of a module's layers, from the start of a fit to its checkpoints.

    Args:
        owner: What the user calls the callback, for warnings.
        eps: The eps of the settings; None leaves the layers' own.
    """

    def __init__(self, owner: str, eps: float | None) -> None:
        self._owner = owner
        self.eps = eps
        # By module, since an attribute of a layer stays where it was set from fit to fit.
        self.known: weakref.WeakKeyDictionary[nn.Module, dict[str, float]] = weakref.WeakKeyDictionary()
        self._current: dict[str, float] = {}
        self._earlier: dict[str, float] = {}
        self._restored: dict[str, float] = {}
        self._has_other_setting = False
        self._told: dict[str, float] | None = None
        self._wrap: NextCall | None = None
        self.before: dict[str, float | None] = {}

    def begin(self, module: nn.Module) -> None:
        """Start a fit.

        Args:
            module: The module to be trained.
        """
        self._current = self.known.setdefault(module, {})
        self._earlier = dict(self._current)
        self._restored = {}
        self._told = None
        self.before = {}
        self.end()
        # Called with the whole checkpoint by every strategy; the callback's own state says nothing of a run without it.
        self._wrap = NextCall(module, "on_load_checkpoint", self._around)

    def end(self) -> None:
        """Restore the module's own hook."""
        if self._wrap is not None:
            self._wrap.undo()
            self._wrap = None

    def choose(self, module: nn.Module, records: Sequence[BatchNormRecord]) -> None:
        """Set eps in the layers that are fresh.

        Args:
            module: The module.
            records: Its layers, as they are before training.
        """
        if self.eps is not None:
            self._write(module, choose_eps(module, records, self.eps))

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take from a checkpoint with which eps its layers were trained.

        Args:
            state: The state of the callback.
        """
        self._restored = dict(state.get(EPS_KEY, {}))
        self._has_other_setting = state.get("eps") != self.eps

    def settle(self, module: nn.Module, records: Sequence[BatchNormRecord]) -> None:
        """Set the eps of restored layers, once a module with all its layers is there.

        Training goes on with the eps of the settings, if there is one. Without one, a layer keeps the eps that it was
        trained with, and a warning says so. Layers whose weights were trained without the eps have their own again.

        Args:
            module: The module.
            records: Its layers, as they are at the start of training.
        """
        self._take_back(module, records)
        present = layers_with_eps(module)
        restored = {name: eps for name, eps in self._restored.items() if name in present}
        self._restored = {}
        if restored and self.eps is None:
            rank_zero_warn(
                f"{self._owner}: {len(restored)} layers of the checkpoint were trained with eps={_texts(restored)} and "
                "keep it, though this run sets no eps"
            )
        follows_settings = self.eps is not None and self._has_other_setting
        self._write(module, {n: self.eps if follows_settings and self.eps else eps for n, eps in restored.items()})
        _claim(self._current, module, records, self.eps)

    def warn_if_unknown(self, records: Sequence[BatchNormRecord]) -> None:
        """Warn where trained layers train on of which nothing tells with which eps they were trained.

        Args:
            records: The layers, as they are at the start of training.
        """
        if self._told is None:
            _warn_if_unknown(self._owner, self.eps, records, self._current, "Resume")

    def give_back(self, module: nn.Module) -> None:
        """Undo what was set since the fit began.

        Args:
            module: The module.
        """
        present = layers_with_eps(module)
        _write(module, {name: eps for name, eps in self.before.items() if name in present})
        self._current.clear()
        self._current.update(self._earlier)
        self.before = {}

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Return eps by layer, for the layers that have it from the settings or from a checkpoint."""
        return {EPS_KEY: dict(sorted(self._current.items()))} if self._current else {}

    def __getstate__(self) -> dict[str, object]:
        """Leave behind the modules, which belong to this process."""
        kept = {name: value for name, value in self.__dict__.items() if name != "known"}
        return {**kept, "_current": dict(self._current), "_wrap": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.known = weakref.WeakKeyDictionary()

    def _write(self, module: nn.Module, values: Mapping[str, float]) -> None:
        self.before = {**_write(module, values), **self.before}
        self._current.update(values)

    def _around(self, method: Any, checkpoint: dict[str, Any]) -> None:
        method(checkpoint)
        self._told = _trained_with(checkpoint)

    def _take_back(self, module: nn.Module, records: Sequence[BatchNormRecord]) -> None:
        """Give layers their own eps whose weights turn out to be trained without the eps that was written."""
        written = _own_eps(module)
        # Of a checkpoint all weights are others; of hooks that load weights, only those of layers that were fresh.
        names = written if self._told is not None else {name: written[name] for name in self.before if name in written}
        told = {**(self._told or {}), **self._restored}
        skipped = {r.name for r in records if r.verdict != "rewrite" and r.state != "excluded" and has_seen_data(r)}
        foreign = {name: own for name, own in names.items() if name in skipped and name not in told}
        if foreign:
            _warn_of_foreign(self._owner, module, foreign)
            self._told = told  # which eps these layers were trained with is known, and told
            _write(module, foreign)
        for name in foreign:
            self._current.pop(name, None)
            self.before.pop(name, None)


class EvaluationEps:
    """The eps of a module that one Trainer validates, tests or predicts with.

    Weights of a checkpoint are evaluated with the eps that they were trained with, whatever the settings say.

    Args:
        owner: What the user calls the callback, for warnings.
        state: What fits with the callback have left to know.
        module: The module.
        records: Its layers.
    """

    def __init__(
        self, owner: str, state: EpsState, module: LightningModule, records: Sequence[BatchNormRecord]
    ) -> None:
        self._owner = owner
        self._eps = state.eps
        self._module = module
        self._records = records
        self._current = state.known.setdefault(module, {})
        chosen = {} if self._eps is None else choose_eps(module, records, self._eps)
        _write(module, chosen)
        self._current.update(chosen)
        _claim(self._current, module, records, self._eps)
        # Called with the whole checkpoint by every strategy, before weights are loaded.
        self._wrap: NextCall | None = NextCall(module, "on_load_checkpoint", self._around)

    def start(self) -> None:
        """Warn where trained layers are evaluated of which nothing tells with which eps they were trained."""
        if self._wrap is not None and self._wrap.is_pending:
            _warn_if_unknown(self._owner, self._eps, self._records, self._current, "Evaluate")

    def end(self) -> None:
        """Restore the module's own hook."""
        if self._wrap is not None:
            self._wrap.undo()
            self._wrap = None

    def _around(self, method: Any, checkpoint: dict[str, Any]) -> None:
        method(checkpoint)
        self._take(_trained_with(checkpoint))

    def _take(self, trained: Mapping[str, float]) -> None:
        """Let layers have the eps that the checkpoint tells, and the others what they had."""
        present = layers_with_eps(self._module)
        excluded = {record.name for record in self._records if record.state == "excluded"}
        own = _own_eps(self._module)
        foreign = {name: eps for name, eps in own.items() if name not in trained and name not in excluded}
        if foreign:
            _warn_of_foreign(self._owner, self._module, foreign)
        if any(eps != self._eps for eps in trained.values()):
            settings = "this run sets no eps" if self._eps is None else f"this run has eps={self._eps:g}"
            rank_zero_warn(
                f"{self._owner}: the weights of the checkpoint were trained with eps={_texts(trained)} and are "
                f"evaluated with it, though {settings}"
            )
        _write(self._module, foreign)
        for name in foreign:
            self._current.pop(name, None)
        wanted = {name: eps for name, eps in trained.items() if name in present}
        _write(self._module, wanted)
        self._current.update(wanted)


def _write(module: nn.Module, values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Set eps, and remember what the layers had from their code."""
    before = write_eps(module, values)
    layers = layers_with_eps(module)
    for name, eps in values.items():
        layer, had = layers[name], before[name]
        known = _WRITTEN.pop(layer, None)
        own = known.own if known is not None and known.eps == had else had
        if own != eps:
            _WRITTEN[layer] = _Written(own, eps)
    return before


def _own_eps(module: nn.Module) -> dict[str, float | None]:
    """Return the eps of the model's code for the layers that have another one from a callback."""
    found = {name: (layer, _WRITTEN.get(layer)) for name, layer in layers_with_eps(module).items()}
    # Where the eps was set by hand since, that is the code's.
    return {
        name: written.own
        for name, (layer, written) in found.items()
        if written is not None and eps_of(layer) == written.eps
    }


def _claim(current: dict[str, float], module: nn.Module, records: Sequence[BatchNormRecord], eps: float | None) -> None:
    """Let a checkpoint record what the layers have, where that is the eps asked for or comes from another callback."""
    written = _own_eps(module)
    for record in records:
        if record.eps is None or record.state == "excluded" or isinstance(record.module, InputBatchNorm):
            continue
        if record.name in current or record.name in written or record.eps == eps:
            current[record.name] = record.eps


def _warn_if_unknown(
    owner: str, eps: float | None, records: Sequence[BatchNormRecord], known: Mapping[str, float], way: str
) -> None:
    unknown = [r for r in records if r.state == "trained" and r.name not in known and r.eps != eps]
    # A scale that starts at values of its own is no sign of training.
    unknown = [record for record in unknown if has_seen_data(record)]
    if unknown and eps is not None:
        rank_zero_warn(
            f"{owner}: eps={eps:g} is not set in {len(unknown)} layers, {unknown[0].name!r} for one, "
            f"which are trained and have eps={unknown[0].eps:g}: nothing tells here with which eps they were "
            f"trained. {way} by ckpt_path, or call "
            f"lightning_revbn.core.eps.set_eps(model, {eps:g}, trained='overwrite')"
        )


def _warn_of_foreign(owner: str, module: nn.Module, foreign: Mapping[str, float | None]) -> None:
    layers = layers_with_eps(module)
    written = {name: cast("float", eps_of(layers[name])) for name in foreign}
    rank_zero_warn(
        f"{owner}: the weights that were loaded were trained without eps={_texts(written)} in "
        f"{len(foreign)} layers, which keep the eps of the model's code"
    )


def _trained_with(checkpoint: Mapping[str, Any]) -> dict[str, float]:
    """Return eps by layer from the state of every callback in a checkpoint that has set it."""
    callbacks: Mapping[str, Any] = checkpoint.get("callbacks", {})
    found: dict[str, float] = {}
    for state in callbacks.values():
        if isinstance(state, Mapping):
            found |= cast("Mapping[str, Any]", state).get(EPS_KEY, {})
    return found


def _texts(values: Mapping[str, float]) -> str:
    return " and ".join(f"{value:g}" for value in sorted({*values.values()}))
