"""How the processes of tests begin to communicate, and end it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch.distributed


def join_process_group(rank: int, ranks: int, folder: Path) -> None:
    """Begin, in a process that no Trainer started; an empty directory is where they meet."""
    store = torch.distributed.FileStore(str(folder / "store"), ranks)
    store.set_timeout(torch.distributed.constants.default_pg_timeout)  # its own would be too short on a busy machine
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)


def end_rank() -> None:
    """End this process, if it is one of several ranks, once all of them are here: the last line of what ranks run.

    Neither the process group nor the interpreter is taken down before. Threads of gloo may take the lock of the
    interpreter then: processes were aborted now and then with torch 2.14, and hung with torch 2.5, all work done.
    """
    if not torch.distributed.is_initialized():
        return
    store = torch.distributed.distributed_c10d._get_default_store()
    rank, ranks = torch.distributed.get_rank(), range(torch.distributed.get_world_size())
    store.set(f"done {rank}", "")
    store.wait([f"done {other}" for other in ranks])
    store.set(f"left {rank}", "")
    if rank == 0:  # which holds the store, and so goes last
        store.wait([f"left {other}" for other in ranks])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
