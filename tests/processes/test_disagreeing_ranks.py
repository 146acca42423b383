"""Two gloo ranks with different callbacks or settings: an error on both, before the first step."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.scripts import run_ranks

SAID = {
    "scale": "RevisitedBatchNorm: scale=0.1 on rank 0, scale=0.2 on rank 1.",
    "enabled": "RevisitedBatchNorm: enabled=True on rank 0, enabled=False on rank 1.",
    "activations": "RevisitedBatchNorm: monitor.activations=False on rank 0, monitor.activations=True on rank 1.",
    "input eps": "InputNorm: eps=1e-05 on rank 0, eps=0.001 on rank 1.",
    "input mode": "InputNorm: mode='batch' on rank 0, mode='fixed' on rank 1;",
}
MISSING = {
    "variable": (1, "rank 0 has no RevisitedBatchNorm, rank 1 has."),
    "callback": (0, "rank 1 has no RevisitedBatchNorm, rank 0 has."),
    "monitor": (1, "rank 0 has no BatchNormMonitor, rank 1 has."),
}
SECONDS = 60
"""How long the error may take from the setup on, on a busy machine; gloo would wait for half an hour."""


def ends(case: str, folder: Path) -> list[dict[str, Any]]:
    run_ranks("disagreeing_ranks.py", case, folder)
    found = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert all((end["scales"] == 1).all() for end in found)  # what a refused fit has written is given back
    return found


@pytest.mark.parametrize("case", SAID)
def test_ranks_with_other_settings_are_refused_on_all_ranks_by_name_and_setting(case: str, tmp_path: Path) -> None:
    for end in ends(case, tmp_path):
        assert end["error"].startswith("MisconfigurationException: ")
        assert SAID[case] in end["error"]
        assert end["seconds"] < SECONDS


@pytest.mark.parametrize("case", MISSING)
def test_a_rank_that_lacks_the_callback_is_named_and_ends_with_the_others(case: str, tmp_path: Path) -> None:
    having, said = MISSING[case]
    results = ends(case, tmp_path)
    assert results[having]["error"].startswith("MisconfigurationException: ranks have different settings: ")
    assert said in results[having]["error"]
    assert "where LIGHTNING_REVBN switches the callback on, set it on every node" in results[having]["error"]
    # No code of this package runs there: gloo says that the other rank has gone.
    assert re.match("(Runtime|DistBackend)Error: ", results[1 - having]["error"])
    assert all(end["seconds"] < SECONDS for end in results)
