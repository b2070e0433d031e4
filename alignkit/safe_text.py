"""Model text made safe to look at: what cannot be seen is spelled out, what is too long is cut with a note."""

from __future__ import annotations

import os
import re
import sys
import unicodedata

_KEPT = {"\n", "\t", "\u200c", "\u200d"}  # line feed, tab, and the joiners that scripts and emoji need
_HIDDEN = {
    "Cc",
    "Cf",
    "Cs",
    "Zl",
    "Zp",
}  # control, format (bidi, zero width), lone surrogate, line and paragraph separators


def visible(text: object, limit: int = 400) -> str:
    """`text` as a plain string in which nothing acts and nothing hides.

    Control characters become their pictures (ESC is shown as ␛, so an ANSI code stays text), bidirectional marks,
    zero-width characters and lone surrogates become ⟨U+XXXX⟩; line feeds and tabs stay. Markup is left as it is: the
    caller shows the result as text (`textContent`, `print`), never as HTML or Markdown.

    `limit` is the number of characters that are shown; a longer text ends in a note that says how long it is.
    """
    text = text if isinstance(text, str) else str(text)
    shown = "".join(_visible_character(c) for c in text[:limit])
    return shown if len(text) <= limit else f"{shown}… [{len(text):,} characters, the first {limit} are shown]"


def _visible_character(character: str) -> str:
    if character in _KEPT or unicodedata.category(character) not in _HIDDEN:
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def one_line(text: object, limit: int = 400) -> str:
    """As `visible`, and on one line: for names in messages and tables, where a line feed could forge a line."""
    shown = visible(text, limit).replace("\t", "␉")
    return shown.replace("\n", "␊")


def in_red(text: str, stream=None) -> str:
    """`text` in red where `stream` (standard output) is a terminal and NO_COLOR is not set; elsewhere as it is."""
    return f"\x1b[31m{text}\x1b[0m" if (stream or sys.stdout).isatty() and not os.environ.get("NO_COLOR") else text


def markdown_cell(text: object, limit: int = 400) -> str:
    """Text for a cell of a Markdown table, or a line, in which nothing is markup: neither Markdown nor HTML."""
    escaped = re.sub(r"([\\`*_~|$])|(?<=\])(?=[(\[:])|^(?=[#+>=-]|\d+[.)])", r"\\\1", one_line(text, limit).lstrip())
    escaped = escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"(?i)\b(https?|ftp|mailto|www)([:.])", r"\1\\\2", escaped)  # many readers make links of addresses


def csv_cell(value: object) -> object:
    """A value for a CSV file: a number as it is; text that a spreadsheet would take for a formula begins with '."""
    if not isinstance(value, str):
        return value
    begins = value[:1] in ("\t", "\r", "\n") or value.lstrip()[:1] in tuple("=+-@＝＋－＠")
    return "'" * begins + one_line(value)
