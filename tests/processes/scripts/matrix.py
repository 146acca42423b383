"""Run by test_matrix.py and benchmarks/matrix.py: the cells of one strategy, in one process tree.

Each cell is trained three times: without the callback, with scales and parameter groups made by hand; with the
callback; and again, by a net of other values, from a checkpoint in the middle of an epoch. All must end with the same
values, to the bit. What Lightning refuses without the callback it must refuse with it, in the same words.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # it is run from a shell too

import torch
from helpers.cells import CELLS, Cell, sample
from helpers.lit import Batches, LitNet, trainer
from helpers.logs import logged_in
from helpers.models import BATCH_NORMS, images, residual_net, scales
from helpers.ranks import end_rank
from helpers.strategies import Sharding, strategy_of, values
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW, Optimizer

from lightning_revbn import BatchNormMonitor, RevisitedBatchNorm

LR = 0.5
# Near 0.1 the numbers of bfloat16 are 0.0005 apart: of a hundredth of the rate nothing would be left to compare.
DIVISOR = {"32-true": 100.0, "bf16-mixed": 100.0, "bf16-true": 4.0, "16-mixed": 100.0}
BATCHES, STOP = 4, 3  # batches in an epoch, and after which one the checkpoint is saved that is resumed
SCALER_START = 2.0**18  # so large that gradients overflow at the first step if they are not divided, and it is skipped
CLIP = {"norm": 0.05, "value": 0.005}
AFFINE = [f"{part}_{what}" for part in ("scale", "shift") for what in ("mean", "std", "min", "max", "drift")]
ACTIVATIONS = ["normalized_absmax", "normalized_over_3"]
KEYS = {
    *(f"revbn/model.{layer}/{name}" for layer in BATCH_NORMS for name in AFFINE + ACTIVATIONS),
    *(f"revbn/{name}" for name in ("scale_mean", "scale_drift", "shift_drift", "scale_lr", *ACTIVATIONS)),
}


class MatrixNet(LitNet):
    """Trains as a cell says; manual optimization accumulates and clips by hand."""

    def __init__(self, cell: Cell, groups_by_hand: bool = False, seed: int = 0) -> None:
        super().__init__(model=residual_net(seed))
        self.cell = cell
        self.groups_by_hand = groups_by_hand
        self.automatic_optimization = cell.optimization == "automatic"
        if groups_by_hand:
            for scale in scales(self):
                nn.init.constant_(scale, 0.1)

    def train_dataloader(self) -> Batches:
        # In order, on each rank others; they remember where they are, for a checkpoint in the middle of an epoch.
        return Batches(*images(BATCHES * 4, seed=self.trainer.global_rank), 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = cross_entropy(self.model(batch[0]), batch[1])
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss / self.cell.accumulation)
        if (batch_idx + 1) % self.cell.accumulation == 0 or batch_idx + 1 == BATCHES:
            held = self.optimizers()
            for optimizer in held if isinstance(held, list) else [held]:
                optimizer.step()
                optimizer.zero_grad()
        return None

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        # Here, and not in training_step, gradients are what they are, whatever a GradScaler multiplied them with.
        if not self.automatic_optimization and self.cell.clipping != "off":
            self.clip_gradients(optimizer, CLIP[self.cell.clipping], self.cell.clipping)

    def configure_optimizers(self) -> list[Optimizer]:
        own = {id(scale) for scale in scales(self)}
        parameters = list(self.parameters())
        optimizers: list[Optimizer] = []
        for index in range(self.cell.optimizers):
            of_one = parameters[index :: self.cell.optimizers]  # both hold scales
            rest = [parameter for parameter in of_one if id(parameter) not in own]
            divided = [parameter for parameter in of_one if id(parameter) in own]
            lr = LR / 10**index
            by_hand = [
                {"params": rest},
                {"params": divided, "lr": lr / DIVISOR[self.cell.precision], "weight_decay": 0.0},
            ]
            # The order of the parameters is the same, since the norm of all gradients is summed in that order.
            groups = by_hand if self.groups_by_hand else [{"params": rest + divided}]
            options = {"lr": lr, "weight_decay": 0.01}
            optimizers.append(AdamW(groups, **options) if index else SGD(groups, momentum=0.9, **options))
        return optimizers


class ShardedMatrixNet(Sharding, MatrixNet):
    pass


class StartsFromTheScale(Callback):
    """Asserts, in every process, that training starts with scales of 0.1 and the parameter groups of the user."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for scale in scales(pl_module):
            local = scale.to_local() if hasattr(scale, "to_local") else scale
            assert (local == torch.tensor(0.1, dtype=scale.dtype)).all(), "training does not start with scales of 0.1"
        assert [len(optimizer.param_groups) for optimizer in trainer.optimizers] == [1] * pl_module.cell.optimizers


