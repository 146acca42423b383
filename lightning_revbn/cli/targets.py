"""Finds the target that a user names: a checkpoint file, a library's model, or a callable that makes a model."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_revbn.cli.checkpoints import TargetError, read_checkpoint, tensors_of
from lightning_revbn.core.arguments import nearest_names
from lightning_revbn.core.printable import error_text, shortened

__all__ = ["Checkpoint", "resolve"]

_FORMS = "a model is named as torchvision:NAME, timm:NAME or module:callable"
_LONGEST = 100  # characters of a target in a message


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file.

    Attributes:
        content: All of the content.
        tensors: The tensors of the model by name.
    """

    content: dict[Any, Any]
    tensors: dict[str, Tensor]


def resolve(target: str) -> nn.Module | Checkpoint:
    """Find the model or checkpoint that a target names.

    Args:
        target: A checkpoint file; `torchvision:NAME` or `timm:NAME`, built without weights; or
            `package.module:callable`, which is called without arguments.

    Returns:
        The model, or the checkpoint.

    Raises:
        TargetError: If the target cannot be read.
    """
    path = Path(target)
    if _is(Path.is_file, path):
        content = read_checkpoint(path)
        return Checkpoint(content, tensors_of(content, path))
    _refuse_other_paths(target, path)
    scheme, colon, name = target.partition(":")
    if not colon:
        raise TargetError(f"{_quoted(target)} is not a file; {_FORMS}")
    if scheme == "torchvision":
        return _torchvision(name)
    if scheme == "timm":
        return _timm(name)
    return _call(scheme, name)


def _is(kind: Callable[[Path], bool], path: Path) -> bool:
    try:
        return kind(path)
    except (OSError, ValueError):  # no file can have such a name, for example 300 characters
        return False


def _refuse_other_paths(target: str, path: Path) -> None:
    """Refuse a target that is meant as a file but is not a readable file.

    Raises:
        TargetError: If it is such a target; the message says what to name instead.
    """
    quoted = _quoted(target)
    if target and _is(Path.is_dir, path):
        raise TargetError(f"{quoted} is a directory: name a checkpoint file in it")
    if target and _is(Path.exists, path):
        raise TargetError(f"{quoted} is not a regular file")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", target):
        raise TargetError(f"{quoted} is an address, and only local files are read: download it, and name the file")
    if re.match(r"[A-Za-z]:[\\/]", target):  # a Windows path, whose drive looks like a scheme
        raise TargetError(f"the file {quoted} does not exist")
    script, found, name = target.partition(".py:")
    if found:
        module = re.sub(r"[/\\]", ".", re.sub(r"^(\.[/\\])+", "", script))
        raise TargetError(f"{quoted} names a script: name its module, as in an import: {_quoted(f'{module}:{name}')}")
    stem, _, suffix = target.rpartition(".")
    if stem and (suffix in ("ckpt", "pt", "pth", "bin") or re.search(r"[/\\]", target)):
        raise TargetError(f"{quoted} is not a file; {_FORMS}")


def _torchvision(name: str) -> nn.Module:
    models = _library("torchvision.models")
    _check_name("torchvision", name, models.list_models())
    builder: Callable[..., nn.Module] = models.get_model_builder(name)
    accepted = inspect.signature(builder).parameters
    # By default, torchvision would download the weights of a backbone.
    unset = {key: None for key in ("weights", "weights_backbone") if key in accepted}
    return _made(f"torchvision:{name}", lambda: builder(**unset))


def _timm(name: str) -> nn.Module:
    library = _library("timm")
    # A name such as resnet50.a1_in1k has an architecture and weights, and list_models() has architectures.
    _check_name("timm", name.partition(".")[0], library.list_models())
    return _made(f"timm:{name}", lambda: library.create_model(name, pretrained=False))


def _library(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise TargetError(f"{package} models need {package}: pip install {package}") from error


def _check_name(library: str, name: str, known: list[str]) -> None:
    if name not in known:
        nearest = ", ".join(nearest_names(name, known))
        raise TargetError(f"{library} has no model {_quoted(name)}; the nearest names are {nearest}")


def _call(module: str, name: str) -> nn.Module:
    if "" not in sys.path:
        sys.path.insert(0, "")  # finds modules in the working directory, as python -m does

    def make() -> Any:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        return found if isinstance(found, nn.Module) else found()

    model = _made(f"{module}:{name}", make)
    if not isinstance(model, nn.Module):
        raise TargetError(f"{_short(f'{module}:{name}')} returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def _made(target: str, make: Callable[[], Any]) -> Any:
    """Run the code of a library or user, and report its error in a single line.

    Args:
        target: The target as the user named it.
        make: The code.

    Returns:
        The result of the code.

    Raises:
        TargetError: If the code raises an error or exits.
    """
    try:
        # stdout holds only the command's result, which may be JSON: prints of other code go to stderr.
        with redirect_stdout(sys.stderr):
            return make()
    except (Exception, SystemExit) as error:  # a script may call sys.exit() when it is imported
        raise TargetError(f"{_short(target)} failed with {type(error).__name__}: {error_text(error, 300)}") from error


def _short(target: str) -> str:
    return shortened(target, _LONGEST)


def _quoted(target: str) -> str:
    return f"'{_short(target)}'"
