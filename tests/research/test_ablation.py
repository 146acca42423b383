"""The parts of a small scale: each changes what it says and nothing else, and together they are the method."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ablation
import lightning as L
import paper_protocol
import pytest
import torch
from digits import Digits, DigitsResNet
from torch import nn

from lightning_revbn import RevisitedBatchNorm

DIVISOR = 100.0


class Recorder(L.Callback):
    """Keeps the values that training starts from, and those after every step."""

    def __init__(self) -> None:
        self.values: list[dict[str, torch.Tensor]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.keep(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *others: object) -> None:
        self.keep(pl_module)

    def keep(self, network: nn.Module) -> None:
        self.values.append({name: value.detach().clone() for name, value in network.named_parameters()})


def train(*callbacks: L.Callback, epochs: int = 1) -> tuple[DigitsResNet, Recorder]:
    """Train a network in float64: 7 steps an epoch."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, recorder = DigitsResNet().double(), Recorder()
        L.Trainer(
            accelerator="cpu",
            precision="64-true",
            max_epochs=epochs,
            limit_val_batches=0,
            callbacks=[*callbacks, recorder],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(network, Digits())
    return network, recorder


def kind(network: DigitsResNet, name: str) -> str:
    """Return which part a parameter belongs to, by its place in the network."""
    module, _, value = name.rpartition(".")
    if isinstance(network.get_submodule(module), nn.BatchNorm2d):
        return {"weight": "scale", "bias": "shift"}[value]
    return "head" if name == "head.2.weight" else "rest"


@pytest.mark.parametrize("scale", [0.1, 0.25])
def test_all_parts_together_are_the_method_in_float64(scale: float) -> None:
    method, values = train(RevisitedBatchNorm(scale=scale, scale_lr_divisor=DIVISOR, monitor=False), epochs=3)
    parts = ablation.parts_of(scale, DIVISOR)
    assert ("scale" in parts) == (scale == 0.25)
    _, others = train(ablation.ScaleOne(scale, DIVISOR, parts), epochs=3)
    assert len(values.values) == len(others.values) == 22
    factors = {"scale": scale, "shift": scale, "head": 1 / scale, "rest": 1.0}
    for ours, theirs in zip(values.values, others.values, strict=True):
        for name, value in ours.items():
            expected = factors[kind(method, name)] * theirs[name]
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12, msg=name)


@pytest.fixture(scope="module")
def baseline() -> Recorder:
    return train()[1]


FACTORS = {"logits": 0.25, "head": 0.0625, "shift": 16.0, "scale": 0.16, "eps": 16.0}
"""Of the parts of scale 0.25 and divisor 100, computed by hand."""


@pytest.mark.parametrize("part", FACTORS)
def test_a_part_alone_changes_what_it_says_and_nothing_else(part: str, baseline: Recorder) -> None:
    network, recorder = train(ablation.ScaleOne(0.25, DIVISOR, (part,)))
    start, first, *_ = recorder.values
    for name, value in baseline.values[0].items():
        factor = FACTORS[part] if part == "logits" and name == "head.2.weight" else 1.0
        assert torch.equal(start[name], factor * value), name
    for name, layer in network.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            factor = FACTORS[part] if part == "eps" and name != "stem.1" else 1.0
            assert layer.eps == pytest.approx(1e-5 * factor), name
    if part in ("logits", "eps"):
        return  # every gradient is another one then
    for name, value in baseline.values[0].items():
        decay = 0.1 * 1e-4 * value if kind(network, name) == "head" else 0.0  # is that of the baseline
        factor = FACTORS[part] if kind(network, name) == part else 1.0
        step = factor * (baseline.values[1][name] - value + decay) - decay
        torch.testing.assert_close(first[name] - value, step, rtol=1e-9, atol=1e-15, msg=name)


def test_every_part_is_alone_and_left_out_and_the_two_pairs_are_arms_of_their_own() -> None:
    parsed = ablation.parse_arguments(["--scale", "0.25", "--seeds", "2", "--leave-one-out"])
    runs = ablation.grid(parsed)
    arms = {run.name: run.callbacks() for run in runs}
    assert len(runs) == 2 * len(arms) == 2 * (2 + 1 + 5 + 2 + 5)
    assert arms["baseline"] == []
    assert isinstance(arms["scale_0.25"][0], RevisitedBatchNorm)
    assert arms["scale_0.25_only_scale"][0].parts == ("scale",)
    assert arms["scale_0.25_only_logits_head"][0].parts == ("logits", "head")
    assert arms["scale_0.25_only_shift_eps"][0].parts == ("shift", "eps")
    assert arms["scale_0.25_without_eps"][0].parts == ("logits", "head", "shift", "scale")
    parts = {run.name: run.callbacks()[0] for run in ablation.grid(ablation.parse_arguments([])) if "all" in run.name}
    assert parts["scale_0.1_all"].parts == ("logits", "head", "shift", "eps")


def test_a_run_with_parts_is_one_of_the_protocols(tmp_path: Path) -> None:
    parsed = ablation.parse_arguments(["--scale", "0.5", "--seeds", "1", "--epochs", "1", "--leave-one-out"])
    run = ablation.grid(parsed)[-1]
    result = paper_protocol.train(run, tmp_path)
    assert result["name"] == "scale_0.5_without_eps"
    assert paper_protocol.finished(run, tmp_path) == json.loads(json.dumps(result))


def test_all_arms_stand_against_the_same_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pretend(runs: Sequence[paper_protocol.Run], *others: object) -> list[dict[str, Any]]:
        score = {"baseline": 90.0, "scale_0.5_only_eps": 93.0, "scale_0.5": 95.0}
        rest = {"val_acc": 50.0, "best_epoch": 1, "best_val_acc": 50.0, "best_test_acc": 50.0}
        return [
            {**asdict(run), **rest, "name": run.name, "test_acc": score.get(run.name, 80.0) + run.seed % 2}
            for run in runs
        ]

    monkeypatch.setattr(ablation, "train_missing", pretend)
    ablation.main(["--scale", "0.5", "--seeds", "3", "--output-dir", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "Accuracy in %, the parts of scale 0.5" in printed
    shown = {line.split("|")[0].strip(): line.split("|")[3].strip() for line in printed.splitlines() if "|" in line}
    assert {"baseline": "90.667", "scale_0.5_only_eps": "93.667", "scale_0.5": "95.667"}.items() <= shown.items()
    with (tmp_path / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3 * 10
