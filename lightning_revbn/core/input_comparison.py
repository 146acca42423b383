"""Compares batches of evaluation with the training data, and warns once of each difference."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from lightning_revbn.core.fixed_normalizer import Constants, standardize
from lightning_revbn.core.input_advice import average_size, on_evaluation, on_unseen_channels
from lightning_revbn.core.input_masks import InputMasks
from lightning_revbn.core.input_settings import InputNorm
from lightning_revbn.core.input_statistics import InputStatistics
from lightning_revbn.core.moments import Kind

__all__ = ["InputComparison"]


class InputComparison:
    """Warns if batches of evaluation lie in another range than the training data.

    Args:
        settings: The settings.
        name: The name of the input in warnings; empty for a single input.
    """

    def __init__(self, settings: InputNorm, name: str = "") -> None:
        self._settings = settings
        self._name = name
        self._compared: set[torch.dtype] = set()
        self._told: set[str] = set()

    def again(self, dtype: torch.dtype | None = None) -> None:
        """Compare the next batch again, since it may be of another data set.

        Args:
            dtype: The dtype of the batch; None compares the next batch of each dtype.
        """
        self._compared -= {*self._compared} if dtype is None else {dtype}

    def forget_warnings(self) -> None:
        """Repeat earlier warnings where they apply, since other statistics were loaded."""
        self._told.clear()

    def is_due(self, values: Tensor) -> bool:
        """Tell whether to compare a batch: it is the first batch of its dtype, and has values.

        Args:
            values: The batch.

        Returns:
            True for the first batch of each dtype since `again`, unless it is empty or a meta tensor.
        """
        return values.dtype not in self._compared and values.numel() > 0 and not values.is_meta

    def compare(
        self,
        values: Tensor,
        result: Tensor,
        mask: Tensor | None,
        constants: Constants,
        scale: float,
        kind: Kind,
        statistics: InputStatistics,
    ) -> None:
        """Warn if a batch lies in another range than the training data, or training had no value of a channel.

        Args:
            values: Raw values.
            result: The standardised values.
            mask: True where values count; None counts all values.
            constants: The constants that standardised them.
            scale: The number that standardised values were multiplied by.
            kind: The kind of the training batches; unknown for given constants.
            statistics: The statistics of the training batches, or the constants.
        """
        self._compared.add(values.dtype)
        settings = self._settings
        masks = InputMasks.of(values, mask, settings)
        if constants.bound is not None:  # values cut to `clip` no longer show how far they lie from the mean
            result = standardize(values, replace(constants, bound=None), settings.channel_dim, torch.float32)
        distance = average_size(result, masks.compared) / scale
        trained = statistics.of(settings.channels)
        foreign = on_evaluation(values, masks.counted, distance, kind, trained, settings)
        unseen = on_unseen_channels(statistics, settings.channels) if settings.mode != "fixed" else None
        for subject, text in (("values", foreign), ("channels", unseen)):
            if text is not None and subject not in self._told:
                self._told.add(subject)
                warnings.warn(f"input {self._name!r}: {text}" if self._name else text, stacklevel=3)
