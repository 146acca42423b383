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


def features_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    """Return a tensor to classify and labels, zeros where a recipe has none."""
    labels = None
    if not isinstance(batch, dict):
        inputs, labels = batch
    elif "spectrogram" in batch:
        inputs = batch["spectrogram"].mean(2)
    else:
        inputs, labels = torch.cat([batch["image"].flatten(1), batch["radar"]["range"].flatten(1)], 1), batch["label"]
    has_labels = labels is not None and labels.dtype == torch.long  # the second of two views is no label
    return inputs, labels if has_labels else torch.zeros(len(inputs), dtype=torch.long)


class Classifier(L.LightningModule):
    """A network for any input, which keeps the batches that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.LazyLinear(2)
        self.seen: dict[str, list[Any]] = {"train": [], "eval": []}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen["train"].append(batch)
        inputs, labels = features_and_labels(batch)
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
    images, labels = torch.randint(20, 200, (48, 3, 6, 6), generator=GENERATOR).byte(), torch.arange(48) % 2
    data = recipe("Contrastive views")["Views"](images, labels, lambda views: views + 5 * (views > 100).byte())
    network = fitted(data, tmp_path, torch.zeros(1, 108))
    raw = (images + 5 * (images > 100)).double().movedim(1, 0).flatten(1) / 255
    mean, std, count = data.input_statistics()
    assert count.tolist() == [2 * 48 * 36] * 3
    torch.testing.assert_close(mean, raw.mean(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(std, raw.std(1, correction=0), rtol=1e-12, atol=0)
    for first, second in network.seen["train"]:
        torch.testing.assert_close(first, second)  # the augmentation of the test has no chance in it
        assert first.std(correction=0).item() == pytest.approx(0.58, rel=1e-3)
    seen = torch.cat([batch[0] for batch in network.seen["eval"]])
    torch.testing.assert_close(seen, data.export_normalizer()(images))
    assert torch.equal(torch.cat([batch[1] for batch in network.seen["eval"]]), labels)


def test_satellite_bands_with_no_data(tmp_path: Path) -> None:
    scenes = torch.randint(100, 3000, (48, 5, 8, 8), generator=GENERATOR).short()
    scenes[0, 1, 0, 0] = 30000  # a glint
    scenes[:, 4] %= 7
    missing = torch.rand(48, 1, 8, 8, generator=GENERATOR) < 0.2
    missing[0, 0, 0, 0] = False  # at the place of the glint
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
    images = torch.randint(0, 256, (48, 3, 6, 6), generator=GENERATOR).byte()
    radar = torch.randn(48, 2, 9, generator=GENERATOR) * torch.tensor([[0.01], [3.0]]) + 40
    silent = torch.rand(48, 2, 9, generator=GENERATOR) < 0.1
    radar[silent] = torch.nan
    samples = [{"image": images[row], "radar": {"range": radar[row]}, "label": row % 2} for row in range(48)]
    data = recipe("Image plus radar")["Sensors"](samples)
    network = fitted(data, tmp_path, torch.zeros(1, 126))
    columns = radar.double().movedim(1, 0).flatten(1).numpy()
    np.testing.assert_allclose(data.input_statistics("radar").mean, np.nanmean(columns, 1), rtol=1e-12)
    np.testing.assert_allclose(data.input_statistics("radar").std, np.nanstd(columns, 1), rtol=1e-9)
    pixels = images.double().movedim(1, 0).flatten(1) / 255
    torch.testing.assert_close(data.input_statistics("image").mean, pixels.mean(1), rtol=1e-12, atol=0)
    seen = {name: [batch[name] for batch in network.seen["eval"]] for name in ("image", "radar")}
    echoes = torch.cat([part["range"] for part in seen["radar"]])
    assert (echoes[silent] == 0).all()
    wanted = 0.58 * (columns - np.nanmean(columns, 1)[:, None]) / np.nanstd(columns, 1)[:, None]
    np.testing.assert_allclose(echoes.movedim(1, 0).flatten(1), np.nan_to_num(wanted), atol=2e-5)
    torch.testing.assert_close(torch.cat(seen["image"]), data.export_normalizer("image")(images))
    torch.testing.assert_close(data.denormalize(torch.cat(seen["image"]), "image"), images / 255)


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
