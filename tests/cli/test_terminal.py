from __future__ import annotations

import io
import sys

import pytest

from lightning_revbn.cli.terminal import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("terminal", "wait", "shown"), [(True, 0, True), (True, 60, False), (False, 0, False)])
def test_the_progress_bar_shows_on_terminals_and_when_it_takes_long(
    terminal: bool, wait: float, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar("Reading logs", 10, wait) as advance:
        advance(5)
        advance(5)
    output = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert ("Reading logs" in output) == shown
    assert output.endswith("\x1b[2K") == shown


def test_there_is_no_progress_bar_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setitem(sys.modules, "rich", None)
    with progress_bar("Reading logs", 10, 0) as advance:
        advance(10)
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]
