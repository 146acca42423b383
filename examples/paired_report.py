"""Table and picture of a paired comparison: a baseline and a revisited run per seed."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from rich.console import Console
from rich.table import Table

from lightning_revbn import paired_t_test
from lightning_revbn.compare import PairedTTest
from lightning_revbn.plots.pairs_figure import draw_pairs

SIGNIFICANT = 0.05
LEGEND_LINES = 16  # the legend of a deeper network names some layers, evenly spaced


def print_table(baseline: Sequence[float], revisited: Sequence[float], console: Console) -> None:
    """Print the accuracies of every pair, their summary, and a conclusion.

    Args:
        baseline: Test accuracies of seeds 1, 2, ..., in %.
        revisited: Test accuracies of the same seeds, in %.
        console: The console to print to.
    """
    table = Table(title="Test accuracy in %", title_justify="left")
    for heading in ("Seed", "Baseline", "Revisited", "Difference"):
        table.add_column(heading, justify="right")
    differences = [after - before for before, after in zip(baseline, revisited, strict=True)]
    for seed, (before, after, difference) in enumerate(zip(baseline, revisited, differences, strict=True), start=1):
        table.add_row(
            str(seed), f"{before:.2f}", f"{after:.2f}", f"{difference:+.2f}", end_section=seed == len(baseline)
        )
    columns = (baseline, revisited, differences)
    before, after, difference = map(statistics.fmean, columns)
    table.add_row("mean", f"{before:.2f}", f"{after:.2f}", f"{difference:+.2f}")
    if len(baseline) > 1:
        table.add_row("std. dev.", *(f"{statistics.stdev(column):.2f}" for column in columns))
    console.print()
    console.print(table)
    if len(baseline) < 2:
        console.print("One pair tells nothing about chance: take more seeds (--seeds 8).")
        return
    result = paired_t_test(revisited, baseline)
    low, high = result.confidence_interval
    console.print(
        f"Mean difference {result.mean_difference:+.2f} points, 95 % confidence interval {low:+.2f} to {high:+.2f}\n"
        f"Effect size d_z = {result.effect_size:.2f}\n"
        f"One-sided paired t-test, revisited > baseline: p = {result.p_value:.3g}\n"
        f"{conclude(result)}",
        soft_wrap=True,
    )


def conclude(result: PairedTTest) -> str:
    """Describe the result of a comparison in a sentence.

    Args:
        result: Result of the one-sided test that revisited is greater.

    Returns:
        The sentence.
    """
    points = f"{abs(result.mean_difference):.2f} points"
    if math.isnan(result.p_value):
        return f"All {result.n} differences are equal, so the test can say nothing: take more seeds or epochs."
    if result.mean_difference <= 0:
        clearly = " clearly" if result.confidence_interval[1] < 0 else ""
        return (
            f"With these settings revisited batch norm did not help: it is{clearly} {points} worse on average (a small "
            "scale learns slowly at first)."
        )
    if result.p_value > SIGNIFICANT:
        return (
            f"Revisited batch norm is {points} better on average, but {result.n} seeds cannot tell that from chance "
            f"(p > {SIGNIFICANT:g})."
        )
    return (
        f"Revisited batch norm is {points} better on average over {result.n} seeds, a gain that chance alone would "
        f"rarely give (p <= {SIGNIFICANT:g})."
    )


def print_observations(baseline_logs: Sequence[Path], revisited_logs: Sequence[Path], console: Console) -> None:
    """Print the monitor's whole-model values at its first and last event, as means over seeds.

    Args:
        baseline_logs: `metrics.csv` of every baseline run.
        revisited_logs: `metrics.csv` of every revisited run.
        console: The console to print to.
    """
    ends = [values for logs in (baseline_logs, revisited_logs) for values in _mean_first_and_last(logs)]
    table = Table(title="What batch norm did (mean over seeds)", title_justify="left")
    for heading in ("", "Baseline start", "end", "Revisited start", "end"):
        table.add_column(heading, justify="right" if heading else "left")
    for (name, key), digits in {
        ("Mean scale", "scale_mean"): 3,
        ("Scales: RMS change", "scale_drift"): 3,
        ("Shifts: RMS change", "shift_drift"): 3,
        ("Greatest |x_hat|", "normalized_absmax"): 2,
    }.items():
        table.add_row(name, *(f"{values[key]:.{digits}f}" for values in ends))
    table.add_row("|x_hat| > 3 (%)", *(f"{100 * values['normalized_over_3']:.2f}" for values in ends))
    console.print()
    console.print(table)


def _mean_first_and_last(logs: Sequence[Path]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the monitor's whole-model values at its first and last event, each a mean over logs."""
    events = [[row for row in _read(log) if row["revbn/scale_mean"]] for log in logs]
    keys = ("scale_mean", "scale_drift", "shift_drift", "normalized_absmax", "normalized_over_3")
    first, last = (
        {key: statistics.fmean(float(rows[place][f"revbn/{key}"]) for rows in events) for key in keys}
        for place in (0, -1)
    )
    return first, last


