"""Sphinx configuration; `make docs` builds with warnings as errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning_revbn

project = "lightning-revbn"
author = copyright = "The lightning-revbn authors"
version = release = lightning_revbn.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3  # links to sections, as GitHub has them
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_title = "lightning-revbn"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
# Docstrings write `code` as Markdown does.
default_role = "code"


def page_of(notebook: dict[str, Any]) -> str:
    """Return the cells of a notebook and their stored text as a page; a notebook reader would bring Jupyter along."""
    parts: list[str] = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        is_command = source.startswith("!")
        parts.append(f"```sh\n{source[1:]}\n```" if is_command else f"```python\n{source}\n```")
        parts += [f"```text\n{''.join(output['text']).strip()}\n```" for output in cell["outputs"]]
    return "\n\n".join(parts)


def fill_tutorial(app: Any, name: str, source: list[str]) -> None:
    if name == "tutorial":
        notebook = json.loads((Path(app.srcdir) / "tutorial.ipynb").read_text(encoding="utf-8"))
        source[0] = page_of(notebook) + "\n\nThis page is a notebook: {download}`tutorial.ipynb`.\n"


def setup(app: Any) -> None:
    app.connect("source-read", fill_tutorial)
