"""Run by test_eps_table.py on two gloo ranks: a fit with an eps of the settings, and its resume; every rank tells."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from helpers.eps import EPS, Evaluated
from helpers.lit import quiet, trainer
from helpers.models import images
from helpers.ranks import end_rank
from torch.utils.data import DataLoader, TensorDataset


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    data = DataLoader(TensorDataset(*images(32)), batch_size=8)
    module, resumed = Evaluated(), Evaluated()
    run = trainer(folder, quiet(eps=EPS), devices=2, strategy="ddp", max_epochs=1)
    run.fit(module, data)
    run.save_checkpoint(folder / "run.ckpt")
    again = trainer(folder, quiet(eps=EPS), devices=2, strategy="ddp", max_epochs=2)
    again.fit(resumed, data, ckpt_path=folder / "run.ckpt")
    torch.save([*module.seen["fit"], *resumed.seen["fit"]], folder / f"rank{run.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end_rank()
