"""Small files in the format of Fashion-MNIST."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

COUNTS = {"train": 5100, "t10k": 500}
"""Number of images in each split."""


def write_idx(path: Path, values: NDArray[np.uint8]) -> None:
    """Write an idx file of bytes, compressed if its name ends in `.gz`."""
    content = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_fashion_mnist(folder: Path) -> None:
    """Write random images and labels under the names of Fashion-MNIST; the training split is compressed."""
    random = np.random.default_rng(0)
    for split, count in COUNTS.items():
        ending = ".gz" if split == "train" else ""
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(folder / f"{split}-images-idx3-ubyte{ending}", images)
        write_idx(folder / f"{split}-labels-idx1-ubyte{ending}", random.integers(0, 10, count, dtype=np.uint8))
