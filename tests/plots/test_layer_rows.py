from __future__ import annotations

from pathlib import Path

from helpers.lit import LitNet, loader, trainer
from helpers.made_runs import ALL
from helpers.models import BATCH_NORMS
from lightning.pytorch.loggers import CSVLogger

from lightning_revbn import BatchNormMonitor


def test_the_quantities_of_the_figure_are_those_that_the_monitor_logs(tmp_path: Path) -> None:
    run = trainer(tmp_path, BatchNormMonitor(every_n_steps=1, activations=True), logger=CSVLogger(tmp_path))
    run.fit(LitNet(), loader(1))
    header = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[0].split(",")
    for quantity in ALL:
        assert {f"revbn/model.{name}/{quantity}" for name in BATCH_NORMS} <= set(header)
