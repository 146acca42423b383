"""Measures the cost of the callback in a whole training run: the demo's network trained without and with it, in turns.

Every run is a new process, imports included, with Lightning's default logger and logging interval. Each figure is the
median over rounds of the ratio within a round, for the time on the clock and the CPU time. `plain again` repeats the
plain run and shows the noise. The share of the callback's hooks, logging included, comes from Lightning's profiler and
does not depend on the noise. It leaves out the update inside `optimizer.step()`, and activations inside the network.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
ARMS = {
    "plain": "",
    "plain again": "",
    "RevisitedBatchNorm()": "RevisitedBatchNorm()",
    "the same, activations=True": "RevisitedBatchNorm(monitor=BatchNormMonitor(activations=True))",
}
SCRIPT = """
import time
start = time.perf_counter()
import sys, warnings
sys.path.insert(0, {examples!r})
warnings.filterwarnings("ignore")
import lightning as L
import torch
from digits import Digits, DigitsResNet
from lightning.pytorch.profilers import SimpleProfiler
from lightning_revbn import BatchNormMonitor, RevisitedBatchNorm
torch.set_num_threads(1)
L.seed_everything(1, verbose=False)
trainer = L.Trainer(
    accelerator="cpu", max_epochs={epochs}, default_root_dir={folder!r}, callbacks=[{callback}], profiler={profiler},
    enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
)
trainer.fit(DigitsResNet(), Digits())
if {profiler}:
    times = trainer.profiler.recorded_durations
    own = sum(sum(times[name]) for name in times if name.startswith("[Callback]RevisitedBatchNorm"))
    print(own / (time.perf_counter() - start))
"""


def train(callback: str, epochs: int, profiler: str = "None") -> str:
    """Train in a new process.

    Args:
        callback: The Trainer's callback, as Python code.
        epochs: Number of epochs.
        profiler: The Trainer's profiler, as Python code.

    Returns:
        The output of the process.
    """
    with tempfile.TemporaryDirectory() as folder:
        code = SCRIPT.format(examples=str(EXAMPLES), epochs=epochs, folder=folder, callback=callback, profiler=profiler)
        done = subprocess.run(
            [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    return done.stdout


def timed(callback: str, epochs: int) -> tuple[float, float]:
    """Train in a new process and return the seconds on the clock and of CPU time."""
    before, start = os.times(), time.perf_counter()
    train(callback, epochs)
    clock, after = time.perf_counter() - start, os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return clock, used


def describe(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    """Print the ratios to the plain run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7, help="rounds of the comparison (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=100, help="epochs of a run (default: %(default)s, as the demo)")
    arguments = parser.parse_args()
    names = list(ARMS)
    rounds: list[dict[str, tuple[float, float]]] = []
    for round_ in range(arguments.rounds):
        turn = round_ % len(names)
        rounds.append({name: timed(ARMS[name], arguments.epochs) for name in names[turn:] + names[:turn]})
    clock, used = (statistics.median(times["plain"][kind] for times in rounds) for kind in (0, 1))
    print(f"whole process, demo's network, {arguments.epochs} epochs, {arguments.rounds} rounds, ratio in one round")
    print(f"{'':<28} {'time on the clock':<26} CPU time")
    for name in names[1:]:
        ratios = [[times[name][kind] / times["plain"][kind] for times in rounds] for kind in (0, 1)]
        print(f"{name:<28} {describe(ratios[0]):<26} {describe(ratios[1])}")
    print(f"{'plain':<28} {clock:.1f} s{'':<20} {used:.1f} s")
    share = float(train(ARMS["RevisitedBatchNorm()"], arguments.epochs, profiler="SimpleProfiler()").split()[-1])
    print(f"share of the whole process in the hooks of RevisitedBatchNorm(): {100 * share:.2f} %")


if __name__ == "__main__":
    main()
