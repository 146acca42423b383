"""Divides a training loader among ranks for a pass before training, so that together they read it once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

__all__ = ["loader_share"]

_SEED = 0
"""All ranks shuffle with this seed, so that their shares do not overlap."""


def loader_share(loaders: Any, rank: int, ranks: int) -> CombinedLoader:
    """Return this rank's share of the training loaders.

    Ranks take turns with the batches of a `DataLoader` with torch's own random or sequential sampler: rank r reads the
    batches r, r + ranks, and so on, in an order that all ranks compute from the same seed. Every other loader is read
    as it is, as Lightning leaves it: a sampler of the user may divide the samples itself. Neither order takes random
    numbers from the training that follows.

    Args:
        loaders: A loader, or lists and dicts of loaders, as `train_dataloader` returns them.
        rank: The index of this rank.
        ranks: Number of ranks.

    Returns:
        The share, combined as Lightning combines loaders in training.
    """
    combined = copy.copy(loaders) if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "max_size_cycle")
    combined.flattened = [_one_share(loader, rank, ranks) for loader in combined.flattened]
    return combined


class _EveryNth:
    """Every n-th batch of indices of a batch sampler, beginning with batch `first`."""

    def __init__(self, batches: BatchSampler, first: int, step: int) -> None:
        self._batches, self._first, self._step = batches, first, step

    def __iter__(self) -> Iterator[list[int]]:
        return islice(iter(self._batches), self._first, None, self._step)

    def __len__(self) -> int:
        return len(range(self._first, len(self._batches), self._step))


def _one_share(loader: Any, rank: int, ranks: int) -> Any:
    if not _is_torch_loader(loader):
        return loader
    share: Any = copy.copy(loader)
    # A DataLoader refuses new samplers by attribute, so the attributes of a copy are written past it. The copy has its
    # own generator and workers, and shares only the data with the user's loader.
    own: dict[str, Any] = share.__dict__
    own.update(generator=torch.Generator().manual_seed(_SEED), persistent_workers=False, _iterator=None)
    batches, sampler = loader.batch_sampler, loader.sampler
    if type(batches) is not BatchSampler or type(sampler) not in (RandomSampler, SequentialSampler):
        return share
    if type(sampler) is RandomSampler:
        generator = torch.Generator().manual_seed(_SEED)
        sampler = RandomSampler(sampler.data_source, sampler.replacement, sampler.num_samples, generator)
    own["batch_sampler"] = _EveryNth(BatchSampler(sampler, batches.batch_size, batches.drop_last), rank, ranks)
    return share


def _is_torch_loader(loader: Any) -> bool:
    return isinstance(loader, DataLoader)
