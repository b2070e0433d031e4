"""Pictures of the factorial and of the tables it is compared with: dot plots, and shares of variance as bars."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes

from alignkit.plots.style import (
    GRID,
    INK,
    SERIES,
    Floats,
    _array,
    _axes,
    _finish,
    _legend,
    _require,
    _same_length,
    _text,
)


def plot_dots(columns: Mapping[str, Floats], rows: list[str], xlabel: str, ax: Axes | None = None, *,
              zero: bool = False, title: str = "") -> Axes:
    """A dot plot of a table: a line for each row, on it a mark for each column.

    columns: name -> (R,) values. rows: the names of the R rows, the first on top. zero: draw a line at 0, for
    differences. Raises ValueError if there are no columns or lengths differ.
    """
    _require("columns", columns)
    ax, handles = _axes(ax, 7.8, 1.2 + 0.27 * len(rows)), []
    places = np.arange(len(rows))
    ax.hlines(places, 0, 1, color=GRID, lw=0.9, transform=ax.get_yaxis_transform())
    if zero:
        ax.axvline(0, color=INK, lw=0.9)
    for i, (name, values) in enumerate(columns.items()):
        values = _array(f"columns[{name!r}]", values)
        _same_length("rows", rows, f"columns[{name!r}]", values)
        colour, marker, *_ = SERIES[i % len(SERIES)]
        handles += ax.plot(values, places, marker, color=colour, mec="white", mew=0.6, ms=7.5, ls="", zorder=3)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_yticks(places, rows, parse_math=False)
    _finish(ax, "", xlabel, "", title, grid="x")
    _legend(ax, handles, columns, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def plot_variance_shares(shares: Mapping[str, Mapping[str, float]], ax: Axes | None = None, *, title: str = "") -> Axes:
    """Shares of variance as one bar a metric, a piece for each effect; a piece of a tenth or more has its figure.

    shares: metric -> effect -> share; the shares of a metric add up to 1. Raises ValueError if there are no metrics or
    the shares of one do not add up to 1.
    """
    _require("shares", shares)
    ax, effects = _axes(ax, 7.8, 1.0 + 0.34 * len(shares)), list(next(iter(shares.values())))
    begun, handles = np.zeros(len(shares)), []
    for metric, found in shares.items():
        if abs(sum(found.values()) - 1) > 1e-3:
            raise ValueError(f"shares[{metric!r}] add up to {sum(found.values()):.3g}, expected 1")
    for i, effect in enumerate(effects):
        colour, _, _, hatch = SERIES[i % len(SERIES)]
        widths = np.array([found[effect] for found in shares.values()])
        handles.append(ax.barh(range(len(shares)), widths, left=begun, color=colour, hatch=hatch, edgecolor="white",
                               height=0.72, lw=0.8))
        for place, (left, width) in enumerate(zip(begun, widths, strict=True)):
            if width >= 0.1:
                _text(ax, left + width / 2, place, f"{width:.0%}", INK, 8, ha="center", va="center",
                      bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"})
        begun += widths
    ax.set(xlim=(0, 1), ylim=(len(shares) - 0.5, -0.5))
    ax.set_yticks(range(len(shares)), list(shares), parse_math=False)
    _finish(ax, "", "share of the variance over the policies of a world", "", title, grid="")
    _legend(ax, handles, effects, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax
