"""Draws the differences of arms to their baseline over training, with a band over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from cells import read_runs
from curves import read_curves
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

SHOWN = {
    "scale_0.25": "tab:blue",
    "scale_0.1": "tab:red",
    "eps_0.001": "tab:green",
    "shifts_x10": "tab:orange",
    "eps_0.001_shifts_x10": "tab:purple",
}
"""The drawn arms, which most grids have, and their colours."""

FIGURES = {"digits": ("digits", "digits_torch"), "mnist1d": ("mnist1d_20", "mnist1d_100"), "fashion-mnist": None}
"""Grids by name of the figure; None takes all grids whose names start with the figure's name."""


def draw_gains(folder: Path, grids: Sequence[str]) -> list[Path]:
    """Draw a figure for each data set: a panel for each grid, differences of test accuracy over steps.

    Args:
        folder: Directory of the CSV files, where the figures are written too.
        grids: The grids that were run.

    Returns:
        The paths of the figures.
    """
    written: list[Path] = []
    for name, members in FIGURES.items():
        found = [grid for grid in grids if (grid.startswith(name) if members is None else grid in members)]
        if found:
            columns = min(len(found), 4)
            figure = Figure(figsize=(2 + 3.4 * columns, 3.6 * math.ceil(len(found) / columns)), layout="constrained")
            panels = figure.subplots(math.ceil(len(found) / columns), columns, squeeze=False).flatten()
            for panel in panels[len(found) :]:
                panel.set_visible(False)
            for panel, grid in zip(panels, found, strict=False):
                _draw(panel, folder, grid)
            panels[0].set_ylabel("Arm - baseline on test data (points)", fontsize="medium")
            lines = {line.get_label(): line for panel in panels for line in panel.get_lines() if line.get_gid()}
            figure.legend(
                lines.values(),
                lines.keys(),
                loc="outside lower center",
                ncols=3 if columns == 1 else len(SHOWN),
                frameon=False,
            )
            written.append(_save(figure, folder / f"{name}.png"))
    return written


def _draw(panel: Axes, folder: Path, grid: str) -> None:
    curves = read_curves(folder / f"{grid}_curves.csv")
    seeds = len({row["seed"] for row in read_runs(folder / f"{grid}.csv")})
    half = float(stats.t(df=seeds - 1).ppf(0.975)) / math.sqrt(seeds)
    for arm, colour in SHOWN.items():
        if arm in curves:
            curve = curves[arm]
            low, high = (
                [g + sign * half * s for g, s in zip(curve.gain, curve.gain_std, strict=True)] for sign in (-1, 1)
            )
            panel.fill_between(curve.steps, low, high, color=colour, alpha=0.18, linewidth=0)
            panel.plot(curve.steps, curve.gain, color=colour, linewidth=1.2, label=arm.replace("_", " "), gid=arm)
    panel.axhline(0, color="black", linewidth=0.8)
    # symlog shows both losses of 80 points at the start and gains of half a point at the end.
    panel.set_yscale("symlog", linthresh=1, linscale=1.5)
    panel.set_yticks((ticks := (-50, -10, -3, -1, -0.5, 0, 0.5, 1)), [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
    panel.set_title(grid.replace("_", " "), fontsize="medium")
    panel.set_xlabel("Training step")
    panel.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> Path:
    picture = BytesIO()
    figure.savefig(picture, dpi=100)
    Image.open(picture).convert("RGB").quantize(64).save(path, optimize=True)
    return path
