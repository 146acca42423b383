"""Damaged directories of logs: a result or one printable line. `tests/helpers/fuzzed_logs.py 500` tries more."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.experiment import KINDS, write_experiment
from helpers.fuzzed_logs import damaged_logs, ending


def test_damaged_logs_of_every_logger_end_in_a_result_or_in_one_printable_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    write_experiment(tmp_path / "sources")
    assert len(KINDS) == 5
    endings = [ending(logs, number) for number, logs in enumerate(damaged_logs(tmp_path / "sources", tmp_path, 50, 1))]
    assert set(endings) <= {"result", "one line"}, [text for text in endings if text.startswith("wrong")]
    assert "one line" in endings
