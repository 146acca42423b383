"""Makes foreign text printable: names of files, layers and metrics may hold line breaks and commands to a terminal."""

from __future__ import annotations

__all__ = ["error_text", "printable", "shortened"]


def printable(text: object) -> str:
    r"""Return a text on a single line, with escapes in place of characters that do not print.

    Args:
        text: A text, such as a path or a name from a file.

    Returns:
        The whole text, uncut.

    Example:
        >>> print(printable("bn1"), printable("two\nlines \x1b[31m"))
        bn1 two\nlines \x1b[31m
    """
    line = str(text)
    if line.isprintable():
        return line
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)


def shortened(text: object, most: int) -> str:
    """Return a text on a single line, without its middle if it is too long for an error.

    Args:
        text: A text of any length.
        most: The largest number of characters.

    Returns:
        The text without characters that do not print.

    Example:
        >>> shortened("a" * 5000, 11)
        'aaaa...aaaa'
    """
    whole = str(text)
    half = (most - 3) // 2
    if len(whole) > most:
        whole = f"{whole[:half]}...{whole[-half:]}"
    line = printable(whole)  # escapes are longer than the characters they replace
    return line if len(line) <= most else f"{line[:half]}...{line[-half:]}"


def error_text(error: BaseException, most: int) -> str:
    r"""Return what an error says on one line, without its middle where that is too long.

    Args:
        error: The error.
        most: Characters at most.

    Returns:
        The text, with single spaces in the place of line breaks and indents.

    Example:
        >>> error_text(ValueError("no\n  layer"), 40)
        'no layer'
    """
    return shortened(" ".join(str(error).split()), most)
