"""Every private name of torch that this package uses, each with what is lost where a version of torch lacks it."""

# pyright: reportPrivateImportUsage=false
# torch.distributed is the documented home of Store, which it re-exports without saying so.

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import batchnorm
from torch.optim import Optimizer

__all__ = [
    "STEP_HOOKS",
    "WRAPPER_LEVELS",
    "BatchNormBase",
    "default_store",
    "forward_pre_hooks",
    "has_hooks",
    "is_functorch_wrapped",
    "is_in_backward",
    "runs_step_hooks",
    "step_pre_hooks",
    "version_of",
]

BatchNormBase = batchnorm._BatchNorm  # pyright: ignore[reportPrivateUsage] # no public name
"""The base of torch's batch norm classes and no others. Without it no layer is recognised, so nothing here works."""

WRAPPER_LEVELS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Levels that `torch.compile`, FSDP1 and activation checkpointing put into the path of a module.

Where a version calls a level otherwise, the level stays in the names of layers: patterns on full names do not match a
wrapped model, and a checkpoint of one does not fit a model that is not wrapped.
"""

STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
"""Attributes that hold an optimizer's step hooks.

Where a version calls them otherwise, an optimizer whose step calls its base's step hands hooks of that inner step the
object that it runs on itself, with groups in which scales stand apart.
"""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_functorch_wrapped(tensor: Tensor) -> bool:
    """Tell whether a tensor is a wrapper of `torch.func`, which has no values of its own to read.

    Without torch's name for this question every tensor counts as a plain one. A model trains as before; only a
    `BatchNormMonitor(activations=True)` around a transform of `torch.func` fails where it reads the values.

    Args:
        tensor: Any tensor.

    Returns:
        True inside `vmap`, `grad` and the like.
    """
    functorch = getattr(cast("Any", torch)._C, "_functorch", None)
    is_wrapped: Callable[[Tensor], bool] | None = getattr(functorch, "is_functorch_wrapped_tensor", None)
    return is_wrapped is not None and bool(is_wrapped(tensor))


def is_in_backward() -> bool:
    """Tell whether gradients are being computed in this thread, as when gradient checkpointing runs a forward again.

    Without torch's name for this question the second run counts too: in the metrics over all layers, layers that are
    checkpointed weigh twice.

    Returns:
        Whether they are.
    """
    task: Callable[[], int] | None = getattr(cast("Any", torch)._C, "_current_graph_task_id", None)
    return task is not None and task() != -1


def runs_step_hooks(optimizer: Optimizer) -> bool:
    """Tell whether an optimizer's `step()` runs the hooks that are registered for it.

    torch marks the step when the first optimizer of a class calls `Optimizer.__init__`. Without the mark no optimizer
    gets a `ScaleUpdateRule`: in an optimizer that runs no hooks the rule would do nothing, and nothing would say so.

    Args:
        optimizer: The optimizer.

    Returns:
        True for every optimizer that has called `Optimizer.__init__`.
    """
    return bool(getattr(type(optimizer).step, "hooked", False))


def step_pre_hooks(optimizer: Optimizer) -> list[Callable[..., Any]]:
    """List the hooks that run before an optimizer's step, by which a `ScaleUpdateRule` is found.

    Without torch's name for them no rule is found: the first step with a second rule on one optimizer is refused, and
    the learning rate of the scales is logged as it stands in the groups.

    Args:
        optimizer: The optimizer, or what Lightning hands out in its place.

    Returns:
        The hooks in the order in which they run.
    """
    hooks: dict[int, Callable[..., Any]] = getattr(optimizer, STEP_HOOKS[0], {})
    return list(hooks.values())


def forward_pre_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """List the hooks that run before a module's forward pass, among them the order to write a lazy layer.

    Without torch's name for them such an order cannot be taken back: a lazy layer would be written that the user has
    decided to leave alone after a first look.

    Args:
        module: The module.

    Returns:
        The hooks in the order in which they run.
    """
    hooks: dict[int, Callable[..., Any]] = vars(module).get("_forward_pre_hooks", {})
    return list(hooks.values())


def has_hooks(module: nn.Module) -> bool:
    """Tell whether a module has forward or backward hooks, which torch's converter to `SyncBatchNorm` drops.

    Without torch's names for them the warning of what the converter drops does not name hooks.

    Args:
        module: The module.

    Returns:
        True if so.
    """
    return any(vars(module).get(name) for name in _HOOKS)


def version_of(tensor: Tensor) -> int | None:
    """Count the changes of a tensor in place, as far as torch counts them: its fused optimizers do not.

    Without torch's name for the count, and for tensors made in inference mode, no change is seen. An update that did
    not read its groups is then told by the values, one step later.

    Args:
        tensor: The tensor.

    Returns:
        The count, or None where there is none.
    """
    try:
        return tensor._version
    except (AttributeError, RuntimeError):
        return None


def default_store() -> dist.Store | None:
    """Return the key-value store of the default process group.

    Without torch's name for it the settings of ranks are not compared: ranks that train with different settings
    diverge, or wait for each other, as they do without this package.

    Returns:
        The store; None without a process group, and for a backend without a store (MPI).
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    get: Callable[[], dist.Store | None] | None = getattr(dist.distributed_c10d, "_get_default_store", None)
    return None if get is None else get()
