"""A widget's view as one HTML file that works without Python, from a disk or a web server.

The view is the same JavaScript as in a notebook. In the notebook a kernel answers its messages; in the page a script
does, from data that was computed beforehand.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

FOLDER = Path(__file__).parent
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"  # no request


def live_page(title: str, about: str, widget: Path, style: Path, script: str, data: object) -> str:
    """A page that shows a widget.

    title: of the page. about: a sentence below the widget, where its data come from. widget, style: the JavaScript and
    CSS of an anywidget. script: the file of this folder that answers the widget's messages. data: JSON for the script.

    Raises ValueError if the widget's JavaScript has no single default export.
    """
    code, exports = re.subn(r"(?m)^export default ", "const widget = ", widget.read_text(encoding="utf-8"))
    if exports != 1:
        raise ValueError(f"{widget} has {exports} lines that begin with `export default`, expected 1")
    page = (FOLDER / "page.html").read_text(encoding="utf-8")
    css = [path.read_text(encoding="utf-8") for path in (FOLDER / "page.css", style)]
    scripts = [(FOLDER / name).read_text(encoding="utf-8") for name in ("page.js", script)]
    parts = {
        "policy": _POLICY, "title": html.escape(title), "about": html.escape(about), "style": "\n".join(css),
        "data": json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        "script": "\n".join([code, *scripts]),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], page)
