"""`lightning-revbn inspect`: the batch norm layers of a model or checkpoint, and how a run treated them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from lightning_revbn.cli.terminal import print_json
from lightning_revbn.core.metric_keys import AFFINE_KINDS, affine_quantity

# torch takes seconds to import, and neither --help nor the other commands need it: functions here import it.
if TYPE_CHECKING:
    from lightning_revbn.cli.saved_run import SavedRun

__all__ = ["add_parser"]

_SHOWN = ("mean", "std", "min", "max")
_SORT_KEYS = (
    *("model", "name", "channels", "verdict"),
    *(affine_quantity(kind, statistic) for kind in AFFINE_KINDS for statistic in _SHOWN),
)


def add_parser(commands: Any) -> None:
    """Add the command to a parser.

    Args:
        commands: The result of `add_subparsers`.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="show the batch norm layers of a model or checkpoint",
        description="Show the batch norm layers of a model or checkpoint: the verdict that RevisitedBatchNorm would "
        "pass on each with its default settings, the values of scale and shift, and eps where it is not torch's 1e-5. "
        "A checkpoint has no eps, unless RevisitedBatchNorm(eps=...) wrote it down. Of a checkpoint of a run with "
        "RevisitedBatchNorm: what it did with each layer, its settings, where scales started and how far they are "
        "from there, and the statistics of the input.",
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
        The exit code: 0, even for a model without batch norm.

    Raises:
        TargetError: If the target cannot be read.
    """
    from lightning_revbn.cli.checkpoint_layers import from_state_dict
    from lightning_revbn.cli.layer_table import show_layers, tell_run
    from lightning_revbn.cli.layer_values import counts, describe_checkpoint, describe_model
    from lightning_revbn.cli.saved_run import read_run, saved_eps
    from lightning_revbn.cli.targets import Checkpoint, resolve

    found = resolve(arguments.target)
    run, drifts = None, dict[str, float | None]()
    if isinstance(found, Checkpoint):
        modules = from_state_dict(found.tensors, saved_eps(found.content))
        layers, run = describe_checkpoint(modules), read_run(found.content)
        told = {} if run is None else run.tell_layers(modules)
        layers = [layer | {"run": told.get(layer["name"])} for layer in layers]
        drifts = {kind: None if run is None else run.drift(modules, kind) for kind in AFFINE_KINDS}
    else:
        layers = [layer | {"run": None} for layer in describe_model(found)]
    _sort(layers, arguments.sort)
    if arguments.json:
        whole = None if run is None else _run_as_dict(run, drifts)
        print_json({"target": arguments.target, "counts": counts(layers), "run": whole, "layers": layers})
        return 0
    show_layers(layers, arguments.target)
    if run is not None:
        tell_run(run, layers, drifts)
    return 0


def _sort(layers: list[dict[str, Any]], key: str) -> None:
    """Sort layers in place: names and verdicts ascend, numbers descend, and layers without the number come last."""
    if key in ("name", "verdict"):
        layers.sort(key=lambda layer: layer[key])
    elif key == "channels":
        layers.sort(key=lambda layer: -layer["channels"])
    elif key != "model":
        kind, _, statistic = key.partition("_")
        layers.sort(key=lambda layer: (layer[kind] is None, -layer[kind][statistic] if layer[kind] else 0.0))


def _run_as_dict(run: SavedRun, drifts: dict[str, float | None]) -> dict[str, Any]:
    return {
        "epoch": run.epoch,
        "global_step": run.step,
        "callbacks": run.settings,
        **{f"{kind}_drift": drift for kind, drift in drifts.items()},
        "input_statistics": run.inputs,
        "problems": run.problems,
    }
