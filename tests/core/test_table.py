from __future__ import annotations

import io
import re
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


# --- what fits into a terminal ----------------------------------------------------------------------------------------

HEADER = ["Layer", "Type", "Scale", "Scale std", "Why"]
LAYERS = [
    [f"layer{block}.0.bn{number}", "BatchNorm2d", f"{0.1 * block:.4g}", "0.01", why]
    for block, number, why in [(1, 1, "freshly initialised"), (2, 3, "its scale starts at 0 on purpose")]
]
ODD = [[f"层.{'x' * 90}.[/x]", "BatchNorm2d", "0.1", "0.02", "freshly initialised"], *LAYERS]


def shown(
    monkeypatch: pytest.MonkeyPatch,
    rows: list[list[str]],
    columns: int,
    *,
    rich: bool = True,
    summary: str = "2 layers",
) -> str:
    """Print a table on a terminal, and return what it shows, without colours."""
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    if not rich:
        monkeypatch.setitem(sys.modules, "rich", None)
    print_table(HEADER, rows, summary, spare=[(3,)])
    return re.sub("\x1b\\[[0-9;]*m", "", sys.stdout.getvalue())  # type: ignore[attr-defined]


@pytest.mark.parametrize("rich", [True, False])
@pytest.mark.parametrize("rows", [LAYERS, LAYERS[:1], ODD], ids=["layers", "one layer", "long name"])
@pytest.mark.parametrize("columns", [2, 20, 40, 60, 80, 200])
def test_no_name_and_no_number_is_cut_however_narrow_the_terminal(
    columns: int, rows: list[list[str]], rich: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = shown(monkeypatch, rows, columns, rich=rich)
    assert "…" not in output
    together = "".join(char for char in output if char.isalnum() or char in ".[/]")
    for row in rows:
        for cell in (row[0], row[2]):
            assert cell in together
    if columns >= 20 and rich:
        assert all(len(line) <= columns for line in output.splitlines())


def test_a_wide_terminal_shows_every_column(monkeypatch: pytest.MonkeyPatch) -> None:
    for rich in (True, False):
        output = shown(monkeypatch, LAYERS, 200, rich=rich)
        assert all(name in output for name in HEADER)
        assert "In every row" not in output


def test_a_narrow_terminal_says_once_what_all_rows_share_and_which_columns_it_leaves_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [[*row[:3], str(number), row[4]] for number, row in enumerate(LAYERS)]
    output = shown(monkeypatch, rows, 71)
    assert "In every row: Type BatchNorm2d" in output
    assert output.count("BatchNorm2d") == 1
    assert "Not shown" not in output
    output = shown(monkeypatch, rows, 65)
    assert "Not shown in 65 columns: Scale std" in output
    assert "its scale starts at 0 on purpose" in output


def test_the_last_column_is_wrapped_before_cells_stand_below_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for rich in (True, False):
        output = shown(monkeypatch, LAYERS, 51, rich=rich)
        assert re.search(r"layer2.0.bn3 +[│|] +0.2 +[│|] +its scale starts at 0 on\W", output)
        output = shown(monkeypatch, LAYERS, 40, rich=rich)
        assert "\nlayer2.0.bn3\n  Scale 0.2\n  Why its scale starts at 0 on purpose\n" in output


def test_no_text_is_markup_or_a_command_to_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [["bn[red]\x1b[2J", "[/x]\n", "0.1", "0", "[bold]"]]
    for rich in (True, False):
        output = shown(monkeypatch, rows, 200, rich=rich, summary="run[/x].pt\x1b]0;title\x07")
        for text in (r"bn[red]\x1b[2J", r"[/x]\n", "[bold]", r"run[/x].pt\x1b]0;title\x07"):
            assert text in output


def test_wide_letters_are_counted_as_two(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = plain_table(["Layer", "Scale"], [["层层", "0.1"], ["bn1", "0.1"]], "2 layers").splitlines()
    assert [line.index("|") for line in lines if "|" in line] == [6, 4, 6]


def test_a_process_without_stdout_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not use_rich(None)
    monkeypatch.setattr(sys, "stdout", None)
    print_table(*TABLE)
