from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightning_revbn.core.printable import printable, shortened


def test_what_does_not_print_is_escaped_and_nothing_is_lost() -> None:
    assert printable("bn\x1b[2J\n\r\t\u202e\udcff\x9b") == r"bn\x1b[2J\n\r\t\u202e\udcff\x9b"
    assert printable("Größe 层 [/x]") == "Größe 层 [/x]"


@given(st.text(max_size=300), st.integers(11, 100))
def test_every_text_becomes_one_line_that_prints(text: str, most: int) -> None:
    assert printable(text).isprintable()
    short = shortened(text, most)
    assert short.isprintable()
    assert len(short) <= most
    assert short == printable(text) or "..." in short
