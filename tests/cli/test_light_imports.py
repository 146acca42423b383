"""Reading, comparing and drawing start in a fraction of a second: torch alone takes seconds to import."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.scripts import run_code

import lightning_revbn

PACKAGE = Path(lightning_revbn.__file__).parent
TRAINING = {"torch", "lightning", "pytorch_lightning"}
DRAWING = {"matplotlib", "PIL"}
OPTIONAL = {"rich", "scipy", "tensorboard"}


def modules(room: str) -> str:
    """Name all modules of a room, as in an import statement."""
    names = [path.stem for path in (PACKAGE / room).glob("*.py") if path.stem != "__init__"]
    assert names
    return ", ".join(f"lightning_revbn.{room}.{name}" for name in names)


def loaded_by(statement: str) -> set[str]:
    """Run a statement in a fresh interpreter, and return the names of packages and of our rooms that it loaded."""
    code = f"import sys; {statement}; print(); print(*sys.modules)"
    names = run_code(code).splitlines()[-1].split()
    return {name.partition(".")[0] for name in names} | {".".join(name.split(".")[:2]) for name in names}


@pytest.mark.parametrize(
    ("statement", "kept_out"),
    [
        (
            f"import {modules('runs')}",
            TRAINING | DRAWING | OPTIONAL | {"lightning_revbn.plots", "lightning_revbn.cli"},
        ),
        (f"import {modules('plots')}", TRAINING | OPTIONAL | {"lightning_revbn.cli"}),
        (
            "import lightning_revbn.cli.compare, lightning_revbn.cli.plot, lightning_revbn.cli.inspect",
            TRAINING | DRAWING | OPTIONAL | {"lightning_revbn.plots"},
        ),
    ],
    ids=["runs", "plots", "cli"],
)
def test_a_room_loads_neither_training_nor_the_rooms_that_stand_on_it(statement: str, kept_out: set[str]) -> None:
    loaded = loaded_by(statement)
    assert "numpy" in loaded  # so the names can be trusted
    assert not loaded & kept_out


def test_the_command_imports_nothing_heavy_before_it_is_used() -> None:
    loaded = loaded_by("from lightning_revbn.cli.main import main")
    assert "lightning_revbn.cli" in loaded
    assert not loaded & (TRAINING | DRAWING | OPTIONAL | {"lightning_revbn.plots"})


def test_commands_that_read_logs_run_without_torch(tmp_path: Path) -> None:
    log = tmp_path / "metrics.csv"
    log.write_text("revbn/a/scale_mean,step\n1.0,0\n0.9,1\n")
    figure = tmp_path / "figure.png"
    arguments = ["plot", str(log), "-o", str(figure)]
    loaded = loaded_by(f"from lightning_revbn.cli.main import main; assert main({arguments}) == 0")
    assert figure.exists()
    assert "matplotlib" in loaded
    assert not loaded & TRAINING
