"""Pictures of over-optimisation: fitted curves, gold along the optima of reward models, penalty against stopping."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from alignkit.plots.style import (
    INK,
    ORANGE,
    SERIES,
    Chart,
    Floats,
    Picture,
    _array,
    _finish,
    _legend,
    _require,
    _same_length,
)

KL_LABEL = "KL to SFT, nats per response"


def plot_fit_panels(points: Mapping[str, tuple[Floats, Floats]],
                    fits: Mapping[str, Mapping[str, tuple[Floats, Floats]]]) -> Figure:
    """Measured gold against d = √KL, one panel a curve, with the forms that were fitted to it as lines.

    points: curve -> (d, gold), each (N,), √nats and SFT-sd. fits: curve -> label -> (d, gold), each (M,). Raises
    ValueError if there are no curves or lengths differ.
    """
    figure = _panels(points)
    for ax, (name, (d, gold)) in zip(figure.axes, points.items(), strict=True):
        _same_length("d", d, "gold", gold)
        ax.plot(d, gold, "o", color=ORANGE, mec=INK, mew=0.6, ms=5)
        for (x, y), (colour, _, line, _) in zip(fits[name].values(), SERIES, strict=False):
            ax.plot(x, y, color=colour, ls=line, lw=1.8)
        handles = [Line2D([], [], color=colour, ls=line) for colour, _, line, _ in SERIES]
        _legend(ax, handles[:len(fits[name])], fits[name], fontsize=8, loc="lower center")
        _finish(ax, str(name), "d = √KL, √nats", "gold over SFT, SFT-sd", small=True)
    return figure


def plot_gold_panels(panels: Mapping[str, Mapping[str, tuple[Floats, Sequence]]], *, bottom: float | None = None
                     ) -> Figure:
    """Gold against KL along several optima, one panel for each comparison; all panels have one scale.

    panels: title -> name -> (kl, gold): kl (N,) nats; gold (N,), or (S, N) for S repeats, whose mean is drawn with a
    band from the lowest to the highest, in SFT-sd. bottom: the lowest gold shown. Raises ValueError if there is nothing
    to draw or lengths differ.
    """
    figure = _panels(panels)
    for ax, (title, curves) in zip(figure.axes, panels.items(), strict=True):
        handles = []
        for (kl, gold), (colour, _, line, _) in zip(curves.values(), SERIES, strict=False):
            kl, rows = _array("kl", kl), np.atleast_2d(_array("gold", gold, ndim=(1, 2)))
            _same_length("kl", kl, "gold", rows.T)
            if len(rows) > 1:
                ax.fill_between(kl, rows.min(0), rows.max(0), color=colour, alpha=0.15, lw=0)
            handles += ax.plot(kl, rows.mean(0), color=colour, ls=line, lw=2)
        _legend(ax, handles, curves, fontsize=8, loc="lower left")
        _finish(ax, str(title), KL_LABEL, "gold, SFT-sd", small=True)
    low, high = (limit([ax.get_ylim()[end] for ax in figure.axes]) for end, limit in enumerate((min, max)))
    for ax in figure.axes:
        ax.set_ylim(low if bottom is None else max(low, bottom), high)
    return figure


def plot_stopping_panels(paths: Mapping[str, Mapping[str, Floats]], ends: Mapping[str, Mapping[str, Floats]]) -> Figure:
    """Early stopping or a larger penalty: proxy and gold against KL, paths over time as lines, runs' ends as markers.

    paths, ends: name -> "kl" (nats), "proxy", "gold" (SFT-sd), each (N,); both with the same names. Raises ValueError
    if there are no paths or lengths differ.
    """
    _require("paths", paths)
    figure = _panels({"proxy": None, "gold": None})
    for ax, reward in zip(figure.axes, ("proxy", "gold"), strict=True):
        handles = []
        for (name, path), (colour, marker, line, _) in zip(paths.items(), SERIES, strict=False):
            for part in (path, ends[name]):
                _same_length("kl", part["kl"], reward, part[reward])
            handles += ax.plot(path["kl"], path[reward], color=colour, ls=line, lw=1.8)
            ax.plot(ends[name]["kl"], ends[name][reward], marker, color=colour, mec=INK, mew=0.6)
        _legend(ax, handles, paths, fontsize=8, loc="lower right")
        _finish(ax, f"{reward}: lines over time, markers ends of runs", KL_LABEL, f"{reward}, SFT-sd", small=True)
    return figure


def _panels(panels: Mapping) -> Figure:
    """A figure with one empty panel for each entry, side by side. Raises ValueError without one."""
    _require("panels", panels)
    figure = Picture(figsize=(9.5, 3.5), layout="constrained", facecolor="white")
    for number in range(len(panels)):
        figure.add_subplot(1, len(panels), number + 1, axes_class=Chart)
    return figure
