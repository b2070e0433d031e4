"""A board as a picture, for places without a live page: prompts, responses with marked differences, and the results."""

from __future__ import annotations

import re
import warnings

from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch
from matplotlib.textpath import text_to_path

from alignkit import plots

_WIDTH, _LINE, _SIZE = 9.6, 0.19, 9.0  # inches, inches, points
_LINES = 12  # of a response; more is cut with a note
_PLAIN = {"parse_math": False, "va": "baseline"}


def draw_board(title: str, status: str, items: list, results: list) -> tuple[bytes, dict]:
    """One PNG with its size and alt text. items: (prompt, cards) as sent to a page; results: as sent to a page."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # missing glyphs are drawn as a box
        return _draw(title, status, items, results)


def _draw(title: str, status: str, items: list, results: list) -> tuple[bytes, dict]:
    blocks = [_block(prompt, cards) for prompt, cards in items]
    total = 0.62 + sum(block[0] for block in blocks) + 0.26 * len(results) + 0.12
    figure = plots.Picture(figsize=(_WIDTH, total), facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, _WIDTH), ylim=(total, 0))
    ax.set_axis_off()
    ax.text(0.12, 0.26, title, fontsize=11.5, fontweight="bold", color=plots.INK, **_PLAIN)
    ax.text(0.12, 0.48, _text(_wrap([(status, False)], _WIDTH - 0.3)[0]), fontsize=8.5, color=plots.MUTED, **_PLAIN)
    top = 0.62
    for height, prompt, cards in blocks:
        for number, line in enumerate(prompt):
            y = top + 0.16 + _LINE * number
            ax.text(0.12, y, _text(line), fontsize=_SIZE, color=plots.INK, fontweight="bold", **_PLAIN)
        y, width = top + 0.1 + _LINE * len(prompt), _card_width(len(cards))
        for place, (head, lines) in enumerate(cards):
            x = 0.12 + place * (width + 0.16)
            shape = {"boxstyle": "round,pad=0,rounding_size=0.05", "fc": "#fafafa", "ec": plots.EDGE, "lw": 0.8}
            ax.add_patch(FancyBboxPatch((x, y), width, top + height - y - 0.16, **shape))
            ax.text(x + 0.1, y + 0.19, head, fontsize=8.5, fontweight="bold", color=plots.MUTED, **_PLAIN)
            for number, line in enumerate(lines):
                _draw_line(ax, x + 0.1, y + 0.42 + _LINE * number, line)
        top += height
    for row in results:
        _result(ax, top, row)
        top += 0.26
    png, metadata = figure._repr_png_()
    words = "; ".join([title, status, *(prompt for prompt, _ in items), *(row["text"] for row in results)])
    return png, metadata | {"alt": words[:1000]}


def _text(line: list) -> str:
    return "".join(word for word, _ in line)


def _card_width(count: int) -> float:
    return (_WIDTH - 0.24 - 0.16 * (count - 1)) / count


def _block(prompt: str, cards: list) -> tuple[float, list, list]:
    """Height in inches, the lines of the prompt, and (head, lines) of each card."""
    asked = _wrap([(prompt, False)], (_WIDTH - 0.24) / 1.17)[:4]
    drawn = []
    for card in cards:
        chosen = "chosen ✓" if card["chosen"] else ""
        head = " · ".join(filter(None, (card["label"], card["name"], card["tag"], chosen)))
        lines = _wrap(card["pieces"] or [("(says nothing)", False)], _card_width(len(cards)) - 0.2)
        if len(lines) > _LINES:
            lines = [*lines[: _LINES - 1], [("… (more in the notebook)", False)]]
        drawn.append((head, lines))
    rows = max(len(lines) for _, lines in drawn)
    return 0.2 + _LINE * len(asked) + 0.42 + _LINE * rows + 0.14, asked, drawn


def _wrap(pieces: list, width: float) -> list[list[tuple[str, bool]]]:
    """Lines of (word, differs) that fit in `width` inches; a word that does not fit is cut."""
    lines: list[list[tuple[str, bool]]] = [[]]
    used = 0.0
    for piece, differs in pieces:
        for word in re.findall(r"\n|[^\S\n]*[^\s]{1,24}|[^\S\n]+", piece):
            if len(lines) > 2 * _LINES:
                return lines
            wide = _inches(word)
            if word == "\n" or (used + wide > width and lines[-1]):
                lines.append([])
                used = 0.0
                word = word.lstrip()
                wide = _inches(word) if word else 0.0
            if word:
                lines[-1].append((word, differs))
                used += wide
    return lines


def _draw_line(ax, x: float, y: float, line: list) -> None:
    before = False
    for word, differs in line:
        wide = _inches(word)
        ax.text(x, y, word, fontsize=_SIZE, color=plots.INK, **_PLAIN)
        if differs:
            blank = 0 if before else _inches(word[: len(word) - len(word.lstrip())])
            ax.plot([x + blank, x + wide], [y + 0.04] * 2, color=plots.BLUE, lw=1.4)
        before = differs
        x += wide


def _result(ax, top: float, row: dict) -> None:
    """A line of text, with the share and its interval between 0 and 1 beside it."""
    ax.text(0.12, top + 0.16, row["text"][:90], fontsize=_SIZE, color=plots.INK, **_PLAIN)
    if row["low"] is None:
        return
    left, wide, y = _WIDTH - 2.9, 1.5, top + 0.12
    ax.plot([left, left + wide], [y, y], color=plots.GRID, lw=5, solid_capstyle="butt")
    ax.plot([left + wide * row["low"], left + wide * row["high"]], [y, y], color=plots.BLUE, lw=1.6)
    ax.plot([left + wide * row["value"]], [y], marker="s", ms=5, color=plots.BLUE)
    interval = f"{row['low']:.0%} to {row['high']:.0%}"
    ax.text(left + wide + 0.1, y + 0.04, interval, fontsize=8, color=plots.MUTED, **_PLAIN)


def _inches(text: str) -> float:
    if not text:
        return 0.0
    blank = len(text) - len(text.strip())
    wide = text_to_path.get_text_width_height_descent(text.strip() or "x", FontProperties(size=_SIZE), False)[0] / 72
    return 1.025 * (wide if text.strip() else 0) + 0.0397 * blank
