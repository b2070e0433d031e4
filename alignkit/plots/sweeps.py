"""Pictures of a sweep: its jobs on the reward–KL plane, proxy against gold, each parameter's effect, the best settings.

A *job* is one run; a *setting* its parameters without the seed. Bands span the seeds.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from alignkit.plots.evaluation import plot_reward_kl_plane
from alignkit.plots.style import (
    BLUE,
    DASHED,
    DOTTED,
    INK,
    MUTED,
    ORANGE,
    VERMILION,
    Chart,
    Floats,
    Picture,
    _array,
    _axes,
    _backing,
    _beside,
    _finish,
    _require,
    _same_length,
    _short,
    _styles,
    _text,
)

MOST_VALUES = 12  # of a parameter that are joined by a line; more are draws
BEYOND = 1.5  # how far exact curves are drawn
FACES = {"proxy": BLUE, "gold": ORANGE}


def plot_sweep_plane(points: Sequence[Mapping], ax: Axes | None = None, *, proxy=None, gold_along=None,
                     gold_frontier=None, best_of_n: Mapping | None = None, sampled: Mapping | None = None,
                     unit: str = "SFT-sd", title: str | None = None) -> Axes:
    """Reward against KL of a sweep: a small point a job, a band over the seeds, the mean of each setting, exact curves.

    points: a dict a setting with "name" (its method), "label", "kl" and "proxy" and/or "gold", (S,) each over seeds; a
    setting with one seed may have "kl_ci95", "proxy_ci95", "gold_ci95". proxy, gold_along, gold_frontier, best_of_n: as
    in `plot_reward_kl_plane`, shown up to BEYOND times the points' largest KL. sampled: a frontier
    estimated from "samples" responses a prompt: "kl", "proxy", (M,), and its "ceiling", log N nats. Raises ValueError
    if there are no points or lengths differ.
    """
    _require("points", points)
    ax = _axes(ax, 8.0, 4.9)
    styles = _styles([point["name"] for point in points])
    for point in points:
        kl, (colour, marker, *_) = _array("kl", point["kl"]), styles[point["name"]]
        for reward, face in (("proxy", colour), ("gold", "none")):
            if point.get(reward) is None:
                continue
            values = _array(reward, point[reward])
            _same_length("kl", kl, reward, values)
            if len(kl) > 1:
                ax.add_patch(Rectangle((kl.min(), values.min()), np.ptp(kl), np.ptp(values), color=colour, lw=0,
                                       alpha=0.13 if reward == "proxy" else 0.07))
                ax.plot(kl, values, marker, ls="", color=colour, mfc=face, ms=3.5, mew=0.8, alpha=0.75, zorder=4)
    limit = BEYOND * max(np.max(point["kl"]) for point in points)
    curves = (None if curve is None else _up_to(limit, *curve) for curve in (proxy, gold_along, gold_frontier))
    if best_of_n:
        inside = np.asarray(best_of_n["kl"]) <= limit
        best_of_n = {name: np.asarray(values)[inside] for name, values in best_of_n.items()} if inside.any() else None
    plot_reward_kl_plane(*curves, best_of_n, points, ax, unit=unit, title=title)
    if sampled:
        _same_length("kl of sampled", sampled["kl"], "proxy of sampled", sampled["proxy"])
        kl, reward = _up_to(limit, sampled["kl"], sampled["proxy"])
        ax.plot(kl, reward, color=MUTED, ls=DASHED, lw=1.4)
        words = f"proxy possible, estimated\nfrom {sampled['samples']:g} responses"
        near = int(np.argmin(np.abs(kl - 0.6 * kl[-1])))
        _beside(ax, (kl[near], reward[near]), words, (-6, 6), MUTED, 7.5, ha="right", va="bottom")
        if sampled["ceiling"] <= ax.get_xlim()[1]:
            ax.axvline(sampled["ceiling"], color=MUTED, ls=DOTTED, lw=1)
            _text(ax, sampled["ceiling"], 0.35, f"log {sampled['samples']:g}: its ceiling", MUTED, 7.5, where="top",
                  rotation=90, ha="right", va="bottom", bbox=_backing())
    if title is None:
        _finish(ax, "Every job on the reward–KL plane", "KL to SFT, nats per response", f"reward, {unit}")
    return ax


def plot_proxy_against_gold(points: Sequence[Mapping], ax: Axes | None = None, *, unit: str = "SFT-sd",
                            title: str | None = None) -> Axes:
    """Gold against proxy: a small point a job, the mean of each setting, joined in order of KL.

    points: as in `plot_sweep_plane`; settings without a proxy or without gold are left out. On the dotted line gold
    would be as high as the proxy. Raises ValueError if no setting has both or lengths differ.
    """
    both = [point for point in points if point.get("proxy") is not None and point.get("gold") is not None]
    _require("points with proxy and gold", both)
    ax = _axes(ax, 5.2, 4.2)
    for name, (colour, marker, line, _) in _styles([point["name"] for point in both]).items():
        own = sorted((point for point in both if point["name"] == name), key=lambda point: np.mean(point["kl"]))
        means = []
        for point in own:
            x, y = _array("proxy", point["proxy"]), _array("gold", point["gold"])
            _same_length("proxy", x, "gold", y)
            means.append((x.mean(), y.mean()))
            if len(x) > 1:
                ax.plot(x, y, marker, ls="", color=colour, ms=3.5, alpha=0.6)
            if point.get("label"):
                _beside(ax, means[-1], point["label"], (6, -9), colour, 7)
        ax.plot(*np.transpose(means), color=colour, ls=line, lw=0.9, alpha=0.7)
        ax.plot(*np.transpose(means), marker, ls="", color=colour, mec="white", ms=8, zorder=5, label=_short(name, 30))
    limits = ax.get_xlim(), ax.get_ylim()
    ax.axline((0, 0), slope=1, color=MUTED, ls=DOTTED, lw=1)
    ax.set(xlim=limits[0], ylim=limits[1])
    for text in ax.legend(frameon=False, fontsize=8).get_texts():
        text.set_parse_math(False)
    _finish(ax, "Gold against the proxy that was optimised", f"proxy, {unit}", f"gold, {unit}", title)
    return ax


def plot_parameter_panels(rows: Sequence[Mapping], parameters: Sequence[str], figures: Mapping[str, str]) -> Figure:
    """Small multiples: a row a figure, a column a parameter; a point a job, the mean at each value, a band over seeds.

    rows: dicts with the parameters, "seed" and the figures; figures: key in rows -> what it is and its unit. The line
    is the mean over all other parameters, the band spans that mean of each seed. A parameter with more than MOST_VALUES
    values has points alone. Raises ValueError if there is nothing to draw.
    """
    for name, given in (("rows", rows), ("parameters", parameters), ("figures", figures)):
        _require(name, given)
    flat = len(parameters) == 1  # then the figures stand side by side
    lines, columns = (1, len(figures)) if flat else (len(figures), len(parameters))
    figure = Picture(figsize=(0.7 + 2.8 * columns, 0.5 + 2.3 * lines), facecolor="white", layout="constrained")
    for line, (key, label) in enumerate(figures.items()):
        first = None
        for column, parameter in enumerate(parameters):
            ax = figure.add_subplot(lines, columns, line * len(parameters) + column + 1, axes_class=Chart, sharey=first)
            first = first or ax
            _effect(ax, [row for row in rows if row.get(key) is not None], parameter, key)
            _finish(ax, "", parameter, label if column == 0 else "", small=True)
    return figure


def plot_ranking(places: Mapping[str, Mapping], xlabel: str, ax: Axes | None = None, *, title: str | None = None
                 ) -> Axes:
    """Settings, best first: a tick a seed, the mean with its 95 % interval; grey are those clearly below the best.

    places: label -> "values" (S,) over seeds, "mean", "low", "high" (None with one seed), "told": whether the lead of
    the best over it excludes 0. Raises ValueError if there are none.
    """
    _require("places", places)
    ax = _axes(ax, 7.5, 0.9 + 0.3 * len(places))
    for y, place in enumerate(places.values()):
        colour = MUTED if place["told"] else VERMILION if y == 0 else BLUE
        ax.plot(place["values"], np.full(len(place["values"]), y), "|", color=colour, ms=8, alpha=0.6)
        if place["low"] is not None:
            ax.plot([place["low"], place["high"]], [y, y], color=colour, lw=2.2, solid_capstyle="butt")
        ax.plot(place["mean"], y, "D" if y == 0 else "o", color=colour, mec="white", ms=8, zorder=4)
        _text(ax, 1.01, y, "best" if y == 0 else "below the best" if place["told"] else "not told from the best",
              colour, 8, where="right", va="center")
    ax.set_ylim(len(places) - 0.5, -0.5)
    ax.set_yticks(range(len(places)), [_short(name, 48) for name in places], parse_math=False)
    _finish(ax, "The best settings (line: 95 % interval over seeds)", xlabel, "", title, grid="x")
    return ax


def _effect(ax: Axes, rows: Sequence[Mapping], parameter: str, key: str) -> None:
    """One panel: `key` against a parameter, whose values are numbers on a scale or words side by side."""
    given = [row.get(parameter) for row in rows]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in given)
    values = sorted(dict.fromkeys(given)) if numeric else list(dict.fromkeys(map(str, given)))
    places = dict(zip(values, values if numeric else range(len(values)), strict=True))
    where = [value if numeric else str(value) for value in given]
    ax.plot([places[value] for value in where], [row[key] for row in rows], "o", color=MUTED, ms=3.2, alpha=0.6, mew=0)
    if 0 < len(values) <= MOST_VALUES:
        colour = FACES.get(key.rpartition(".")[2].partition("_")[0], INK)
        by_seed: dict[object, dict] = {}
        for value, row in zip(where, rows, strict=True):
            by_seed.setdefault(row.get("seed"), {}).setdefault(value, []).append(row[key])
        x = np.array([places[value] for value in values], dtype=float)
        means = np.array([[np.mean(own[value]) if value in own else np.nan for value in values]
                          for own in by_seed.values()])
        if len(by_seed) > 1:
            ax.fill_between(x, np.nanmin(means, 0), np.nanmax(means, 0), color=colour, alpha=0.16, lw=0)
        ax.plot(x, np.nanmean(means, 0), color=colour, lw=1.8, marker="o", ms=4.5)
    if numeric and values and values[0] > 0 and values[-1] / values[0] >= 8:
        ax.set_xscale("log")
    elif not numeric:
        ax.set_xticks(range(len(values)), [_short(value, 14) for value in values], parse_math=False)
    if numeric and 0 < len(values) <= 6:
        ax.set_xticks(values, [f"{value:g}" for value in values])
        ax.minorticks_off()


def _up_to(limit: float, kl: Floats, reward: Floats) -> tuple[np.ndarray, np.ndarray]:
    """The part of a curve with a KL up to `limit`, which ends there."""
    kl, reward = np.asarray(kl, dtype=float), np.asarray(reward, dtype=float)
    order = np.argsort(kl, kind="stable")
    kl, reward = kl[order], reward[order]
    inside = kl <= limit
    if inside.all():
        return kl, reward
    return np.append(kl[inside], limit), np.append(reward[inside], np.interp(limit, kl, reward))
