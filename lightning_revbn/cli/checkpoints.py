"""Reads a checkpoint file as plain data and tensors, and runs none of its code."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lightning_revbn.cli.terminal import CommandError
from lightning_revbn.core.printable import error_text

__all__ = ["TargetError", "as_dict", "is_whole", "load_state_dict", "read_checkpoint", "tensors_of"]

_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")
"""The keys of the model in checkpoints of Lightning and timm, of torch's tutorials, of torchvision's references."""


class TargetError(CommandError):
    """A target cannot be read."""


def read_checkpoint(path: Path) -> dict[Any, Any]:
    """Read a file of `torch.save`.

    Args:
        path: The file.

    Returns:
        The content of the file, tensors on the CPU.

    Raises:
        TargetError: If the file is damaged, is not a checkpoint, or holds anything but plain data.
    """
    try:
        path.open("rb").close()  # torch may raise OSError for damaged files too
    except OSError as error:
        raise TargetError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols and kinds of tensors; failures are reported below
            # weights_only: a pickle can run code.
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged bytes, torch's unpickler may raise any error
        if re.search(r"Unsupported (global|class)|GLOBAL", str(error)):
            raise TargetError(
                f"{path} holds pickled objects besides tensors; refused, and none of its code was run. "
                "Save the model's state_dict() alone to inspect it"
            ) from error
        raise TargetError(
            f"{path} is not a checkpoint of torch.save, or is damaged: {error_text(error, 100)}"
        ) from error
    top = as_dict(content)
    if top is None:
        raise TargetError(f"{path} holds a {type(content).__name__}, not a model's state_dict")
    return top


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, and run none of its code.

    Args:
        path: Lightning's checkpoint, or any file of `torch.save` whose model is at the top or under a usual key.

    Returns:
        The model's tensors by name, on the CPU.

    Raises:
        TargetError: If the file is damaged, is not a checkpoint, or holds anything but plain data.
    """
    return tensors_of(read_checkpoint(path), path)


def tensors_of(content: dict[Any, Any], path: Path) -> dict[str, Tensor]:
    """Find the tensors of the model in a checkpoint.

    Args:
        content: The content of the checkpoint.
        path: The path of the file, for messages.

    Returns:
        The tensors by name.

    Raises:
        TargetError: If the checkpoint holds no tensors by name.
    """
    inner = (as_dict(content.get(key)) for key in _STATE_DICT_KEYS)
    named = next((found for found in inner if found is not None), content)
    tensors = {key: value for key, value in named.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise TargetError(
            f"{path} holds no model: no tensor by name, at the top or under {', '.join(_STATE_DICT_KEYS)}"
        )
    return tensors


def as_dict(value: object) -> dict[Any, Any] | None:
    """Return a value if it is a dict.

    Args:
        value: Anything that a checkpoint holds.

    Returns:
        The dict, or None.
    """
    return cast("dict[Any, Any]", value) if isinstance(value, dict) else None


def is_whole(value: object) -> bool:
    """Tell whether a value is a tensor of plain real numbers that are all stored in the file.

    An expanded tensor is not: a file of 2 kB can hold a tensor of 10^8 equal numbers, whose sums take gigabytes.

    Args:
        value: Anything that a checkpoint holds.

    Returns:
        True if it is such a tensor.
    """
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not (value.is_meta or value.is_nested or value.is_quantized)
        and value.dtype.is_floating_point
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )
