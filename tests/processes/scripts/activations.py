"""Run by test_data_parallel.py: the activations of the same training on one rank and on two."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from helpers.lit import LitNet, trainer
from helpers.models import AmidArithmetic, SynchronizedBatchNorm, images, residual_net_of
from helpers.ranks import end_rank
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from lightning_revbn import BatchNormMonitor, find_batch_norms
from lightning_revbn.core.activations import ActivationHooks, NormalizedActivations, compute_x_hat
from lightning_revbn.core.batch_norm_sync import synchronize_batch_norms

GLOBAL_BATCH = 16


def main(devices: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # so that sums in another order do not matter
    inputs, targets = images(64)
    inputs = inputs.double()
    inputs[::3] *= 4  # ranks differ
    data = TensorDataset(inputs, targets)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    # Lightning's own sampler would shuffle.
    sampler = DistributedSampler(data, devices, rank, shuffle=False)
    batches = DataLoader(data, batch_size=GLOBAL_BATCH // devices, sampler=sampler)
    for kind in (SynchronizedBatchNorm, AmidArithmetic, nn.BatchNorm2d):
        logger = CSVLogger(folder, name=kind.__name__)
        options = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto", "use_distributed_sampler": False}
        run = trainer(folder, BatchNormMonitor(activations=True), logger=logger, **options)
        model = residual_net_of(kind).double()
        run.fit(LitNet(model=synchronize_batch_norms(model) if kind is AmidArithmetic else model), batches)

    # The first batch once more, by hand. SyncBatchNorm runs on GPUs alone, but what it normalises to can be computed.
    first = inputs[:GLOBAL_BATCH]
    metric = NormalizedActivations(1)
    metric.update(0, compute_x_hat(nn.SyncBatchNorm(3), first[rank::devices]))
    tables = {"SyncBatchNorm": torch.stack(metric.compute())}
    if devices == 1:  # what two ranks see where layers are not synchronised
        tables["rank by rank"] = seen(residual_net_of(nn.BatchNorm2d).double(), [first[::2], first[1::2]])
        tables["joined"] = seen(residual_net_of(nn.BatchNorm2d).double(), [first])
    if run.is_global_zero:
        torch.save(tables, folder / "tables.pt")


def seen(model: nn.Module, batches: list[Tensor]) -> Tensor:
    """Return greatest |x_hat| and share of |x_hat| > 3, shape `(2, L + 1)`, over several batches."""
    records = find_batch_norms(model)
    metric = NormalizedActivations(len(records))
    with ActivationHooks(records, metric):
        for batch in batches:
            model(batch)
    return torch.stack(metric.compute())


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
    end_rank()
