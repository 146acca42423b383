"""The wheel and the sdist: what they hold, and that the wheel alone is enough to work with."""

from __future__ import annotations

import re
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.bare_environment import build_distributions, make_environment
from helpers.installed_package import check_installed
from helpers.scripts import ROOT

import lightning_revbn


class Built(NamedTuple):
    """The distributions, and the names of the files in them."""

    wheel: Path
    in_wheel: set[str]
    in_sdist: set[str]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    sdist, wheel = build_distributions(tmp_path_factory.mktemp("dist"))
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    return Built(wheel, in_wheel, in_sdist)


def metadata(built: Built, name: str) -> str:
    with zipfile.ZipFile(built.wheel) as archive:
        (found,) = (entry for entry in built.in_wheel if entry.endswith(f".dist-info/{name}"))
        return archive.read(found).decode()


def test_the_wheel_holds_the_modules_and_their_type_marker_and_nothing_else(built: Built) -> None:
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "lightning_revbn").rglob("*.py")}
    rest = {name for name in built.in_wheel if ".dist-info/" not in name}
    assert rest == modules | {"lightning_revbn/py.typed"}


def test_the_wheel_has_the_licence_the_command_and_an_entry_point_for_each_of_lightnings_packages(built: Built) -> None:
    assert metadata(built, "licenses/LICENSE") == (ROOT / "LICENSE").read_text()
    sections = dict(re.findall(r"^\[(.*)\]\n(.*)", metadata(built, "entry_points.txt"), re.MULTILINE))
    variable = "revbn = lightning_revbn.switches.environment:callbacks"
    assert sections == {
        "console_scripts": "lightning-revbn = lightning_revbn.cli.main:main",
        "lightning.pytorch.callbacks_factory": variable,
        "pytorch_lightning.callbacks_factory": variable,
    }


def test_the_wheel_and_its_metadata_have_the_version_of_the_package(built: Built) -> None:
    assert built.wheel.name.split("-")[1] == lightning_revbn.__version__
    described = message_from_string(metadata(built, "METADATA"))
    assert described["Version"] == lightning_revbn.__version__
    assert described.get_payload() == (ROOT / "README.md").read_text()


def test_the_sdist_holds_what_the_readme_and_the_guide_for_contributors_speak_of(built: Built) -> None:
    folders = {name.rpartition("/")[0] for name in built.in_sdist}
    spoken_of: set[str] = set()
    for page in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / page).read_text()
        links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
        files = re.findall(r"`([\w./-]+(?:\.(?:md|py|toml|cff|yml|yaml|ipynb)|/))`", text)
        spoken_of |= {name.rstrip("/") for name in (*links, *files) if (ROOT / name).exists()}
    assert spoken_of >= {"CITATION.cff", "CONTRIBUTING.md", "docs/digits.png", "examples/minimal.py"}
    assert spoken_of - built.in_sdist - folders == set()
    assert {"Makefile", "LICENSE", "pyproject.toml"} <= built.in_sdist  # `make demo`, `make test`


def test_the_sdist_has_every_test_and_nothing_that_a_run_made(built: Built) -> None:
    tests = {str(file.relative_to(ROOT)) for file in (ROOT / "tests").rglob("*.py")}
    assert tests <= built.in_sdist
    made = {name for name in built.in_sdist if re.search(r"__pycache__|(^|/)(_build|dist|runs)/|\.(ckpt|pyc)$", name)}
    made -= {name for name in made if re.match(r"(lightning_revbn|tests)/runs/[^/]*\.py$", name)}
    assert made == set()


def test_the_wheel_without_extras_imports_trains_answers_the_variable_and_inspects(
    built: Built, tmp_path: Path
) -> None:
    environment = make_environment(tmp_path / "environment", built.wheel)
    (tmp_path / "work").mkdir()
    check_installed(environment, tmp_path / "work")
