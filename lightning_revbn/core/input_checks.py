"""Checks raw input: shape and mask before a batch is measured, and afterwards the faults that ranks found in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from lightning_revbn.core.input_settings import InputNorm
from lightning_revbn.core.integer_sums import OUT_OF_RANGE
from lightning_revbn.core.moments import Kind

__all__ = ["InputError", "InputPart", "check_input", "check_kind", "refuse_faults"]

_SQUARE_ROOT = torch.finfo(torch.float64).max ** 0.5
"""Absolute value above which the square of a value is infinite in float64."""


class InputError(ValueError):
    """A batch cannot be measured or normalised; the statistics stay as they are."""


class InputPart(NamedTuple):
    """The values of an input at a place of a batch.

    Attributes:
        values: Raw values.
        mask: True where values count; None counts all values.
    """

    values: Tensor
    mask: Tensor | None = None


def check_input(values: Tensor, mask: Tensor | None, channel_dim: int | None, channels: int) -> None:
    """Raise unless a batch has the channels of the settings, and a mask that fits it.

    Args:
        values: The batch.
        mask: Its mask, or None.
        channel_dim: The dimension of the channels; None takes all values as a single channel.
        channels: Number of channels C.

    Raises:
        InputError: If the values are complex, the batch has no dimension `channel_dim` or not C channels in it, or the
            mask is not boolean or does not broadcast to the batch.
    """
    shape = tuple(values.shape)
    if values.is_complex():
        raise InputError(f"the input is complex ({values.dtype}): make it real, for example by its magnitude")
    if not shape or (channel_dim is not None and not -len(shape) <= channel_dim < len(shape)):
        single = ". InputNorm(1, channel_dim=None) takes all values as one channel" if shape and channels == 1 else ""
        raise InputError(f"the input has shape {shape}: it has no dimension channel_dim={channel_dim}{single}")
    if channel_dim is not None and shape[channel_dim] != channels:
        raise InputError(
            f"the input has shape {shape}: its dimension channel_dim={channel_dim} has {shape[channel_dim]} channels, "
            f"and num_features is {channels}. Set num_features, or channel_dim (-1 where channels are last)"
        )
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise InputError(f"the mask is {mask.dtype}: it must be boolean, True where values count")
    try:
        mask.expand(shape)
    except RuntimeError as error:
        raise InputError(f"the mask of shape {tuple(mask.shape)} does not broadcast to the input, {shape}") from error


def check_kind(dtype: torch.dtype, kind: Kind, settings: InputNorm) -> None:
    """Raise if evaluation would divide integers by another number than training did.

    Args:
        dtype: The dtype of a batch of evaluation.
        kind: The kind of the training batches.
        settings: The settings; a number as `input_range` divides every kind.

    Raises:
        InputError: With `input_range="auto"`, if either of the batch and the training batches is uint8, and the other
            is another integer dtype.
    """
    if settings.input_range != "auto" or {Kind.of_dtype(dtype), kind} != {Kind.UINT8, Kind.INTEGER}:
        return
    before = (
        "uint8, which is divided by 255"
        if kind is Kind.UINT8
        else "other integers than uint8, which are taken as they are"
    )
    raise InputError(
        f"the input is {dtype}, but the training batches were {before}: evaluation would be off by a factor of 255. "
        "Use the same dtype for both, or give InputNorm(input_range=...) if they have the same range"
    )


def refuse_faults(faults: Sequence[int], kind: Kind, parts: Sequence[InputPart] = (), *, ignore_nan: bool) -> None:
    """Raise if any rank has found a fault in a training batch.

    Args:
        faults: Number of ranks with each fault, in the order of `GlobalBatch.faults`.
        kind: The kind of the earlier training batches.
        parts: This rank's parts of the batch, to name the sample and channel.
        ignore_nan: Whether NaN is allowed.

    Raises:
        InputError: If a number is not 0. The message names the first bad value of this rank, and the remedy.
    """
    nonfinite, beyond, mixed = faults
    if nonfinite:
        raise InputError(
            f"NaN or infinity in a training batch{_place_of_nonfinite(parts, ignore_nan)}: the statistics are "
            'as they were before it. Clean the data, or leave NaN out of the statistics by nan_policy="ignore"'
        )
    if beyond:
        raise InputError(f"in a training batch, {OUT_OF_RANGE}")
    if mixed:
        before = f", so far of kind {kind.name.lower()}" if kind is not Kind.UNKNOWN else ""
        raise InputError(
            f"training batches must all be uint8, all other integers or all floating-point numbers{before}; "
            "convert them before they are batched"
        )


def _place_of_nonfinite(parts: Sequence[InputPart], ignore_nan: bool) -> str:
    """Return the index of the first value of this rank that is not finite, as the end of a clause."""
    # On an accelerator faults are read later, when the batch may be gone.
    floats = [part for part in parts if part.values.device.type == "cpu" and part.values.is_floating_point()]
    for values, mask in floats:
        wrong = ~values.isfinite()
        if ignore_nan:
            wrong &= ~values.isnan()
        if mask is not None:
            wrong &= mask
        if wrong.any():
            index = cast("list[int]", wrong.nonzero()[0].tolist())  # pyright: ignore[reportUnknownMemberType] # torch does not type it
            return f", first at index {tuple(index)} of an input of shape {tuple(values.shape)}"
    for values, mask in floats:
        counted = values if mask is None else values.masked_fill(~mask, 0.0)
        if values.dtype == torch.float64 and bool((counted.abs() > _SQUARE_ROOT).any()):
            return ", with values too large to be squared"
    return " of another rank" if floats else ""
