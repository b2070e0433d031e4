"""Pictures, in matplotlib alone. Arrays, dicts and lists of dicts go in; an Axes (`plot_*`) or a Figure comes out.

Every `plot_*(…, ax=None)` draws into `ax`, or makes a figure of its own that pyplot never sees: nothing leaks, and the
last line of a notebook cell shows it as a PNG, under papermill too. Text from users and models is never read as maths.
What colour says, a marker, line style, hatch or label says as well (palette: Okabe and Ito 2008). `title=""` leaves the
title out.
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from alignkit.safe_text import visible
from alignkit.storage import write_atomically

Floats, Bins, Interval = Sequence[float], Sequence[Mapping[str, float]], tuple[float, float]
INK, MUTED, EDGE, GRID = "#222222", "#5c5c5c", "#9a9a9a", "#e4e4e4"
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, YELLOW = "#E69F00", "#56B4E9", "#F0E442"
FOR_TEXT = {VERMILION: "#b84f00", GREEN: "#00795a", PURPLE: "#a3487c", ORANGE: "#946500", SKY: "#1f77a4"}  # 4.5:1
DASHED, DASH_DOT, DOTTED = (0, (5, 2)), (0, (6, 2, 1.5, 2)), (0, (1.2, 1.6))
SERIES = (  # colour, marker, line style, hatch
    (BLUE, "s", "-", ""),
    (VERMILION, "^", DASHED, "////"),
    (GREEN, "D", DASH_DOT, "...."),
    (PURPLE, "v", DOTTED, "xxxx"),
    (ORANGE, "P", (0, (8, 2)), "\\\\\\\\"),
    (SKY, "X", (0, (3, 1, 1, 1, 1, 1)), "++++"),
    (MUTED, "o", "-", ""),
)
KNOWN = {"sft": SERIES[6], "ppo": SERIES[0], "frozen": SERIES[5], "dpo": SERIES[1], "proxy": SERIES[0],
         "gold": (ORANGE, "*", DASHED, "////"), "chosen": SERIES[0], "rejected": SERIES[1]}
BEHAVIOUR_FACES = {  # colour, hatch
    "answer": (GREEN, ""), "wrong answer": (YELLOW, "////"), "hedge": (SKY, ""), "alternative": (BLUE, "...."),
    "refuse": (PURPLE, "\\\\\\\\"), "unsafe": (VERMILION, "xxxx"), "other": ("#d9d9d9", "")}


class Picture(Figure):
    """A Figure without pyplot that shows itself in a notebook: 96 CSS pixels an inch, drawn finer, with alt text."""

    def _repr_png_(self) -> tuple[bytes, dict]:
        width, height = (round(96 * inches) for inches in self.get_size_inches())
        return _png(self, 144), {"width": width, "height": height, "alt": describe(self)}


class Chart(Axes):
    """Axes that show their figure when they are the last line of a notebook cell."""

    def _repr_png_(self) -> tuple[bytes, dict]:
        return Picture._repr_png_(self.get_figure(root=True))


def describe(figure: Figure) -> str:
    """The alt text of a figure: what its panels are called and what they have on their axes, in order."""
    panels = []
    for ax in figure.axes:
        axes = " against ".join(filter(None, (ax.get_ylabel(), ax.get_xlabel())))
        words = ". ".join(filter(None, (ax.get_title("left") or ax.get_title(), axes)))
        panels.append((words or " ".join(text.get_text() for text in ax.texts)).replace("\n", " "))
    return "; ".join(panels)


def save_figure(figure: Figure | Axes, path: str | Path, dpi: int = 144) -> Path:
    """Write a figure, or the figure of an Axes, as PNG under another name, then rename it. Returns the path.

    Raises ValueError if `path` does not end in .png.
    """
    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"path is {str(path)!r}, expected a name that ends in .png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _png(figure.get_figure(root=True) if isinstance(figure, Axes) else figure, dpi))
    return path


# ---------------------------------------------------------------- shared
def _png(figure: Figure, dpi: int) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _axes(ax: Axes | None, width: float, height: float) -> Axes:
    """The given axes, or fresh ones in a figure of `width` × `height` inches that pyplot does not know."""
    if ax is not None:
        return ax
    return Picture(figsize=(width, height), facecolor="white", layout="constrained").add_subplot(axes_class=Chart)


def _finish(ax: Axes, default: str, xlabel: str, ylabel: str, title: str | None = None, *, grid: str = "y",
            small: bool = False) -> None:
    """Title, labels, ticks, grid and spines; y=1.0 keeps matplotlib from measuring all ticks to place the title."""
    size = 8 if small else 9
    ax.set_title(_short(default if title is None else title, 100), loc="left", fontsize=size + (0.5 if small else 1.5),
                 y=1.0, fontweight="bold", color=INK, parse_math=False)
    ax.set_xlabel(_short(xlabel, 120), fontsize=size, color=INK, parse_math=False)
    ax.set_ylabel(_short(ylabel, 80), fontsize=size, color=INK, parse_math=False)
    ax.tick_params(labelsize=size - 0.5, labelcolor=INK, length=3, color=EDGE)
    ax.set_facecolor("white")
    ax.set_axisbelow(True)
    ax.grid(False)
    if grid:
        ax.grid(True, axis=grid, color=GRID, lw=0.7)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(EDGE)


def _text(ax: Axes, x: float, y: float, text: str, colour: str = INK, size: float = 8.5, *, where: str = "data",
          **options) -> None:
    """Plain text at data coordinates, axes fractions, or mixed: "right" is (axes, data), "top" is (data, axes)."""
    transforms = {"data": ax.transData, "axes": ax.transAxes, "right": ax.get_yaxis_transform(),
                  "top": ax.get_xaxis_transform()}
    ax.text(x, y, text, transform=transforms[where], color=FOR_TEXT.get(colour, colour), fontsize=size,
            parse_math=False, **options)


def _beside(ax: Axes, at: Floats, text: str, offset: Floats, colour: str = INK, size: float = 8.5, **options) -> None:
    """Plain text `offset` points away from a point."""
    text = "\n".join(_short(line, 34) for line in str(text).split("\n")[:2])
    ax.annotate(text, at, offset, textcoords="offset points", color=FOR_TEXT.get(colour, colour), fontsize=size,
                parse_math=False, zorder=6, **options)


def _backing(face: str = "white") -> dict:
    """What lies behind text that would otherwise be lost in hatching or lines."""
    alpha = 0.85 if face == "white" else 1
    return {"boxstyle": "round,pad=0.12", "facecolor": face, "edgecolor": "none", "alpha": alpha}


def _arrow(ax: Axes, tail: Floats, head: Floats, colour: str, lw: float, **shrink: float) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "lw": lw, "shrinkA": 0, "shrinkB": 0, **shrink}
    ax.annotate("", head, tail, arrowprops=style)


def _legend(ax: Axes, handles: Iterable, labels: Iterable[str], fontsize: float = 8.5, **options) -> None:
    labels = [_short(label, 40).lstrip("_") for label in labels]
    legend = ax.legend(list(handles), labels, frameon=False, fontsize=fontsize, labelcolor=INK, **options)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _last_values(lines: Mapping[str, np.ndarray]) -> list[tuple[float, str, str]]:
    return [(values[-1], f"{name} {_signed(values[-1])}", KNOWN[name][0]) for name, values in lines.items()]


def _end_labels(ax: Axes, ends: Iterable[tuple[float, str, str]]) -> None:
    """Names at the right end of lines, (y, name, colour) each, moved apart where they would overlap."""
    ends = sorted((end for end in ends if np.isfinite(end[0])), key=lambda end: end[0])
    bottom, top = ax.get_ylim()
    ax.set_ylim(bottom, top)
    gap = 0.17 / (ax.get_position().height * ax.get_figure(root=True).get_size_inches()[1])
    places = [(y - bottom) / (top - bottom) for y, _, _ in ends]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], (places[i + 1] if i + 1 < len(places) else 1 + gap) - gap)
    for place, (_, name, colour) in zip(places, ends, strict=True):
        _text(ax, 1.01, place, _short(name, 34), colour, where="axes", va="center")


def _styles(names: Iterable[str]) -> dict[str, tuple]:
    """Colour, marker, line style, hatch for each name: a stage keeps its own everywhere, the rest share the others."""
    names, styles = list(dict.fromkeys(names)), {}
    for name in names:
        style = KNOWN.get(re.split(r"\W", str(name).lower().rpartition("/")[2])[0])
        if style and style not in styles.values():
            styles[name] = style
    spare = [style for style in SERIES if style not in styles.values()] or list(SERIES)
    others = [name for name in names if name not in styles]
    styles.update({name: spare[i % len(spare)] for i, name in enumerate(others)})
    return {name: styles[name] for name in names}


def _array(name: str, values, ndim: tuple[int, ...] = (1,)) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim not in ndim or not np.isfinite(array).any():
        shape = " or ".join(("(N,)", "(S, N)")[n - 1] for n in ndim)
        raise ValueError(f"{name} has shape {array.shape}, expected {shape} with at least one finite number")
    return array


def _finite(name: str, values) -> np.ndarray:
    array = _array(name, values)
    return array[np.isfinite(array)]


def _require(name: str, data) -> None:
    if not len(data):
        raise ValueError(f"{name} is empty, expected at least one entry")


def _same_length(first: str, a, second: str, b) -> None:
    if len(a) != len(b):
        raise ValueError(f"{second} has length {len(b)}, expected {len(a)} (the length of {first})")


def _short(text: str, width: int) -> str:
    """One printable line of at most `width` characters."""
    text = re.sub(r"[\n\t\u2400-\u2421]", " ", visible(text, 4 * width)).strip()  # the font lacks control pictures
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def _width(text: str, size: float) -> float:
    """Width in points."""
    return text_to_path.get_text_width_height_descent(text, FontProperties(size=size), False)[0]


def _number(value: float, span: float = 1.0) -> str:
    """A figure with the digits that tell values apart that spread over `span`."""
    digits = int(np.clip(1 - np.floor(np.log10(max(span, 1e-9) / 2.5)), 0, 4))
    return f"{value:z.{digits}f}".replace("-", "−")


def _signed(value: float, span: float = 1.0) -> str:
    return ("" if value < 0 else "+") + _number(value, span)


def _letter(position: int) -> str:
    return "abcdefghijklmnopqrstuvwxyz"[position % 26]


def _tint(colour: str, strength: float) -> tuple[float, ...]:
    return tuple(1 - strength * (1 - channel) for channel in to_rgb(colour))
