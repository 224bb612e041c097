"""The site: `make docs`. It needs no network, unless SUBGEN_DOCS_INTERSPHINX is set to link to NumPy's and Python's."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from docutils import nodes

import subgen

project = "subgen"
author = "The subgen developers"
project_copyright = "The subgen developers, Apache-2.0"
version = release = subgen.__version__

extensions = [
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx_copybutton",
    "sphinx_design",
    "command_line",
    "mathml",
]
exclude_patterns = ["_ext", "README.md"]
source_suffix = {".md": "myst-nb"}

# A name that nothing answers to is an error (`make docs` turns warnings into errors).
nitpicky = True
default_role = "py:obj"
nitpick_ignore_regex = [
    # Classes of others, where a base class is shown.
    (r"py:.*", r"(transformers|torch|numpy|typing|collections|array_api_compat)\..*"),
    (r"py:.*", r"(Cache|RuntimeError|ValueError|Protocol)"),
]
if os.environ.get("SUBGEN_DOCS_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "numpy": ("https://numpy.org/doc/stable", None),
    }

autodoc_typehints = "none"  # the docstrings say more: shapes
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_xref_param_type = False
# What is checked of every docstring on the site. Left out: a period after each field, sections that private or obvious
# functions do without (the linter sees to the rest).
numpydoc_validation_checks = {"GL01", "GL06", "GL07", "GL08", "SS01", "SS04", "PR01", "PR02", "PR10", "RT05"}
numpydoc_validation_exclude = {
    # Modules for contributors: a line and the shapes do.
    r"subgen\.(default\.\w+|paper\.\w+|io\.(save|validate)|leaders|reservoirs|softmax|evaluation\.baselines\.\w+)\.",
    # Results, whose fields stand under "Attributes"; and constants, whose docstring is no attribute of theirs.
    r"subgen\.evaluation\.(plan\.\w+|tasks\.(Question|Sample)|compare\.Comparison|baselines\.Baseline|stream\.Report)$",
    r"subgen\.(io\.captures\.Capture|layout\.Layout|sketch\.Checked)$",
    r"subgen\.theory\.(MassBounds|SampleSizes)$",
    r"\.(CacheReport|LayerReport)$",
    r"\.(PORTABLE|BASELINES|METHODS|TASKS)$",
    # What Transformers asks of a cache, and a budget of a sketch: see the class they come from.
    r"\.(reorder_cache|batch_select_indices|SubGenCache\.update|Power\.clusters)$",
}

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "attrs_inline", "attrs_block"]
myst_heading_anchors = 3

# Every page's code runs when the site is built. SUBGEN_DOCS_EXECUTE=cache runs only what changed, while one writes.
nb_execution_mode = os.environ.get("SUBGEN_DOCS_EXECUTE", "force")
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_execution_show_tb = True
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars; errors stop the build
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"

html_theme = "furo"
html_title = "subgen"
html_static_path = ["_static"]
html_css_files = ["site.css"]
smartquotes = False
html_show_sphinx = False
html_domain_indices = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5394", "color-brand-content": "#0b5394"},
    "dark_css_variables": {"color-brand-primary": "#7fb8ee", "color-brand-content": "#7fb8ee"},
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
pygments_style = "friendly"
pygments_dark_style = "monokai"


def setup(app: object) -> None:
    """Cut the empty line that doctest needs at the end of a block."""
    app.connect("doctree-read", _trim_blocks)  # type: ignore[attr-defined]


def _trim_blocks(app: object, doctree: nodes.document) -> None:
    for block in doctree.findall(nodes.literal_block):
        if block.rawsource == block.astext():
            block.rawsource = block.rawsource.rstrip()
            block.children = [nodes.Text(block.rawsource)]
