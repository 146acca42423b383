from __future__ import annotations

import io
import sys

import pytest

from lightning_revbn.core.table import plain_table, print_table, use_rich

TABLE = (["Layer", "Scale"], [["bn[1]", "0.1"]], "1 layer")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_table_is_plain_text_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(*TABLE)
    assert capsys.readouterr().out == f"{plain_table(*TABLE)}\n"


def test_a_table_is_drawn_by_rich_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    print_table(*TABLE)
    drawn = terminal.getvalue()
    assert "┃" in drawn
    assert "bn[1]" in drawn  # no markup
    assert "1 layer" in drawn


def test_a_table_is_plain_text_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert not use_rich(terminal)
    print_table(*TABLE)
    assert terminal.getvalue() == f"{plain_table(*TABLE)}\n"
