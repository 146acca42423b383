"""The strategies of tests with several processes, and code for FSDP2, under which parameters are shards."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from packaging.version import Version
from torch import nn

from helpers.lit import LitNet
from helpers.ranks import end_rank

RUNS_ON_CPU = Version(torch.__version__) >= Version("2.7")
"""Whether FSDP2 runs on CPUs: in torch 2.5, the lowest version that is tested, it runs only on CUDA."""

STRATEGIES = ["ddp", "ddp_spawn", *["fsdp2"] * RUNS_ON_CPU]


class Sharding(L.LightningModule):
    """Mixin that shards the parameters of `self.model` as FSDP2 does: they become DTensors."""

    is_sharded = False

    def configure_model(self) -> None:
        from torch.distributed._composable.fsdp import fully_shard

        if not self.is_sharded:  # Lightning calls configure_model in every stage
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])
            self.is_sharded = True


class ShardedNet(Sharding, LitNet):
    pass


class SpawnedDDP(DDPStrategy):
    """Lightning's `ddp_spawn` with processes that end by `end_rank`."""

    def __init__(self) -> None:
        super().__init__(start_method="spawn")

    def _configure_launcher(self) -> None:
        self._launcher = _EndingLauncher(self, start_method="spawn")


class _EndingLauncher(_MultiProcessingLauncher):
    def _wrapping_function(self, *args: Any, **options: Any) -> None:
        super()._wrapping_function(*args, **options)
        end_rank()


def strategy_of(name: str, ranks: int) -> Any:
    """Return the argument of `Trainer(strategy=...)`; Lightning has no name for "fsdp2"."""
    if name == "ddp_spawn":
        return SpawnedDDP()
    if name != "fsdp2":
        return name
    return ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1, save_distributed_checkpoint=False)


def values(module: nn.Module) -> dict[str, Any]:
    """Return a module's state on every rank, sharded parameters gathered."""
    state = module.state_dict()
    return {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in state.items()}
