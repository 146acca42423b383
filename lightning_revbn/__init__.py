"""Revisited batch norm initialisation (Davis and Frank, ECCV 2022) for PyTorch Lightning."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_revbn.callbacks.monitor import BatchNormMonitor
    from lightning_revbn.callbacks.revisited import RevisitedBatchNorm
    from lightning_revbn.compare import paired_t_test
    from lightning_revbn.core.initialization import init_batch_norms
    from lightning_revbn.core.input_batch_norm import InputBatchNorm
    from lightning_revbn.core.input_norm import InputNorm
    from lightning_revbn.core.layers import find_batch_norms
    from lightning_revbn.core.param_groups import scale_param_groups
    from lightning_revbn.core.update_rule import ScaleUpdateRule
    from lightning_revbn.data.datamodule import OnlineInputNormMixin
    from lightning_revbn.switches.lightning_cli import RevBNCLI, RevBNCLIMixin

__all__ = [
    "BatchNormMonitor",
    "InputBatchNorm",
    "InputNorm",
    "OnlineInputNormMixin",
    "RevBNCLI",
    "RevBNCLIMixin",
    "RevisitedBatchNorm",
    "ScaleUpdateRule",
    "find_batch_norms",
    "init_batch_norms",
    "paired_t_test",
    "scale_param_groups",
]
__version__ = "0.1.0"

# Names are imported on use: every Trainer loads this package's entry point, even in scripts without the package.
_HOMES = {
    "BatchNormMonitor": "lightning_revbn.callbacks.monitor",
    "InputBatchNorm": "lightning_revbn.core.input_batch_norm",
    "InputNorm": "lightning_revbn.core.input_norm",
    "OnlineInputNormMixin": "lightning_revbn.data.datamodule",
    "RevBNCLI": "lightning_revbn.switches.lightning_cli",
    "RevBNCLIMixin": "lightning_revbn.switches.lightning_cli",
    "RevisitedBatchNorm": "lightning_revbn.callbacks.revisited",
    "ScaleUpdateRule": "lightning_revbn.core.update_rule",
    "find_batch_norms": "lightning_revbn.core.layers",
    "init_batch_norms": "lightning_revbn.core.initialization",
    "paired_t_test": "lightning_revbn.compare",
    "scale_param_groups": "lightning_revbn.core.param_groups",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_HOMES[name]), name)
    if _HOMES[name].startswith("lightning_revbn.callbacks."):
        import_module("lightning_revbn.lightning_compat").adopt(found)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
