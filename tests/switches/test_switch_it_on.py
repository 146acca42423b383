"""The five ways of docs/switch_it_on.md: as the page shows them, and switched off."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import digits
import lightning as L
import pytest
import torch
import yaml
from helpers.logs import rows
from helpers.scripts import ROOT, run_shell
from helpers.states import same
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_revbn import RevBNCLI, RevisitedBatchNorm
from lightning_revbn.switches.environment import callbacks
from lightning_revbn.switches.environment_callback import callback_from

PAGE = (ROOT / "docs" / "switch_it_on.md").read_text()
SECTIONS = {part.partition("\n")[0]: part for part in PAGE.split("\n## ")[1:]}
*WAYS, ERRORS = SECTIONS


def blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def _command_line_of_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # what seed_everything writes into goes with it


def test_the_page_has_five_ways() -> None:
    assert len(WAYS) == 5


@pytest.mark.parametrize("way", WAYS)
def test_the_files_and_the_command_of_a_way_train_the_digits_and_log_the_keys(way: str, tmp_path: Path) -> None:
    folder = tmp_path / "examples"
    shutil.copytree(ROOT / "examples", folder, ignore=shutil.ignore_patterns("__pycache__", "*_output"))
    for block in (*blocks(SECTIONS[way], "python"), *blocks(SECTIONS[way], "yaml")):
        named = re.match(r"# (\S+\.(?:py|yaml))\n", block)
        if named:
            (folder / named[1]).write_text(block)
    (command,) = blocks(SECTIONS[way], "sh")
    run_shell(command, folder)
    logged = [row for row in rows(folder) if "revbn/scale_mean" in row]  # a test after the fit logs one epoch more
    assert max(int(row["epoch"]) for row in logged) == 2


def settings_of(path: Path) -> dict[str, Any]:
    return {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(path),
    }


def train_by_script(path: Path, own: list[L.Callback]) -> L.LightningModule:
    L.seed_everything(1)
    network = digits.DigitsResNet()
    L.Trainer(**settings_of(path), callbacks=own).fit(network, digits.Digits())
    return network


def train_by_cli(path: Path, kind: Any, trainer: dict[str, Any], *arguments: str) -> L.LightningModule:
    file = path / "train.yaml"
    file.write_text(yaml.safe_dump({"seed_everything": 1, "trainer": {**settings_of(path), **trainer}}))
    return kind(digits.DigitsResNet, digits.Digits, args=["fit", "--config", str(file), *arguments]).model


def let_trainers_load_the_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do so whether or not the installed metadata is of this version."""
    connector = sys.modules["lightning.pytorch.trainer.connectors.callback_connector"]
    monkeypatch.setattr(connector, "_load_external_callbacks", lambda group: callbacks())


def train(way: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> L.LightningModule:
    if way == "script":
        return train_by_script(path, [RevisitedBatchNorm(enabled=False)])
    if way == "environment":
        let_trainers_load_the_entry_point(monkeypatch)
        monkeypatch.setenv("LIGHTNING_REVBN", "0")
        return train_by_script(path, [])
    if way == "configuration":
        listed = {"class_path": "lightning_revbn.RevisitedBatchNorm", "init_args": {"enabled": False}}
        return train_by_cli(path, LightningCLI, {"callbacks": [listed]})
    return train_by_cli(path, RevBNCLI, {}, "--revbn.enabled", "false")


@pytest.mark.parametrize("way", ["script", "configuration", "flag", "environment"])
def test_a_way_switched_off_trains_and_saves_as_without_the_package(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Hydra's is held against a script in tests/examples/test_hydra.py.
    checkpoints = []
    for off in (False, True):
        folder = tmp_path / "run"  # the same for both, for checkpoints have paths in them
        folder.mkdir()
        if off:
            train(way, folder, monkeypatch)
        elif way in ("script", "environment"):
            train_by_script(folder, [])
        else:
            train_by_cli(folder, LightningCLI, {})
        (file,) = folder.rglob("*.ckpt")
        checkpoints.append(torch.load(file, weights_only=True))
        shutil.rmtree(folder)
    assert same(*checkpoints)


ERROR_CASES = {
    "an unknown key": ("--revbn.scales 0.1", "scales=0.1"),
    "the wrong type": ("--revbn.scale big", "scale=big"),
    "a scale of 0": ("--revbn.scale 0", "scale=0"),
    "a file that does not exist": ("--config missing.yaml", "missing.yaml"),
}


def quoted(row: str) -> list[list[str]]:
    """Return the code in each cell of a row of the page's table of errors, as the parts around what it leaves out."""
    (line,) = re.findall(rf"^\| {row} \|.*$", SECTIONS[ERRORS], re.MULTILINE)
    return [re.findall("`(.+?)`", cell)[0].split("...") for cell in line.split(" | ")[1:]]


@pytest.mark.parametrize("row", ERROR_CASES)
def test_the_errors_are_those_of_the_page(
    row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flag, variable = ERROR_CASES[row]
    with pytest.raises(SystemExit):
        train_by_cli(tmp_path, RevBNCLI, {}, "--revbn.enabled", "true", *flag.split())
    with pytest.raises(MisconfigurationException) as raised:
        callback_from(variable, "LIGHTNING_REVBN")
    for parts, said in zip(quoted(row), (capsys.readouterr().err, str(raised.value)), strict=True):
        assert not [part for part in parts if part not in said], said


def test_what_is_said_of_two_callbacks_is_what_the_page_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    ((error,), (notice,)) = quoted("two callbacks")
    listed = {"class_path": "lightning_revbn.RevisitedBatchNorm"}
    with pytest.raises(SystemExit):
        train_by_cli(tmp_path, RevBNCLI, {"callbacks": [listed]}, "--revbn.enabled", "true")
    assert f"error: {error}" in capsys.readouterr().err
    let_trainers_load_the_entry_point(monkeypatch)
    monkeypatch.setenv("LIGHTNING_REVBN", "1")
    with caplog.at_level("INFO"):
        train_by_script(tmp_path, [RevisitedBatchNorm(monitor=False)])
    assert caplog.messages.count(notice) == 1
