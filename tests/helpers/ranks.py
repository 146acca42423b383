"""Starts and ends the communication between processes of tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch.distributed


def join_process_group(rank: int, ranks: int, folder: Path) -> None:
    """Join a process group in a process that no Trainer started; the ranks meet in an empty directory."""
    store = torch.distributed.FileStore(str(folder / "store"), ranks)
    store.set_timeout(torch.distributed.constants.default_pg_timeout)  # a store's own is too short on a busy machine
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)


def end_rank() -> None:
    """End this process when all ranks have called this function; the last line of a rank's code.

    The process ends without shutting down the process group or the interpreter. During a shutdown, gloo's threads may
    take the interpreter's lock: after all work, some processes aborted with torch 2.14, and hung with torch 2.5. A
    process outside a process group goes on.
    """
    if not torch.distributed.is_initialized():
        return
    store = torch.distributed.distributed_c10d._get_default_store()
    rank, ranks = torch.distributed.get_rank(), range(torch.distributed.get_world_size())
    store.set(f"done {rank}", "")
    store.wait([f"done {other}" for other in ranks])
    store.set(f"left {rank}", "")
    if rank == 0:  # rank 0 holds the store, so it ends last
        store.wait([f"left {other}" for other in ranks])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
