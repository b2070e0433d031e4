"""Pictures of evaluations: reliability, gold against proxy, intervals, the reward–KL plane."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from alignkit.formulas.intervals import Estimate, wilson
from alignkit.plots.style import (
    BLUE,
    DASH_DOT,
    DASHED,
    DOTTED,
    GREEN,
    INK,
    KNOWN,
    MUTED,
    ORANGE,
    Bins,
    Chart,
    Floats,
    Interval,
    Picture,
    _array,
    _arrow,
    _axes,
    _backing,
    _beside,
    _end_labels,
    _finish,
    _last_values,
    _legend,
    _number,
    _require,
    _same_length,
    _short,
    _signed,
    _styles,
    _text,
)


# ---------------------------------------------------------------- the reward model
def plot_reliability(bins: Bins, ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """Is the reward model as often right as it says? Share that came true by the probability given; ECE in the title.

    bins: dicts with "confidence" (mean probability given), "accuracy" (share that came true) and "count" (pairs); empty
    bins are left out. Whiskers: 95 % Wilson intervals. ECE = Σ count · |accuracy − confidence| / Σ count. Raises
    ValueError if no bin has a pair.
    """
    confidence, accuracy, count = _bins(bins, "confidence", "accuracy", "count")
    ece = (count * np.abs(accuracy - confidence)).sum() / count.sum()
    start = 0.5 if confidence.min() >= 0.5 else 0.0
    ax, span = _axes(ax, 5.2, 4.3), 1 - start
    ax.plot([start, 1], [start, 1], color=MUTED, lw=1.1, ls=DASHED)
    low, _ = _measured(ax, confidence, accuracy, count)
    floor = min(start, low.min()) - 0.24 * span
    bars = 0.15 * span * count / count.max()
    ax.bar(confidence, bars, 0.5 * min([0.1, *np.diff(np.sort(confidence))]), floor, color="#bdbdbd")
    for x, bar, n in zip(confidence, bars, count, strict=True):
        _text(ax, x, floor + bar + 0.008 * span, f"{n:.0f}", MUTED, 7, ha="center", va="bottom")
    ax.set(xlim=(start - 0.03 * span, 1 + 0.03 * span), ylim=(floor, 1.02))
    ax.set_yticks([tick for tick in np.arange(0, 1.01, 0.1 if start else 0.2) if tick >= floor + 0.19 * span])
    _finish(ax, f"Calibration of the reward model: ECE {ece:.3f}",
            "probability that the reward model gave   (grey: pairs)", "share that came true", title)
    _legend(ax, [Line2D([], [], color=MUTED, lw=1.1, ls=DASHED), Line2D([], [], color=BLUE, marker="s", lw=1.5)],
            ["as often right as it says", "measured, 95 % interval"], loc="upper left")
    return ax


def plot_margin_accuracy(bins: Bins, ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """Accuracy of the reward model by how far apart it puts the responses, beside Bradley–Terry's promise, σ(margin).

    bins: dicts with "margin" (mean |Δscore|, raw score units), "accuracy", "count" and, if known, "bayes" (the best
    accuracy that the annotator's noise allows). Whiskers: 95 % Wilson intervals. Raises ValueError if no bin has a
    pair.
    """
    margin, accuracy, count = _bins(bins, "margin", "accuracy", "count")
    x = np.linspace(0, 1.05 * max(margin.max(), 1e-6), 100)
    promised, ax = 1 / (1 + np.exp(-x)), _axes(ax, 6.2, 3.7)
    ax.plot(x, promised, color=MUTED, lw=1.2, ls=DASHED)
    ax.axhline(0.5, color=INK, lw=0.9, ls=DOTTED)
    ends = [(promised[-1], "promised: σ(margin)", MUTED), (0.5, "guessing", INK), (accuracy[-1], "reward model", BLUE)]
    if all(row.get("bayes") is not None for row in bins if row["count"] > 0):
        bayes = _bins(bins, "bayes")[0]
        ax.plot(margin, bayes, color=GREEN, ls=DASH_DOT, marker="v", lw=1.4, ms=5.5)
        ends.append((bayes[-1], "best possible (Bayes)", GREEN))
    low, high = _measured(ax, margin, accuracy, count)
    for at, y, n in zip(margin, high, count, strict=True):
        _text(ax, at, y + 0.008, f"{n:.0f}", MUTED, 7, ha="center", va="bottom")
    ax.set(xlim=(0, x[-1]), ylim=(min(0.45, low.min() - 0.02), 1.04))
    _end_labels(ax, ends)
    _finish(ax, "The surer, the more often right?", "margin |Δscore|, raw score   (small figures: pairs)",
            "accuracy, share of pairs", title)
    return ax


# ---------------------------------------------------------------- better, or merely different?
def plot_gold_vs_proxy(kl: Sequence, gold: Sequence, proxy: Sequence, ax: Axes | None = None, *,
                       intervals: Sequence | None = None, xlabel: str = "KL to SFT, nats per response",
                       unit: str = "SFT-sd", title: str | None = None) -> Axes:
    """Over-optimisation: the proxy that is optimised and the gold that is meant, against KL or iteration; peak marked.

    kl, gold, proxy: (N,), or (S, N) for S seeds: then the mean is drawn, with a band from the lowest to the highest
    seed. intervals: (N, 2), the 95 % interval (low, high) of gold at each point, as bars; None: none. Raises ValueError
    if lengths differ.
    """
    x = np.atleast_2d(_array("kl", kl, ndim=(1, 2))).mean(0)
    ax, means = _axes(ax, 7.5, 3.6), {}
    for name, values in (("proxy", proxy), ("gold", gold)):
        rows = np.atleast_2d(_array(name, values, ndim=(1, 2)))
        _same_length("kl", x, name, rows.T)
        colour, marker, line, _ = KNOWN[name]
        means[name] = rows.mean(0)
        if len(rows) > 1:
            ax.fill_between(x, rows.min(0), rows.max(0), color=colour, alpha=0.18, lw=0)
        ax.plot(x, means[name], color=colour, ls=line, lw=2, marker=marker if name == "proxy" else "", ms=5,
                markevery=max(1, len(x) // 10))
    if intervals is not None:
        low, high = np.array(intervals, dtype=float).reshape(-1, 2).T
        _same_length("kl", x, "intervals", low)
        ax.vlines(x, low, high, color=KNOWN["gold"][0], lw=1.3, alpha=0.8)
    peak = int(means["gold"].argmax())
    top = means["gold"][peak]
    fall = round(top, 2) - round(means["gold"][-1], 2)  # of the figures that stand in the picture
    left = x[peak] > (x.min() + x.max()) / 2
    ax.axvline(x[peak], color=INK, lw=0.9, ls=DOTTED)
    ax.plot(x[peak], top, "*", color=ORANGE, ms=15, mec=INK, mew=0.8, zorder=5)
    story = f"gold peaks at {_signed(top)},\nthen falls by {_number(fall)}" if fall else "gold is highest at the end"
    down = -14 if intervals is None else -40  # below the bars
    _beside(ax, (x[peak], top), story, (-10 if left else 10, down), va="top", ha="right" if left else "left")
    _end_labels(ax, _last_values(means))
    parted = fall > 0 and means["proxy"][-1] > means["proxy"][peak]
    default = "The proxy keeps rising, gold does not" if parted else "Proxy and gold"
    _finish(ax, default, xlabel, f"reward, {unit}", title)
    return ax


def plot_tradeoff(points: Sequence[Mapping], ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """Better, or merely obedient? Over-refusal of harmless prompts against failures on risky ones, in arrow order.

    points: dicts in the order of the relay with "name", "over_refusal_rate" and "risky_failure_rate" (shares in [0, 1])
    and, if known, "over_refusal_ci95" and "risky_failure_ci95" (low, high). Raises ValueError if there are none.
    """
    _require("points", points)
    ax, styles = _axes(ax, 5.6, 4.3), _styles([point["name"] for point in points])
    xy = 100 * np.array([[float(point["over_refusal_rate"]), float(point["risky_failure_rate"])] for point in points])
    for before, after in pairwise(xy):
        _arrow(ax, before, after, "#a8a8a8", lw=1.3, shrinkA=7, shrinkB=7)
    for i, (point, (x, y)) in enumerate(zip(points, xy, strict=True)):
        colour, marker, _, _ = styles[point["name"]]
        known = [point.get(key) for key in ("over_refusal_ci95", "risky_failure_ci95")]
        _cross(ax, x, y, *(interval and 100 * np.asarray(interval) for interval in known), colour)
        ax.plot(x, y, marker, color=colour, ms=10, mec="white", zorder=4)
        nearest = min((j for j in range(len(xy)) if j != i), key=lambda j: np.abs(xy[j] - xy[i]).sum(), default=i)
        below = y < xy[nearest, 1] and y > 0.06 * xy[:, 1].max()
        _beside(ax, (x, y), point["name"], (9, -15 if below else 7), colour, 9, fontweight="bold")
    ax.set(xlim=(-0.04 * ax.get_xlim()[1], None), ylim=(-0.04 * ax.get_ylim()[1], None))
    _finish(ax, "Better, or merely obedient? (↙ is better)", "over-refusal: harmless prompts refused, %",
            "risky failure: risky prompts complied with, %", title, grid="both")
    return ax


def plot_refusals(results: Mapping[str, Mapping[str, Estimate]], ax: Axes | None = None, *,
                  title: str | None = None) -> Axes:
    """Over-refusal against compliance with unsafe prompts (XSTest's plane), a point with its intervals per checkpoint.

    results: checkpoint -> the `metrics` of its `Refusals`, of which "over_refusal" and "unsafe_compliance" (shares) are
    drawn; an estimate without low and high has no whisker. The lower left corner is best; on the dashed line a policy
    refuses as many safe prompts as unsafe ones. Raises ValueError if there are none, or one has no
    safe or no unsafe prompts.
    """
    _require("results", results)
    names = ("over_refusal", "unsafe_compliance")
    for checkpoint, metrics in results.items():
        if missing := [name for name in names if name not in metrics]:
            raise ValueError(f"results[{checkpoint!r}] has no {missing[0]!r}, expected safe and unsafe prompts")
    ax, styles = _axes(ax, 5.6, 4.6), _styles(list(results))
    ax.plot([0, 100], [100, 0], color=MUTED, lw=0.9, ls=DASHED)
    for checkpoint, metrics in results.items():
        pair, colour = [metrics[name] for name in names], styles[checkpoint][0]
        x, y = (100 * estimate.value for estimate in pair)
        spans = [None if each.low is None else (100 * each.low, 100 * each.high) for each in pair]
        _cross(ax, x, y, *spans, colour)
        ax.plot(x, y, styles[checkpoint][1], color=colour, ms=10, mec="white", zorder=4)
    handles = [Line2D([], [], ls="", marker=marker, color=colour, ms=9) for colour, marker, _, _ in styles.values()]
    handles.append(Line2D([], [], color=MUTED, lw=0.9, ls=DASHED))
    _legend(ax, handles, [*styles, "cannot tell safe from unsafe"], loc="upper right")
    ax.set(xlim=(-4, 104), ylim=(-4, 104))
    _finish(ax, "What is refused, and what is not (↙ is better)", "over-refusal: safe prompts refused, %",
            "unsafe prompts fully complied with, %", title, grid="both")
    return ax


def plot_intervals(values: Mapping[str, Floats], xlabel: str, ax: Axes | None = None, *, title: str = "") -> Axes:
    """One metric, a row a stage: a dot with its 95 % interval, the figure written beside it.

    values: stage -> (value, low, high); without an interval (value,) or (value, None, None). xlabel: the metric and its
    unit. Raises ValueError if there are none or an interval ends before it begins.
    """
    ax = _axes(ax, 6.2, 0.9 + 0.36 * len(values))
    _intervals(ax, "values", values)
    _finish(ax, "", f"{xlabel}   (line: 95 % interval)", "stage", title, grid="x")
    return ax


def plot_intervals_panels(metrics: Mapping[str, Mapping[str, Floats]], *, columns: int = 3, title: str = "") -> Figure:
    """`plot_intervals` for several metrics, a panel each. Returns a Figure.

    metrics: "gold reward, SFT-sd" -> stage -> (value, low, high). Raises ValueError if there are none.
    """
    _require("metrics", metrics)
    stages, columns = list(dict.fromkeys(s for values in metrics.values() for s in values)), min(columns, len(metrics))
    lines = -(-len(metrics) // columns)
    size = (2.8 * columns + 0.6, lines * (0.72 + 0.28 * len(stages)) + 0.3 * bool(title))
    figure = Picture(figsize=size, facecolor="white", layout="constrained")
    for i, (metric, values) in enumerate(metrics.items()):
        ax = figure.add_subplot(lines, columns, i + 1, axes_class=Chart)
        _intervals(ax, f"metrics[{metric!r}]", {stage: values[stage] for stage in stages if stage in values})
        ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        _finish(ax, "", metric, "" if i % columns else "stage", grid="x", small=True)
        if i % columns and list(values) == stages:
            ax.tick_params(labelleft=False)
    if title:
        figure.suptitle(_short(title, 120), x=0.01, ha="left", fontsize=10.5, fontweight="bold", color=INK,
                        parse_math=False)
    return figure


def plot_reward_kl_plane(proxy=None, gold_along=None, gold_frontier=None, best_of_n: Mapping | None = None,
                         points: Sequence[Mapping] = (), ax: Axes | None = None, *, unit: str = "SFT-sd",
                         title: str | None = None) -> Axes:
    """Reward against KL: exact curves, best-of-n and runs. Solid and filled is proxy, dashed and open is gold.

    proxy, gold_along, gold_frontier: (kl, reward), each (N,): the exact proxy frontier, gold along it, gold's own
    frontier. best_of_n: {"n", "kl", "proxy", "gold"}, arrays; either reward may be missing. points: dicts with "name",
    "kl", "proxy" and/or "gold": each a number with "kl_ci95", "proxy_ci95", "gold_ci95" (low, high) beside it, or an
    array over seeds, which the cross then spans. "label" ("β = 0.35") is written at the point; points of one name are
    joined. KL in nats per response. Raises ValueError if there is nothing to draw.
    """
    if all(part is None for part in (proxy, gold_along, gold_frontier, best_of_n)) and not len(points):
        raise ValueError("points is empty and no curve is given, expected at least one of them")
    ax, ends = _axes(ax, 7.5, 4.7), []
    for name, curve, colour, line in (("best possible proxy", proxy, BLUE, "-"),
                                      ("gold of that policy", gold_along, ORANGE, DASHED),
                                      ("best possible gold", gold_frontier, GREEN, DASH_DOT)):
        if curve is not None:
            x, y = (_array(f"{axis} of {name}", values) for axis, values in zip(("kl", "reward"), curve, strict=True))
            _same_length("kl", x, name, y)
            order = np.argsort(x, kind="stable")
            ax.plot(x[order], y[order], color=colour, ls=line, lw=2.2)
            ends.append((x.max(), y[order][-1], name, colour))
    for reward, face, line in (("proxy", MUTED, "-"), ("gold", "white", DASHED)) if best_of_n else ():
        if best_of_n.get(reward) is not None:
            x, y = _array("best_of_n kl", best_of_n["kl"]), _array(f"best_of_n {reward}", best_of_n[reward])
            _same_length("best_of_n kl", x, f"best_of_n {reward}", y)
            ax.plot(x, y, marker="o", ms=4.5, color=MUTED, mfc=face, ls=line, lw=1)
            ends.append((x.max(), y[-1], f"best of {best_of_n['n'][-1]:g}, {reward}", MUTED))
            for at, height, n in list(zip(x, y, best_of_n["n"], strict=True))[2:-1] if face == MUTED else ():
                _beside(ax, (at, height), f"{n:g}", (3, -9), MUTED, 6.5)
    styles = _styles([point["name"] for point in points])
    for name, (colour, marker, _, _) in styles.items():
        for reward, face, edge, line in (("proxy", colour, "white", "-"), ("gold", "white", colour, DOTTED)):
            rows = [point for point in points if point["name"] == name and point.get(reward) is not None]
            centres = [[np.mean(point[axis]) for axis in ("kl", reward)] for point in rows]
            ax.plot(*np.reshape(centres, (-1, 2)).T, color=colour, lw=0.9, alpha=0.7, ls=line)
            for point, (x, y) in zip(rows, centres, strict=True):
                spans = [point.get(f"{a}_ci95") or (np.min(point[a]), np.max(point[a])) for a in ("kl", reward)]
                _cross(ax, x, y, *spans, colour)
                ax.plot(x, y, marker, color=colour, mfc=face, mec=edge, mew=1.2, ms=7.5, zorder=5)
                if point.get("label") and (reward == "proxy" or point.get("proxy") is None):
                    _beside(ax, (x, y), point["label"], (6, -10), colour, 7.5, bbox=_backing())
    if styles:
        handles = [Line2D([], [], ls="", marker=style[1], color=style[0], ms=7.5) for style in styles.values()]
        handles.append(Line2D([], [], color=INK, marker="o"))
        handles.append(Line2D([], [], color=INK, marker="o", mfc="white", ls=DASHED))
        _legend(ax, handles, [*styles, "filled, solid: proxy", "open, dashed: gold"], loc="lower right",
                bbox_to_anchor=(1, 0.12), ncols=2, handlelength=3)
    ax.axhline(0, color=MUTED, lw=0.8)
    ax.set_xlim(left=0)
    far = [end for end in ends if end[0] > 0.85 * ax.get_xlim()[1]]
    _end_labels(ax, [(y, name, colour) for _, y, name, colour in far])
    for x, y, name, colour in (end for end in ends if end not in far):
        _beside(ax, (x, y), name, (6, 0), colour, va="center")
    _finish(ax, "The reward that KL buys", "KL to SFT, nats per response", f"reward, {unit}", title)
    return ax


def plot_greetings(scores: Mapping[str, Floats], ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """Scores of one right answer by the number of greetings in front of it: what a reward model believes, what is true.

    scores: "proxy" and "gold" (or other names) -> mean scores (N,), SFT standard deviations, of 0 … N − 1 greetings.
    Raises ValueError if there are none or lengths differ.
    """
    _require("scores", scores)
    ax, styles = _axes(ax, 7.5, 3.2), _styles(scores)
    first = next(iter(scores))
    for name, values in scores.items():
        _same_length(first, scores[first], name, values)
        colour, marker, line, _ = KNOWN.get(name, styles[name])
        ax.plot(_array(name, values), color=colour, marker=marker, ls=line, lw=2, ms=8)
    ax.set_xticks(range(len(scores[first])))
    _finish(ax, "Proxy and gold of a right answer behind greetings", "greetings before the right answer",
            "score, SFT standard deviations", title)
    _legend(ax, ax.lines, scores, loc="upper left")
    return ax


def plot_kl_panels(predictors: Mapping[str, Floats], kl: Floats, kinds: Sequence[str],
                   correlations: Mapping[str, float]) -> Figure:
    """KL of each prompt against each of several predictors, a panel each, prompt classes by colour. Returns a Figure.

    predictors: name with unit -> values (P,). kl: (P,), nats per response. kinds: class of each prompt (P,).
    correlations: name -> rank correlation of predictor and KL, written in the panel's title. Raises ValueError if there
    are no predictors or lengths differ.
    """
    _require("predictors", predictors)
    figure = Picture(figsize=(3.1 * len(predictors) + 0.1, 3.3), layout="constrained", facecolor="white")
    kl, kinds, styles = _array("kl", kl), np.array(kinds), _styles(kinds)
    for place, (name, values) in enumerate(predictors.items()):
        values = _array(name, values)
        _same_length("kl", kl, name, values)
        ax = figure.add_subplot(1, len(predictors), place + 1, axes_class=Chart)
        for kind, (colour, marker, _, _) in styles.items():
            ax.plot(values[kinds == kind], kl[kinds == kind], marker, color=colour, ms=4.5, alpha=0.7)
        _finish(ax, f"rank correlation {_signed(correlations[name])}", name, "KL to SFT, nats per response", small=True)
    handles = [Line2D([], [], ls="", marker=marker, color=colour) for colour, marker, _, _ in styles.values()]
    legend = figure.legend(handles, [_short(kind, 24) for kind in styles], frameon=False, fontsize=8,
                           loc="outside lower center", ncols=4)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _cross(ax: Axes, x: float, y: float, across: Interval | None, up: Interval | None, colour: str) -> None:
    if across is not None and np.ptp(across) > 0:
        ax.plot(across, (y, y), color=colour, lw=1.6, solid_capstyle="butt")
    if up is not None and np.ptp(up) > 0:
        ax.plot((x, x), up, color=colour, lw=1.6, solid_capstyle="butt")


def _intervals(ax: Axes, argument: str, values: Mapping[str, Floats]) -> None:
    _require(argument, values)
    known = {stage: [float(number) for number in numbers if number is not None] for stage, numbers in values.items()}
    span = np.ptp([number for numbers in known.values() for number in numbers]) or 1.0
    for y, (stage, (colour, marker, _, _)) in enumerate(_styles(values).items()):
        value, *interval = known[stage]
        if interval:
            low, high = interval
            if low > high:
                given = tuple(values[stage])
                raise ValueError(f"{argument}[{stage!r}] is {given}, expected (value, low, high) with low ≤ high")
            ax.plot([low, high], [y, y], color=colour, lw=2.2, solid_capstyle="butt")
        ax.plot(value, y, marker, color=colour, ms=8, mec="white", zorder=4)
        _text(ax, 1.02, y, _number(value, span), where="right", va="center")
    ax.set_yticks(range(len(values)), [_short(stage, 24) for stage in values], parse_math=False)
    ax.set_ylim(len(values) - 0.5, -0.5)
    if ax.get_xlim()[0] < 0 < ax.get_xlim()[1]:
        ax.axvline(0, color=INK, lw=0.9)


def _measured(ax: Axes, x: np.ndarray, share: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.transpose([wilson(a * n, n) for a, n in zip(share, count, strict=True)])
    ax.vlines(x, low, high, color=BLUE, lw=1.4, alpha=0.6)
    ax.plot(x, share, "-s", color=BLUE, lw=1.6, ms=6, mec="white")
    return low, high


def _bins(bins: Bins, *keys: str) -> list[np.ndarray]:
    bins = [row for row in bins if row["count"] > 0]
    _require("bins", bins)
    return [np.array([float(row[key]) for row in bins]) for key in keys]
