"""What contributors and the hosts of the repository read: workflows, hooks, and the version in its few places."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from helpers.scripts import ROOT

import lightning_revbn

GITHUB = sorted((ROOT / ".github").rglob("*.yml"))
PROJECT = (ROOT / "pyproject.toml").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def workflow(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())["jobs"]


def commands(jobs: dict[str, Any]) -> str:
    return "\n".join(step["run"] for job in jobs.values() for step in job["steps"] if "run" in step)


@pytest.mark.parametrize("file", [*GITHUB, ROOT / ".pre-commit-config.yaml"], ids=lambda file: file.name)
def test_files_of_the_host_are_yaml(file: Any) -> None:
    assert isinstance(yaml.safe_load(file.read_text()), dict)


def test_ci_tests_every_python_that_the_package_names() -> None:
    named = re.findall(r"Python :: (3\.\d+)", PROJECT)
    assert workflow("ci.yml")["test"]["strategy"]["matrix"]["python"] == named
    assert f'requires-python = ">={named[0]}"' in PROJECT


def test_ci_runs_lint_tests_floors_documentation_and_distributions() -> None:
    run = re.findall(r"make ([a-z-]+)", commands(workflow("ci.yml")))
    assert {*run} == {"lint", "test", "test-lowest", "docs", "dist"}
    for target in (*run, *re.findall(r"make ([a-z-]+)", commands(workflow("release.yml")))):
        assert f"\n{target}:" in MAKEFILE


def test_a_release_is_published_from_what_the_same_workflow_built_and_checked() -> None:
    jobs = workflow("release.yml")
    assert jobs["publish"]["needs"] == "build"
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "make dist" in commands(workflow("release.yml") | {"publish": {"steps": []}})
    uploaded, downloaded = jobs["build"]["steps"][-1]["with"], jobs["publish"]["steps"][0]["with"]
    assert uploaded == downloaded == {"name": "dist", "path": "dist"}


def test_the_hook_of_ruff_has_the_version_of_make_lint() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (ruff,) = (repo["rev"] for repo in hooks if repo["repo"].endswith("ruff-pre-commit"))
    assert f'"ruff=={ruff.removeprefix("v")}"' in PROJECT


def test_the_version_stands_in_one_place_of_the_package() -> None:
    assert 'dynamic = ["version"]' in PROJECT
    assert not re.search(r'^version = "', PROJECT, re.MULTILINE)
    version = lightning_revbn.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    newest = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert newest == version


def test_a_report_of_a_bug_asks_for_inspect_and_for_versions() -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())["body"]
    required = {field["id"] for field in form if field["validations"]["required"]}
    assert required == {"happened", "script", "inspect", "versions"}
    (asked,) = (field["attributes"]["label"] for field in form if field["id"] == "inspect")
    assert "`lightning-revbn inspect`" in asked
