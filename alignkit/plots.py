"""Pictures, in matplotlib alone. Arrays, dicts and lists of dicts go in; an Axes (`plot_*`) or a Figure comes out.

Every `plot_*(…, ax=None)` draws into `ax`, or makes a figure of its own that pyplot never sees: nothing leaks, and the
last line of a notebook cell shows it as a PNG, under papermill too. Text from users and models is never read as maths.
What colour says, a marker, line style, hatch or label says as well (palette: Okabe and Ito 2008). `title=""` leaves the
title out.
"""

import io
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator

from alignkit.intervals import wilson
from alignkit.records import write_atomically
from alignkit.text import visible

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
METRICS = {  # name in metrics.jsonl -> what it is, unit
    "objective/scores": ("score", "SFT-sd"),
    "objective/rlhf_reward": ("score − β·KL", "SFT-sd"),
    "objective/kl": ("KL to the reference", "nats a response"),
    "objective/kl_k3": ("KL, by k3", "nats a response"),
    "objective/kl_coef": ("KL coefficient β", "SFT-sd a nat"),
    "objective/entropy": ("entropy", "nats a response"),
    "objective/length": ("response length", "tokens"),
    "val/eos_rate": ("ended with EOS", "share of responses"),
    "val/explained_variance": ("critic: explained variance", "share"),
    "val/ratio_max": ("largest ratio", "π / π_old"),
    "policy/clipfrac_avg": ("clip fraction", "share of tokens"),
    "policy/approxkl_avg": ("KL to the old policy", "nats a token"),
    "policy/grad_norm": ("gradient norm", "norm"),
    "loss/policy_avg": ("policy", "loss"),
    "loss/value_avg": ("value", "loss"),
    "loss/ptx_avg": ("SFT loss mixed in", "nats a token"),
    "rewards/chosen": ("chosen", "β · nats"),
    "rewards/rejected": ("rejected", "β · nats"),
    "rewards/margins": ("implicit-reward margin", "β · nats"),
    "rewards/accuracies": ("pairs ranked rightly", "share of pairs"),
    "logps/chosen": ("chosen", "nats a response"),
    "logps/rejected": ("rejected", "nats a response"),
    "logps/chosen_shift": ("chosen", "nats a response"),
    "logps/rejected_shift": ("rejected", "nats a response"),
    "loss": ("training loss", "nats"),
    "eval_loss": ("held-out loss", "nats"),
    "accuracy": ("accuracy", "share of pairs"),
    "eval_accuracy": ("held-out accuracy", "share of pairs"),
    "margin": ("score margin", "raw score"),
    "entropy": ("entropy", "nats a token"),
    "mean_token_accuracy": ("next token guessed", "share of tokens"),
    "learning_rate": ("learning rate", "a step"),
    "grad_norm": ("gradient norm", "norm"),
}
PPO_PANELS = {
    "reward": ("objective/scores", "objective/rlhf_reward"), "KL to the reference": "objective/kl",
    "entropy": "objective/entropy", "clip fraction": "policy/clipfrac_avg",
    "critic: explained variance": "val/explained_variance", "ended with EOS": "val/eos_rate",
    "response length": "objective/length", "losses": ("loss/policy_avg", "loss/value_avg")}
RELAY = {  # stage -> name, what it does, colour
    "sft": ("SFT", "imitate\ndemonstrations", MUTED),
    "reward": ("Reward model", "learn what\nannotators prefer", GREEN),
    "ppo": ("PPO", "optimise that,\nstay near SFT", BLUE),
    "frozen": ("Freeze & evaluate", "lock the weights,\nmeasure", SKY),
    "dpo": ("DPO", "sharpen on\npreference pairs", VERMILION),
}


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
    _finish(ax, "What the policy does with each class of prompt", "share of responses, %", "stage", title, grid="")
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

    kl: class -> (N,) KL a prompt, nats a response. intervals: class -> (low, high) of the mean, from the caller's
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
    xlabel = f"KL a prompt, nats a response   (diamond: {mean}; box: quartiles)"
    _finish(ax, "How far each prompt moved", xlabel, "prompt class", title, grid="x")
    return ax


