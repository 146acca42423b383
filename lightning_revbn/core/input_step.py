"""Measures, learns and standardises a training batch of bytes in a single compiled graph.

On an accelerator the arithmetic on `(C,)` vectors of float64 takes longer than the bytes of a batch, since each of its
hundred operations starts a kernel. `torch.compile` makes a few kernels of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_revbn.core.channel_view import by_memory, dense
from lightning_revbn.core.compiled import compile_once
from lightning_revbn.core.estimators import Estimate, Estimator
from lightning_revbn.core.fixed_normalizer import standardize_in_one_kernel
from lightning_revbn.core.global_moments import GlobalBatch, count_samples
from lightning_revbn.core.input_settings import InputNorm
from lightning_revbn.core.input_statistics import LearnedStatistics
from lightning_revbn.core.input_transform import InputTransform
from lightning_revbn.core.integer_sums import byte_sums, moments_of_sums
from lightning_revbn.core.moments import Kind, Moments

__all__ = ["fits_one_graph", "learn_and_standardize"]


_WITHOUT = {"cpu", "mps"}
"""Devices without this graph: a CPU launches nothing, and is faster with a graph for each pass; mps has no float64."""


def fits_one_graph(values: Tensor, mask: Tensor | None, settings: InputNorm, kind: Kind) -> bool:
    """Tell whether `learn_and_standardize` takes this part of a batch.

    It takes bytes that all count and cannot have a fault, so that the host need not read anything.

    Args:
        values: Raw values.
        mask: Their mask.
        settings: The settings.
        kind: The kind of the earlier batches; unknown before the first, whose faults the host reads.

    Returns:
        True if so.
    """
    return (
        settings.compile
        and mask is None
        and not settings.nodata_values
        and settings.channels is None
        and values.dtype in (torch.uint8, torch.int8)
        and values.device.type not in _WITHOUT
        and Kind.of(values) is kind is not Kind.UNKNOWN
    )


def learn_and_standardize(
    values: Tensor,
    learned: LearnedStatistics,
    settings: InputNorm,
    estimator: Estimator,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, LearnedStatistics, InputTransform]:
    """Add a training batch of this process to the statistics, and standardise it by the statistics of the mode.

    Args:
        values: Raw values that `fits_one_graph` accepts.
        learned: The statistics of the earlier batches, on the device of the values.
        settings: The settings.
        estimator: The estimator of their mode.
        scale: The number that standardised values are multiplied by.
        dtype: The dtype of the result.

    Returns:
        The standardised values, in the shape and memory format of `values`; the statistics with this batch; and the
        transform of this batch. All equal the results without a graph to the bit, unless the compiler of an accelerator
        joins a product and a sum of float64, which are then rounded once rather than twice.
    """
    values, graph = dense(values), compile_once(_graph)
    # The graph gets a table in the order of memory: a graph for sizes that change cannot sort their strides. So images
    # and tables in all memory formats share compiled versions.
    table, samples = by_memory(values, settings.channel_dim), count_samples(values, settings.channel_dim)
    with torch.no_grad():
        result, tensors, estimate = graph(
            table, samples, learned.tensors(), learned.kind, settings, estimator, scale, dtype
        )
    transform = InputTransform(settings, scale, Estimate(*estimate))
    result = result.reshape(-1).as_strided(values.shape, values.stride())
    return result, learned.with_tensors(*tensors), transform


def _graph(
    table: Tensor,
    samples: int,
    learned: tuple[Tensor, ...],
    kind: Kind,
    settings: InputNorm,
    estimator: Estimator,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the results of `learn_and_standardize` as tensors, for bytes of shape `(outer, C, inner)`."""
    before = LearnedStatistics(kind, Moments(*learned[:4]), Moments(*learned[4:8]), learned[8])
    moments = Moments(*moments_of_sums(*byte_sums(table)))
    added = torch.full_like(before.samples, samples)
    batch = GlobalBatch(moments, kind, added, faults=torch.zeros_like(added))
    after = before.add(batch, estimator.momentum)
    estimate = estimator.estimate(after, settings.unit(kind), moments)
    assert estimate is not None  # there are statistics now
    constants = InputTransform(settings, scale, estimate).constants_for(table, is_traced=True)
    columns = constants.mean, constants.rest, constants.gain, constants.bound
    return standardize_in_one_kernel(table, *columns, 1, dtype), after.tensors(), tuple(estimate)
