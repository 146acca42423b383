from __future__ import annotations

import pytest
import torch

# A script for the environment of `make test-deepspeed`; doctests are collected by importing.
collect_ignore = ["processes/scripts/deepspeed_ranks.py"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """The nets are tiny: more threads only get in each other's way."""
    torch.set_num_threads(1)
