"""Training batches of several inputs, each at one place of the batch or several, with one collective for all."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_revbn.core.global_moments import RankBatch, share
from lightning_revbn.core.input_checks import InputError, InputPart
from lightning_revbn.core.input_norm import OnlineStandardizer

__all__ = ["InputParts", "learn_together", "naming", "train_together"]


@dataclass(frozen=True)
class InputParts:
    """What a batch holds of one input on this rank.

    Attributes:
        name: The name of the input, for errors; empty where there is one input alone.
        online: Its standardiser.
        parts: Raw values and masks of the places that have any; there may be none.
    """

    name: str
    online: OnlineStandardizer
    parts: Sequence[InputPart]


def train_together(
    inputs: Sequence[InputParts], dtype: torch.dtype, group: Any, ranks: int, device: torch.device
) -> list[list[Tensor]]:
    """Add a training batch to the statistics of all its inputs, and standardise them as their modes say.

    Args:
        inputs: The inputs, the same on all ranks.
        dtype: That of the results.
        group: The process group of the ranks that share the batch; None is the default group.
        ranks: How many these are. Each must call this once a step, and there is one collective, unless the statistics
            of all inputs are frozen or given.
        device: Where ranks communicate if this one has no part of the batch.

    Returns:
        The standardised parts of each input.

    Raises:
        InputError: If any rank's values of any input cannot be measured; then no input has learned from the batch.
    """
    learn_together(inputs, group, ranks, device)
    results: list[list[Tensor]] = []
    for one in inputs:
        with naming(one.name):
            results.append([one.online.normalize(InputPart(x.detach(), mask), dtype) for x, mask in one.parts])
    return results


def learn_together(inputs: Sequence[InputParts], group: Any, ranks: int, device: torch.device) -> None:
    """Add a training batch to the statistics of all its inputs; the arguments are those of `train_together`."""
    learning = [one for one in inputs if not one.online.is_frozen]
    measured: list[RankBatch] = []
    for one in learning:
        with naming(one.name):
            measured.append(one.online.learner.measure(one.parts, device))
    batches = share(measured, group, ranks)
    for one, batch in zip(learning, batches, strict=True):
        with naming(one.name):
            one.online.learner.judge(batch, one.parts)
    for one in inputs:
        if one.online.is_frozen:
            one.online.learn(None)
    # On an accelerator nobody has waited for the faults: a batch that one input leaves out is left out of all.
    for one, own in zip(learning, batches, strict=True):
        faults = torch.stack([batch.faults.to(own.faults.device) for batch in batches]).sum(0)
        one.online.learn(replace(own, faults=faults))


@contextmanager
def naming(name: str) -> Generator[None]:
    """Put the name of an input in front of errors about its values.

    Args:
        name: The name; empty changes nothing.

    Yields:
        Nothing.

    Raises:
        InputError: The error with the name.
    """
    try:
        yield
    except InputError as error:
        if not name:
            raise
        raise InputError(f"input {name!r}: {error}") from error
