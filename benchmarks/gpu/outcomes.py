"""A plugin of pytest that writes down every test as it ends: one line of JSON in the file that a variable names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FILE = "REVBN_TEST_OUTCOMES"
"""The variable of the environment."""


def pytest_collection_finish(session: Any) -> None:
    """Write down which tests are to run."""
    _write({"chosen": [item.nodeid for item in session.items]})


def pytest_runtest_logreport(report: Any) -> None:
    """Write down a test: that it passed, or the phase that decided otherwise."""
    if report.when == "call" or report.outcome != "passed":
        lines = str(report.longrepr).strip().splitlines() if report.outcome != "passed" else []
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else "\n".join(lines[-6:])
        _write({"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "reason": reason})


def pytest_warning_recorded(warning_message: Any, nodeid: str) -> None:
    """Write down a warning, which is an error in the other runs of the tests."""
    _write({"warning": f"{warning_message.category.__name__}: {warning_message.message}"[:300], "test": nodeid})


def _write(entry: dict[str, Any]) -> None:
    with Path(os.environ[FILE]).open("a") as file:
        file.write(json.dumps(entry) + "\n")
