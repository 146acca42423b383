"""The recipes of docs/input_recipes.md, run as they are written there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from helpers.lit import trainer
from helpers.scripts import ROOT
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

PAGE = (ROOT / "docs" / "input_recipes.md").read_text()
RECIPES: dict[str, str] = dict(re.findall(r"^## (.*?)\n.*?^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
GENERATOR = torch.Generator().manual_seed(0)


def recipe(title: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "recipe"}
    exec(compile(RECIPES[title], title, "exec"), names)
    return names


def read(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Return what the network takes, and the labels if there are any."""
    if isinstance(batch, dict) and "spectrogram" in batch:
        return batch["spectrogram"].mean(2), None
    if isinstance(batch, dict):
        return torch.cat([batch["rgb"].flatten(1), batch["sensors"]["radar"].flatten(1)], 1), batch["label"]
    *views, labels = batch
    return torch.cat(views), labels.repeat(len(views))


class Classifier(L.LightningModule):
    """A network for any input, which keeps the batches that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.LazyLinear(2)
        self.seen: dict[str, list[Any]] = {"train": [], "eval": []}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen["train"].append(batch)
        inputs, labels = read(batch)
        labels = torch.zeros(len(inputs), dtype=torch.long) if labels is None else labels
        return cross_entropy(self.model(inputs.flatten(1)), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["eval"].append(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fitted(data: Any, path: Path, sample: Tensor) -> Classifier:
    network = Classifier()
    network.model(sample)  # gives the lazy layer its width
    trainer(path, max_epochs=1, num_sanity_val_steps=0).fit(network, data)
    return network


def test_every_recipe_of_the_page_is_run() -> None:
    assert [*RECIPES] == re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    tested = re.findall(r'recipe\("(.*?)"\)', Path(__file__).read_text())
    assert {*tested} == {*RECIPES}


def test_contrastive_views(tmp_path: Path) -> None:
    images = torch.randint(0, 200, (48, 3, 24, 24), generator=GENERATOR).byte()
    images[:, 2] += 50
    data = recipe("Contrastive views")["Pairs"](images, torch.arange(48) % 2)
    drawn: list[Any] = []
    data.on_before_batch_transfer = lambda batch, dataloader_idx: drawn.append(batch) or batch
    network = fitted(data, tmp_path, torch.zeros(1, 3 * 24 * 24))
    drawn = drawn[:3]  # the batches of training
    pairs = [np.stack([view.numpy() / 255 for view in raw[:2]]) for raw in drawn]
    for pair, raw, seen in zip(pairs, drawn, network.seen["train"], strict=True):
        mean, variance = (statistic((0, 1, 3, 4), keepdims=True) for statistic in (pair.mean, pair.var))
        wanted = (pair - mean) / np.sqrt(variance + 1e-5) * 0.58
        np.testing.assert_allclose(torch.stack([*seen[:2]]), wanted, atol=1e-5)
        assert not torch.equal(*raw[:2])
        assert torch.equal(seen[2], raw[2])
    values = np.stack(pairs).transpose(3, 0, 1, 2, 4, 5).reshape(3, -1)
    mean, std, count = data.input_statistics()
    np.testing.assert_allclose(mean, values.mean(1), rtol=1e-12)
    np.testing.assert_allclose(std, values.std(1), rtol=1e-12)
    assert count.tolist() == [values.shape[1]] * 3
    whole = torch.cat([batch[0] for batch in network.seen["eval"]])
    gain = 0.58 / np.sqrt(values.var(1) + 1e-5)
    wanted = (images.numpy() / 255 - values.mean(1).reshape(3, 1, 1)) * gain.reshape(3, 1, 1)
    np.testing.assert_allclose(whole, wanted, atol=1e-5)
    assert torch.equal(torch.cat([batch[1] for batch in network.seen["eval"]]), torch.arange(48) % 2)


def test_satellite_bands_with_no_data(tmp_path: Path) -> None:
    scenes = torch.randint(100, 3000, (48, 5, 8, 8), generator=GENERATOR).short()
    scenes[0, 1, 0, 0] = 30000  # a glint
    scenes[:, 4] %= 7
    missing = torch.rand(48, 1, 8, 8, generator=GENERATOR) < 0.2
    missing[0, 0, 0, 0] = False  # where the glint is
    scenes[:, :4] = scenes[:, :4].masked_fill(missing, -9999)
    data = recipe("Satellite bands with no-data")["Scenes"](scenes, torch.arange(48) % 2)
    network = fitted(data, tmp_path, torch.zeros(1, 320))
    seen = torch.cat([batch[0] for batch in network.seen["eval"]])
    bands = scenes[:, :4].double().movedim(1, 0).flatten(1)
    kept = (~missing).flatten()
    mean, std, _ = data.input_statistics()
    for band, middle, spread in zip(bands.numpy(), mean, std, strict=False):
        np.testing.assert_allclose([middle, spread], [band[kept].mean(), band[kept].std()], rtol=1e-10)
    assert (seen[:, :4][missing.expand(48, 4, 8, 8)] == 0).all()
    assert torch.equal(seen[:, 4], scenes[:, 4].float())
    assert seen[:, :4].max().item() == seen[0, 1, 0, 0].item() == pytest.approx(5 * 0.58)


def test_spectrograms_with_masks(tmp_path: Path) -> None:
    lengths = torch.randint(5, 30, (24,), generator=GENERATOR).tolist()
    recordings = [torch.randn(64, length, generator=GENERATOR) * 3 - 20 for length in lengths]
    data = recipe("Spectrograms with masks")["Recordings"](recordings)
    network = fitted(data, tmp_path, torch.zeros(1, 64))
    everything = torch.cat(recordings, 1).double().numpy()
    np.testing.assert_allclose(data.input_statistics().mean, everything.mean(1), rtol=1e-10)
    np.testing.assert_allclose(data.input_statistics().std, everything.std(1), rtol=1e-10)
    for batch in [*network.seen["eval"], *network.seen["train"]]:
        silence = ~batch["sounds"].expand_as(batch["spectrogram"])
        assert silence.any()
        assert (batch["spectrogram"][silence] == 0).all()
    raw, batch = recipe("Spectrograms with masks")["padded"](recordings[:8]), network.seen["eval"][0]
    torch.testing.assert_close(data.export_normalizer()(raw["spectrogram"], raw["sounds"]), batch["spectrogram"])


def test_tables_with_categorical_columns(tmp_path: Path) -> None:
    numbers = torch.randn(192, 3, generator=GENERATOR) * torch.tensor([12.0, 20_000.0, 1e-3]) + torch.tensor(
        [40, 5e4, 0]
    )
    colours = torch.eye(3)[torch.arange(192) % 3]
    numbers[::5, 1] = torch.nan
    rows = torch.cat([numbers, colours], 1)
    data = recipe("Tables with categorical columns")["Table"](rows, torch.arange(192) % 2)
    network = fitted(data, tmp_path, torch.zeros(1, 6))
    seen = torch.cat([batch[0] for batch in network.seen["eval"]])
    assert torch.equal(seen[:, 3:], colours)
    assert (seen[::5, 1] == 0).all()
    raw = numbers.double().numpy()
    wanted = np.nan_to_num((raw - np.nanmean(raw, 0)) / np.nanstd(raw, 0), nan=0.0)
    np.testing.assert_allclose(seen[:, :3], wanted, atol=2e-5)
    torch.testing.assert_close(data.export_normalizer()(rows), seen)
    beyond = rows[:1].clone()
    beyond[0, 0] = torch.inf
    assert data.export_normalizer()(beyond)[0, 0] == 10


def test_image_plus_radar(tmp_path: Path) -> None:
    rgb = torch.randint(30, 220, (24, 3, 8, 8), generator=GENERATOR).byte()
    radar = torch.randn(24, 2, 16, generator=GENERATOR) * torch.tensor([[20.0], [3.0]]) + torch.tensor([[60.0], [-1.0]])
    radar[torch.rand(24, 2, 16, generator=GENERATOR) < 0.3] = torch.nan
    radar[3, 0, 0] = 5000.0  # a ghost
    frames = [{"rgb": rgb[i], "sensors": {"radar": radar[i]}, "label": i % 2} for i in range(24)]
    data = recipe("Image plus radar")["Road"](frames)
    network = fitted(data, tmp_path, torch.zeros(1, 3 * 64 + 2 * 16))
    pictures = rgb.numpy().transpose(1, 0, 2, 3).reshape(3, -1) / 255
    echoes = radar.double().numpy().transpose(1, 0, 2).reshape(2, -1)
    wanted = {
        "rgb": (pictures.mean(1), pictures.std(1), [24 * 64] * 3),
        "radar": (np.nanmean(echoes, 1), np.nanstd(echoes, 1), (~np.isnan(echoes)).sum(1)),
    }
    for name, (mean, std, count) in wanted.items():
        np.testing.assert_allclose(data.input_statistics(name).mean, mean, rtol=1e-12)
        np.testing.assert_allclose(data.input_statistics(name).std, std, rtol=1e-12)
        np.testing.assert_array_equal(data.input_statistics(name).count, count)
    seen = {
        "rgb": torch.cat([batch["rgb"] for batch in network.seen["eval"]]),
        "radar": torch.cat([batch["sensors"]["radar"] for batch in network.seen["eval"]]),
    }
    (middle, spread, _), raw = wanted["radar"], radar.double().numpy()
    standard = (raw - middle.reshape(2, 1)) / np.sqrt(spread.reshape(2, 1) ** 2 + 1e-5)
    np.testing.assert_allclose(seen["radar"], np.nan_to_num(standard.clip(-5, 5) * 0.58, nan=0.0), atol=1e-5)
    assert (seen["radar"][radar.isnan()] == 0).all()
    assert seen["radar"].max().item() == seen["radar"][3, 0, 0].item() == pytest.approx(5 * 0.58)
    (middle, spread, _), raw = wanted["rgb"], rgb.numpy() / 255
    standard = (raw - middle.reshape(3, 1, 1)) / np.sqrt(spread.reshape(3, 1, 1) ** 2 + 1e-5)
    np.testing.assert_allclose(seen["rgb"], standard * 0.58, atol=1e-5)
    torch.testing.assert_close(data.export_normalizer("rgb")(rgb), seen["rgb"])
    torch.testing.assert_close(data.export_normalizer("radar")(radar), seen["radar"])
    back = data.denormalize(seen["radar"], "radar")[:, 1]
    valid = ~radar[:, 1].isnan()
    torch.testing.assert_close(back[valid], radar[:, 1][valid], rtol=1e-5, atol=1e-4)


def test_targets_of_a_regression(tmp_path: Path) -> None:
    names = recipe("Targets of a regression")
    features = torch.randn(256, 4, generator=GENERATOR)
    prices = 3e5 + features @ torch.tensor([8e4, -2e4, 3e4, 0.0])
    data, network = names["Houses"](features, prices), names["Prices"](4)
    run = trainer(tmp_path, max_epochs=40)
    run.fit(network, data)
    spread = prices.std().item()
    assert run.callback_metrics["error"].item() < 0.05 * spread
    predictions = torch.cat(run.predict(network, data))  # type: ignore[arg-type]
    assert predictions.shape == prices.shape
    assert (predictions - prices).abs().mean().item() < 0.05 * spread
