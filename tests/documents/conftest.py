from __future__ import annotations

import pytest
from helpers.bare_environment import Environments, build_distributions, make_environment


@pytest.fixture(scope="session")
def environments(tmp_path_factory: pytest.TempPathFactory) -> Environments:
    folder = tmp_path_factory.mktemp("environments")
    _, wheel = build_distributions(folder / "dist")
    also = ["scikit-learn", "timm"]
    bare, extras = folder / "bare", folder / "extras"
    return Environments(make_environment(bare, wheel), make_environment(extras, wheel, ["compare", "plots"], also))
