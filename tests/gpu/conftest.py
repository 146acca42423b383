"""What every test with a device finds, and that it leaves nothing to the next one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from helpers.leftovers import taken_back

# torch looks once, at the first product of matrices, so that Lightning's `deterministic=True` comes too late to set it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# A GPU rounds what it convolves to 10 bits otherwise, so that the least difference of two ways to train grows.
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    with taken_back():
        yield
