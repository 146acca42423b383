"""Batches of three inputs in uneven parts for several ranks, a DataModule for them, and a network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from helpers.lit import LitNet
from helpers.raw import PARTS, Collectives, raw_images
from lightning_revbn import InputNorm, OnlineInputNormMixin

SETTINGS = {
    "image": InputNorm(3, key=[("image", 0), ("image", 1)]),
    "radar": InputNorm(2, mode="ema", momentum=0.3),
    "range": InputNorm(1, mode="running"),
}


def sensor_data(count: int = 40) -> dict[str, Any]:
    """Return two uint8 views, a float64 signal far from 0, and a column of int16."""
    noise = torch.randn(count, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return {
        "image": (raw_images(count)[0], raw_images(count, seed=1)[0] // 2),
        "radar": 1e6 + noise,
        "range": torch.arange(count).short().view(-1, 1) * 31,
    }


def cut(data: dict[str, Any], rows: Any) -> dict[str, Any]:
    return {**{name: data[name][rows] for name in ("radar", "range")}, "image": [view[rows] for view in data["image"]]}


class Sensors(OnlineInputNormMixin, L.LightningDataModule):
    """Collects statistics from a loader in `setup`, then trains on uneven parts; counts its collectives per step."""

    def __init__(self, ranks: int) -> None:
        super().__init__(input_norm=SETTINGS)
        self.ranks = ranks
        self.collected: dict[str, Any] = {}
        self.collectives: list[int] = []
        self.is_collecting = False

    def setup(self, stage: str) -> None:
        self.is_collecting = True
        self.collect_input_statistics()
        self.is_collecting = False
        self.collected = self.state_dict()["input_norm"]
        self.reset_input_statistics()

    def train_dataloader(self) -> Any:
        if not self.is_collecting:
            return Uneven(self.ranks)
        data = sensor_data()
        samples = [cut(data, row) for row in range(40)]
        return DataLoader(samples, batch_size=6, shuffle=True)  # type: ignore[arg-type]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        with Collectives() as counted:
            batch = super().on_after_batch_transfer(batch, dataloader_idx)
        if not self.is_collecting:
            self.collectives.append(counted.count)
        return batch


class Uneven:
    """A rank's parts of five global batches of 8."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rank = torch.distributed.get_rank() if self.ranks > 1 else 0
        data, first = sensor_data(), 0
        for sizes in PARTS[self.ranks]:
            start = first + sum(sizes[:rank])
            yield cut(data, slice(start, start + sizes[rank]))
            first += sum(sizes)


class SensorsNet(LitNet):
    """Keeps every batch that it receives; its gradients do not depend on the batch."""

    def __init__(self) -> None:
        super().__init__(model=torch.nn.Linear(1, 1))
        self.seen: list[dict[str, Any]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch)
        return self.model(torch.ones(1, 1)).sum()
