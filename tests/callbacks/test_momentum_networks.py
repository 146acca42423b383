"""BYOL, MoCo and averages of callbacks: a network and its copy start from the same scales, and stay one network."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import timm.utils
import torch
from helpers.by_hand import textbook_sgd
from helpers.lit import loader, quiet, sgd, trainer
from helpers.models import assert_same_parameters, images, scales
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, normalize
from torch.optim.swa_utils import AveragedModel

NEW = torch.tensor(0.1)
MOMENTUM = 0.9


def backbone(width: int = 6) -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def projection(width: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, width))


class Momentum(L.LightningModule):
    """Trains networks beside frozen copies of them, as lightly's examples do."""

    def __init__(self, configure: Any = sgd) -> None:
        super().__init__()
        self.configure = configure
        self.lr = 0.05
        self.copied: list[tuple[str, str]] = []

    def add_copy(self, name: str) -> None:
        self.add_module(f"{name}_momentum", copy.deepcopy(self.get_submodule(name)).requires_grad_(False))
        self.copied.append((name, f"{name}_momentum"))

    @torch.no_grad()
    def update_copies(self) -> None:
        for name, copied in self.copied:
            pairs = zip(self.get_submodule(name).parameters(), self.get_submodule(copied).parameters(), strict=True)
            for own, other in pairs:
                other.mul_(MOMENTUM).add_(own, alpha=1 - MOMENTUM)

    def configure_optimizers(self) -> Any:
        return self.configure(self)


class BYOL(Momentum):
    def __init__(self, configure: Any = sgd) -> None:
        super().__init__(configure)
        self.backbone, self.projection_head, self.prediction_head = backbone(), projection(), projection()
        for name in ("backbone", "projection_head"):
            self.add_copy(name)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.update_copies()
        views = batch[0], batch[0].flip(-1)
        predicted = [self.prediction_head(self.projection_head(self.backbone(view))) for view in views]
        with torch.no_grad():
            targets = [self.projection_head_momentum(self.backbone_momentum(view)) for view in views]
        return -(cosine_similarity(predicted[0], targets[1]) + cosine_similarity(predicted[1], targets[0])).mean()


