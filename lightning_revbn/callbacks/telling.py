"""Reports at the start of a fit which scales were rewritten, how scales learn, and where the method has no effect."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.optim import Optimizer

from lightning_revbn.callbacks.engine_groups import permanent_groups
from lightning_revbn.callbacks.rules import UpdateRules
from lightning_revbn.core.identity import scale_1_terms
from lightning_revbn.core.initialization import InitReport
from lightning_revbn.core.layers import BatchNormRecord
from lightning_revbn.core.param_groups import GROUP_MARK, SHIFT_MARK
from lightning_revbn.core.rates import Rates, Role
from lightning_revbn.core.table import use_rich
from lightning_revbn.lightning_compat import rank_zero_only, rank_zero_warn

__all__ = ["tell"]


def tell(
    owner: str, report: InitReport, trainer: Trainer, rules: UpdateRules, *, sets_eps: bool, is_resumed: bool
) -> None:
    """Print the table of layers, and warn if the method has no effect, or only half of it applies.

    Args:
        owner: The callback's name, for messages.
        report: The layers with the verdict on each.
        trainer: The Trainer.
        rules: The update rules of the fit.
        sets_eps: Whether layers have an eps that does not come from the model's code.
        is_resumed: Whether the fit goes on from a checkpoint of a run with the callback.
    """
    if not report.records:
        rank_zero_warn(f"{owner} has no effect: the model has no batch norm layers")
        return
    optimizers: list[Any] = trainer.strategy.optimizers
    permanent = [(own, group) for own in optimizers for group in permanent_groups(own)]
    lines = (_rates(rules, permanent), _eps(report), _at_scale_1(trainer.lightning_module, report, rules))
    _print_report(owner, report, "\n".join(line for line in lines if line))
    divides, multiplies = rules.rates.divides_scales, rules.rates.multiplies_shifts
    differences = _differences(rules)
    if not report.rewritten and not differences and not permanent and not sets_eps:
        rank_zero_warn(f"{owner} has no effect: no scale was rewritten, and {_nothing_learns(rules.rates)}")
    elif divides and not rules.covered and not permanent:
        rank_zero_warn(f"{owner}: no optimizer holds a batch norm scale, so none learns with lr / c")
    elif multiplies and not rules.covered_shifts and not permanent:
        rank_zero_warn(f"{owner}: no optimizer holds a batch norm shift, so none learns with lr * k")
    if differences and not is_resumed:
        _warn_of_half(owner, report, differences)
    if rules.covered:  # an engine has no rule here, and trains copies of 16-bit scales in a precision of its own
        _warn_of_rounding(owner, report.records, rules.settings.divisor)


def _rates(rules: UpdateRules, permanent: Sequence[tuple[Any, dict[str, Any]]]) -> str:
    """Describe how scales and shifts learn, in a line for each."""
    lines: list[str] = []
    roles: list[tuple[Role, int, str]] = [
        ("scale", rules.covered, GROUP_MARK),
        ("shift", rules.covered_shifts, SHIFT_MARK),
    ]
    for role, covered, mark in roles:
        owners = [own for own, group in permanent if mark in group]
        if covered or (rules.rates.change(role) and not owners):
            lines.append(f"{covered} {role}s learn with {rules.rates.lr_text(role)}")
        if owners:
            # An engine's optimizer holds flat copies, which hide the number of scales.
            groups = [group for own, group in permanent if isinstance(own, Optimizer) and mark in group]
            held = sum(parameter.requires_grad for group in groups for parameter in group["params"])
            count = held if groups else "the"
            lines.append(f"{count} {role}s learn with the learning rate of their groups, made by scale_param_groups")
    return "\n".join(lines)


def _differences(rules: UpdateRules) -> dict[str, str]:
    """Describe the updates that the callback changes, by the setting that would leave them alone."""
    counted = [
        ("scale_lr_divisor=1", rules.covered, f"scales learn with {rules.rates.lr_text('scale')}"),
        ("shift_lr_multiplier=1", rules.covered_shifts, f"shifts learn with {rules.rates.lr_text('shift')}"),
        ("weight_decay_exempt=None", rules.exempted, "parameters take no weight decay"),
    ]
    return {without: f"{count} {told}" for without, count, told in counted if count}


def _eps(report: InitReport) -> str:
    """If eps was changed, say that no `state_dict` holds it."""
    changed = [record.eps for record in report.records if record.eps_before not in (None, record.eps)]
    values = {eps for eps in changed if eps is not None}  # the model's code may have the eps already
    if not values:
        return ""
    numbers = " and ".join(f"{value:g}" for value in sorted(values))
    return f"No state_dict holds eps: to load this network without the callback, write eps={numbers} into its layers"


def _at_scale_1(module: nn.Module, report: InitReport, rules: UpdateRules) -> str:
    """Describe the equivalent settings at scale 1, for ReLU networks whose scales all start alike."""
    scales = [record for record in report.records if record.state not in ("no scale", "input")]
    starts = {(record.target, record.eps) for record in scales}
    if len(starts) != 1 or any(record.verdict != "rewrite" for record in scales):
        return ""
    if not any(isinstance(part, nn.ReLU) for part in module.modules()):
        return ""
    target, eps = next(iter(starts))
    if target is None or eps is None:
        return ""
    return str(scale_1_terms(target, rules.settings.divisor, rules.settings.shift_multiplier, eps))


def _nothing_learns(rates: Rates) -> str:
    if rates.divides_scales:
        return f"none learns with {rates.lr_text('scale')}"
    if rates.multiplies_shifts:
        return f"no shift learns with {rates.lr_text('shift')}"
    return "no parameter learns or decays differently"


def _warn_of_half(owner: str, report: InitReport, differences: Mapping[str, str]) -> None:
    """Warn if parameters learn differently, but no scale was rewritten: mostly with a pretrained network."""
    judged = [record for record in report.records if record.state not in ("no scale", "excluded", "input", "frozen")]
    asked = [record for record in judged if record.target is not None and record.target < 1]
    known = ("trained in an earlier fit",)
    if not asked or any(record.verdict == "rewrite" or record.reason in known for record in asked):
        return
    first = asked[0]
    rank_zero_warn(
        f"{owner} applies half of the method: no scale was rewritten, since none of the {len(asked)} layers is freshly "
        f"initialised ({first.name!r}: {first.reason}), yet {' and '.join(differences.values())}. To start these "
        "scales anew, set trained='overwrite' (and zero_scale for scales at 0); to keep them, set scale=1.0; "
        f"to train as before, set {' and '.join(differences)} or leave the callback out"
    )


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
        f"{owner}: {len(coarse)} scales are {dtype}, such as the scale of {coarse[0].name!r}. Values "
        f"near {target:g} are {apart:.2g} apart in this dtype, so most updates at lr / {divisor:g} are lost: an "
        "update below half of that is rounded away. Train with "
        "precision='bf16-mixed' or '16-mixed', or choose a smaller scale_lr_divisor"
    )


@rank_zero_only
def _print_report(owner: str, report: InitReport, rate: str) -> None:
    """Print the report with rich if it is installed and a person looks; otherwise log it."""
    log = logging.getLogger("lightning.pytorch")  # silencing Lightning silences the report too
    if use_rich(sys.stderr) and log.isEnabledFor(logging.INFO):
        from rich.console import Console

        Console(stderr=True, highlight=False).print(f"{owner}:", report, rate)
    else:
        # Not rank_zero_info: it logs under the name of whichever of the two packages was imported last.
        log.info("\n".join([f"{owner}:", str(report), *[rate] * bool(rate)]))
