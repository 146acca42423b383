from __future__ import annotations

import errno
import math
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.arms import BASELINE, BETTER, end_early, remove_seed, write_arm
from helpers.logs import write_csv, write_events
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf

from lightning_revbn.runs.finished_runs import Wanted, by_seed, check_pairs, read_finished
from lightning_revbn.runs.logs import find_logs
from lightning_revbn.runs.scalars import LogError


def scores(folder: Path, seed_pattern: str | None = None) -> dict[int, float]:
    pattern = None if seed_pattern is None else re.compile(seed_pattern)
    runs = by_seed(read_finished(find_logs([folder]), Wanted("test_acc", seed_pattern=pattern), lambda size: None))
    return {seed: run.score for seed, run in runs.items()}


def read_pairs(baseline: Path, proposed: Path) -> None:
    arms = [
        by_seed(read_finished(find_logs([folder]), Wanted("test_acc"), lambda size: None))
        for folder in (baseline, proposed)
    ]
    check_pairs(*arms, proposed.name, any_length=False)


def test_event_files_and_seeds_of_hyperparameters_are_read(tmp_path: Path) -> None:
    for index, score in enumerate(BASELINE):
        write_events(tmp_path / "events" / f"version_{index}", [(20, {"loss": 1.0, "test_acc": score})])
        (tmp_path / "events" / f"version_{index}" / "hparams.yaml").write_text(f"lr: 0.1\nseed: {index + 1}\n")
        logger = CSVLogger(tmp_path / "tables", name="", version=9 - index)  # in another order
        logger.log_hyperparams({"model": {"seed": index + 1}, "lr": 0.1})
        logger.log_metrics({"loss": 1.0, "test_acc": BETTER[index]}, step=20)
        logger.save()
    assert scores(tmp_path / "tables") == dict(enumerate(BETTER, start=1))
    read = scores(tmp_path / "events")
    assert list(read) == [1, 2, 3, 4, 5, 6]
    assert list(read.values()) == pytest.approx(BASELINE, rel=1e-6)  # event files hold float32


def test_a_pattern_finds_seeds_in_paths(tmp_path: Path) -> None:
    for index, score in enumerate(BASELINE):
        write_csv(tmp_path / f"run{index}-seed7", [(20, {"test_acc": score})])
    with pytest.raises(LogError, match="seed 7 has two runs"):
        scores(tmp_path)
    assert scores(tmp_path, r"run(\d+)") == dict(enumerate(BASELINE))


def end_in_nan(folder: Path) -> None:
    write_csv(folder / "seed_03", [(20, {"test_acc": math.nan})])


def never_test(folder: Path) -> None:
    write_csv(folder / "seed_03", [(20, {"test_loss": 0.9})])


def run_twice(folder: Path) -> None:
    write_csv(folder / "again" / "seed_3", [(20, {"test_acc": 0.9})])


def lose_the_seed(folder: Path) -> None:
    write_csv(folder / "third", [(20, {"test_acc": 0.9})])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_seed, "seed 3 of baseline has no partner in b"),
        (end_in_nan, "seed_03 ends with test_acc=nan: a run that failed has no score to compare"),
        (end_early, "seed_03 ends at step 10, the longest run at 20: is it unfinished? If runs stop by themselves"),
        (never_test, "seed_03 has no test_acc: unfinished, or logged by another name; it has test_loss"),
        (run_twice, "seed 3 has two runs"),
        (
            lose_the_seed,
            r"has no 'seed_N'. Name it by --seed-pattern, such as 'run_(\d+)'; in further runs BatchNormMonitor() logs",
        ),
    ],
)
def test_runs_that_are_no_pairs_are_refused_in_one_line(damage: Any, message: str, tmp_path: Path) -> None:
    arms = write_arm(tmp_path / "a", BASELINE), write_arm(tmp_path / "b", BETTER)
    damage(arms[1])
    with pytest.raises(LogError) as error:
        read_pairs(*arms)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def seed_of(folder: Path, hparams: str) -> int:
    write_csv(folder, [(20, {"test_acc": 0.9})])
    (folder / "hparams.yaml").write_text(hparams)
    return next(iter(scores(folder)))