class MoCo(Momentum):
    queue: Tensor

    def __init__(self, configure: Any = sgd) -> None:
        super().__init__(configure)
        self.encoder = nn.Sequential(backbone(), projection())
        self.add_copy("encoder")
        self.register_buffer("queue", normalize(torch.randn(32, 6), dim=1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.update_copies()
        query = normalize(self.encoder(batch[0]), dim=1)
        with torch.no_grad():
            key = normalize(self.encoder_momentum(batch[0].flip(-1)), dim=1)
        negatives = query @ self.queue.clone().T
        self.queue = torch.cat([self.queue, key])[-len(self.queue) :]
        logits = torch.cat([(query * key).sum(1, keepdim=True), negatives], dim=1) / 0.2
        return cross_entropy(logits, logits.new_zeros(len(query), dtype=torch.long))


def seeded(kind: type[Momentum], configure: Any = sgd) -> Any:
    torch.manual_seed(0)
    return kind(configure)


def write_by_hand(module: Momentum) -> Momentum:
    for scale in scales(module):
        nn.init.constant_(scale, 0.1)
    return module


class Start(L.Callback):
    """Remembers the values that training starts from."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.state = copy.deepcopy(pl_module.state_dict())


@pytest.mark.parametrize("kind", [BYOL, MoCo])
def test_a_momentum_network_starts_as_its_original_and_follows_it_as_by_hand(
    tmp_path: Path, kind: type[Momentum]
) -> None:
    reference = write_by_hand(seeded(kind, textbook_sgd))
    trainer(tmp_path, max_steps=20, max_epochs=-1).fit(reference, loader(10))

    module = seeded(kind)
    callback, start = quiet(), Start()
    trainer(tmp_path, callback, start, max_steps=20, max_epochs=-1).fit(module, loader(10))

    for name, copied in module.copied:
        own = {key.removeprefix(name): value for key, value in start.state.items() if key.startswith(f"{name}.")}
        other = {key.removeprefix(copied): value for key, value in start.state.items() if key.startswith(f"{copied}.")}
        assert own.keys() == other.keys()
        assert all(torch.equal(own[key], other[key]) for key in own)
    assert_same_parameters(reference, module)
    assert callback.report.left_alone == []
    copies = {record.name: record.copy_of for record in callback.report.records if record.state == "copy"}
    assert len(copies) == 3
    assert all(name == original.replace(".", "_momentum.", 1) for name, original in copies.items() if original)


def test_the_table_says_which_layers_are_copies(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "lightning.pytorch"):
        trainer(tmp_path, quiet(), max_steps=1, max_epochs=-1).fit(seeded(MoCo), loader(1))
    assert "-> 0.1 | copy of encoder.0.0.1 ... encoder.0.1.1 (2)" in caplog.text


def test_a_teacher_of_its_own_is_left_alone(tmp_path: Path) -> None:
    class Distilled(BYOL):
        def __init__(self) -> None:
            super().__init__()
            pretrained, other = backbone(), backbone()
            pretrained(images(8)[0])
            self.teacher = pretrained.requires_grad_(False)
            self.random = other.requires_grad_(False)

    module = Distilled()
    before = {key: value.clone() for key, value in module.state_dict().items() if key.startswith(("teacher", "random"))}
    trainer(tmp_path, quiet(), start := Start(), max_steps=1, max_epochs=-1).fit(module, loader(1))
    assert all(torch.equal(value, start.state[key]) for key, value in before.items())
    assert (start.state["backbone_momentum.0.1.weight"] == NEW).all()


def test_a_network_that_is_frozen_when_training_starts_keeps_its_scales_and_so_does_its_copy(tmp_path: Path) -> None:
    class Freezing(L.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            pl_module.backbone.requires_grad_(False)

    for freezing_first in (False, True):
        module = seeded(BYOL)
        callbacks = [quiet(), Freezing()]
        run = trainer(
            tmp_path, *callbacks[:: -1 if freezing_first else 1], start := Start(), max_steps=1, max_epochs=-1
        )
        run.fit(module, loader(1))
        for key, value in start.state.items():
            if key.endswith(("0.0.1.weight", "0.1.1.weight")):
                assert (value == 1).all(), key
        assert (start.state["projection_head_momentum.1.weight"] == NEW).all()


def test_a_resumed_momentum_network_is_that_of_the_undisturbed_run(tmp_path: Path) -> None:
    whole = seeded(BYOL)
    trainer(tmp_path, quiet(), max_epochs=2).fit(whole, loader(4))
    run = trainer(tmp_path, quiet(), max_epochs=1)
    run.fit(seeded(BYOL), loader(4))
    run.save_checkpoint(tmp_path / "half.ckpt")
    resumed = seeded(BYOL)
    trainer(tmp_path, quiet(), max_epochs=2).fit(resumed, loader(4), ckpt_path=tmp_path / "half.ckpt")
    assert_same_parameters(whole, resumed)


# --- copies that callbacks keep ---------------------------------------------------------------------------------------


class Keeper:
    """Keeps an average in a plain object, as many training scripts do."""

    def __init__(self, model: nn.Module) -> None:
        self.ema = copy.deepcopy(model).eval()


KEEPERS: dict[str, Any] = {
    "deepcopy": copy.deepcopy,
    "part": lambda module: copy.deepcopy(module.backbone),
    "AveragedModel": AveragedModel,
    "AveragedModel-part": lambda module: AveragedModel(module.projection_head),
    "ModelEmaV2": lambda module: timm.utils.ModelEmaV2(module, 0.9),
    "ModelEmaV3": lambda module: timm.utils.ModelEmaV3(module.backbone, 0.9, dtype=torch.float64),
    "object": Keeper,
    "list": lambda module: [copy.deepcopy(module), copy.deepcopy(module.backbone)],
}


class Keeping(L.Callback):
    def __init__(self, make: Any) -> None:
        self.make = make

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.kept = self.make(pl_module)
        self.reference = pl_module  # is no copy
        self.other = seeded(MoCo).encoder

    @property
    def networks(self) -> list[nn.Module]:
        kept = self.kept.ema if isinstance(self.kept, Keeper) else self.kept
        return kept if isinstance(kept, list) else [kept]


@pytest.mark.parametrize("keep", KEEPERS)
def test_a_copy_that_a_callback_made_before_ours_was_set_up_starts_from_the_new_scales(
    tmp_path: Path, keep: str
) -> None:
    keeping = Keeping(KEEPERS[keep])
    torch.manual_seed(7)
    trainer(tmp_path, keeping, quiet(), max_steps=1, max_epochs=-1).fit(BYOL(), loader(1))
    found = [scale for network in keeping.networks for scale in scales(network)]
    assert found
    assert all((scale == NEW.to(scale.dtype)).all() or (scale == 0.1).all() for scale in found)
    assert all((scale == 1).all() for scale in scales(keeping.other))
