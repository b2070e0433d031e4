"""HTML pages that need nothing else: no script, no request, and no text of a model or a file that is read as markup."""

import base64
import html
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

from alignkit.safe_text import visible

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page around `parts`, which are HTML already; the title is text."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    body = "\n".join(filter(None, parts))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{text(title)}</title><style>\n{style}</style></head><body><main>\n{body}\n</main></body></html>\n"
    )


def section(heading: str, *parts: str, name: str = "", css: str = "") -> str:
    """A section under a heading, which is text; the parts are HTML already. "" if there is nothing in it."""
    inside = "".join(parts)
    place = f' id="{text(name)}"' if name else ""
    return f'<section{place} class="{css}"><h2>{text(heading)}</h2>{inside}</section>' if inside else ""


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], css: str = "") -> str:
    """A table whose first column names its rows; head and rows are HTML already, caption is text. "" without rows."""
    heads = "".join(f"<th scope=col>{cell}</th>" for cell in head)
    lines = [
        f"<tr><th scope=row>{first}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>" for first, *rest in rows
    ]
    if not lines:
        return ""
    body, caption = "\n".join(lines), text(caption)
    return (
        f'<div class="scroll {css}" role=region tabindex=0 aria-label="{caption}"><table><caption>{caption}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )


def figure(png: bytes, alt: str, caption: str = "", width: int | None = None) -> str:
    """A figure with the picture in it; alt and caption are text. "" if `png` is not a PNG."""
    if png[:8] != b"\x89PNG\r\n\x1a\n" or len(png) < 24:
        return ""
    pixels, height = struct.unpack(">II", png[16:24])
    width = width if isinstance(width, int) and 0 < width <= pixels else pixels
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return (
        f'<figure><img src="{source}" alt="{text(alt or caption or "chart")}"'
        f" width={width} height={round(height * width / max(pixels, 1))}>{below}</figure>"
    )


def text(value: object, limit: int = 400) -> str:
    """Any text as HTML in which nothing acts and nothing hides; longer text is cut with a note."""
    return html.escape(visible(value, limit), quote=True)
