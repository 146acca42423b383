"""Does revisited batch norm help on real digits? Trains a baseline and a revisited network per seed, and compares them.

Run `make demo`, or `python examples/digits.py --help`. `DigitsResNet` and `Digits` are an ordinary LightningModule and
LightningDataModule, with no code for revisited batch norm: `train` adds it as a callback.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import signal
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import md5
from multiprocessing import get_context
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from paired_report import draw_picture, print_observations, print_table
from rich.console import Console
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_revbn import BatchNormMonitor, RevisitedBatchNorm, find_batch_norms

ARMS = ("baseline", "revisited")
STEPS_PER_EPOCH = 7  # 808 training images in batches of 128; logging at every 7th step logs once per epoch
LIGHTNING_LOG = logging.getLogger("lightning.pytorch")


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm beside a shortcut, `(N, C, H, W)` to `(N, C', H / stride, W / stride)`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut.append(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(residual + self.shortcut(x))


class PaperRecipe(L.LightningModule):
    """Classification of images by a subclass's `forward`, with the training recipe of the paper.

    Args:
        learning_rate: Rate at the start of the cosine schedule, which reaches 1e-8 at the end of training.
        momentum: Momentum of SGD.
        weight_decay: Decay of the weights of convolutions and linear layers only.
        head_init: Initialisation of linear layers: `"paper"` or `"torch"`, see `initialize`.
        optimizer: `"sgd"`, as in the paper, or `"adamw"`.
    """

    def __init__(
        self,
        learning_rate: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        head_init: str = "paper",
        optimizer: str = "sgd",
    ) -> None:
        super().__init__()
        self.learning_rate, self.momentum, self.weight_decay = learning_rate, momentum, weight_decay
        self.head_init, self.optimizer = head_init, optimizer
        self.val_accuracy = MulticlassAccuracy(num_classes=10, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def initialize(self) -> None:
        """Draw the weights as the paper's code does, and set the biases of linear layers to 0.

        The paper's code draws linear weights from U(-sqrt(6 / fan_in), sqrt(6 / fan_in)), a range sqrt(6) times wider
        than torch's default. `head_init="torch"` keeps torch's default.
        """
        for module in self.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
                if self.head_init == "paper":
                    nn.init.kaiming_uniform_(module.weight, mode="fan_in", nonlinearity="relu")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy of a batch."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the logits of a batch; only the first loader's batches count in the validation accuracy."""
        images, labels = batch
        logits = self(images)
        if dataloader_idx == 0:
            self.val_accuracy(logits, labels)
            self.log("val_acc", self.val_accuracy, prog_bar=True, add_dataloader_idx=False)
        return logits

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count a batch in the test accuracy."""
        images, labels = batch
        self.test_accuracy(self(images), labels)
        self.log("test_acc", self.test_accuracy)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return an optimizer that decays only convolutions and linear layers, and its cosine schedule by epochs."""
        kinds = (nn.Conv1d, nn.Conv2d, nn.Linear)
        decayed = [module.weight for module in self.modules() if isinstance(module, kinds)]
        decayed_ids = {id(weight) for weight in decayed}
        others = [parameter for parameter in self.parameters() if id(parameter) not in decayed_ids]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        if self.optimizer == "adamw":
            optimizer: Optimizer = torch.optim.AdamW(groups, lr=self.learning_rate)
        else:
            optimizer = torch.optim.SGD(groups, lr=self.learning_rate, momentum=self.momentum)
        schedule = CosineAnnealingLR(optimizer, T_max=self.trainer.max_epochs, eta_min=1e-8)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class DigitsResNet(PaperRecipe):
    """A ResNet of three stages for small grey images, with the training recipe of the paper.

    Takes images of shape `(N, 1, H, W)` in [0, 1], returns logits of shape `(N, 10)`.

    Args:
        channels: Channels of the three stages; the stem has the channels of the first stage.
        blocks: Residual blocks in a stage.
        learning_rate: As in `PaperRecipe`.
        momentum: As in `PaperRecipe`.
        weight_decay: As in `PaperRecipe`.
        head_init: As in `PaperRecipe`.
        optimizer: As in `PaperRecipe`.
        strides: Strides of the stem and of the three stages.
    """

    def __init__(
        self,
        channels: tuple[int, int, int] = (8, 16, 32),
        blocks: int = 1,
        learning_rate: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        head_init: str = "paper",
        optimizer: str = "sgd",
        strides: tuple[int, int, int, int] = (1, 1, 2, 2),
    ) -> None:
        super().__init__(learning_rate, momentum, weight_decay, head_init, optimizer)
        self.save_hyperparameters()
        self.example_input_array = torch.zeros(1, 1, 8, 8)  # for the sizes in Lightning's summary
        first, last = channels[0], channels[-1]
        stem = nn.Conv2d(1, first, 3, strides[0], padding=1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(first), nn.ReLU())
        self.blocks = nn.Sequential()
        for before, after, stride in zip((first, *channels[:-1]), channels, strides[1:], strict=True):
            self.blocks.append(ResidualBlock(before, after, stride))
            self.blocks.extend(ResidualBlock(after, after, stride=1) for _ in range(blocks - 1))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 10))
        self.initialize()

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.blocks(self.stem(images)))


