"""What one input has taught: measured batch by batch, checked, frozen, loaded, and estimated from as the mode says."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_revbn.core.estimators import Estimate, estimator_of
from lightning_revbn.core.global_moments import GlobalBatch, RankBatch, measure
from lightning_revbn.core.input_checks import refuse_faults
from lightning_revbn.core.input_masks import chosen_channels
from lightning_revbn.core.input_settings import InputNorm
from lightning_revbn.core.input_state import SavedInput, read_state
from lightning_revbn.core.input_statistics import InputStatistics, LearnedStatistics, MissingStatisticsError
from lightning_revbn.core.moments import Kind, Moments

__all__ = ["InputLearner"]


class InputLearner:
    """The statistics of one input, and the estimator of its mode.

    Args:
        settings: The settings.

    Attributes:
        learned: The statistics of all training batches.
        saved: What was loaded last.
        is_frozen: Whether training batches change nothing any more.
    """

    def __init__(self, settings: InputNorm) -> None:
        self._settings = settings
        self._estimator = estimator_of(settings)
        self._faults: Tensor = torch.zeros(3, dtype=torch.float64)
        self.learned = LearnedStatistics.of_nothing(settings.num_features)
        self.saved: SavedInput | None = None
        self.is_frozen = not self._estimator.learns

    @property
    def learns(self) -> bool:
        """Whether training batches teach anything, as they do in every mode but `"fixed"`."""
        return self._estimator.learns

    def measure(self, values: Tensor, mask: Tensor | None) -> RankBatch:
        """Measure this rank's part of a training batch.

        Args:
            values: Raw values.
            mask: True where values count.

        Returns:
            What this rank knows, to be shared with other ranks.
        """
        settings = self._settings
        ignore_nan = settings.nan_policy == "ignore"
        return measure(values, settings.channel_dim, self.learned.kind, mask, ignore_nan, settings.compile)

    def add(self, batch: GlobalBatch, values: Tensor, mask: Tensor | None) -> None:
        """Add what all ranks know of a training batch, unless it has faults.

        Args:
            batch: What they know.
            values: This rank's part of the batch, to say more about a fault.
            mask: Its mask.
        """
        self.move_to(batch.samples.device)
        self._faults = self._faults + batch.faults
        # The first batch of all is looked at everywhere: nobody knew its kind, so that nothing went on meanwhile.
        is_checked = _answers_at_once(batch.samples.device) or self.learned.kind is Kind.UNKNOWN
        if is_checked:
            self.check(values, mask)
        if batch.kind is Kind.UNKNOWN:  # no rank has any values
            return
        learned = self.learned.add(batch, self._estimator.momentum)
        if not is_checked:
            learned = learned.where(batch.faults.sum() == 0, replace(self.learned, kind=batch.kind))
        self._take(learned)

    def check(self, values: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Raise if a training batch had a fault since the last check; on accelerators this waits for the batch.

        Args:
            values: This rank's part of the batch, to say more about it.
            mask: Its mask.
        """
        faults = [int(count) for count in self._faults]
        self._faults = torch.zeros_like(self._faults)
        refuse_faults(faults, self.learned.kind, values, mask, ignore_nan=self._settings.nan_policy == "ignore")

    def estimate(self, batch: Moments | None = None) -> Estimate:
        """Return what to normalise by: a training batch that was added, or batches of evaluation.

        Args:
            batch: The moments of the training batch.

        Returns:
            The estimate.

        Raises:
            MissingStatisticsError: If there is nothing to tell it from.
        """
        estimate = self._estimator.estimate(self.learned, self._settings.unit(self.learned.kind), batch)
        if estimate is None:
            lack = None if self.saved is None else self.saved.lacks(self._settings.mode)
            loaded = f". Some were loaded, but {lack}" if lack else ""
            raise MissingStatisticsError(f"there are no input statistics yet: train first, or load them{loaded}")
        return estimate

    def statistics(self) -> InputStatistics:
        """Return the mean and standard deviation of all values, or the given ones, on the CPU."""
        estimate = self.estimate()
        if self.learns:
            total = self.learned.total.scaled(self._settings.unit(self.learned.kind))
            mean, std, count = total.mean.cpu(), total.std.cpu(), total.count.cpu()
        else:
            mean, std, count = estimate.mean, estimate.variance.sqrt(), torch.zeros_like(estimate.mean)
        chosen = chosen_channels(self._settings)
        if chosen is not None:
            mean, std = torch.where(chosen, mean, 0.0), torch.where(chosen, std, 1.0)
        return InputStatistics(mean, std, count)

    def load(self, state: object) -> SavedInput:
        """Take over a saved state, in this mode or another.

        Args:
            state: The state.

        Returns:
            What it says.
        """
        saved = read_state(state, self._settings)
        self.saved = saved
        self._faults = torch.zeros(3, dtype=torch.float64)
        self._take(self._estimator.adopt(saved.learned, saved.mode))
        return saved

    def move_to(self, device: torch.device) -> None:
        """Keep the statistics on a device from here on."""
        self.learned, self._faults = self.learned.to(device), self._faults.to(device)

    def _take(self, learned: LearnedStatistics) -> None:
        """Replace the statistics, and freeze them if it is time."""
        self.learned = learned
        limit = self._settings.freeze_after
        # Without a limit the number is not asked for, since on an accelerator the host would wait for it.
        self.is_frozen = not self.learns or (limit is not None and int(learned.samples) >= limit)


def _answers_at_once(device: torch.device) -> bool:
    """Tell whether the host need not wait for a device to know a number."""
    return device.type == "cpu"
