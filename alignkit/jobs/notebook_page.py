"""An executed notebook as one HTML page: its text, code, printed lines and pictures; no script and no request."""

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path

from alignkit.errors import RunError
from alignkit.pages.render import picture, render
from alignkit.storage import read_json, write_atomically

TAGS = ("a", "abbr", "b", "blockquote", "br", "code", "dd", "del", "details", "div", "dl", "dt", "em", "h1", "h2", "h3",
        "h4", "h5", "h6", "hr", "i", "li", "ol", "p", "pre", "s", "small", "span", "strong", "sub", "summary", "sup",
        "table", "tbody", "td", "th", "thead", "tr", "ul")


def write_notebook_page(notebook: Path) -> Path | None:
    """Write NAME.html beside an executed notebook, if it is not there or older; None if the file is no notebook."""
    page = notebook.with_suffix(".html")
    if page.exists() and page.stat().st_mtime_ns >= notebook.stat().st_mtime_ns:
        return page
    try:
        cells = read_json(notebook).get("cells")
    except (OSError, RunError):
        return None
    if not isinstance(cells, list):
        return None
    write_atomically(page, render("notebook.html", name=notebook.stem, file=notebook.name,
                                  cells=[_cell(cell) for cell in cells if isinstance(cell, Mapping)]))
    return page


def _cell(cell: Mapping) -> dict:
    source = _joined(cell.get("source"))
    if cell.get("cell_type") == "markdown":
        return {"markdown": _markdown(source)}
    outputs = cell.get("outputs")
    return {"code": source, "outputs": [part for output in outputs if isinstance(output, Mapping)
                                        for part in _output(output)] if isinstance(outputs, list) else []}


def _output(output: Mapping) -> list[dict]:
    """A picture if the output has one, else its text."""
    data = output.get("data") if isinstance(output.get("data"), Mapping) else {}
    try:
        png = base64.b64decode(_joined(data.get("image/png")))
    except (binascii.Error, ValueError):
        png = b""
    metadata = output.get("metadata") if isinstance(output.get("metadata"), Mapping) else {}
    facts = metadata.get("image/png") if isinstance(metadata.get("image/png"), Mapping) else {}
    if shown := picture(png, str(facts.get("alt") or ""), width=facts.get("width")):
        return [{"picture": shown}]
    text = _joined(output.get("text")) or _joined(data.get("text/plain"))
    if output.get("output_type") == "error":
        text = f"{output.get('ename')}: {output.get('evalue')}"
    return [{"text": text}] if text.strip() else []


def _markdown(source: str):
    """A markdown cell as HTML in which only harmless tags are left."""
    import bleach
    from markupsafe import Markup
    from nbconvert.filters.markdown_mistune import markdown2html_mistune

    html = markdown2html_mistune(source)
    return Markup(bleach.clean(html, tags=TAGS, attributes={"a": ["href"], "abbr": ["title"]},
                               protocols=["http", "https"], strip=True))


def _joined(value: object) -> str:
    """Text of a notebook, which is stored as one string or a list of lines."""
    return "".join(line for line in ([value] if isinstance(value, str) else value if isinstance(value, list) else [])
                   if isinstance(line, str))
