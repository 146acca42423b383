"""The plugin that synchronises batch norm layers while the Trainer fits, and checks of `sync_batchnorm=True`."""

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

    Use it instead of `sync_batchnorm=True`, whose `SyncBatchNorm` layers drop the extras of batch norm's subclasses:
    activation, dropout and auxiliary layers of timm, hooks, overridden methods. The plugin works on CPUs and is undone
    after the fit, and checkpoints equal the checkpoints of a run without it. The layers that are synchronised are
    listed in `lightning_revbn.core.batch_norm_sync.synchronize_batch_norms`. Like `sync_batchnorm`, the plugin has an
    effect under the strategies of Lightning that apply layer synchronisation, which are DDP and FSDP. With other
    strategies, call that function in `configure_model`.

    Args:
        process_group: The ranks that share a batch; None is the default group. Or a function that makes the group,
            called on every rank once the ranks can communicate.
        exclude: `fnmatch` patterns for dotted names of layers to leave alone.

    Raises:
        TypeError: If a pattern is not a string.

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
            The same model.

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
            The same model.
        """
        return restore_batch_norms(model)


def refuse_damage(strategy: Strategy, model: nn.Module) -> None:
    """Refuse a conversion to torch's SyncBatchNorm in which layers would lose behaviour.

    Args:
        strategy: The Trainer's strategy.
        model: The LightningModule.

    Raises:
        MisconfigurationException: If layers would lose behaviour; the message names them and the remedy.
    """
    plugin = layer_sync(strategy)
    # A subclass of TorchSyncBatchNorm with its own `apply` may convert without a loss.
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
    """Warn if the user asked for layer synchronisation and the strategy silently ignores it.

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
    # DeepSpeed and XLA derive from DDP, but their own setup does not apply layer synchronisation.
    ignoring = (ModelParallelStrategy, DeepSpeedStrategy, XLAStrategy)
    return any(isinstance(strategy, twins(kind)) for kind in ignoring)
