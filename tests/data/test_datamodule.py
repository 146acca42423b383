"""The DataModule mixin in a real Trainer, on one process."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections import UserDict, namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.lit import Batches, LitNet, loader, trainer
from helpers.logs import rows
from helpers.models import assert_same_parameters, images, residual_net
from helpers.raw import RawData, SeeingNet, raw_images, same_states
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_revbn import InputNorm, OnlineInputNormMixin, RevisitedBatchNorm
from lightning_revbn.core.input_norm import MissingStatisticsError

IMAGES = raw_images(48)[0]
MEAN, STD = ((IMAGES.double() / 255).mean((0, 2, 3)), (IMAGES.double() / 255).std((0, 2, 3), correction=0))


def revisited(**settings: Any) -> RevisitedBatchNorm:
    return RevisitedBatchNorm(monitor=False, **settings)


def test_training_is_that_of_batch_norm_in_front_with_a_fixed_scale(tmp_path: Path) -> None:
    front = nn.BatchNorm2d(3)
    nn.init.constant_(front.weight, 0.58)
    front.requires_grad_(False)
    by_hand = LitNet(model=nn.Sequential(front, residual_net()))
    batches = [(part / 255, labels) for part, labels in zip(IMAGES.split(8), raw_images(48)[1].split(8), strict=True)]
    trainer(tmp_path).fit(by_hand, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    network = SeeingNet()
    trainer(tmp_path).fit(network, RawData())
    expected = by_hand.model[1].state_dict()
    for name, value in network.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_evaluation_uses_the_statistics_of_all_training_data(tmp_path: Path) -> None:
    network, data = SeeingNet(), RawData(InputNorm(3, scale=1.0))
    run = trainer(tmp_path, num_sanity_val_steps=0)
    run.fit(network, data)
    torch.testing.assert_close(data.input_statistics().mean, MEAN, rtol=1e-12, atol=0)
    torch.testing.assert_close(data.input_statistics().std, STD, rtol=1e-12, atol=0)
    assert data.input_statistics().count.tolist() == [2 * 48 * 36] * 3
    before = data.state_dict()["input_norm"]
    expected = (IMAGES.double() / 255 - MEAN.view(3, 1, 1)) / (STD.square() + 1e-5).sqrt().view(3, 1, 1)
    for stage in ("validate", "test", "predict"):
        network.seen["eval"].clear()
        getattr(run, stage)(network, data, **({"verbose": False} if stage != "predict" else {}))
        torch.testing.assert_close(torch.cat(network.seen["eval"]).double(), expected, rtol=0, atol=1e-5)
    assert same_states(before, data.state_dict()["input_norm"])
    torch.testing.assert_close(data.denormalize(torch.cat(network.seen["eval"])), IMAGES / 255)
    module = data.export_normalizer()
    torch.testing.assert_close(module(IMAGES), torch.cat(network.seen["eval"]), rtol=1e-5, atol=1e-6)


def test_evaluation_without_statistics_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    for stage in ("validate", "test", "predict"):
        with pytest.raises(MisconfigurationException, match=r"RawData learns them .* load_input_statistics\(path\)"):
            getattr(trainer(tmp_path), stage)(SeeingNet(), RawData())
    with pytest.raises(MissingStatisticsError):
        RawData().input_statistics()


def test_a_fit_after_validation_works(tmp_path: Path) -> None:
    network, data = SeeingNet(), RawData()
    run = trainer(tmp_path)
    with pytest.raises(MisconfigurationException):
        run.validate(network, data)
    network.train()
    run.fit(network, data)
    run.validate(network, data, verbose=False)
    fixed = RawData(InputNorm(3, mode="fixed", mean=[0.4] * 3, std=[0.2] * 3))
    other = trainer(tmp_path)
    other.validate(network, fixed, verbose=False)
    other.fit(network, fixed)
    restored = RawData()
    restored.load_state_dict(data.state_dict())
    again = trainer(tmp_path)
    again.validate(network, restored, verbose=False)
    again.fit(network, restored)
    assert restored.input_statistics().count[0] == 2 * data.input_statistics().count[0]


def test_the_sanity_check_sees_normalised_batches_and_leaves_no_trace(tmp_path: Path) -> None:
    network, data = SeeingNet(), RawData(InputNorm(3, scale=1.0))
    trainer(tmp_path, num_sanity_val_steps=2, max_epochs=1, limit_val_batches=2).fit(network, data)
    torch.testing.assert_close(network.seen["eval"][0].std((0, 2, 3), correction=0), torch.ones(3), rtol=1e-3, atol=0)
    assert data.input_statistics().count.tolist() == [48 * 36] * 3


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("mode", ["batch", "running", "ema"])
def test_a_resumed_run_is_the_undisturbed_one_to_the_bit(mode: Any, kind: torch.dtype, tmp_path: Path) -> None:
    def parts() -> tuple[SeeingNet, RawData]:
        return SeeingNet(), Resumable(InputNorm(3, mode=mode), (raw_images(48)[0].to(kind), raw_images(48)[1]))

    whole, data = parts()
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    trainer(tmp_path, revisited(), save, enable_checkpointing=True).fit(whole, data)
    resumed, again = parts()
    run = trainer(tmp_path, revisited())
    run.fit(resumed, again, ckpt_path=tmp_path / "step=8.ckpt")
    assert len(resumed.seen["train"]) == 4
    assert_same_parameters(whole, resumed)
    assert all(torch.equal(*pair) for pair in zip(data.input_statistics(), again.input_statistics(), strict=True))
    for stage in ("validate", "test"):
        network, fresh = parts()
        getattr(trainer(tmp_path, revisited()), stage)(
            network, fresh, ckpt_path=tmp_path / "step=12.ckpt", verbose=False
        )
        assert torch.equal(fresh.input_statistics().mean, data.input_statistics().mean)
        assert fresh.input_scale == data.input_scale == pytest.approx(0.058)


def test_a_renamed_class_loads_the_statistics_from_the_checkpoint(tmp_path: Path) -> None:
    class Renamed(RawData):
        pass

    data = RawData()
    run = trainer(tmp_path, revisited())
    run.fit(SeeingNet(), data)
    run.save_checkpoint(tmp_path / "last.ckpt")
    other = Renamed()
    with pytest.raises(MisconfigurationException, match="load_input_statistics"):
        trainer(tmp_path, revisited()).validate(SeeingNet(), other, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    other.load_input_statistics(tmp_path / "last.ckpt")
    assert torch.equal(other.input_statistics().mean, data.input_statistics().mean)
    network = SeeingNet()
    trainer(tmp_path).validate(network, other, verbose=False)
    assert other.input_scale == pytest.approx(0.058)  # the network was trained with it

    run = trainer(tmp_path)
    run.fit(LitNet(), loader())
    run.save_checkpoint(tmp_path / "without.ckpt")
    with pytest.raises(ValueError, match="has no input statistics"):
        other.load_input_statistics(tmp_path / "without.ckpt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="is not a checkpoint of a Trainer: it holds a list"):
        other.load_input_statistics(tmp_path / "list.pt")


def test_the_learning_rate_finder_leaves_no_trace(tmp_path: Path) -> None:
    network, data = SeeingNet(), RawData()
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    with warnings.catch_warnings():
        # Lightning's finder makes a scheduler before the optimizer steps and loads its own checkpoint by pickle.
        warnings.simplefilter("ignore")
        Tuner(run).lr_find(network, data, num_training=5, update_attr=False)
    assert not data.state_dict()["input_norm"]["count"].any()
    run.fit(network, data)
    assert data.input_statistics().count.tolist() == [48 * 36] * 3


@pytest.mark.parametrize(
    ("callbacks", "settings", "scale", "told"),
    [
        ([], {}, 0.58, "0.58, as there is no RevisitedBatchNorm in the Trainer"),
        ([revisited(enabled=False)], {}, 0.58, "0.58, as there is no"),
        ([revisited(scale=0.25)], {}, 0.145, "0.58 times the scale 0.25 of RevisitedBatchNorm"),
        ([revisited(scale={"*stem*": 0.5, "*": 0.1})], {}, 0.29, "0.58 times the scale 0.5"),
        ([revisited()], {"scale": 0.7}, 0.7, "InputNorm(scale=...)"),
    ],
)
def test_the_scale_and_where_it_is_from(
    callbacks: list[Any], settings: Any, scale: float, told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network, data = SeeingNet(), RawData(InputNorm(3, **settings))
    trainer(tmp_path, *callbacks, max_epochs=1).fit(network, data)
    assert data.input_scale == pytest.approx(scale)
    torch.testing.assert_close(network.seen["train"][0].std((0, 2, 3)), torch.full((3,), scale), rtol=0.02, atol=0)
    lines = [record.message for record in caplog.records if "standardised input is multiplied" in record.message]
    assert len(lines) == 1
    assert told in lines[0]


def test_the_scale_is_that_of_training_before_training_too(tmp_path: Path) -> None:
    network = SeeingNet()
    fixed = RawData(InputNorm(3, mode="fixed", mean=[0.4] * 3, std=[0.2] * 3))
    trainer(tmp_path, revisited()).validate(network, fixed, verbose=False)
    expected = (IMAGES / 255 - 0.4) / (0.2**2 + 1e-5) ** 0.5 * 0.058
    torch.testing.assert_close(torch.cat(network.seen["eval"]), expected, rtol=1e-5, atol=1e-6)
    network = SeeingNet()
    trainer(tmp_path, revisited(), num_sanity_val_steps=1, limit_val_batches=1, max_epochs=1).fit(network, RawData())
    torch.testing.assert_close(network.seen["eval"][0].std((0, 2, 3)), torch.full((3,), 0.058), rtol=0.02, atol=0)


def test_it_can_be_copied_after_a_fit(tmp_path: Path) -> None:
    data = RawData()
    trainer(tmp_path).fit(SeeingNet(), data)
    data.trainer = None
    for other in (copy.deepcopy(data), pickle.loads(pickle.dumps(data))):
        assert torch.equal(other.input_statistics().mean, data.input_statistics().mean)
        trainer(tmp_path).fit(SeeingNet(), other)
        assert other.input_statistics().count[0] == 2 * data.input_statistics().count[0]


def test_another_scale_than_the_checkpoints_is_warned_of(tmp_path: Path) -> None:
    run = trainer(tmp_path, revisited(), max_epochs=1)
    run.fit(SeeingNet(), RawData())
    run.save_checkpoint(tmp_path / "last.ckpt")
    data = RawData(InputNorm(3, scale=1.0))
    with pytest.warns(UserWarning, match="made with an input scale of 0.058, this run has 1"):
        trainer(tmp_path, revisited()).fit(SeeingNet(), data, ckpt_path=tmp_path / "last.ckpt")


def test_mean_and_standard_deviation_are_logged_once_a_step(tmp_path: Path) -> None:
    data = RawData()
    run = trainer(tmp_path, logger=CSVLogger(tmp_path), accumulate_grad_batches=2, max_epochs=1)
    run.fit(SeeingNet(), data)
    logged = [row for row in rows(tmp_path) if "revbn/input/mean" in row]
    assert [int(row["step"]) for row in logged] == [0, 1, 2]
    first = IMAGES[:8].double() / 255
    assert float(logged[0]["revbn/input/mean"]) == pytest.approx(first.mean((0, 2, 3)).mean().item())
    assert float(logged[0]["revbn/input/std_2"]) == pytest.approx(first[:, 2].std(correction=0).item())
    assert run.callback_metrics["revbn/input/std"].item() > 0


def test_data_that_look_normalised_are_warned_of_once(tmp_path: Path) -> None:
    data = RawData(images=images(600), batch_size=64)
    with pytest.warns(UserWarning, match="mean 0 and standard deviation 1 already") as told:
        trainer(tmp_path).fit(SeeingNet(), data)
    assert sum("already" in str(warning.message) for warning in told) == 1


def test_half_precision_that_loses_the_input_is_warned_of(tmp_path: Path) -> None:
    data = RawData(images=(images(48)[0] + 1e4, images(48)[1]))
    with pytest.warns(UserWarning, match=r"torch.bfloat16 cannot hold the spread of the input in channels \[0, 1, 2\]"):
        trainer(tmp_path, precision="bf16-true", max_epochs=1).fit(SeeingNet(), data)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32),
        ("64-true", torch.float64),
        ("bf16-true", torch.bfloat16),
        ("bf16-mixed", torch.float32),
    ],
)
def test_the_precision_of_the_run_decides_the_dtype(precision: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    for values in (IMAGES, IMAGES.double()):
        network, data = SeeingNet(), RawData(images=(values, raw_images(48)[1]))
        trainer(tmp_path, precision=precision, max_epochs=1, limit_val_batches=1).fit(network, data)
        assert {batch.dtype for batches in network.seen.values() for batch in batches} == {dtype}


def test_batches_are_not_changed_in_place(tmp_path: Path) -> None:
    class Kept(RawData):
        def train_dataloader(self) -> Any:
            return DataLoader(kept, batch_size=None)  # type: ignore[arg-type]

    kept = [[part.clone(), labels] for part, labels in zip(IMAGES.split(8), raw_images(48)[1].split(8), strict=True)]
    trainer(tmp_path, limit_val_batches=0).fit(SeeingNet(), Kept())
    assert torch.equal(torch.cat([batch[0] for batch in kept]), IMAGES)


Pair = namedtuple("Pair", ["image", "label"])


@dataclass
class Sample:
    image: Any
    label: Any


@dataclass(frozen=True)
class FrozenSample:
    image: Any
    label: Any


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (lambda x, y: {"image": x, "label": y}, {"key": "image"}),
        (lambda x, y: {"image": x, "names": ["a"]}, {}),
        (lambda x, y: UserDict(image=x, label=y), {"key": "image"}),
        (lambda x, y: (y, x), {"key": 1}),
        (lambda x, y: [y, x], {"key": -1}),
        (lambda x, y: Pair(x, y), {}),
        (lambda x, y: Pair(x, y), {"key": "image"}),
        (lambda x, y: Pair(x, y), {"key": 0}),
        (lambda x, y: Sample(x, y), {"key": "image"}),
        (lambda x, y: FrozenSample(x, y), {"key": "image"}),
        (lambda x, y: x, {}),
    ],
)
def test_batches_keep_their_structure(make: Any, settings: Any) -> None:
    data = RawData(InputNorm(3, **settings))
    batch = make(IMAGES, torch.zeros(48))
    values = data.select_input(batch)
    assert values is IMAGES
    changed = data.replace_input(batch, IMAGES / 255)
    assert type(changed) is type(batch)
    assert torch.equal(data.select_input(changed), IMAGES / 255)
    assert data.select_input(batch) is IMAGES


@pytest.mark.parametrize(
    ("batch", "settings", "message"),
    [
        ({"a": IMAGES, "b": IMAGES}, {}, "a dict with the keys 'a', 'b'. Name it by key, or override select_input"),
        ({"a": IMAGES}, {"key": "image"}, "key='image') names no place in the batch, a dict with the keys 'a'"),
        ([IMAGES], {"key": 3}, "key=3) names no place in the batch, a list of (Tensor)"),
        ([[IMAGES], 1], {}, "leads to a list of (Tensor) in a batch that is a list of (list, int)"),
        ("text", {}, "a str"),
    ],
)
def test_a_batch_without_the_input_is_described(batch: Any, settings: Any, message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        RawData(InputNorm(3, **settings)).select_input(batch)


def test_masks_come_from_the_batch(tmp_path: Path) -> None:
    class Masked(RawData):
        def train_dataloader(self) -> Any:
            mask = torch.arange(6).view(1, 1, 1, 6) < 3
            parts = [{"image": part, "mask": mask, "label": labels} for part, labels in super().train_dataloader()]
            return DataLoader(parts, batch_size=None)  # type: ignore[arg-type]

    class Net(SeeingNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert not batch["image"][..., 3:].any()
            return super().training_step((batch["image"], batch["label"]), batch_idx)

    data = Masked(InputNorm(3, key="image", mask_key="mask"))
    trainer(tmp_path, limit_val_batches=0, max_epochs=1).fit(Net(), data)
    expected = (IMAGES[..., :3].double() / 255).mean((0, 2, 3))
    torch.testing.assert_close(data.input_statistics().mean, expected, rtol=1e-12, atol=0)


def test_inputs_of_another_structure_are_for_overridden_methods(tmp_path: Path) -> None:
    class Nested(RawData):
        def train_dataloader(self) -> Any:
            parts = [((part, "name"), labels) for part, labels in super().train_dataloader()]
            return DataLoader(parts, batch_size=None)  # type: ignore[arg-type]

        def select_input(self, batch: Any) -> Tensor:
            return batch[0][0]

        def replace_input(self, batch: Any, value: Tensor) -> Any:
            return value, batch[1]

    trainer(tmp_path, limit_val_batches=0).fit(SeeingNet(), data := Nested())
    assert data.input_statistics().count[0] == 2 * 48 * 36


def test_a_hook_of_the_module_is_called_before(tmp_path: Path) -> None:
    class Flipping(SeeingNet):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            assert batch[0].dtype == torch.uint8
            return [255 - batch[0], batch[1]]

    data = RawData()
    with pytest.warns(UserWarning, match="overridden `on_after_batch_transfer` in both"):
        trainer(tmp_path).fit(Flipping(), data)
    torch.testing.assert_close(data.input_statistics().mean, 1 - MEAN, rtol=1e-12, atol=0)


def test_examples_for_summaries_and_exports_are_not_training_data(tmp_path: Path) -> None:
    class Example(SeeingNet):
        def forward(self, inputs: Tensor) -> Tensor:
            return self.model(inputs)

    for example in (IMAGES[:2], torch.rand(2, 3, 6, 6)):
        network, data = Example(), RawData()
        network.example_input_array = example
        trainer(tmp_path, enable_model_summary=True, max_epochs=1).fit(network, data)
        assert data.input_statistics().count.tolist() == [48 * 36] * 3


@pytest.mark.parametrize(
    ("settings", "targets"),
    [
        (InputNorm(1, key=[1]), torch.arange(48.0).view(48, 1)),
        (InputNorm(1, key=(1,), channel_dim=None), torch.arange(48)),
        (InputNorm(1, key="price"), torch.arange(48.0).view(48, 1)),
        (InputNorm(1, key="price", channel_dim=None), 1000 * torch.arange(48.0)),
        (InputNorm(1, key="price", channel_dim=None), torch.arange(48).short()),
    ],
    ids=["list", "path", "other channels", "other numbers", "other integers"],
)
def test_an_example_that_cannot_be_the_input_stays_as_it_is(
    settings: InputNorm, targets: Tensor, tmp_path: Path
) -> None:
    class Example(LitNet):
        def forward(self, inputs: Tensor) -> Tensor:
            self.example_seen = inputs
            return self.model(inputs.float())

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.model(IMAGES[:4].float()).sum()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    class Priced(RawData):
        def train_dataloader(self) -> Any:
            samples: list[Any] = [*zip(IMAGES, targets, strict=True)]
            if settings.key == "price":
                samples = [{"image": image, "price": price} for image, price in samples]
            return DataLoader(samples, batch_size=8)  # type: ignore[arg-type]

    network, data = Example(), Priced(settings)
    network.example_input_array = IMAGES[:2]
    data.collect_input_statistics()
    trainer(tmp_path, enable_model_summary=True, max_epochs=1, limit_val_batches=0).fit(network, data)
    assert torch.equal(network.example_seen, IMAGES[:2])


def test_the_mixin_must_come_first() -> None:
    with pytest.raises(TypeError, match=r"class Late\(OnlineInputNormMixin, LightningDataModule\)"):
        type("Late", (L.LightningDataModule, OnlineInputNormMixin), {})


@pytest.mark.parametrize("hook", ["on_after_batch_transfer", "state_dict", "load_state_dict"])
def test_overridden_methods_must_call_the_mixin(hook: str) -> None:
    with pytest.raises(TypeError, match=rf"Silent.{hook} must call super\(\).{hook}"):
        type("Silent", (RawData,), {hook: lambda self, *args: None})
    type("Loud", (RawData,), {hook: lambda self, *args: getattr(super(RawData, self), hook)(*args)})


def test_wrong_use_is_explained(tmp_path: Path) -> None:
    class Forgetful(RawData):
        def __init__(self) -> None:
            L.LightningDataModule.__init__(self)
            self.images, self.options = raw_images(8), {}

    with pytest.raises(MisconfigurationException, match=r"Forgetful.__init__ must call super\(\)"):
        trainer(tmp_path).fit(SeeingNet(), Forgetful())
    with pytest.raises(TypeError, match="input_norm must be an InputNorm, got 3"):
        RawData(3)  # type: ignore[arg-type]


def test_state_of_the_users_own_is_kept(tmp_path: Path) -> None:
    class Own(RawData):
        seed = 0

        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "seed": self.seed}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            self.seed = state_dict["seed"]

    first, second = Own(), Own()
    first.seed = 7
    trainer(tmp_path).fit(SeeingNet(), first)
    second.load_state_dict(first.state_dict())
    assert second.seed == 7
    assert torch.equal(second.input_statistics().mean, first.input_statistics().mean)


def test_the_mixin_works_with_a_base_that_has_state_and_arguments_of_its_own(tmp_path: Path) -> None:
    class Base(L.LightningDataModule):
        def __init__(self, batch_size: int) -> None:
            super().__init__()
            self.batch_size, self.seed = batch_size, 0

        def train_dataloader(self) -> Any:
            return DataLoader(TensorDataset(*raw_images(48)), self.batch_size)

        def state_dict(self) -> dict[str, Any]:
            return {"seed": self.seed}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            assert state_dict.keys() == {"seed"}  # a strict one
            self.seed = state_dict["seed"]

    class Mixed(OnlineInputNormMixin, Base):
        pass

    first, second = (Mixed(8, input_norm=InputNorm(3)) for _ in range(2))
    first.seed = 7
    trainer(tmp_path, limit_val_batches=0).fit(LitNet(), first)
    second.load_state_dict(first.state_dict())
    assert second.seed == 7
    assert torch.equal(second.input_statistics().mean, first.input_statistics().mean)


class Resumable(RawData):
    """Its loader remembers where it is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.train = Batches(*self.images)

    def train_dataloader(self) -> Any:
        return self.train

    def val_dataloader(self) -> Any:
        return DataLoader([*Batches(*self.images)], batch_size=None)

    test_dataloader = val_dataloader


def test_settings_among_the_hyperparameters_are_logged_and_saved_where_omegaconf_is_installed(tmp_path: Path) -> None:
    assert OmegaConf.is_config(OmegaConf.create({}))

    class Saved(RawData):
        def __init__(self, input_norm: InputNorm, width: int) -> None:
            super().__init__(input_norm)
            self.save_hyperparameters()

    chosen: dict[str, Any] = {"channels": [0, 2], "clip": 10, "fill": 0, "nodata": [0, 255]}
    settings = InputNorm(3, mode="fixed", mean=[0.5] * 3, std=[0.25] * 3, **chosen)
    loggers: list[Any] = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tensorboard")]
    run = trainer(tmp_path, logger=loggers, max_epochs=1)
    run.fit(SeeingNet(), Saved(settings, 6))
    for logger in loggers:
        written = (Path(logger.log_dir) / "hparams.yaml").read_text()
        assert "num_features: 3" in written
        assert "width: 6" in written
    run.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["datamodule_hyper_parameters"]
    assert saved == {"input_norm": settings, "width": 6}
