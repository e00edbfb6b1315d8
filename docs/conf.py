"""Sphinx' configuration: `make docs` builds the site into docs/_build/html, with every warning an error."""

import os
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parent / "extensions"), str(Path(__file__).parent.parent)]

project = "interp-workbench"
author = "the interp-workbench contributors"
version = release = installed_version("interp-workbench")

extensions = ["myst_parser", "sphinx.ext.autodoc", "plain_docstrings", "reference"]
exclude_patterns = ["_build", "extensions"]
smartquotes = False  # would turn the dashes of --option into one
highlight_language = "none"
html_theme = "furo"
html_title = f"interp-workbench {version}"

default_role = "py:obj"
suppress_warnings = ["toc.empty_glob"]  # methods/* is for pages that the table of contents does not name yet
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
toc_object_entries = False
