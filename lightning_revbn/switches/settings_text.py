"""Reads settings of the callback from a text: `1`, pairs of keys and values, or the path of a YAML file."""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from typing_extensions import override

from lightning_revbn.callbacks.monitor import BatchNormMonitor
from lightning_revbn.callbacks.revisited import RevisitedBatchNorm
from lightning_revbn.core.arguments import is_flat

__all__ = ["KEYS", "settings_from"]

KEYS = tuple(inspect.signature(RevisitedBatchNorm).parameters)
"""The keys that settings may have."""

_MONITOR = inspect.signature(BatchNormMonitor).parameters
_WORDS = {"true": True, "false": False, "none": None, "null": None}
_MOST_BYTES = 2**20


def settings_from(text: str) -> dict[str, Any]:
    """Read settings.

    Args:
        text: `1`; settings as `key=value,key=value`; or the path of a YAML file of settings.

    Returns:
        Arguments of `RevisitedBatchNorm`; their values are not all checked yet.

    Raises:
        ValueError: If a key is unknown or given twice, or a part of the text is not `key=value`.
        TypeError: If a value has a type that no setting has.
    """
    if text.lower() in ("1", "true", "yes", "on"):
        return {}
    settings = _read(Path(text).expanduser()) if text.endswith((".yaml", ".yml")) or _is_file(text) else _pairs(text)
    for key, value in settings.items():
        if key not in KEYS:
            raise ValueError(f"unknown key {key!r}")
        # Checked before an error quotes the value: a few lines of YAML aliases can expand to 10^9 values.
        if not is_flat(value):
            raise TypeError(f"{key} is nested too deep: give a value, a list of values or a mapping of values")
    for key in ("include", "exclude"):
        patterns: object = settings.get(key, ())
        if not isinstance(patterns, (str, list, tuple)):
            raise TypeError(f"{key} takes a name pattern or a list of patterns, got {patterns!r}")
    for key in ("enabled", "monitor"):
        if key == "monitor" and isinstance(settings.get(key), Mapping):
            settings[key] = _monitor(settings[key])
        elif not isinstance(settings.get(key, True), bool):
            raise TypeError(f"{key} must be true or false, got {settings[key]!r}")
    return settings


def _monitor(settings: Mapping[str, Any]) -> BatchNormMonitor:
    for key, value in settings.items():
        if key not in _MONITOR:
            raise ValueError(f"unknown key {key!r} of monitor, which has {', '.join(_MONITOR)}")
        default: object = _MONITOR[key].default
        # A text such as "false" is truthy, and would switch the setting on.
        if isinstance(default, bool) and not isinstance(value, bool):
            raise TypeError(f"{key} of monitor must be true or false, got {value!r}")
        if isinstance(default, str) and not isinstance(value, str):
            raise TypeError(f"{key} of monitor must be a text, got {value!r}")
    return BatchNormMonitor(**settings)


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # settings may be longer than a file name may be
        return False


class _Loader(yaml.SafeLoader):
    """Refuses repeated keys, of which YAML would keep only the last, and merge keys, which multiply like aliases."""

    @override
    def flatten_mapping(self, node: Any) -> None:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise ValueError("settings take no merge key <<")
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ValueError(f"the key {key.value!r} stands twice")
                seen.add(key.value)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"the file {str(path.absolute())!r} does not exist")
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise ValueError(f"{str(path)!r} has {size:,} bytes, too many for a file of settings")
    found: object = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    if not isinstance(found, dict):
        raise TypeError(f"{str(path)!r} must hold a mapping of settings, it holds a {type(found).__name__}")
    return cast("dict[str, Any]", found)


def _pairs(text: str) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ValueError(f"{part!r} must be key=value")
        if key in settings:
            raise ValueError(f"the key {key!r} stands twice")
        settings[key] = _value(value)
    return settings


def _value(text: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # the text need not be Python
            return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return _WORDS.get(text.lower(), text)
