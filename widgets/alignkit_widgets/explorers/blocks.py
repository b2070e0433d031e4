"""The blocks of an explorer's picture: plain data that a page draws as SVG and matplotlib draws as a PNG.

A picture is a list of rows; a row is a list of blocks side by side. The axes are fixed by the explorer, so a moving
slider moves the curve and not the axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass

import numpy as np

from alignkit import plots
from alignkit.safe_text import visible
from alignkit_widgets.looks import finite

LOOKS = {  # name -> colour, marker, line style
    **{name: plots.SERIES[i][:3] for i, name in enumerate(("blue", "vermilion", "green", "purple", "orange", "sky"))},
    **{name: look[:3] for name, look in plots.KNOWN.items()},
    "muted": (plots.MUTED, "o", "-"),
    "dotted": (plots.MUTED, "o", plots.DOTTED),
    "best": (plots.BLUE, "D", "-"),  # the optimum: no method has a diamond of this colour
}


@dataclass(frozen=True)
class Axis:
    """The quantity on an axis, with its unit and range. `log`: log spacing; `whole`: integers."""

    label: str
    low: float
    high: float
    log: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Series:
    """Points (x, y), joined (`line`) or marked (`marks`); `big` for one that follows a control, `open` for hollow
    markers.

    spans: (x low, x high, y low, y high) of each point, drawn as a cross. labels: a word at each point, or none.
    """

    name: str
    points: Sequence
    look: str = "blue"
    line: bool = True
    marks: bool = False
    open: bool = False
    big: bool = False
    spans: Sequence = ()
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class Chart:
    """Curves in a plane. marks: ("x" or "y", where, word), a line across. zones: (x from, x to, word), hatched.

    A line that leaves the axes ends in an arrow. drag: (control, [(x, value), …]): a pointer that is pressed in the
    chart sets the control to the value whose x is nearest; () for none.
    """

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    marks: Sequence[tuple] = ()
    zones: Sequence[tuple] = ()
    height: int = 240
    weight: float = 1.0
    drag: tuple = ()


@dataclass(frozen=True)
class Bars:
    """A bar for each label and group, with its number. groups: {name: look}; rows: (label, value, value, …)."""

    title: str
    groups: Mapping[str, str]
    rows: Sequence[tuple]
    unit: str
    high: float = 1.0
    weight: float = 1.0
    percent: bool = False


@dataclass(frozen=True)
class Table:
    """Words in the first `left` columns, figures in the others. hot: numbers of the highlighted rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    hot: Sequence[int] = ()
    weight: float = 1.0
    left: int = 1


@dataclass(frozen=True)
class Text:
    """A sentence or two. `lead`: the statement about the current setting, which screen readers announce when it
    changes."""

    text: str
    lead: bool = False
    weight: float = 1.0


@dataclass(frozen=True)
class Tokens:
    """A response token by token, coloured by `values` (blue, + and orange, −), with more figures in `rows` below."""

    title: str
    tokens: Sequence[str]
    values: Sequence[float]
    rows: Mapping[str, Sequence[float]] = field(default_factory=dict)
    name: str = "A"
    unit: str = "SFT-sd"
    weight: float = 1.0


@dataclass(frozen=True)
class Fold:
    """Blocks side by side that a page shows when its title is pressed. A picture shows them all."""

    title: str
    blocks: Sequence
    weight: float = 1.0


@dataclass(frozen=True)
class Copy:
    """A line to copy, with a copy button. Only in pages."""

    label: str
    text: str
    weight: float = 1.0


def plain(part: object) -> object:
    """A picture as JSON: hidden characters spelled out, figures to six digits, None for a missing figure."""
    if isinstance(part, str):
        return visible(part)
    if part is None or isinstance(part, (bool, int)):
        return part
    if isinstance(part, (float, np.floating)):
        return None if finite(float(part)) is None else float(f"{part:.6g}")
    if is_dataclass(part):
        return {"kind": type(part).__name__.lower()} | {f.name: plain(getattr(part, f.name)) for f in fields(part)}
    if isinstance(part, Mapping):
        return {visible(name): plain(value) for name, value in part.items()}
    return plain(part.tolist()) if hasattr(part, "tolist") else [plain(value) for value in part]


def unfolded(rows: list) -> list:
    """Rows of plain blocks with the content of each fold as a row of its own."""
    return [block["blocks"] if block["kind"] == "fold" else row for row in rows for block in row[:1]]


def number(value: float, digits: int = 3) -> str:
    """`value` with a typographic minus sign: −0.35."""
    return f"{value + 0.0:.{digits}g}".replace("-", "−")


def fixed(value: float, digits: int = 2, sign: bool = False) -> str:
    """`value` with a fixed number of decimals, and a + if `sign` is set."""
    return f"{value:{'+' if sign else ''}z.{digits}f}".replace("-", "−")
