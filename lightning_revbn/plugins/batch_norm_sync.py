"""The plugin: synchronises batch norm layers while the Trainer fits; and what to say of `sync_batchnorm=True`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

from lightning.pytorch.plugins import LayerSync, TorchSyncBatchNorm
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy
from torch import nn
from typing_extensions import override

from lightning_revbn.core.arguments import check_patterns
from lightning_revbn.core.batch_norm_sync import damaged_by_conversion, restore_batch_norms, synchronize_batch_norms
from lightning_revbn.lightning_compat import MisconfigurationException, XLAStrategy, layer_sync, rank_zero_warn, twins

__all__ = ["BatchNormSync", "refuse_damage", "warn_if_ignored"]

_SHOWN = 3


class BatchNormSync(LayerSync):
    """Normalise by the batch of all ranks while the Trainer fits, without replacing layers.

    In place of `sync_batchnorm=True`, whose `SyncBatchNorm` layers drop what subclasses of batch norm do (activation,
    dropout and auxiliary layers of timm's, hooks, overridden methods). Works on CPUs and is undone after the fit; the
    checkpoint is that of a run without it. See `lightning_revbn.core.batch_norm_sync.synchronize_batch_norms` for what
    is synchronised. Like `sync_batchnorm`, it has an effect under the strategies of Lightning that apply layer
    synchronisation, which are DDP and FSDP; with others, call that function in `configure_model`.

    Args:
        process_group: The ranks that share a batch; None is the default group. Or a function that makes the group,
            called on every rank once the ranks can communicate.
        exclude: `fnmatch` patterns on dotted names of layers to leave alone.

    Raises:
        TypeError: If a pattern is no string.

    Example::

        trainer = Trainer(strategy="ddp", devices=2, plugins=[BatchNormSync()])
    """

    def __init__(self, process_group: Callable[[], Any] | Any = None, exclude: Sequence[str] = ()) -> None:
        self.process_group = process_group
        self.exclude = check_patterns("exclude", exclude)

    @override
    def apply(self, model: nn.Module) -> nn.Module:
        """Synchronise the layers of a model; called by the strategy.

        Args:
            model: The LightningModule, changed in place.

        Returns:
            The same.

        Raises:
            MisconfigurationException: If a pattern of `exclude` matches no layer.
        """
        made = callable(self.process_group)
        group: Any = cast("Callable[[], Any]", self.process_group)() if made else self.process_group
        try:
            return synchronize_batch_norms(model, group, self.exclude)
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error

    @override
    def revert(self, model: nn.Module) -> nn.Module:
        """Undo `apply`; called by the strategy.

        Args:
            model: The LightningModule, changed in place.

        Returns:
            The same.
        """
        return restore_batch_norms(model)


def refuse_damage(strategy: Strategy, model: nn.Module) -> None:
    """Raise if the strategy is about to convert layers to torch's, and these would lose something.

    Args:
        strategy: The Trainer's strategy.
        model: The LightningModule.

    Raises:
        MisconfigurationException: If so, with the layers and the remedy.
    """
    plugin = layer_sync(strategy)
    converters: list[object] = [vars(kind)["apply"] for kind in twins(TorchSyncBatchNorm)]
    if _ignores_layer_sync(strategy) or inspect.getattr_static(plugin, "apply", None) not in converters:
        return
    damaged = damaged_by_conversion(model)
    if damaged:
        shown = [f"{name!r} ({losses})" for name, losses in list(damaged.items())[:_SHOWN]]
        more = [f"{len(damaged) - _SHOWN} more"] if len(damaged) > _SHOWN else []
        raise MisconfigurationException(
            f"sync_batchnorm=True puts torch's SyncBatchNorm in place of {len(damaged)} batch norm layers that do more "
            f"than it, and loses that: {', '.join(shown + more)}. Use Trainer(plugins=[BatchNormSync()]) from "
            f"lightning_revbn.plugins instead of sync_batchnorm=True; it leaves the layers as they are."
        )


def warn_if_ignored(strategy: Strategy) -> None:
    """Warn if layer synchronisation was asked for, and the strategy ignores it in silence.

    Args:
        strategy: The Trainer's strategy.
    """
    plugin = layer_sync(strategy)
    if plugin is not None and _ignores_layer_sync(strategy):
        asked = "sync_batchnorm=True" if isinstance(plugin, twins(TorchSyncBatchNorm)) else type(plugin).__name__
        rank_zero_warn(
            f"{type(strategy).__name__} ignores {asked}: each rank normalises by its own batch. To synchronise, call "
            f"lightning_revbn.core.batch_norm_sync.synchronize_batch_norms on the model in configure_model."
        )


def _ignores_layer_sync(strategy: Strategy) -> bool:
    # DeepSpeed and XLA derive from DDP, with a setup of their own.
    ignoring = (ModelParallelStrategy, DeepSpeedStrategy, XLAStrategy)
    return any(isinstance(strategy, twins(kind)) for kind in ignoring)
