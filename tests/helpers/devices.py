"""The devices of tests whose bodies are the same on a CPU and on a GPU, and a step that is captured on either."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", GPU]
ACCELERATOR = {"cpu": "cpu", "cuda": "gpu"}
"""What a Trainer calls a device."""
WARM = 3


class Captured(NamedTuple):
    """A captured step.

    Attributes:
        replay: Runs its kernels again, and no Python.
        steps: How often the step has run until now.
    """

    replay: Callable[[], None]
    steps: int


def captured(step: Callable[[], object], device: str) -> Captured:
    """Run a step a few times, then capture it: in a CUDA graph, or in a record of its kernels on a CPU.

    Args:
        step: Works on tensors that stay where they are.
        device: The device of these tensors.

    Returns:
        The captured step. A CUDA graph does not run while it is captured; a record does.
    """
    if device != "cuda":
        for _ in range(WARM):
            step()
        with _Record() as record:
            step()
        return Captured(record.replay, WARM + 1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    gc.collect()  # or the garbage of earlier tests may be collected, and memory freed, amid the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return Captured(graph.replay, WARM)


class _Record(TorchDispatchMode):
    """What a CUDA graph is to a GPU: the kernels of a step with the memory that they read and write.

    A number that Python has read out of a tensor is a constant in it, as in a graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, result in self.calls:
                again = func(*args, **kwargs)
                for memory, value in zip(_tensors(result), _tensors(again), strict=True):
                    if memory.data_ptr() != value.data_ptr():  # a new tensor, and no view of what is recorded
                        memory.copy_(value)


def _tensors(result: Any) -> list[Tensor]:
    values = result if isinstance(result, (tuple, list)) else [result]
    return [value for value in values if isinstance(value, Tensor)]


def assert_close_parameters(first: nn.Module, second: nn.Module, device: str) -> None:
    """Assert that two models hold the same values: to the bit on a CPU, where all sums have one order."""
    tolerance = {"rtol": 0.0, "atol": 0.0} if device == "cpu" else {"rtol": 1e-5, "atol": 1e-6}
    left, right = first.state_dict(), second.state_dict()
    assert left.keys() == right.keys()
    for key, value in left.items():
        torch.testing.assert_close(value, right[key], msg=lambda text, key=key: f"{key}: {text}", **tolerance)
