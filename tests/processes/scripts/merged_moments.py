"""Run by test_input_norm_processes.py: every rank learns its parts of batches, and one process the joined batches."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from helpers.ranks import end_rank, join_process_group
from helpers.raw import Collectives
from torch import Tensor

from lightning_revbn import InputNorm
from lightning_revbn.core.input_norm import OnlineStandardizer

STEPS, SIZE = 6, 24


def noise(step: int) -> Tensor:
    return torch.randn(SIZE, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def some(step: int, share: float) -> Tensor:
    return torch.rand(SIZE, 3, generator=torch.Generator().manual_seed(100 + step)) < share


def blank_first(step: int) -> Tensor:
    return torch.zeros(SIZE, 3).double() if step == 0 else 1e8 + noise(step)


KINDS: dict[str, Any] = {  # values, and a mask or None, of a step
    "far": lambda step: (1e8 + noise(step), None),
    "blank first batch": lambda step: (blank_first(step), None),
    "masked": lambda step: (1e6 + noise(step), some(step, 0.0 if step == 0 else 0.7)),
    "NaN left out": lambda step: (noise(step).add(1e6).masked_fill(some(step, 0.2), torch.nan), None),
    "trend": lambda step: (10.0 ** (2 * step) + noise(step), None),
    "uneven": lambda step: (noise(step) * 3 + 7, None),
    "uint8": lambda step: ((noise(step) * 40 + 120).clamp(0, 255).byte(), None),
    "int16": lambda step: ((noise(step) * 4000).short(), some(step, 0.7)),
    "int32": lambda step: ((noise(step) * 20 + 1.7e9).int(), None),
}


def sizes(kind: str, step: int, ranks: int) -> list[int]:
    if kind != "uneven":
        return [SIZE // ranks] * ranks
    return [0] * (ranks - 1) + [SIZE] if step % 3 == 0 else [SIZE - 3 * (ranks - 1)] + [3] * (ranks - 1)


def worker(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    join_process_group(rank, ranks, folder)
    results = {(kind, mode): learn(kind, mode, rank, ranks) for kind in KINDS for mode in ("batch", "ema")}
    torch.save(results, folder / f"rank{rank}.pt")
    end_rank()


def learn(kind: str, mode: Any, rank: int, ranks: int) -> dict[str, Any]:
    settings = InputNorm(3, mode=mode, momentum=0.3, nan_policy="ignore")
    shared, alone = OnlineStandardizer(settings), OnlineStandardizer(settings)
    collectives: list[int] = []
    worst = 0.0
    for step in range(STEPS):
        values, mask = KINDS[kind](step)
        parts = sizes(kind, step, ranks)
        own = slice(sum(parts[:rank]), sum(parts[: rank + 1]))
        with Collectives() as counted:  # it finds the process group by itself
            result = shared.train(values[own], None if mask is None else mask[own], dtype=torch.float64)
        collectives.append(counted.count)
        expected = alone.train(values, mask, dtype=torch.float64, ranks=1)[own]
        worst = max(worst, (result - expected).abs().nan_to_num().max().item() if len(result) else 0.0)
    return {"shared": shared.state_dict(), "alone": alone.state_dict(), "collectives": collectives, "worst": worst}


if __name__ == "__main__":
    torch.multiprocessing.spawn(worker, (int(sys.argv[1]), Path(sys.argv[2])), nprocs=int(sys.argv[1]))
