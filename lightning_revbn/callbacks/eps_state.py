"""Which layers have the eps of the settings, through fits, evaluations, checkpoints and resumes.

No `state_dict` of a model holds eps. So the callback's state in a checkpoint tells which layers were trained with which
eps, and every stage of a Trainer sets it again.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, cast

from lightning.pytorch import LightningModule
from torch import nn

from lightning_revbn.callbacks.next_call import NextCall
from lightning_revbn.core.eps import EPS_KEY, choose_eps, layers_with_eps, write_eps
from lightning_revbn.core.layers import BatchNormRecord
from lightning_revbn.lightning_compat import rank_zero_warn

__all__ = ["EpsState", "EvaluationEps"]


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
        self._restored: dict[str, float] = {}
        self.before: dict[str, float | None] = {}

    def begin(self, module: nn.Module) -> None:
        """Start a fit.

        Args:
            module: The module to be trained.
        """
        self._current = self.known.setdefault(module, {})
        self._restored = {}
        self.before = {}

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

    def settle(self, module: nn.Module) -> None:
        """Set the eps of restored layers, once a module with all its layers is there.

        Training goes on with the eps of the settings, if there is one. Without one, a layer keeps the eps that it was
        trained with, and a warning says so.

        Args:
            module: The module.
        """
        present = layers_with_eps(module)
        restored = {name: eps for name, eps in self._restored.items() if name in present}
        self._restored = {}
        if restored and self.eps is None:
            rank_zero_warn(
                f"{self._owner}: {len(restored)} layers of the checkpoint were trained with eps={_texts(restored)} and "
                "keep it, though this run sets no eps"
            )
        self._write(module, {name: eps if self.eps is None else self.eps for name, eps in restored.items()})

    def give_back(self, module: nn.Module) -> None:
        """Undo what was set since the fit began.

        Args:
            module: The module.
        """
        present = layers_with_eps(module)
        write_eps(module, {name: eps for name, eps in self.before.items() if name in present})
        for name in self.before:
            self._current.pop(name, None)
        self.before = {}

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Return eps by layer, for the layers that have it from the settings or from a checkpoint."""
        return {EPS_KEY: dict(sorted(self._current.items()))} if self._current else {}

    def __getstate__(self) -> dict[str, object]:
        """Leave behind the modules, which belong to this process."""
        kept = {name: value for name, value in self.__dict__.items() if name != "known"}
        return {**kept, "_current": dict(self._current)}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.known = weakref.WeakKeyDictionary()

    def _write(self, module: nn.Module, values: Mapping[str, float]) -> None:
        self.before = {**write_eps(module, values), **self.before}
        self._current.update(values)


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
        self._before = write_eps(module, chosen)
        self._current.update(chosen)
        # Called with the whole checkpoint by every strategy, before weights are loaded.
        self._wrap: NextCall | None = NextCall(module, "on_load_checkpoint", self._around)

    def start(self) -> None:
        """Warn where trained layers are evaluated of which nothing tells with which eps they were trained."""
        if self._eps is None or self._wrap is None or not self._wrap.is_pending:
            return
        unknown = [
            record
            for record in self._records
            if record.state == "trained" and record.name not in self._current and record.eps != self._eps
        ]
        if unknown:
            rank_zero_warn(
                f"{self._owner}: eps={self._eps:g} is not set in {len(unknown)} layers, {unknown[0].name!r} for one, "
                f"which are trained and have eps={unknown[0].eps:g}: nothing tells here with which eps they were "
                "trained. Evaluate by ckpt_path, or call "
                f"lightning_revbn.core.eps.set_eps(model, {self._eps:g}, trained='overwrite')"
            )

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
        foreign = {name: eps for name, eps in self._before.items() if name not in trained}
        if foreign and self._eps is not None:
            rank_zero_warn(
                f"{self._owner}: the weights of the checkpoint were trained without eps={self._eps:g} in "
                f"{len(foreign)} layers, which keep the eps of the model's code"
            )
        if any(eps != self._eps for eps in trained.values()):
            settings = "this run sets no eps" if self._eps is None else f"this run has eps={self._eps:g}"
            rank_zero_warn(
                f"{self._owner}: the weights of the checkpoint were trained with eps={_texts(trained)} and are "
                f"evaluated with it, though {settings}"
            )
        write_eps(self._module, foreign)
        for name in foreign:
            self._current.pop(name, None)
        wanted = {name: eps for name, eps in trained.items() if name in present}
        write_eps(self._module, wanted)
        self._current.update(wanted)


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
