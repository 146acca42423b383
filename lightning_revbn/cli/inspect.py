"""`lightning-revbn inspect`: the batch norm layers of a model or checkpoint, verdicts and values."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from lightning_revbn.cli.terminal import print_json, show_table
from lightning_revbn.core.metric_keys import AFFINE_KINDS, affine_quantity, metric_key

# torch takes seconds to import, and neither --help nor the other commands need it: functions here import it.
if TYPE_CHECKING:
    from lightning_revbn.core.initialization import InitReport

__all__ = ["add_parser"]

_SHOWN = ("mean", "std", "min", "max")
_HEADINGS = ("Scale", "Scale std", "Scale min", "Scale max", "Shift", "Shift std", "Shift min", "Shift max")
_TORCH_EPS = 1e-5
_SORT_KEYS = (
    *("model", "name", "channels", "verdict"),
    *(affine_quantity(kind, statistic) for kind in AFFINE_KINDS for statistic in _SHOWN),
)


def add_parser(commands: Any) -> None:
    """Add the command to a parser.

    Args:
        commands: What `add_subparsers` returned.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="show the batch norm layers of a model or checkpoint",
        description="Show the batch norm layers of a model or checkpoint: the verdict that RevisitedBatchNorm would "
        "pass on each with its default settings, the values of scale and shift, and eps where it is not torch's 1e-5. "
        "A checkpoint has no eps, unless RevisitedBatchNorm(eps=...) wrote it down.",
    )
    parser.add_argument(
        "target", help="a checkpoint file, torchvision:NAME, timm:NAME, or package.module:callable (returns a module)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--sort",
        choices=_SORT_KEYS,
        default="model",
        metavar="KEY",
        help=f"one of {', '.join(_SORT_KEYS)} (default: model)",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    """Show the layers.

    Args:
        arguments: The command line.

    Returns:
        The exit code: 0, also for a model without batch norm.

    Raises:
        TargetError: If the target cannot be read.
    """
    from lightning_revbn.cli.targets import resolve
    from lightning_revbn.core.initialization import InitReport
    from lightning_revbn.core.layers import find_batch_norms

    report = InitReport(tuple(find_batch_norms(resolve(arguments.target))))
    layers = _describe(report, arguments.sort)
    if arguments.json:
        print_json({"target": arguments.target, "counts": report.counts, "layers": layers})
        return 0
    counts = ", ".join(f"{count} {verdict}" for verdict, count in report.counts.items() if count)
    summary = f"{arguments.target}: {len(layers)} batch norm layers" + (f" ({counts})" if counts else "")
    # Most layers have torch's eps, and the table is wide without it.
    eps = ("eps",) if any(layer["eps"] not in (None, _TORCH_EPS) for layer in layers) else ()
    header = ("Layer", "Type", "Channels", *eps, *_HEADINGS, "Verdict", "Why")
    rows = [_row(layer, shows_eps=bool(eps)) for layer in layers]
    show_table(header, rows, summary)
    return 0


def _describe(report: InitReport, sort: str = "model") -> list[dict[str, Any]]:
    """Return every layer of a report with the statistics of its scale and shift.

    Args:
        report: The report.
        sort: One of `_SORT_KEYS`; names and verdicts ascend, numbers descend, layers without the number come last.

    Returns:
        The layers of `report.to_dict()` with `"scale"` and `"shift"`, each a dict of mean, standard deviation, least
        and greatest, or None.
    """
    from lightning_revbn.core.affine_statistics import AffineStatistics

    values = AffineStatistics(report.records).compute() if report.records else {}
    layers: list[dict[str, Any]] = report.to_dict()["layers"]
    for layer in layers:
        for kind in AFFINE_KINDS:
            keys = {statistic: metric_key("", layer["name"], affine_quantity(kind, statistic)) for statistic in _SHOWN}
            known = keys["std"] in values
            layer[kind] = {statistic: values[key] for statistic, key in keys.items()} if known else None
    if sort in ("name", "verdict"):
        layers.sort(key=lambda layer: layer[sort])
    elif sort == "channels":
        layers.sort(key=lambda layer: -layer["channels"])
    elif sort != "model":
        kind, _, statistic = sort.partition("_")
        layers.sort(key=lambda layer: (layer[kind] is None, -layer[kind][statistic] if layer[kind] else 0.0))
    return layers


def _row(layer: dict[str, Any], *, shows_eps: bool) -> tuple[str, ...]:
    numbers = [f"{layer[kind][statistic]:.4g}" if layer[kind] else "-" for kind in AFFINE_KINDS for statistic in _SHOWN]
    name = layer["name"] or "(the model)"
    eps = ("-" if layer["eps"] is None else f"{layer['eps']:g}",) if shows_eps else ()
    return (name, layer["class"], str(layer["channels"]), *eps, *numbers, layer["verdict"], layer["reason"])
