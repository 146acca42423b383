from __future__ import annotations

from pathlib import Path

import pytest
from helpers.logs import points, read, text, write_csv

from lightning_revbn.runs.scalars import LogError


def test_a_csv_file_cut_off_anywhere_gives_its_whole_lines(tmp_path: Path) -> None:
    path = write_csv(tmp_path, [(step, {"a": step / 7, "b": step / 3}) for step in range(3)])
    content = path.read_bytes()
    assert content.count(b"\n") == 4
    for length in range(1, len(content)):
        path.write_bytes(content[:length])
        lines = content[:length].count(b"\r") - 1
        if lines < 1:
            with pytest.raises(LogError):
                read(path)
            continue
        scalars = read(path)
        assert points(scalars) == {"a": {s: s / 7 for s in range(lines)}, "b": {s: s / 3 for s in range(lines)}}
        cut = not content[:length].endswith((b"\r", b"\n"))
        assert scalars.warnings == (f"{path}: ends in the middle of a line, which was left out",) * cut


def test_rows_without_a_step_are_left_out_and_counted(tmp_path: Path) -> None:
    path = text(tmp_path / "metrics.csv", "a,step\n1,0\n2,\n3,nan\n4,1e300\n5\n,\n6,2.0\n")
    scalars = read(path)
    assert points(scalars) == {"a": {0: 1.0, 2: 6.0}}
    assert scalars.warnings == (f"{path}: rows without a step were left out: 4",)
