"""The paper's front layer: batch norm of the network's input, with a trainable scale and no shift."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from typing_extensions import Self, override

from lightning_revbn.core.arguments import as_integer, as_number
from lightning_revbn.core.global_batch_norm import (
    global_batch_norm,
    ranks_in,
    refuse_single_values,
    update_running,
)
from lightning_revbn.core.global_moments import global_moments
from lightning_revbn.core.moments import Kind

__all__ = ["InputBatchNorm"]


class InputBatchNorm(nn.Module):
    """Normalise the input of a network by its batch, and multiply by a trainable scale (arXiv 2110.13989).

    This is the front layer of the paper. Its scale starts at g * 0.58, where the other batch norm layers start at g,
    and learns at lr / c as theirs do. Its shift is fixed at 0, and `bias` is a buffer.

    On one process its output, gradients and running statistics equal `torch.nn.BatchNorm2d` to the bit, and its
    `state_dict` has the same names. Where a process group is initialised, training normalises by the batch of all
    ranks, also on CPUs, with one collective forwards, and one backwards if the input needs a gradient. The class does
    not derive from torch's batch norm, so `sync_batchnorm=True` leaves the layer alone.

    uint8 input is divided by 255. Running statistics stay in float32 when the layer is converted to half precision.

    `OnlineInputNormMixin` needs no layer in the model, costs less and works under FSDP, but its scale is not trained.

    Args:
        num_features: Number of channels C of inputs of shape `(N, C, *)`.
        scale: The value at which the scale (`weight`) starts, above 0.
        eps: Added to the variance; the default suits data in [0, 1].
        momentum: Weight of the newest batch in the running statistics.
        process_group: The ranks that share a batch; None is the default group.

    Raises:
        ValueError: If `num_features` or `scale` is not positive.

    Example:
        >>> layer = InputBatchNorm(3, scale=0.1 * 0.58)
        >>> output = layer(torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8))
        >>> round(output.std(correction=0).item(), 3), [name for name, _ in layer.named_parameters()]
        (0.058, ['weight'])
    """

    weight: nn.Parameter
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        scale: float = 0.1 * 0.58,
        eps: float = 1e-5,
        momentum: float = 0.1,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        channels, start = as_integer(num_features), as_number(scale)
        if channels is None or channels < 1:
            raise ValueError(f"num_features={num_features!r} must be the number of channels, 1 or more")
        if start is None or not start > 0:
            raise ValueError(
                f"scale={scale!r} must be above 0; the paper uses 0.58 times the scale of the other layers"
            )
        self.num_features = channels
        self.scale = start
        self.eps = float(eps)
        self.momentum = float(momentum)
        self.process_group = process_group
        self.weight = nn.Parameter(torch.full((channels,), start))
        # The shift is fixed at 0, so it is not a parameter; as a buffer it keeps the name that BatchNorm2d gives it.
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise a batch.

        Args:
            inputs: Shape `(N, C, *)`; uint8, or floating-point values.

        Returns:
            The normalised values, of the same shape; for uint8 in the dtype of the running statistics, float32.

        Raises:
            ValueError: If the input has fewer than 2 dimensions or other channels, or a training batch has a single
                value per channel.
        """
        if inputs.dim() < 2 or inputs.shape[1] != self.num_features:
            raise ValueError(
                f"InputBatchNorm({self.num_features}) takes inputs of shape (N, {self.num_features}, *), "
                f"got {tuple(inputs.shape)}"
            )
        values = inputs.to(self.running_mean.dtype).div_(255) if inputs.dtype == torch.uint8 else inputs
        if self.training:
            self.num_batches_tracked.add_(1)
            ranks = ranks_in(self.process_group)
            if ranks > 1:
                return self._synchronized(inputs, values, ranks)
        weight, bias = self.weight.to(self.running_mean.dtype), self.bias.to(self.running_mean.dtype)
        return batch_norm(
            values, self.running_mean, self.running_var, weight, bias, self.training, self.momentum, self.eps
        )

    @override
    def extra_repr(self) -> str:
        return f"{self.num_features}, scale={self.scale:g}, eps={self.eps}, momentum={self.momentum}"

    def _synchronized(self, inputs: Tensor, values: Tensor, ranks: int) -> Tensor:
        """Normalise by the batch of all ranks, and update the running statistics by it."""
        unit, kind = (255.0, Kind.UINT8) if inputs.dtype == torch.uint8 else (1.0, Kind.FLOAT)
        batch = global_moments(inputs.detach(), kind=kind, group=self.process_group, ranks=ranks)
        refuse_single_values(inputs, batch.moments)
        moments = batch.moments.scaled(unit)
        update_running(self.running_mean, self.running_var, moments, self.momentum)
        weight, bias = self.weight.to(self.running_mean.dtype), self.bias.to(self.running_mean.dtype)
        return global_batch_norm(values, moments, weight, bias, self.eps, self.process_group)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep the running statistics in float32 where all other tensors become half precision."""
        # `half`, `to` and all other conversions end in this private method; torch has no public hook for a tensor.
        kept = {name: getattr(self, name) for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)  # pyright: ignore[reportUnknownMemberType] # torch does not type it
        for name, before in kept.items():
            moved: Tensor = getattr(self, name)
            if moved.dtype.itemsize < 4 <= before.dtype.itemsize:
                setattr(self, name, before.to(moved.device))
        return self
