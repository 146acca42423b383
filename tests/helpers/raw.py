"""Raw images, a DataModule that passes them on unchanged to the mixin, and a network for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from helpers.lit import LitNet
from lightning_revbn import InputNorm, OnlineInputNormMixin


def raw_images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return uint8 images whose channels have different means and spreads, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (count,), generator=generator)
    values = torch.randn(count, 3, 6, 6, generator=generator) * torch.tensor([20.0, 40.0, 60.0]).view(3, 1, 1)
    values += torch.tensor([90.0, 120.0, 150.0]).view(3, 1, 1) + 4 * labels.view(-1, 1, 1, 1)
    return values.clamp(0, 255).byte(), labels


IMAGES = raw_images(40)[0]


def same_states(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Tell whether two states of input statistics are equal to the bit."""
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) if isinstance(value, Tensor) else value == second[name]
        for name, value in first.items()
    )


class RawData(OnlineInputNormMixin, L.LightningDataModule):
    """Batches of raw images, in order."""

    def __init__(
        self, settings: InputNorm | None = None, images: Any = None, batch_size: int = 8, **options: Any
    ) -> None:
        super().__init__(input_norm=settings or InputNorm(num_features=3))
        self.images = raw_images(48) if images is None else images
        self.options = {"batch_size": batch_size, **options}

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*self.images), **self.options)

    def val_dataloader(self) -> Any:
        return self.train_dataloader()

    test_dataloader = predict_dataloader = val_dataloader


class SeeingNet(LitNet):
    """Keeps every input that it receives."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: dict[str, list[Tensor]] = {"train": [], "eval": []}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen["train"].append(batch[0])
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["eval"].append(batch[0])
        self.model(batch[0])

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.validation_step(batch, batch_idx)
        return self.model(batch[0])


PARTS = {
    1: [(8,), (8,), (8,), (8,), (8,)],
    2: [(5, 3), (8, 0), (1, 7), (0, 8), (4, 4)],
    3: [(3, 4, 1), (0, 8, 0), (2, 0, 6), (4, 2, 2), (1, 1, 6)],
}
"""By number of ranks, the samples of each rank in the same five global batches; some ranks get no samples."""


class Parts:
    """A rank's parts of the global batches, some of them uneven or empty."""

    def __init__(self, images: tuple[Tensor, Tensor], ranks: int) -> None:
        self._images = images
        self._ranks = ranks

    def __len__(self) -> int:
        return len(PARTS[self._ranks])

    def __iter__(self) -> Iterator[list[Tensor]]:
        rank = torch.distributed.get_rank() if self._ranks > 1 else 0
        first = 0
        for sizes in PARTS[self._ranks]:
            start = first + sum(sizes[:rank])
            yield [part[start : start + sizes[rank]] for part in self._images]
            first += sum(sizes)


class UnevenData(RawData):
    """Raw data in uneven parts; counts the hook's collectives by the stage of the call."""

    def __init__(self, ranks: int, settings: InputNorm | None = None, images: Any = None) -> None:
        super().__init__(settings, images)
        self.ranks = ranks
        self.collectives: dict[str, list[int]] = {}

    def train_dataloader(self) -> Any:
        return Parts(self.images, self.ranks)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        stage = str(self.trainer.state.stage.value)
        # Only a loop's batches come in this hook; example inputs come outside of it.
        if self.trainer.lightning_module._current_fx_name != "batch_to_device":
            stage = "example"
        with Collectives() as counted:
            batch = super().on_after_batch_transfer(batch, dataloader_idx)
        self.collectives.setdefault(stage, []).append(counted.count)
        return batch

    def predict_dataloader(self) -> Any:
        rank = torch.distributed.get_rank() if self.ranks > 1 else 0
        return DataLoader(TensorDataset(*self.images), batch_size=8, sampler=range(40 - 8 * rank))


class Collectives(TorchDispatchMode):
    """Counts the collectives called while it is active."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace in ("c10d", "_c10d_functional")
        return func(*args, **(kwargs or {}))


class UnevenNet(SeeingNet):
    """A network without batch norm whose gradients do not depend on the division of a global batch of 8."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)]
        super().__init__(model=nn.Sequential(*layers))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen["train"].append(batch[0])
        return cross_entropy(self.model(batch[0]), batch[1], reduction="sum") * self.trainer.world_size / 8

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)
