"""How long a function or a class may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from helpers.modules import MODULES, parsed

MAX_LINES = {ast.FunctionDef: 60, ast.AsyncFunctionDef: 60, ast.ClassDef: 250}
LONGER: dict[str, str] = {
    "lightning_revbn.callbacks.monitor.BatchNormMonitor": "a quarter is the docstring of keys and arguments",
    "lightning_revbn.callbacks.revisited.RevisitedBatchNorm": "every hook of Lightning, of few lines each, and the "
    "docstring of all arguments; what hooks do is in files beside it",
    "lightning_revbn.core.param_groups.scale_param_groups": "three quarters are the docstring of its arguments",
}
"""Functions and classes that may be longer, by module and name, and why."""


def lengths() -> Iterator[tuple[str, int, int]]:
    """Yield every function and class by module and qualified name, its lines, and how many it may have."""

    def inside(node: ast.AST, prefix: str) -> Iterator[tuple[str, int, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                name = f"{prefix}.{child.name}"
                assert child.end_lineno is not None
                yield name, child.end_lineno - child.lineno + 1, MAX_LINES[type(child)]
                yield from inside(child, name)
            else:
                yield from inside(child, prefix)

    for module, file in MODULES.items():
        yield from inside(parsed(file), module)


def test_no_function_is_longer_than_60_lines_and_no_class_than_250() -> None:
    too_long = {name: f"{lines} of {most}" for name, lines, most in lengths() if lines > most}
    assert too_long.keys() - LONGER.keys() == set(), too_long
    assert LONGER.keys() - too_long.keys() == set(), "these are short enough now"
