"""Revisited batch norm initialisation (Davis and Frank, ECCV 2022) for PyTorch Lightning."""

from lightning_revbn.callbacks.monitor import BatchNormMonitor
from lightning_revbn.callbacks.revisited import RevisitedBatchNorm
from lightning_revbn.compare import paired_t_test
from lightning_revbn.core.initialization import init_batch_norms
from lightning_revbn.core.input_batch_norm import InputBatchNorm
from lightning_revbn.core.input_norm import InputNorm
from lightning_revbn.core.layers import find_batch_norms
from lightning_revbn.core.update_rule import ScaleUpdateRule, scale_param_groups
from lightning_revbn.datamodule import OnlineInputNormMixin

__all__ = [
    "BatchNormMonitor",
    "InputBatchNorm",
    "InputNorm",
    "OnlineInputNormMixin",
    "RevisitedBatchNorm",
    "ScaleUpdateRule",
    "find_batch_norms",
    "init_batch_norms",
    "paired_t_test",
    "scale_param_groups",
]
__version__ = "0.1.0"