@pytest.mark.parametrize(
    ("hparams", "seed"),
    [
        ("seed: 4\nrevbn/seed: 5\n", 4),  # the user's own word
        ("data:\n  seed: 0\nrevbn/seed: 5\n", 5),  # of the data alone
        ("data:\n  seed: 6\n", 6),
        ("seed_everything: 7\n", 7),
        ("!!python/object:os.system {a: 1}\n", 3),  # nothing is made of it
        ("a: [\n", 3),
        ("seed: true\n", 3),
    ],
)
def test_the_seed_is_the_users_own_or_that_of_seed_everything_or_that_of_the_path(
    hparams: str, seed: int, tmp_path: Path
) -> None:
    assert seed_of(tmp_path / "seed_3", hparams) == seed


@pytest.mark.parametrize(
    ("overrides", "hparams", "seed"),
    [
        (["revbn=off", "seed=4"], "lr: 0.1\n", 4),
        (["+seed=4", "data.seed=0"], "revbn/seed: 5\n", 4),  # the script may derive its seed from this seed
        (["seed_everything=4"], "data:\n  seed: 0\n", 4),
        (["seed=4"], "seed: 6\n", 6),  # the script has logged its seed
        (["data.seed=4"], "revbn/seed: 5\n", 5),  # of the data alone
        (["model.lr=4", "seed=fixed"], "lr: 0.1\n", 3),
    ],
)
@pytest.mark.parametrize("below", ["", "logs", "lightning_logs/net/version_0"])
def test_the_seed_of_a_hydra_job_is_that_of_its_overrides(
    overrides: list[str], hparams: str, seed: int, below: str, tmp_path: Path
) -> None:
    job = tmp_path / "seed_3"
    (job / ".hydra").mkdir(parents=True)
    (job / ".hydra" / "overrides.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(overrides)))
    assert seed_of(job / below, hparams) == seed


def test_overrides_that_cannot_be_read_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv(tmp_path / "logs", [(20, {"test_acc": 0.9})])
    file = tmp_path / ".hydra" / "overrides.yaml"
    file.parent.mkdir()
    file.write_text("- seed=1\n")
    opened = Path.open

    def deny(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == file:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", deny)  # root may read every file
    with pytest.raises(LogError, match=r"overrides\.yaml cannot be read: Permission denied"):
        scores(tmp_path)


def test_two_runs_of_a_seed_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    for name, rate in (("a", 0.1), ("b", 0.2)):
        seed_of(tmp_path / name, f"seed: 1\nlr: {rate}\n")
    with pytest.raises(LogError, match=r"seed 1 has two runs, .*, which differ in lr: name the run that counts"):
        scores(tmp_path)


def test_a_seed_of_thousands_of_digits_is_refused(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "run", [(20, {"test_acc": 0.9})])
    (file.parent / "hparams.yaml").write_text(f"seed: {'7' * 4301}\n")
    with pytest.raises(LogError, match=r"the seed in .* has 4,301 digits: name it by --seed-pattern"):
        scores(tmp_path)
    (file.parent / "hparams.yaml").write_text(f"seed: {'7' * 4300}\n")
    assert list(scores(tmp_path)) == [int("7" * 4300)]


def test_a_group_that_matches_nothing_is_no_seed(tmp_path: Path) -> None:
    write_csv(tmp_path / "seed_1", [(20, {"test_acc": 0.9})])
    with pytest.raises(LogError, match=r"finds no number in .*: nothing"):
        scores(tmp_path, "(x)?seed")


@pytest.mark.parametrize("score", [1e308, -1e308, 1e151])
def test_a_score_whose_square_is_no_number_is_refused(score: float, tmp_path: Path) -> None:
    write_csv(tmp_path / "seed_1", [(20, {"test_acc": score})])
    with pytest.raises(LogError, match=r"ends with test_acc=.*: too large to compare, a run that diverged"):
        scores(tmp_path)
