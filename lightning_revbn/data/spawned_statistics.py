"""Sends the input statistics of a spawned or forked process to the main process, through shared memory."""

from __future__ import annotations

import io
import multiprocessing
from multiprocessing.context import get_spawning_popen
from typing import Any, cast

import torch
from lightning.pytorch import Trainer

__all__ = ["SharedStatistics"]

_ROOM = 4096
"""Bytes beyond the size of an empty state, for numbers and names that are longer later."""


class SharedStatistics:
    """Shared memory through which a child process sends input statistics to the process that started it.

    With `ddp_spawn`, `ddp_fork` and `ddp_notebook`, Lightning trains in child processes. It returns the model, the
    metrics and the state of the Trainer to the main process, but not the DataModule. Shared memory stays shared when a
    child is started; a deep copy or pickle of this object gets its own memory.

    Args:
        state: The result of `InputSet.state_dict`, for the size of the memory.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        self._allocate(len(_to_bytes(state)) + _ROOM)

    def send(self, trainer: Trainer, state: dict[str, Any]) -> None:
        """Send a state to the parent process, if this is the first child on its machine.

        Args:
            trainer: The Trainer.
            state: The result of `InputSet.state_dict`.
        """
        is_child = multiprocessing.parent_process() is not None and trainer.strategy.launcher is not None
        if is_child and trainer.local_rank == 0:
            self.write(state)

    def write(self, state: dict[str, Any]) -> None:
        """Write a state for `take` in another process.

        Args:
            state: The result of `InputSet.state_dict`.
        """
        content = _to_bytes(state)
        self._memory[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        self._header.copy_(torch.tensor([int(self._header[0]) + 1, len(content)]))
        self._read = int(self._header[0])

    def take(self) -> dict[str, Any] | None:
        """Return the state that another process has written since the last call; None if none has written."""
        number, length = cast("list[int]", self._header.tolist())  # pyright: ignore[reportUnknownMemberType] # torch does not type it
        if number == self._read:
            return None
        self._read = number
        return torch.load(io.BytesIO(self._memory[:length].numpy().tobytes()), weights_only=True)

    def _allocate(self, size: int) -> None:
        # The header holds the number of writes, by which `take` finds a new state, and the bytes of the state.
        self._header = torch.zeros(2, dtype=torch.int64)
        self._memory = torch.zeros(size, dtype=torch.uint8)
        for tensor in (self._header, self._memory):
            tensor.share_memory_()  # pyright: ignore[reportUnknownMemberType] # torch does not type it
        self._read = 0

    def __getstate__(self) -> dict[str, Any]:
        """Share the memory with a child that is being spawned; any other pickle or copy gets its own memory."""
        return vars(self) if get_spawning_popen() is not None else {"size": len(self._memory)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "size" in state:
            self._allocate(state["size"])
        else:
            vars(self).update(state)


def _to_bytes(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
