"""The only module that uses Lightning's private names, or code that differs by its version or its two packages.

Lightning is published as `lightning.pytorch` and as `pytorch_lightning`, whose classes share no base. Any release may
drop a private name. A fit that can do without the name goes on, and warns of the missing name:

| private name of Lightning | without it |
|---|---|
| `epoch_loop._batches_that_stepped` | steps are counted by `trainer.global_step` |
| `_logger_connector.should_update_logs` | a step is logged if `log_every_n_steps` divides its number |
| `epoch_loop._should_accumulate` | `accumulate_grad_batches` tells which batches are accumulated |
| `module._current_fx_name` | a batch that equals `example_input_array` is taken for the example |
| `strategy._layer_sync` | `sync_batchnorm` and `BatchNormSync` are not checked |
| the live dicts `callback_metrics`, `progress_bar_metrics` | callbacks and the progress bar do not see the metrics |

`launcher` and the parsers of LightningCLI are reached only by public names.
"""

# pyright: reportPrivateImportUsage=false
# Lightning documents these modules for these names, but does not mark the names as re-exported.

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, strategies
from lightning.pytorch.plugins import LayerSync
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from lightning.pytorch.utilities import exceptions, rank_zero
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

__all__ = [
    "END_OF_SETUP",
    "MisconfigurationException",
    "XLAStrategy",
    "accumulates",
    "adopt",
    "callbacks_of",
    "is_example",
    "is_logging_step",
    "layer_sync",
    "logs_hyperparameters",
    "overrides",
    "publish",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "stepped_batches",
    "twins",
]

MisconfigurationException = exceptions.MisconfigurationException
XLAStrategy = strategies.XLAStrategy
rank_zero_info = rank_zero.rank_zero_info
rank_zero_only = rank_zero.rank_zero_only
rank_zero_warn = rank_zero.rank_zero_warn

END_OF_SETUP = "post_setup"
"""The barrier after the setup of callbacks and modules; without this name, ranks are not compared."""

_GONE = object()
_warned: set[str] = set()


def twins(kind: type) -> tuple[type, ...]:
    """Return a class of `lightning.pytorch`, and its copy in `pytorch_lightning` if that is imported: for `isinstance`.

    Args:
        kind: The class.

    Returns:
        A tuple of the class, and of the copy if there is a copy; `pytorch_lightning` itself is never imported here.
    """
    module = sys.modules.get(kind.__module__.replace("lightning.pytorch", "pytorch_lightning", 1))
    copy = getattr(module, kind.__name__, kind)
    return (kind,) if copy is kind else (kind, copy)


def overrides(hook: str, module: object) -> bool:
    """Tell whether a LightningModule of either package overrides a hook.

    Args:
        hook: Name of the method.
        module: The module.

    Returns:
        Whether it overrides the hook.
    """
    parent = next((kind for kind in twins(LightningModule) if isinstance(module, kind)), LightningModule)
    return is_overridden(hook, module, parent)


