"""The text that `inspect` prints: a table of layers, and below it the facts about a checkpoint's run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_revbn.cli.layer_values import SHOWN
from lightning_revbn.cli.saved_run import OUTCOMES, SavedRun
from lightning_revbn.cli.terminal import say, show_table
from lightning_revbn.core.metric_keys import AFFINE_KINDS
from lightning_revbn.core.printable import shortened

__all__ = ["show_layers", "tell_run"]

_TORCH_EPS = 1e-5
_MOST_CHANNELS = 4  # up to this number, every mean and standard deviation is listed
_SPARE = (
    ("Shift min", "Shift max"),
    ("Scale min", "Scale max"),
    ("Shift std",),
    ("Scale std",),
    ("Type",),
    ("Channels",),
    ("Shift",),
    ("Shift drift",),
)
"""Columns that a narrow terminal leaves out, starting with the first group."""


def show_layers(layers: Sequence[Mapping[str, Any]], target: str) -> None:
    """Print a row for each layer, and the number of layers with each verdict.

    Args:
        layers: The layers as `lightning_revbn.cli.layer_values` describes them. `"run"` of a layer tells how a
            checkpoint's run treated it, or is None.
        target: The target as the user named it.
    """
    columns = _columns(layers)
    counted = Counter(_verdict(layer) for layer in layers)
    parts = ", ".join(f"{count} {what}" for what, count in counted.items())
    summary = f"{target}: {len(layers)} batch norm layers" + (f" ({parts})" if parts else "")
    names = [*columns]
    spare = [[names.index(name) for name in group if name in columns] for group in _SPARE]
    show_table(names, [*zip(*columns.values(), strict=True)], summary, spare)


def tell_run(run: SavedRun, layers: Sequence[Mapping[str, Any]], drifts: Mapping[str, float | None]) -> None:
    """Print the facts that a checkpoint holds about its run.

    Args:
        run: The run.
        layers: The layers, as in `show_layers`.
        drifts: Distance of all scales and of all shifts from their start, by kind.
    """
    outcomes = dict.fromkeys(layer["run"]["outcome"] for layer in layers if layer["run"])
    for outcome in outcomes:
        say(f"{outcome.capitalize()}: {OUTCOMES[outcome]}")
    when = [f"{name} {number}" for name, number in (("epoch", run.epoch), ("step", run.step)) if number is not None]
    if when:
        say(f"Saved in {', '.join(when)} (epochs count from 0)")
    for settings in run.settings:
        values = (f"{name}={shortened(repr(value), 60)}" for name, value in settings.items())
        say(f"RevisitedBatchNorm({', '.join(values)})")
    if not run.settings:
        say("No RevisitedBatchNorm has left its state here: a baseline, a callback switched off, or weights alone")
    known = [f"{kind}s {_number(drift)}" for kind, drift in drifts.items() if drift is not None]
    if known:
        say(f"Drift from the start, root mean square over channels: {', '.join(known)}")
    for where, statistics in run.inputs.items():
        mean, std = _channels(statistics["mean"]), _channels(statistics["std"])
        seen = f"of {statistics['samples']:,} samples"
        say(f"Input of {where}: mean {mean}, std {std} {seen}; standardised and multiplied by {statistics['scale']:g}")
    for problem in run.problems:
        say(f"Warning: {problem}")


def _verdict(layer: Mapping[str, Any]) -> str:
    return layer["run"]["outcome"] if layer["run"] else layer["verdict"]


def _columns(layers: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the cells of every column by its name."""
    # Most layers have torch's eps, and the table is wide enough without this column.
    shows_eps = any(layer["eps"] not in (None, _TORCH_EPS) for layer in layers)
    shows_run = any(layer["run"] for layer in layers)
    columns: dict[str, list[str]] = {
        "Layer": [layer["name"] or "(the model)" for layer in layers],
        "Type": [layer["class"] for layer in layers],
        "Channels": [str(layer["channels"]) for layer in layers],
    }
    if shows_eps:
        columns["eps"] = [_number(layer["eps"], "g") for layer in layers]
    if shows_run:
        columns["Start"] = [_start(layer["run"]) for layer in layers]
    for kind in AFFINE_KINDS:
        title = kind.capitalize()
        for statistic in SHOWN:
            values = [layer[kind] and layer[kind][statistic] for layer in layers]
            columns[title if statistic == "mean" else f"{title} {statistic}"] = [*map(_number, values)]
            if shows_run and statistic == "mean":
                drifts = [layer["run"] and layer["run"][f"{kind}_drift"] for layer in layers]
                columns[f"{title} drift"] = [*map(_number, drifts)]
    columns["Outcome" if shows_run else "Verdict"] = [*map(_verdict, layers)]
    reasons = ["" if layer["run"] else layer["reason"] for layer in layers]
    if any(reasons) or not shows_run:
        columns["Why"] = reasons
    return columns


def _number(value: float | None, form: str = ".4g") -> str:
    return "-" if value is None else format(value, form)


def _start(run: dict[str, Any] | None) -> str:
    start = run and run["start"]
    if not start:
        return "-"
    low, high = _number(start["min"]), _number(start["max"])
    return low if low == high else f"{low} to {high}"


def _channels(values: Sequence[float]) -> str:
    if len(values) <= _MOST_CHANNELS:
        return " ".join(map(_number, values))
    return f"{_number(min(values))} to {_number(max(values))} ({len(values)} channels)"
