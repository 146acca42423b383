"""Statistics that are collected before training, reset, and frozen."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.lit import Batches, trainer
from helpers.raw import RawData, SeeingNet, raw_images, same_states
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from lightning_revbn import InputNorm
from lightning_revbn.core.input_norm import MissingStatisticsError
from lightning_revbn.data.loader_shares import loader_share

IMAGES, LABELS = raw_images(48)
UNITS = IMAGES.double() / 255
VARIANCE = UNITS.var((0, 2, 3), correction=0, keepdim=True)
EVALUATED = (UNITS - UNITS.mean((0, 2, 3), keepdim=True)) / (VARIANCE + 1e-5).sqrt()


def assert_of(data: RawData, units: Tensor) -> None:
    statistics = data.input_statistics()
    torch.testing.assert_close(statistics.mean, units.mean((0, 2, 3)), rtol=1e-12, atol=0)
    torch.testing.assert_close(statistics.std, units.std((0, 2, 3), correction=0), rtol=1e-12, atol=0)
    assert statistics.count.tolist() == [units[:, 0].numel()] * 3


# --- collecting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["batch", "running"])
def test_a_pass_before_training_learns_the_training_data(mode: Any, tmp_path: Path) -> None:
    data, network = RawData(InputNorm(3, scale=1.0, mode=mode), shuffle=True), SeeingNet()
    data.collect_input_statistics()
    assert_of(data, UNITS)
    trainer(tmp_path).validate(network, RawDataWith(data), verbose=False)
    seen = torch.cat(network.seen["eval"]).double()
    expected = (UNITS - UNITS.mean((0, 2, 3), keepdim=True)) / (
        UNITS.var((0, 2, 3), correction=0, keepdim=True) + 1e-5
    ).sqrt()
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-5)
    data.collect_input_statistics()  # begins anew
    assert_of(data, UNITS)


class RawDataWith(RawData):
    """Has the statistics of another DataModule, and loaders in order."""

    def __init__(self, other: RawData) -> None:
        super().__init__(other.input_norm)  # type: ignore[arg-type]
        self.load_state_dict(other.state_dict())


def test_a_limit_reads_so_many_batches(tmp_path: Path) -> None:
    data = RawData()
    data.collect_input_statistics(limit_batches=2)
    assert_of(data, UNITS[:16])
    data.collect_input_statistics(np.int64(100))  # type: ignore[arg-type]
    assert_of(data, UNITS)
    for wrong in (0, -1, 1.5, "all"):
        with pytest.raises(ValueError, match="must be a number of batches above 0, or None"):
            data.collect_input_statistics(wrong)  # type: ignore[arg-type]


def test_a_fit_is_the_same_after_a_pass_but_for_its_statistics(tmp_path: Path) -> None:
    seen: list[Tensor] = []
    for collects in (False, True):
        data, network = RawData(shuffle=True), SeeingNet()
        torch.manual_seed(7)
        random.seed(7)
        if collects:
            data.collect_input_statistics()
        trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(network, data)
        seen.append(torch.cat(network.seen["train"]))
        assert data.input_statistics().count.tolist() == [48 * 36 * (1 + collects)] * 3
    assert torch.equal(*seen)


def test_the_hooks_before_it_see_the_batches_as_in_training(tmp_path: Path) -> None:
    class Augmented(RawData):
        def setup(self, stage: str) -> None:
            self.collect_input_statistics()

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] // 2, batch[1]]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return super().on_after_batch_transfer([255 - batch[0], batch[1]], dataloader_idx)

    class Cropping(SeeingNet):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0][..., :5], batch[1]]

    data = Augmented()
    run = trainer(tmp_path, limit_train_batches=0, limit_val_batches=0)
    run.fit(Cropping(), data)
    assert_of(data, (255 - IMAGES // 2)[..., :5].double() / 255)


def test_the_sanity_check_is_that_of_collected_statistics(tmp_path: Path) -> None:
    class Collecting(RawData):
        def setup(self, stage: str) -> None:
            self.collect_input_statistics()

    data, network = Collecting(InputNorm(3, scale=1.0)), SeeingNet()
    run = trainer(tmp_path, num_sanity_val_steps=1, limit_val_batches=1, max_epochs=1)
    run.fit(network, data)
    expected = (UNITS[:8] - UNITS.mean((0, 2, 3), keepdim=True)) / (
        UNITS.var((0, 2, 3), correction=0, keepdim=True) + 1e-5
    ).sqrt()
    torch.testing.assert_close(network.seen["eval"][0].double(), expected, rtol=0, atol=1e-5)
    assert data.input_statistics().count.tolist() == [2 * 48 * 36] * 3


def test_a_pass_that_fails_leaves_the_statistics(tmp_path: Path) -> None:
    data = RawData()
    data.collect_input_statistics()
    before = data.state_dict()["input_norm"]
    for images in (IMAGES.float().index_fill(0, torch.tensor([30]), torch.nan), IMAGES[:0]):
        data.images = (images, LABELS[: len(images)])
        with pytest.raises((ValueError, MisconfigurationException), match=r"NaN or infinity|has no batch to collect"):
            data.collect_input_statistics()
        assert same_states(data.state_dict()["input_norm"], before)
    assert not data._is_training


@pytest.mark.parametrize("enabled", [True, False])
def test_the_progress_bar_is_that_of_the_trainer(
    enabled: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Collecting(RawData):
        def setup(self, stage: str) -> None:
            self.collect_input_statistics()

    run = trainer(tmp_path, enable_progress_bar=enabled, limit_train_batches=1, limit_val_batches=0, max_epochs=1)
    run.fit(SeeingNet(), Collecting())
    assert ("Collecting input statistics: 100%" in capfd.readouterr().err) == enabled


def test_what_teaches_nothing_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match='RawData: mode="fixed" has constants'):
        RawData(InputNorm(3, mode="fixed", mean=[0.5] * 3, std=[0.2] * 3)).collect_input_statistics()
    data = RawData(InputNorm(3, nodata=255), (torch.full_like(IMAGES, 255), LABELS))
    with pytest.raises(MisconfigurationException, match="have no value of the input to collect statistics from"):
        data.collect_input_statistics()
    with pytest.raises(MissingStatisticsError):
        data.freeze_input_statistics()


def test_frozen_statistics_let_nan_pass_as_evaluation_does(tmp_path: Path) -> None:
    values, labels = raw_images(48)
    values = values / 255
    data, network = RawData(images=(values, labels)), SeeingNet()
    data.collect_input_statistics()
    data.freeze_input_statistics()
    values[3, 1, 2, 2] = torch.nan
    trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(network, data)
    assert torch.cat(network.seen["train"]).isnan().nonzero().tolist() == [[3, 1, 2, 2]]
    torch.testing.assert_close(network.seen["train"][1], data.export_normalizer()(values[8:16]))


# --- shares of ranks --------------------------------------------------------------------------------------------------


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(range(10))


@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"shuffle": True, "drop_last": True}], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_together_read_a_loader_once(ranks: int, options: dict[str, Any]) -> None:
    loader = DataLoader(TensorDataset(torch.arange(41)), batch_size=4, **options)
    shares = [[batch[0] for batch, *_ in loader_share(loader, rank, ranks)] for rank in range(ranks)]
    read = torch.cat([batch for share in shares for batch in share]).sort().values
    kept = 40 if options.get("drop_last") else 41
    assert len(read) == kept
    assert len(read.unique()) == kept
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_other_loaders_are_read_as_they_are() -> None:
    weighted = DataLoader(TensorDataset(torch.arange(40)), 4, sampler=WeightedRandomSampler([1.0] * 40, 20))
    loaders = {"own": Batches(IMAGES, LABELS), "stream": DataLoader(Stream(), 5), "weighted": weighted}
    for rank in (0, 1):
        share = loader_share(loaders, rank, 2)
        assert [len([*loader]) for loader in share.flattened] == [6, 2, 5]
    assert weighted.batch_sampler is not None
    assert len([*weighted]) == 5


# --- reset, freeze, unfreeze ------------------------------------------------------------------------------------------


class Folds(RawData):
    """Trains on all images but those of one fold."""

    fold = 0

    def train_dataloader(self) -> Any:
        kept = torch.arange(48) % 3 != self.fold
        return DataLoader(TensorDataset(IMAGES[kept], LABELS[kept]), batch_size=8)


def test_folds_of_a_cross_validation_do_not_leak(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = Folds()
    for fold in range(3):
        data.fold = fold
        data.reset_input_statistics()
        network, fresh, alone = SeeingNet(), Folds(), SeeingNet()
        fresh.fold = fold
        trainer(tmp_path, max_epochs=1).fit(network, data)
        trainer(tmp_path, max_epochs=1).fit(alone, fresh)
        assert same_states(data.state_dict()["input_norm"], fresh.state_dict()["input_norm"])
        assert_of(data, UNITS[torch.arange(48) % 3 != fold])
        assert torch.equal(torch.cat(network.seen["eval"]), torch.cat(alone.seen["eval"]))
    assert "reset_input_statistics() forgets them" not in caplog.text
    trainer(tmp_path, max_epochs=1).fit(SeeingNet(), data)
    assert "the statistics of the input begin with 32 samples that were measured before" in caplog.text
    assert "reset_input_statistics() forgets them, for another fold or other data" in caplog.text


def test_a_reset_forgets_what_one_trainer_has_taught(tmp_path: Path) -> None:
    data, run = RawData(), trainer(tmp_path, max_epochs=1)
    run.fit(SeeingNet(), data)
    data.reset_input_statistics()
    with pytest.raises(MissingStatisticsError):
        data.input_statistics()
    data.images = (IMAGES[:24].float(), LABELS[:24])  # of another kind, too
    run.fit_loop.max_epochs = 2
    run.fit(SeeingNet(), data)
    assert data.input_statistics().count.tolist() == [24 * 36] * 3


def test_frozen_statistics_normalise_training_and_stay(tmp_path: Path) -> None:
    data, network = RawData(InputNorm(3, scale=1.0)), SeeingNet()
    with pytest.raises(MissingStatisticsError):
        data.freeze_input_statistics()
    data.collect_input_statistics()
    data.freeze_input_statistics()
    before = data.state_dict()["input_norm"]
    run = trainer(tmp_path, num_sanity_val_steps=0)
    run.fit(network, data)
    assert same_states(data.state_dict()["input_norm"], before)
    torch.testing.assert_close(network.seen["train"][1], network.seen["eval"][1])
    run.save_checkpoint(tmp_path / "end.ckpt")
    with pytest.raises(MisconfigurationException, match=r"the statistics of the input are frozen. Call unfreeze_"):
        data.collect_input_statistics()
    data.reset_input_statistics()
    data.collect_input_statistics(1)
    assert_of(data, UNITS[:8])

    resumed = RawData(InputNorm(3, scale=1.0))
    trainer(tmp_path, max_epochs=3).fit(SeeingNet(), resumed, ckpt_path=tmp_path / "end.ckpt")
    assert same_states(resumed.state_dict()["input_norm"], before)
    resumed.unfreeze_input_statistics()
    trainer(tmp_path, max_epochs=1).fit(SeeingNet(), resumed)
    assert resumed.input_statistics().count.tolist() == [2 * 48 * 36] * 3


def test_a_limit_of_the_settings_is_not_lifted_by_unfreezing(tmp_path: Path) -> None:
    data = RawData(InputNorm(3, freeze_after=16))
    data.collect_input_statistics()
    assert_of(data, UNITS[:16])
    with pytest.raises(RuntimeError, match="freeze_after=16 keeps the statistics as they are, since 16 samples"):
        data.unfreeze_input_statistics()


def test_a_frozen_state_without_statistics_is_refused() -> None:
    data = RawData()
    with pytest.raises(ValueError, match="frozen is True, although nothing was learned"):
        data.load_state_dict({"input_norm": {**data.state_dict()["input_norm"], "frozen": True}})
    with pytest.raises(ValueError, match="frozen is 3"):
        data.load_state_dict({"input_norm": {**data.state_dict()["input_norm"], "frozen": 3}})
