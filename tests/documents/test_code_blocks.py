"""Blocks of code in README and docs run, in an empty folder, with the package installed from its wheel.

Python runs without extras, but for the pages that ask for them. Commands run after it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers.bare_environment import CLEAN, BareEnvironment, Environments
from helpers.installed_package import PLAIN
from helpers.pages import NEEDS, PAGES, Block, blocks_of
from helpers.processes import run_process
from helpers.scripts import ROOT

BARE = {"README.md", "docs/reading_the_plots.md"}
"""Pages among these whose Python needs no extra."""

AFTER: dict[str, list[str]] = {
    "README.md": [
        "trainer.fit_loop.max_epochs = 1; trainer.fit(model, data)",
        "",
    ],
    "docs/choosing_settings.md": [
        """
import copy, lightning
for callback in (fast_shifts, moderate, paper):
    lightning.Trainer(**quick, callbacks=[callback]).fit(copy.deepcopy(model), data)
"""
    ],
    "docs/demo.md": ["assert 0 < result.p_value < 0.05"],
    "docs/how_it_works.md": [
        """
import copy, lightning
lightning.Trainer(**quick, callbacks=[callback]).fit(copy.deepcopy(model), data)
""",
        "lightning.Trainer(**quick, callbacks=[callback]).fit(copy.deepcopy(model), data)",
    ],
    "docs/input_norm.md": [
        """
Data.train_dataloader = lambda self: raw
trainer.fit_loop.max_epochs = 1
trainer.fit(model, data_module)
""",
        "",
        "assert set(Sensors().input_norm) == {'rgb', 'radar', 'speed'}",
        """
Data.setup, Data.train_dataloader = setup, lambda self: self.train_data
load = lambda: (raw, raw)
L.Trainer(**quick).fit(model, collected := Data())
assert collected.input_statistics().count.tolist() == [2 * 48 * 36] * 3  # the pass, and an epoch
""",
    ],
    "docs/reading_the_plots.md": [
        """
import copy
for trainer in (baseline, revisited):
    trainer.fit_loop.max_epochs, trainer.log_every_n_steps = 2, 1
    trainer.fit(copy.deepcopy(model), data)
""",
        """
trainer.fit_loop.max_epochs, trainer.log_every_n_steps = 1, 1
trainer.fit(model, data)
""",
    ],
    "docs/together.md": [
        "trainer.fit_loop.max_epochs = 1; trainer.fit(model, data)",
        "Momentum()",
        "configure_optimizers(model)",
    ],
}
"""Code that follows the blocks of a page, in their order, for a Trainer has done nothing before it fits."""

PRINTED = {"docs/results.md": ["0.54", "0.39", "0.27", "0.19"], "docs/studies.md": ["19"]}
"""What blocks print, where their page says it."""

LOGS = """
import os, pathlib, sys