def plot_kl_by_position(kl: Mapping[str, Sequence], ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """Where in the response the policy moved: mean KL at each position, a line a policy, a band between quartiles.

    kl: name -> (T,) means, or (N, T) a response each with NaN after its end; nats a token. Raises ValueError if it is
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
    _finish(ax, "Where in the response the policy moved", "position in the response, tokens", "KL, nats a token", title)
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


# ---------------------------------------------------------------- training


def plot_metrics(rows: Sequence[Mapping[str, float]], names: Sequence[str] | Mapping[str, str | Sequence[str]],
                 figure: Figure | None = None, *, columns: int = 4, xlabel: str = "step",
                 marks: Iterable[tuple[float, str]] = (), branches: Iterable[Sequence[Mapping[str, float]]] = (),
                 title: str = "") -> Figure:
    """Small panels of logged numbers against `step`, the live chart of every stage. Returns a Figure.

    rows: dicts as in metrics.jsonl, each with "step"; one that is missing, None or NaN is left out. names: the
    metrics, a panel each; or panel title -> a metric, or several that share the panel. figure: what an earlier call
    with the same names returned, to redraw in place, which halves the time. marks: (step, what was changed there), as
    lettered lines. branches: rows of what was left by rewinding, as thin dashed lines. Raises ValueError if rows or
    names are empty, a row has no step, none of the names was logged, or `figure` has other panels.
    """
    branches = list(branches)
    _require("rows", [*rows, *branches])
    _require("names", names)
    called = [METRICS.get(name, (name,))[0] for name in names]
    panels = names if isinstance(names, Mapping) else {
        label if called.count(label) == 1 else name: name for name, label in zip(names, called, strict=True)}
    panels = {panel: (which,) if isinstance(which, str) else tuple(which) for panel, which in panels.items()}
    if missing := [i for i, row in enumerate(rows) if "step" not in row]:
        raise ValueError(f"rows[{missing[0]}] has {sorted(rows[missing[0]])}, expected a key 'step'")
    logged = {key for its in (rows, *branches) for row in its for key in row} - {"step"}
    series = {name: [_points(its, name) for its in (rows, *branches)] for which in panels.values() for name in which}
    if not any(points.size for lines in series.values() for points in lines):
        raise ValueError(f"names are {sorted(series)}, expected some of {sorted(logged)}")

    marks, columns = list(marks), min(columns, len(panels))
    legend = [f"{_letter(i)}: {_short(what, 60)} ({xlabel} {at:g})" for i, (at, what) in enumerate(marks)]
    legend += ["thin dashes: left by rewinding"] if branches else []
    captions = textwrap.wrap("    ".join(legend), 33 * columns)
    lines = -(-len(panels) // columns)
    cell_width, cell_height, across, up, low = 2.35, 1.6, 1.64, 1.08, 0.17 + 0.17 * len(captions)  # inches
    width, height = cell_width * columns, cell_height * lines + low + 0.28 * bool(title)
    if figure is None:
        figure = _metric_axes(panels, xlabel, across, up)
    elif getattr(figure, "panels", None) != panels:
        raise ValueError(f"figure has the panels {getattr(figure, 'panels', None)}, expected {panels}")
    figure.set_size_inches(width, height)
    for text in [*figure.texts, *(text for ax in figure.axes for text in ax.texts),
                 *(line for ax in figure.axes for line in ax.lines[len(panels[ax.get_label()]):])]:
        text.remove()
    for i, (ax, which) in enumerate(zip(figure.axes, panels.values(), strict=True)):
        row, column = divmod(i, columns)
        left, bottom = cell_width * column + 0.6, low + cell_height * (lines - 1 - row) + 0.26
        ax.set_position((left / width, bottom / height, across / width, up / height))
        ax.xaxis.label.set_visible(i + columns >= len(panels))
        for line, name in zip(list(ax.lines), which, strict=True):
            line.set_data(series[name][0])
            line.set_marker("o" if series[name][0].shape[1] == 1 else "")
            for points in series[name][1:]:
                ax.plot(*points, color=line.get_color(), ls=(0, (2, 2)), lw=1, alpha=0.65, zorder=1.5)
        empty = not any(len(line.get_xdata()) for line in ax.lines)
        ax.tick_params(labelleft=not empty, labelbottom=not empty)
        ax.yaxis.grid(not empty)
        if empty:
            _text(ax, 0.5, 0.5, "not logged", MUTED, 8, where="axes", ha="center", va="center")
        elif len(which) > 1 and ax.get_legend() is None:
            _legend(ax, ax.lines[: len(which)], [METRICS.get(name, (name,))[0] for name in which], 7, handlelength=1.8)
        ax.relim()
        ax.autoscale()
        near, room = np.inf, 0.06 * np.ptp(ax.get_xlim())
        for letter, (at, _) in enumerate(marks):
            ax.axvline(at, color=INK, lw=0.9, ls=DOTTED)
            if abs(at - near) < room:  # two letters would overlap
                ax.texts[-1].set_text(ax.texts[-1].get_text() + _letter(letter))
            else:
                _text(ax, at, 0.99, f" {_letter(letter)}", size=7, where="top", va="top")
                near = at
    for i, caption in enumerate(reversed(captions)):
        figure.text(0.6 / width, (0.05 + 0.17 * i) / height, caption, fontsize=7.5, color=INK, parse_math=False)
    if title:
        figure.text(0.13 / width, 1 - 0.06 / height, _short(title, 120), fontsize=10.5, fontweight="bold", color=INK,
                    va="top", parse_math=False)
    return figure


def _points(rows: Sequence[Mapping[str, float]], name: str) -> np.ndarray:
    """(2, N): steps and values of the rows that have a number under `name`."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    points = np.array(points, dtype=float).reshape(-1, 2)
    return points[np.isfinite(points[:, 1])].T


def _metric_axes(panels: Mapping[str, tuple[str, ...]], xlabel: str, across: float, up: float) -> Picture:
    """The empty panels of `plot_metrics`, `across` × `up` inches; what can be fixed is, since measuring takes time."""
    figure = Picture(facecolor="white")
    figure.panels = panels
    for panel, which in panels.items():
        ax = figure.add_subplot(axes_class=Chart, label=panel)
        for i in range(len(which)):
            colour, _, line, _ = SERIES[i % len(SERIES)]
            ax.plot([], [], color=colour, ls=line, lw=1.5, ms=4)
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}".replace("-", "−"))
        _finish(ax, panel, xlabel, METRICS.get(which[0], ("", "value"))[1], small=True)
        ax.tick_params(length=0)
        ax.xaxis.set_label_coords(0.5, -0.23 / up)
        ax.yaxis.set_label_coords(-0.47 / across, 0.5)
    return figure


