"""The recipe of docs/comparing.md, run as it is written there."""

from __future__ import annotations

import re
from pathlib import Path

from helpers.scripts import ROOT, run_shell

PAGE = (ROOT / "docs" / "comparing.md").read_text()


def test_the_recipe_goes_from_one_script_to_an_answer_in_ten_lines_of_shell(tmp_path: Path) -> None:
    (script,) = re.findall(r"^```python\n# train.py\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "train.py").write_text(script)
    recipe = next(
        block for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) if "train.py" in block
    )
    assert len(recipe.splitlines()) <= 10
    said = run_shell(recipe, tmp_path)
    assert "test_acc of 6 pairs, paired t-test: proposed > baseline" in said
    assert re.search(r"^scale=0.1 +\| 6 \|", said, re.MULTILINE)
    assert re.search(r"^scale=0.5: .*(higher than the|no effect in the declared)", said, re.MULTILINE)
    assert re.search(r"^scale=0.1: .*(ahead for good from step|not ahead at the last step)", said, re.MULTILINE)
    assert (tmp_path / "pairs.png").stat().st_size > 1000
    assert (tmp_path / "curves.png").stat().st_size > 1000
