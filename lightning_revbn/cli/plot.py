"""`lightning-revbn plot`: draws the scales and shifts of batch norm layers over training, for one or more runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_revbn.cli.figure_file import PlotError, check_output, matplotlib_needed, save_figure
from lightning_revbn.cli.terminal import progress_bar, say, tell
from lightning_revbn.core.arguments import UnmatchedPatternError, check_patterns_match, matching_names
from lightning_revbn.runs.batch_norm_runs import Run, read_runs
from lightning_revbn.runs.logs import Log, find_logs
from lightning_revbn.runs.names import one_line

__all__ = ["add_parser"]

_MOST_RUNS = 8


def add_parser(commands: Any) -> None:
    """Add the command to a parser.

    Args:
        commands: The result of `add_subparsers`.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        "plot",
        help="draw how scales and shifts went while training",
        description="Draw what BatchNormMonitor logged with CSVLogger, TensorBoardLogger, WandbLogger (offline) or "
        "MLFlowLogger (a local store): the mean scale and shift of every batch norm layer over training, their drift "
        "from the start, and the normalised activations where they were logged. Runs are drawn side by side on the "
        "same axes; deep networks as heat maps.",
    )
    parser.add_argument(
        "logs",
        nargs="+",
        type=Path,
        metavar="LOGDIR",
        help="a run's directory or the file of its logger; or a directory above several runs",
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
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
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
    # Both checks come before the logs are read, which may take long.
    check_output(output)
    with matplotlib_needed():
        from lightning_revbn.plots import layer_rows, layers_figure
    logs = find_logs(arguments.logs)
    if len(logs) > _MOST_RUNS:
        raise PlotError(
            f"{len(logs)} runs were found, and side by side no more can be read than {_MOST_RUNS}: name those"
        )
    runs, warnings = _read_runs(logs, arguments.prefix)
    if arguments.labels:
        runs = _label_runs(runs, arguments.labels)
    if arguments.layers:
        runs = _choose_layers(runs, arguments.layers)
    if not layer_rows.logged_rows(runs):
        raise PlotError(f"nothing to draw: no layer has any of {', '.join(row.quantity for row in layer_rows.ROWS)}")
    warnings += [text for text in map(layer_rows.gaps, runs) if text]
    save_figure(layers_figure.draw(runs, arguments.style), output)
    for warning in warnings:
        tell(warning)
    say(f"Figure: {output} ({_summary(runs)})")
    return 0


def _read_runs(logs: Sequence[Log], prefix: str | None) -> tuple[list[Run], list[str]]:
    # Several runs take long to read, so the bar shows at once.
    with progress_bar("Reading logs", sum(log.size for log in logs), wait=0 if len(logs) > 1 else 1) as advance:
        return read_runs(logs, prefix, advance)


def _label_runs(runs: Sequence[Run], labels: Sequence[str]) -> list[Run]:
    """Name the runs.

    Args:
        runs: The runs.
        labels: A name for each run.

    Returns:
        The runs with their names.

    Raises:
        PlotError: If the numbers of names and runs differ.
    """
    if len(labels) != len(runs):
        found = ", ".join(one_line(run.label) for run in runs)
        raise PlotError(f"--labels has {len(labels)} names for {len(runs)} runs: {found}")
    return [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]


def _choose_layers(runs: Sequence[Run], patterns: Sequence[str]) -> list[Run]:
    """Keep the layers that match a pattern.

    Args:
        runs: The runs.
        patterns: As in `RevisitedBatchNorm(include=...)`.

    Returns:
        The runs with these layers.

    Raises:
        PlotError: If a pattern matches no layer of any run, no pattern matches a layer of some run, or a run logged
            only the whole model.
    """
    for run in runs:
        if run.whole_model:
            raise PlotError(f"--layers: {one_line(run.label)} logged the whole model only (per_layer=False)")
    names = list(dict.fromkeys(layer for run in runs for layer in run.layers))
    try:
        check_patterns_match("--layers", patterns, names)
    except UnmatchedPatternError as error:
        raise PlotError(str(error)) from error
    matching = matching_names(patterns, names)
    chosen = [[layer for layer in run.layers if layer in matching] for run in runs]
    for run, layers in zip(runs, chosen, strict=True):
        if not layers:
            raise PlotError(f"--layers: no pattern matches a layer of {one_line(run.label)}")
    return [replace(run, layers=tuple(layers)) for run, layers in zip(runs, chosen, strict=True)]


def _summary(runs: Sequence[Run]) -> str:
    """Count the runs and layers of a figure.

    Args:
        runs: The drawn runs.

    Returns:
        A text such as "2 runs, 20 layers".
    """
    counts = sorted({0 if run.whole_model else len(run.layers) for run in runs})
    layers = " and ".join("the whole model" if not count else f"{count} layer{'s' * (count > 1)}" for count in counts)
    return f"{len(runs)} run{'s' * (len(runs) > 1)}, {layers}"