def ours(cell: Cell, monitor: Any = False) -> RevisitedBatchNorm:
    return RevisitedBatchNorm(scale_lr_divisor=DIVISOR[cell.precision], monitor=monitor)


def network(cell: Cell, **options: Any) -> MatrixNet:
    return (ShardedMatrixNet if cell.strategy == "fsdp2" else MatrixNet)(cell, **options)


def options(cell: Cell) -> dict[str, Any]:
    """Return the Trainer's arguments."""
    chosen: dict[str, Any] = {"use_distributed_sampler": False, "max_epochs": 2}
    if cell.strategy != "one device":
        chosen |= {"devices": 2, "strategy": strategy_of(cell.strategy, 2)}
    if cell.precision == "16-mixed":  # by name it would become bf16-mixed on a CPU
        chosen["plugins"] = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", SCALER_START))
    else:
        chosen["precision"] = cell.precision
    return chosen | (gradient_options(cell) if cell.optimization == "automatic" else {})


def gradient_options(cell: Cell) -> dict[str, Any]:
    """Return the Trainer's arguments for accumulation and clipping."""
    chosen: dict[str, Any] = {"accumulate_grad_batches": cell.accumulation}
    if cell.clipping != "off":
        chosen |= {"gradient_clip_val": CLIP[cell.clipping], "gradient_clip_algorithm": cell.clipping}
    return chosen


def fit(
    cell: Cell, path: Path, module: MatrixNet, *callbacks: Callback, ckpt_path: Path | None = None, **chosen: Any
) -> str | None:
    """Train, and return the last line of the error that this ends with; None if it ends well."""
    try:
        trainer(path, *callbacks, **{**options(cell), **chosen}).fit(module, ckpt_path=ckpt_path)
    except Exception as error:  # whatever it is, it is a result
        text = "".join(traceback.format_exception_only(error)).strip()
        return text.splitlines()[-1] if "ProcessRaisedException" in text else text
    return None


def train(cell: Cell, path: Path) -> dict[str, Any]:
    """Run a cell and return what became of it."""
    # Spawning takes seconds. Under ddp_spawn the run with the callback is spawned, and what it is compared with forked.
    other = cell._replace(strategy="ddp_fork") if cell.strategy == "ddp_spawn" else cell
    told: dict[str, Any] = {"trainer_arguments": None}
    if cell.by_hand:
        told["trainer_arguments"] = fit(other, path, network(cell), **gradient_options(cell))
        with_ours = fit(other, path, network(cell), ours(cell), **gradient_options(cell))
        if with_ours != told["trainer_arguments"]:
            return told | wrong(f"Lightning says of the Trainer's arguments {told['trainer_arguments']}", with_ours)

    reference, module, resumed = network(cell, groups_by_hand=True), network(cell), network(cell, seed=1)
    every = STOP * cell.optimizers if cell.accumulation == 1 else cell.optimizers  # Lightning counts each optimizer's
    save = ModelCheckpoint(path, "{step}", every_n_train_steps=every, save_top_k=-1, save_on_train_epoch_end=False)
    callbacks = ours(cell, BatchNormMonitor(activations=True)), StartsFromTheScale(), save
    logging = {"logger": CSVLogger(path, "", ""), "enable_checkpointing": True}

    lightnings = fit(other, path, reference)
    with_ours = fit(cell, path, module, *callbacks, **logging)
    if lightnings is not None and with_ours == lightnings:
        return told | {"outcome": "impossible", "detail": lightnings}
    if lightnings is None and with_ours is not None and "RevisitedBatchNorm: " in with_ours:
        return told | {"outcome": "refused", "detail": with_ours}
    if lightnings is not None or with_ours is not None:
        return told | wrong(f"Lightning says {lightnings}", with_ours)
    again = fit(other, path, resumed, ours(cell), ckpt_path=path / f"step={every}.ckpt")
    if again is not None:
        return told | wrong("cannot be resumed", again)

    problems = different(*(values(one) for one in (reference, module, resumed)))
    if torch.distributed.is_initialized():  # ddp and fsdp2: every rank runs this script
        of_ranks: list[list[str]] = [[]] * 2
        torch.distributed.all_gather_object(of_ranks, problems)
        problems = [problem for of_rank in of_ranks for problem in of_rank]
    if is_rank_zero():
        problems += saved(cell, path / f"step={every}.ckpt") + logged(cell, path)
    trained = b"".join(value.double().numpy().tobytes() for value in values(module).values())
    told["digest"] = hashlib.sha256(trained).hexdigest()
    return told | (wrong(*problems) if problems else {"outcome": "ok", "detail": ""})


