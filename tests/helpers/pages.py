"""The pages of the documentation: README and docs/, and the fenced blocks in them."""

from __future__ import annotations

import re
import textwrap
from typing import NamedTuple

from helpers.scripts import ROOT

PAGES = ["README.md", *sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("docs/*.md"))]
FENCE = re.compile(r"^( *)```([\w{}-]*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


NEEDS = {
    "docs/demo.md": ["`compare`"],
    "docs/results.md": ["`compare`"],
    "docs/studies.md": ["the extra `compare`"],
    "docs/together.md": ["timm"],
    "docs/comparing.md": ["`compare`", "`plots`", "scikit-learn"],
    "docs/first_run.md": ["`plots`"],
    "docs/reading_the_plots.md": ["`plots`"],
    "README.md": ["[compare,plots]"],
}
"""What blocks of a page need beside the package, in the words in which the page says it."""


class Block(NamedTuple):
    """A fenced block."""

    page: str
    line: int
    language: str
    code: str
    file: str | None
    """The name in its first line, `# train.py` for one, if the block is a file of the reader's."""

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def blocks_of(page: str, *languages: str) -> list[Block]:
    """Return the blocks of a page in these languages, or in all."""
    text = text_of(page)
    found: list[Block] = []
    for match in FENCE.finditer(text):
        named = re.match(r"# (\S+\.(?:py|yaml))\n", textwrap.dedent(match[3]))
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page, line, match[2], textwrap.dedent(match[3]), named[1] if named else None))
    return [block for block in found if not languages or block.language in languages]


def shell_lines(block: Block) -> list[str]:
    """Return the commands of a block of shell, or those after a prompt in a block of output."""
    lines = block.code.replace("\\\n", " ").splitlines()
    if block.language == "text":
        return [line[2:] for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip()]
