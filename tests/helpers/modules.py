"""The modules of the package, parsed."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

from helpers.scripts import ROOT

PACKAGE = ROOT / "lightning_revbn"


def _name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}
"""The file of every module, by the module's dotted name."""


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))
