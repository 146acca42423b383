"""Raw uint8 images of Fashion-MNIST, normalised online with the mixin and the callback, on one device or several.

The data are the four idx files of Fashion-MNIST, gzipped or not. Install them with
`apt install dataset-fashion-mnist` on Debian, or let torchvision download them::

    python examples/fashion_mnist.py --data-dir /usr/share/datasets/fashion-mnist
    python examples/fashion_mnist.py --data-dir data --download --devices 2 --strategy ddp
"""

from __future__ import annotations

import argparse
import gzip
import logging
import struct
import warnings
from pathlib import Path

import lightning as L
import numpy as np
import torch
from digits import DigitsResNet
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_revbn import InputNorm, OnlineInputNormMixin, RevisitedBatchNorm

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
SEEDS = (1, 2, 3)


class FashionMNIST(OnlineInputNormMixin, L.LightningDataModule):
    """Batches of raw images, uint8 of shape `(N, 1, 28, 28)`, and labels.

    The mixin learns the mean and standard deviation of the data set while training, so the script needs no constants.

    Args:
        data_dir: Directory of the idx files.
        batch_size: Samples per batch, on each device.
        train_images: Number of training images, at most 55,000. The last 5,000 of the 60,000 are for validation.
        mode: The mode of `InputNorm`.
        freeze_after: As in `InputNorm`.
    """

    def __init__(
        self,
        data_dir: Path,
        batch_size: int = 128,
        train_images: int = 55_000,
        mode: str = "batch",
        freeze_after: int | None = None,
    ) -> None:
        super().__init__(input_norm=InputNorm(num_features=1, mode=mode, freeze_after=freeze_after))
        self.data_dir = data_dir
        self.batch_size = batch_size
        self.train_images = train_images

    def setup(self, stage: str) -> None:
        """Read the files."""
        images, labels = read_split(self.data_dir, "train")
        self.train = TensorDataset(images[: self.train_images], labels[: self.train_images])
        self.val = TensorDataset(images[-5000:], labels[-5000:])
        self.test = TensorDataset(*read_split(self.data_dir, "t10k"))

    def train_dataloader(self) -> DataLoader:
        """Return the training images, in a new order every epoch."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """Return the validation images."""
        return DataLoader(self.val, 500)

    def test_dataloader(self) -> DataLoader:
        """Return the test images."""
        return DataLoader(self.test, 500)


def read_split(data_dir: Path, split: str) -> tuple[Tensor, Tensor]:
    """Read images `(N, 1, 28, 28)` and labels `(N,)` of a split, `"train"` or `"t10k"`.

    Args:
        data_dir: Directory of the files.
        split: Name of the split.

    Returns:
        uint8 images and int64 labels.
    """
    images = read_idx(data_dir, f"{split}-images-idx3-ubyte")
    return images.unsqueeze(1), read_idx(data_dir, f"{split}-labels-idx1-ubyte").long()


def read_idx(data_dir: Path, name: str) -> Tensor:
    """Read an idx file of bytes (http://yann.lecun.com/exdb/mnist, "file formats").

    Args:
        data_dir: Directory of the file, or a directory above it.
        name: Name of the file without `.gz`.

    Returns:
        uint8 values in the shape that the file states.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not an idx file of bytes, or is cut short.
    """
    found = sorted(path for ending in ("", ".gz") for path in data_dir.rglob(name + ending))
    if not found:
        raise FileNotFoundError(
            f"no {name} or {name}.gz below {data_dir}: install Debian's package dataset-fashion-mnist and pass "
            f"--data-dir {DEBIAN}, or pass --download where there is internet"
        )
    content = gzip.decompress(found[0].read_bytes()) if found[0].suffix == ".gz" else found[0].read_bytes()
    zero, kind, dims = struct.unpack_from(">HBB", content)
    if zero != 0 or kind != 8:
        raise ValueError(f"{found[0]} is no idx file of bytes")
    shape = struct.unpack_from(f">{dims}I", content, 4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dims)
    if len(values) != np.prod(shape):
        raise ValueError(f"{found[0]} states {np.prod(shape)} bytes and has {len(values)}")
    return torch.from_numpy(values.reshape(shape).copy())


def train(arguments: argparse.Namespace, seed: int, revisited: bool) -> float:
    """Train once and return the test accuracy in percent."""
    L.seed_everything(seed, verbose=False)
    data = FashionMNIST(
        arguments.data_dir, arguments.batch_size, arguments.train_images, arguments.mode, arguments.freeze_after
    )
    trainer = L.Trainer(
        accelerator=arguments.accelerator,
        devices=arguments.devices,
        strategy=arguments.strategy,
        max_epochs=arguments.epochs,
        callbacks=[RevisitedBatchNorm(scale=arguments.scale)] if revisited else [],
        logger=CSVLogger(arguments.output, name="revisited" if revisited else "baseline", version=f"seed{seed}"),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    network = DigitsResNet()
    trainer.fit(network, data)
    (result,) = trainer.test(network, data, verbose=False)
    if trainer.is_global_zero:
        mean, std, _ = data.input_statistics()
        name = "revisited" if revisited else "baseline"
        print(
            f"seed {seed}, {name}: test accuracy {100 * result['test_acc']:.2f} %, input mean {mean.item():.4f}, "
            f"std {std.item():.4f}, scale of the input {data.input_scale:g}",
            flush=True,
        )
    return 100 * result["test_acc"]


def main() -> None:
    """Train the network with and without the callback, on the same raw images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=DEBIAN, help="where the idx files are (default: %(default)s)")
    parser.add_argument("--download", action="store_true", help="let torchvision download them into --data-dir")
    parser.add_argument("--output", type=Path, default=Path("fashion_mnist_output"), help="for the logs")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of the runs (default: 1 2 3)")
    parser.add_argument("--scale", type=float, default=0.1, help="where batch norm scales start (default: 0.1)")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128, help="on each device")
    parser.add_argument("--train-images", type=int, default=55_000)
    parser.add_argument("--mode", default="batch", choices=["batch", "running", "ema"], help="of the input statistics")
    parser.add_argument("--freeze-after", type=int, help="samples after which the input statistics stay as they are")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--strategy", default="auto")
    arguments = parser.parse_args()
    if arguments.download:
        from torchvision.datasets import FashionMNIST as Downloader

        for is_train in (True, False):
            Downloader(str(arguments.data_dir), train=is_train, download=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="The '\\w+_dataloader' does not have many workers")
    for seed in arguments.seeds:
        for revisited in (False, True):
            train(arguments, seed, revisited)


if __name__ == "__main__":
    main()
