"""Run by test_deepspeed.py, one stage of ZeRO a process tree: the callback under DeepSpeed, on two gloo ranks.

Lightning's strategy asks for GPUs; DeepSpeed does not.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from helpers.by_hand import sgd_by_hand
from helpers.lit import LitNet, permanent_sgd, trainer
from helpers.models import images, residual_net, scales
from helpers.ranks import end_rank
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_revbn import RevisitedBatchNorm


class OnCPU(DeepSpeedStrategy):
    """DeepSpeed on devices that Lightning does not expect."""

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", self.local_rank)


class MadeLater(LitNet):
    """Makes its layers where ZeRO-3 takes the parameters apart at once."""

    def __init__(self, **options: Any) -> None:
        super().__init__(model=nn.Identity(), **options)
        self.made = False

    def configure_model(self) -> None:
        if not self.made:
            self.model, self.made = residual_net(), True
            # What a constructor writes after a layer was made is lost under ZeRO-3, without such a block.
            with deepspeed.zero.GatheredParameters([self.model.bn2.weight], modifier_rank=0):
                nn.init.zeros_(self.model.bn2.weight)


class Final(Callback):
    """Notes the whole parameters before the engine is taken apart."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def on_train_end(self, run: Trainer, module: LitNet) -> None:
        with deepspeed.zero.GatheredParameters(list(module.parameters())):
            self.values = {name: value.detach().clone() for name, value in module.named_parameters()}


def main(stage: int, folder: Path) -> None:
    torch.set_num_threads(1)
    data = DataLoader(TensorDataset(*images(64)), batch_size=8)

    def run(*callbacks: Callback, **options: Any) -> Trainer:
        strategy = options.pop("strategy", None) or OnCPU(stage=stage, **options.pop("zero", {}))
        return trainer(folder, *callbacks, devices=2, strategy=strategy, **options)

    result: dict[str, Any] = {"values": {}}

    refused = run(RevisitedBatchNorm())
    try:
        refused.fit(LitNet(), data)
    except MisconfigurationException as raised:
        result["error"] = str(raised)
    result["steps of the refused"] = refused.global_step

    kept, save = Final(), ModelCheckpoint(folder / "saved", "{epoch}", save_top_k=-1)
    first = run(RevisitedBatchNorm(), kept, save, enable_checkpointing=True, logger=CSVLogger(folder))
    first.fit(LitNet(permanent_sgd), data)
    result["values"]["callback"] = kept.values
    resumed = Final()
    run(RevisitedBatchNorm(), resumed).fit(LitNet(permanent_sgd), data, ckpt_path=folder / "saved" / "epoch=0.ckpt")
    result["values"]["resumed"] = resumed.values

    later, callback = Final(), RevisitedBatchNorm()
    run(callback, later).fit(MadeLater(configure=permanent_sgd), data)
    result["values"]["made later"] = later.values
    result["zero kept"] = callback.state_dict()["zero_kept"]
    result["verdicts"] = {record.name: record.verdict for record in callback.report.records}

    plain = LitNet(sgd_by_hand)
    for scale in scales(plain):
        nn.init.constant_(scale, 0.1)
    run(strategy="ddp").fit(plain, data)
    result["values"]["by hand"] = {name: value.detach().clone() for name, value in plain.named_parameters()}

    torch.save(result, folder / f"rank{first.global_rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
    end_rank()
