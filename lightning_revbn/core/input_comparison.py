"""Compares batches of evaluation with the training data, and warns once in one way."""

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
    """Warns of batches of evaluation that are made of other numbers than the training data.

    Args:
        settings: The settings.
        name: The name of the input; empty where there is one input alone.
    """

    def __init__(self, settings: InputNorm, name: str = "") -> None:
        self._settings = settings
        self._name = name
        self._compared: set[torch.dtype] = set()
        self._told: set[str] = set()

    def again(self, dtype: torch.dtype | None = None) -> None:
        """Compare the next batch: it may be of another data set.

        Args:
            dtype: Only batches of this dtype; None is every dtype.
        """
        self._compared -= {*self._compared} if dtype is None else {dtype}

    def forget_warnings(self) -> None:
        """Warn anew of the same things: the statistics are others."""
        self._told.clear()

    def is_due(self, values: Tensor) -> bool:
        """Tell whether a batch is to be compared: the first of its dtype, unless it has no values.

        Args:
            values: The batch.

        Returns:
            Whether it is.
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
        """Warn if a batch is made of other numbers, or has channels that training never saw.

        Args:
            values: The batch, raw.
            result: The same standardised.
            mask: True where values count.
            constants: What it was standardised by.
            scale: What standardised values were multiplied by.
            kind: What the training batches were made of; unknown for given constants.
            statistics: What was learned from them.
        """
        self._compared.add(values.dtype)
        settings = self._settings
        masks = InputMasks.of(values, mask, settings)
        if constants.bound is not None:  # a result that was cut tells no distance
            result = standardize(values, replace(constants, bound=None), settings.channel_dim, torch.float32)
        distance = average_size(result, masks.compared) / scale
        trained = statistics.of(settings.channels)
        foreign = on_evaluation(values, masks.counted, distance, kind, trained, settings)
        unseen = on_unseen_channels(statistics, settings.channels) if settings.mode != "fixed" else None
        for subject, text in (("values", foreign), ("channels", unseen)):
            if text is not None and subject not in self._told:
                self._told.add(subject)
                warnings.warn(f"input {self._name!r}: {text}" if self._name else text, stacklevel=3)
