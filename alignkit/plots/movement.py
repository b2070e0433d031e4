"""What predicts how far a prompt moves: reward variance against KL, and rank correlations by the price of KL."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alignkit.plots.style import (
    INK,
    MUTED,
    SERIES,
    Chart,
    Floats,
    Interval,
    Picture,
    _array,
    _axes,
    _finish,
    _legend,
    _require,
    _same_length,
    _short,
)


def plot_variance_law_panels(variances: Floats, kl: Mapping[float, Floats], kinds: Sequence[str]) -> Figure:
    """KL of the exact optimum against the reward's variance, a panel for each β, with the line Var / 2β².

    variances: (prompts,) of the reward under the reference, in squared units of the reward. kl: β -> (prompts,)
    KL(π* ‖ π_ref), nats per response. kinds: the class of each prompt. Raises ValueError if there is nothing to draw,
    or lengths differ.
    """
    _require("kl", kl)
    variances, kinds = _array("variances", variances), np.asarray(kinds)
    _same_length("variances", variances, "kinds", kinds)
    classes = list(dict.fromkeys(kinds.tolist()))
    figure = Picture(figsize=(4.4 * len(kl), 3.5), layout="constrained", facecolor="white")
    for place, (beta, values) in enumerate(kl.items()):
        values = _array(f"kl[{beta}]", values)
        _same_length("variances", variances, f"kl[{beta}]", values)
        ax = figure.add_subplot(1, len(kl), place + 1, axes_class=Chart)
        handles = [ax.plot(variances[kinds == kind], values[kinds == kind], SERIES[number % len(SERIES)][1], ms=5,
                           color=SERIES[number % len(SERIES)][0], alpha=0.8)[0] for number, kind in enumerate(classes)]
        ends = np.array([0, variances.max()])
        handles += ax.plot(ends, ends / (2 * beta**2), color=INK, lw=1)
        ax.set_ylim(0, 1.15 * max(values.max(), 1e-9))
        _finish(ax, f"exact optimum, β = {beta:g}", "Var_ref(r), in (SFT-sd)²", "KL(π* ‖ π_ref), nats per response",
                small=True)
    _legend(figure.axes[0], handles, [*(_short(kind, 20) for kind in classes), "Var / 2β²"], loc="lower right")
    return figure


def plot_rank_correlations(betas: Floats, correlations: Mapping[str, Sequence[Interval]], ax: Axes | None = None, *,
                           mark: float | None = None, title: str | None = None) -> Axes:
    """Spearman's correlation of each predictor with the KL of the exact optimum, by β; a band is a 95 % interval.

    betas: (B,), the price of KL. correlations: predictor -> B triples (value, low, high). mark: a β with a dotted line.
    Raises ValueError if there are none, or lengths differ.
    """
    _require("correlations", correlations)
    betas, ax = _array("betas", betas), _axes(ax, 8, 3.8)
    handles = []
    for number, (name, triples) in enumerate(correlations.items()):
        colour, marker, line, _ = SERIES[number % len(SERIES)]
        _same_length("betas", betas, f"correlations[{name!r}]", triples)
        middle, low, high = np.transpose(_array(f"correlations[{name!r}]", triples, ndim=(2,)))
        handles += ax.plot(betas, middle, marker=marker, color=colour, ls=line, lw=1.8, ms=5)
        ax.fill_between(betas, low, high, color=colour, alpha=0.08, lw=0)
    ax.axhline(0, color=INK, lw=0.8)
    if mark is not None:
        ax.axvline(mark, color=MUTED, lw=1, ls=":")
    ax.set(xscale="log", ylim=(-1.05, 1.05))
    _finish(ax, "Which story ranks the prompts?", "β, the price of KL   (dotted: PPO's; band: 95 % interval)",
            "Spearman with KL(π* ‖ π_ref)", title)
    _legend(ax, handles, [_short(name, 34) for name in correlations], loc="lower right")
    return ax
