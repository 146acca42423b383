"""Computes batch norm over the batch of several ranks: running statistics, output and gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_revbn.core.moments import Moments

__all__ = ["global_batch_norm", "ranks_in", "refuse_single_values", "update_running"]


def ranks_in(group: Any) -> int:
    """Return how many ranks share a batch: 1 without a process group, and for a process that is not in it.

    Args:
        group: The process group; None is the default group.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return max(1, torch.distributed.get_world_size(group))


def refuse_single_values(values: Tensor, batch: Moments) -> None:
    """Raise, as torch does, if the batch of all ranks has a single value per channel, which has no variance.

    Args:
        values: This rank's values, shape `(N, C, *)`.
        batch: The moments of the values of all ranks.

    Raises:
        ValueError: If so, on every rank.
    """
    # A rank with two values knows the answer. So the host waits for an accelerator only on ranks with fewer values.
    if values.numel() <= values.shape[1] and bool((batch.count == 1).any()):
        raise ValueError(
            "Expected more than 1 value per channel when training, got a single value on all ranks together; this rank "
            f"has input size {tuple(values.shape)}. Leave out the last, smaller batch (drop_last=True)"
        )


@torch.no_grad()
def update_running(running_mean: Tensor, running_var: Tensor, batch: Moments, momentum: float) -> None:
    """Add a batch to running statistics as torch does, with its unbiased variance; an empty batch changes nothing.

    Args:
        running_mean: Shape `(C,)`, changed in place.
        running_var: Shape `(C,)`, changed in place.
        batch: The moments of the batch of all ranks.
        momentum: Weight of the batch.
    """
    # torch too keeps the unbiased variance, although it normalises the batch by the biased variance.
    unbiased = batch.m2 / (batch.count - 1).clamp(min=1)
    for running, newest in ((running_mean, batch.mean), (running_var, unbiased)):
        running.copy_(torch.where(batch.count > 0, torch.lerp(running.double(), newest, momentum), running))


def global_batch_norm(
    values: Tensor, batch: Moments, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any
) -> Tensor:
    """Apply batch norm to a rank's part of a batch, by the moments of the whole batch.

    The gradient of the values has parts from all ranks: a collective backwards, if the values need a gradient. The
    gradients of scale and shift are this rank's part of the sum, as data parallel training expects.

    Args:
        values: This rank's values, shape `(N, C, *)`; N may be 0.
        batch: The moments of the values of all ranks.
        weight: The scale, shape `(C,)`, or None.
        bias: The shift, shape `(C,)`, or None.
        eps: Added to the variance.
        group: The process group; None is the default group.

    Returns:
        The output, with the shape and dtype of the values; computed in float32 or better.
    """
    constants = (batch.mean, (batch.variance + eps).rsqrt(), batch.count)
    output: Tensor = _GlobalBatchNorm.apply(values, weight, bias, *constants, group)  # pyright: ignore[reportUnknownMemberType, reportAssignmentType] # torch does not type it
    return output


class _GlobalBatchNorm(torch.autograd.Function):
    """Batch norm with mean and variance of several ranks; its gradient has parts from all ranks."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        values, weight, bias, mean, invstd, count, group = args
        # `backward` computes x_hat again: keeping it would take twice the memory of values in half precision.
        ctx.save_for_backward(values, weight, mean, invstd, count)
        ctx.group = group
        output = _x_hat(values, weight, mean, invstd)
        for parameter, combine in ((weight, output.mul_), (bias, output.add_)):
            if parameter is not None:
                combine(_by_channel(parameter, output))
        return output.to(values.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] # by the decorator's types
        values, weight, mean, invstd, count = ctx.saved_tensors
        x_hat = _x_hat(values, weight, mean, invstd)
        grad: Tensor = grads[0].to(x_hat.dtype)
        dims = [dim for dim in range(grad.dim()) if dim != 1]
        sums = torch.stack([part.sum(dims, dtype=torch.float64) for part in (grad, grad * x_hat)])
        parameter = grad.dtype if weight is None else weight.dtype
        grad_weight, grad_bias = sums[1].to(parameter), sums[0].to(parameter)
        grad_values = None
        if ctx.needs_input_grad[0]:
            # The gradients of parameters in float64 are views of `sums`, and must stay this rank's part.
            total = sums.clone()
            torch.distributed.all_reduce(total, group=ctx.group)  # pyright: ignore[reportUnknownMemberType] # torch does not type it
            # Mean and variance depend on the values of every rank, so the gradients of all ranks contribute:
            # d values = (grad - mean(grad) - x_hat * mean(grad * x_hat)) * scale / std, means over the whole batch.
            # All ranks together may have no values.
            means = total / count.clamp(min=1)
            centred = grad - _by_channel(means[0], grad) - x_hat.mul_(_by_channel(means[1], grad))
            slope = invstd if weight is None else weight * invstd
            grad_values = centred.mul_(_by_channel(slope, grad)).to(values.dtype)
        needed = ctx.needs_input_grad
        return grad_values, grad_weight if needed[1] else None, grad_bias if needed[2] else None, None, None, None, None


def _x_hat(values: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor) -> Tensor:
    """Return the normalised values, a new tensor in the best precision of values, scale and float32."""
    work = torch.promote_types(values.dtype, torch.float32 if weight is None else weight.dtype)
    work = torch.promote_types(work, torch.float32)
    x_hat = values.to(work) - _by_channel(mean, values, work)
    x_hat.sub_(_by_channel(mean - mean.to(work), values, work))  # the part that the mean lost by rounding
    return x_hat.mul_(_by_channel(invstd, values, work))


def _by_channel(vector: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Reshape a vector of shape `(C,)` to broadcast over `(N, C, *)`."""
    return vector.to(dtype or like.dtype).view([1, -1] + [1] * (like.dim() - 2))
