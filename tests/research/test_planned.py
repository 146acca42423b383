"""The planned grids: run by name, one after another, and collected when all of their runs are finished."""

from __future__ import annotations

import shutil
from pathlib import Path

import ablation
import cells
import collect
import paper_protocol
import planned
import pytest

TINY = ["digits", "--epochs", "1", "--seeds", "2", "--arms", "baseline", "scale=0.5"]


def test_a_grid_counts_when_all_of_its_runs_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(planned.GRIDS, "tiny", TINY)
    runs, results = tmp_path / "runs", tmp_path / "results"
    results.mkdir()
    places = {run: runs / "tiny" / run.name / f"seed_{run.seed:02}" for run in collect.runs_of("tiny")}
    *most, (last, place) = places.items()
    for run, directory in most:
        paper_protocol.train(run, directory)
    assert collect.collect("tiny", runs, results) == (3, 4)
    assert list(results.iterdir()) == []
    paper_protocol.train(last, place)
    assert collect.collect("tiny", runs, results) == (4, 4)
    assert [cell.arm for cell in cells.read_cells(results, "tiny")] == ["baseline", "scale_0.5"]
    shutil.rmtree(place)
    assert collect.collect("tiny", runs, results) == (3, 4)


def test_a_grid_that_fails_stops_no_other_and_is_named_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []

    def pretend(arguments: list[str]) -> None:
        calls.append(arguments)
        if arguments[0] == "mnist1d":
            raise SystemExit("2 of 9 runs failed")

    monkeypatch.setattr(paper_protocol, "main", pretend)
    monkeypatch.setattr(ablation, "main", pretend)
    with pytest.raises(SystemExit, match=r"^mnist1d_20: 2 of 9 runs failed$"):
        planned.main(["mnist1d_20", "ablation_0.1", "--jobs", "3", "--output-dir", str(tmp_path)])
    ending = ["--jobs", "3", "--output-dir"]
    assert calls == [
        [*planned.GRIDS["mnist1d_20"], *ending, str(tmp_path / "mnist1d_20")],
        [*planned.GRIDS["ablation_0.1"][1:], *ending, str(tmp_path / "ablation_0.1")],
    ]


def test_a_grid_that_nobody_planned_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        planned.main(["imagenet"])
    assert "there is no grid 'imagenet'" in capsys.readouterr().err
