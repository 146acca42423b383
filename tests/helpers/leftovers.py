"""Takes back what a Trainer leaves in its process: a process group, environment variables, deterministic algorithms."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed


@contextlib.contextmanager
def taken_back() -> Iterator[None]:
    """Leave the process as it was before, so that a later Trainer, here or in a process of its own, begins anew.

    After `ddp`, Lightning keeps the process group and its port, which the variables hand on to every process that is
    started later: FSDP2 in such a process would listen on the same port.
    """
    variables, deterministic = dict(os.environ), torch.are_deterministic_algorithms_enabled()
    had_group = torch.distributed.is_initialized()
    try:
        yield
    finally:
        if torch.distributed.is_initialized() and not had_group:
            torch.distributed.destroy_process_group()
        torch.use_deterministic_algorithms(deterministic)
        for name in os.environ.keys() - variables.keys():
            del os.environ[name]
        os.environ.update(variables)
