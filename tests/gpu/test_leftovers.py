"""No test with a device leaves anything to the next one: a Trainer with `ddp` leaves a process group and its port."""

from __future__ import annotations

import os

import torch
import torch.distributed
from helpers.leftovers import taken_back
from torch.testing._internal.distributed.fake_pg import FakeStore


def test_process_group_variables_and_deterministic_algorithms_are_taken_back() -> None:
    before = dict(os.environ)
    with taken_back():
        torch.distributed.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
        torch.use_deterministic_algorithms(True)
        os.environ |= {"MASTER_PORT": "29500", "LOCAL_RANK": "0"}
        del os.environ["CUBLAS_WORKSPACE_CONFIG"]
    assert not torch.distributed.is_initialized()
    assert not torch.are_deterministic_algorithms_enabled()
    assert dict(os.environ) == before


def test_products_of_matrices_can_be_deterministic_from_the_first_one_on() -> None:
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")
