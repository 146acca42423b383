"""The data of the experiments, split as in the paper, and the batches of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torchvision
from digits import Digits, derive_seed
from fashion_mnist import read_split
from sklearn.model_selection import train_test_split
from torch import Tensor

from lightning_revbn import InputNorm, OnlineInputNormMixin

DATA_SETS = ("digits", "mnist1d", "fashion-mnist", "cifar10")
EVALUATED_AT_ONCE = 500  # images per batch: larger batches exceed the caches of a CPU and are slower
MNIST1D_SAMPLES = 8000

Split = tuple[Tensor, Tensor]


@lru_cache(maxsize=1)  # a process trains many runs with the same data
def load(data: str, data_dir: str, train_images: int | None) -> tuple[Split, Split, Split]:
    """Return samples and labels for training, validation and test.

    A tenth of the development samples is for validation, stratified and the same for every seed, as in the paper.

    Args:
        data: One of `DATA_SETS`.
        data_dir: Directory of the data set's files.
        train_images: Samples for training and validation together; None takes all.

    Returns:
        Three pairs of samples `(N, C, *)` and labels `(N,)`.
    """
    if data == "digits":
        digits = Digits()
        digits.setup("fit")
        train, val, test = (tuple(part.tensors) for part in (digits.train_set, digits.val_set, digits.test_set))
        return train, val, test
    if data == "mnist1d":
        (images, labels), test = _mnist1d()
    elif data == "fashion-mnist":
        (images, labels), test = (read_split(Path(data_dir), split) for split in ("train", "t10k"))
    else:
        parts = [torchvision.datasets.CIFAR10(data_dir, train=train) for train in (True, False)]
        (images, labels), test = (
            (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)) for part in parts
        )
    chosen = list(range(len(images)))
    if train_images is not None and train_images < len(images):
        chosen, _ = train_test_split(chosen, train_size=train_images, stratify=labels, random_state=0)
    train, val = train_test_split(chosen, test_size=0.1, stratify=labels[chosen], random_state=derive_seed(0))
    return (images[train], labels[train]), (images[val], labels[val]), test


def _mnist1d() -> tuple[Split, Split]:
    """Generate MNIST-1D (Greydanus and Kobak, arXiv 2011.14439) with its own settings and seed.

    The package's data set has 4,000 signals for training and 1,000 for testing. Here 8,000 signals are split in halves:
    4,000 test signals halve the sampling error of a run's accuracy.
    """
    from mnist1d import data  # imported here, as it imports pyplot

    settings = data.get_dataset_args()
    settings.num_samples, settings.train_split = MNIST1D_SAMPLES, 0.5
    made = data.make_dataset(settings)
    train, test = (
        (torch.tensor(made[f"x{part}"], dtype=torch.float32).unsqueeze(1), torch.tensor(made[f"y{part}"]))
        for part in ("", "_test")
    )
    return train, test


class Batches:
    """Slices of tensors in memory, without collating samples or copying them between processes.

    Args:
        split: Samples and labels.
        batch_size: Samples per batch; the last batch may be smaller.
        order: Generator that shuffles the samples in every pass; None keeps their order.
    """

    def __init__(self, split: Split, batch_size: int, order: torch.Generator | None = None) -> None:
        self.samples, self.labels = split
        self.batch_size, self.order = batch_size, order

    def __len__(self) -> int:
        return math.ceil(len(self.labels) / self.batch_size)

    def __iter__(self) -> Iterator[Split]:
        if self.order is None:
            yield from zip(self.samples.split(self.batch_size), self.labels.split(self.batch_size), strict=True)
            return
        # The order is the same wherever the samples are, and goes to a GPU once a pass.
        order = torch.randperm(len(self.labels), generator=self.order).to(self.labels.device)
        for chosen in order.split(self.batch_size):
            yield self.samples[chosen], self.labels[chosen]


class Data(L.LightningDataModule):
    """Samples in memory, `(N, C, *)`; the validation loaders are the validation data and the test data.

    Args:
        splits: Samples and labels for training, validation and test.
        batch_size: Samples per batch.
        seed: Seed of the order of the training batches.
        flip: Whether half of the training images are mirrored.
    """

    def __init__(self, splits: Sequence[Split], batch_size: int, seed: int, flip: bool = False) -> None:
        super().__init__()
        self.train, *self.evaluated = splits
        self.batch_size = batch_size
        self.flip = flip
        self.order = torch.Generator().manual_seed(seed)

    def train_dataloader(self) -> Batches:
        """Return the training samples, in a new order every epoch."""
        return Batches(self.train, self.batch_size, self.order)

    def val_dataloader(self) -> list[Batches]:
        """Return validation and test samples: both are scored after every epoch."""
        return [Batches(split, EVALUATED_AT_ONCE) for split in self.evaluated]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return a batch as it is if it is on the device, since Lightning's search for its tensors takes time."""
        return (
            batch
            if device.type == batch[0].device.type
            else super().transfer_batch_to_device(batch, device, dataloader_idx)
        )

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Mirror training images."""
        images, labels = batch
        if self.flip and self.trainer.training:
            mirrored = torch.rand(len(images), device=images.device) < 0.5
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
        return images, labels


class OnlineData(OnlineInputNormMixin, Data):
    """The same data, with the paper's input normalisation."""


def to_unit(splits: Sequence[Split]) -> list[Split]:
    """Bring bytes to [0, 1] and leave other samples as they are."""
    return [(samples / 255 if samples.dtype == torch.uint8 else samples, labels) for samples, labels in splits]


def standardize(splits: Sequence[Split]) -> list[Split]:
    """Normalise every channel by the mean and standard deviation of the training data."""
    channels = splits[0][0].double().transpose(0, 1).flatten(1)
    shape = (1, -1, *[1] * (splits[0][0].dim() - 2))
    mean, std = channels.mean(1).view(shape), channels.std(1, correction=0).view(shape)
    return [(((samples.double() - mean) / std).float(), labels) for samples, labels in splits]


def make_data(splits: Sequence[Split], input_norm: str, device: str = "cpu", **options: Any) -> Data:
    """Return the data of a run.

    Args:
        splits: The result of `load`.
        input_norm: As in `Arm`.
        device: The device that holds all samples.
        options: Other arguments of `Data`.

    Returns:
        The data module.
    """
    if input_norm != "batch":
        splits = standardize(to_unit(splits)) if input_norm == "dataset" else to_unit(splits)
    held = [(samples.to(device), labels.to(device)) for samples, labels in splits]
    if input_norm == "batch":
        return OnlineData(held, input_norm=InputNorm(held[0][0].shape[1]), **options)
    return Data(held, **options)
