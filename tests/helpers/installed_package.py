"""Checks of an environment that has this package without extras: what a user does first works in it.

    PYTHONPATH=.:tests python tests/helpers/installed_package.py dist/*.whl torch==2.14.1

installs a wheel in an environment that has nothing else, and makes the checks there; `make dist` runs it. pip brings
the dependencies, where the test of the same checks links them.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import venv
from pathlib import Path

from helpers.bare_environment import BareEnvironment
from helpers.scripts import ROOT

EXTRAS = ("scipy", "matplotlib", "tensorboard", "rich", "shtab", "jsonargparse")
"""Modules that only extras of the package bring."""

ABOUT = f"""
import importlib.util, json
import lightning_revbn
there = [name for name in {EXTRAS!r} if importlib.util.find_spec(name)]
print(json.dumps([lightning_revbn.__version__, lightning_revbn.__file__, there]))
"""

PLAIN = """
import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


if __name__ == "__main__":
    data = TensorDataset(torch.randn(64, 4), torch.arange(64) % 2)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=2, log_every_n_steps=1, enable_checkpointing=False, logger=CSVLogger("logs")
    )
    trainer.fit(Net(), DataLoader(data, 16))
"""
"""A script that does not mention this package."""


def check_installed(environment: BareEnvironment, folder: Path) -> str:
    """Use the package in an empty folder: import it, train with the callback and by the variable, and inspect.

    Args:
        environment: An environment that has this package, from its wheel and without extras.
        folder: An empty folder to work in, outside the repository.

    Returns:
        What `lightning-revbn inspect` printed.
    """
    version, file, there = json.loads(environment.run("python", "-c", ABOUT, cwd=folder).stdout)
    assert Path(file).is_relative_to(environment.packages), file
    assert there == [], f"{there} are there without extras"
    assert environment.run("lightning-revbn", "--version", cwd=folder).stdout == f"lightning-revbn {version}\n"

    shutil.copy(ROOT / "examples" / "minimal.py", folder)
    run = environment.run("python", "minimal.py", cwd=folder)
    assert "2 of 2 batch norm layers start from a new scale" in run.stderr
    assert "revbn/scale_mean" in run.stdout

    (folder / "plain.py").write_text(PLAIN)
    run = environment.run("python", "plain.py", cwd=folder, env={"LIGHTNING_REVBN": "1"})
    assert "2 of 2 batch norm layers start from a new scale" in run.stderr
    (log,) = folder.rglob("metrics.csv")
    assert "revbn/scale_lr" in log.read_text().partition("\n")[0].split(",")

    table = environment.run("lightning-revbn", "inspect", "plain:Net", cwd=folder).stdout
    assert "plain:Net: 2 batch norm layers (2 rewrite)" in table, table
    refused = environment.run("lightning-revbn", "plot", "logs", cwd=folder, check=False)
    assert (refused.returncode, 'pip install "lightning-revbn[plots]"' in refused.stderr) == (1, True), refused
    return table


def install_and_check(wheel: Path, requirements: list[str]) -> str:
    """Let pip install a wheel without extras in a new environment, and use the package there.

    Args:
        wheel: The wheel of this package.
        requirements: Versions to install with it, such as `torch==2.14.1`.

    Returns:
        The installed packages, and what `lightning-revbn inspect` printed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        environment, work = BareEnvironment(Path(temporary, "environment")), Path(temporary, "work")
        venv.EnvBuilder(symlinks=True, with_pip=True).create(environment.folder)
        environment.run("pip", "install", "--quiet", wheel.resolve(), *requirements)
        environment.run("pip", "check")
        work.mkdir()
        return environment.run("pip", "list", "--format=freeze").stdout + check_installed(environment, work)


if __name__ == "__main__":
    sys.stdout.write(install_and_check(Path(sys.argv[1]), sys.argv[2:]))
