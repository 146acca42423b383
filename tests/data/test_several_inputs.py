"""Several inputs by name: statistics, checkpoints, exports and logs of each, on one process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.lit import LitNet, trainer
from helpers.logs import rows
from helpers.raw import RawData, SeeingNet, raw_images, same_states
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_revbn import InputNorm, OnlineInputNormMixin
from lightning_revbn.core import input_learner
from lightning_revbn.core.input_norm import InputError, MissingStatisticsError, OnlineStandardizer

RGB = raw_images(48)[0]
RADAR = torch.randn(48, 2, 9, generator=torch.Generator().manual_seed(1)) * torch.tensor([[5.0], [0.1]]) + 30
SPEED = torch.arange(48.0).view(48, 1)

SETTINGS = {
    "rgb": InputNorm(3, scale=1.0),
    "radar": InputNorm(2, scale=1.0, mode="running", key=("sensors", 0)),
    "speed": InputNorm(1, scale=0.5, mode="fixed", mean=[20.0], std=[4.0]),
}


class Sensors(OnlineInputNormMixin, L.LightningDataModule):
    def __init__(self, settings: Any = None, radar: Tensor = RADAR) -> None:
        super().__init__(input_norm=SETTINGS if settings is None else settings)
        parts = zip(RGB.split(8), radar.split(8), SPEED.split(8), strict=True)
        self.batches = [{"rgb": rgb, "sensors": [own, "near"], "speed": speed} for rgb, own, speed in parts]

    def train_dataloader(self) -> Any:
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]

    val_dataloader = test_dataloader = train_dataloader


class Net(LitNet):
    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[Any]] = {"train": [], "eval": []}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen["train"].append(batch)
        return self.model(batch["rgb"]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["eval"].append(batch)

    test_step = validation_step


def fitted(path: Path, data: Any, **options: Any) -> tuple[Net, L.Trainer]:
    network, run = Net(), trainer(path, **{"max_epochs": 1, "num_sanity_val_steps": 0, **options})
    run.fit(network, data)
    return network, run


def test_each_input_is_normalised_by_its_own_settings_and_statistics(tmp_path: Path) -> None:
    data = Sensors()
    network, _ = fitted(tmp_path, data)
    alone = {name: OnlineStandardizer(settings) for name, settings in SETTINGS.items()}
    for batch, raw in zip(network.seen["train"], data.batches, strict=True):
        assert torch.equal(batch["rgb"], alone["rgb"].train(raw["rgb"]))
        assert torch.equal(batch["sensors"][0], alone["radar"].train(raw["sensors"][0]))
        assert torch.equal(batch["speed"], alone["speed"].train(raw["speed"]))
        assert batch["sensors"][1] == "near"
    for name, online in alone.items():
        assert all(torch.equal(*pair) for pair in zip(data.input_statistics(name), online.statistics(), strict=True))
    assert torch.equal(network.seen["eval"][1]["sensors"][0], alone["radar"].evaluate(data.batches[1]["sensors"][0]))
    assert data.input_scale == {"rgb": 1.0, "radar": 1.0, "speed": 0.5}
    assert data.input_norm["rgb"].key == "rgb"  # type: ignore[index]


def test_exports_and_inverses_are_by_name(tmp_path: Path) -> None:
    data = Sensors()
    network, _ = fitted(tmp_path, data)
    seen = torch.cat([batch["sensors"][0] for batch in network.seen["eval"]])
    torch.testing.assert_close(data.export_normalizer("radar")(RADAR), seen, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(data.denormalize(seen, "radar"), RADAR)
    torch.testing.assert_close(data.denormalize(network.seen["eval"][0]["rgb"], name="rgb"), RGB[:8] / 255)
    for call in (data.input_statistics, data.export_normalizer):
        with pytest.raises(
            ValueError, match=re.escape("several inputs, 'rgb', 'radar', 'speed': give any of these names, got 'x'")
        ):
            call("x")
        with pytest.raises(ValueError, match="give any of these names, got None"):
            call()
    with pytest.raises(ValueError, match="the only input has no name, got 'rgb'"):
        RawData().input_statistics("rgb")


def test_keys_of_the_log_have_the_name(tmp_path: Path) -> None:
    data = Sensors()
    _, run = fitted(tmp_path, data, logger=CSVLogger(tmp_path))
    logged = [row for row in rows(tmp_path) if row.get("revbn/input/radar/mean")]
    assert len(logged) == 6
    assert float(logged[0]["revbn/input/radar/mean_1"]) == pytest.approx(RADAR[:8, 1].double().mean().item())
    assert float(logged[0]["revbn/input/rgb/std_2"]) == pytest.approx(
        (RGB[:8, 2].double() / 255).std(correction=0).item()
    )
    assert run.callback_metrics["revbn/input/speed/mean"].item() == 20
    assert "revbn/input/mean" not in logged[0]


def test_checkpoints_keep_all_inputs_by_name(tmp_path: Path) -> None:
    data = Sensors()
    network, run = fitted(tmp_path, data)
    run.save_checkpoint(tmp_path / "end.ckpt")
    tested, other, loaded = Net(), Sensors(), Sensors()
    trainer(tmp_path).test(tested, other, ckpt_path=tmp_path / "end.ckpt", verbose=False)
    loaded.load_input_statistics(tmp_path / "end.ckpt")
    for name in SETTINGS:
        for one in (other, loaded):
            assert same_states(one.state_dict()["input_norm"][name], data.state_dict()["input_norm"][name])
    for first, second in zip(tested.seen["eval"], network.seen["eval"], strict=True):
        assert torch.equal(first["sensors"][0], second["sensors"][0])
    resumed = Sensors()
    trainer(tmp_path, max_epochs=2).fit(Net(), resumed, ckpt_path=tmp_path / "end.ckpt")
    assert resumed.input_statistics("radar").count.tolist() == [2 * 48 * 9] * 2


def test_states_of_other_inputs_are_refused_with_both_lists(tmp_path: Path) -> None:
    data = Sensors()
    _, run = fitted(tmp_path, data)
    run.save_checkpoint(tmp_path / "end.ckpt")
    before = data.state_dict()["input_norm"]
    fewer = Sensors({name: SETTINGS[name] for name in ("rgb", "radar")})
    both = "of the inputs 'rgb', 'radar', 'speed', and this DataModule has the inputs 'rgb', 'radar'$"
    with pytest.raises(ValueError, match=both):
        fewer.load_input_statistics(tmp_path / "end.ckpt")
    with pytest.raises(ValueError, match="and this DataModule has a single input without a name"):
        RawData().load_input_statistics(tmp_path / "end.ckpt")
    with pytest.raises(ValueError, match="of a single input without a name, and this DataModule has the inputs"):
        data.load_state_dict(RawData().state_dict())
    broken = {**before, "radar": {**before["radar"], "mean": before["radar"]["mean"] * torch.nan}}
    with pytest.raises(ValueError, match="mean is not finite"):
        data.load_state_dict({"input_norm": broken})
    assert all(same_states(data.state_dict()["input_norm"][name], before[name]) for name in before)


def test_a_fault_in_one_input_names_it_and_no_input_learns_the_batch(tmp_path: Path) -> None:
    bad = RADAR.clone()
    bad[20, 1, 3] = torch.inf
    data = Sensors(radar=bad)
    with pytest.raises(
        InputError, match=r"input 'radar': NaN or infinity in a training batch, first at index \(4, 1, 3\)"
    ):
        fitted(tmp_path, data)
    assert data.input_statistics("rgb").count.tolist() == [16 * 36] * 3
    assert data.input_statistics("radar").count.tolist() == [16 * 9] * 2
    with pytest.raises(InputError, match="input 'rgb': the input has shape"):
        fitted(tmp_path, Sensors({**SETTINGS, "rgb": InputNorm(4)}))


@pytest.mark.parametrize("is_collected", [False, True], ids=["fit", "pass"])
def test_a_fault_that_is_told_later_names_its_input_and_no_input_learns_the_batch(
    is_collected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_learner, "_answers_at_once", lambda device: False)
    radar = RADAR.clone()
    radar[20, 1, 3] = torch.nan
    data = Sensors(radar=radar)
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=0, log_every_n_steps=50)
    with pytest.raises(InputError, match=r"^input 'radar': NaN or infinity in a training batch"):
        data.collect_input_statistics() if is_collected else run.fit(Net(), data)
    if not is_collected:
        assert data.input_statistics("radar").count.tolist() == [40 * 9] * 2
        assert data.input_statistics("rgb").count.tolist() == [40 * 36] * 3


def test_a_fault_in_one_input_freezes_no_other_too_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_learner, "_answers_at_once", lambda device: False)
    radar = RADAR.clone()
    radar[20, 1, 3] = torch.nan
    data = Sensors({**SETTINGS, "rgb": InputNorm(3, freeze_after=48)}, radar=radar)
    with pytest.raises(InputError, match=r"^input 'radar'"):
        fitted(tmp_path, data, limit_val_batches=0, log_every_n_steps=50)
    assert data.input_statistics("rgb").count.tolist() == [40 * 36] * 3
    radar[20, 1, 3] = 0.0
    fitted(tmp_path, data, limit_val_batches=0, log_every_n_steps=50)
    assert data.input_statistics("rgb").count.tolist() == [48 * 36] * 3


def test_freezing_names_the_input_that_cannot_and_changes_the_others(tmp_path: Path) -> None:
    data = Sensors({**SETTINGS, "rgb": InputNorm(3, freeze_after=8)})
    with pytest.raises(MissingStatisticsError, match=r"^input 'rgb': input statistics are missing"):
        data.freeze_input_statistics()
    data.collect_input_statistics()
    data.freeze_input_statistics()
    with pytest.raises(RuntimeError, match=r"^input 'rgb': freeze_after=8 keeps the statistics"):
        data.unfreeze_input_statistics()
    trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(Net(), data)
    assert data.input_statistics("rgb").count.tolist() == [8 * 36] * 3
    assert data.input_statistics("radar").count.tolist() == [2 * 48 * 9] * 2


def test_a_warning_names_the_input_whose_numbers_are_others(tmp_path: Path) -> None:
    data = Sensors()
    data.collect_input_statistics()
    for batch in data.batches:
        batch["sensors"] = [1e6 * batch["sensors"][0], "near"]
    with pytest.warns(UserWarning, match=r"^input 'radar': a batch of evaluation .* lies in another range"):
        trainer(tmp_path).validate(Net(), data, verbose=False)


def test_an_only_input_is_asked_for_by_its_name() -> None:
    with pytest.raises(ValueError, match="the only input has a name, 'rgb': give its name, got None"):
        Sensors({"rgb": InputNorm(3)}).input_statistics()


def test_evaluation_before_training_names_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"call collect_input_statistics\(\) on the datamodule"):
        trainer(tmp_path).validate(Net(), Sensors(), verbose=False)
    data = Sensors()
    with pytest.raises(MissingStatisticsError):
        data.input_statistics("rgb")
    network, _ = fitted(tmp_path, data, num_sanity_val_steps=1, limit_val_batches=1)
    seen = network.seen["eval"][0]["sensors"][0].double()
    torch.testing.assert_close(seen.std((0, 2), correction=0), torch.ones(2).double(), rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, TypeError, "got an empty mapping"),
        ({"rgb": 3}, TypeError, "an InputNorm for each name, got 'rgb': 3"),
        ({0: InputNorm(3)}, TypeError, "an InputNorm for each name, got 0"),
        ({"a": InputNorm(3, key="x"), "x": InputNorm(3)}, ValueError, "'a' and 'x' are both at 'x' of a batch"),
        ({"a": InputNorm(3), "b": InputNorm(3, eval_key="a")}, ValueError, "are both at 'a'"),
    ],
)
def test_what_names_no_inputs_is_refused(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Sensors(given)


def test_overridden_methods_give_and_take_dicts(tmp_path: Path) -> None:
    class Own(Sensors):
        def select_input(self, batch: Any) -> Any:
            return {**super().select_input(batch), "rgb": None if self.trainer.validating else batch["rgb"]}

    data = Own({name: SETTINGS[name] for name in ("rgb", "speed")})
    network, run = fitted(tmp_path, data, limit_val_batches=0)
    run.limit_val_batches = 2
    run.validate(network, data, verbose=False)
    assert torch.equal(network.seen["eval"][0]["rgb"], RGB[:8])
    assert network.seen["eval"][0]["speed"].dtype == torch.float32

    class Wrong(Sensors):
        def select_input(self, batch: Any) -> Any:
            return batch["rgb"]

    with pytest.raises(TypeError, match=re.escape("must return a dict with the keys ['rgb', 'radar', 'speed']")):
        fitted(tmp_path, Wrong())


def test_targets_of_a_regression_are_standardised_and_inverted(tmp_path: Path) -> None:
    targets = SPEED * 3 + 100

    class Regression(RawData):
        pass

    data = Regression({"image": InputNorm(3, key=0), "target": InputNorm(1, key=1, scale=1.0)}, (RGB, targets))  # type: ignore[arg-type]

    class Mean(SeeingNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (self.model(batch[0]).mean(1, keepdim=True) - batch[1]).square().mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.seen["eval"].append(self.trainer.datamodule.denormalize(batch[1], "target"))

    network = Mean()
    trainer(tmp_path, num_sanity_val_steps=0, max_epochs=1).fit(network, data)
    torch.testing.assert_close(torch.cat(network.seen["eval"]), targets)


def test_channels_that_are_left_out_are_not_logged(tmp_path: Path) -> None:
    images = raw_images(48)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(SeeingNet(), RawData(InputNorm(3, channels=[2, 0]), images))
    raw = images[0].double().movedim(1, 0).flatten(1) / 255
    logged = {key.removeprefix("revbn/input/"): value.item() for key, value in run.callback_metrics.items()}
    found = {key: logged[key] for key in ("mean_0", "mean_2", "std_0", "std_2", "mean", "std")}
    mean, std = raw.mean(1), raw.std(1, correction=0)
    expected = [*mean[[0, 2]], *std[[0, 2]], mean[[0, 2]].mean(), std[[0, 2]].mean()]
    assert [*found.values()] == pytest.approx([value.item() for value in expected])
    assert not {"mean_1", "std_1"} & {*logged}
