"""Pictures of how near PPO and DPO come to the exact optimum, and to each other."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from alignkit.plots.style import (
    INK,
    MUTED,
    Floats,
    _array,
    _axes,
    _beside,
    _finish,
    _legend,
    _require,
    _same_length,
    _short,
    _styles,
)


def plot_distance_to_optimum(pairs: Floats, distances: Mapping[str, Sequence], reference: float,
                             ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """KL to the optimum against the number of pairs, both on log axes: a line for the median, a band for all draws.

    pairs: (S,) sizes of the data sets, above 0. distances: name -> (S, R), nats, of R draws of each size. reference: KL
    of the reference to the optimum, nats, a dotted line. Raises ValueError if there is nothing to draw or a shape does
    not fit.
    """
    _require("distances", distances)
    pairs, ax, handles = _array("pairs", pairs), _axes(ax, 7.5, 3.4), []
    for name, (colour, marker, line, _) in _styles(distances).items():
        values = _array(f"distances[{_short(name, 40)!r}]", distances[name], (2,))
        _same_length("pairs", pairs, f"distances[{_short(name, 40)!r}]", values)
        ax.fill_between(pairs, values.min(1), values.max(1), color=colour, alpha=0.12, lw=0)
        handles += ax.plot(pairs, np.median(values, 1), color=colour, marker=marker, ls=line, lw=1.8, ms=5.5)
    handles.append(ax.axhline(reference, color=MUTED, lw=1.2, ls=":"))
    ax.set(xscale="log", yscale="log")
    _finish(ax, "How far the DPO table is from π*", "pairs", "KL to π*, nats", title)
    _legend(ax, handles, [*distances, "the reference itself"])
    return ax


def plot_beside_frontier(points: Sequence[Mapping], frontier: tuple[Floats, Floats], ax: Axes | None = None, *,
                         title: str | None = None) -> Axes:
    """Policies in the plane of KL and reward, below the most reward that any policy has at that KL.

    points: dicts with "name" (its group, such as "PPO"), "label", "kl" (nats per response) and "reward". frontier: (kl,
    reward), (N,) each, KL increasing. The reward is in SFT standard deviations. Raises ValueError if there is no point.
    """
    _require("points", points)
    kl, reward = frontier
    kl, reward = _array("kl of frontier", kl), _array("reward of frontier", reward)
    _same_length("kl of frontier", kl, "reward of frontier", reward)
    ax = _axes(ax, 7.5, 3.8)
    handles = ax.plot(kl, reward, color=INK, lw=1.6)
    styles = _styles([point["name"] for point in points])
    for name, (colour, marker, _, _) in styles.items():
        members = [point for point in points if point["name"] == name]
        handles += ax.plot([point["kl"] for point in members], [point["reward"] for point in members], marker,
                           color=colour, ms=8, mec="white", ls="")
        for point in members:  # above the curve for what lies on it, below the mark for what lies under it
            on_curve = point["reward"] > np.interp(point["kl"], kl, reward) - 0.02 * np.ptp(reward)
            placed = {"offset": (-6, 7), "ha": "right"} if on_curve and point["kl"] > kl[0] else {"offset": (7, -11)}
            _beside(ax, (point["kl"], point["reward"]), point["label"], colour=colour, size=8, **placed)
    _legend(ax, handles, ["the best possible at this KL", *styles], loc="lower right")
    _finish(ax, "How much of the possible reward each policy has", "KL(π ‖ π_ref), nats per response",
            "reward, SFT standard deviations", title)
    return ax
