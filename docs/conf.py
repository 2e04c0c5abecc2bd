"""Sphinx configuration for ``make docs``. ``making.py`` generates some of the content."""

from __future__ import annotations

import sys
from pathlib import Path

import unrolled

sys.path.insert(0, str(Path(__file__).parent))

project = "unrolled"
author = "The unrolled authors"
release = version = unrolled.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "making",
    "search_texts",
]
exclude_patterns = ["_made", "_static"]

myst_enable_extensions = ["attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks contain their outputs; tests/project/test_notebooks.py checks them
nb_merge_streams = True
nb_ipywidgets_js: dict[str, object] = {}  # the defaults load scripts from the web

autodoc_typehints = "none"  # docstrings state types and shapes
autodoc_member_order = "bysource"
autosummary_generate = False  # the reference has a page for each topic, not for each name
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Options", "params_style"), ("Quantities", "params_style")]
napoleon_use_rtype = False
nitpick_ignore = [("py:class", "unrolled.tracing.step_recorder.RecordedDraws")]  # not public
# Objects of Python, torch, NumPy, pandas and matplotlib: their inventories aren't available offline.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|np|numpy|pandas|matplotlib|collections|typing|pathlib|os)\..*")
]

html_theme = "furo"
html_title = "unrolled"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_search_summary = False  # search_texts.py shows passages, also for pages opened from disk
html_show_copyright = False
pygments_style = "tango"
pygments_dark_style = "github-dark"
