"""Tensors of every layout and dtype, and their values channel by channel in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

SHAPES = [
    ((5, 3, 17, 19), 1),
    ((5, 17, 19, 3), -1),
    ((1000, 20), 1),
    ((7, 4, 10), 1),
    ((3, 50), 0),
    ((300, 5, 3), 2),
    ((6,), 0),
    ((9, 70), None),
    ((2, 3, 2, 4, 5), -4),
    ((1, 3, 1300, 1000), 1),  # several pieces per row
]


def sample(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return 3 * torch.randn(shape, generator=generator, dtype=dtype) + 5
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.3
    info = torch.iinfo(dtype)
    least, greatest = max(info.min, -30_000), min(info.max, 30_000)
    return torch.randint(least, greatest + 1, shape, generator=generator).to(dtype)


def by_channel(values: Tensor, channel_dim: int | None) -> Any:
    """Return a row of values for each channel."""
    array = values.to(torch.float64 if values.is_floating_point() else torch.int64).numpy()
    if channel_dim is None:
        return array.reshape(1, -1)
    return np.moveaxis(array, channel_dim, 0).reshape(array.shape[channel_dim], -1)
