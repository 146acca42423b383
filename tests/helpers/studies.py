"""Runs studies of the Hydra example, and reads what their runs have left."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.scripts import Done, run_python, run_script

SCRIPT = "examples/hydra/train.py"
ARMS_AND_SEEDS = ("revbn=off,default", "seed=1,2", "trainer.max_epochs=1")


def run_study(folder: Path, *options: str, check: bool = True) -> Done:
    """Run a study; without options of its own, two arms with two seeds."""
    return run_script(SCRIPT, "-m", f"hydra.sweep.dir={folder}", *(options or ARMS_AND_SEEDS), check=check)


def results(folder: Path) -> dict[str, dict[str, float]]:
    """Return the scores of every finished run by the name of its directory."""
    return {file.parent.name: json.loads(file.read_text())["scores"] for file in sorted(folder.rglob("result.json"))}


def compared(folder: Path) -> str:
    """Return the table that `lightning-revbn compare` prints for a study."""
    return run_python("-m", "lightning_revbn", "compare", folder, "--metric", "test_acc").stdout