def _read(log: Path) -> list[dict[str, str]]:
    with log.open(newline="") as file:
        return list(csv.DictReader(file))


def draw_picture(
    path: Path,
    baseline: Sequence[float],
    revisited: Sequence[float],
    *,
    scale_logs: Sequence[Path],
    layers: Sequence[str],
) -> None:
    """Draw the paired accuracies, and beside them the scales of the first pair over training.

    Args:
        path: Path of the picture.
        baseline: Test accuracies of seeds 1, 2, ..., in %.
        revisited: Test accuracies of the same seeds, in %.
        scale_logs: `metrics.csv` of the first pair: baseline, revisited.
        layers: Dotted names of the batch norm layers, from the input to the output.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    grid = figure.add_gridspec(1, 3, width_ratios=(1, 1.15, 1.15))
    pairs, left = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    right = figure.add_subplot(grid[2], sharex=left, sharey=left)
    draw_pairs(pairs, baseline, revisited, "Revisited")
    pairs.set_ylabel("Test accuracy (%)")
    pairs.set_title("A line per seed, black: mean")
    for axes, arm, log in zip((left, right), ("baseline", "revisited"), scale_logs, strict=True):
        _draw_scales(axes, read_scale_means(log, layers))
        axes.set_title(f"Scales, seed 1: {arm}")
        axes.set_xlabel("Training step")
    left.set_ylabel("Mean scale of a batch norm layer")
    right.tick_params(labelleft=False)
    handles, names = left.get_legend_handles_labels()
    every = -(-len(names) // LEGEND_LINES)
    figure.legend(handles[::every], names[::every], loc="outside right center", title="Layer, by depth", frameon=False)
    figure.savefig(path, dpi=150)


def read_scale_means(log: Path, layers: Sequence[str]) -> dict[str, tuple[list[int], list[float]]]:
    """Read the mean scale of every layer over training from the file of a CSVLogger.

    Args:
        log: `metrics.csv`; each row has the values of a single logging event, and its other columns are empty.
        layers: Dotted names of the layers.

    Returns:
        Training steps and mean scales by layer.
    """
    rows = _read(log)
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for layer in layers:
        logged = [row for row in rows if row[f"revbn/{layer}/scale_mean"]]
        curves[layer] = (
            [int(row["step"]) for row in logged],
            [float(row[f"revbn/{layer}/scale_mean"]) for row in logged],
        )
    return curves


def _draw_scales(axes: Axes, curves: dict[str, tuple[list[int], list[float]]]) -> None:
    for depth, (layer, (steps, means)) in enumerate(curves.items()):
        axes.plot(
            steps,
            means,
            color=mpl.colormaps["viridis"](0.9 * depth / max(1, len(curves) - 1)),  # pale at its end
            linestyle="--" if "shortcut" in layer else "-",
            marker="o" if len(steps) < 3 else None,
            label=layer,
        )
    if all(mean > 0 for _, means in curves.values() for mean in means):
        axes.set_yscale("log")  # equal ratios are equally far apart: 0.1 to 0.2 like 1 to 2
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, min_n_ticks=1))
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
