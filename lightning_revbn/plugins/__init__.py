"""Lightning plugins: thin wrappers of functions in `lightning_revbn.core`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_revbn.plugins.batch_norm_sync import BatchNormSync

__all__ = ["BatchNormSync"]


def __getattr__(name: str) -> object:
    if name != "BatchNormSync":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lightning_revbn.plugins.batch_norm_sync import BatchNormSync  # imported on use: it needs Lightning

    return BatchNormSync