*arm, seed = sys.argv[1:]
revisited = "LIGHTNING_REVBN" in os.environ or arm in (["a"], ["b"])
scale = {"b": 0.5}.get("".join(arm), 0.1)
folder = pathlib.Path("logs", *(arm or ["revisited" if revisited else "baseline"]), seed)
folder.mkdir(parents=True)
(folder / "hparams.yaml").write_text(f"seed: {seed}\\n" + f"revbn/scale: {scale}\\n" * revisited)
(folder / "metrics.csv").write_text(f"step,epoch,test_acc\\n20,1,{0.9 + 0.01 * int(seed) * (1 + scale * revisited)}\\n")
"""
"""A script that leaves the logs of a run, of the arm and the seed that it is given."""


class Ran(NamedTuple):
    said: str
    folder: Path


def python_blocks(page: str) -> list[Block]:
    return [block for block in blocks_of(page, "python") if not block.file]


PYTHON = [page for page in PAGES if python_blocks(page)]


@pytest.fixture(scope="module")
def ran(
    environments: Environments, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> dict[str, Ran]:
    """What the Python of each page printed, or how it failed, and the folder in which it ran."""
    folder = tmp_path_factory.mktemp("pages")
    # Without the extra `plots` there is no TensorBoard, and a Trainer says so.
    filters = [*pytestconfig.getini("filterwarnings"), "ignore:.*`tensorboardX` has been removed:UserWarning"]
    filters += [
        "ignore:.*(You are using a CUDA device|`Trainer.fit` stopped|checkpoint directory|existing).*:UserWarning"
    ]
    result: dict[str, Ran] = {}
    for environment, is_bare in ((environments.bare, True), (environments.extras, False)):
        pages = [page for page in PYTHON if (page in BARE or page not in NEEDS) == is_bare]
        asked: dict[str, Any] = {}
        for page in pages:
            own = folder / Path(page).stem
            own.mkdir()
            blocks = python_blocks(page)
            after = [*AFTER.get(page, []), *[""] * len(blocks)]
            code = [["names.py", (ROOT / "tests" / "documents" / "names.py").read_text()]]
            for block, following in zip(blocks, after, strict=False):
                code += [[block.name, block.code], [f"what follows {block.name}", following]]
            asked[page] = {"folder": str(own), "blocks": code}
        script = folder / "run_blocks.py"
        shutil.copy(ROOT / "tests" / "processes" / "scripts" / "run_blocks.py", script)
        (folder / "asked.json").write_text(json.dumps({"pages": asked, "filters": filters}))
        said = environment.run("python", script, folder / "asked.json", cwd=folder).stdout
        result |= {page: Ran(text, Path(asked[page]["folder"])) for page, text in json.loads(said).items()}
    return result


@pytest.mark.parametrize("page", PYTHON)
def test_the_python_of_a_page_runs(page: str, ran: dict[str, Ran]) -> None:
    assert "Traceback" not in ran[page].said, ran[page].said
    for text in PRINTED.get(page, []):
        assert text in ran[page].said


# --- commands ---------------------------------------------------------------------------------------------------------


def run_shell(environment: BareEnvironment, commands: str, folder: Path) -> str:
    """Run commands of a page with the programs of an environment first on the path."""
    path = f"{environment.bin}{os.pathsep}{os.environ['PATH']}"
    return run_process(["sh", "-ec", commands], cwd=folder, env={**CLEAN, "PATH": path}).stdout


def shell_of(page: str, start: str) -> str:
    """Return the only block of shell on a page that starts with a text."""
    (found,) = (block.code for block in blocks_of(page, "sh") if block.code.startswith(start))
    return found


def test_the_readmes_loop_over_seeds_ends_in_a_comparison(environments: Environments, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(LOGS)
    said = run_shell(environments.extras, shell_of("README.md", "for seed in"), tmp_path)
    assert "test_acc of 5 pairs, paired t-test: proposed > baseline" in said


def test_arms_are_sorted_or_named_as_the_page_on_comparing_says(environments: Environments, tmp_path: Path) -> None:
    (tmp_path / "made.py").write_text(LOGS)
    for arm in ("baseline", "a", "b"):
        run_shell(environments.bare, "\n".join(f"python made.py {arm} {seed}" for seed in range(1, 7)), tmp_path)
    said = run_shell(environments.extras, shell_of("docs/comparing.md", "lightning-revbn compare"), tmp_path)
    assert said.count("test_acc of 6 pairs, paired t-test: proposed > baseline") == 2
    assert re.search(r"^scale=0.5 +\| 6 \|", said, re.MULTILINE)
    assert re.search(r"^b +\| 6 \|", said, re.MULTILINE)


def test_the_recipe_goes_from_one_script_to_an_answer_in_ten_lines_of_shell(
    environments: Environments, tmp_path: Path
) -> None:
    (script,) = (block for block in blocks_of("docs/comparing.md", "python") if block.file)
    (tmp_path / str(script.file)).write_text(script.code)
    recipe = shell_of("docs/comparing.md", f"python {script.file}")
    assert len(recipe.splitlines()) <= 10
    said = run_shell(environments.extras, recipe, tmp_path)
    assert "test_acc of 6 pairs, paired t-test: proposed > baseline" in said
    assert re.search(r"^scale=0.1 +\| 6 \|", said, re.MULTILINE)
    assert re.search(r"^scale=0.5: .*(higher than the|no effect in the declared)", said, re.MULTILINE)
    assert re.search(r"^scale=0.1: .*(ahead for good from step|not ahead at the last step)", said, re.MULTILINE)
    assert (tmp_path / "pairs.png").stat().st_size > 1000
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_a_first_run_is_inspected_before_and_after_and_drawn(environments: Environments, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(f'{PLAIN}    trainer.save_checkpoint("last.ckpt")\n')
    before, after = (block.code for block in blocks_of("docs/first_run.md", "sh"))
    assert "train:Net: 2 batch norm layers (2 rewrite)" in run_shell(environments.bare, before, tmp_path)
    run_shell(environments.bare, "LIGHTNING_REVBN=1 python train.py", tmp_path)
    assert "last.ckpt: 2 batch norm layers (2 revisited)" in run_shell(environments.extras, after, tmp_path)
    assert (tmp_path / "batch_norms.png").stat().st_size > 1000


def test_the_runs_of_the_page_on_plots_are_drawn(environments: Environments, ran: dict[str, Ran]) -> None:
    folder = ran["docs/reading_the_plots.md"].folder
    run_shell(environments.extras, shell_of("docs/reading_the_plots.md", "lightning-revbn plot"), folder)
    assert (folder / "batch_norms.png").stat().st_size > 1000
