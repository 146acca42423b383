"""Standardises raw batches while they come in, with statistics that are learned on the way.

The state is plain tensors, never buffers of a module: nothing rebroadcasts, casts or shards it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_revbn.core.fixed_normalizer import Constants, FixedNormalizer, standardize
from lightning_revbn.core.global_batch_norm import ranks_in
from lightning_revbn.core.global_moments import GlobalBatch, share
from lightning_revbn.core.input_checks import InputError, InputPart, check_input, check_kind
from lightning_revbn.core.input_comparison import InputComparison
from lightning_revbn.core.input_learner import InputLearner
from lightning_revbn.core.input_masks import kept_by
from lightning_revbn.core.input_settings import RELU_STD, InputNorm
from lightning_revbn.core.input_state import write_state
from lightning_revbn.core.input_statistics import InputStatistics, MissingStatisticsError
from lightning_revbn.core.input_transform import InputTransform
from lightning_revbn.core.moments import Kind, Moments

__all__ = [
    "RELU_STD",
    "InputError",
    "InputNorm",
    "InputStatistics",
    "MissingStatisticsError",
    "OnlineStandardizer",
]


class OnlineStandardizer:
    """Standardise batches by statistics that every training batch adds to, on one process or many.

    For plain loops and Fabric; with a Trainer use `OnlineInputNormMixin`. No gradient flows through it, and no batch is
    changed in place.

    Args:
        settings: What is done; where batches hold the input is the caller's business.
        scale: What takes the place of `settings.scale` while that is "auto".
        name: What warnings call the input, where there are several.

    Example:
        >>> standardizer = OnlineStandardizer(InputNorm(num_features=1, scale=1.0, eps=0.0))
        >>> standardizer.train(torch.tensor([[0], [255]], dtype=torch.uint8)).flatten().tolist()
        [-1.0, 1.0]
        >>> standardizer.statistics().mean.tolist()
        [0.5]
    """

    def __init__(self, settings: InputNorm, scale: float | None = None, name: str = "") -> None:
        self.settings = settings
        self._scale = scale if settings.scale == "auto" else settings.scale
        self.learner = InputLearner(settings)
        self._constants: dict[Any, Constants] = {}
        self._newest: InputTransform | None = None
        self._stand_in: OnlineStandardizer | None = None
        self._dims: int | None = None
        self._comparison = InputComparison(settings, name)

    @property
    def scale(self) -> float:
        """What standardised values are multiplied by."""
        return RELU_STD if self._scale is None else self._scale

    @property
    def knows_scale(self) -> bool:
        """Whether the scale was given, set or loaded, rather than assumed."""
        return self._scale is not None

    @property
    def learns(self) -> bool:
        """Whether training batches teach anything, as they do in every mode but `"fixed"`."""
        return self.learner.learns

    @property
    def has_statistics(self) -> bool:
        """Whether a batch was measured, or constants are given."""
        return not self.learns or self.learner.learned.kind is not Kind.UNKNOWN

    @property
    def is_frozen(self) -> bool:
        """Whether training batches change nothing any more."""
        return self.learner.is_frozen

    @property
    def samples(self) -> int:
        """How many samples of all ranks were measured; on an accelerator this waits for it."""
        return int(self.learner.learned.samples)

    def set_scale(self, scale: float) -> None:
        """Multiply by another number from here on.

        Args:
            scale: The number.
        """
        self._scale = scale
        self._constants.clear()

    def train(
        self,
        values: Tensor,
        mask: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        group: Any = None,
        ranks: int | None = None,
    ) -> Tensor:
        """Add a training batch to the statistics, and standardise it as the mode says.

        Args:
            values: This rank's part of the batch, raw; it may be empty.
            mask: True where values count.
            dtype: That of the result.
            group: The process group of the ranks that share the batch; None is the default group.
            ranks: How many these are; None asks the group. Where there are several, each must call this once a step,
                and there is one collective, unless the statistics are frozen or given.

        Returns:
            The standardised values, of the shape and memory format of `values`.

        Raises:
            InputError: If any rank's values cannot be measured. On accelerators it is `check` that says so.
        """
        part = InputPart(values.detach(), mask)
        batch = None
        if not self.is_frozen:
            (batch,) = share([self.learner.measure([part])], group, ranks_in(group) if ranks is None else ranks)
            self.learner.judge(batch, [part])
        self.learn(batch)
        return self.normalize(part, dtype)

    def learn(self, batch: GlobalBatch | None) -> None:
        """Add what all ranks know of a training batch, measured and judged by `learner`; None where that is frozen."""
        self._newest = None
        if batch is not None:
            self.learner.add(batch)
            self._constants.clear()
            if batch.kind is not Kind.UNKNOWN:
                self._newest = self._transform(batch.moments)

    def normalize(self, part: InputPart, dtype: torch.dtype) -> Tensor:
        """Standardise a part of the training batch that was learned last, as the mode says."""
        if self._newest is not None:
            return self._apply(*part, self._newest.constants_for(part.values), dtype)
        if self.is_frozen:
            return self.evaluate(*part, dtype=dtype)
        return torch.empty_like(part.values, dtype=dtype)  # no rank has any values

    def evaluate(self, values: Tensor, mask: Tensor | None = None, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standardise a batch by what was learned in training; change nothing, communicate nothing.

        The first batch after `compare_again` and after every training batch is compared with the training data, with a
        warning if it is made of other numbers.

        Args:
            values: The batch, raw.
            mask: True where values count.
            dtype: That of the result.

        Returns:
            The standardised values, of the shape and memory format of `values`.

        Raises:
            InputError: If it holds uint8 and training batches held other integers, or the other way round.
            MissingStatisticsError: If nothing was learned yet.
        """
        check_input(values, mask, self.settings.channel_dim, self.settings.num_features)
        key = values.dtype, values.device
        if key not in self._constants:
            check_kind(values.dtype, self.learner.learned.kind, self.settings)
            if values.device.type != "mps":  # has no float64, in which the statistics are
                self.learner.move_to(values.device)
            self._constants[key] = self._transform().constants_for(values)
            self._comparison.again(values.dtype)
        values, constants = values.detach(), self._constants[key]
        result = self._apply(values, mask, constants, dtype)
        if self._comparison.is_due(values):
            known = self.learner.learned.kind, self.statistics()
            self._comparison.compare(values, result, mask, constants, self.scale, *known)
        return result

    def preview(self, values: Tensor, mask: Tensor | None = None, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standardise a batch before there are statistics, by its own alone; learn nothing, communicate nothing.

        Args:
            values: The batch, raw.
            mask: True where values count.
            dtype: That of the result.

        Returns:
            The standardised values.
        """
        if self.has_statistics:
            return self.evaluate(values, mask, dtype=dtype)
        return self.stand_in().train(values, mask, dtype=dtype, ranks=1)

    def stand_in(self) -> OnlineStandardizer:
        """Return a standardiser for one batch; `denormalize` undoes the batch until there are statistics."""
        self._stand_in = OnlineStandardizer(replace(self.settings, nan_policy="ignore"), self.scale)
        self._stand_in.learner = InputLearner(self._stand_in.settings, ignores_infinity=True)
        return self._stand_in

    def check(self) -> None:
        """Raise if a training batch could not be measured; on accelerators this waits for the batch.

        Raises:
            InputError: If so.
        """
        self.learner.check()

    def compare_again(self) -> None:
        """Compare the next batch of evaluation with the training data: it may be of another data set."""
        self._comparison.again()

    def statistics(self) -> InputStatistics:
        """Return mean and standard deviation of all training data seen so far, in units of the input range.

        Returns:
            Tensors on the CPU. In mode `"fixed"` the given constants.

        Raises:
            MissingStatisticsError: If nothing was learned yet.
        """
        return self.learner.statistics()

    def normalizer(self) -> FixedNormalizer:
        """Return what `evaluate` does now as a module without Lightning.

        Returns:
            A module with buffers only, on the CPU.
        """
        return self._transform().module(self.learner.learned.kind)

    def denormalize(self, values: Tensor, *, is_training: bool = False) -> Tensor:
        """Undo what `evaluate` does: for pictures of what a network was given.

        Args:
            values: Standardised values: a batch, or a sample without the dimension of the batch.
            is_training: Whether the values are of the newest training batch, to undo what `train` did. In mode
                `"batch"` the two differ.

        Returns:
            Values in units of the input range: pictures that came as uint8 lie in [0, 1].
        """
        if not self.has_statistics and self._stand_in is not None:
            return self._stand_in.denormalize(values, is_training=True)
        transform = (self._newest if is_training else None) or self._transform()
        return transform.undo(values, self._dims)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that was learned, on the CPU."""
        return write_state(self.settings, self._scale, self.learner.learned, is_held=self.learner.is_held)

    def load_state_dict(self, state: object) -> None:
        """Take over what was learned.

        Args:
            state: What `state_dict` returned, in this mode or another. Mode `"fixed"` uses its constants alone; mode
                `"ema"` begins from the statistics of other modes; what mode `"fixed"` has saved teaches others nothing.

        Raises:
            ValueError: If it cannot be such a state; the statistics are as they were before.
        """
        saved = self.learner.load(state)
        if self.settings.scale == "auto":
            self._scale = saved.scale
        self._newest = None
        self._comparison.forget_warnings()
        self._constants.clear()

    def _transform(self, batch: Moments | None = None) -> InputTransform:
        """Return the transform of a training batch that was added, or of batches of evaluation."""
        return InputTransform(self.settings, self.scale, self.learner.estimate(batch))

    def _apply(self, values: Tensor, mask: Tensor | None, constants: Constants, dtype: torch.dtype) -> Tensor:
        self._dims = values.dim()
        rules, settings = kept_by(self.settings, mask, values.device), self.settings
        dim, compile, fill = settings.channel_dim, settings.compile, settings.fill or 0.0
        with torch.no_grad():
            return standardize(values, constants, dim, dtype, rules, compile, fill)
