"""Turns what a user names on the command line into a model: a checkpoint file, a library's model, or a callable."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_revbn.cli.terminal import CommandError
from lightning_revbn.core.arguments import nearest_names
from lightning_revbn.core.eps import EPS_KEY
from lightning_revbn.core.module_names import unwrapped

__all__ = ["BatchNorm", "TargetError", "from_state_dict", "load_state_dict", "resolve"]

_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")
"""Where checkpoints keep the model: Lightning's and timm's, torch tutorials', torchvision's references'."""


class TargetError(CommandError):
    """A target that cannot be read."""


def resolve(target: str) -> nn.Module:
    """Make the model that a target names.

    Args:
        target: A checkpoint file; `torchvision:NAME` or `timm:NAME`, built without weights; or
            `package.module:callable`, which is called without arguments.

    Returns:
        The model; of a checkpoint, a module that has its batch norm layers under their names and nothing else.

    Raises:
        TargetError: If the target cannot be read.
    """
    if Path(target).is_file():
        content = _read(Path(target))
        return from_state_dict(_tensors(content, Path(target)), _saved_eps(content))
    scheme, colon, name = target.partition(":")
    if not colon:
        raise TargetError(f"{target!r} is no file; a model is named as torchvision:NAME, timm:NAME or module:callable")
    if scheme == "torchvision":
        return _torchvision(name)
    if scheme == "timm":
        return _timm(name)
    return _call(scheme, name)


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, and run none of its code.

    Args:
        path: Lightning's checkpoint, or any file of `torch.save` whose model is at the top or under a usual key.

    Returns:
        The model's tensors by name, on the CPU.

    Raises:
        TargetError: If the file is damaged, is no checkpoint, or holds anything but plain data.
    """
    return _tensors(_read(path), path)


def _read(path: Path) -> dict[Any, Any]:
    try:
        content = _load(path)
    except Exception as error:  # damaged bytes make torch's unpickler raise whatever they happen to spell
        text = " ".join(str(error).split())
        if re.search(r"Unsupported (global|class)|GLOBAL", text):
            raise TargetError(
                f"{path} holds pickled objects besides tensors; refused, and none of its code was run. "
                "Save the model's state_dict() alone to inspect it"
            ) from error
        raise TargetError(f"{path} is no checkpoint of torch.save, or is damaged: {text[:100]}") from error
    top = _as_dict(content)
    if top is None:
        raise TargetError(f"{path} holds a {type(content).__name__}, not a model's state_dict")
    return top


def _tensors(content: dict[Any, Any], path: Path) -> dict[str, Tensor]:
    inner = (_as_dict(content.get(key)) for key in _STATE_DICT_KEYS)
    named = next((found for found in inner if found is not None), content)
    tensors = {key: value for key, value in named.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise TargetError(
            f"{path} holds no model: no tensor by name, at the top or under {', '.join(_STATE_DICT_KEYS)}"
        )
    return tensors


def _saved_eps(content: dict[Any, Any]) -> dict[str, float]:
    """Return the eps that RevisitedBatchNorm set, by layer, as its state in a checkpoint of Lightning has it."""
    states = (_as_dict(state) or {} for state in (_as_dict(content.get("callbacks")) or {}).values())
    return {name: eps for state in states for name, eps in (_as_dict(state.get(EPS_KEY)) or {}).items()}


def _load(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of pickle protocols it does not write; what fails is told below
        return torch.load(path, map_location="cpu", weights_only=True)  # never otherwise: a pickle can run code


def _as_dict(value: object) -> dict[Any, Any] | None:
    return cast("dict[Any, Any]", value) if isinstance(value, dict) else None


class BatchNorm(nn.BatchNorm1d):
    """A batch norm layer of a checkpoint, which does not tell whether it is for 1, 2 or 3 dimensions."""

    def __init__(self, channels: int, affine: bool, eps: float | None) -> None:
        super().__init__(channels, affine=affine)  # pyright: ignore[reportUnknownMemberType] # torch types it in part
        self.eps = eps  # pyright: ignore[reportAttributeAccessIssue] # unknown, as no state dict has it


def from_state_dict(tensors: Mapping[str, Tensor], eps: Mapping[str, float] | None = None) -> nn.Module:
    """Build the batch norm layers that a state dict shows.

    A layer is known by its running statistics; one without them cannot be told from other norms, and a frozen layer
    or an instance norm with running statistics looks the same.

    Args:
        tensors: The model's tensors by name.
        eps: The eps of layers by name, where it is known.

    Returns:
        A module that holds the layers under their names.
    """
    eps = eps or {}
    root = nn.Module()
    for key, mean in tensors.items():
        name, _, attribute = key.rpartition(".")
        variance = tensors.get(f"{name}.running_var" if name else "running_var")
        if attribute != "running_mean" or variance is None or mean.dim() != 1 or variance.shape != mean.shape:
            continue
        own = {k: tensors.get(f"{name}.{k}" if name else k) for k in ("weight", "bias", "num_batches_tracked")}
        layer = BatchNorm(mean.numel(), own["weight"] is not None, eps.get(unwrapped(name))).to(mean.dtype)
        state = {"running_mean": mean, "running_var": variance, **{k: v for k, v in own.items() if v is not None}}
        layer.load_state_dict(state, strict=False)
        if not name:
            return layer
        _place(root, name.split("."), layer)
    return root


def _place(root: nn.Module, path: list[str], layer: nn.Module) -> None:
    for part in path[:-1]:
        if part not in root._modules:  # pyright: ignore[reportPrivateUsage]
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(path[-1], layer)


def _torchvision(name: str) -> nn.Module:
    models = _library("torchvision.models")
    _check_name("torchvision", name, models.list_models())
    builder: Callable[..., nn.Module] = models.get_model_builder(name)
    accepted = inspect.signature(builder).parameters
    # A backbone's weights would be downloaded by default.
    return builder(**{key: None for key in ("weights", "weights_backbone") if key in accepted})


def _timm(name: str) -> nn.Module:
    library = _library("timm")
    _check_name("timm", name.partition(".")[0], library.list_models())
    return library.create_model(name, pretrained=False)


def _library(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise TargetError(f"{package} models need {package}: pip install {package}") from error


def _check_name(library: str, name: str, known: list[str]) -> None:
    if name not in known:
        nearest = ", ".join(nearest_names(name, known))
        raise TargetError(f"{library} has no model {name!r}; the nearest names are {nearest}")


def _call(module: str, name: str) -> nn.Module:
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module beside the user, as with python -m
    try:
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
        model = function()
    except Exception as error:  # whatever the user's own code raises is told in one line
        raise TargetError(
            f"{module}:{name} failed with {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(model, nn.Module):
        raise TargetError(f"{module}:{name} returned a {type(model).__name__}, not a torch.nn.Module")
    return model
