"""Run by test_ray_train.py: trainings on two CPU workers of Ray Train, and the same in one process.

Ray has a process for each worker, and Lightning's Trainer runs inside of it.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import ray
import ray.train.lightning
import torch
from helpers.joined_raw import callback, train_raw
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import DoublePrecision, FSDPPrecision
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.lightning import RayDDPStrategy, RayFSDPStrategy, RayLightningEnvironment, RayTrainReportCallback
from ray.train.torch import TorchConfig, TorchTrainer
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_revbn.plugins import BatchNormSync

WORKERS = 2


class FSDPOnCPU(RayFSDPStrategy):
    """Tells FSDP the device, without which FSDP looks for an accelerator."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


class DoubleFSDP(DoublePrecision, FSDPPrecision):
    """Float64, which Lightning does not offer under FSDP."""

    mixed_precision_config = None

    def __init__(self) -> None:
        super().__init__("32-true")


class DieOnce(Callback):
    """Kills the second worker in the second epoch, at the first start alone."""

    def __init__(self, folder: Path) -> None:
        self.died = folder / "died"

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx, trainer.global_rank) == (1, 1, 1) and not self.died.exists():
            ray.train.get_all_reported_checkpoints()  # waits until Ray's controller knows of the first epoch's
            self.died.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def strategy_of(name: str) -> dict[str, Any]:
    """Return the arguments of the Trainer for one of Ray's strategies."""
    plugins: list[Any] = [RayLightningEnvironment(), BatchNormSync()]
    if name == "ddp":
        return {"strategy": RayDDPStrategy(), "plugins": plugins}
    kind = FSDPOnCPU if name == "fsdp" else RayFSDPStrategy
    return {"strategy": kind(auto_wrap_policy={nn.Sequential}), "plugins": [*plugins, DoubleFSDP()], "precision": None}


def work(settings: dict[str, Any]) -> None:
    """Train on one worker."""
    torch.set_num_threads(1)
    options: dict[str, Any] = {"devices": "auto", **strategy_of(settings["strategy"])}
    folder = Path(settings["folder"])
    callbacks: list[Callback] = [callback()] * settings.get("has_callback", True)
    callbacks += [DieOnce(folder)] * settings.get("dies", False)
    if "variables" in settings:
        os.environ["LIGHTNING_REVBN"] = settings["variables"][ray.train.get_context().get_world_rank()]
    saved = ray.train.get_checkpoint()  # if Ray has started the workers again
    resumed = settings.get("ckpt_path") if saved is None else checkpoint_in(saved)
    train_raw(folder, *callbacks, RayTrainReportCallback(), ckpt_path=resumed, **options)


def checkpoint_in(saved: Checkpoint) -> Path:
    """Return Lightning's checkpoint in a checkpoint of Ray."""
    return Path(saved.path, RayTrainReportCallback.CHECKPOINT_NAME)


def run(folder: Path, name: str, strategy: str, env: dict[str, str] | None = None, **settings: Any) -> Path | None:
    """Train on two workers, and return the checkpoint of the first epoch; write down an error."""
    here = folder / name
    here.mkdir()
    trainer = TorchTrainer(
        work,
        train_loop_config={"strategy": strategy, "folder": str(here), **settings},
        scaling_config=ScalingConfig(num_workers=WORKERS),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(
            name=name,
            storage_path=str(folder / "ray"),
            worker_runtime_env={"env_vars": env or {}},
            failure_config=FailureConfig(max_failures=int(settings.get("dies", False))),
        ),
    )
    try:
        result = trainer.fit()
    except Exception as error:  # what Ray raises has the workers' errors in its text
        (here / "error.txt").write_text(str(error))
        return None
    return checkpoint_in(min(result.best_checkpoints, key=lambda found: found[1]["epoch"])[0])


def main(folder: Path) -> None:
    ray.init(num_cpus=WORKERS, include_dashboard=False, object_store_memory=100 * 2**20, configure_logging=False)
    try:
        for strategy in ("ddp", "fsdp"):
            half = run(folder, strategy, strategy)
            run(folder, f"{strategy}, resumed", strategy, ckpt_path=str(half))
            run(folder, f"{strategy}, a worker dies", strategy, dies=True)
            run(folder, f"{strategy}, variable", strategy, {"LIGHTNING_REVBN": "1"}, has_callback=False)
            for name, other in (("variable on one worker", ""), ("other settings", "scale=0.2")):
                run(folder, f"{strategy}, {name}", strategy, has_callback=False, variables=["1", other])
        for name, has_callback in (("fsdp without a device", True), ("fsdp without a device or callback", False)):
            run(folder, name, "fsdp without a device", has_callback=has_callback)
    finally:
        ray.shutdown()


def alone(folder: Path) -> None:
    """Train in one process, without Ray."""
    torch.set_num_threads(1)
    train_raw(folder, callback())


if __name__ == "__main__":
    {"ray": main, "alone": alone}[sys.argv[1]](Path(sys.argv[2]))
