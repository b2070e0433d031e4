"""Self-contained HTML pages: no script, no request, and no text of a model or a file is interpreted as markup.

The templates are beside this file. All template output is escaped, invisible characters are spelled out, and long text
is truncated with a note. Only the filter `visible(limit)` changes how much of a text is shown.
"""

import base64
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from alignkit.metrics import duration
from alignkit.safe_text import visible

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Picture:
    """A PNG displayed `width` CSS pixels wide; alt and caption are text."""

    png: bytes
    alt: str
    caption: str
    width: int
    height: int


def picture(png: bytes, alt: str, caption: str = "", width: int | None = None) -> Picture | None:
    """A picture for a page, at most as wide as its number of pixels. None if `png` is not a PNG."""
    if png[:8] != b"\x89PNG\r\n\x1a\n" or len(png) < 24:
        return None
    pixels, height = struct.unpack(">II", png[16:24])
    width = width if isinstance(width, int) and 0 < width <= pixels else pixels
    return Picture(png, alt or caption or "chart", caption, width, round(height * width / max(pixels, 1)))


def render(template: str, **facts: object) -> str:
    """The page that a template of this folder renders from `facts`."""
    return _templates().get_template(template).render(facts)


@cache
def _templates():
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup, escape

    def safe(value: object, limit: int = 400) -> Markup:
        return value if isinstance(value, Markup) else escape(visible(value, limit))

    def data_address(picture: Picture) -> Markup:
        return Markup(f"data:image/png;base64,{base64.b64encode(picture.png).decode()}")

    templates = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, finalize=safe, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )
    templates.tests["blank"] = lambda value: not visible(value).strip()
    templates.filters |= {"visible": safe, "duration": duration, "data_address": data_address}
    templates.globals["style"] = Markup((FOLDER / "page.css").read_text(encoding="utf-8"))
    return templates
