"""What every command shares: help, version, completion, and a stdout that takes no text, or not every text."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.arms import BASELINE, BETTER, write_arm
from helpers.logs import write_csv
from helpers.models import residual_net
from helpers.processes import run_process
from helpers.scripts import ROOT

import lightning_revbn
from lightning_revbn.cli.main import main
from lightning_revbn.cli.terminal import print_json

COMMAND = f"{sys.executable} -m lightning_revbn"


def shell(line: str, **env: str) -> tuple[int, str, str]:
    """Run a line of bash, and return the exit code of its first command with what was printed."""
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = run_process(["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"], env={**own, **env}, check=False)
    return done.returncode, done.stdout, done.stderr


def two_arms(folder: Path) -> str:
    arms = write_arm(folder / "baseline", BASELINE), write_arm(folder / "größer_层", BETTER)
    return f"compare {arms[0]} --against {arms[1]} --metric test_acc"


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"lightning-revbn {lightning_revbn.__version__}\n"


@pytest.mark.parametrize("name", ["bash", "zsh", "tcsh"])
def test_shells_get_a_script_that_completes_commands_and_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--print-completion", name])
    assert exit_.value.code == 0
    script = capsys.readouterr().out
    for word in ("inspect", "plot", "compare", "against", "seed-pattern"):
        assert word in script


def test_the_completion_of_bash_completes(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_text("")
    ask = 'COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _shtab_lightning_revbn; printf "%s\\n" "${COMPREPLY[@]}"'
    for words, expected in (
        ("insp", "inspect"),
        ("compare --ag", "--against"),
        ("inspect --sort scale_s", "scale_std"),
        (f"inspect {tmp_path}/mod", f"{tmp_path}/model.ckpt"),
    ):
        line = f"source <({COMMAND} --print-completion bash); COMP_WORDS=(lightning-revbn {words}); {ask}"
        _, output, _ = shell(line)
        assert expected in output.split()


def test_completion_without_shtab_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "bash"]) == 1
    assert capsys.readouterr().err == ('lightning-revbn: completion needs shtab: pip install "lightning-revbn[cli]"\n')


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_every_encoding_of_stdout_takes_every_name(encoding: str, tmp_path: Path) -> None:
    code, output, errors = shell(f"{COMMAND} {two_arms(tmp_path)}", PYTHONIOENCODING=encoding)
    assert (code, errors) == (0, "")
    assert "er_" in output
    assert ("\\u5c42" in output) == (encoding != "utf-8")


@pytest.mark.parametrize("options", ["", " --json"])
def test_a_reader_that_goes_away_ends_the_command_in_silence(options: str, tmp_path: Path) -> None:
    code, _, errors = shell(f"{COMMAND} {two_arms(tmp_path)}{options} | true")
    assert (code, errors) == (141, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", ["--help", None])
def test_a_stdout_that_is_full_is_one_line(arguments: str | None, unbuffered: str, tmp_path: Path) -> None:
    line = f"{COMMAND} {arguments or two_arms(tmp_path)} > /dev/full"
    code, output, errors = shell(line, PYTHONUNBUFFERED=unbuffered)
    assert (code, output) == (1, "")
    assert errors == "lightning-revbn: standard output cannot be written: No space left on device\n"


def test_a_process_without_stdout_or_stderr_does_its_work(tmp_path: Path) -> None:
    assert shell(f"{COMMAND} {two_arms(tmp_path)} >&-") == (0, "", "")
    assert shell(f"{COMMAND} inspect nowhere.ckpt 2>&-") == (1, "", "")
    for unbuffered in ("", "1"):
        assert shell(f"{COMMAND} inspect nowhere.ckpt 2>/dev/full", PYTHONUNBUFFERED=unbuffered) == (1, "", "")


def test_an_interrupt_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.load", interrupt)
    assert main(["inspect", __file__]) == 130
    assert capsys.readouterr() == ("", "")


def test_errors_quote_the_command_line_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "no\x1b[2Jwhere\n.ckpt"]) == 1
    output = capsys.readouterr().err
    assert output.count("\n") == 1
    assert "\x1b" not in output
    with pytest.raises(SystemExit):
        main(["inspect", "x", "\x1b[2J"])
    assert "\x1b" not in capsys.readouterr().err


def test_paths_are_no_markup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run[").mkdir()
    torch.save(residual_net().state_dict(), tmp_path / "run[" / "x].pt")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["inspect", f"{tmp_path}/run[/x].pt"]) == 0
    output = capsys.readouterr().out
    assert "┃" in output
    assert "run[/x].pt: 3 batch norm layers" in output


def test_metrics_are_no_markup_and_labels_no_formulas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = [tmp_path / "a", tmp_path / "b"]
    for arm, scores in zip(arms, (BASELINE, BETTER), strict=True):
        for seed, score in enumerate(scores):
            write_csv(arm / f"seed_{seed}", [(20, {"acc[top1]": score})])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "300")
    options = ["--metric", "acc[top1]", "--labels", r"$\frac$" + "\x1b[2J\n", "-o", str(tmp_path / "pairs.svg")]
    assert main(["compare", str(arms[0]), "--against", str(arms[1]), *options]) == 0
    output = capsys.readouterr().out
    assert "acc[top1] of 6 pairs" in output
    assert "\x1b[2J" not in output
    assert "$" in (tmp_path / "pairs.svg").read_text()


def test_json_is_strict(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [math.nan, (math.inf, -math.inf, 1.5)], "b\udcff": "x\udcff", "c": None, "d": True})
    text = capsys.readouterr().out
    assert text.isascii()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": [None, [None, None, 1.5]],
        "b\\udcff": "x\\udcff",
        "c": None,
        "d": True,
    }
