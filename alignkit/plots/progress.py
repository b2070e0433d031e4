"""Pictures of how soon runs are good: a measure against what training has cost so far."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from alignkit.plots.style import (
    DOTTED,
    INK,
    Floats,
    _axes,
    _finish,
    _legend,
    _require,
    _same_length,
    _styles,
    _text,
)


def plot_progress(runs: Mapping[str, Sequence[tuple[Floats, Floats]]], level: float, ax: Axes | None = None, *,
                  xlabel: str = "seconds", ylabel: str = "", title: str | None = None) -> Axes:
    """A line a run: `ylabel` against what it has cost; runs under one name share a style. `level` is dotted.

    runs: name -> one (cost, value) a run, each (N,). Raises ValueError if there are none or lengths differ.
    """
    _require("runs", runs)
    ax, styles = _axes(ax, 6.4, 3.4), _styles(runs)
    for name, each in runs.items():
        colour, marker, line, _ = styles[name]
        for cost, value in each:
            _same_length("cost", cost, "value", value)
            ax.plot(cost, value, color=colour, marker=marker, ls=line, lw=1.1, ms=3, alpha=0.8)
    ax.axhline(level, color=INK, lw=0.9, ls=DOTTED)
    _text(ax, 0.995, level, f"{level:.3g}", INK, 8, where="right", ha="right", va="bottom")
    handles = [Line2D([], [], color=styles[name][0], marker=styles[name][1], ls=styles[name][2], ms=4) for name in runs]
    _legend(ax, handles, runs, loc="lower right")
    _finish(ax, "How soon runs are good", xlabel, ylabel, title)
    return ax
