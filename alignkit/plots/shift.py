"""Pictures of what changed between checkpoints: behaviour, next tokens, KL by class and by position."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from alignkit.plots.style import (
    BEHAVIOUR_FACES,
    BLUE,
    INK,
    MUTED,
    SERIES,
    VERMILION,
    Floats,
    Interval,
    _array,
    _arrow,
    _axes,
    _backing,
    _end_labels,
    _finish,
    _finite,
    _legend,
    _number,
    _require,
    _short,
    _signed,
    _styles,
    _text,
)


# ---------------------------------------------------------------- what moved
def plot_behaviour(shares: Mapping[str, Mapping[str, Mapping[str, float]]], ax: Axes | None = None, *,
                   title: str | None = None) -> Axes:
    """What the policy does, by prompt class and stage: stacked horizontal bars of behaviour shares.

    shares: stage -> prompt class -> behaviour -> share or count; each bar is scaled to 100 %. Behaviours that are not
    in alignkit.world.BEHAVIOURS come after those that are. Raises ValueError if there is nothing to draw or a bar has
    no total.
    """
    kinds = list(dict.fromkeys(kind for classes in shares.values() for kind in classes))
    _require("shares", kinds)
    seen = dict.fromkeys(b for classes in shares.values() for bar in classes.values() for b in bar)
    behaviours = [b for b in BEHAVIOUR_FACES if b in seen] + [b for b in seen if b not in BEHAVIOUR_FACES]
    faces = {b: BEHAVIOUR_FACES.get(b, (SERIES[i % 6][0], "oo")) for i, b in enumerate(behaviours)}
    inches = len(kinds) * (0.3 + 0.25 * len(shares))
    ax = _axes(ax, 7.5, 0.95 + inches)
    y, ticks, names = 0.0, [], []
    for kind in kinds:
        _text(ax, 0, y + 0.12, _short(kind, 40), size=9, fontweight="bold", va="center")
        for stage in (stage for stage in shares if kind in shares[stage]):
            y += 1
            values = np.array([float(shares[stage][kind].get(b, 0)) for b in behaviours])
            if not (np.isfinite(values).all() and values.min() >= 0 and values.sum() > 0):
                given = dict(shares[stage][kind])
                raise ValueError(f"shares[{stage!r}][{kind!r}] is {given}, expected shares ≥ 0, not all 0")
            percent = 100 * values / values.sum()
            for behaviour, width, left in zip(behaviours, percent, np.cumsum(percent) - percent, strict=True):
                face, hatch = faces[behaviour]
                ax.barh(y, width, 0.82, left, color=face, hatch=hatch, edgecolor="white", linewidth=0.8)
                whole = f"{_short(behaviour, 14)} {width:.0f}"
                label = whole if width > 1.55 * len(whole) else f"{width:.0f}" if width >= 4 else ""
                ink = "white" if np.dot(to_rgb(face), (0.299, 0.587, 0.114)) < 0.4 else INK
                if label:
                    _text(ax, left + width / 2, y, label, ink, 8, ha="center", va="center", bbox=_backing(face))
            ticks.append(y)
            names.append(_short(stage, 18))
        y += 1.3
    ax.set_yticks(ticks, names, parse_math=False)
    ax.set(xlim=(0, 100), ylim=(y - 0.7, -0.45))
    _finish(ax, "What the policy does with each class of prompt", "share of responses, %", "", title, grid="")
    handles = [Rectangle((0, 0), 1, 1, facecolor=faces[b][0], hatch=faces[b][1], edgecolor="white") for b in behaviours]
    _legend(ax, handles, behaviours, loc="upper center", bbox_to_anchor=(0.5, -0.42 / inches),
            ncols=min(7, len(behaviours)), handlelength=1.4, columnspacing=1.2)
    return ax


def plot_next_token(before: Mapping[str, float], after: Mapping[str, float], ax: Axes | None = None, *,
                    names: tuple[str, str] = ("before", "after"), top: int = 8, title: str | None = None) -> Axes:
    """How the next-token distribution moved: an arrow from before to after for the `top` tokens that changed most.

    before, after: token -> probability; a token that one of them lacks counts as 0 there. The largest gain is on top.
    Raises ValueError if both are empty or a probability is not in [0, 1].
    """
    tokens = list(dict.fromkeys([*before, *after]))
    _require("before", tokens)
    table = np.array([[float(before.get(token, 0)), float(after.get(token, 0))] for token in tokens])
    if not ((table >= -1e-6) & (table <= 1 + 1e-6)).all():
        raise ValueError(f"before, after hold {table.min()} to {table.max()}, expected probabilities in [0, 1]")
    change = table[:, 1] - table[:, 0]
    order = sorted(np.argsort(-np.abs(change), kind="stable")[:top], key=lambda i: -change[i])
    labels = [_short(tokens[i], 44) for i in order]
    labels = [label if label and labels.count(label) == 1 else _short(repr(tokens[i])[1:-1].replace(" ", "␣"), 44)
              for i, label in zip(order, labels, strict=True)]
    first, last, change, rows = table[order, 0], table[order, 1], change[order], np.arange(len(order))
    colours = np.where(change >= 0, BLUE, VERMILION)
    ax = _axes(ax, 7.5, 1.15 + 0.3 * len(order))
    for y in rows:
        if change[y]:
            _arrow(ax, (first[y], y), (last[y], y), colours[y], lw=2.2, shrinkB=3)
        _text(ax, 1.01, y, _signed(100 * change[y], 10), colours[y], where="right", va="center", fontweight="bold")
    _text(ax, 1.01, -0.72, "change,\npoints", MUTED, 7.5, where="right", va="center")
    ax.plot(first, rows, "o", color="white", mec=MUTED, ms=6.5, mew=1.4)
    ax.scatter(last, rows, s=46, marker="s", color=colours, zorder=3)
    ax.set_yticks(rows, labels, parse_math=False)
    most = max(first.max(), last.max(), 1e-3)
    ax.set(xlim=(-0.02 * most, 1.06 * most), ylim=(len(order) - 0.5, -0.6))
    _finish(ax, f"The next token, {_short(names[0], 30)} → {_short(names[1], 30)}", "probability of the next token",
            "token", title, grid="x")
    _legend(ax, [Line2D([], [], ls="", marker="o", mfc="white", mec=MUTED, mew=1.4),
                 Line2D([], [], ls="", marker="s", color=INK)], names, loc="lower right")
    return ax


def plot_kl_by_class(kl: Mapping[str, Floats], ax: Axes | None = None, *,
                     intervals: Mapping[str, Interval] | None = None, title: str | None = None) -> Axes:
    """How far each prompt moved, by class: a dot a prompt, a box from quartile to quartile, a diamond at the mean.

    kl: class -> (N,) KL a prompt, nats per response. intervals: class -> (low, high) of the mean, from the caller's
    bootstrap: prompts of one key are not independent, so none is made up here. Raises ValueError if a class is empty.
    """
    _require("kl", kl)
    ax, least = _axes(ax, 7.5, 1.0 + 0.52 * len(kl)), 0.0
    for y, (kind, values) in enumerate(kl.items()):
        values = _finite(f"kl[{kind!r}]", values)
        least = min(least, values.min())
        jitter = (np.arange(len(values)) * 0.6180339887 % 1 - 0.5) * 0.62
        ax.plot(values, y + jitter, "o", ms=2.8, color=BLUE, alpha=0.35 if len(values) > 60 else 0.6, mew=0)
        low, middle, high = np.percentile(values, (25, 50, 75))
        ax.add_patch(Rectangle((low, y - 0.36), high - low, 0.72, facecolor="none", edgecolor=INK, lw=1.2))
        ax.plot([middle, middle], [y - 0.36, y + 0.36], color=INK, lw=1.2)
        if intervals and kind in intervals:
            ax.plot(intervals[kind], [y, y], color=VERMILION, lw=3, solid_capstyle="butt")
        ax.plot(values.mean(), y, "D", color=VERMILION, ms=6.5, mec="white")
        _text(ax, 1.01, y, f"mean {_number(values.mean())}\n{len(values)} prompts", size=8, where="right", va="center")
    ax.set_yticks(range(len(kl)), [_short(kind, 30) for kind in kl], parse_math=False)
    ax.set(ylim=(len(kl) - 0.5, -0.5), xlim=(1.04 * least, None))
    mean = "mean with 95 % interval" if intervals else "mean"
    xlabel = f"KL a prompt, nats per response   (diamond: {mean}; box: quartiles)"
    _finish(ax, "How far each prompt moved", xlabel, "prompt class", title, grid="x")
    return ax


def plot_kl_by_position(kl: Mapping[str, Sequence], ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """Where in the response the policy moved: mean KL at each position, a line a policy, a band between quartiles.

    kl: name -> (T,) means, or (N, T) a response each with NaN after its end; nats per token. Raises ValueError if it is
    empty.
    """
    _require("kl", kl)
    ax, ends = _axes(ax, 7.5, 3.3), []
    for name, (colour, marker, line, _) in _styles(kl).items():
        rows = np.atleast_2d(_array(f"kl[{name!r}]", kl[name], ndim=(1, 2)))
        rows = rows[:, np.isfinite(rows).any(0)]
        x, mean = np.arange(1, rows.shape[1] + 1), np.nanmean(rows, 0)
        if len(rows) > 1:
            ax.fill_between(x, *np.nanpercentile(rows, (25, 75), axis=0), color=colour, alpha=0.15, lw=0)
        ax.plot(x, mean, color=colour, marker=marker if len(x) <= 40 else "", ls=line, ms=5.5, lw=1.8)
        ends.append((mean[-1], name, colour))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.axhline(0, color=MUTED, lw=0.8)
    _end_labels(ax, ends)
    _finish(ax, "Where in the response the policy moved", "position in the response, tokens", "KL, nats per token",
            title)
    return ax


def plot_histogram(samples: Mapping[str, Floats], xlabel: str, ax: Axes | None = None, *, bins: int = 30,
                   title: str | None = None) -> Axes:
    """Before and after in one histogram with shared bins; a vertical line with a marker at each mean.

    samples: name -> (N,) values, one a response. xlabel: the quantity and its unit, "length, tokens". Whole numbers get
    a bin each if they span fewer than `bins`. Raises ValueError if samples are empty.
    """
    _require("samples", samples)
    arrays = {name: _finite(f"samples[{name!r}]", values) for name, values in samples.items()}
    every = np.concatenate(list(arrays.values()))
    whole = np.array_equal(every, every.round()) and np.ptp(every) < bins
    edges = np.arange(every.min() - 0.5, every.max() + 1) if whole else np.histogram_bin_edges(every, bins)
    shares = {name: 100 * np.histogram(values, edges)[0] / len(values) for name, values in arrays.items()}
    top = 1.06 * max(share.max() for share in shares.values())
    ax, labels, handles = _axes(ax, 7.5, 3.2), [], []
    for name, (colour, marker, line, hatch) in _styles(arrays).items():
        ax.stairs(shares[name], edges, fill=True, facecolor=(*to_rgb(colour), 0.18), edgecolor=(*to_rgb(colour), 0.45),
                  hatch=hatch, lw=0)
        ax.stairs(shares[name], edges, color=colour, lw=1.8, ls=line)
        mean = arrays[name].mean()
        ax.plot([mean, mean], [0, top], color=colour, lw=1.3, ls=line, marker=marker, ms=8, mec="white", markevery=[1])
        handles.append(Line2D([], [], color=colour, lw=1.8, ls=line, marker=marker, ms=7))
        labels.append(f"{_short(name, 26)}: mean {_number(mean, min(np.ptp(every), 1))}")
    ax.set_ylim(0, 1.22 * top)
    ax.margins(x=0.01)
    _finish(ax, f"Distribution of {xlabel.split(',')[0]}", xlabel, "share of responses, %", title)
    _legend(ax, handles, labels, loc="upper right", ncols=min(4, len(labels)), columnspacing=1.4)
    return ax
