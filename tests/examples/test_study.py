"""Studies of the Hydra example: every launcher, interrupted studies, failed runs, and the report."""

from __future__ import annotations

import json
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import study
from helpers.scripts import kill_script, run_python, run_script
from helpers.studies import ARMS_AND_SEEDS, SCRIPT, compared, results, run_study
from omegaconf import DictConfig, OmegaConf

RUNS = [f"revbn={arm},seed={seed},trainer.max_epochs=1" for arm in ("default", "off") for seed in (1, 2)]


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that Hydra's own launcher ran, a run after the other."""
    folder = tmp_path_factory.mktemp("studies") / "basic"
    assert "4 runs finished, 0 failed" in run_study(folder).stdout
    return folder


def test_every_run_has_a_directory_that_is_named_by_its_overrides(in_one_process: Path) -> None:
    assert list(results(in_one_process)) == RUNS
    for run in RUNS:
        assert (in_one_process / run / "logs" / "metrics.csv").exists()


def test_compare_finds_arms_and_seeds_of_a_study_by_itself(in_one_process: Path) -> None:
    rows = [line.split("|") for line in compared(in_one_process).splitlines() if line.count("|") > 2]
    means = {row[0].strip(): float(row[2]) for row in rows[1:]}
    scores = results(in_one_process)
    for arm, label in (("off", "baseline"), ("default", "scale=0.1")):
        tested = [run["test_acc"] for name, run in scores.items() if f"revbn={arm}," in name]
        assert means[label] == pytest.approx(sum(tested) / 2, rel=1e-4)
    assert len(means) == 2


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_launcher_gives_the_same_scores_and_the_same_table(
    launcher: str, in_one_process: Path, tmp_path: Path
) -> None:
    run_study(tmp_path, f"hydra/launcher={launcher}", *ARMS_AND_SEEDS)
    assert results(tmp_path) == results(in_one_process)
    assert compared(tmp_path) == compared(in_one_process)


def test_a_study_that_was_killed_trains_only_missing_runs(in_one_process: Path, tmp_path: Path) -> None:
    def in_the_second_run() -> bool:
        return len(list(tmp_path.glob("*/logs"))) == 2

    kill_script(SCRIPT, "-m", f"hydra.sweep.dir={tmp_path}", *ARMS_AND_SEEDS, when=in_the_second_run)
    (finished,) = tmp_path.rglob("result.json")
    written = finished.stat().st_mtime_ns
    printed = run_study(tmp_path).stdout
    assert re.findall(r"(\S+) is finished and passed over", printed) == [finished.parent.name]
    assert printed.count("Validation accuracy") == 3
    assert finished.stat().st_mtime_ns == written
    assert results(tmp_path) == results(in_one_process)
    assert compared(tmp_path) == compared(in_one_process)


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_failed_run_stops_no_other_run_and_the_reports_command_runs_it_alone(
    launcher: str, in_one_process: Path, tmp_path: Path
) -> None:
    failing = RUNS[2]
    in_the_way = tmp_path / failing / "logs"
    in_the_way.parent.mkdir()
    in_the_way.write_text("a file where the logger makes its directory")
    done = run_study(tmp_path, f"hydra/launcher={launcher}", *ARMS_AND_SEEDS, check=False)
    assert done.returncode == 1
    assert sorted(results(tmp_path)) == [run for run in RUNS if run != failing]
    line, reason, _, command = done.stderr.splitlines()[-4:]
    assert line == f"Study {tmp_path}: 3 runs finished, 1 failed."
    assert reason.startswith(f"  {failing}: FileExistsError: ")
    assert "Traceback" in (tmp_path / failing / "failure.txt").read_text()
    in_the_way.unlink()
    python, *arguments = shlex.split(command)
    assert python == "python"
    assert {"-m", f"hydra/launcher={launcher}", "revbn=off", "seed=1", "trainer.max_epochs=1"} < {*arguments}
    again = run_python(*arguments)
    assert "passed over" not in again.stdout
    assert f"Study {tmp_path}: 4 runs finished, 0 failed." in again.stdout
    assert results(tmp_path) == results(in_one_process)


def test_a_single_run_that_fails_raises_its_error(tmp_path: Path) -> None:
    done = run_script(SCRIPT, "revbn=default", "revbn.scale=0", f"hydra.run.dir={tmp_path}", check=False)
    assert done.returncode == 1
    assert "scale=0 must be finite and positive" in done.stderr
    assert not (tmp_path / "failure.txt").exists()


def test_the_directory_of_a_study_may_be_relative_and_have_any_name(in_one_process: Path, tmp_path: Path) -> None:
    folder = tmp_path / "it's a=1, (b)"
    folder.mkdir()
    one_run = ["revbn=off", "seed=1", "trainer.max_epochs=1"]
    done = run_script(SCRIPT, "-m", *one_run, cwd=folder)  # below the working directory
    assert f"Study {folder / 'multirun'}: 1 runs finished, 0 failed." in done.stdout
    assert results(folder / "multirun") == {RUNS[2]: results(in_one_process)[RUNS[2]]}


def test_jobs_get_the_absolute_directory_of_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["hydra/launcher=ray", "hydra.sweep.dir=studies/a"]
    config = OmegaConf.create({"hydra": {"sweep": {"dir": "studies/a"}, "overrides": {"hydra": given}}})
    study.Report().on_multirun_start(config)
    assert config.hydra.sweep.dir == str(tmp_path / "studies" / "a")
    assert config.hydra.overrides.hydra == ["hydra/launcher=ray", f"hydra.sweep.dir='{tmp_path}/studies/a'"]