def plot_ppo_panels(rows: Sequence[Mapping[str, float]], figure: Figure | None = None, *,
                    marks: Iterable[tuple[float, str]] = (), title: str = "") -> Figure:
    """PPO's eight dials: reward, KL, entropy, clip fraction, explained variance, EOS rate, length, losses. A Figure.

    rows: what `PPOStats.log()` gives, one an iteration. The rest: see `plot_metrics`.
    """
    return plot_metrics(rows, PPO_PANELS, figure, xlabel="iteration", marks=marks, title=title)


def plot_dpo_logps(steps: Floats, chosen: Floats, rejected: Floats, ax: Axes | None = None, *,
                   title: str | None = None) -> Axes:
    """Log-probability of chosen and rejected responses over DPO, each less its first value; the gap is the margin / β.

    steps, chosen, rejected: (N,), nats a response. Use log π − log π_ref ("logps/chosen_shift", exactly 0 at step 0),
    or "logps/chosen" of the same pairs at each step. Raises ValueError if lengths differ.
    """
    steps, ax, moved = _array("steps", steps), _axes(ax, 7.5, 3.3), {}
    for name, values in (("chosen", chosen), ("rejected", rejected)):
        values = _array(name, values)
        _same_length("steps", steps, name, values)
        moved[name] = values - values[0]
        colour, marker, line, _ = KNOWN[name]
        every = max(1, len(steps) // 10)
        ax.plot(steps, moved[name], color=colour, ls=line, lw=1.8, marker=marker, ms=5, markevery=every)
    ax.fill_between(steps, moved["chosen"], moved["rejected"], color=MUTED, alpha=0.1, lw=0)
    ax.axhline(0, color=INK, lw=0.9)
    _end_labels(ax, [(0, "reference", INK), *_last_values(moved)])
    both = ": both fell" if max(y[-1] for y in moved.values()) < 0 else ""
    _finish(ax, f"Log-probability of the pairs under DPO{both}", "step", "change of log-probability, nats", title)
    return ax


def plot_margins(steps: Floats, margins: Sequence, ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """DPO's implicit-reward margin over training: the mean, or the median with the middle 50 % and 90 % of the pairs.

    steps: (S,). margins: (S,) means, or (S, N) with a column a pair; β · nats. A pair below 0 (hatched) is ranked
    wrongly. Raises ValueError if lengths differ.
    """
    steps, margins = _array("steps", steps), _array("margins", margins, ndim=(1, 2))
    _same_length("steps", steps, "margins", margins)
    ax, middle, right, ends = _axes(ax, 7.5, 3.3), margins, "", []
    if margins.ndim == 2:
        low, quarter, middle, three, high = np.nanpercentile(margins, (5, 25, 50, 75, 95), axis=1)
        ax.fill_between(steps, low, high, color=BLUE, alpha=0.13, lw=0)
        ax.fill_between(steps, quarter, three, color=BLUE, alpha=0.25, lw=0)
        right = f": {100 * np.mean(margins[-1] > 0):.0f} % of pairs ranked rightly at the end"
        ends = [(three[-1], "middle 50 %", MUTED), (high[-1], "middle 90 %", MUTED)]
    ax.plot(steps, middle, color=BLUE, lw=1.9, marker="o" if len(steps) == 1 else "")
    top = ax.get_ylim()[1]
    bottom = min(ax.get_ylim()[0], -0.08 * abs(top))
    ax.axhspan(bottom, 0, facecolor="none", edgecolor="#c9c9c9", hatch="////", lw=0, zorder=0)
    ax.set_ylim(bottom, max(top, 0))
    ax.margins(x=0)
    ax.axhline(0, color=INK, lw=0.9)
    _end_labels(ax, [*ends, (middle[-1], "median" if ends else "mean", BLUE), (bottom / 2, "ranked wrongly", MUTED)])
    _finish(ax, f"Implicit-reward margin{right}", "step", "margin, β · nats", title)
    return ax


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
                       xlabel: str = "KL to SFT, nats a response", unit: str = "SFT-sd",
                       title: str | None = None) -> Axes:
    """Over-optimisation: the proxy that is optimised and the gold that is meant, against KL or iteration; peak marked.

    kl, gold, proxy: (N,), or (S, N) for S seeds: then the mean is drawn, with a band from the lowest to the highest
    seed. Raises ValueError if lengths differ.
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
    peak = int(means["gold"].argmax())
    top = means["gold"][peak]
    fall = top - means["gold"][-1]
    left = x[peak] > (x.min() + x.max()) / 2
    ax.axvline(x[peak], color=INK, lw=0.9, ls=DOTTED)
    ax.plot(x[peak], top, "*", color=ORANGE, ms=15, mec=INK, mew=0.8, zorder=5)
    story = f"gold peaks at {_signed(top)},\nthen falls by {_number(fall)}" if fall else "gold is highest at the end"
    _beside(ax, (x[peak], top), story, (-10 if left else 10, -14), va="top", ha="right" if left else "left")
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
    joined. KL in nats a response. Raises ValueError if there is nothing to draw.
    """
    if all(part is None for part in (proxy, gold_along, gold_frontier, best_of_n)) and not len(points):
        raise ValueError("points is empty and no curve is given, expected at least one of them")
    ax, ends = _axes(ax, 7.5, 4.7), []
    for name, curve, colour, line in (("best possible proxy", proxy, BLUE, "-"),
                                      ("gold along it", gold_along, ORANGE, DASHED),
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
            mine = [point for point in points if point["name"] == name and point.get(reward) is not None]
            centres = [[np.mean(point[axis]) for axis in ("kl", reward)] for point in mine]
            ax.plot(*np.reshape(centres, (-1, 2)).T, color=colour, lw=0.9, alpha=0.7, ls=line)
            for point, (x, y) in zip(mine, centres, strict=True):
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
    _finish(ax, "The reward that KL buys", "KL to SFT, nats a response", f"reward, {unit}", title)
    return ax


# ---------------------------------------------------------------- pictures that explain


def plot_relay(headlines: Mapping[str, str] | None = None, here: str | None = None, ax: Axes | None = None, *,
               title: str = "") -> Axes:
    """The chain SFT → reward model → PPO → freeze, evaluate → DPO, a headline under each box, and "you are here".

    headlines: stage ("sft", "reward", "ppo", "frozen", "dpo") -> a few words with a figure. here: the stage to mark.
    Raises ValueError on a stage that is not in the chain.
    """
    if unknown := ({*(headlines or ())} | ({here} if here else set())) - set(RELAY):
        raise ValueError(f"headlines and here name {sorted(unknown)}, expected some of {list(RELAY)}")
    under = {stage: textwrap.wrap(_short(words, 66), 23)[:3] for stage, words in (headlines or {}).items()}
    low = 0.3 * max(map(len, under.values())) / 1.35 + 0.1 if under else 0
    high = 1.3 if here else 1.02
    ax = _axes(ax, 9, 0.95 * (high + low) + 0.25 * bool(title))
    for x, (stage, (name, what, colour)) in enumerate(RELAY.items()):
        mine = stage == here
        face, edge = _tint(colour, 0.3 if mine else 0.1), 3 if mine else 1.3
        ax.add_patch(FancyBboxPatch((x + 0.04, 0.06), 0.8, 0.88, boxstyle="round,pad=0,rounding_size=0.07",
                                    mutation_aspect=1.6, linewidth=edge, facecolor=face, edgecolor=colour))
        _text(ax, x + 0.44, 0.74, name, size=9.5, ha="center", va="center", fontweight="bold")
        _text(ax, x + 0.44, 0.36, what, ha="center", va="center", linespacing=1.25)
        if mine:
            _text(ax, x + 0.44, 1.03, "you are here ▼", size=9, ha="center", va="bottom", fontweight="bold")
        if x:
            _arrow(ax, (x - 0.15, 0.5), (x + 0.03, 0.5), INK, lw=1.6)
        _text(ax, x + 0.44, -0.06, "\n".join(under.get(stage, ())), ha="center", va="top", linespacing=1.3)
    ax.set(xlim=(0.0, 4.88), ylim=(-low, high))
    _finish(ax, "", "", "", title)
    ax.set_axis_off()
    return ax


def plot_advantage_tokens(tokens: Sequence[str], advantages: Floats, ax: Axes | None = None, *,
                          rows: Mapping[str, Floats] | None = None, unit: str = "SFT-sd",
                          title: str | None = None) -> Axes:
    """A response token by token, in boxes coloured and labelled by advantage: blue and + is better than expected.

    tokens: T strings. advantages: (T,), in `unit`. rows: more figures under each token, {"value": (T,), "reward":
    (T,)}. Raises ValueError if there are none or lengths differ.
    """
    _require("tokens", tokens)
    figures = {name: _array(name, values) for name, values in {"advantages": advantages, **(rows or {})}.items()}
    for name, values in figures.items():
        _same_length("tokens", tokens, name, values)
    advantages = figures.pop("advantages")
    width = 7.3 * 72 if ax is None else ax.get_window_extent().width * 72 / ax.get_figure(root=True).dpi
    boxes, x, y, height = [], 0.0, 0.0, 36 + 10.5 * len(figures)
    for t, token in enumerate(tokens):
        text = _short(token, 60) or "␣"
        while _width(text, 9.5) > width - 14 and len(text) > 4:
            text = _short(text, len(text) - 2)
        under = [f"{_short(name, 12)} {_signed(values[t])}" for name, values in {"A": advantages, **figures}.items()]
        need = 10 + max(_width(text, 9.5), _width(under[0], 9.4), *(_width(words, 8) for words in under))
        if x and x + need > width:
            x, y = 0.0, y + height
        boxes.append((x, y, need, text, under))
        x += need + 4
    ax = _axes(ax, 7.5, (y + height + 46) / 72)
    for (x, top, need, text, under), advantage in zip(boxes, advantages, strict=True):
        colour, hatch = (BLUE, "") if advantage >= 0 else (VERMILION, "////")
        strength = 0.08 + 0.5 * abs(advantage) / max(np.abs(advantages).max(), 1e-9)
        ax.add_patch(Rectangle((x, top), need, 16, facecolor=_tint(colour, strength), edgecolor=colour, lw=0.9,
                               hatch=hatch, hatch_linewidth=0.3))
        _text(ax, x + need / 2, top + 8.2, text, size=9.5, ha="center", va="center")
        for i, words in enumerate(under):
            style = {"colour": MUTED, "size": 8} if i else {"colour": colour, "size": 9, "fontweight": "bold"}
            _text(ax, x + need / 2, top + 18 + 11 * i, words, ha="center", va="top", **style)
    legend = f"A in {unit};  blue, +: better than the critic expected;  orange, hatched, −: worse"
    _finish(ax, "Advantage of each token", legend, "", title, grid="")
    ax.set(xlim=(-2, width + 2), ylim=(y + height + 2, -3), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    return ax


def plot_clip(clip_range: float = 0.2, advantage: float = 1.0, ax: Axes | None = None, *,
              title: str | None = None) -> Axes:
    """PPO's clipped objective min(ρA, clip(ρ, 1−ε, 1+ε)A) against the ratio ρ, A > 0 and A < 0; hatched: no gradient.

    clip_range: ε in (0, 1). advantage: |A| > 0. Raises ValueError if they are not. (Schulman 2017, figure 1)
    """
    if not (0 < clip_range < 1 and advantage > 0):
        raise ValueError(f"clip_range is {clip_range}, advantage {advantage}, expected one in (0, 1) and one above 0")
    low, high, edge = 1 - clip_range, 1 + clip_range, max(2.0, 1 + 2 * clip_range)
    ratio, reach = np.union1d(np.linspace(0, edge, 201), (low, high)), 1.15 * edge * advantage
    ax, ends = _axes(ax, 7.5, 3.8), []
    for a, colour, line, name in ((advantage, BLUE, "-", "A > 0"), (-advantage, VERMILION, DASHED, "A < 0")):
        objective = np.minimum(ratio * a, np.clip(ratio, low, high) * a)
        ax.plot(ratio, objective, color=colour, ls=line, lw=2.2)
        ends.append((objective[-1], name, colour))
    for left, right, floor, at, colour, words in ((high, edge, 0, 0.28, BLUE, "A > 0, ρ > 1 + ε:\nno gradient"),
                                                  (0, low, -reach, 0.2, VERMILION, "A < 0, ρ < 1 − ε:\nno gradient")):
        ax.add_patch(Rectangle((left, floor), right - left, reach, facecolor="none", edgecolor=_tint(colour, 0.35),
                               hatch="////", lw=0, zorder=0))
        _text(ax, (left + right) / 2, floor + at * reach, words, colour, ha="center", va="center", bbox=_backing())
    for x, words in ((low, "1 − ε"), (high, "1 + ε")):
        ax.axvline(x, color=MUTED, lw=0.8, ls=DOTTED)
        _text(ax, x, 1.01, words, MUTED, 8, where="top", ha="center", va="bottom")
    ax.axhline(0, color=INK, lw=0.9)
    ax.plot([1, 1], [advantage, -advantage], "o", color="white", mec=INK, mew=1.4, ms=7, zorder=5)
    _beside(ax, (1, -advantage), "ρ = 1: where every update starts", (9, 5), size=8)
    ax.set(xlim=(0, edge), ylim=(-reach, reach))
    _end_labels(ax, ends)
    _finish(ax, f"PPO's clip, ε = {clip_range:g}", "ratio ρ = π(token) / π_old(token)", "clipped objective, units of A",
            title)
    return ax


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


def _cross(ax: Axes, x: float, y: float, across: Interval | None, up: Interval | None, colour: str) -> None:
    if across is not None and np.ptp(across) > 0:
        ax.plot(across, (y, y), color=colour, lw=1.6, solid_capstyle="butt")
    if up is not None and np.ptp(up) > 0:
        ax.plot((x, x), up, color=colour, lw=1.6, solid_capstyle="butt")


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


def _bins(bins: Bins, *keys: str) -> list[np.ndarray]:
    bins = [row for row in bins if row["count"] > 0]
    _require("bins", bins)
    return [np.array([float(row[key]) for row in bins]) for key in keys]


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
