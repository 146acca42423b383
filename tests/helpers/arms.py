"""The arms of a comparison on disk: a folder with a run for every seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from helpers.logs import write_csv

BASELINE = [0.9722, 0.9733, 0.9711, 0.9744, 0.9700, 0.9755]
BETTER = [0.9788, 0.9733, 0.9766, 0.9800, 0.9777, 0.9744]
WORSE = [0.9700, 0.9701, 0.9688, 0.9722, 0.9611, 0.9700]


def write_arm(folder: Path, scores: Sequence[float], steps: int = 20) -> Path:
    """Write a run for every score, with seeds from 1: the training loss at two steps, and the score at the end."""
    for seed, score in enumerate(scores, start=1):
        events = [(0, {"loss": 2.0}), (steps, {"loss": 1.0, "test_acc": score})]
        write_csv(folder / f"seed_{seed:02}", events)
    return folder


def remove_seed(folder: Path) -> None:
    """Delete the log of seed 3."""
    (folder / "seed_03" / "metrics.csv").unlink()


def end_early(folder: Path) -> None:
    """End the run of seed 3 at half of the steps."""
    write_csv(folder / "seed_03", [(10, {"test_acc": 0.9})])
