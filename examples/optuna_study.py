"""Chooses scale, scale_lr_divisor and shift_lr_multiplier on validation data with Optuna, and never looks at test data.

`python examples/optuna_study.py --help` has the options. A trial trains a network for every seed and its value is their
mean validation accuracy. The script ends with the commands that test the chosen setting once, on test data, against the
baseline, with seeds that chose nothing. A search that is started again goes on where it was; one process runs it.
"""

from __future__ import annotations

import argparse
import re
import shlex
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import lightning as L
import optuna
from digits import build, prepare_process
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import MaxTrialsCallback
from optuna.trial import FrozenTrial, Trial, TrialState

from lightning_revbn import RevisitedBatchNorm

Settings: TypeAlias = dict[str, float]

PAPER: Settings = {"scale": 0.1, "scale_lr_divisor": 100.0, "shift_lr_multiplier": 1.0}
TEST_SEEDS = 1000
"""The fresh seeds of the test begin after this number: no choice has seen them."""
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Search:
    """What is fixed before the first trial.

    Attributes:
        seeds: Seeds that every trial trains with: 1 to this number.
        epochs: Epochs of every training, in the search and in the test.
    """

    seeds: int
    epochs: int


def main(arguments: list[str] | None = None) -> None:
    """Search, and print the chosen setting and the commands that test it."""
    parser = argparse.ArgumentParser(description="Chooses settings of RevisitedBatchNorm on validation data.")
    parser.add_argument("--trials", type=int, default=30, metavar="N", help="settings to try (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds of a trial (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=100, metavar="N", help="epochs of a run (default: %(default)s)")
    parser.add_argument(
        "--test-seeds", type=int, default=15, metavar="N", help="fresh seeds of the test (default: %(default)s)"
    )
    parser.add_argument(
        "--output-dir", type=Path, default=Path("optuna_output"), metavar="DIR", help="(default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    for name in ("trials", "seeds", "epochs", "test_seeds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.seeds > TEST_SEEDS:
        parser.error(f"--seeds must be at most {TEST_SEEDS}: the seeds above are for the test")
    folder: Path = options.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    search = Search(options.seeds, options.epochs)
    try:
        study = open_study(folder / "optuna.log", search)
    except ValueError as error:
        parser.error(str(error))
    prepare_process()
    run_search(study, search, options.trials)
    best = study.best_trial
    write_choice(folder / "conf" / "revbn" / "chosen.yaml", best)
    stopped = len(study.get_trials(states=[TrialState.PRUNED]))
    print(f"\n{len(study.get_trials(states=ENDED))} settings tried on validation data, {stopped} of them stopped early")
    print(f"Chosen, with a mean validation accuracy of {100 * best.value:.2f} % over {search.seeds} seeds:")
    print(*(f"  {name}: {value:.4g}" for name, value in best.params.items()), sep="\n")
    print(f"Test this choice once, against the baseline, with {options.test_seeds} seeds that chose nothing:")
    print(*commands_of_test(folder, search, options.test_seeds), sep="\n")


def open_study(journal: Path, search: Search) -> optuna.Study:
    """Open a search, or begin it with the paper's setting.

    Args:
        journal: The file that holds all trials.
        search: What is fixed for all trials.

    Returns:
        The study.

    Raises:
        ValueError: If the file holds a search with other seeds or epochs, whose values cannot be compared.
    """
    study = optuna.create_study(
        study_name="revbn",
        storage=JournalStorage(JournalFileBackend(str(journal))),
        direction="maximize",
        load_if_exists=True,
        # A trial stops if its mean so far is below the median of the others after the same seeds. A single seed is too
        # noisy to stop at, so that the second seed is the first to be judged.
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2),
    )
    held = study.user_attrs.get("search")
    if held is None:
        study.set_user_attr("search", asdict(search))
        study.enqueue_trial(PAPER)
    elif held != asdict(search):
        raise ValueError(f"{journal} holds a search with {held}, not {asdict(search)}: name another --output-dir")
    try_again(study)
    # A sampler that started with the same seed again would try the same settings again.
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))
    return study


def try_again(study: optuna.Study) -> None:
    """Plan the settings again whose trials were interrupted or failed.

    Args:
        study: The study, before this process runs a trial.
    """
    for trial in study.get_trials(states=[TrialState.RUNNING]):  # of a process that was killed
        study.tell(trial.number, state=TrialState.FAIL)
    settled = [trial.params for trial in study.get_trials(states=ENDED)]
    for trial in study.get_trials(states=[TrialState.FAIL]):
        if trial.params and trial.params not in settled:
            study.enqueue_trial(trial.params)
            settled.append(trial.params)


def run_search(study: optuna.Study, search: Search, trials: int) -> None:
    """Run trials until the study has enough.

    Args:
        study: The study.
        search: What is fixed for all trials.
        trials: Trials that the study shall have in the end, stopped trials included.
    """
    if len(study.get_trials(states=ENDED)) < trials:
        study.optimize(lambda trial: value(trial, search), callbacks=[MaxTrialsCallback(trials, states=ENDED)])


def value(trial: Trial, search: Search) -> float:
    """Return the mean validation accuracy of a trial's setting over the seeds.

    Raises:
        TrialPruned: If the mean of the first seeds is too low to go on.
    """
    settings: Settings = {
        "scale": trial.suggest_float("scale", 0.05, 1.0, log=True),
        "scale_lr_divisor": trial.suggest_float("scale_lr_divisor", 1.0, 1000.0, log=True),
        "shift_lr_multiplier": trial.suggest_float("shift_lr_multiplier", 1.0, 30.0, log=True),
    }
    accuracies: list[float] = []
    for seed in range(1, search.seeds + 1):
        accuracies.append(validate(settings, seed, search.epochs))
        trial.report(statistics.fmean(accuracies), step=seed)
        # All trials train the same seeds in the same order, so that the pruner compares equals with equals.
        if seed < search.seeds and trial.should_prune():
            raise optuna.TrialPruned
    return statistics.fmean(accuracies)


def validate(settings: Settings, seed: int, epochs: int) -> float:
    """Train a network and return its accuracy on the validation images after the last epoch."""
    network, digits = build(seed)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[RevisitedBatchNorm(**settings, monitor=False)],
        logger=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(network, digits)
    return trainer.callback_metrics["val_acc"].item()


def write_choice(file: Path, best: FrozenTrial) -> None:
    """Write the chosen setting as a Hydra group file for `examples/hydra/train.py`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ["defaults: [default, _self_]", *(f"{name}: {value!r}" for name, value in best.params.items())]
    file.write_text("\n".join([*lines, ""]))


def commands_of_test(folder: Path, search: Search, seeds: int) -> list[str]:
    """Return the commands that test the choice once."""
    conf, runs = str((folder / "conf").resolve()), str(folder / "test")
    fresh = f"seed=range({TEST_SEEDS + 1},{TEST_SEEDS + seeds + 1})"
    quoted = "'{}'".format(runs.replace("'", "\\'"))  # a path may hold what means something to Hydra, such as a comma
    directory = runs if re.fullmatch(r"[\w./+-]+", runs) else quoted
    train = ["python", "examples/hydra/train.py", "--config-dir", conf, "-m", "revbn=off,chosen", fresh]
    train += [f"trainer.max_epochs={search.epochs}", f"hydra.sweep.dir={directory}"]
    compare = ["lightning-revbn", "compare", runs, "--metric", "test_acc"]
    return [f"  {shlex.join(command)}" for command in (train, compare)]


if __name__ == "__main__":
    main()
