"""Kill training at random moments and resume it, many times: every run must end as the undisturbed one, to the bit.

`make kill-and-resume` runs many trials, and test_resumed_runs.py some.

Each trial trains in processes of its own, which get SIGKILL at a random time after a random event (a step begins, the
optimizer steps, a checkpoint is being written), and resume from the newest complete checkpoint. The parent imports
torch once, never trains, and forks.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # a parent with threads must not fork

import argparse
import logging
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # it is run from a shell too

import torch
from helpers.lit import LitNet, loader, trainer
from helpers.models import residual_net
from helpers.states import same
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from lightning_revbn import RevisitedBatchNorm

STEPS, BATCHES = 12, 4
EVENTS = {b"b": "in a step", b"o": "in the optimizer's step", b"s": "while saving", b"": "before the first step"}


class Told(TorchCheckpointIO):
    """Tells the parent when a checkpoint is being written."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        os.write(self.pipe, b"s")
        super().save_checkpoint(checkpoint, path, storage_options)


class Net(LitNet):
    """Tells the parent where it is; momentum, and a schedule that writes one learning rate into all groups."""

    def __init__(self, pipe: int, seed: int) -> None:
        # Whoever resumes starts from other values, and without the zeros: all must come from the checkpoint.
        super().__init__(one_cycle, residual_net(seed, zero_init_residual=seed == 0))
        self.pipe = pipe

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        os.write(self.pipe, b"b")
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        os.write(self.pipe, b"o")


def one_cycle(module: nn.Module) -> dict[str, Any]:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=STEPS + 1)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def train(folder: Path, saved: Path | None, pipe: int) -> None:
    """Train to the end from a checkpoint, and save everything that the run has become."""
    torch.set_num_threads(1)
    tempfile.tempdir = str(folder)  # checkpoints are written here first
    callback = RevisitedBatchNorm()
    save = ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
    module = Net(pipe, seed=0 if saved is None else 1)
    run = trainer(folder, callback, save, plugins=Told(pipe), enable_checkpointing=True, max_epochs=-1, max_steps=STEPS)
    run.fit(module, loader(BATCHES), ckpt_path=saved)
    assert run.global_step == STEPS
    state = {
        "model": module.state_dict(),
        "optimizer": run.optimizers[0].state_dict(),
        "schedule": run.lr_scheduler_configs[0].scheduler.state_dict(),
        "callback": callback.state_dict(),
    }
    torch.save(state, folder / "writing.pt")
    (folder / "writing.pt").rename(folder / "end.pt")


def fork(folder: Path, saved: Path | None) -> tuple[int, int]:
    """Start a process that trains, and return its id and where it tells its events."""
    told, pipe = os.pipe()
    pid = os.fork()
    if pid:
        os.close(pipe)
        return pid, told
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        train(folder, saved, pipe)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def run(folder: Path, saved: Path | None, kill_after: int | None = None, delay: float = 0.0) -> bytes | None:
    """Train in a process, which is killed some time after an event, counted from 0; None lets it end.

    Returns:
        The last event before it was killed; None if it ended by itself.
    """
    pid, told = fork(folder, saved)
    last, count = b"", 0
    while kill_after is None or count < kill_after:
        event = os.read(told, 1)
        if not event:
            break
        last, count = event, count + 1
    if kill_after is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)  # not waited for yet, so the id is still that of this process
    while event := os.read(told, 1):
        last = event
    os.close(told)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return last
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"training failed:\n{(folder / 'log.txt').read_text()[-3000:]}")
    return None


def newest(folder: Path) -> tuple[Path | None, int]:
    """Return the complete checkpoint of the latest step, and how many are torn, which are removed."""
    steps: dict[Path, int] = {}
    torn = 0
    for file in sorted((folder / "saved").glob("*.ckpt")):
        try:
            steps[file] = torch.load(file, weights_only=True)["global_step"]
        except (RuntimeError, OSError, EOFError):  # noqa: PERF203 # one try a file is what it takes
            torn += 1
            file.unlink()
    return max(steps, key=lambda file: steps[file], default=None), torn


def main(trials: int, seed: int) -> int:
    """Run the trials, print what came of them, and return how many did not end as they should."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    dice = random.Random(seed)
    struck: Counter[str] = Counter()
    torn_by_kill = cut = resumed = 0
    differ: list[int] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "undisturbed"
        folder.mkdir()
        began = time.monotonic()
        run(folder, None)
        event_time = (time.monotonic() - began) / (3 * STEPS)
        undisturbed = torch.load(folder / "end.pt", weights_only=False)
        for trial in range(trials):
            folder = Path(place) / str(trial)
            folder.mkdir()
            saved: Path | None = None
            for _ in range(dice.randint(1, 3)):
                event = run(folder, saved, dice.randrange(3 * STEPS), dice.uniform(0, 3 * event_time))
                while event is None and saved is None:  # every trial is killed at least once
                    shutil.rmtree(folder)
                    folder.mkdir()
                    event = run(folder, saved, dice.randrange(3 * STEPS), dice.uniform(0, 3 * event_time))
                if event is None:
                    break
                struck[EVENTS[event]] += 1
                saved, torn = newest(folder)
                torn_by_kill += torn
                if saved is not None and dice.random() < 0.25:
                    # What a kill leaves where the temporary directory is on another disk than the checkpoints.
                    os.truncate(saved, dice.randrange(saved.stat().st_size))
                    saved, torn = newest(folder)
                    cut += torn
            if not (folder / "end.pt").exists():
                run(folder, saved)
            resumed += saved is not None
            if not same(torch.load(folder / "end.pt", weights_only=False), undisturbed):
                differ.append(trial)
    print(f"{trials} trials (seed {seed}), {struck.total()} kills:", ", ".join(f"{n} {w}" for w, n in struck.items()))
    print(f"{resumed} resumed from a checkpoint at last, {trials - resumed} began again: none was complete yet")
    print(f"torn checkpoint files: {torn_by_kill} by the kills, {cut} cut short on purpose; each was passed over")
    print(f"{trials - len(differ)} of {trials} end bit-identical to the undisturbed run", differ or "")
    return len(differ)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.exit(min(main(arguments.trials, arguments.seed), 1))
