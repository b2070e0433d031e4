"""An explorer as a picture by matplotlib, with the same blocks, for papermill, nbconvert and GitHub."""

from __future__ import annotations

import itertools
import textwrap
import warnings
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from alignkit import plots
from alignkit_widgets.explorers.blocks import LOOKS, number

_WIDTH = 9.6  # inches
_PLAIN = {"parse_math": False}


def draw_explorer(title: str, controls: Mapping[str, str], rows: list) -> tuple[bytes, dict]:
    """Rows of plain blocks as one PNG with its size and alt text; the title and the control values are at the top."""
    rows = [[block for block in row if block["kind"] != "copy"] for row in rows]
    rows = [row for row in rows if row]
    settings = textwrap.wrap("   ·   ".join(f"{name}: {value}" for name, value in controls.items()), 125)[:3]
    sizes = [max(_height(block, _width(block, row)) for block in row) for row in rows]
    head = 0.36 + 0.17 * len(settings)
    total = head + sum(sizes) + 0.16 * len(rows)
    figure = plots.Picture(figsize=(_WIDTH, total), facecolor="white")
    figure.text(0.1 / _WIDTH, 1 - 0.08 / total, title, fontsize=11.5, fontweight="bold", va="top", color=plots.INK,
                **_PLAIN)
    figure.text(0.1 / _WIDTH, 1 - 0.32 / total, "\n".join(settings), fontsize=8, va="top", color=plots.MUTED, **_PLAIN)
    top = total - head
    for row, height in zip(rows, sizes, strict=True):
        left = 0.1
        for block in row:
            width = _width(block, row)
            box = _box(block, left, top - height, width, height)
            ax = figure.add_axes([v / t for v, t in zip(box, (_WIDTH, total) * 2, strict=True)],
                                 axes_class=plots.Chart)
            _DRAW[block["kind"]](ax, block, width)
            left += width + 0.25
        top -= height + 0.16
    with warnings.catch_warnings():  # characters missing in the font are drawn as a box
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        png, metadata = figure._repr_png_()
    return png, metadata | {"alt": f"{title}. {metadata['alt']}"[:1000]}


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _width(block: dict, row: list) -> float:
    return (_WIDTH - 0.2 - 0.25 * (len(row) - 1)) * block["weight"] / sum(b["weight"] for b in row)


def _height(block: dict, width: float) -> float:
    kind = block["kind"]
    if kind == "chart":
        return block["height"] / 96 + 0.4
    if kind == "bars":
        return 0.62 + 0.18 * (len(block["groups"]) > 1) + len(block["rows"]) * (0.08 + 0.14 * len(block["groups"]))
    if kind == "table":
        return 0.24 * bool(block["title"]) + 0.16 * sum(len(max(row, key=len)) + 0.6 for row in _cells(block, width))
    if kind == "tokens":
        lines = 1 + sum(max(len(token), 7) + 3 for token in block["tokens"]) // int(13 * width)
        return 0.22 + (lines * (36 + 10.5 * len(block["rows"])) + 24) / 72
    return 0.06 + 0.175 * len(_wrapped(block, width))


def _box(block: dict, left: float, bottom: float, width: float, height: float) -> tuple:
    """Position of a block's axes in inches, with room for tick labels and titles."""
    if block["kind"] == "chart":
        return left + 0.62, bottom + 0.42, width - 0.72, height - 0.72 - 0.15 * bool(block["marks"] or block["zones"])
    if block["kind"] == "bars":
        name = min(2.2, 0.12 + 0.072 * max(len(row[0]) for row in block["rows"])) if block["rows"] else 1
        return left + name, bottom + 0.28, width - name, height - 0.55 - 0.18 * (len(block["groups"]) > 1)
    if block["kind"] == "tokens":
        return left, bottom, width, height - 0.22
    return left, bottom, width, height


def _title(ax: Axes, text: str, width: float, pad: float = 5) -> None:
    ax.set_title(_short(text, int(11 * width)), loc="left", fontsize=9.5, fontweight="bold", color=plots.INK, pad=pad,
                 **_PLAIN)


