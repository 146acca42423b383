"""Lists the private names of Lightning that the package uses, file by file: `python tests/helpers/private_names.py`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch
from torch import nn

PACKAGE = Path(__file__).parents[2] / "lightning_revbn"
LIGHTNING = Path(lightning.pytorch.__file__).parents[1]


DEFINED = re.compile(
    r"(?:def|class) (_[a-z]\w*)|(?:self|cls)\.(_[a-z]\w*)\b[^=\n]*=|^    (_[a-z]\w*)\s*[:=]",
    re.MULTILINE | re.IGNORECASE,
)
PRIVATE = re.compile(r"_[a-zA-Z]\w*")


def of_lightning() -> set[str]:
    """Return every private attribute, function and class that Lightning's own code defines."""
    files = (file for folder in ("pytorch", "fabric") for file in (LIGHTNING / folder).rglob("*.py"))
    names = {name for file in files for found in DEFINED.findall(file.read_text()) for name in found if name}
    return {name for name in names if not hasattr(nn.BatchNorm2d, name) and not hasattr(nn.Module(), name)}


def accesses(tree: ast.Module, own: set[str]) -> Iterator[tuple[int, str]]:
    """Yield the private names that a module reads or writes on objects of other packages, with the lines."""
    keys = {id(key) for node in ast.walk(tree) if isinstance(node, ast.Dict) for key in node.keys}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr):
            on_itself = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not on_itself and node.attr not in own:
                yield node.lineno, node.attr
        # getattr, hasattr and vars take the name as a text.
        elif isinstance(node, ast.Constant) and id(node) not in keys and PRIVATE.fullmatch(str(node.value)):
            yield node.lineno, node.value


def own_names(tree: ast.Module) -> Iterator[str]:
    """Yield the private names that a module defines itself."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def private_names_of_lightning() -> dict[str, list[tuple[int, str]]]:
    """Return, for every file of the package that uses private names of Lightning, the lines and the names."""
    files = {file: ast.parse(file.read_text()) for file in sorted(PACKAGE.rglob("*.py"))}
    own = {name for tree in files.values() for name in own_names(tree)}
    theirs = of_lightning()
    found = {
        str(file.relative_to(PACKAGE.parent)): sorted({use for use in accesses(tree, own) if use[1] in theirs})
        for file, tree in files.items()
    }
    return {file: uses for file, uses in found.items() if uses}


if __name__ == "__main__":
    uses = [f"{file}:{line}: {name}" for file, used in private_names_of_lightning().items() for line, name in used]
    print("\n".join(uses))  # noqa: T201
