"""What the package promises as a whole: a light import, plain core, documents that work."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lightning_revbn

ROOT = Path(__file__).parents[1]


def imported_by(statement: str) -> set[str]:
    """Top-level packages in `sys.modules` of a fresh interpreter after a statement."""
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_imports_nothing_beyond_torch_lightning_and_torchmetrics() -> None:
    own = imported_by("import lightning_revbn")
    theirs = imported_by("import torch, torchmetrics, lightning.pytorch")
    assert own - theirs == {"lightning_revbn"}


def test_core_never_imports_lightning() -> None:
    files = list((ROOT / "lightning_revbn" / "core").glob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert not name.startswith(("lightning.", "pytorch_lightning")), (file, name)
                assert not re.match(r"lightning_revbn(?!\.core)", name), (file, name)
                assert name != "lightning", file


def test_every_public_name_exists_and_has_a_docstring() -> None:
    for name in lightning_revbn.__all__:
        assert getattr(lightning_revbn, name).__doc__, name


def test_the_version_is_that_of_the_installed_package_and_of_the_changelog() -> None:
    assert lightning_revbn.__version__ == version("lightning-revbn")
    assert f"## [{lightning_revbn.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {lightning_revbn.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_torch_is_bounded_below_only_and_malicious_releases_of_lightning_are_excluded() -> None:
    needed = {r.name: r.specifier for r in map(Requirement, requires("lightning-revbn") or []) if not r.marker}
    assert {spec.operator for spec in needed["torch"]} == {">="}
    assert not {"2.6.2", "2.6.3"} & set(needed["lightning"].filter(["2.5.0", "2.6.2", "2.6.3", "2.6.6"]))
    assert set(needed) == {"torch", "lightning", "torchmetrics", "numpy"}


@pytest.mark.parametrize("document", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))])
def test_the_python_code_of_the_documents_runs(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run one after the other in one namespace, beside a small model and its data."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)
    from helpers import lit

    namespace = {"model": lit.LitNet(), "data": lit.loader(), "network": lit.residual_net()}
    for block in blocks:
        if re.match(r"# \S+\.py\n", block):  # a file, run by test_switch_it_on.py
            continue
        exec(compile(block, document, "exec"), namespace)