def test_a_study_without_a_single_run_is_an_error(tmp_path: Path) -> None:
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    with pytest.raises(SystemExit, match=r"0 failed\. No run has written into this directory"):
        study.Report().on_multirun_end(config)


CONFIG = OmegaConf.create({"seed": 1, "trainer": {"max_epochs": 2}})
SCORES = {"val_acc": 0.5, "test_acc": 0.25}


def never(config: DictConfig) -> study.Scores:
    raise AssertionError("trained again")


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    assert study.train_once(tmp_path, CONFIG, lambda config: SCORES) == SCORES
    assert study.train_once(tmp_path, CONFIG, never) == SCORES


def test_a_finished_run_of_other_settings_is_refused_and_kept(tmp_path: Path) -> None:
    study.train_once(tmp_path, CONFIG, lambda config: SCORES)
    other = OmegaConf.create({"seed": 1, "trainer": {"max_epochs": 3}, "revbn": {}})
    with pytest.raises(study.OtherSettingsError, match=r"revbn=None, now \{\}, trainer.max_epochs=2, now 3\): delete"):
        study.train_once(tmp_path, other, never)
    assert json.loads((tmp_path / "result.json").read_text())["scores"] == SCORES


def test_the_logs_and_the_failure_of_an_unfinished_run_go_before_it_trains_anew(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "metrics.csv").write_text("half a l")
    (tmp_path / "result.json.part").write_text("{")
    study.record_failure(tmp_path, ValueError("first"))

    def train(config: DictConfig) -> study.Scores:
        assert not (tmp_path / "logs").exists()
        assert not (tmp_path / "failure.txt").exists()
        return SCORES

    assert study.train_once(tmp_path, CONFIG, train) == SCORES


def test_a_run_that_fails_has_no_result(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="trained again"):
        study.train_once(tmp_path, CONFIG, never)
    assert not (tmp_path / "result.json").exists()


def test_two_processes_never_train_the_same_run(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slowly(config: DictConfig) -> study.Scores:
        begun.set()
        go_on.wait(60)
        return SCORES

    def second() -> None:
        begun.wait(60)
        found.append(study.train_once(tmp_path, CONFIG, never))

    found: list[study.Scores] = []
    threads = [
        threading.Thread(target=study.train_once, args=(tmp_path, CONFIG, slowly)),
        threading.Thread(target=second),
    ]
    for thread in threads:
        thread.start()
    begun.wait(60)
    time.sleep(0.2)
    assert not found  # the second waits
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert found == [SCORES]


def chained(*makers: Callable[[], Exception]) -> Exception:
    error: Exception | None = None
    for make in makers:
        made = make()
        made.__cause__, error = error, made
    assert error is not None
    return error


def test_a_failure_is_named_by_the_first_line_of_its_cause(tmp_path: Path) -> None:
    error = chained(lambda: ValueError("scale=0 must be positive\nand more"), lambda: RuntimeError("Error in call"))
    study.record_failure(tmp_path, error)
    reason, empty, *trace = (tmp_path / "failure.txt").read_text().splitlines()
    assert (reason, empty) == ("ValueError: scale=0 must be positive", "")
    assert "RuntimeError: Error in call" in trace


def fail(folder: Path, name: str, *overrides: str) -> None:
    (folder / name / ".hydra").mkdir(parents=True)
    (folder / name / ".hydra" / "overrides.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create([*overrides])))
    study.record_failure(folder / name, ValueError(name))


def test_the_report_has_a_command_for_each_group_of_failed_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(tmp_path, "a", "revbn=off", "seed=10")
    fail(tmp_path, "b", "revbn=off", "seed=9")
    fail(tmp_path, "b without a number", "revbn=off", "seed=null")
    fail(tmp_path, "c", "revbn=default", "revbn.scale={*.bn2:0.5,*:0.25}", "seed=2")
    fail(tmp_path, "d", "revbn=off")
    sweep = ["revbn=off,default", "seed=range(1,11)"]
    monkeypatch.setattr(sys, "argv", ["train.py", "--config-dir", "my conf", "-m", *sweep, "hydra/launcher=joblib"])
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}, "overrides": {"task": sweep}}})
    with pytest.raises(SystemExit) as ended:
        study.Report().on_multirun_end(config)
    call = "  python train.py --config-dir 'my conf' -m hydra/launcher=joblib"
    assert str(ended.value).splitlines() == [
        f"Study {tmp_path}: 0 runs finished, 5 failed.",
        *(f"  {name}: ValueError: {name}" for name in ("a", "b", "b without a number", "c", "d")),
        "These commands run only the failed runs:",
        f"{call} revbn=off seed=9,10,null",
        f"{call} revbn=default 'revbn.scale={{*.bn2:0.5,*:0.25}}' seed=2",
        f"{call} revbn=off",
    ]


def test_the_report_names_failed_runs_whose_overrides_hydra_was_told_not_to_write(tmp_path: Path) -> None:
    options = ["hydra.output_subdir=null", "revbn=default", "revbn.scale=0", "seed=1", "trainer.max_epochs=1"]
    done = run_study(tmp_path, *options, check=False)
    assert done.returncode == 1
    line, reason, remedy = done.stderr.splitlines()[-3:]
    assert line == f"Study {tmp_path}: 0 runs finished, 1 failed."
    assert "ValueError: scale=0 must be finite and positive" in reason
    assert remedy == "Start the study again to run only these."
