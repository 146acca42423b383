"""Sphinx configuration; `make docs` builds with warnings as errors."""

from __future__ import annotations

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
