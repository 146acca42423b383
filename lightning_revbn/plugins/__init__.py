"""Lightning plugins: thin, the work is done in `lightning_revbn.core`."""

from lightning_revbn.plugins.batch_norm_sync import BatchNormSync

__all__ = ["BatchNormSync"]
