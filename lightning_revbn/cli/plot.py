"""`lightning-revbn plot`: a figure of how the scales and shifts of batch norm layers went in one run or several."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any

from lightning_revbn.core.arguments import UnmatchedPatternError, check_patterns_match
from lightning_revbn.runs.logs import (
    Advance,
    Log,
    LogError,
    Run,
    batch_norm_run,
    find_logs,
    one_line,
    progress_bar,
    read_scalars,
)

MOST_RUNS = 8
SUFFIXES = (".png", ".svg", ".pdf")


class PlotError(Exception):
    """A figure that cannot be drawn as asked; the message is one line and says why."""


def add_parser(commands: Any) -> None:
    """Add the command to a parser.

    Args:
        commands: What `add_subparsers` returned.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        "plot",
        help="draw how scales and shifts went while training",
        description="Draw what BatchNormMonitor logged with Lightning's CSVLogger or TensorBoardLogger: the mean scale "
        "and shift of every batch norm layer over training, their drift from the start, and the normalised activations "
        "where they were logged. Runs are drawn side by side on the same axes; deep networks as heat maps.",
    )
    parser.add_argument(
        "logs",
        nargs="+",
        type=Path,
        metavar="LOGDIR",
        help="a run's directory, its metrics.csv or its event file; or a directory above several runs",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("batch_norms.png"),
        metavar="FILE",
        help="a .png, .svg or .pdf file (default: %(default)s)",
    )
    parser.add_argument(
        "--labels", nargs="+", metavar="NAME", help="what to call the runs (default: their paths' ends)"
    )
    parser.add_argument(
        "--layers", nargs="+", metavar="PATTERN", help="draw only layers that match one of these, such as '*.bn1'"
    )
    parser.add_argument("--prefix", help="the monitor's prefix (default: revbn, or what the keys tell)")
    parser.add_argument(
        "--style",
        choices=("auto", "lines", "heatmap"),
        default="auto",
        help="a line or a row of a heat map for each layer (default: lines up to 24 layers)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Draw the figure.

    Args:
        arguments: The command line.

    Returns:
        The exit code.

    Raises:
        LogError: If the logs cannot be read.
        PlotError: If the figure cannot be drawn or written.
    """
    output: Path = arguments.output
    check_output(output)
    figure = _figure_module()
    logs = find_logs(arguments.logs)
    if len(logs) > MOST_RUNS:
        raise PlotError(
            f"{len(logs)} runs were found, and side by side no more can be read than {MOST_RUNS}: name those"
        )
    runs, warnings = read_runs(logs, arguments.prefix)
    if arguments.labels:
        runs = label_runs(runs, arguments.labels)
    if arguments.layers:
        runs = choose_layers(runs, arguments.layers)
    if not figure.logged_rows(runs):
        raise PlotError(f"nothing to draw: no layer has one of {', '.join(row.quantity for row in figure.ROWS)}")
    warnings += [text for text in map(figure.gaps, runs) if text]
    try:
        figure.save(figure.draw(runs, arguments.style), output)
    except OSError as error:
        raise PlotError(f"{one_line(output)} cannot be written: {error.strerror or error}") from error
    for warning in warnings:
        print(f"lightning-revbn: {warning}", file=sys.stderr)  # noqa: T201
    print(f"Figure: {output} ({summary(runs)})")  # noqa: T201
    return 0


def check_output(path: Path) -> None:
    """Refuse a file that cannot be written before the work is done.

    Args:
        path: Of the figure.

    Raises:
        PlotError: If it is none of the known kinds, or its directory does not exist.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise PlotError(f"{one_line(path)} must end in one of {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise PlotError(f"{one_line(path)} cannot be written: there is no directory {one_line(path.parent)}")
    if path.is_dir():
        raise PlotError(f"{one_line(path)} cannot be written: it is a directory")


def read_runs(logs: Sequence[Log], prefix: str | None = None) -> tuple[list[Run], list[str]]:
    """Read the runs; those below a directory that hold nothing to draw are left out.

    Args:
        logs: Where they are.
        prefix: The monitor's; None looks for it.

    Returns:
        The runs, and warnings.

    Raises:
        LogError: If a run that was named cannot be drawn, or none can.
    """
    sizes = [log.size for log in logs]
    labels = suffixes([log.path for log in logs])
    with progress_bar("Reading logs", sum(sizes), wait=0 if len(logs) > 1 else 1) as advance:
        read = [_read(log, label, prefix, advance) for log, label in zip(logs, labels, strict=True)]
    runs = [run for run, _ in read if run is not None]
    if not runs:
        raise LogError(read[0][1][0])
    left_out = [f"left out: {warning}" for run, warnings in read if run is None for warning in warnings]
    return runs, [*left_out, *(warning for run, warnings in read if run is not None for warning in warnings)]


def suffixes(paths: Sequence[Path]) -> list[str]:
    """Name paths by their ends.

    Args:
        paths: All different.

    Returns:
        As many of the last parts of each as it takes to tell them apart.

    Example:
        >>> suffixes([Path("/logs/baseline/version_0"), Path("/logs/revisited/version_0")])
        ['baseline/version_0', 'revisited/version_0']
    """
    parts = [(path.resolve() if ".." in path.parts else path.absolute()).parts for path in paths]
    longest = max(map(len, parts))
    names = [["/".join(part[-count:]) for part in parts] for count in range(1, longest + 1)]
    return next((ends for ends in names if len(set(ends)) == len(ends)), names[-1])


def label_runs(runs: Sequence[Run], labels: Sequence[str]) -> list[Run]:
    """Name the runs.

    Args:
        runs: The runs.
        labels: As many names.

    Returns:
        The runs with their names.

    Raises:
        PlotError: If there are more or fewer.
    """
    if len(labels) != len(runs):
        found = ", ".join(one_line(run.label) for run in runs)
        raise PlotError(f"--labels has {len(labels)} names for {len(runs)} runs: {found}")
    return [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]


def choose_layers(runs: Sequence[Run], patterns: Sequence[str]) -> list[Run]:
    """Keep the layers that match a pattern.

    Args:
        runs: The runs.
        patterns: As in `RevisitedBatchNorm(include=...)`.

    Returns:
        The runs with these layers.

    Raises:
        PlotError: If a pattern matches no layer of any run, or no pattern a layer of some run.
    """
    for run in runs:
        if run.whole_model:
            raise PlotError(f"--layers: {one_line(run.label)} logged the whole model only (per_layer=False)")
    names = list(dict.fromkeys(layer for run in runs for layer in run.layers))
    try:
        check_patterns_match("--layers", patterns, names)
    except UnmatchedPatternError as error:
        raise PlotError(str(error)) from error
    chosen = [[layer for layer in run.layers if any(fnmatchcase(layer, p) for p in patterns)] for run in runs]
    for run, layers in zip(runs, chosen, strict=True):
        if not layers:
            raise PlotError(f"--layers: no pattern matches a layer of {one_line(run.label)}")
    return [replace(run, layers=tuple(layers)) for run, layers in zip(runs, chosen, strict=True)]


def summary(runs: Sequence[Run]) -> str:
    """Say how much is in a figure.

    Args:
        runs: What was drawn.

    Returns:
        For example "2 runs, 20 layers".
    """
    counts = sorted({0 if run.whole_model else len(run.layers) for run in runs})
    layers = " and ".join("the whole model" if not count else f"{count} layer{'s' * (count > 1)}" for count in counts)
    return f"{len(runs)} run{'s' * (len(runs) > 1)}, {layers}"


def _read(log: Log, label: str, prefix: str | None, advance: Advance) -> tuple[Run | None, tuple[str, ...]]:
    """Return a run and warnings; of one that was not named and cannot be drawn, no run and why."""
    try:
        scalars = read_scalars(log, advance)
        return batch_norm_run(label, scalars, prefix), scalars.warnings
    except LogError as error:
        if log.named:
            raise
        return None, (str(error),)


def _figure_module() -> ModuleType:
    try:
        from lightning_revbn.plots import layers_figure as figure
    except ImportError as error:
        raise PlotError('figures need matplotlib: pip install "lightning-revbn[plots]"') from error
    return figure
