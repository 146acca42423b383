"""Finds the process group of the ranks that hold different parts of a batch."""

from __future__ import annotations

from typing import Any

import torch.distributed
from lightning.pytorch import Trainer

from lightning_revbn.lightning_compat import MisconfigurationException

__all__ = ["data_parallel_group"]


def data_parallel_group(trainer: Trainer | None) -> tuple[Any, int]:
    """Return the process group whose ranks hold different parts of a batch, and their number.

    Args:
        trainer: The Trainer. None takes all ranks of the default process group, which must be initialised.

    Returns:
        The group, None for the default group, and the number of its ranks.

    Raises:
        MisconfigurationException: If the strategy has several ranks without torch.distributed.
    """
    if trainer is None:
        return None, torch.distributed.get_world_size()
    if trainer.world_size == 1:
        return None, 1
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise MisconfigurationException(
            f"OnlineInputNormMixin needs torch.distributed to add up the statistics of {trainer.world_size} ranks, "
            f"which {type(trainer.strategy).__name__} does not use. Give constants with InputNorm(mode='fixed')"
        )
    # With tensor parallelism several ranks hold the same samples; the ranks of this dimension hold each sample once.
    mesh: Any = getattr(trainer.strategy, "device_mesh", None)
    if mesh is not None and "data_parallel" in (mesh.mesh_dim_names or ()):
        group = mesh["data_parallel"].get_group()
        return group, torch.distributed.get_world_size(group)
    return None, trainer.world_size