def adopt(kind: type[Callback]) -> None:
    """Make a callback also a `pytorch_lightning.Callback`, if `pytorch_lightning` is in use, for its LightningCLI.

    A Trainer accepts any object with a callback's methods; LightningCLI checks the class. Methods of
    `lightning.pytorch` still come first.

    Args:
        kind: A class derived from `lightning.pytorch.Callback`.
    """
    copy = twins(Callback)[-1]
    if not issubclass(kind, copy):
        kind.__bases__ = (*kind.__bases__, copy)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the callbacks of a Trainer.

    Args:
        trainer: The Trainer.

    Returns:
        The Trainer's own list, in the order in which the callbacks are called.
    """
    return getattr(trainer, "callbacks")  # noqa: B009 # a connector sets it, so type checkers do not know it


def stepped_batches(trainer: Trainer) -> int:
    """Return the number of batches that ended in an optimizer step: the step axis of Lightning's loggers.

    Args:
        trainer: The Trainer, in a fit.

    Returns:
        The number; `global_step` counts the steps of every optimizer, so it is larger with several optimizers.
    """
    count = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", _GONE)
    if isinstance(count, int):
        return count
    _warn_without("_batches_that_stepped", "steps of batch norm metrics are counted by trainer.global_step")
    return trainer.global_step // max(1, len(trainer.optimizers))


def is_logging_step(trainer: Trainer) -> bool:
    """Tell whether Lightning logs at the present step.

    Args:
        trainer: The Trainer, in a fit, before or in a batch.

    Returns:
        Whether Lightning logs.
    """
    wanted = getattr(getattr(trainer, "_logger_connector", None), "should_update_logs", _GONE)
    if wanted is not _GONE:
        return bool(wanted)
    _warn_without("should_update_logs", "batch norm metrics are logged every log_every_n_steps steps")
    every: int = getattr(trainer, "log_every_n_steps", 50)  # Lightning's own default
    return bool(every) and ((stepped_batches(trainer) + 1) % every == 0 or trainer.should_stop)


def accumulates(trainer: Trainer, batch_idx: int) -> bool:
    """Tell whether no optimizer step follows the present batch, because gradients accumulate over several batches.

    Args:
        trainer: The Trainer, in a fit, after a batch.
        batch_idx: Index of the batch in its epoch.

    Returns:
        Whether gradients accumulate.
    """
    ask: Any = getattr(trainer.fit_loop.epoch_loop, "_should_accumulate", None)
    if ask is not None:
        return bool(ask())
    _warn_without("_should_accumulate", "accumulate_grad_batches alone tells which batches share an optimizer step")
    return (batch_idx + 1) % trainer.accumulate_grad_batches != 0 and not trainer.is_last_batch


def is_example(module: LightningModule, batch: Any) -> bool:
    """Tell whether a batch is an example input.

    Lightning also sends example inputs through batch hooks: for summaries, graphs and exports, on rank 0 only.

    Args:
        module: The LightningModule.
        batch: The batch that a hook received.

    Returns:
        Whether it is an example input.
    """
    hook = getattr(module, "_current_fx_name", _GONE)
    if hook is not _GONE:
        return hook != "batch_to_device"  # a loop passes its batches only in this hook
    _warn_without("_current_fx_name", "a batch counts as the example input if it equals example_input_array")
    example: Any = getattr(module, "example_input_array", None)
    return (
        isinstance(example, Tensor)
        and isinstance(batch, Tensor)
        and example.shape == batch.shape
        and torch.equal(example.to(batch), batch)
    )


def layer_sync(strategy: Strategy) -> LayerSync | None:
    """Return the plugin that synchronises batch norm layers.

    Args:
        strategy: The Trainer's strategy.

    Returns:
        The plugin, or None.
    """
    plugin = getattr(strategy, "_layer_sync", _GONE)
    if plugin is not _GONE:
        return plugin  # pyright: ignore[reportReturnType] # not typed
    if isinstance(strategy, twins(ParallelStrategy)):
        _warn_without("_layer_sync", "whether sync_batchnorm or BatchNormSync suit the model is not checked")
    return None


def logs_hyperparameters(trainer: Trainer) -> bool:
    """Tell whether the user wants hyperparameters in the logs.

    Args:
        trainer: The Trainer.

    Returns:
        True unless `enable_autolog_hparams` is off; Lightning 2.5.0 does not have this switch.
    """
    return bool(getattr(trainer, "enable_autolog_hparams", True))


def publish(trainer: Trainer, metrics: Mapping[str, float], *, in_progress_bar: Collection[str] = ()) -> None:
    """Show metrics to other callbacks, such as ModelCheckpoint and EarlyStopping.

    Args:
        trainer: The Trainer.
        metrics: Values by key.
        in_progress_bar: Keys of the metrics that the progress bar shows too, rounded to four digits.
    """
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in metrics.items()})
    # callback_metrics is a property: if it returns a copy, the update above is lost.
    if metrics.keys() - trainer.callback_metrics.keys():
        _warn_without("a live callback_metrics", "callbacks cannot monitor batch norm metrics")
    if in_progress_bar:
        trainer.progress_bar_metrics.update({key: float(f"{metrics[key]:.4g}") for key in in_progress_bar})
        if {*in_progress_bar} - trainer.progress_bar_metrics.keys():
            _warn_without("live progress_bar_metrics", "the progress bar does not show batch norm metrics")


def _warn_without(name: str, instead: str) -> None:
    """Warn once per process that a private name is gone from Lightning."""
    if name not in _warned:
        _warned.add(name)
        rank_zero_warn(f"this version of Lightning has no {name}: {instead}. Please report it to lightning-revbn")
