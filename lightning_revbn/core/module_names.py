"""Builds dotted names of modules and tensors, the same whether or not a part of the model is wrapped."""

from __future__ import annotations

from lightning_revbn.core.torch_compat import WRAPPER_LEVELS

__all__ = ["join", "parent", "unwrapped"]


def unwrapped(path: str) -> str:
    """Return the name that a module or a tensor has if nothing is compiled or wrapped.

    Args:
        path: Its name in `named_modules()`, `named_parameters()` or `named_buffers()`.

    Returns:
        The name without the levels that wrappers put into it.

    Example:
        >>> unwrapped("net._orig_mod.bn1.weight")
        'net.bn1.weight'
    """
    if not any(wrapper in path for wrapper in WRAPPER_LEVELS):
        return path
    return ".".join(part for part in path.split(".") if part not in WRAPPER_LEVELS)


def join(parent: str, name: str) -> str:
    """Return the full name of something in a module.

    Args:
        parent: Name of the module, `""` for the model itself.
        name: Name within the module.

    Returns:
        The dotted name.
    """
    return f"{parent}.{name}" if parent else name


def parent(name: str) -> str:
    """Return the name of the module that holds a module or a tensor.

    Args:
        name: A dotted name.

    Returns:
        The name of the holder, `""` for the model itself.
    """
    return name.rpartition(".")[0]
