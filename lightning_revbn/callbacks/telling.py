"""Says at the start of a fit what was rewritten, how scales learn, and where the method has no effect."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_revbn.callbacks.engine_groups import permanent_groups
from lightning_revbn.core.initialization import InitReport
from lightning_revbn.core.layers import BatchNormRecord
from lightning_revbn.core.table import use_rich
from lightning_revbn.lightning_compat import rank_zero_only, rank_zero_warn

__all__ = ["tell"]


def tell(owner: str, report: InitReport, optimizers: Sequence[Any], covered: int, divisor: float) -> None:
    """Print the table of layers, and warn where nothing or only half of the method happens.

    Args:
        owner: What the user calls the callback.
        report: The layers and what was done to each.
        optimizers: Those of the fit.
        covered: How many scales the update rules cover.
        divisor: The constant c.
    """
    if not report.records:
        rank_zero_warn(f"{owner} has no effect: the model has no batch norm layers")
        return
    permanent = [(own, group) for own in optimizers for group in permanent_groups(own)]
    rate = f"{covered} scales learn with lr / {divisor:g}" if divisor > 1 else ""
    if permanent and not covered:
        # An engine's optimizer holds flat copies.
        held = sum(len(group["params"]) for own, group in permanent if isinstance(own, Optimizer))
        rate = f"{held or 'the'} scales learn with the learning rate of their groups, made by scale_param_groups"
    _print_report(owner, report, rate)
    if not report.rewritten and not covered and not permanent:
        rank_zero_warn(f"{owner} has no effect: no scale was rewritten, and none learns with lr / {divisor:g}")
    elif divisor > 1 and not covered and not permanent:
        rank_zero_warn(f"{owner}: no optimizer holds a batch norm scale, so none learns with lr / c")
    elif covered:  # an engine that trains 16-bit copies of its own numbers is not among them
        _warn_of_rounding(owner, report.records, divisor)


def _warn_of_rounding(owner: str, records: Sequence[BatchNormRecord], divisor: float) -> None:
    coarse = [
        record
        for record in records
        if record.verdict == "rewrite" and record.scale is not None and torch.finfo(record.scale.dtype).bits < 32
    ]
    if not coarse:
        return
    target, dtype = cast("float", coarse[0].target), cast("nn.Parameter", coarse[0].scale).dtype
    apart = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(target))
    rank_zero_warn(
        f"{owner}: {len(coarse)} scales are {dtype}, that of {coarse[0].name!r} for one. Near "
        f"{target:g} such numbers are {apart:.2g} apart, and an update of less than half of that, as with "
        f"lr / {divisor:g} most are, is rounded away. Train with "
        "precision='bf16-mixed' or '16-mixed', or choose a smaller scale_lr_divisor"
    )


@rank_zero_only
def _print_report(owner: str, report: InitReport, rate: str) -> None:
    """Show the report by rich where it is installed and a person looks, else as a log message."""
    log = logging.getLogger("lightning.pytorch")  # whoever silences Lightning silences this
    if use_rich(sys.stderr) and log.isEnabledFor(logging.INFO):
        from rich.console import Console

        Console(stderr=True, highlight=False).print(f"{owner}:", report, rate)
    else:
        # Not rank_zero_info, which logs for whichever of the two packages was imported last.
        log.info("\n".join([f"{owner}:", str(report), *[rate] * bool(rate)]))
