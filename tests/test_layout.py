"""Who may import whom: every room of the package has a line in a table, and tests share by helpers alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.file_tree import PAGE, description, filled
from helpers.modules import MODULES, PACKAGE, parsed
from helpers.scripts import ROOT, run_code

TESTS = ROOT / "tests"

# Folders, and the files beside them, with what each may import of the others. Nothing points back.
PLAIN = {"core", "compare"}
ALLOWED = {
    "core": set[str](),
    "compare": set[str](),
    # One wing: training.
    "lightning_compat": PLAIN,
    "plugins": PLAIN | {"lightning_compat"},
    "callbacks": PLAIN | {"lightning_compat", "plugins"},
    "data": PLAIN | {"lightning_compat", "plugins", "callbacks"},
    "switches": PLAIN | {"lightning_compat", "plugins", "callbacks"},
    # The other: logs of runs.
    "runs": PLAIN,
    "plots": PLAIN | {"runs"},
    "cli": PLAIN | {"runs", "plots", ""},  # "": the package itself, for its version
    "__main__": {"cli"},
}
WITHOUT_LIGHTNING = ("core", "compare", "runs", "plots", "cli")
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}


def run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what runs when a module is imported: no bodies of functions, and nothing that only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from (node for other in child.orelse for node in (other, *run_at_import(other)))
            continue
        yield child
        yield from run_at_import(child)


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Yield the modules that import statements name; of `from package import module`, the module."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"an import of the package is relative: {ast.unparse(node)}"
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                yield module if module in MODULES else str(node.module)


def room(module: str) -> str:
    """Return the folder, or the file beside the folders, of a module of the package; "" for the package itself."""
    return module.removeprefix(PACKAGE.name).removeprefix(".").partition(".")[0]


# --- who may import whom ----------------------------------------------------------------------------------------------


def test_every_room_has_a_line_in_the_table() -> None:
    assert {room(module) for module in MODULES} - {""} == set(ALLOWED)


@pytest.mark.parametrize("module", [module for module in MODULES if module != PACKAGE.name])
def test_a_module_imports_only_what_its_room_may(module: str) -> None:
    own = room(module)
    others = {name for name in imported(ast.walk(parsed(MODULES[module]))) if name.partition(".")[0] == PACKAGE.name}
    wrong = {name for name in others if room(name) not in ALLOWED[own] | {own}}
    assert not wrong, f"{own} may import {sorted(ALLOWED[own])} and not {sorted(wrong)}"


def needed(module: str) -> Iterator[str]:
    """Yield what is imported with a module: the packages that it is in, and what it names."""
    parts = module.split(".")
    yield from (".".join(parts[:count]) for count in range(1, len(parts)))
    yield from imported(run_at_import(parsed(MODULES[module])))


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) in WITHOUT_LIGHTNING])
def test_plain_modules_import_no_lightning_nor_do_those_that_they_import(module: str) -> None:
    ways, todo = {module: module}, [module]
    while todo:
        current = todo.pop()
        for name in needed(current):
            way = f"{ways[current]} -> {name}"
            assert name.partition(".")[0] not in LIGHTNING, way
            if name in MODULES and name not in ways:
                ways[name] = way
                todo.append(name)


def test_core_imports_no_lightning_within_functions_either() -> None:
    for module, file in MODULES.items():
        if room(module) == "core":
            found = {name.partition(".")[0] for name in imported(ast.walk(parsed(file)))}
            assert not found & LIGHTNING, module


def test_a_log_is_read_without_torch_and_lightning(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss\n0,1.5\n1,0.5\n")
    code = f"""
import sys
from pathlib import Path
from lightning_revbn.runs.logs import find_logs, read_scalars
(log,) = find_logs([Path({str(tmp_path)!r})])
print(read_scalars(log).series["loss"].values.tolist())
print(*{{"torch", "lightning", "pytorch_lightning"}} & sys.modules.keys())
"""
    assert run_code(code) == "[1.5, 0.5]\n\n"


# --- tests ------------------------------------------------------------------------------------------------------------


def test_no_test_imports_another_test_or_a_script() -> None:
    files = list(TESTS.rglob("*.py"))
    scripts = {file.stem for file in (TESTS / "processes" / "scripts").glob("*.py")}
    tests = {file.stem for file in files if file.stem.startswith("test_")}
    assert len(tests) > 30
    assert len(scripts) > 10
    for file in files:
        for name in imported(ast.walk(parsed(file))):
            assert not {*name.split(".")} & tests, f"{file} imports the test module {name}: share by tests/helpers"
            assert name.partition(".")[0] not in scripts, f"{file} imports the script {name}: share by tests/helpers"


def test_a_script_of_ranks_names_the_test_that_runs_it() -> None:
    for file in (TESTS / "processes" / "scripts").glob("*.py"):
        named = re.findall(r"test_\w+\.py", ast.get_docstring(parsed(file)) or "")
        assert named, f"{file} does not say which test runs it"
        for name in named:
            (test,) = TESTS.rglob(name)
            assert f'"{file.name}"' in test.read_text(), f"{file} is not run by {name}"


def test_only_the_runner_starts_processes() -> None:
    for file in [*TESTS.rglob("test_*.py"), *(TESTS / "helpers").glob("*.py")]:
        if file.name not in ("processes.py", "scripts.py"):
            assert "subprocess" not in set(imported(ast.walk(parsed(file)))), f"{file}: use helpers/scripts.py"


# --- the map ----------------------------------------------------------------------------------------------------------


def test_the_map_of_the_package_is_what_its_command_writes() -> None:
    assert filled(PAGE.read_text()) == PAGE.read_text()
    for file in MODULES.values():
        assert description(file), f"{file} has no docstring"
