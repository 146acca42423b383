"""Every pair of modes in a Trainer: test by a checkpoint, resume, load, export; the table of `docs/input_norm.md`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.lit import trainer
from helpers.raw import RawData, SeeingNet, raw_images
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_revbn import InputNorm
from lightning_revbn.core.input_norm import MissingStatisticsError

MODES = ("batch", "running", "ema", "fixed")
IMAGES = raw_images(48)[0]
UNITS = IMAGES.double() / 255
MEAN, VARIANCE = UNITS.mean((0, 2, 3)), UNITS.var((0, 2, 3), correction=0)
MOMENTUM = 0.3
PAIRS = [(saved, loaded) for saved in MODES for loaded in MODES]


def data(mode: Any) -> RawData:
    given = {"mean": MEAN, "std": VARIANCE.sqrt()} if mode == "fixed" else {}
    return RawData(InputNorm(3, scale=1.0, mode=mode, momentum=MOMENTUM, **given))


def average(start: tuple[Tensor, Tensor, float], epochs: int) -> tuple[Tensor, Tensor, float]:
    """Return a moving average of first and second moments after some epochs, by hand, from where it starts."""
    first, second, weight = start
    for _ in range(epochs):
        for batch in UNITS.split(8):
            first = (1 - MOMENTUM) * first + MOMENTUM * batch.mean((0, 2, 3))
            second = (1 - MOMENTUM) * second + MOMENTUM * batch.square().mean((0, 2, 3))
            weight = (1 - MOMENTUM) * weight + MOMENTUM
    return first, second, weight


NOTHING = (torch.zeros(3).double(), torch.zeros(3).double(), 0.0)
EVERYTHING = (MEAN, VARIANCE + MEAN.square(), 1.0)


def expected(mean: Tensor, variance: Tensor) -> Tensor:
    return (UNITS - mean.view(3, 1, 1)) / (variance.view(3, 1, 1) + 1e-5).sqrt()


def of_average(first: Tensor, second: Tensor, weight: float) -> Tensor:
    return expected(first / weight, second / weight - (first / weight).square())


def evaluation(saved: str, loaded: str) -> Tensor:
    """Return what evaluation must give with a checkpoint of one epoch."""
    if loaded == saved == "ema":
        return of_average(*average(NOTHING, 1))
    return expected(MEAN, VARIANCE)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    for mode in MODES:
        run = trainer(folder, max_epochs=1, limit_val_batches=0)
        run.fit(SeeingNet(), data(mode))
        run.save_checkpoint(folder / f"{mode}.ckpt")
    return {mode: folder / f"{mode}.ckpt" for mode in MODES}


@pytest.mark.parametrize(("saved", "loaded"), PAIRS)
def test_testing_by_a_checkpoint(saved: str, loaded: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    network, own = SeeingNet(), data(loaded)
    run = trainer(tmp_path)
    if saved == "fixed" != loaded:
        both = f'mode "fixed", which learns no statistics, and this is mode "{loaded}"'
        with pytest.raises(MisconfigurationException, match=re.escape(both)):
            run.test(network, own, ckpt_path=checkpoints[saved], verbose=False)
        return
    run.test(network, own, ckpt_path=checkpoints[saved], verbose=False)
    seen = torch.cat(network.seen["eval"])
    torch.testing.assert_close(seen.double(), evaluation(saved, loaded), rtol=0, atol=1e-5)
    torch.testing.assert_close(own.export_normalizer()(IMAGES), seen, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(own.denormalize(seen).double(), UNITS, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("saved", "loaded"), PAIRS)
def test_resuming(saved: str, loaded: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    network, own = SeeingNet(), data(loaded)
    trainer(tmp_path, max_epochs=2, limit_val_batches=0).fit(network, own, ckpt_path=checkpoints[saved])
    assert len(network.seen["train"]) == 6
    learns_anew = saved == "fixed"
    count = 0 if loaded == "fixed" else 48 * 36 * (1 if learns_anew else 2)
    assert own.input_statistics().count.tolist() == [count] * 3
    torch.testing.assert_close(own.input_statistics().mean, MEAN, rtol=1e-12, atol=0)
    if loaded == "batch":
        wanted = expected(UNITS[-8:].mean((0, 2, 3)), UNITS[-8:].var((0, 2, 3), correction=0))
    elif loaded == "ema":
        start = {"ema": average(NOTHING, 1), "fixed": NOTHING}.get(saved, EVERYTHING)
        wanted = of_average(*average(start, 1))
    else:
        wanted = expected(MEAN, VARIANCE)
    torch.testing.assert_close(network.seen["train"][-1].double(), wanted[-8:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("saved", "loaded"), PAIRS)
def test_loading_and_exporting(saved: str, loaded: str, checkpoints: dict[str, Path]) -> None:
    own = data(loaded)
    if saved == "fixed" != loaded:
        both = f'mode "fixed", which learns no statistics, and this is mode "{loaded}"'
        with pytest.raises(ValueError, match=re.escape(both)):
            own.load_input_statistics(checkpoints[saved])
        with pytest.raises(MissingStatisticsError):
            own.export_normalizer()
        return
    own.load_input_statistics(checkpoints[saved])
    result = own.export_normalizer()(IMAGES)
    torch.testing.assert_close(result.double(), evaluation(saved, loaded), rtol=0, atol=1e-5)


def test_other_constants_than_those_that_the_network_was_trained_with_are_told(
    checkpoints: dict[str, Path],
) -> None:
    other = RawData(InputNorm(3, mode="fixed", mean=[0.9] * 3, std=[0.2] * 3))
    for saved in MODES:
        with pytest.warns(UserWarning, match=rf'of a run in mode "{saved}" .* mode "fixed" uses its constants alone'):
            other.load_input_statistics(checkpoints[saved])
    assert other.input_statistics().mean.tolist() == [0.9] * 3


def test_a_checkpoint_from_before_the_first_batch_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, limit_train_batches=0, limit_val_batches=0)
    run.fit(SeeingNet(), data("batch"))
    run.save_checkpoint(tmp_path / "empty.ckpt")
    with pytest.raises(ValueError, match='saved in mode "batch" before the first training batch'):
        data("running").load_input_statistics(tmp_path / "empty.ckpt")
