"""What is public: modules list it in `__all__`, and the reference has what is offered to users."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from types import FunctionType

import pytest
from helpers.modules import MODULES, PACKAGE, parsed
from helpers.scripts import ROOT


def public(module: str) -> list[str]:
    return list(getattr(import_module(module), "__all__", []))


@pytest.mark.parametrize("module", [module for module in MODULES if module != f"{PACKAGE.name}.__main__"])
def test_functions_and_classes_are_in_all_or_begin_with_an_underscore(module: str) -> None:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    defined = [node.name for node in parsed(MODULES[module]).body if isinstance(node, kinds)]
    listed = public(module)
    unlisted = [name for name in defined if not name.startswith("_") and name not in listed]
    assert not unlisted, f"{module}.__all__ lacks {unlisted}"
    missing = [name for name in listed if not hasattr(import_module(module), name)]
    assert not missing, f"{module} has no {missing}, which its __all__ has"


REFERENCE = (ROOT / "docs" / "api.md").read_text()
DOCUMENTED = re.findall(r"^\.\. auto(?:class|function|data|exception):: (\S+)$", REFERENCE, re.MULTILINE)
# Packages offer names to users; modules also to each other. `compare` is a module of its own.
PACKAGES = [name for name, file in MODULES.items() if file.name == "__init__.py"]


@pytest.mark.parametrize("module", [*PACKAGES, f"{PACKAGE.name}.compare"])
def test_the_reference_has_every_name_that_is_offered_to_users(module: str) -> None:
    documented = {id(named(name)) for name in DOCUMENTED}
    offered = {name: named(f"{module}.{name}") for name in public(module)}
    kinds = (type, FunctionType)  # an alias of a type is explained where it is used
    missing = [name for name, own in offered.items() if isinstance(own, kinds) and id(own) not in documented]
    assert not missing, f"docs/api.md lacks {missing} of {module}"


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_name_in_the_reference_is_public_and_has_a_docstring(name: str) -> None:
    module, _, own = name.rpartition(".")
    assert own in public(module), f"{module}.__all__ lacks {own}, which docs/api.md has"
    assert named(name).__doc__


def named(name: str) -> object:
    module, _, own = name.rpartition(".")
    return getattr(import_module(module), own)
