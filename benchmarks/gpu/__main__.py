"""Runs the tests that need one GPU and measures what only a GPU can tell; writes `gpu.json` and `gpu.md`.

From a source tree, with nothing installed but what the package and its tests import:

    PYTHONPATH=. python -m benchmarks.gpu --output build/gpu
    PYTHONPATH=. python -m benchmarks.gpu --output build/try --device cpu --small  # tries the same code on a CPU

Each part is a process with its own time limit. A part that fails is told, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.device import Device
from benchmarks.gpu.page import page
from benchmarks.gpu.parts import PARTS, Visit

SECONDS = 240.0
"""The time limit of everything."""


def parse_arguments() -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [part.name for part in PARTS]
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="try the code with inputs too small to measure anything")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, help="(default: all, in this order)")
    parser.add_argument("--tests", default="", metavar="EXPRESSION", help="only these tests, as `pytest -k` takes it")
    parser.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        help="of all parts, in proportion also of each (default: %(default)g)",
    )
    return parser.parse_args()


def main() -> int:
    """Run the parts, and write both files after each of them."""
    arguments = parse_arguments()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("not run: torch finds no GPU. `--device cpu --small` tries the same code on the CPU", file=sys.stderr)
        return 2
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    patience = max(1.0, arguments.seconds / SECONDS)
    visit = Visit(arguments.device, arguments.small, output, arguments.tests, start + arguments.seconds, patience)
    results: dict[str, Any] = {
        "device": Device(arguments.device).describe(),
        "small": arguments.small,
        "seconds": 0.0,
        "parts": {},
    }
    for part in PARTS:
        if part.name not in arguments.parts:
            continue
        found = results["parts"][part.name] = visit.run(part)
        results["seconds"] = round(time.monotonic() - start, 1)
        (output / "gpu.json").write_text(json.dumps(results, indent=2))
        (output / "gpu.md").write_text(page(results))
        print(f"{part.title}: {found['outcome']} ({found['seconds']:.0f} s)", flush=True)
        if found["reason"]:
            print(found["reason"], flush=True)
    print(f"{output / 'gpu.md'}")
    return 0 if all(found["outcome"] == "ok" for found in results["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
