"""Pictures of a training run: its curves, PPO's panels, DPO's log-probs and margins."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from alignkit.metrics import METRICS, label
from alignkit.plots.style import (
    BLUE,
    DOTTED,
    INK,
    KNOWN,
    MUTED,
    SERIES,
    Chart,
    Floats,
    Picture,
    _array,
    _axes,
    _end_labels,
    _finish,
    _last_values,
    _legend,
    _letter,
    _require,
    _same_length,
    _short,
    _text,
)

PPO_PANELS = {
    "reward": ("objective/scores", "objective/rlhf_reward"), "KL to SFT": "objective/kl",
    "entropy": "objective/entropy", "clip fraction": "policy/clipfrac_avg",
    "critic: explained variance": "val/explained_variance", "ended with EOS": "val/eos_rate",
    "response length": "objective/length", "losses": ("loss/policy_avg", "loss/value_avg")}


# ---------------------------------------------------------------- training
def plot_metrics(rows: Sequence[Mapping[str, float]], names: Sequence[str] | Mapping[str, str | Sequence[str]],
                 figure: Figure | None = None, *, columns: int = 4, xlabel: str = "step",
                 marks: Iterable[tuple[float, str]] = (), branches: Iterable[Sequence[Mapping[str, float]]] = (),
                 branch: str = "before a rewind", title: str = "") -> Figure:
    """Small panels of logged numbers against `step`, the live chart of every stage. Returns a Figure.

    rows: dicts as in metrics.jsonl, each with "step"; one that is missing, None or NaN is left out. names: the
    metrics, a panel each; or panel title -> a metric, or several that share the panel. figure: what an earlier call
    with the same names returned, to redraw in place, which halves the time. marks: (step, what was changed there), as
    lettered lines. branches: rows of other runs, as thin dashed lines; branch: what they are, by default what a
    rewind abandoned. Raises ValueError if rows or names are empty, a row has no step, none of the names was logged, or
    `figure` has other panels.
    """
    # what is drawn: panels, the series of each, and the lines that cross them
    branches, marks = list(branches), list(marks)
    _require("rows", [*rows, *branches])
    _require("names", names)
    panels = _panels(names)
    series = _series(rows, branches, panels)
    # how large it is: rows of panels, and below them what the letters of the marks mean
    columns = min(columns, len(panels))
    legend = [f"{_letter(i)}: {_short(what, 60)} ({xlabel} {at:g})" for i, (at, what) in enumerate(marks)]
    legend += [f"thin dashes: {_short(branch, 60)}"] if branches else []
    captions = textwrap.wrap("    ".join(legend), 33 * columns)
    lines = -(-len(panels) // columns)
    cell_width, cell_height, across, up, low = 2.35, 1.6, 1.64, 1.08, 0.17 + 0.17 * len(captions)  # inches
    width, height = cell_width * columns, cell_height * lines + low + 0.28 * bool(title)
    # a new figure, or the old one without what is drawn anew
    if figure is None:
        figure = _metric_axes(panels, xlabel, across, up)
    elif getattr(figure, "panels", None) != panels:
        raise ValueError(f"figure has the panels {getattr(figure, 'panels', None)}, expected {panels}")
    figure.set_size_inches(width, height)
    for artist in [*figure.texts, *(text for ax in figure.axes for text in ax.texts),
                   *(line for ax in figure.axes for line in ax.lines[len(panels[ax.get_label()]):])]:
        artist.remove()
    # the panels, each in its place
    for i, (ax, which) in enumerate(zip(figure.axes, panels.values(), strict=True)):
        row, column = divmod(i, columns)
        left, bottom = cell_width * column + 0.6, low + cell_height * (lines - 1 - row) + 0.26
        ax.set_position((left / width, bottom / height, across / width, up / height))
        ax.xaxis.label.set_visible(i + columns >= len(panels))
        _draw_panel(ax, which, series)
        _draw_marks(ax, [at for at, _ in marks])
    # the words around them
    for i, caption in enumerate(reversed(captions)):
        figure.text(0.6 / width, (0.05 + 0.17 * i) / height, caption, fontsize=7.5, color=INK, parse_math=False)
    if title:
        figure.text(0.13 / width, 1 - 0.06 / height, _short(title, 120), fontsize=10.5, fontweight="bold", color=INK,
                    va="top", parse_math=False)
    return figure


def _panels(names: Sequence[str] | Mapping[str, str | Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Panel title -> the metrics in it. A metric is its own panel's title if two of them are called the same."""
    if not isinstance(names, Mapping):
        called = [label(name) for name in names]
        names = {words if called.count(words) == 1 else name: name for name, words in zip(names, called, strict=True)}
    return {panel: (which,) if isinstance(which, str) else tuple(which) for panel, which in names.items()}


def _series(rows: Sequence[Mapping[str, float]], branches: Sequence[Sequence[Mapping[str, float]]],
            panels: Mapping[str, tuple[str, ...]]) -> dict[str, list[np.ndarray]]:
    """Metric -> its points in the rows, then in each branch."""
    if missing := [i for i, row in enumerate(rows) if "step" not in row]:
        raise ValueError(f"rows[{missing[0]}] has {sorted(rows[missing[0]])}, expected a key 'step'")
    logs = (rows, *branches)
    series = {name: [_points(log, name) for log in logs] for which in panels.values() for name in which}
    if not any(points.size for lines in series.values() for points in lines):
        logged = {key for log in logs for row in log for key in row} - {"step"}
        raise ValueError(f"names are {sorted(series)}, expected some of {sorted(logged)}")
    return series


def _draw_panel(ax: Axes, which: tuple[str, ...], series: Mapping[str, list[np.ndarray]]) -> None:
    """The lines of one panel, or the words that there are none."""
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
        _legend(ax, ax.lines[: len(which)], [label(name) for name in which], 7, handlelength=1.8)
    ax.relim()
    ax.autoscale()


def _draw_marks(ax: Axes, marks: Sequence[float]) -> None:
    """A dotted line at each mark, with its letter at the top."""
    near, room = np.inf, 0.06 * np.ptp(ax.get_xlim())
    for letter, at in enumerate(marks):
        ax.axvline(at, color=INK, lw=0.9, ls=DOTTED)
        if abs(at - near) < room:  # two letters would overlap
            ax.texts[-1].set_text(ax.texts[-1].get_text() + _letter(letter))
        else:
            _text(ax, at, 0.99, f" {_letter(letter)}", size=7, where="top", va="top")
            near = at


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
        _finish(ax, panel, xlabel, METRICS[which[0]].unit if which[0] in METRICS else
                panel.partition(", ")[2] or "value", small=True)
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

    steps, chosen, rejected: (N,), nats per response. Use log π − log π_ref ("logps/chosen_shift", exactly 0 at step 0),
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
