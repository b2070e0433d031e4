"""Pictures of the price of KL, of what samples can show of a frontier, and of what training does to gold."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alignkit.formulas.intervals import Estimate
from alignkit.plots.style import (
    DOTTED,
    INK,
    MUTED,
    SERIES,
    Chart,
    Floats,
    Picture,
    _array,
    _axes,
    _beside,
    _end_labels,
    _finish,
    _require,
    _same_length,
    _short,
    _styles,
)


def plot_price_of_kl(runs: Mapping[str, tuple[Floats, Sequence]], optimum: tuple[Floats, Floats] | None = None,
                     ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """KL to the reference against its price, both logarithmic: a line a method, a band over repeats.

    runs: name -> (price (N,), KL (N,) or (S, N) with a row a repeat, nats per response). optimum: (price, KL), each
    (M,), of the exact optimum. Raises ValueError if runs are empty or lengths differ.
    """
    _require("runs", runs)
    ax, ends = _axes(ax, 7.5, 3.3), []
    for name, (colour, marker, line, _) in _styles(runs).items():
        price = _array(f"price of {name}", runs[name][0])
        kl = np.atleast_2d(_array(f"KL of {name}", runs[name][1], ndim=(1, 2)))
        _same_length("price", price, f"KL of {name}", kl.T)
        ax.fill_between(price, kl.min(0), kl.max(0), color=colour, alpha=0.18, lw=0)
        ax.plot(price, kl.mean(0), color=colour, marker=marker, ls=line, lw=2)
        ends.append((name, colour, line))
    if optimum is not None:
        price, kl = (_array(f"{axis} of the optimum", values)
                     for axis, values in zip(("price", "KL"), optimum, strict=True))
        _same_length("price", price, "KL of the optimum", kl)
        ax.plot(price, kl, color=MUTED, ls=DOTTED, lw=2)
        ends.append(("exact optimum", MUTED, DOTTED))
    ax.set(xscale="log", yscale="log")
    for name, colour, line in ends:
        ax.plot([], [], color=colour, ls=line, lw=2, label=_short(name, 40).lstrip("_") or "unnamed")
    for text in ax.legend(frameon=False, fontsize=8.5, loc="lower left", handlelength=3).get_texts():
        text.set_parse_math(False)
    _finish(ax, "KL to the reference at each price", "price of KL: kl_coef of PPO, beta of DPO",
            "KL to the reference, nats", title)
    ax.tick_params(which="minor", labelsize=8.5, labelcolor=INK)
    return ax


def plot_sampled_frontier(estimates: Mapping[int, tuple[Floats, Floats]], truth: tuple[Floats, Floats],
                          ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """Frontiers estimated from N samples beside the true one; a dotted vertical line at each ceiling, log N.

    estimates: N -> (KL (B,), reward (B,)); truth: the same of the true frontier. KL in nats per response, reward in sd
    under the reference. Raises ValueError if there is no estimate, an N is below 2, or lengths differ.
    """
    _require("estimates", estimates)
    kl, reward = (_array(f"{axis} of the truth", values)
                  for axis, values in zip(("KL", "reward"), truth, strict=True))
    _same_length("KL of the truth", kl, "reward of the truth", reward)
    ax = _axes(ax, 7.5, 3.8)
    limit = 1.4 * max(np.log(n) if n >= 2 else np.nan for n in estimates)
    if not np.isfinite(limit):
        raise ValueError(f"estimates have N = {sorted(estimates)[0]}, expected at least 2 samples")
    inside = kl <= limit
    ax.plot(kl[inside], reward[inside], color=INK, lw=2)
    ends = [(reward[inside].max() if inside.any() else 0.0, "truth", INK)]
    for number, (n, (x, y)) in enumerate(estimates.items()):
        colour, marker, line, _ = SERIES[number % len(SERIES)]
        x, y = _array(f"KL of N = {n}", x), _array(f"reward of N = {n}", y)
        _same_length("KL", x, "reward", y)
        ax.plot(x, y, color=colour, ls=line, marker=marker, ms=4)
        ax.axvline(np.log(n), color=colour, ls=DOTTED, lw=1)
        _beside(ax, (np.log(n), 0.0), f"log {n}", (-4, 4), colour, rotation=90, ha="right", va="bottom")
        ends.append((y[-1], f"N = {n}", colour))
    ax.set_xlim(0, limit)
    ax.set_ylim(bottom=0)
    _end_labels(ax, ends)
    _finish(ax, "Sampled frontiers and their ceilings, log N (dotted)", "KL to the reference, nats",
            "reward, reference sd", title)
    return ax


def plot_estimates(curves: Mapping[str, tuple[Floats, Sequence[Estimate]]], ylabel: str, ax: Axes | None = None, *,
                   xlabel: str = "optimiser steps", title: str | None = None) -> Axes:
    """A quantity along training: name -> (steps (N,), N Estimates), a line with its 95 % intervals as bars.

    ylabel: the quantity and its unit, "risky failures, share". Raises ValueError if curves are empty or lengths differ.
    """
    _require("curves", curves)
    ax, ends = _axes(ax, 7.5, 3.0), []
    for name, (colour, marker, line, _) in _styles(curves).items():
        steps = _array(f"steps of {name}", curves[name][0])
        estimates = curves[name][1]
        _same_length("steps", steps, f"estimates of {name}", estimates)
        values = [estimate.value for estimate in estimates]
        ax.plot(steps, values, color=colour, marker=marker, ls=line, lw=1.8, ms=5)
        for step, estimate in zip(steps, estimates, strict=True):
            if estimate.low is not None:
                ax.plot([step, step], [estimate.low, estimate.high], color=colour, lw=1)
        ends.append((values[-1], name, colour))
    _end_labels(ax, ends)
    _finish(ax, ylabel.split(",")[0], xlabel, ylabel, title)
    return ax


def plot_loss_gold_panels(steps: Floats, losses: Floats, gold: Sequence[Estimate], *, title: str = "") -> Figure:
    """The training loss above and gold of held-out prompts below, at the same steps. Returns a Figure.

    steps, losses: (N,), nats per pair. gold: N Estimates, SFT-sd. Raises ValueError if lengths differ or are 0.
    """
    steps, losses = _array("steps", steps), _array("losses", losses)
    _same_length("steps", steps, "losses", losses)
    figure = Picture(figsize=(7.5, 4.2), facecolor="white", layout="constrained")
    upper, lower = (figure.add_subplot(2, 1, place, axes_class=Chart) for place in (1, 2))
    upper.plot(steps, losses, color=INK, marker="o", ms=4.5)
    _finish(upper, "Training loss", "optimiser steps", "loss, nats per pair", title or None)
    plot_estimates({"gold": (steps, gold)}, "gold, SFT-sd", lower, title="Gold on held-out prompts")
    return figure
