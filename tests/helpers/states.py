"""Compares nested states, as checkpoints hold them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def same(left: Any, right: Any) -> bool:
    """Return whether two nested states are equal to the bit."""
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)
