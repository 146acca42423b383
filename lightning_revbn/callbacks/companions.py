"""Several callbacks of the same kind in a Trainer: which act, on which layers, and under which keys they are saved."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerStatus
from typing_extensions import override

from lightning_revbn.callbacks.agreement import SameOnAllRanks
from lightning_revbn.callbacks.monitor import COMPARED, BatchNormMonitor
from lightning_revbn.core.layers import Selection
from lightning_revbn.lightning_compat import MisconfigurationException, callbacks_of

__all__ = ["Companion"]

_SHOWN = 3


class Companion(SameOnAllRanks):
    """A callback that a Trainer may hold several times, each for its own layers.

    A callback that acts alone saves its state under the name of its class, so a run can be resumed with other settings.
    With several callbacks, each key also holds the patterns that select its layers.
    """

    enabled: bool
    _called = "RevisitedBatchNorm"
    _selection: Selection
    _own_monitor: BatchNormMonitor | None

    def __init__(self) -> None:
        self._trainer: weakref.ref[Trainer] | None = None  # whose fit this callback takes part in
        self._joined: weakref.ref[Trainer] | None = None
        self._alone_in: weakref.WeakKeyDictionary[Trainer, bool] = weakref.WeakKeyDictionary()

    @property
    @override
    def state_key(self) -> str:
        joined = None if self._joined is None else self._joined()
        if joined is not None and joined.state.status == TrainerStatus.RUNNING:
            return self._key_in(joined)
        # The Trainer's constructor refuses equal keys before callbacks know each other: until then all settings count.
        return self._key_of({**self._settings, "enabled": self.enabled})

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # After a fit, only this hook tells the callback which Trainer is saving.
        states: dict[str, Any] = checkpoint.get("callbacks", {})
        state = states.pop(self.state_key, None)
        if state is not None and not self._gives_way(trainer):
            states[self._key_in(trainer)] = state

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the Trainers, which belong to this process."""
        return {**self.__dict__, "_trainer": None, "_joined": None, "_alone_in": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._alone_in = weakref.WeakKeyDictionary()  # which cannot be pickled

    def _key_in(self, trainer: Trainer) -> str:
        """Return the key of the state in the checkpoints of a Trainer."""
        is_alone = self._alone_in.get(trainer)
        if is_alone is None:
            is_alone = self._is_alone(trainer)
        return self._key_alone if is_alone else self._key_of(self._selecting)

    def _key_of(self, told: Mapping[str, Any]) -> str:
        """Return a key with the arguments that differ from their defaults."""
        own = {name: value for name, value in told.items() if value != self._default(name)}
        return self._generate_state_key(**own) if own else type(self).__qualname__

    @property
    def _key_alone(self) -> str:
        return type(self).__qualname__

    @property
    def _settings(self) -> dict[str, Any]:
        """The arguments that decide on the training, as plain values."""
        raise NotImplementedError

    @property
    def _selecting(self) -> dict[str, Any]:
        """The arguments that select layers, as plain values."""
        selection = self._selection
        mapped = {"scale": [*selection.scale]} if isinstance(selection.scale, Mapping) else {}
        return {"include": [*selection.include], "exclude": [*selection.exclude], **mapped}

    @property
    def _told(self) -> str:
        """The callback as code, with the arguments that differ from their defaults."""
        own = (f"{name}={value!r}" for name, value in self._settings.items() if value != self._default(name))
        return f"{type(self).__name__}({', '.join(own)})"

    @property
    def _is_asked(self) -> bool:
        """Whether the user wants this callback to act."""
        return self.enabled

    def _gives_way(self, trainer: Trainer) -> bool:
        """Tell whether this callback leaves a Trainer to other callbacks."""
        return False

    def _acting(self, trainer: Trainer) -> list[Companion]:
        """List the callbacks that act in a Trainer; if none acts, the disabled callbacks."""
        staying = [one for one in callbacks_of(trainer) if isinstance(one, Companion) and not one._gives_way(trainer)]
        return [one for one in staying if one._is_asked] or staying

    def _acts_in(self, trainer: Trainer) -> bool:
        """Tell whether this callback acts in a Trainer."""
        return self._is_asked and not self._gives_way(trainer)

    def _is_alone(self, trainer: Trainer) -> bool:
        return self._acting(trainer) in ([self], [])

    def _belongs_to(self, trainer: Trainer) -> bool:
        """Tell whether this callback takes part in a fit of a Trainer."""
        return self._trainer is not None and self._trainer() is trainer

    def _is_busy(self, trainer: Trainer) -> bool:
        """Tell whether another Trainer is in the middle of a fit with this callback."""
        other = None if self._trainer is None else self._trainer()
        return other is not None and other is not trainer and other.state.status == TrainerStatus.RUNNING

    def _selections_of_others(self, trainer: Trainer) -> list[Selection]:
        """List the selections of the other callbacks that act in a Trainer."""
        return [one._selection for one in self._acting(trainer) if one is not self]

    def _join(self, trainer: Trainer) -> None:
        """Look at the other callbacks of a Trainer, to fix the key of the state in its checkpoints."""
        self._alone_in[trainer] = self._is_alone(trainer)
        if not self._is_busy(trainer):
            self._joined = weakref.ref(trainer)

    def _has_other_monitor(self, trainer: Trainer) -> bool:
        """Tell whether the Trainer holds a monitor, or an earlier callback has a monitor with the same prefix."""
        if any(isinstance(callback, BatchNormMonitor) for callback in callbacks_of(trainer)):
            return True
        own, acting = self._own_monitor, self._acting(trainer)
        before = acting[: acting.index(self)] if self in acting else []
        earlier = (callback._own_monitor for callback in before)
        return own is not None and any(other is not None and other.prefix == own.prefix for other in earlier)

    def _joined_settings(self, trainer: Trainer) -> dict[str, Any]:
        """Return the settings in force in a Trainer; where callbacks differ, the list of their values."""
        acting = self._acting(trainer)
        # A user's callback may hold this callback and call its hooks; then the Trainer does not list it.
        first, *rest = [callback._settings for callback in (acting if self in acting else [self])]
        return {
            name: value if all(other[name] == value for other in rest) else [value, *(other[name] for other in rest)]
            for name, value in first.items()
        }

    def _refuse_shared_layers(self, trainer: Trainer, module: LightningModule) -> None:
        """Raise if two callbacks select the same layer.

        Args:
            trainer: The Trainer.
            module: The module to be trained.

        Raises:
            MisconfigurationException: If two do; the message names the layers.
        """
        acting = self._acting(trainer)
        seen: set[str] = set()
        shared: list[str] = []
        for callback in acting if len(acting) > 1 else ():
            selected = [record.name for record in callback._selection.look(module) if record.target is not None]
            shared += [name for name in selected if name in seen]
            seen.update(selected)
        if shared:
            more = f" and {len(shared) - _SHOWN} more" if len(shared) > _SHOWN else ""
            raise MisconfigurationException(
                f"{len(acting)} callbacks {type(self).__name__} in the Trainer select the same layers: "
                f"{', '.join(map(repr, shared[:_SHOWN]))}{more}. "
                "Divide the layers by include and exclude; the callbacks are "
                f"{' and '.join(callback._told for callback in acting)}"
            )

    @override
    def _compared(self, trainer: Trainer) -> dict[str, Any] | None:
        if self._gives_way(trainer):
            return None
        if not self._is_asked:
            return {"enabled": False}
        own = self._own_monitor
        logged = {} if own is None else {f"monitor.{name}": getattr(own, name) for name in COMPARED}
        return {"enabled": True, **self._settings, "monitor": own is not None, **logged}

    def _default(self, name: str) -> Any:
        """Return an argument's default in the form of the settings, which hold patterns as lists."""
        parameter = inspect.signature(type(self)).parameters.get(name)
        value: Any = None if parameter is None else parameter.default
        return [*value] if isinstance(value, tuple) else value  # pyright: ignore[reportUnknownVariableType] # of strings
