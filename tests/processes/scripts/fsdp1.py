"""Run by test_engines.py: the callback under FSDP1, on two gloo ranks.

Lightning's Trainer refuses `FSDPStrategy` without a GPU, but not a class derived from it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from helpers.by_hand import sgd_by_hand
from helpers.lit import LitNet, trainer
from helpers.models import images, residual_net, scales
from helpers.ranks import end_rank
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
from torch.utils.data import DataLoader, TensorDataset

from lightning_revbn import BatchNormMonitor, RevisitedBatchNorm

# The whole state dict of torch 2.5 ends the process on CPUs.
STATE = "full" if Version(torch.__version__) >= Version("2.7") else "sharded"


class OnCPU(FSDPStrategy):
    """FSDP1 where Lightning, and FSDP unless it is told the device, expect a GPU."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


class Recorder(Callback):
    """Notes the whole parameters before every step, gathered by FSDP's own state dict."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, run: Trainer, *_: Any) -> None:
        self.states.append(values(run))


def values(run: Trainer) -> dict[str, Tensor]:
    with FullyShardedDataParallel.state_dict_type(
        run.strategy.model, StateDictType.FULL_STATE_DICT, FullStateDictConfig()
    ):
        return {key: value.clone() for key, value in run.strategy.model.state_dict().items()}


def flat_sgd(module: LightningModule) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.trainer.model.parameters(), lr=0.05)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    data = DataLoader(TensorDataset(*images(64)), batch_size=8)

    def run(*callbacks: Callback, use_orig_params: bool = True, **options: Any) -> Trainer:
        # The stem, with one of the scales, is a part of its own; its name gets a part in the middle.
        strategy = OnCPU(auto_wrap_policy={nn.Sequential}, use_orig_params=use_orig_params, state_dict_type=STATE)
        return trainer(folder, *callbacks, devices=2, strategy=strategy, accumulate_grad_batches=2, **options)

    reference = LitNet(sgd_by_hand)
    for scale in scales(reference):
        nn.init.constant_(scale, 0.1)
    hand = run()
    hand.fit(reference, data)
    states = {"by hand": values(hand)}

    recorder, save = Recorder(), ModelCheckpoint(folder / "saved", "{epoch}", save_top_k=-1)
    watched = RevisitedBatchNorm(monitor=BatchNormMonitor(activations=True))
    first = run(watched, save, recorder, enable_checkpointing=True, logger=CSVLogger(folder))
    module = LitNet()
    first.fit(module, data)
    states["callback"] = values(first)
    sizes = [scale.numel() for scale in scales(module)]

    again = run(RevisitedBatchNorm(), logger=CSVLogger(folder, name="resumed"))
    again.fit(LitNet(), data, ckpt_path=folder / "saved" / "epoch=0.ckpt")
    states["resumed"] = values(again)

    zero = RevisitedBatchNorm(monitor=False, include=["model.*"])
    run(zero, max_epochs=1).fit(LitNet(model=residual_net(zero_init_residual=True)), data)
    verdicts = {record.name: record.verdict for record in zero.report.records}

    refused = run(RevisitedBatchNorm(), use_orig_params=False)
    error = ""
    try:
        refused.fit(LitNet(flat_sgd), data)
    except ValueError as raised:
        error = str(raised)

    torch.save(
        {
            "states": states,
            "before every batch": recorder.states,
            "sizes": sizes,
            "verdicts": verdicts,
            "error": error,
            "steps of the refused": refused.global_step,
        },
        folder / f"rank{first.global_rank}.pt",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end_rank()
