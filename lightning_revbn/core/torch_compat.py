"""Every private name of torch that this package uses, each with the loss if a version of torch lacks the name."""

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
"""The base of torch's batch norm classes and no others. Without it, no layer is recognised, so nothing here works."""

WRAPPER_LEVELS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Levels that `torch.compile`, FSDP1 and activation checkpointing put into the path of a module.

If a version renames a level, the level stays in the names of layers. Then patterns on full names do not match a wrapped
model, and a checkpoint of a wrapped model does not fit a model that is not wrapped.
"""

STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
"""Attributes that hold an optimizer's step hooks.

If a version renames them, an optimizer whose step calls its base's step passes the view to the hooks of the inner step:
the groups of the view are divided.
"""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_functorch_wrapped(tensor: Tensor) -> bool:
    """Tell whether a tensor is a wrapper of `torch.func`, which has no values of its own to read.

    Without torch's function, every tensor counts as plain. A model trains as before; only a
    `BatchNormMonitor(activations=True)` around a transform of `torch.func` fails when it reads the values.

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

    Without torch's function, the second run counts too: in the metrics over all layers, checkpointed layers weigh
    twice.

    Returns:
        Whether they are.
    """
    task: Callable[[], int] | None = getattr(cast("Any", torch)._C, "_current_graph_task_id", None)
    return task is not None and task() != -1


def runs_step_hooks(optimizer: Optimizer) -> bool:
    """Tell whether an optimizer's `step()` runs the hooks that are registered for it.

    torch marks the step when the first optimizer of a class calls `Optimizer.__init__`. Without the mark, no optimizer
    gets a `ScaleUpdateRule`: in an optimizer that runs no hooks, the rule would silently do nothing.

    Args:
        optimizer: The optimizer.

    Returns:
        True for every optimizer that has called `Optimizer.__init__`.
    """
    return bool(getattr(type(optimizer).step, "hooked", False))


def step_pre_hooks(optimizer: Optimizer) -> list[Callable[..., Any]]:
    """List the hooks that run before an optimizer's step, among them the hook of a `ScaleUpdateRule`.

    Without torch's attribute, no rule is found: the first step with a second rule on an optimizer is refused, and the
    learning rate of the scales is logged as it stands in the groups.

    Args:
        optimizer: The optimizer, or the object that Lightning hands out in its place.

    Returns:
        The hooks in the order in which they run.
    """
    hooks: dict[int, Callable[..., Any]] = getattr(optimizer, STEP_HOOKS[0], {})
    return list(hooks.values())


def forward_pre_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """List the hooks that run before a module's forward pass, among them the hook that writes a lazy layer.

    Without torch's attribute, this hook cannot be removed: a lazy layer would be written even if the user decides to
    leave it alone after a first look.

    Args:
        module: The module.

    Returns:
        The hooks in the order in which they run.
    """
    hooks: dict[int, Callable[..., Any]] = vars(module).get("_forward_pre_hooks", {})
    return list(hooks.values())


def has_hooks(module: nn.Module) -> bool:
    """Tell whether a module has forward or backward hooks, which torch's converter to `SyncBatchNorm` drops.

    Without torch's attributes, the warning about the converter does not name hooks.

    Args:
        module: The module.

    Returns:
        True if so.
    """
    return any(vars(module).get(name) for name in _HOOKS)


def version_of(tensor: Tensor) -> int | None:
    """Count the changes of a tensor in place, as far as torch counts them: its fused optimizers do not.

    Without torch's count, and for tensors made in inference mode, no change is seen. Then an update that did not read
    its groups is found by the values, a step later.

    Args:
        tensor: The tensor.

    Returns:
        The count, or None if torch keeps none.
    """
    try:
        return tensor._version
    except (AttributeError, RuntimeError):  # tensors made in inference mode raise a RuntimeError
        return None


def default_store() -> dist.Store | None:
    """Return the key-value store of the default process group.

    Without torch's function, the settings of ranks are not compared: ranks that train with different settings diverge,
    or wait for each other, as they do without this package.

    Returns:
        The store; None without a process group, and for a backend without a store (MPI).
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    get: Callable[[], dist.Store | None] | None = getattr(dist.distributed_c10d, "_get_default_store", None)
    return None if get is None else get()
