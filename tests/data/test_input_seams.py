"""Between training and evaluation, a DataModule and its copy, a Trainer and what is called by hand."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.lit import trainer
from helpers.raw import RawData, SeeingNet, raw_images, same_states
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_revbn import InputNorm
from lightning_revbn.core import input_learner
from lightning_revbn.core.input_norm import InputError, OnlineStandardizer
from lightning_revbn.data.input_fit import InputFit
from lightning_revbn.data.spawned_statistics import SharedStatistics

IMAGES, LABELS = raw_images(48)


class Augmented(RawData):
    """Training batches of one dtype, validation batches of another."""

    def __init__(self, training: Tensor, validation: Tensor, **settings: Any) -> None:
        super().__init__(InputNorm(3, **settings), (training, LABELS))
        self.validation = validation

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(self.validation, LABELS), batch_size=8)

    test_dataloader = val_dataloader


def test_floats_in_training_and_bytes_in_validation_are_told(tmp_path: Path) -> None:
    data = Augmented(IMAGES.float(), IMAGES)
    with pytest.warns(UserWarning, match=r"uint8, .* to 255\) lies in another range than the training data"):
        trainer(tmp_path, num_sanity_val_steps=0).fit(SeeingNet(), data)


@pytest.mark.parametrize("settings", [{}, {"clip": 2.0, "fill": 5.0}], ids=["plain", "clipped and filled"])
def test_the_sanity_check_takes_an_infinity_as_validation_does(settings: dict[str, Any], tmp_path: Path) -> None:
    values = IMAGES / 255
    validation = values.clone()
    validation[3, 1, 2, 2], validation[4, 0, 0, 0] = -torch.inf, torch.nan
    network = SeeingNet()
    data = Augmented(values, validation, scale=0.5, **settings)
    run = trainer(tmp_path, max_epochs=1, num_sanity_val_steps=1, limit_val_batches=1)
    run.fit(network, data)
    others = torch.ones(8, 3, 6, 6, dtype=torch.bool)
    others[3, 1, 2, 2] = others[4, 0, 0, 0] = False
    for seen in network.seen["eval"]:
        assert seen[3, 1, 2, 2] == (-1.0 if settings else -torch.inf)
        assert seen[others].isfinite().all()
        assert seen[4, 0, 0, 0].isnan() if not settings else seen[4, 0, 0, 0] == 5
    checked = network.seen["eval"][0][:, 1].double()[others[:, 1]]
    raw = validation[:8, 1].double()[others[:, 1]]
    expected = (raw - raw.mean()) / (raw.var(correction=0) + 1e-5).sqrt() * 0.5
    torch.testing.assert_close(checked, expected.clamp(-1, 1) if settings else expected, rtol=0, atol=1e-5)


def test_a_fault_in_the_sanity_check_says_so(tmp_path: Path) -> None:
    wide = IMAGES.long()
    data = Augmented(wide, wide + 2**40)
    with pytest.raises(InputError, match=r"^the sanity check normalises each batch by itself: .* beyond 32 bits"):
        trainer(tmp_path, num_sanity_val_steps=1, limit_val_batches=1).fit(SeeingNet(), data)


def test_bytes_in_training_and_wider_integers_in_a_test_are_refused(tmp_path: Path) -> None:
    data, network = Augmented(IMAGES, IMAGES.short()), SeeingNet()
    run = trainer(tmp_path, limit_val_batches=0)
    run.fit(network, data)
    with pytest.raises(InputError, match=r"torch.int16, but the training batches were uint8"):
        run.test(network, data, verbose=False)


def test_every_stage_is_compared_anew(tmp_path: Path) -> None:
    data, network = Augmented(IMAGES / 255, IMAGES / 255), SeeingNet()
    run = trainer(tmp_path)
    run.fit(network, data)
    run.validate(network, data, verbose=False)
    data.validation = IMAGES.float()
    with pytest.warns(UserWarning, match="lies in another range than the training data"):
        run.test(network, data, verbose=False)


@pytest.mark.parametrize(
    "options",
    [{"log_every_n_steps": 0, "logger": False, "enable_checkpointing": False}, {"barebones": True}],
    ids=["no logging", "barebones"],
)
def test_a_fault_is_told_at_the_end_of_the_epoch_at_the_latest(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_learner, "_answers_at_once", lambda device: False)
    values = IMAGES.float()
    values[20, 1, 2, 3] = torch.nan
    data, network = RawData(images=(values, LABELS)), SeeingNet()
    run = L.Trainer(accelerator="cpu", max_epochs=2, default_root_dir=tmp_path, limit_val_batches=0, **options)
    with pytest.raises(InputError, match="NaN or infinity in a training batch"):
        run.fit(network, data)
    assert len(network.seen["train"]) == 6
    assert data.input_statistics().count.tolist() == [40 * 36] * 3


def test_features_that_eps_swallows_are_told_once(tmp_path: Path) -> None:
    values = IMAGES / 255 * torch.tensor([1.0, 1e-2, 1.0]).view(1, 3, 1, 1)
    data = RawData(images=(values, LABELS))
    with pytest.warns(UserWarning, match=r"channels 1 \(std 0.00\d+, 0.4\d* left\)") as told:
        trainer(tmp_path).fit(SeeingNet(), data)
    assert sum("eps" in str(warning.message) for warning in told) == 1
    trainer(tmp_path).fit(SeeingNet(), RawData(InputNorm(3, eps=1e-12), (values, LABELS)))  # warnings fail tests


@pytest.mark.parametrize("mode", ["batch", "running", "ema"])
def test_a_training_batch_is_denormalised_by_the_statistics_that_normalised_it(mode: Any, tmp_path: Path) -> None:
    class Drawing(SeeingNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            pictures = self.trainer.datamodule.denormalize(batch[0])
            torch.testing.assert_close(pictures, IMAGES[8 * batch_idx : 8 * batch_idx + 8] / 255)
            torch.testing.assert_close(self.trainer.datamodule.denormalize(batch[0][3]), pictures[3])
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pictures = self.trainer.datamodule.denormalize(batch[0])
            torch.testing.assert_close(pictures, IMAGES[8 * batch_idx : 8 * batch_idx + 8] / 255)

    data = RawData(InputNorm(3, mode=mode))
    run = trainer(tmp_path, num_sanity_val_steps=0)
    run.fit(Drawing(), data)
    torch.testing.assert_close(data.denormalize(data.export_normalizer()(IMAGES)[7]), IMAGES[7] / 255)


def test_a_hook_that_is_called_by_hand_normalises_or_says_why_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, other = RawData(), RawData()
    with pytest.raises(MisconfigurationException, match="input statistics are missing, so a batch cannot be evaluated"):
        data.on_after_batch_transfer([IMAGES, LABELS], 0)
    trainer(tmp_path).fit(SeeingNet(), data)
    other.load_state_dict(data.state_dict())
    for own in (data, other):
        values, labels = own.on_after_batch_transfer([IMAGES, LABELS], 0)
        torch.testing.assert_close(values, data.export_normalizer()(IMAGES), rtol=1e-5, atol=1e-6)
        assert labels is LABELS
    # Lightning calls the hook of an attached DataModule with examples in the same way, when a model is exported.
    floats = IMAGES.float()
    assert data.on_after_batch_transfer([floats, LABELS], 0)[0] is floats
    assert "left as it is, as an example input of the network" in caplog.messages[-1]


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_loaders_that_bypass_the_normalisation_are_told(stage: str, tmp_path: Path) -> None:
    data, network = RawData(), SeeingNet()
    run = trainer(tmp_path)
    run.fit(network, data)
    own = DataLoader(TensorDataset(IMAGES / 255, LABELS), batch_size=8)
    with pytest.warns(UserWarning, match=r"RawData normalises the input of its own data loaders alone") as told:
        getattr(run, stage)(network, dataloaders=own)
    assert sum("of its own data loaders alone" in str(warning.message) for warning in told) == 1
    getattr(run, stage)(network, data)  # warnings fail tests
    getattr(run, stage)(network, RawDataOfAnother(data))


class RawDataOfAnother(RawData):
    """Has the statistics of another DataModule."""

    def __init__(self, other: RawData) -> None:
        super().__init__()
        self.load_state_dict(other.state_dict())


def test_a_trainer_gets_one_callback_and_the_users_list_stays(tmp_path: Path) -> None:
    own: list[Callback] = [Callback()]
    run = trainer(tmp_path, *own)
    given = run.callbacks
    before = list(given)
    data, network = RawData(), SeeingNet()
    for epochs in (1, 2):
        run.fit_loop.max_epochs = epochs
        run.fit(network, data)
    run.validate(network, data, verbose=False)
    assert given == before
    assert sum(isinstance(callback, InputFit) for callback in run.callbacks) == 1
    assert type(pickle.loads(pickle.dumps(run.callbacks[-1]))) is Callback
    assert data.input_statistics().count.tolist() == [2 * 48 * 36] * 3


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_another_scale_than_that_of_training_is_told_in_evaluation_too(stage: str, tmp_path: Path) -> None:
    data, other = RawData(InputNorm(3, scale=0.5)), RawData(InputNorm(3, scale=1.0))
    trainer(tmp_path).fit(SeeingNet(), data)
    other.load_state_dict(data.state_dict())
    with pytest.warns(UserWarning, match="made with an input scale of 0.5, this run has 1") as told:
        getattr(trainer(tmp_path), stage)(SeeingNet(), other)
    assert sum("input scale" in str(warning.message) for warning in told) == 1


def test_a_bad_state_reaches_nothing_of_the_users_own(tmp_path: Path) -> None:
    class Mixed(RawData):
        seed = 0

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            self.seed = state_dict["seed"]

    data = Mixed()
    trainer(tmp_path).fit(SeeingNet(), data)
    before = data.state_dict()["input_norm"]
    with pytest.raises(ValueError, match="mean is not finite"):
        data.load_state_dict({"input_norm": {**before, "mean": before["mean"] * torch.nan}, "seed": 7})
    assert data.seed == 0
    assert same_states(data.state_dict()["input_norm"], before)


def state_of(count: int) -> dict[str, Any]:
    standardizer = OnlineStandardizer(InputNorm(3))
    standardizer.train(IMAGES[:count])
    return standardizer.state_dict()


def test_a_copy_has_memory_of_its_own() -> None:
    shared = SharedStatistics(OnlineStandardizer(InputNorm(3)).state_dict())
    copies = [copy.deepcopy(shared), pickle.loads(pickle.dumps(shared))]
    # In another process, `write` leaves `take` of this one something to read.
    for number, one in enumerate(copies, start=1):
        process = torch.multiprocessing.get_context("fork").Process(target=one.write, args=(state_of(8 * number),))
        process.start()
        process.join()
    assert shared.take() is None
    for number, one in enumerate(copies, start=1):
        learned = one.take()
        assert learned is not None
        assert same_states(learned, state_of(8 * number))
        assert one.take() is None
