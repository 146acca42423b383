"""Writes the map of the package into CONTRIBUTING.md from docstrings: `python tests/helpers/file_tree.py`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "CONTRIBUTING.md"
SECTION = re.compile(r"(<!-- tree -->\n).*?(<!-- end of tree -->)", re.DOTALL)


def description(file: Path) -> str:
    """Return the first paragraph of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    return " ".join(docstring.split("\n\n")[0].split())


def tree() -> str:
    """Return the files of the package by folder, each with its description, as a text block."""
    package = ROOT / "lightning_revbn"
    folders = sorted({file.parent for file in package.rglob("*.py")})
    lines: list[str] = []
    for folder in folders:
        lines.append(f"{folder.relative_to(ROOT)}/  {description(folder / '__init__.py')}")
        files = sorted(file for file in folder.glob("*.py") if file.name != "__init__.py")
        width = max((len(file.name) for file in files), default=0)
        lines += [f"    {file.name.ljust(width)}  {description(file)}" for file in files]
    return "```\n" + "\n".join(lines) + "\n```\n"


def filled(page: str) -> str:
    """Return the page with the present map."""
    return SECTION.sub(lambda found: found[1] + tree() + found[2], page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
