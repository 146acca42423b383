"""Run by test_ray_train.py: trainings on two CPU workers of Ray Train, and the same in one process.

Ray has a process for each worker, and Lightning's Trainer runs inside of it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import ray
import ray.train.lightning
import torch
from helpers.joined_raw import callback, train_raw
from ray.train import RunConfig, ScalingConfig
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, RayTrainReportCallback
from ray.train.torch import TorchConfig, TorchTrainer

from lightning_revbn.plugins import BatchNormSync

WORKERS = 2


def work(settings: dict[str, Any]) -> None:
    """Train on one worker."""
    torch.set_num_threads(1)
    options: dict[str, Any] = {
        "devices": "auto",
        "strategy": RayDDPStrategy(),
        "plugins": [RayLightningEnvironment(), BatchNormSync()],
        "ckpt_path": settings.get("ckpt_path"),
    }
    callbacks = [callback()] * settings.get("has_callback", True)
    if "variables" in settings:
        os.environ["LIGHTNING_REVBN"] = settings["variables"][ray.train.get_context().get_world_rank()]
    train_raw(Path(settings["folder"]), *callbacks, RayTrainReportCallback(), **options)


def run(folder: Path, name: str, env: dict[str, str] | None = None, **settings: Any) -> Path | None:
    """Train on two workers, and return the checkpoint of the first epoch; write down an error."""
    here = folder / name
    here.mkdir()
    trainer = TorchTrainer(
        work,
        train_loop_config={"folder": str(here), **settings},
        scaling_config=ScalingConfig(num_workers=WORKERS),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(name=name, storage_path=str(folder / "ray"), worker_runtime_env={"env_vars": env or {}}),
    )
    try:
        result = trainer.fit()
    except Exception as error:  # what Ray raises has the workers' errors in its text
        (here / "error.txt").write_text(str(error))
        return None
    first = min(result.best_checkpoints, key=lambda found: found[1]["epoch"])[0]
    return Path(first.path, RayTrainReportCallback.CHECKPOINT_NAME)


def main(folder: Path) -> None:
    ray.init(num_cpus=WORKERS, include_dashboard=False, object_store_memory=100 * 2**20, configure_logging=False)
    try:
        half = run(folder, "whole")
        run(folder, "resumed", ckpt_path=str(half))
        run(folder, "variable", {"LIGHTNING_REVBN": "1"}, has_callback=False)
        run(folder, "variable on one worker", has_callback=False, variables=["1", ""])
    finally:
        ray.shutdown()


def alone(folder: Path) -> None:
    """Train in one process, without Ray."""
    torch.set_num_threads(1)
    train_raw(folder, callback())


if __name__ == "__main__":
    {"ray": main, "alone": alone}[sys.argv[1]](Path(sys.argv[2]))
