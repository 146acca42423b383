"""What the package promises as a whole: a light import, a version, documents that work."""

from __future__ import annotations

import re
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from helpers.lit import LitNet, loader
from helpers.models import residual_net
from helpers.scripts import ROOT, run_code
from packaging.requirements import Requirement

import lightning_revbn


def imported_by(statement: str) -> set[str]:
    """Top-level packages in `sys.modules` of a fresh interpreter after a statement."""
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(run_code(code).split())


def test_importing_the_package_imports_nothing_beyond_torch_lightning_and_torchmetrics() -> None:
    own = imported_by("import lightning_revbn")
    theirs = imported_by("import torch, torchmetrics, lightning.pytorch")
    assert own - theirs == {"lightning_revbn"}


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
    namespace = {"model": LitNet(), "data": loader(), "network": residual_net()}
    for block in blocks:
        if re.match(r"# \S+\.py\n", block):  # a file, run by test_switch_it_on.py
            continue
        exec(compile(block, document, "exec"), namespace)
