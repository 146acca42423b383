"""What README and docs write as code: every block is run by some test, commands parse, and extras and files exist."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from importlib.metadata import metadata
from typing import Any

import pytest
import yaml
from helpers.pages import NEEDS, PAGES, Block, blocks_of, shell_lines, text_of
from helpers.scripts import ROOT
from packaging.requirements import Requirement

from lightning_revbn.cli import main as command

ALL = [block for page in PAGES for block in blocks_of(page)]
SHELL = [block for block in ALL if block.language == "sh" or (block.language == "text" and shell_lines(block))]
EXTRAS = set(metadata("lightning-revbn").get_all("Provides-Extra") or [])
PROJECT = (ROOT / "pyproject.toml").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

NOT_RUN = {
    "docs/switch_it_on.md": "tests/switches/test_switch_it_on.py runs them, in a copy of examples/",
    "docs/batch_norm_sync.md": "an hour over timm's models",
    "docs/gpu.md": "they need a GPU",
    "docs/results.md": "days of training",
    "docs/layers.md": "large models of other libraries, a run of the demo, and a damaged file",
    "docs/matrix.md": "480 trainings",
    "docs/studies.md": "tests/examples/test_study.py and test_optuna_study.py run smaller studies",
}
"""Pages whose commands need a clone, for a reason, and are parsed but not run here."""


class ParsedError(Exception):
    """Raised once a command line is parsed, in place of the work."""


@pytest.fixture
def only_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *arguments: Any) -> Any:
        parse(parser, *arguments)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.name)
def test_commands_are_those_that_the_programs_have(
    block: Block, only_parse: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {other.file for other in blocks_of(block.page) if other.file} | {"train.py"}
    for line in shell_lines(block):
        words = shlex.split(line.partition(" | ")[0], comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S+", words[0]):
            del words[0]
        program, *arguments = words
        if program == "lightning-revbn":
            with pytest.raises(ParsedError):
                command.main(arguments)
        elif program == "pip":
            assert arguments[0] == "install"
            for word in arguments[1:]:
                wanted = Requirement(f"lightning-revbn{word[1:]}" if word.startswith(".") else word)
                assert wanted.extras <= EXTRAS
                assert wanted.name == "lightning-revbn" or f'"{wanted.name}' in PROJECT
        elif program == "make":
            assert arguments[0] in TARGETS
        elif program == "python" and arguments[0] not in files:
            parse_script(arguments, monkeypatch)
        else:
            assert program in ("python", "for", "done", "exit"), line


def parse_script(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a script of the repository parse its command line, and stop it there."""
    script = next(path for path in (ROOT / arguments[0], ROOT / "examples" / arguments[0]) if path.exists())
    text = script.read_text()
    if "ArgumentParser" in text:
        monkeypatch.setattr(sys, "argv", arguments)
        monkeypatch.syspath_prepend(script.parent)
        with pytest.raises(ParsedError):
            runpy.run_path(str(script), run_name="__main__")
    else:  # it takes no options, those of LightningCLI or those of Hydra
        assert len(arguments) == 1 or "CLI(" in text or "hydra.main" in text


def test_every_block_of_shell_is_run_or_has_a_reason_why_not() -> None:
    run = {"README.md", "docs/comparing.md", "docs/first_run.md", "docs/reading_the_plots.md"}
    assert {block.page for block in SHELL} == run | NOT_RUN.keys()


# --- what else is written as code -------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [block for block in ALL if block.language == "yaml"], ids=lambda block: block.name)
def test_yaml_is_read(block: Block) -> None:
    assert isinstance(yaml.safe_load(block.code), dict)


def test_the_main_file_of_a_hydra_tree_is_a_part_of_the_examples() -> None:
    (block,) = (block for block in blocks_of("docs/switch_it_on.md", "yaml") if not block.file)
    shown = yaml.safe_load(block.code)
    whole = yaml.safe_load((ROOT / "examples" / "hydra" / "conf" / "config.yaml").read_text())
    assert shown["callbacks"] == whole["callbacks"]
    assert [entry for entry in shown["defaults"] if entry in whole["defaults"]] == shown["defaults"]


def test_there_is_no_block_in_another_language() -> None:
    known = {"python", "sh", "yaml", "text", "bibtex", "{eval-rst}", "{toctree}", "{include}"}
    assert {block.language for block in ALL} <= known


def test_files_of_the_reader_are_run_by_tests_of_their_pages() -> None:
    assert {block.page for block in ALL if block.file} == {"docs/comparing.md", "docs/switch_it_on.md"}


@pytest.mark.parametrize("page", NEEDS)
def test_a_page_says_what_its_blocks_need(page: str) -> None:
    assert [words for words in NEEDS[page] if words not in text_of(page)] == []


def test_extras_and_targets_of_make_exist_wherever_pages_name_them() -> None:
    for page in PAGES:
        text = text_of(page)
        for group in re.findall(r"(?:lightning-revbn|[\"' ]\.)\[([a-z,-]+)\]", text):
            assert set(group.split(",")) <= EXTRAS, page
        assert set(re.findall(r"`make ([a-z-]+)", text)) <= TARGETS, page
