"""Finds reasons to warn the user about raw data: each function returns a text, or None without a reason."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_revbn.core.input_settings import InputNorm
from lightning_revbn.core.input_state import SavedInput
from lightning_revbn.core.input_statistics import InputStatistics
from lightning_revbn.core.moments import Kind, moments

__all__ = [
    "average_size",
    "on_evaluation",
    "on_half_precision",
    "on_normalized_data",
    "on_other_constants",
    "on_small_features",
    "on_unseen_channels",
]

_FAR = 10.0
"""Average distance from the mean, in standard deviations, above which values of evaluation are of another range."""
_SHOWN = 8
"""Most channels that a text names."""


def average_size(result: Tensor, mask: Tensor | None) -> float:
    """Return the mean of the absolute values that count.

    Args:
        result: Standardised values.
        mask: True where values count; NaN and infinity never do.

    Returns:
        The mean; NaN where no value counts.
    """
    if mask is None:
        mean = result.abs().mean(dtype=_at_least_float32(result)).item()
        if math.isfinite(mean):
            return mean
    finite = result.isfinite()
    return torch.where(finite if mask is None else finite & mask, result.abs(), torch.nan).nanmean().item()


def on_evaluation(
    values: Tensor, mask: Tensor | None, distance: float, kind: Kind, trained: InputStatistics, settings: InputNorm
) -> str | None:
    """Compare the range of a batch of evaluation with the training data.

    Args:
        values: Raw values.
        mask: True where values count; None counts all values.
        distance: Average distance of the values from the mean, in standard deviations.
        kind: The kind of the training batches; unknown for given constants.
        trained: The statistics of the training batches, or the constants.
        settings: The settings.

    Returns:
        A text with both ranges, if the values lie more than 10 standard deviations from the mean on average; or if,
        with `input_range="auto"`, either of the batch and the training data is uint8, and the other is floating-point
        numbers that do not fit 0 to 1.
    """
    own = Kind.of(values)
    is_other = False
    if math.isnan(distance):
        return None
    if settings.input_range == "auto" and {own, kind} == {Kind.UINT8, Kind.FLOAT}:
        if own is Kind.FLOAT:
            found = moments(values, settings.channel_dim, mask=mask, ignore_nan=True)
            floats = InputStatistics(found.mean.cpu(), found.std.cpu(), found.count.cpu())
        else:
            floats = trained
        is_other = not floats.fit_range()
    if not is_other and not distance > _FAR:
        return None
    counted = (values if mask is None else values[mask.expand(values.shape)]).double()
    low, high = (edge.item() for edge in counted[~counted.isnan()].aminmax())
    unit = settings.unit(kind)
    mean, std = trained.mean.mean().item() * unit, trained.std.mean().item() * unit
    of = "The constants are of data" if kind is Kind.UNKNOWN else f"Training batches are {_NAMES[kind]}"
    return (
        f"a batch of evaluation ({values.dtype}, {low:g} to {high:g}) lies in another range than the training data. "
        f"{of} with mean {mean:g} and standard deviation {std:g} (about {mean - 2 * std:g} to {mean + 2 * std:g}). "
        f"On average its values lie {distance:.3g} standard deviations from the mean. Use one dtype and range for both"
    )


def on_unseen_channels(statistics: InputStatistics, channels: Sequence[int] | None = None) -> str | None:
    """Name the channels without a value in training.

    Args:
        statistics: The statistics of training.
        channels: The channels that are normalised; None is all.

    Returns:
        The text; None if every channel has values.
    """
    unseen = [channel for channel in _indices(statistics.count == 0) if channels is None or channel in channels]
    if not unseen:
        return None
    return (
        f"training has seen no value of the channels {_listed(unseen)}, all masked or NaN: evaluation neither centres "
        "nor divides them. Leave them out, or mask them in evaluation too"
    )


def on_small_features(statistics: InputStatistics, eps: float) -> str | None:
    """Name the channels whose variance is below 10 eps, with the share of the spread that eps leaves.

    Args:
        statistics: The statistics of training, or constants.
        eps: The number added to the variance.

    Returns:
        The text; None without such a channel.
    """
    variance = statistics.std.square()
    # A constant channel has only the rounding of its mean for a spread, and no eps would help it.
    rounding = (8 * torch.finfo(torch.float64).eps * statistics.mean).square()
    small = _indices((variance < 10 * eps) & (variance > rounding))
    if not small:
        return None
    stds = {channel: statistics.std[channel].item() for channel in small[:_SHOWN]}
    parts = [f"{channel} (std {std:.3g}, {std / math.sqrt(std**2 + eps):.3g} left)" for channel, std in stds.items()]
    more = f" and {len(small) - _SHOWN} more" if len(small) > _SHOWN else ""
    return (
        f"eps={eps:g} is not small against the variance of the channels {', '.join(parts)}{more}: after normalising, "
        "each of these has the standard deviation that is left, not 1. Make eps smaller (for tables: eps=1e-12), or "
        "give input_range"
    )


def on_half_precision(statistics: InputStatistics, dtype: torch.dtype) -> str | None:
    """Name the channels whose spread is below two steps between neighbouring numbers of a dtype near the mean.

    Args:
        statistics: The statistics of training.
        dtype: The dtype of the raw values.

    Returns:
        The text; None without such a channel, and for dtypes other than 16-bit floating point or narrower.
    """
    if not dtype.is_floating_point or dtype.itemsize > 2:
        return None
    spacing = statistics.mean.abs() * torch.finfo(dtype).eps
    lost = _indices((statistics.std < 2 * spacing) & (statistics.count > 1))
    if not lost:
        return None
    return (
        f"{dtype} cannot hold the spread of the input in channels {_listed(lost)}, whose mean is too large. Hand it "
        "over as integers, or train with a mixed precision, which leaves it in float32"
    )


def on_normalized_data(statistics: InputStatistics) -> str | None:
    """Find data that are normalised already: every channel has about mean 0 and standard deviation 1.

    Args:
        statistics: The statistics of floating-point training data.

    Returns:
        The text; None if a channel has another mean or standard deviation.
    """
    mean, std = statistics.mean.abs(), statistics.std
    if not bool((mean < 0.25).all() and ((std > 0.8) & (std < 1.25)).all()):
        return None
    return (
        "the input has mean 0 and standard deviation 1 already. Normalising it again does no harm, but a "
        "normalisation in the data set is not needed any more, and the logged statistics are not of raw data"
    )


def on_other_constants(saved: SavedInput, settings: InputNorm) -> str | None:
    """Compare the constants of mode `"fixed"` with the statistics by which a checkpoint's run evaluated.

    Args:
        saved: The input statistics of the checkpoint.
        settings: The settings of this run.

    Returns:
        A text if a mean or a standard deviation differs by more than a tenth of the saved standard deviation.
    """
    if settings.mode != "fixed" or settings.mean is None or settings.std is None:
        return None
    if saved.constants is not None:
        mean, std = saved.constants
    elif saved.learned.kind is not Kind.UNKNOWN:
        used = saved.learned.average if saved.mode == "ema" else saved.learned.total
        used = used.scaled(settings.unit(saved.learned.kind))
        mean, std = used.mean, used.std
    else:
        return None
    given_mean, given_std = (torch.tensor(given, dtype=torch.float64) for given in (settings.mean, settings.std))
    if settings.channels is not None:
        mean, std, given_mean, given_std = (
            column[[*settings.channels]] for column in (mean, std, given_mean, given_std)
        )
    step = 0.1 * std
    if not bool((((given_mean - mean).abs() > step) | ((given_std - std).abs() > step)).any()):
        return None
    columns = (mean, std, given_mean, given_std)
    texts = [", ".join(f"{number:.4g}" for number in column[:_SHOWN]) for column in columns]
    return (
        f'the checkpoint is of a run in mode "{saved.mode}" with mean ({texts[0]}) and std ({texts[1]}); mode "fixed" '
        f"uses its constants alone: mean ({texts[2]}) and std ({texts[3]}). The network was trained on other input"
    )


def _at_least_float32(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


_NAMES = {Kind.UINT8: "uint8", Kind.INTEGER: "integers", Kind.FLOAT: "floating-point numbers"}


def _indices(marked: Tensor) -> list[int]:
    return [int(channel) for channel in marked.nonzero().flatten()]


def _listed(channels: list[int]) -> str:
    """Write a list of channels, cut after 8."""
    more = f" and {len(channels) - _SHOWN} more" if len(channels) > _SHOWN else ""
    return f"{channels[:_SHOWN]}{more}"