def _chart(ax: Axes, block: dict, width: float) -> None:
    for axis, name in ((block["x"], "x"), (block["y"], "y")):
        ax.set(**{f"{name}scale": "log" if axis["log"] else "linear", f"{name}lim": (axis["low"], axis["high"])})
        if axis["log"]:
            getattr(ax, f"{name}axis").set_major_locator(LogLocator(subs=(1, 2, 5) if axis["high"] / axis["low"] < 300
                                                                    else (1,)))
            getattr(ax, f"{name}axis").set_major_formatter("{x:g}")
            getattr(ax, f"{name}axis").set_minor_locator(NullLocator())
        if axis["whole"]:
            getattr(ax, f"{name}axis").set_major_locator(MaxNLocator(integer=True))
        getattr(ax, f"set_{name}label")(axis["label"], fontsize=8.5, color=plots.INK, **_PLAIN)
    for low, high, word in block["zones"]:
        ax.axvspan(low, high, facecolor="none", edgecolor="#c9c9c9", hatch="////", lw=0, zorder=0)
        ax.text((low + high) / 2, 1.01, word, transform=ax.get_xaxis_transform(), ha="center", fontsize=7.5, **_PLAIN)
    for which, at, word in block["marks"]:
        (ax.axvline if which == "x" else ax.axhline)(at, color=plots.INK, lw=0.8, ls=":")
        place = (at, 1.01) if which == "x" else (0.99, at)
        move = ax.get_xaxis_transform() if which == "x" else ax.get_yaxis_transform()
        ax.text(*place, word, transform=move, ha="center" if which == "x" else "right", va="bottom", fontsize=7.5,
                **_PLAIN)
    for s in block["series"]:
        colour, marker, line = LOOKS[s["look"]]
        points = np.array([[np.nan if v is None else v for v in p] for p in s["points"]], dtype=float).reshape(-1, 2)
        shape = {"marker": marker if s["marks"] or s["big"] else "",
                 "ms": (14 if marker == "*" else 10) if s["big"] else 6}
        ax.plot(*points.T, color=colour, ls=line if s["line"] else "", lw=1.8, mfc="white" if s["open"] else colour,
                mec=colour if s["open"] else "white", label=s["name"] or "_", zorder=6 if s["big"] else 3, **shape)
        for (x, y), (x0, x1, y0, y1) in zip(points, s["spans"], strict=bool(s["spans"])):
            ax.plot([x0, x1], [y, y], color=colour, lw=1.1, alpha=0.7)
            ax.plot([x, x], [y0, y1], color=colour, lw=1.1, alpha=0.7)
        if s["line"]:
            for x, y, way in _leaving(points, block["y"]["low"], block["y"]["high"]):
                ax.plot(x, y, color=colour, marker="v" if way < 0 else "^", ms=6, mec="none", clip_on=False)
    _words(ax, [(x, y, word) for s in block["series"] for (x, y), word in zip(s["points"], s["labels"], strict=False)])
    ax.grid(axis="y", color=plots.GRID, lw=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8, colors=plots.MUTED)
    if sum(bool(s["name"] and s["points"]) for s in block["series"]) > 1:
        for text in ax.legend(edgecolor="none", framealpha=0.9, fontsize=7.5, loc="best", handlelength=2.6).get_texts():
            text.set_parse_math(False)
    _title(ax, block["title"], width - 0.6, 16 if block["marks"] or block["zones"] else 5)


def _leaving(points: np.ndarray, low: float, high: float) -> list[tuple[float, float, int]]:
    """Where a line (N, 2) crosses the end of the y axis: x, y, and −1 (below) or 1 (above)."""
    found = []
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        for edge, way in ((low, -1), (high, 1)):
            if (y0 - edge) * (y1 - edge) < 0 and y0 != y1:
                found.append((x0 + (edge - y0) / (y1 - y0) * (x1 - x0), edge, way))
    return found


def _words(ax: Axes, labels: list[tuple[float, float, str]]) -> None:
    """Write a word beside each point, where it covers no other word; one without room is left out."""
    scale, placed = ax.figure.dpi / 72, []
    for x, y, word in labels:
        px, py = ax.transData.transform((x, y)) / scale
        for dx, dy, side in ((5, -9, "left"), (5, 4, "left"), (-5, 4, "right"), (-5, -9, "right")):
            left = px + dx - 4.2 * len(word) * (side == "right")
            box = (left, py + dy, left + 4.2 * len(word), py + dy + 7)
            if all(box[0] >= b[2] or b[0] >= box[2] or box[1] >= b[3] or b[1] >= box[3] for b in placed):
                placed.append(box)
                ax.annotate(word, (x, y), (dx, dy), textcoords="offset points", ha=side, fontsize=7, color=plots.INK,
                            **_PLAIN)
                break


