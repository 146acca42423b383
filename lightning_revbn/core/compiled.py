"""Compiles each function at most once per process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["compile_once"]

_Function = TypeVar("_Function", bound=Callable[..., object])


def compile_once(function: _Function) -> _Function:
    """Return `torch.compile(function)`, the same for the whole process, so that nothing is compiled twice.

    Args:
        function: A function of a module.

    Returns:
        The compiled function. Its first call compiles it; on CPUs this needs a C++ compiler.
    """
    if function not in _COMPILED:
        _COMPILED[function] = torch.compile(function)
    return _COMPILED[function]


_COMPILED: dict[Callable[..., object], Any] = {}
