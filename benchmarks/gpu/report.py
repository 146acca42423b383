"""What a part writes down: after every figure, so that a part that is ended keeps the figures that it had."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.device import Device

__all__ = ["Report", "run_part"]


@dataclass
class Report:
    """The figures of one part.

    Attributes:
        device: What they are measured on.
        small: Whether this is a try of the code, with inputs that are too small to measure anything.
        path: The file of JSON.
        content: What is in it.
        failed: What could not be measured because of an error, which fails the part at its end.
    """

    device: Device
    small: bool
    path: Path
    content: dict[str, list[Any]] = field(default_factory=lambda: {"figures": [], "skipped": [], "notes": []})
    failed: list[str] = field(default_factory=list[str])

    def add(self, name: str, values: Sequence[float], limit: float | None = None, **more: Any) -> None:
        """Write down a ratio: its median over the rounds, with quartiles.

        Args:
            name: What it is of.
            values: The ratio in each round.
            limit: What it should not exceed on a GPU.
            more: What belongs to it, such as the number of kernels.
        """
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
        self.add_figure({"name": name, "value": middle, "low": low, "high": high, "limit": limit, **more})

    def add_figure(self, figure: dict[str, Any]) -> None:
        """Write down a figure, of which `name`, `value` and `limit` reach the page."""
        self.content["figures"].append(figure)
        self._write()

    def note(self, text: str) -> None:
        """Write down a sentence."""
        self.content["notes"].append(text)
        self._write()

    def skip(self, what: str, reason: str) -> None:
        """Write down what is not measured."""
        self.content["skipped"].append({"what": what, "reason": reason})
        self._write()

    def fail(self, what: str, error: Exception) -> None:
        """Write down what is not measured because of an error, and go on."""
        self.failed.append(what)
        told = f"{type(error).__name__}: {error}".strip().splitlines()
        self.skip(what, told[0])
        print(what, error, sep="\n", file=sys.stderr)

    def _write(self) -> None:
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.content, indent=2))
        part.replace(self.path)


def run_part(measure: Callable[[Report], None]) -> None:
    """Run a part as its command line says."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    report = Report(Device(arguments.device), arguments.small, arguments.json)
    measure(report)
    if report.failed:
        sys.exit("failed: " + "; ".join(report.failed))
