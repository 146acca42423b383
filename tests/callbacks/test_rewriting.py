"""What becomes of a layer at the start of training, from what was found at setup and what is found then."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from lightning_revbn.callbacks.rewriting import settled
from lightning_revbn.core.layers import BatchNormRecord

RESTORED = "restored, from a checkpoint or by the model's hooks"
TARGET = 0.1


def record(state: Any, verdict: Any, scale: float = 1.0, target: float | None = TARGET) -> BatchNormRecord:
    layer = nn.BatchNorm1d(3)
    nn.init.constant_(layer.weight, scale)
    return BatchNormRecord("bn", layer, verdict, f"{state} at {scale:g}", state, target)


@pytest.mark.parametrize(
    ("earlier", "present", "verdict", "reason"),
    [
        # What was written and still stands keeps the reason that it was written for.
        (record("fresh", "rewrite"), record("fresh", "rewrite", TARGET), "rewrite", "fresh at 1"),
        (record("trained", "rewrite"), record("trained", "skip", TARGET), "rewrite", "trained at 1"),
        (record("zero", "rewrite", 0.0), record("fresh", "rewrite", TARGET), "rewrite", "zero at 0"),
        # What a checkpoint has brought since wins.
        (record("fresh", "rewrite"), record("trained", "skip", 0.3), "skip", RESTORED),
        (record("lazy", "rewrite"), record("trained", "rewrite", 0.3), "skip", RESTORED),
        (record("unmaterialized", "refuse"), record("trained", "skip", 0.3), "skip", RESTORED),
        # Layers that were trained before this fit keep the verdict of setup.
        (record("trained", "skip", 0.3), record("trained", "refuse", 0.3), "skip", "trained at 0.3"),
        (record("zero", "skip", 0.0), record("trained", "skip", 0.3), "skip", "zero at 0"),
        # Materialised or frozen meanwhile: what is found now counts.
        (record("unmaterialized", "refuse"), record("fresh", "rewrite"), "rewrite", "fresh at 1"),
        (record("fresh", "rewrite"), record("frozen", "skip"), "skip", "frozen at 1"),
        # Not there at setup, or not selected.
        (None, record("fresh", "rewrite"), "rewrite", "fresh at 1"),
        (None, record("trained", "skip", 0.3), "skip", "trained at 0.3"),
        (record("excluded", "skip", target=None), record("excluded", "skip", target=None), "skip", "excluded at 1"),
    ],
    ids=lambda value: f"{value.state}-{value.verdict}" if isinstance(value, BatchNormRecord) else None,
)
def test_what_was_found_at_setup_and_what_is_found_now_decide_on_a_layer(
    earlier: BatchNormRecord | None, present: BatchNormRecord, verdict: str, reason: str
) -> None:
    found = settled(earlier, present)
    assert (found.verdict, found.reason) == (verdict, reason)
    assert found.module is present.module
    assert (found.state, found.target) == (present.state, present.target)


def test_a_copy_that_was_written_stays_a_copy_unless_it_was_restored() -> None:
    earlier = replace(record("copy", "rewrite"), copy_of="net.bn")
    kept = settled(earlier, present := record("frozen", "skip", TARGET))
    assert (kept.state, kept.verdict, kept.copy_of, kept.reason) == ("copy", "rewrite", "net.bn", earlier.reason)
    assert kept.module is present.module
    restored = record("frozen", "skip", 0.3)
    assert settled(earlier, restored) == restored
