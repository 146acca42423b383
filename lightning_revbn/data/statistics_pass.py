"""A pass over the training loader before training, in which the inputs learn their statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.core.hooks import DataHooks
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_revbn.core.global_moments import gather
from lightning_revbn.core.input_norm import OnlineStandardizer
from lightning_revbn.core.joint_training import InputParts, learn_together, naming
from lightning_revbn.data.data_parallel import data_parallel_group
from lightning_revbn.data.input_set import InputSet
from lightning_revbn.data.loader_shares import loader_share
from lightning_revbn.lightning_compat import MisconfigurationException, rank_zero_info, rank_zero_only, twins

__all__ = ["StatisticsPass"]


class StatisticsPass:
    """A pass of all ranks. Batches go through the hooks of the DataModule, which calls `take` with their inputs.

    Args:
        data: The DataModule.
        inputs: Its inputs; the pass does not change them, but learns in new standardisers.
        limit: Most batches that all ranks read together; None reads all.

    Raises:
        MisconfigurationException: If all inputs have constants, or an input is frozen.
    """

    def __init__(self, data: LightningDataModule, inputs: InputSet, limit: int | None) -> None:
        name = type(data).__name__
        if not any(one.online.learns for one in inputs.inputs):
            raise MisconfigurationException(f'{name}: mode="fixed" has constants, and there is nothing to collect')
        held = [one.label for one in inputs.inputs if one.online.learner.freeze.is_held]
        if held:
            raise MisconfigurationException(
                f"{name}: the statistics of the {', '.join(held)} are frozen. Call unfreeze_input_statistics() or "
                "reset_input_statistics() before they are collected again"
            )
        self._data, self._inputs, self._limit, self._name = data, inputs, limit, name
        trainer = data.trainer
        is_joined = torch.distributed.is_available() and torch.distributed.is_initialized()
        # Before a strategy has joined its processes, each process that runs the script reads the whole loader, in the
        # same order, and all get the same statistics.
        self._group, self._ranks = data_parallel_group(trainer) if is_joined else (None, 1)
        self._rank = torch.distributed.get_rank(self._group) if self._ranks > 1 else 0
        self._device = torch.device("cpu") if trainer is None else trainer.strategy.root_device
        self._fresh = [one.fresh() for one in inputs.inputs]

    def run(self) -> list[OnlineStandardizer]:
        """Read the training loader once.

        Returns:
            A standardiser for each input, with the statistics of this pass alone.

        Raises:
            MisconfigurationException: If the loader has no batch, or its batches have no value of an input that counts.
            InputError: If a batch cannot be measured.
        """
        steps = 0
        # Shuffling and augmentation draw random numbers, which must not change the numbers of the training after them.
        with isolate_rng(), torch.no_grad():
            loaders = loader_share(self._data.train_dataloader(), self._rank, self._ranks)
            batches = iter(loaders)
            own = None if self._limit is None else len(range(self._rank, self._limit, self._ranks))
            bar: Any = Tqdm(
                desc="Collecting input statistics", total=_length(loaders, own), disable=not self._shows_progress
            )
            with bar:
                remaining: Iterator[Any] = islice(batches, own)
                while True:
                    item = next(remaining, None)
                    if not self._goes_on(item is not None):
                        break
                    if item is None:
                        self.take([InputParts(one.name, one.online, ()) for one in self._inputs.inputs])
                    else:
                        self._send(item[0])
                    steps += 1
                    bar.update()
        for one, online in zip(self._inputs.inputs, self._fresh, strict=True):
            with naming(one.name):
                online.check()
        if not steps or not any(online.learns and online.has_statistics for online in self._fresh):
            raise MisconfigurationException(f"{self._name}: train_dataloader() has no batch to collect statistics from")
        empty = [
            one.label
            for one, online in zip(self._inputs.inputs, self._fresh, strict=True)
            if online.learns and not bool(online.learner.learned.total.count.any())
        ]
        if empty:
            raise MisconfigurationException(
                f"{self._name}: the batches of train_dataloader() have no value of the {', '.join(empty)} to collect "
                "statistics from: all are masked, NaN or no data"
            )
        samples = max(online.samples for online in self._fresh if online.learns)
        rank_zero_info(f"{self._name}: input statistics of {samples} samples are collected")
        return self._fresh

    def take(self, inputs: Sequence[InputParts]) -> None:
        """Learn from a batch, together with all ranks.

        Args:
            inputs: This rank's parts of each input.
        """
        fresh = [replace(own, online=online) for own, online in zip(inputs, self._fresh, strict=True)]
        learn_together(fresh, self._group, self._ranks, self._device)

    @property
    def _shows_progress(self) -> bool:
        trainer = self._data.trainer
        # rank_zero_only knows the rank from the environment, also before the processes have joined.
        is_first = getattr(rank_zero_only, "rank", 0) == 0
        return is_first and (trainer is None or trainer.progress_bar_callback is not None)

    def _send(self, batch: Any) -> None:
        """Send a batch through the hooks of training."""
        batch = self._hook("on_before_batch_transfer")(batch, 0)
        batch = self._hook("transfer_batch_to_device")(batch, self._device, 0)
        self._data.on_after_batch_transfer(batch, 0)

    def _hook(self, name: str) -> Any:
        """Return a hook as Lightning chooses it: the DataModule's, unless only the LightningModule overrides it."""
        module = None if self._data.trainer is None else self._data.trainer.lightning_module
        usual = [getattr(kind, name) for kind in twins(DataHooks)]
        of_data, of_module = (getattr(type(owner), name, usual[0]) for owner in (self._data, module))
        is_of_module = of_data in usual and of_module not in usual
        return getattr(module if is_of_module else self._data, name)

    def _goes_on(self, has_batch: bool) -> bool:
        """Tell whether any rank has a batch left, since all ranks must take part in every collective."""
        if self._ranks == 1:
            return has_batch
        flag = torch.tensor([has_batch], dtype=torch.float64, device=self._device)
        return bool(gather(flag, self._group, self._ranks).any())


def _length(loaders: Any, limit: int | None) -> int | None:
    """Return the number of batches for the progress bar; None if the loaders do not know it."""
    with contextlib.suppress(TypeError, NotImplementedError, RuntimeError):
        return len(loaders) if limit is None else min(limit, len(loaders))
    return limit
