"""The Fashion-MNIST example on small files of the same format."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fashion_mnist import main, read_idx


@pytest.fixture
def lightning_log_level() -> Iterator[None]:
    """Undo what the example does to Lightning's log messages."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    yield
    log.setLevel(level)


@pytest.mark.usefixtures("lightning_log_level")
def test_it_trains_both_arms_and_tells_the_statistics(
    idx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = f"--data-dir {idx_folder} --output {tmp_path} --seeds 1 --epochs 1 --train-images 64 --batch-size 32"
    monkeypatch.setattr(sys, "argv", ["fashion_mnist.py", *arguments.split(), "--accelerator", "cpu"])
    main()
    first, second = capsys.readouterr().out.splitlines()
    images = read_idx(idx_folder, "train-images-idx3-ubyte")[:64] / 255
    for line, name, scale in ((first, "baseline", "0.58"), (second, "revisited", "0.058")):
        assert re.fullmatch(
            rf"seed 1, {name}: test accuracy [\d.]+ %, input mean {images.mean():.4f}, "
            rf"std {images.std(correction=0):.4f}, scale of the input {scale}",
            line,
        )


def test_files_that_are_missing_or_broken_are_named(idx_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist and pass --data-dir"):
        read_idx(tmp_path, "train-images-idx3-ubyte")
    (tmp_path / "cut").write_bytes((idx_folder / "t10k-labels-idx1-ubyte").read_bytes()[:-1])
    with pytest.raises(ValueError, match="states 500 bytes and has 499"):
        read_idx(tmp_path, "cut")
    (tmp_path / "text").write_bytes(b"not an idx file")
    with pytest.raises(ValueError, match="is no idx file of bytes"):
        read_idx(tmp_path, "text")
    assert read_idx(idx_folder, "t10k-images-idx3-ubyte").shape == torch.Size([500, 28, 28])
