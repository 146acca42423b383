"""Trains with batches of several inputs, each at any number of places, with a single collective for all."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_revbn.core.global_moments import RankBatch, share
from lightning_revbn.core.input_checks import InputError, InputPart

if TYPE_CHECKING:
    from lightning_revbn.core.input_norm import OnlineStandardizer

__all__ = ["InputParts", "learn_together", "naming", "train_together"]


@dataclass(frozen=True)
class InputParts:
    """This rank's parts of an input in a batch.

    Attributes:
        name: The name of the input in errors; empty for a single input.
        online: Its standardiser.
        parts: Raw values and mask of each place that has values; empty if no place has any.
    """

    name: str
    online: OnlineStandardizer
    parts: Sequence[InputPart]


def train_together(
    inputs: Sequence[InputParts], dtype: torch.dtype, group: Any, ranks: int, device: torch.device
) -> list[list[Tensor]]:
    """Add a training batch to the statistics of all its inputs, and standardise each input as its mode does.

    Args:
        inputs: The inputs, the same on all ranks.
        dtype: The dtype of the results.
        group: The process group of the ranks that share the batch; None is the default group.
        ranks: Number of ranks in the group. With several, each must call this once a step, for a collective; if all
            inputs are frozen or in mode `"fixed"` they need no collective.
        device: The device for the collective if this rank has no part of the batch.

    Returns:
        The standardised parts of each input.

    Raises:
        InputError: If the values of any input cannot be measured on any rank; then the batch changes no statistics.
    """
    if ranks == 1 and len(inputs) == 1 and len(inputs[0].parts) == 1:
        (values, mask), (one,) = inputs[0].parts[0], inputs
        with naming(one.name):
            result = one.online.train_alone(InputPart(values.detach(), mask), dtype)
        if result is not None:
            return [[result]]
    learn_together(inputs, group, ranks, device)
    results: list[list[Tensor]] = []
    for one in inputs:
        with naming(one.name):
            results.append([one.online.normalize(InputPart(x.detach(), mask), dtype) for x, mask in one.parts])
    return results


def learn_together(inputs: Sequence[InputParts], group: Any, ranks: int, device: torch.device) -> None:
    """Add a training batch to the statistics of all its inputs.

    Args:
        inputs: The inputs, the same on all ranks.
        group: The process group of the ranks that share the batch; None is the default group.
        ranks: Number of ranks in the group.
        device: The device for the collective if this rank has no part of the batch.

    Raises:
        InputError: If the values of any input cannot be measured on any rank; then the batch changes no statistics.
    """
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
    # On an accelerator `judge` has not waited for the faults. So each input gets the faults of all inputs: a batch that
    # is bad in any of them is added to none.
    for one, own in zip(learning, batches, strict=True):
        faults = [batch.faults.to(own.faults.device) for batch in batches]
        one.online.learn(replace(own, faults=torch.stack(faults).sum(0)) if len(faults) > 1 else own)


@contextmanager
def naming(name: str) -> Generator[None]:
    """Put the name of an input in front of errors about its values.

    Args:
        name: The name; an empty name changes nothing.

    Yields:
        Nothing.

    Raises:
        InputError: The error of the body, with the name.
    """
    try:
        yield
    except InputError as error:
        if not name:
            raise
        raise InputError(f"input {name!r}: {error}") from error
