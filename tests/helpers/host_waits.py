"""Finds where the host waits for a device: as torch tells it on CUDA, elsewhere by operations that need an answer."""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_revbn

PACKAGE = Path(lightning_revbn.__file__).parent
ROOT = PACKAGE.parent
TORCH = Path(torch.__file__).parent
_ANSWERS: dict[str, Any] = {"aten::_local_scalar_dense": 1, "aten::equal": True}
"""Operations of which the host reads the result, and a result for tensors without values."""
_SIZES = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim"}
"""Operations of which the host reads how large their result is."""


@contextlib.contextmanager
def host_waits(device: str) -> Iterator[list[str]]:
    """Note every wait of the host.

    Args:
        device: Where the tensors are: `"cuda"`, or a device on which only the operations tell, such as `"cpu"`, where
            nothing waits, or CUDA as `FakeTensorMode` imitates it.

    Yields:
        A list that grows by the place of every wait: file and line in the package, or in what else has asked.
    """
    places: list[str] = []
    if device != "cuda":
        with _Answers(places):
            yield places
        return
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown = warnings.showwarning

        def note(message: Any, *args: Any, **options: Any) -> None:
            if "synchronizing CUDA operation" in str(message):
                places.append(_place())
            else:
                shown(message, *args, **options)

        warnings.showwarning = note
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(before)


def of_package(places: list[str]) -> list[str]:
    """Return the waits that the package has asked for."""
    return [place for place in places if place.startswith(f"{PACKAGE.name}/")]


class _Answers(TorchDispatchMode):
    """Notes operations that need an answer from the device, and copies between devices for which the host waits."""

    def __init__(self, places: list[str]) -> None:
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options, name = kwargs or {}, func.name().partition(".")[0]
        tensors = [value for value in args if isinstance(value, Tensor)]
        if name in _ANSWERS and not _is_fake_host(tensors):
            self.places.append(_place())
            if any(isinstance(value, torch._subclasses.FakeTensor) for value in tensors):
                return _ANSWERS[name]
        if name in _SIZES:
            self.places.append(_place())
        result = func(*args, **options)
        if name in ("aten::_to_copy", "aten::copy_") and not options.get("non_blocking"):
            devices = {value.device.type for value in (*tensors, result)}
            if len(devices) > 1:
                self.places.append(_place())
        return result


def _is_fake_host(tensors: list[Tensor]) -> bool:
    """Tell whether tensors are on the host beside an imitated device: to read these takes no wait."""
    return all(isinstance(value, torch._subclasses.FakeTensor) and value.device.type == "cpu" for value in tensors)


def _place() -> str:
    """Return the line that waits: the innermost one, but for the internals of torch other than its optimizers."""
    frames = [frame for frame in traceback.extract_stack()[:-1] if frame.filename != __file__]
    own = [frame for frame in frames if not _is_internal(Path(frame.filename))]
    path, frame = Path(own[-1].filename), own[-1]
    shown = path.relative_to(ROOT) if path.is_relative_to(PACKAGE) else Path(*path.parts[-3:])
    return f"{shown}:{frame.lineno} {frame.line}"


def _is_internal(path: Path) -> bool:
    """Tell whether a file is of torch itself: by its folder, since an environment may be called torch too."""
    return path.is_relative_to(TORCH) and not path.is_relative_to(TORCH / "optim")
