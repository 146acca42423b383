from __future__ import annotations

import os
import re

from helpers.scripts import ROOT, run_python


def test_whatever_is_given_ends_in_a_result_or_in_one_line() -> None:
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    script = ROOT / "tests" / "processes" / "scripts" / "fuzz_command.py"
    done = run_python(script, "--targets", 60, "--values", 40, "--seed", 1000, env=paths)
    targets, values, memory = done.stdout.splitlines()[-3:]
    assert re.fullmatch(r"60 targets .*: \d+ a result, \d+ one line", targets)
    assert re.fullmatch(r"40 values .*: \d+ a result, \d+ one line", values)
    assert int(re.findall(r"\d+", memory)[0]) < 2000
