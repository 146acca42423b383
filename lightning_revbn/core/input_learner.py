"""What one input has taught: measured batch by batch, checked, frozen, loaded, and estimated from as the mode says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from lightning_revbn.core.estimators import Estimate, estimator_of
from lightning_revbn.core.global_moments import GlobalBatch, RankBatch, measure
from lightning_revbn.core.input_checks import InputPart, check_input, refuse_faults
from lightning_revbn.core.input_masks import InputMasks, chosen_channels
from lightning_revbn.core.input_settings import InputNorm
from lightning_revbn.core.input_state import SavedInput, read_state
from lightning_revbn.core.input_statistics import InputStatistics, LearnedStatistics, MissingStatisticsError
from lightning_revbn.core.moments import Kind, Moments

__all__ = ["InputLearner"]


class InputLearner:
    """The statistics of one input, and the estimator of its mode.

    Args:
        settings: The settings.
        ignores_infinity: Whether infinity is left out too: for batches of evaluation, which may hold it.

    Attributes:
        learned: The statistics of all training batches.
        saved: What was loaded last.
        is_frozen: Whether training batches change nothing any more.
    """

    def __init__(self, settings: InputNorm, *, ignores_infinity: bool = False) -> None:
        self._settings = settings
        self._ignores_infinity = ignores_infinity
        self._estimator = estimator_of(settings)
        self._faults: Tensor = torch.zeros(3, dtype=torch.float64)
        self.learned = LearnedStatistics.of_nothing(settings.num_features)
        self.saved: SavedInput | None = None
        self._is_held = False
        self.is_frozen = not self._estimator.learns

    @property
    def learns(self) -> bool:
        """Whether training batches teach anything, as they do in every mode but `"fixed"`."""
        return self._estimator.learns

    def measure(self, parts: Sequence[InputPart], device: torch.device | None = None) -> RankBatch:
        """Measure what this rank has of a training batch.

        Args:
            parts: Raw values and their masks, one for each place of the batch; there may be none.
            device: Where the result is if there are none.

        Returns:
            What this rank knows, to be shared with other ranks.

        Raises:
            InputError: If a part has other channels than the settings say.
        """
        settings, kind = self._settings, self.learned.kind
        for part in parts:
            check_input(*part, settings.channel_dim, settings.num_features)
        if not parts:
            return RankBatch.of_nothing(kind, settings.num_features, device or self.learned.samples.device)
        return reduce(RankBatch.join, map(self._measure, parts))

    def judge(self, batch: GlobalBatch, parts: Sequence[InputPart]) -> None:
        """Raise if a training batch has a fault that can be asked for now; nothing has been added by then.

        Args:
            batch: What all ranks know of it.
            parts: What this rank has of it, to say more about the fault.

        Raises:
            InputError: If so, on every rank.
        """
        self.move_to(batch.samples.device)
        self._faults = self._faults + batch.faults
        if self._is_checked(batch):
            self.check(parts)

    def add(self, batch: GlobalBatch) -> None:
        """Add what all ranks know of a training batch that was judged; on accelerators without a wait for its faults.

        Args:
            batch: What they know.
        """
        if batch.kind is Kind.UNKNOWN:  # no rank has any values
            return
        learned = self.learned.add(batch, self._estimator.momentum)
        if not _answers_at_once(batch.samples.device):
            learned = learned.where(batch.faults.sum() == 0, replace(self.learned, kind=batch.kind))
        self._take(learned)

    def check(self, parts: Sequence[InputPart] = ()) -> None:
        """Raise if a training batch had a fault since the last check; on accelerators this waits for the batch.

        Args:
            parts: What this rank has of the batch, to say more about it.

        Raises:
            InputError: If so.
        """
        faults = [int(count) for count in self._faults.cpu()]  # from an accelerator each copy makes the host wait
        self._faults = torch.zeros_like(self._faults)
        parts = self._counted(parts) if any(faults) else ()
        refuse_faults(faults, self.learned.kind, parts, ignore_nan=self._settings.nan_policy == "ignore")

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
            # Stacked, since from an accelerator each copy makes the host wait.
            mean, std, count = torch.stack((total.mean, total.std, total.count)).cpu()
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
        self.saved, self._is_held = saved, saved.is_held and self.learns
        self._faults = torch.zeros(3, dtype=torch.float64)
        self._take(self._estimator.adopt(saved.learned, saved.mode))
        return saved

    @property
    def is_held(self) -> bool:
        """Whether training batches change nothing, as `hold` has asked for."""
        return self._is_held

    def hold(self, *, is_held: bool) -> None:
        """Keep the statistics as they are, or let training batches add to them again.

        Args:
            is_held: Whether to keep them.

        Raises:
            MissingStatisticsError: If there is nothing to keep yet.
            RuntimeError: If they are to learn again, but the limit of the settings has frozen them.
        """
        if is_held:
            self.estimate()
        self._is_held = is_held and self.learns
        self._take(self.learned)
        if not is_held and self.learns and self.is_frozen:
            limit, samples = self._settings.freeze_after, int(self.learned.samples)
            raise RuntimeError(
                f"freeze_after={limit} keeps the statistics as they are, since {samples} samples were measured. Make "
                "it larger, or reset the statistics"
            )

    def move_to(self, device: torch.device) -> None:
        """Keep the statistics on a device from here on."""
        self.learned, self._faults = self.learned.to(device), self._faults.to(device)

    def _measure(self, part: InputPart) -> RankBatch:
        """Measure what this rank has at one place of a training batch."""
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

    def _counted(self, parts: Sequence[InputPart]) -> list[InputPart]:
        """Return parts with the masks of all values that count."""
        left = map(self._finite, parts)
        return [InputPart(values, InputMasks.of(values, mask, self._settings).counted) for values, mask in left]

    def _finite(self, part: InputPart) -> InputPart:
        """Return a part whose mask leaves infinity out, if that is to be ignored."""
        values, mask = part
        if not self._ignores_infinity or not values.is_floating_point():
            return part
        return InputPart(values, values.isfinite() if mask is None else values.isfinite() & mask)

    def _is_checked(self, batch: GlobalBatch) -> bool:
        """Tell whether faults of a batch are told at once."""
        # The first batch of all is looked at everywhere: nobody knew its kind, so that nothing went on meanwhile.
        return _answers_at_once(batch.samples.device) or self.learned.kind is Kind.UNKNOWN

    def _take(self, learned: LearnedStatistics) -> None:
        """Replace the statistics, and freeze them if it is time."""
        self.learned = learned
        limit = self._settings.freeze_after
        # Without a limit the number is not asked for, since on an accelerator the host would wait for it.
        self.is_frozen = not self.learns or self._is_held or (limit is not None and int(learned.samples) >= limit)


def _answers_at_once(device: torch.device) -> bool:
    """Tell whether the host need not wait for a device to know a number."""
    return device.type == "cpu"
