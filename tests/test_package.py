"""What the package promises as a whole: a light import, a version, its dependencies."""

from __future__ import annotations

from importlib.metadata import requires, version

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
