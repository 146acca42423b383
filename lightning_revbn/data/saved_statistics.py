"""Reads the input statistics from a checkpoint, whatever the class of the DataModule that saved them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

__all__ = ["STATE_NAME", "read_input_statistics"]

STATE_NAME = "input_norm"
"""The key of the statistics in the state of a DataModule."""


def read_input_statistics(path: Path, *, weights_only: bool) -> dict[str, Any]:
    """Read the input statistics of a checkpoint.

    Args:
        path: A checkpoint of a Trainer; a distributed checkpoint is a directory.
        weights_only: Whether `torch.load` refuses objects other than tensors and plain values.

    Returns:
        The result of `InputSet.state_dict` when the checkpoint was saved.

    Raises:
        ValueError: If the file is not a checkpoint of a Trainer, or does not have the input statistics of exactly one
            DataModule.
    """
    # Lightning saves a distributed checkpoint as a directory, with everything but sharded tensors in meta.pt.
    file = path / "meta.pt" if path.is_dir() else path
    checkpoint: Any = torch.load(file, map_location="cpu", weights_only=weights_only)
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{file} is not a checkpoint of a Trainer: it holds a {type(checkpoint).__name__}")
    parts = cast("dict[str, Any]", checkpoint)
    found = {name: part[STATE_NAME] for name, part in parts.items() if _has_statistics(part)}
    if len(found) != 1:
        having = f"of {len(found)} DataModules: {', '.join(found)}" if found else "no input statistics"
        raise ValueError(
            f"{file} has {having}; give a checkpoint of a run with a single DataModule with OnlineInputNormMixin"
        )
    return next(iter(found.values()))


def _has_statistics(part: Any) -> bool:
    return isinstance(part, dict) and STATE_NAME in part
