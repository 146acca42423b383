"""The search with Optuna: validation data alone choose, over seeds, and fresh seeds test the choice once."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import digits
import optuna
import optuna_study
import pytest
from helpers.scripts import ROOT, run_python
from helpers.studies import compared, results
from optuna.trial import TrialState

Call = tuple[optuna_study.Settings, int, int]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # what seed_everything writes into goes with it
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(optuna.logging.INFO)


def accuracy(settings: optuna_study.Settings, seed: int) -> float:
    """Better with faster shifts, and 0.01 better with every seed."""
    return settings["shift_lr_multiplier"] / 100 + seed / 100


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The trainings of a search, which are replaced by a formula."""
    made: list[Call] = []

    def validate(settings: optuna_study.Settings, seed: int, epochs: int) -> float:
        made.append((dict(settings), seed, epochs))
        return accuracy(settings, seed)

    monkeypatch.setattr(optuna_study, "validate", validate)
    return made


def search(folder: Path, *options: str) -> optuna.Study:
    optuna_study.main(["--trials", "12", "--seeds", "3", "--epochs", "7", "--output-dir", str(folder), *options])
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "optuna.log")))
    return optuna.load_study(study_name="revbn", storage=storage)


def test_the_value_of_a_trial_is_the_mean_over_the_seeds_and_the_paper_comes_first(
    calls: list[Call], tmp_path: Path
) -> None:
    study = search(tmp_path)
    assert calls[:3] == [(optuna_study.PAPER, seed, 7) for seed in (1, 2, 3)]
    complete = study.get_trials(states=[TrialState.COMPLETE])
    for trial in complete:
        expected = [accuracy(trial.params, seed) for seed in (1, 2, 3)]
        assert trial.value == pytest.approx(sum(expected) / 3)
    assert study.best_trial.params["shift_lr_multiplier"] == max(t.params["shift_lr_multiplier"] for t in complete)


def test_the_pruner_sees_every_seed_and_stops_no_trial_after_a_single_seed(calls: list[Call], tmp_path: Path) -> None:
    study = search(tmp_path, "--trials", "20")
    stopped = study.get_trials(states=[TrialState.PRUNED])
    assert stopped
    for trial in stopped:
        assert trial.intermediate_values == {
            1: pytest.approx(accuracy(trial.params, 1)),
            2: pytest.approx((accuracy(trial.params, 1) + accuracy(trial.params, 2)) / 2),
        }
    assert len(calls) == 3 * 20 - len(stopped)


# Optuna ends the trial on Ctrl-C. Lightning turns Ctrl-C into a SystemExit, after which the trial counts as running.
@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_a_search_that_is_started_again_goes_on_and_tries_an_interrupted_setting_again(
    interrupt: type[BaseException], calls: list[Call], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formula = optuna_study.validate

    def stop(settings: optuna_study.Settings, seed: int, epochs: int) -> float:
        if len(calls) == 7:  # in the middle of the third trial
            raise interrupt
        return formula(settings, seed, epochs)

    with monkeypatch.context() as context:
        context.setattr(optuna_study, "validate", stop)
        with pytest.raises(interrupt):
            search(tmp_path)
    third = calls[6][0]
    study = search(tmp_path)
    assert calls[7:10] == [(third, seed, 7) for seed in (1, 2, 3)]
    ended = study.get_trials(states=optuna_study.ENDED)
    assert len(ended) == 12
    assert len({tuple(trial.params.values()) for trial in ended}) == 12
    trained = len(calls)
    search(tmp_path)
    assert len(calls) == trained


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--seeds", "1001"], "--seeds must be at most 1000: the seeds above are for the test"),
        (["--test-seeds", "0"], "--test-seeds must be at least 1, got 0"),
        (["--epochs", "8"], r"holds a search with \{'seeds': 3, 'epochs': 7\}, not \{'seeds': 3, 'epochs': 8\}"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    options: list[str], message: str, calls: list[Call], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search(tmp_path, "--trials", "1")
    with pytest.raises(SystemExit) as ended:
        search(tmp_path, *options)
    assert ended.value.code == 2
    assert re.search(f"error: .*{message}", capsys.readouterr().err)


def test_a_training_of_the_search_never_touches_the_test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = digits.Digits.setup

    def without_test_images(self: digits.Digits, stage: str) -> None:
        setup(self, stage)
        del self.test_set

    monkeypatch.setattr(digits.Digits, "setup", without_test_images)
    good, bad = (optuna_study.validate({**optuna_study.PAPER, "scale": scale}, 1, 2) for scale in (1.0, 0.05))
    assert bad < good <= 1
    assert 90 * good == pytest.approx(round(90 * good), abs=1e-4)  # of the 90 validation images


def test_the_printed_commands_test_the_choice_with_fresh_seeds(
    calls: list[Call], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "it's a search, (1)"
    study = search(folder, "--test-seeds", "2", "--epochs", "1")
    command, comparison = (shlex.split(line) for line in capsys.readouterr().out.splitlines()[-2:])
    assert command[:2] == ["python", "examples/hydra/train.py"]
    run_python(*command[1:], cwd=ROOT)
    assert set(results(folder / "test")) == {
        f"revbn={arm},seed={seed},trainer.max_epochs=1" for arm in ("off", "chosen") for seed in (1001, 1002)
    }
    assert not {1001, 1002} & {seed for _, seed, _ in calls}
    assert comparison == ["lightning-revbn", "compare", str(folder / "test"), "--metric", "test_acc"]
    chosen = study.best_trial.params
    # A single arm is called by its scale; its other settings are in the log.
    assert f"scale={chosen['scale']:.12g}" in compared(folder / "test")
    for file in (folder / "test").glob("revbn=chosen*/logs/hparams.yaml"):
        for name, number in chosen.items():
            assert f"revbn/{name}: {number!r}" in file.read_text()
