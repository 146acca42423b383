"""Reads the hyperparameters of a run, whichever kind of file holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from lightning_revbn.runs.logs import Log
from lightning_revbn.runs.mlflow_stores import read_mlflow_settings
from lightning_revbn.runs.names import one_line
from lightning_revbn.runs.scalars import LogError
from lightning_revbn.runs.wandb_files import read_wandb_settings

__all__ = ["read_hyperparameters"]

_FILES = ("config.yaml", "hparams.yaml")  # from LightningCLI and from the loggers; the later file wins
_MOST_BYTES = 4_000_000
_MOST_ENTRIES = 10_000
"""YAML aliases can make a short file expand to more entries than memory holds."""
_WORDS = {"None": None, "null": None, "True": True, "true": True, "False": False, "false": False}


def read_hyperparameters(log: Log) -> dict[str, Any]:
    """Read the hyperparameters of a run.

    Args:
        log: The run.

    Returns:
        Single values by key, nested keys joined by `/`. Texts that stand for a number, or a word such as `None`,
        become that value: some loggers keep only texts.

    Raises:
        LogError: If the hyperparameters cannot be read.
    """
    if log.mlflow is not None:
        held: Mapping[str, Any] = read_mlflow_settings(log.mlflow, log.path)
    elif log.wandb is not None:
        held = read_wandb_settings(log.wandb)
    else:
        directory = log.path if log.path.is_dir() else log.path.parent
        files = [directory / name for name in _FILES if (directory / name).is_file()]
        held = {key: value for file in files for key, value in _in_yaml(file).items()}
    return dict(_flat(held))


def _in_yaml(file: Path) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Builds plain values only: a file may name any Python class."""

    def nothing(loader: object, suffix: str, node: object) -> None:
        return None

    def whole(loader: Any, node: Any) -> Any:
        try:
            return loader.construct_yaml_int(node)
        except ValueError:  # Python refuses numbers of more than 4,300 digits
            return str(node.value)

    cast("Any", Loader).add_multi_constructor("", nothing)
    cast("Any", Loader).add_constructor("tag:yaml.org,2002:int", whole)
    try:
        with file.open("rb") as content:
            text = content.read(_MOST_BYTES + 1)  # the extra byte shows that a file is too long
        if len(text) > _MOST_BYTES:
            raise LogError(
                f"{one_line(file)} is too large for a file of hyperparameters: it has more than {_MOST_BYTES:,} bytes"
            )
        held: object = yaml.load(text, Loader)
    except OSError as error:
        raise LogError(f"{one_line(file)} cannot be read: {error.strerror or error}") from error
    # YAML also passes on errors from building values, such as impossible dates and unhashable keys.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise LogError(f"{one_line(file)} cannot be read: {one_line(error, 200)}") from error
    return {str(key): value for key, value in held.items()} if isinstance(held, dict) else {}  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType] # from a file


def _flat(held: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield single values by their keys; a list becomes a text with its length."""
    waiting: list[tuple[str, Any]] = [*held.items()][::-1]  # no recursion: YAML aliases may nest a mapping in itself
    for _ in range(_MOST_ENTRIES):
        if not waiting:
            return
        key, value = waiting.pop()
        if isinstance(value, Mapping):
            parts = cast("Mapping[object, Any]", value)
            waiting.extend([(f"{key}/{part}", inner) for part, inner in parts.items()][::-1])
        elif isinstance(value, str):
            yield key, _plain(value)
        elif value is None or isinstance(value, (bool, int, float)):
            yield key, value
        elif isinstance(value, (list, tuple)):
            yield key, f"({len(cast('list[Any]', value))} values)"


def _plain(text: str) -> Any:
    """Return the value that a text stands for: some loggers keep only texts."""
    if text in _WORDS:
        return _WORDS[text]
    try:
        return (int(text) if len(text) < 20 else text) if text.isdecimal() else float(text)
    except ValueError:
        return text
