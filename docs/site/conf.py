"""Sphinx settings of the documentation site; `build.py` prepares the pages and starts Sphinx."""

import re

import latex2mathml.converter

import alignkit

project, author, release = "alignkit", "alignkit contributors", alignkit.__version__
copyright = author
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["**/.ipynb_checkpoints"]
templates_path, html_static_path, html_extra_path = [], ["static"], ["extra"]
default_role = "code"  # a name between single backquotes in a docstring is code
nb_execution_mode = "off"  # the notebooks come executed, by papermill
nb_merge_streams = True
nb_mime_priority_overrides = [("html", "text/html", 40)]
myst_enable_extensions = ["dollarmath", "amsmath", "html_image", "deflist"]
myst_dmath_double_inline = True
myst_heading_anchors = 4
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header", "misc.highlighting_failure", "docutils"]
# "docutils": a docstring in an unusual layout is no reason to have no site
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature has them
html_theme = "pydata_sphinx_theme"
html_title = "alignkit"
html_css_files, html_js_files = ["site.css"], ["frames.js"]
html_favicon = "static/icon.svg"  # without one a browser asks for /favicon.ico, which is not there
html_copy_source = html_show_sourcelink = False
html_theme_options = {
    "logo": {"text": "alignkit"}, "show_prev_next": True, "navigation_with_keys": False, "footer_start": [],
    "footer_end": [], "secondary_sidebar_items": ["page-toc"], "navbar_align": "left",
    "header_links_before_dropdown": 6,
}
html_context = {"default_mode": "auto"}  # light or dark as the reader's system is
html_math_renderer = "mathml"


def _mathml(writer, node, display: str) -> None:
    """Write a formula as MathML, which browsers draw themselves: no script, and nothing from a CDN."""
    from docutils.nodes import SkipNode

    formula = latex2mathml.converter.convert(node.astext(), display=display)
    writer.body.append(formula if display == "inline" else f'<div class="math">{formula}</div>\n')
    raise SkipNode


def _docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """Turn a docstring, which is plain text with Markdown's code marks, into reStructuredText.

    Fenced code becomes a code block; a paragraph with lists or indented lines keeps its lines; elsewhere `*`, `|` and a
    final `_` are no markup. Sections such as Args are left to napoleon.
    """
    turned: list[str] = []
    for block in re.split(r"(^```.*?^```$)", "\n".join(lines), flags=re.M | re.S):
        if block.startswith("```"):
            code = block.splitlines()[1:-1]
            turned += ["", ".. code-block:: python", "", *(f"   {line}" for line in code), ""]
            continue
        for paragraph in block.split("\n\n"):
            rows = [_escaped(row) for row in paragraph.splitlines()]
            listed = any(re.match(r"\s+\S|\d+\.\s|[*•-]\s", row) for row in paragraph.splitlines()[1:])
            section = re.match(r"\s*(Args|Raises|Returns|Yields|Examples?):", paragraph)
            turned += [f"| {row}" for row in rows] if listed and not section else rows
            turned.append("")
    lines[:] = turned


def _escaped(row: str) -> str:
    parts = re.split(r"(`[^`]*`)", row)
    return "".join(part if i % 2 else re.sub(r"([*|]|(?<=\w)_(?!\w))", r"\\\1", part) for i, part in enumerate(parts))


def setup(app) -> None:
    """Formulas as MathML, and docstrings as they are written."""
    app.connect("autodoc-process-docstring", _docstring, priority=400)  # before napoleon
    app.add_html_math_renderer("mathml", (lambda writer, node: _mathml(writer, node, "inline"), None),
                               (lambda writer, node: _mathml(writer, node, "block"), None))