def _bars(ax: Axes, block: dict, width: float) -> None:
    groups = list(block["groups"].items())
    for i, (name, look) in enumerate(groups):
        y = np.arange(len(block["rows"])) + (i - (len(groups) - 1) / 2) * 0.4
        values = [row[1 + i] or 0 for row in block["rows"]]
        ax.barh(y, values, 0.36, color=LOOKS[look][0], hatch="////" if i % 2 else "", edgecolor="white", lw=0,
                label=_short(name, 24))
        for at, value in zip(y, values, strict=True):
            word = f"{100 * value:.{1 if value < 0.0995 else 0}f} %" if block["percent"] else number(value)
            ax.text(value + 0.01 * block["high"], at, word, va="center", fontsize=7, color=plots.INK, **_PLAIN)
    ax.set_yticks(range(len(block["rows"])), [_short(row[0], 30) for row in block["rows"]],
                  fontsize=8, **_PLAIN)
    ax.set(xlim=(0, 1.18 * block["high"]), ylim=(len(block["rows"]) - 0.5, -0.5), xticks=[])
    ax.set_xlabel(block["unit"], fontsize=7.5, color=plots.MUTED, loc="left", **_PLAIN)
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    if len(groups) > 1:
        legend = ax.legend(frameon=False, fontsize=7.5, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0,
                           borderaxespad=0.2)
        for text in legend.get_texts():
            text.set_parse_math(False)
    _title(ax, block["title"], width, 18 if len(groups) > 1 else 5)


def _cells(block: dict, width: float) -> list[list[list[str]]]:
    """Rows of cells, each as lines of at most the number of characters that fit into the column."""
    rows = [[str(cell) for cell in row] for row in (block["columns"], *block["rows"])]
    return [[textwrap.wrap(cell, max(6, int(13.5 * w)), max_lines=5, placeholder="…") or [""]
             for cell, w in zip(row, _columns(block, width), strict=True)] for row in rows]


def _columns(block: dict, width: float) -> list[float]:
    """Inches of each column: figures get the width that they need, words share the rest."""
    need = [max(min(80 if c < block["left"] else 14, len(str(row[c])))
                for row in (block["columns"], *block["rows"])) + 2
            for c in range(len(block["columns"]))]
    return [width * n / sum(need) for n in need]


def _table(ax: Axes, block: dict, width: float) -> None:
    height, rows, columns = _height(block, width), _cells(block, width), _columns(block, width)
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.set_axis_off()
    y = 0.24 * bool(block["title"])
    ax.text(0, 0.02, block["title"], va="top", fontsize=9.5, fontweight="bold", color=plots.INK, **_PLAIN)
    for number_, row in enumerate(rows):
        tall = 0.16 * (len(max(row, key=len)) + 0.6)
        hot = number_ - 1 in block["hot"]
        if hot:
            ax.add_patch(Rectangle((0, y), width, tall, color="#eeeeee", lw=0))
        if number_:
            ax.plot([0, width], [y, y], color=plots.GRID, lw=0.8)
        x = 0.0
        for c, (lines, w) in enumerate(zip(row, columns, strict=True)):
            right = c >= block["left"]
            for i, line in enumerate(lines):
                ax.text(x + w - 0.05 if right else x + 0.03, y + 0.16 * (i + 1), line, va="baseline", fontsize=8,
                        ha="right" if right else "left", color=plots.INK if number_ else plots.MUTED,
                        fontweight="bold" if hot else "normal", **_PLAIN)
            x += w
        y += tall


def _wrapped(block: dict, width: float) -> list[str]:
    return [line for part in block["text"].split("\n") for line in textwrap.wrap(part, int(14 * width)) or [""]]


def _text(ax: Axes, block: dict, width: float) -> None:
    ax.set_axis_off()
    ax.text(0, 0.98, "\n".join(_wrapped(block, width)), transform=ax.transAxes, va="top", fontsize=9, linespacing=1.3,
            color=plots.INK, **_PLAIN)


def _tokens(ax: Axes, block: dict, width: float) -> None:
    plots.plot_advantage_tokens(block["tokens"], block["values"], ax, rows=block["rows"], unit=block["unit"], title="")
    _title(ax, block["title"], width)


_DRAW = {"chart": _chart, "bars": _bars, "table": _table, "text": _text, "tokens": _tokens}
