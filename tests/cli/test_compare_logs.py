"""`lightning-revbn compare LOGS`: arms that are found by the settings in the logs, of every logger."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.arms import BASELINE, BETTER, write_arm
from helpers.experiment import KINDS, SCORES, write_experiment

from lightning_revbn.cli.main import main


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 writes no directories without it
        write_experiment(folder)
    return folder


def output(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code = main(["compare", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code = main(["compare", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (1, "", 1)
    return err


def test_one_experiment_in_the_logs_of_four_loggers_gives_the_same_table(
    experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = {kind: output(capsys, experiment / kind, "--metric", "test_acc") for kind in KINDS}
    assert set(tables.values()) == {tables["csv"]}, tables
    lines = tables["csv"].splitlines()
    assert [line.partition("|")[0].strip() for line in lines[2:5]] == ["baseline", "scale=0.1", "scale=0.5"]
    found = json.loads(output(capsys, experiment / "mlflow", "--metric", "test_acc", "--json"))
    assert [arm["scores"] for arm in found["arms"]] == [list(SCORES[0.1]), list(SCORES[0.5])]
    assert found["baseline"]["scores"] == list(SCORES[1.0])


def test_the_curves_of_four_loggers_say_the_same(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = tmp_path / "curves.svg"
    said = {kind: output(capsys, experiment / kind, "--curves", "val_loss", "-o", figure) for kind in KINDS}
    assert set(said.values()) == {said["csv"]}, said
    assert "scale=0.1: ahead for good from step 0 of 20 (lower val_loss; mean of 6 pairs)" in said["csv"]
    picture = figure.read_text()
    assert "scale=0.5" in picture
    assert "val_loss" in picture


def test_runs_of_w_and_b_and_mlflow_are_named_one_by_one_too(
    experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted((experiment / "wandb").rglob("*.wandb"))
    by_file = output(capsys, *files, "--metric", "test_acc")
    by_directory = output(capsys, *(file.parent for file in files), "--metric", "test_acc")
    by_database = output(capsys, experiment / "mlflow" / "mlflow.db", "--metric", "test_acc")
    assert by_file == by_directory == by_database


@pytest.mark.parametrize("kind", ["wandb", "mlflow", "mlruns"])
def test_without_the_package_its_installation_is_told(
    kind: str, experiment: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = "wandb" if kind == "wandb" else "mlflow"
    missing = {"wandb": "wandb.proto.wandb_internal_pb2", "mlflow": "mlflow.tracking"}[package]
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    said = error(capsys, experiment / kind, "--metric", "test_acc")
    assert re.search(rf"needs {package} to be read: pip install {package}", said, re.IGNORECASE)


def with_settings(folder: Path, settings: str) -> Path:
    for index, run in enumerate(sorted(folder.glob("seed_*")), start=1):
        (run / "hparams.yaml").write_text(f"seed: {index}\n{settings}")
    return folder


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    with_settings(write_arm(tmp_path / "logs" / "a", BASELINE), "lr: 0.1\n")
    with_settings(write_arm(tmp_path / "logs" / "b", BETTER), "lr: 0.1\nrevbn/scale: 0.1\n")
    return tmp_path / "logs"


def test_the_arms_that_are_found_give_the_table_of_the_arms_that_are_named(
    logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = output(capsys, logs, "--metric", "test_acc")
    named = output(capsys, logs / "a", "--against", logs / "b", "--metric", "test_acc", "--labels", "scale=0.1")
    assert found == named
    assert "better:" in output(capsys, logs, "--metric", "test_acc", "--labels", "better")


def test_other_hyperparameters_that_differ_between_the_arms_are_told(
    logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_settings(logs / "b", "lr: 0.2\nrevbn/scale: 0.1\n")
    assert main(["compare", str(logs), "--metric", "test_acc"]) == 0
    assert "scale=0.1 and the baseline differ in other hyperparameters too: lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name what to compare: --metric KEY, such as test_acc, or --curves KEY"),
        (["--curves", "val_loss"], "--curves draws into a file: name it by -o"),
        (["--curves", "val_loss", "-o", "c.png", "--json"], "--json prints the comparison of scores"),
        (["--curves", "val_loss", "-o", "c.png"], "has no val_loss"),
        (["--metric", "test_acc", "--labels", "x", "y"], "--labels has 2 names for 1 arms (scale=0.1)"),
    ],
)
def test_options_that_cannot_be_followed_are_refused(
    options: list[str], message: str, logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error(capsys, logs, *options)


def test_logs_without_a_baseline_or_without_an_arm_are_refused(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "and no baseline among them" in error(capsys, logs / "b", "--metric", "test_acc")
    shutil.rmtree(logs / "b")
    assert "no settings of RevisitedBatchNorm" in error(capsys, logs, "--metric", "test_acc")


def test_the_figure_of_the_pairs_has_interval_number_and_p(
    logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = tmp_path / "pairs.svg"
    found = json.loads(output(capsys, logs, "--metric", "test_acc", "-o", figure, "--json"))
    arm: dict[str, Any] = found["arms"][0]
    low, high = arm["confidence_interval"]
    picture = figure.read_text()
    assert f"{arm['mean_difference']:+.4g} (95 %: {low:+.4g} to {high:+.4g})" in picture
    assert f"n = 6, p = {arm['p_value']:.3g}" in picture
