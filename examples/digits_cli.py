"""Trains the digits network by LightningCLI, with the group `revbn` for revisited batch norm.

`python examples/digits_cli.py fit --config examples/digits_cli.yaml` trains the baseline. `--revbn.enabled true` makes
it the revisited network, and `fit --help` lists the other settings. Model and data need no change.
"""

from __future__ import annotations

import logging

from digits import Digits, DigitsResNet, log_level, prepare_process

from lightning_revbn import RevBNCLI

if __name__ == "__main__":
    prepare_process()
    with log_level(logging.INFO):  # the callback's table is an INFO message
        RevBNCLI(DigitsResNet, Digits)
