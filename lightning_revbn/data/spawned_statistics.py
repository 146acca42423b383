"""Brings home to the main process what a spawned one has learned."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_revbn.core.moments import Kind
from lightning_revbn.lightning_compat import callbacks_of

__all__ = ["SharedStatistics"]

_COLUMNS = ("count", "mean", "m2", "average_weight", "average_mean", "average_variance", "shift")
_HEADER = 5


class SharedStatistics:
    """Shared memory by which rank 0 sends input statistics to the process that spawned it.

    With `ddp_spawn`, `ddp_fork` and `ddp_notebook`, Lightning trains in child processes and brings home the model, the
    metrics and the state of the Trainer, but not the DataModule. Shared memory stays shared when it is sent to a child.

    Args:
        channels: Number of channels C.
    """

    def __init__(self, channels: int) -> None:
        # How often it was written, samples, kind, input range and scale; then the columns.
        self._buffer = torch.zeros(_HEADER + len(_COLUMNS) * channels, dtype=torch.float64)
        self._buffer.share_memory_()  # pyright: ignore[reportUnknownMemberType] # torch does not type it
        self._read = 0

    def send_at_end(self, trainer: Trainer, state: Callable[[], dict[str, Any]]) -> None:
        """Arrange for writing at the end of training if this is rank 0 of the children of a launcher.

        Args:
            trainer: The Trainer; that of a child is thrown away when the child ends.
            state: Returns the state of an `OnlineStandardizer`.
        """
        is_child = multiprocessing.parent_process() is not None and trainer.strategy.launcher is not None
        if is_child and trainer.is_global_zero:
            callbacks_of(trainer).append(_Writer(self, state))

    def write(self, state: dict[str, Any]) -> None:
        """Send a state.

        Args:
            state: What `OnlineStandardizer.state_dict` returned.
        """
        self._read = int(self._buffer[0]) + 1
        header = [self._read, state["samples"], Kind[state["kind"]], state["input_range"], state["scale"]]
        columns = [cast("Tensor", state[name]) for name in _COLUMNS]
        self._buffer.copy_(torch.cat([torch.tensor(header, dtype=torch.float64), *columns]))

    def take(self) -> dict[str, Any] | None:
        """Return the state that was written since the last call; None if there is none."""
        number = int(self._buffer[0])
        if number == self._read:
            return None
        self._read = number
        samples, kind, input_range, scale = cast("list[float]", self._buffer[1:_HEADER].tolist())  # pyright: ignore[reportUnknownMemberType] # torch does not type it
        columns = self._buffer[_HEADER:].clone().view(len(_COLUMNS), -1)
        return {
            "samples": torch.tensor(samples, dtype=torch.float64),
            "kind": Kind(int(kind)).name,
            "input_range": input_range,
            "scale": scale,
            **dict(zip(_COLUMNS, columns, strict=True)),
        }


class _Writer(Callback):
    """Writes the state at the end of training."""

    def __init__(self, shared: SharedStatistics, state: Callable[[], dict[str, Any]]) -> None:
        self._shared = shared
        self._state = state

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._shared.write(self._state())
