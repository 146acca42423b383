"""The experiments of docs/results.md, planned before the first run: grids of runs by name.

    python research/planned.py --output-dir runs                 # all grids, in this order
    python research/planned.py digits mnist1d_20 --jobs 2 --output-dir runs

Each name of a grid stands for a command. A second call trains only missing runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import ablation
import paper_protocol

BASELINE = "baseline"
SHIFTS = {k: f"scale=1,scale_lr_divisor=1,shift_lr_multiplier={k}" for k in (3, 10, 30)}
EPS = "scale=1,scale_lr_divisor=1,eps=1e-3"
BOTH = {k: f"{EPS},shift_lr_multiplier={k}" for k in (3, 10, 30)}

CALLBACK_ON_DIGITS = [
    BASELINE,
    *(f"scale={scale}" for scale in ("1", "0.5", "0.25", "0.1")),
    *SHIFTS.values(),
    EPS,
    *BOTH.values(),
    "scale=1,scale_lr_divisor=1,eps=1e-2,shift_lr_multiplier=10",
    "scale=0.25,eps=1e-3,shift_lr_multiplier=3",
]
INPUTS_ON_DIGITS = [
    "input_norm=batch",
    "scale=0.1,input_norm=batch",
    "input_norm=dataset",
    "scale=0.1,input_norm=dataset",
]
ON_MNIST1D = [BASELINE, *(f"scale={scale}" for scale in ("0.5", "0.25", "0.1")), SHIFTS[10], EPS, *BOTH.values()]
ON_FASHION = [BASELINE, "scale=0.25", "scale=0.1", SHIFTS[3], SHIFTS[10], EPS, BOTH[3], BOTH[10]]
FASHION_CELLS = ((2000, 10), (5000, 10), (2000, 30), (10_000, 10), (5000, 30), (2000, 100), (10_000, 30))
ADAMW_RATES = ("1e-3", "3e-3", "1e-2", "3e-2", "1e-1")
ADAMW_RATE = "3e-2"


def _fashion(images: int, epochs: int) -> list[str]:
    size = ["--train-images", str(images), "--epochs", str(epochs), "--seeds", "8"]
    return ["fashion-mnist", *size, "--arms", *ON_FASHION]


GRIDS: dict[str, list[str]] = {
    "digits": ["digits", "--arms", *CALLBACK_ON_DIGITS, *INPUTS_ON_DIGITS],
    "mnist1d_20": ["mnist1d", "--epochs", "20", "--arms", *ON_MNIST1D],
    "mnist1d_100": ["mnist1d", "--epochs", "100", "--arms", *ON_MNIST1D],
    "digits_torch": ["digits", "--head-init", "torch", "--arms", BASELINE, "scale=0.25", "scale=0.1", BOTH[10]],
    **{f"fashion-mnist_{images}_{epochs}": _fashion(images, epochs) for images, epochs in FASHION_CELLS[:4]},
    "ablation_0.1": ["ablation", "--scale", "0.1", "--leave-one-out"],
    **{
        f"adamw_rate_{rate}": [
            "digits",
            "--optimizer",
            "adamw",
            "--learning-rate",
            rate,
            "--seeds",
            "5",
            "--arms",
            BASELINE,
        ]
        for rate in ADAMW_RATES
    },
    "digits_adamw": ["digits", "--optimizer", "adamw", "--learning-rate", ADAMW_RATE, "--arms", *CALLBACK_ON_DIGITS],
    **{f"fashion-mnist_{images}_{epochs}": _fashion(images, epochs) for images, epochs in FASHION_CELLS[4:]},
    "ablation_0.25": ["ablation", "--scale", "0.25", "--leave-one-out"],
}
"""Arguments by name of the grid: of `ablation.py` after the word `ablation`, otherwise of `paper_protocol.py`."""


def main(arguments: list[str] | None = None) -> None:
    """Run the named grids in turn; a grid with failed runs stops no other grid."""
    parser = argparse.ArgumentParser(description="Runs the planned experiments.")
    parser.add_argument("grids", nargs="*", metavar="GRID", help=f"{', '.join(GRIDS)} (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="runs side by side")
    parser.add_argument("--output-dir", type=Path, default=Path("runs"), metavar="DIR", help="(default: %(default)s)")
    parsed = parser.parse_args(arguments)
    if unknown := [name for name in parsed.grids if name not in GRIDS]:
        parser.error(f"there is no grid {unknown[0]!r}")
    ended = []
    for name in parsed.grids or GRIDS:
        program, *rest = GRIDS[name]
        call = [*rest, "--jobs", str(parsed.jobs), "--output-dir", str(parsed.output_dir / name)]
        try:
            if program == "ablation":
                ablation.main(call)
            else:
                paper_protocol.main([program, *call])
        except SystemExit as error:
            ended.append(f"{name}: {error}")
    if ended:
        sys.exit("\n".join(ended))


if __name__ == "__main__":
    main()
