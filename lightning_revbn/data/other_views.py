"""Finds tensors that look like the input and stay raw, such as the second view of a contrastive batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_revbn.core.batch_places import Place
from lightning_revbn.core.input_settings import InputNorm
from lightning_revbn.data.batches import tensors_in, usual_place

__all__ = ["on_other_views"]


def on_other_views(batch: Any, settings: InputNorm, *, is_training: bool) -> str | None:
    """Name the tensors of a batch that look like its input and stay raw.

    They have the dtype and shape of the input, or are crops of another size: images with the dtype, number of samples
    and channels of the input.

    Args:
        batch: The raw batch.
        settings: The settings of its single input. With a key, the user has decided which tensors stay raw.
        is_training: Whether it is a training batch.

    Returns:
        A text that names the places; None without such a tensor, or with a key.
    """
    key, _ = settings.places(is_training=is_training)
    if key is not None:
        return None
    place, found = usual_place(batch), dict(tensors_in(batch))
    values = found.pop(place, None)
    if values is None:
        return None
    others = [other for other, tensor in found.items() if _looks_like(tensor, values, settings.channel_dim)]
    if not others:
        return None
    argument = "key" if is_training else "eval_key"
    places: list[Place] = [place, *others]
    named, have = ", ".join(map(repr, others)), "has" if len(others) == 1 else "have"
    return (
        f"the input is at {place!r} of the batch ({values.dtype}, shape {tuple(values.shape)}), and {named} {have} the "
        f"same dtype and shape, or are images of another size: nothing normalises {named}. If these are views of the "
        f"input, give InputNorm({argument}={places!r}). If they are meant to stay raw, as targets of image to image "
        f"are, give InputNorm({argument}={place!r})"
    )


def _looks_like(other: Tensor, values: Tensor, channel_dim: int | None) -> bool:
    if other.dtype != values.dtype or other.dim() != values.dim():
        return False
    if other.shape == values.shape:
        return True
    if channel_dim is None or values.dim() <= max(3, channel_dim):
        return False
    return len(other) == len(values) and other.size(channel_dim) == values.size(channel_dim)
