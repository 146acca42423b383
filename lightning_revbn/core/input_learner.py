"""Learns the statistics of an input: measures training batches, checks them, and freezes or loads the statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from lightning_revbn.core.estimators import Estimate, estimator_of
from lightning_revbn.core.global_moments import GlobalBatch, RankBatch, count_samples, measure
from lightning_revbn.core.input_checks import InputPart, check_input, refuse_faults
from lightning_revbn.core.input_freeze import InputFreeze
from lightning_revbn.core.input_masks import InputMasks, chosen_channels
from lightning_revbn.core.input_settings import InputNorm
from lightning_revbn.core.input_state import SavedInput, read_state
from lightning_revbn.core.input_statistics import InputStatistics, LearnedStatistics, MissingStatisticsError
from lightning_revbn.core.input_step import fits_one_graph, learn_and_standardize
from lightning_revbn.core.input_transform import InputTransform
from lightning_revbn.core.moments import Kind, Moments

__all__ = ["InputLearner"]


class InputLearner:
    """Learns the statistics of an input, and estimates the mean and variance that its mode normalises by.

    A training batch passes `measure` on each rank, then `judge` and `add` with the moments over all ranks. The steps
    are apart so that several inputs can share a collective.

    Args:
        settings: The settings.
        ignores_infinity: Whether infinity is left out of the statistics rather than an error: for the sanity check,
            whose batches of evaluation may hold it.

    Attributes:
        learned: The statistics of all training batches.
        saved: The state that was loaded last; None before.
        freeze: True if training batches no longer change the statistics.
    """

    def __init__(self, settings: InputNorm, *, ignores_infinity: bool = False) -> None:
        self._settings = settings
        self._ignores_infinity = ignores_infinity
        self._estimator = estimator_of(settings)
        self._faults: Tensor = torch.zeros(3, dtype=torch.float64)
        self.learned = LearnedStatistics.of_nothing(settings.num_features)
        self.saved: SavedInput | None = None
        self.freeze = InputFreeze(learns=self.learns, limit=settings.freeze_after)

    @property
    def learns(self) -> bool:
        """Whether training batches add to the statistics, as they do in every mode but `"fixed"`."""
        return self._estimator.learns

    def measure(self, parts: Sequence[InputPart], device: torch.device | None = None) -> RankBatch:
        """Measure this rank's part of a training batch.

        Args:
            parts: Raw values and masks for each place of the input in the batch; there may be no place.
            device: The device of the result if there are no parts; None is the device of the statistics.

        Returns:
            The moments or sums of this rank, for `share`.

        Raises:
            InputError: If a part has other channels than the settings, or a mask that does not fit.
        """
        settings, kind = self._settings, self.learned.kind
        for part in parts:
            check_input(*part, settings.channel_dim, settings.num_features)
        if not parts:
            return RankBatch.of_nothing(kind, settings.num_features, device or self.learned.samples.device)
        return reduce(RankBatch.join, map(self._measure, parts))

    def judge(self, batch: GlobalBatch, parts: Sequence[InputPart]) -> None:
        """Raise if a training batch has a fault, before `add`.

        On accelerators this raises for the first batch only; faults of later batches wait for `check`, since reading
        them makes the host wait for the device.

        Args:
            batch: The batch of all ranks.
            parts: This rank's parts of it, to name the sample and channel of the fault.

        Raises:
            InputError: On all ranks, if the batch of any rank has a fault (see `GlobalBatch.faults`).
        """
        self.move_to(batch.samples.device)
        self._faults = self._faults + batch.faults
        if self._is_checked(batch):
            self.check(parts)

    def add(self, batch: GlobalBatch) -> None:
        """Add a training batch of all ranks to the statistics, after `judge`.

        Args:
            batch: The batch of all ranks. On accelerators it may have faults that nobody has read: then the statistics
                stay as they are.
        """
        if batch.kind is Kind.UNKNOWN:  # the batch is empty on every rank
            return
        learned = self.learned.add(batch, self._estimator.momentum)
        if not _answers_at_once(batch.samples.device):
            # The device chooses, so that the host does not wait for the faults.
            learned = learned.where(batch.faults.sum() == 0, replace(self.learned, kind=batch.kind))
        self.learned = learned
        self.freeze.count(learned.samples, batch.size)

    def learn_and_standardize(
        self, part: InputPart, scale: float, dtype: torch.dtype
    ) -> tuple[Tensor, InputTransform] | None:
        """Do `measure`, `judge` and `add` in a single compiled graph, for the only part of the only rank.

        Args:
            part: Raw values and mask.
            scale: The number that standardised values are multiplied by.
            dtype: The dtype of the result.

        Returns:
            The standardised values and their transform; None, and nothing is learned, where a single graph cannot do
            it (see `fits_one_graph`).

        Raises:
            InputError: If the part has other channels than the settings.
        """
        values, mask = part
        if self.freeze or not fits_one_graph(values, mask, self._settings, self.learned.kind):
            return None
        check_input(values, mask, self._settings.channel_dim, self._settings.num_features)
        self.move_to(values.device)
        result, self.learned, transform = learn_and_standardize(
            values, self.learned, self._settings, self._estimator, scale, dtype
        )
        self.freeze.count(self.learned.samples, count_samples(values, self._settings.channel_dim))
        return result, transform

    def check(self, parts: Sequence[InputPart] = ()) -> None:
        """Raise if a training batch since the last check had a fault; on accelerators this waits for the device.

        Args:
            parts: This rank's parts of the batch, to name the sample and channel of the fault.

        Raises:
            InputError: If the batch of any rank has a fault (see `GlobalBatch.faults`).
        """
        self._refuse(self._faults.cpu(), parts)

    def estimate(self, batch: Moments | None = None) -> Estimate:
        """Return the mean and variance to normalise a batch by.

        Args:
            batch: The moments of the training batch that was added last; None for batches of evaluation.

        Returns:
            The estimate, in units of the input range.

        Raises:
            MissingStatisticsError: Before the first statistics.
        """
        estimate = self._estimator.estimate(self.learned, self._settings.unit(self.learned.kind), batch)
        if estimate is None:
            lack = None if self.saved is None else self.saved.lacks(self._settings.mode)
            loaded = f". Some were loaded, but {lack}" if lack else ""
            raise MissingStatisticsError(f"input statistics are missing: train first, or load them{loaded}")
        return estimate

    def statistics(self, *, checked: bool = False) -> InputStatistics:
        """Return the mean and standard deviation of all training data, or the constants of mode `"fixed"`, on the CPU.

        Args:
            checked: Whether to `check` too, with the same copy from an accelerator.

        Returns:
            The statistics.

        Raises:
            InputError: If `checked`, and a training batch since the last check had a fault.
            MissingStatisticsError: Before the first statistics.
        """
        estimate = self.estimate()
        if self.learns:
            total, faults = self.learned.total.scaled(self._settings.unit(self.learned.kind)), len(self._faults)
            # A single tensor, since from an accelerator each copy makes the host wait.
            copied = torch.cat([self._faults, total.mean, total.std, total.count]).cpu()
            if checked:
                self._refuse(copied[:faults])
            mean, std, count = copied[faults:].reshape(3, -1)
        else:
            mean, std, count = estimate.mean, estimate.variance.sqrt(), torch.zeros_like(estimate.mean)
        chosen = chosen_channels(self._settings)
        if chosen is not None:
            mean, std = torch.where(chosen, mean, 0.0), torch.where(chosen, std, 1.0)
        return InputStatistics(mean, std, count)

    def load(self, state: object) -> SavedInput:
        """Load a saved state, in this mode or another.

        Args:
            state: The result of `write_state`.

        Returns:
            The state, checked and converted to the raw units of these settings.

        Raises:
            ValueError: If the state is damaged or of an input with other channels; the statistics stay as they are.
        """
        saved = read_state(state, self._settings)
        self.saved, self.freeze.is_held = saved, saved.is_held and self.learns
        self._faults = torch.zeros(3, dtype=torch.float64)
        self.learned = self._estimator.adopt(saved.learned, saved.mode)
        self.freeze.count(self.learned.samples)
        return saved

    def hold(self, *, is_held: bool) -> None:
        """Keep the statistics as they are, or let training batches add to them again.

        Args:
            is_held: Whether to keep them.

        Raises:
            MissingStatisticsError: If they are to be kept before the first statistics.
            RuntimeError: If batches are to add to them again, but `freeze_after` keeps them frozen.
        """
        if is_held:
            self.estimate()
        self.freeze.hold(is_held=is_held)

    def move_to(self, device: torch.device) -> None:
        """Move the statistics to a device, where they stay; an mps device has no float64, their dtype."""
        if device.type != "mps":
            self.learned, self._faults = self.learned.to(device), self._faults.to(device)

    def _measure(self, part: InputPart) -> RankBatch:
        """Measure this rank's values at a place of a training batch."""
        settings = self._settings
        values, mask = self._finite(part)
        return measure(
            values.detach(),
            settings.channel_dim,
            self.learned.kind,
            mask,
            settings.nan_policy == "ignore",
            settings.compile,
            chosen_channels(settings, values.device),
            settings.nodata_values,
        )

    def _refuse(self, faults: Tensor, parts: Sequence[InputPart] = ()) -> None:
        """Raise if any fault was counted, given a copy of the counts on the CPU, and count from 0 again."""
        counts = [int(count) for count in faults]
        self._faults = torch.zeros_like(self._faults)
        if any(counts):  # the host may have counted the samples of the batch, which the device has left out
            self.freeze.count(self.learned.samples)
            parts = self._counted(parts)
        refuse_faults(counts, self.learned.kind, parts, ignore_nan=self._settings.nan_policy == "ignore")

    def _counted(self, parts: Sequence[InputPart]) -> list[InputPart]:
        """Return parts whose masks are True at the values that the statistics count."""
        left = map(self._finite, parts)
        return [InputPart(values, InputMasks.of(values, mask, self._settings).counted) for values, mask in left]

    def _finite(self, part: InputPart) -> InputPart:
        """Return a part whose mask leaves infinity out, if this learner ignores infinity."""
        values, mask = part
        if not self._ignores_infinity or not values.is_floating_point():
            return part
        return InputPart(values, values.isfinite() if mask is None else values.isfinite() & mask)

    def _is_checked(self, batch: GlobalBatch) -> bool:
        """Tell whether to read the faults of a batch now."""
        # Faults of the first batch are read on every device: `share` has waited for the batch to learn its kind anyway.
        return _answers_at_once(batch.samples.device) or self.learned.kind is Kind.UNKNOWN


def _answers_at_once(device: torch.device) -> bool:
    """Tell whether the host reads numbers of a device without waiting."""
    return device.type == "cpu"