def wrong(*details: str | None) -> dict[str, str]:
    return {"outcome": "wrong", "detail": "; ".join(map(str, details))}


def is_rank_zero() -> bool:
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def different(reference: dict[str, Tensor], ours: dict[str, Tensor], resumed: dict[str, Tensor]) -> list[str]:
    """Return what is not the same to the bit, on this rank; running statistics are saved from rank 0 alone."""
    problems: list[str] = []
    for key, value in reference.items():
        if not value.isfinite().all():
            problems.append(f"{key} is not finite")
        if not torch.equal(value, ours[key]):
            problems.append(f"{key} differs from hand-made groups")
        if not torch.equal(ours[key], resumed[key]) and (is_rank_zero() or "running" not in key):
            problems.append(f"{key} differs after a resume")
    for layer in BATCH_NORMS:
        scale = ours[f"model.{layer}.weight"]
        if (scale == torch.tensor(0.1, dtype=scale.dtype)).all():
            problems.append(f"the scale of {layer} has not learned")
    return problems


def saved(cell: Cell, checkpoint: Path) -> list[str]:
    """Return what is wrong with the checkpoint: it holds the groups of the user, and loads without running code."""
    state = torch.load(checkpoint, weights_only=True)
    groups = [len(optimizer["param_groups"]) for optimizer in state["optimizer_states"]]
    problems: list[str] = []
    if groups != [1] * cell.optimizers or "RevisitedBatchNorm" not in state["callbacks"]:
        problems.append(f"the checkpoint has {groups} groups, and the callbacks {[*state['callbacks']]}")
    if cell.precision == "16-mixed" and cell.accumulation == 1 and state["MixedPrecision"]["scale"] == SCALER_START:
        problems.append("the scaler has not skipped a step")
    return problems


def logged(cell: Cell, path: Path) -> list[str]:
    """Return what is wrong with the log: every step has every key, the first the start, and all of them lr / c."""
    problems: list[str] = []
    events = logged_in(path)
    # Lightning cannot know when manual optimization steps, and counts every batch.
    steps = 4 if cell.accumulation > 1 and cell.optimization == "automatic" else 2 * BATCHES
    if [int(row["step"]) for row in events] != list(range(steps)):
        problems.append(f"logged at steps {[row['step'] for row in events]}")
    unexpected = {key for row in events for key in (row.keys() - {"step", "epoch"}) ^ KEYS}
    if unexpected:
        return [*problems, f"keys that are missing or too many: {sorted(unexpected)}"]
    rate = sum(LR / 10**index / DIVISOR[cell.precision] for index in range(cell.optimizers)) / cell.optimizers
    if not all(abs(float(row["revbn/scale_lr"]) - rate) < 1e-9 for row in events):
        problems.append("scale_lr is not lr / c")
    if events and abs(float(events[0]["revbn/scale_mean"]) - 0.1) > 1e-3:
        problems.append(f"the first scale_mean is {events[0]['revbn/scale_mean']}")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("strategy", choices=sorted({cell.strategy for cell in CELLS}))
    parser.add_argument("folder", type=Path, help="where runs are written, and results.json")
    parser.add_argument("--sample", action="store_true", help="only the cells of the covering sample")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cells = sample(cell for cell in CELLS if cell.strategy != "one device") if arguments.sample else CELLS
    results: list[dict[str, Any]] = []
    for cell in cells:
        if cell.strategy == arguments.strategy:
            results.append(cell._asdict() | train(cell, arguments.folder / str(cell)))
            if is_rank_zero():
                (arguments.folder / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that are started from here
    main()
    end_rank()
