"""The runs of a study, a directory each: finished runs are passed over, failed runs are reported at the end.

Hydra and its launchers start the runs. This module holds what they lack for a study: a run trains once, however often
the study is started, and a failed run stops no other run.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from filelock import FileLock
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

Scores: TypeAlias = dict[str, float]

RESULT = "result.json"
"""Written at the very end of a run: a run without this file is not finished."""
FAILURE = "failure.txt"
LOGS = "logs"
OVERRIDES = ".hydra/overrides.yaml"


class OtherSettingsError(RuntimeError):
    """The directory of a run holds the result of a run with other settings."""


def train_once(folder: Path, config: DictConfig, train: Callable[[DictConfig], Scores]) -> Scores:
    """Train a run, or read its result if it is finished.

    Args:
        folder: The directory of the run.
        config: The configuration of the run.
        train: Trains the run with its logs in `folder / LOGS`.

    Returns:
        The scores by name.

    Raises:
        OtherSettingsError: If the directory holds the result of other settings, such as another number of epochs in
            the configuration file.
    """
    settings = _flat(OmegaConf.to_container(config))  # paths are interpolations, which stay as they are written
    # A job of an interrupted study may still train here: on a cluster, jobs outlive the process that submitted them.
    with FileLock(folder / "run.lock"):
        (folder / FAILURE).unlink(missing_ok=True)
        if (folder / RESULT).exists():
            finished = json.loads((folder / RESULT).read_text())
            before: dict[str, Any] = finished["settings"]
            differ = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
            if differ:
                changes = ", ".join(f"{key}={before.get(key)}, now {settings.get(key)}" for key in differ[:3])
                raise OtherSettingsError(
                    f"{folder} holds a finished run with other settings ({changes}): delete the directory, or name "
                    "another directory for the study by hydra.sweep.dir"
                )
            print(f"{folder.name} is finished and passed over")
            return finished["scores"]
        shutil.rmtree(folder / LOGS, ignore_errors=True)  # of a run that was interrupted, or failed
        scores = train(config)
        unfinished = folder / f"{RESULT}.part"
        unfinished.write_text(json.dumps({"scores": scores, "settings": settings}, indent=1))
        unfinished.replace(folder / RESULT)
        return scores


def record_failure(folder: Path, error: BaseException) -> None:
    """Write the file that marks a run as failed: a line with the error's cause, then the traceback.

    Args:
        folder: The directory of the run.
        error: The error that ended the run.
    """
    cause = error
    while cause.__cause__ is not None:  # Hydra raises an error of its own around an error in a constructor
        cause = cause.__cause__
    reason = " ".join([type(cause).__name__ + ":", *str(cause).splitlines()[:1]])
    (folder / FAILURE).write_text(f"{reason}\n\n{''.join(traceback.format_exception(error))}")
    print(f"{folder.name} failed: {reason}", file=sys.stderr)


class Report(Callback):
    """Ends a study: says how many runs are finished, and exits with an error if a run failed."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Make the directory of the study absolute: jobs of a cluster start in another directory.

        Args:
            config: The configuration of the study.
            kwargs: More that Hydra passes.
        """
        study = str(Path(config.hydra.sweep.dir).absolute())
        overrides = config.hydra.overrides.hydra  # from these, Hydra composes the configuration of each job
        overrides[:] = [word for word in overrides if not word.startswith("hydra.sweep.dir=")]
        quoted = study.replace("'", "\\'")  # a path may hold what means something to Hydra, such as a comma
        overrides.append(f"hydra.sweep.dir='{quoted}'")
        config.hydra.sweep.dir = study

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the report.

        Args:
            config: The configuration of the study.
            kwargs: More that Hydra passes.
        """
        study = Path(config.hydra.sweep.dir)
        failed = sorted(path.parent for path in study.rglob(FAILURE))
        finished = {path.parent for path in study.rglob(RESULT)} - {*failed}
        line = f"Study {study}: {len(finished)} runs finished, {len(failed)} failed."
        if not failed and not finished:
            sys.exit(f"{line} No run has written into this directory: do the jobs see the same file system?")
        if not failed:
            print(line)
            return
        reasons = [f"  {run.relative_to(study)}: {(run / FAILURE).read_text().splitlines()[0]}" for run in failed]
        called = [word for word in sys.argv[1:] if word not in config.hydra.overrides.task]
        commands = [f"  {command}" for command in _commands(failed, ["python", sys.argv[0], *called])]
        remedy = "These commands run only the failed runs:" if commands else "Start the study again to run only these."
        sys.exit("\n".join([line, *reasons, remedy, *commands]))


def _commands(runs: list[Path], call: list[str]) -> list[str]:
    """Return a command for all seeds of the same other overrides, so that no command adds a run to the study.

    With `hydra.output_subdir=null`, Hydra does not write down the overrides of a run, and there are no commands.
    """
    if not all((run / OVERRIDES).exists() for run in runs):
        return []
    seeds: dict[tuple[str, ...], list[str]] = {}
    commands: list[list[str]] = []
    for run in runs:
        overrides: list[str] = list(OmegaConf.load(run / OVERRIDES))
        others = [word for word in overrides if not word.startswith("seed=")]
        if others == overrides:
            commands.append([*call, *others])
        else:
            seeds.setdefault(tuple(others), []).extend(word[len("seed=") :] for word in overrides if word not in others)
    # By length first, because 10 comes after 9, and a seed may be null.
    ordered = {others: sorted(numbers, key=lambda number: (len(number), number)) for others, numbers in seeds.items()}
    grouped = [[*call, *others, f"seed={','.join(numbers)}"] for others, numbers in ordered.items()]
    return [shlex.join(command) for command in [*grouped, *commands]]


def _flat(settings: Any, name: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by their dotted names."""
    if not isinstance(settings, dict) or not settings:
        return {name: settings}
    parts = [_flat(value, f"{name}.{part}".lstrip(".")) for part, value in settings.items()]
    return {key: value for part in parts for key, value in part.items()}
