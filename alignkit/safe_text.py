"""Make model text safe to display: invisible characters are spelled out, and long text is truncated with a note."""

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
    """`text` as a plain string without active or hidden characters.

    Control characters become their pictures (ESC is shown as ␛, so an ANSI code stays text). Bidirectional marks,
    zero-width characters and lone surrogates become ⟨U+XXXX⟩. Line feeds and tabs are kept. Markup is not changed: the
    caller must show the result as text (`textContent`, `print`), never as HTML or Markdown.

    `limit` is the maximum number of characters shown; a longer text ends with a note on its length.
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
    """The same as `visible`, on one line: for names in messages and tables, where a line feed could fake a new line."""
    shown = visible(text, limit).replace("\t", "␉")
    return shown.replace("\n", "␊")


def in_red(text: str, stream=None) -> str:
    """`text` in red if `stream` (standard output) is a terminal and NO_COLOR is not set; otherwise unchanged."""
    return f"\x1b[31m{text}\x1b[0m" if (stream or sys.stdout).isatty() and not os.environ.get("NO_COLOR") else text


def markdown_cell(text: object, limit: int = 400) -> str:
    """Text for a cell of a Markdown table, or a line, escaped so that nothing is Markdown or HTML markup."""
    escaped = re.sub(r"([\\`*_~|$])|(?<=\])(?=[(\[:])|^(?=[#+>=-]|\d+[.)])", r"\\\1", one_line(text, limit).lstrip())
    escaped = escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"(?i)\b(https?|ftp|mailto|www)([:.])", r"\1\\\2", escaped)  # many viewers turn addresses into links


def csv_cell(value: object) -> object:
    """A value for a CSV file: numbers unchanged; text that a spreadsheet would read as a formula gets a leading '."""
    if not isinstance(value, str):
        return value
    begins = value[:1] in ("\t", "\r", "\n") or value.lstrip()[:1] in tuple("=+-@＝＋－＠")
    return "'" * begins + one_line(value)