class Digits(L.LightningDataModule):
    """The 1,797 handwritten digits of 8x8 pixels that scikit-learn ships: no download.

    Half of the images are for testing, and a tenth of the other half for validation. Both splits are stratified and
    the same for every `shuffle_seed`.

    Args:
        batch_size: Images per batch.
        shuffle_seed: Seed of the order of the training batches, independent of all other random numbers.
    """

    def __init__(self, batch_size: int = 128, shuffle_seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.shuffle_seed = shuffle_seed

    def setup(self, stage: str) -> None:
        """Load and split the images, as shape `(1, 8, 8)` in [0, 1]."""
        pixels, labels = load_digits(return_X_y=True)
        images = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
        digits = TensorDataset(images, torch.tensor(labels))
        development, test = train_test_split(range(len(digits)), test_size=0.5, stratify=labels, random_state=0)
        train, val = train_test_split(
            development, test_size=0.1, stratify=labels[development], random_state=derive_seed(0)
        )
        self.train_set = TensorDataset(*digits[train])
        self.val_set = TensorDataset(*digits[val])
        self.test_set = TensorDataset(*digits[test])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the training images, in an order that `shuffle_seed` decides."""
        generator = torch.Generator().manual_seed(self.shuffle_seed)
        return DataLoader(self.train_set, self.batch_size, shuffle=True, generator=generator)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the validation images."""
        return DataLoader(self.val_set, self.batch_size)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the test images."""
        return DataLoader(self.test_set, self.batch_size)


@dataclass(frozen=True)
class Run:
    """A network to train.

    Attributes:
        arm: `"baseline"` or `"revisited"`.
        seed: The number of its pair, from 1.
        epochs: Number of training epochs.
        blocks: Residual blocks in each of the network's three stages.
        scale: Initial value of the batch norm scales in the revisited arm.
        divisor: Divisor of the scales' learning rate in the revisited arm.
        head_init: Initialisation of the last layer, as in `PaperRecipe`.
        log_dir: Directory of the logs.
    """

    arm: str
    seed: int
    epochs: int
    blocks: int
    scale: float
    divisor: float
    head_init: str
    log_dir: Path


def derive_seed(seed: int) -> int:
    """Return the random seed that the paper's code derives from a run's number."""
    return int(md5(str(seed).encode()).hexdigest()[-8:], 16)


def build(seed: int, blocks: int = 1, head_init: str = "paper") -> tuple[DigitsResNet, Digits]:
    """Return a new network and its data; equal seeds give equal initial weights and batches."""
    L.seed_everything(derive_seed(seed), verbose=False)
    return DigitsResNet(blocks=blocks, head_init=head_init), Digits(shuffle_seed=derive_seed(seed))


def train(run: Run, *, show: bool = False) -> float:
    """Train a network and test it.

    Args:
        run: The network to train.
        show: Whether Lightning shows its progress.

    Returns:
        Accuracy on the test images after the last epoch, in %.
    """
    network, digits = build(run.seed, run.blocks, run.head_init)
    callback: L.Callback = BatchNormMonitor(every_n_steps=STEPS_PER_EPOCH, activations=True)
    if run.arm == "revisited":
        callback = RevisitedBatchNorm(scale=run.scale, scale_lr_divisor=run.divisor, monitor=callback)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=run.epochs,
        callbacks=[callback],
        # In this order: CSVLogger warns when it finds the files of another logger in its directory.
        logger=[
            CSVLogger(run.log_dir, name="", version=""),
            TensorBoardLogger(run.log_dir, name="", version="", default_hp_metric=False),
        ],
        log_every_n_steps=STEPS_PER_EPOCH,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=show,
        enable_model_summary=show and run.arm == "baseline",  # both arms have the same summary
    )
    with log_level(logging.INFO if show else logging.WARNING):  # the callback's table is an INFO message
        trainer.fit(network, digits)
    trainer.save_checkpoint(run.log_dir / "network.ckpt")
    (metrics,) = trainer.test(network, digits, verbose=False)
    # Lightning's metrics are float32: rounding to a whole number of images makes equal differences exactly equal.
    images = len(digits.test_set)
    return 100 * round(metrics["test_acc"] * images) / images


def train_all(runs: list[Run], console: Console) -> dict[Run, float]:
    """Train every network, two at a time, and show the progress.

    The first pair trains in this process, where Lightning shows its progress. Two other processes train the rest
    meanwhile.

    Args:
        runs: The networks, pair by pair.
        console: The console that shows the progress.

    Returns:
        Accuracy on the test images by run, in %.
    """
    shown, rest = runs[: len(ARMS)], runs[len(ARMS) :]
    accuracies: dict[Run, float] = {}
    pool = ProcessPoolExecutor(max_workers=2, mp_context=get_context("spawn"), initializer=prepare_worker)
    try:
        futures = {pool.submit(train, run): run for run in rest}
        for run in shown:
            console.rule(f"seed {run.seed}, {run.arm}")
            accuracies[run] = train(run, show=True)
        if rest:
            console.rule(f"{len(rest)} more runs, two at a time")
            for future in track(as_completed(futures), "Training", total=len(futures), console=console):
                accuracies[futures[future]] = future.result()
    finally:
        pool.shutdown(cancel_futures=True)
    return accuracies


@contextmanager
def log_level(level: int) -> Iterator[None]:
    """Set the level of Lightning's log for a `with` block."""
    before = LIGHTNING_LOG.level
    LIGHTNING_LOG.setLevel(level)
    try:
        yield
    finally:
        LIGHTNING_LOG.setLevel(before)


def prepare_process() -> None:
    """Prepare this process for many small runs."""
    # Layers this small gain nothing from a second thread, and another run uses the second core better. With a single
    # thread, sums do not depend on the number of cores.
    torch.set_num_threads(1)
    LIGHTNING_LOG.setLevel(logging.WARNING)
    # 808 images in memory need no worker processes.
    warnings.filterwarnings("ignore", message=r"The '\w+_dataloader' does not have many workers")
    # Lightning 2.6 uses a function that torch 2.14 deprecates.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")


def prepare_worker() -> None:
    """Prepare a process of the pool."""
    prepare_process()
    # Ctrl-C reaches every process: the workers end at once, and only the main process reports the interrupt.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the settings of the command line; end the program with a single-line error if a value is wrong."""
    parser = argparse.ArgumentParser(
        description="Trains a baseline and a revisited network on digits for every seed, and compares them in pairs."
    )
    parser.add_argument("--seeds", type=int, default=8, metavar="N", help="pairs to train (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=100, metavar="N", help="epochs of a run (default: %(default)s)")
    parser.add_argument(
        "--blocks", type=int, default=1, metavar="N", help="blocks in each of three stages (default: %(default)s)"
    )
    parser.add_argument(
        "--scale", type=float, default=0.1, metavar="G", help="where batch norm scales start (default: %(default)s)"
    )
    parser.add_argument(
        "--divisor",
        type=float,
        default=100.0,
        metavar="C",
        help="what the scales' learning rate is divided by; 1 switches that off (default: %(default)g)",
    )
    parser.add_argument(
        "--head-init",
        choices=("paper", "torch"),
        default="paper",
        help="how the last layer starts: as in the paper's code, or as torch has it (default: %(default)s)",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("demo_output"),
        metavar="DIR",
        help="where logs and picture go, in place of those of an earlier demo (default: %(default)s)",
    )
    settings = parser.parse_args(arguments)
    for option in ("seeds", "epochs", "blocks"):
        if getattr(settings, option) < 1:
            parser.error(f"--{option} must be at least 1, got {getattr(settings, option)}")
    try:
        RevisitedBatchNorm(scale=settings.scale, scale_lr_divisor=settings.divisor)
        settings.output_dir.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return settings


def main(arguments: list[str] | None = None) -> None:
    """Train, compare and draw."""
    settings = parse_arguments(arguments)
    prepare_process()
    console = Console()
    for arm in ARMS:
        for earlier in settings.output_dir.glob(f"{arm}/seed_*"):
            shutil.rmtree(earlier)
    runs = [
        Run(
            arm=arm,
            seed=seed,
            epochs=settings.epochs,
            blocks=settings.blocks,
            scale=settings.scale,
            divisor=settings.divisor,
            head_init=settings.head_init,
            log_dir=settings.output_dir / arm / f"seed_{seed:02}",
        )
        for seed in range(1, settings.seeds + 1)
        for arm in ARMS
    ]
    accuracies = train_all(runs, console)
    baseline, revisited = ([accuracies[run] for run in runs if run.arm == arm] for arm in ARMS)
    print_table(baseline, revisited, console)
    logs = {arm: [run.log_dir / "metrics.csv" for run in runs if run.arm == arm] for arm in ARMS}
    print_observations(logs["baseline"], logs["revisited"], console)
    picture = settings.output_dir / "digits.png"
    draw_picture(
        picture,
        baseline,
        revisited,
        scale_logs=[run.log_dir / "metrics.csv" for run in runs[: len(ARMS)]],
        layers=[record.name for record in find_batch_norms(DigitsResNet(blocks=settings.blocks))],
    )
    console.print(
        f"Logs: tensorboard --logdir {settings.output_dir}, or metrics.csv in each run's directory", soft_wrap=True
    )
    console.print(f"Picture: {picture}", soft_wrap=True)


if __name__ == "__main__":
    main()
