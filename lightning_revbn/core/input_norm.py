"""Standardises raw batches with statistics that it learns from the training batches themselves.

The state is plain tensors, not buffers of a module: DDP would broadcast buffers from rank 0, FSDP and `bf16-true` would
cast them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_revbn.core.fixed_normalizer import Constants, FixedNormalizer
from lightning_revbn.core.global_batch_norm import ranks_in
from lightning_revbn.core.global_moments import GlobalBatch
from lightning_revbn.core.input_checks import InputError, InputPart, check_input, check_kind
from lightning_revbn.core.input_comparison import InputComparison
from lightning_revbn.core.input_learner import InputLearner
from lightning_revbn.core.input_settings import RELU_STD, InputNorm
from lightning_revbn.core.input_state import write_state
from lightning_revbn.core.input_statistics import InputStatistics, MissingStatisticsError
from lightning_revbn.core.input_transform import InputTransform, standardize_kept
from lightning_revbn.core.joint_training import InputParts, train_together
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

    For plain loops and Fabric; with a Trainer use `OnlineInputNormMixin`. No gradient flows through it, and it changes
    no batch in place.

    Args:
        settings: The settings. The caller finds the input and its mask in a batch: keys of the settings are not used.
        scale: The scale if `settings.scale` is "auto"; None is 0.58.
        name: The name of the input in warnings; empty for a single input.

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
        """The number that standardised values are multiplied by."""
        return RELU_STD if self._scale is None else self._scale

    @property
    def knows_scale(self) -> bool:
        """Whether the scale was given, set or loaded, rather than assumed."""
        return self._scale is not None

    @property
    def learns(self) -> bool:
        """Whether training batches add to the statistics, as they do in every mode but `"fixed"`."""
        return self.learner.learns

    @property
    def has_statistics(self) -> bool:
        """Whether a batch was measured, or constants are given."""
        return not self.learns or self.learner.learned.kind is not Kind.UNKNOWN

    @property
    def is_frozen(self) -> bool:
        """Whether training batches no longer change the statistics."""
        return bool(self.learner.freeze)

    @property
    def samples(self) -> int:
        """Number of measured samples of all ranks; on an accelerator, reading it waits for the device."""
        return int(self.learner.learned.samples)

    def set_scale(self, scale: float) -> None:
        """Multiply standardised values by another number from now on."""
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
        """Add a training batch to the statistics, and standardise it by the statistics of the mode.

        Args:
            values: Raw values of this rank; they may be empty.
            mask: True where values count; None counts all values.
            dtype: The dtype of the result.
            group: The process group of the ranks that share the batch; None is the default group.
            ranks: Number of ranks in the group; None asks the group. With several ranks, each must call this once a
                step, for a collective; with frozen statistics or mode `"fixed"` there is no collective.

        Returns:
            The standardised values, in the shape and memory format of `values`.

        Raises:
            InputError: On this rank, if values have other channels than the settings; on all ranks, if any rank's
                values have a fault (see `GlobalBatch.faults`; on accelerators `check` raises, but for the first batch).
        """
        own = InputParts("", self, [InputPart(values, mask)])
        ranks = ranks_in(group) if ranks is None else ranks
        ((result,),) = train_together([own], dtype, group, ranks, values.device)
        return result

    def train_alone(self, part: InputPart, dtype: torch.dtype) -> Tensor | None:
        """Return the result of `train` in a single compiled graph; None, and do nothing, where that cannot be."""
        found = self.learner.learn_and_standardize(part, self.scale, dtype)
        if found is None:
            return None
        result, self._newest = found
        self._dims, self._constants = part.values.dim(), {}
        return result

    def learn(self, batch: GlobalBatch | None) -> None:
        """Add a training batch of all ranks, measured and judged by `learner`; None if the learner is frozen."""
        self._newest = None
        if batch is not None:
            self.learner.add(batch)
            self._constants.clear()
            if batch.kind is not Kind.UNKNOWN:
                self._newest = self._transform(batch.moments)

    def normalize(self, part: InputPart, dtype: torch.dtype) -> Tensor:
        """Standardise this rank's part of the training batch that `learn` has added last, as the mode does."""
        if self._newest is not None:
            self._dims, constants = part.values.dim(), self._newest.constants_for(part.values)
            return standardize_kept(*part, constants, self.settings, dtype)
        if self.is_frozen:
            return self.evaluate(*part, dtype=dtype)
        return torch.empty_like(part.values, dtype=dtype)  # the batch is empty on every rank

    def evaluate(self, values: Tensor, mask: Tensor | None = None, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standardise a batch by the statistics of training; change nothing, communicate nothing.

        Warns if the first batch of a dtype after training, or after `compare_again`, lies in another range.

        Args:
            values: Raw values.
            mask: True where values count; None counts all values.
            dtype: The dtype of the result.

        Returns:
            The standardised values, in the shape and memory format of `values`.

        Raises:
            InputError: If values have other channels than the settings; or if they are uint8 and the training batches
                were other integers, or the other way round.
            MissingStatisticsError: Before the first statistics.
        """
        check_input(values, mask, self.settings.channel_dim, self.settings.num_features)
        key = values.dtype, values.device
        if key not in self._constants:
            check_kind(values.dtype, self.learner.learned.kind, self.settings)
            self.learner.move_to(values.device)
            self._constants[key] = self._transform().constants_for(values)
            self._comparison.again(values.dtype)
        values, constants, self._dims = values.detach(), self._constants[key], values.dim()
        result = standardize_kept(values, mask, constants, self.settings, dtype)
        if self._comparison.is_due(values):
            known = self.learner.learned.kind, self.statistics()
            self._comparison.compare(values, result, mask, constants, self.scale, *known)
        return result

    def preview(self, values: Tensor, mask: Tensor | None = None, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standardise a batch as `evaluate` does; before the first statistics, by its own mean and variance.

        For the sanity check, which runs before training: it learns nothing and communicates nothing.

        Returns:
            The standardised values. Arguments and errors are those in `evaluate`, except missing statistics.
        """
        if self.has_statistics:
            return self.evaluate(values, mask, dtype=dtype)
        return self.stand_in().train(values, mask, dtype=dtype, ranks=1)

    def stand_in(self) -> OnlineStandardizer:
        """Return a standardiser for a batch before training; `denormalize` undoes it until there are statistics."""
        # NaN and infinity do not raise in it, since batches of evaluation may hold them.
        self._stand_in = OnlineStandardizer(replace(self.settings, nan_policy="ignore"), self.scale)
        self._stand_in.learner = InputLearner(self._stand_in.settings, ignores_infinity=True)
        return self._stand_in

    def check(self) -> None:
        """Raise if a training batch since the last check had a fault; on accelerators this waits for the device.

        Raises:
            InputError: If a batch held NaN, infinity, integers beyond 32 bits, or another kind of numbers than before.
        """
        self.learner.check()

    def compare_again(self) -> None:
        """Compare the next batch of evaluation with the training data again, since it may be of another data set."""
        self._comparison.again()

    def statistics(self) -> InputStatistics:
        """Return mean and standard deviation of all training data seen so far, in units of the input range.

        Returns:
            Tensors on the CPU: in mode `"fixed"` the given constants, with count 0.

        Raises:
            MissingStatisticsError: Before the first statistics.
        """
        return self.learner.statistics()

    def normalizer(self) -> FixedNormalizer:
        """Return the normalisation of `evaluate`, with the present statistics, as a module without Lightning.

        Returns:
            A module with buffers only, on the CPU.
        """
        return self._transform().module(self.learner.learned.kind)

    def denormalize(self, values: Tensor, *, is_training: bool = False) -> Tensor:
        """Undo the normalisation, to draw the input of a network.

        Args:
            values: Standardised values: a batch, or a sample without the batch dimension.
            is_training: Whether to undo `train` of the newest training batch, rather than `evaluate`. In mode
                `"batch"` the two use different statistics.

        Returns:
            Values of the same shape in units of the input range: images that came as uint8 lie in [0, 1].

        Raises:
            InputError: If values have other channels than the settings.
            MissingStatisticsError: Before the first statistics.
        """
        if not self.has_statistics and self._stand_in is not None:
            return self._stand_in.denormalize(values, is_training=True)
        transform = (self._newest if is_training else None) or self._transform()
        return transform.undo(values, self._dims)

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics and the scale as plain values and tensors on the CPU; `input_state` has the keys."""
        return write_state(self.settings, self._scale, self.learner.learned, is_held=self.learner.freeze.is_held)

    def load_state_dict(self, state: object) -> None:
        """Load saved statistics.

        Args:
            state: The result of `state_dict`, in this mode or another. Mode `"fixed"` keeps its constants; mode `"ema"`
                begins its average from the statistics of other modes. A state of mode `"fixed"` has constants only, so
                other modes have no statistics after it.

        Raises:
            ValueError: If the state is damaged or of an input with other channels; the statistics stay as they are.
        """
        saved = self.learner.load(state)
        if self.settings.scale == "auto":
            self._scale = saved.scale
        self._newest = None
        self._comparison.forget_warnings()
        self._constants.clear()

    def _transform(self, batch: Moments | None = None) -> InputTransform:
        """Return the transform of a training batch; without moments of a batch, the transform of evaluation."""
        return InputTransform(self.settings, self.scale, self.learner.estimate(batch))
