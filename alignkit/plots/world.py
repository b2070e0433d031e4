"""The desk world in pictures: what sentences are worth, how annotators decide, the error of a sample, the floor."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from alignkit.plots.style import (
    BLUE,
    INK,
    MUTED,
    SERIES,
    VERMILION,
    Floats,
    _array,
    _axes,
    _finish,
    _legend,
    _require,
    _same_length,
    _short,
    _signed,
    _text,
)


def plot_gold_by_sentence(values: Mapping[str, Floats], sentences: Sequence[str], ax: Axes | None = None, *,
                          title: str | None = None) -> Axes:
    """A table in colours: gold, raw units, of a response of one sentence. Blue is good, red is bad.

    values: prompt class -> (S,), one number a sentence. sentences: S names. Raises ValueError if there are none or
    lengths differ.
    """
    _require("values", values)
    rows = {name: _array("values", row) for name, row in values.items()}
    for name, row in rows.items():
        _same_length("sentences", sentences, _short(f"values[{name!r}]", 60), row)
    table = np.array(list(rows.values()))
    ax = _axes(ax, 9, 0.9 + 0.42 * len(rows))
    most = max(float(np.abs(table).max()), 1e-9)
    ax.imshow(table, cmap="RdBu", vmin=-1.3 * most, vmax=1.3 * most, aspect="auto")
    for row, column in np.ndindex(*table.shape):
        _text(ax, column, row, _signed(table[row, column]), size=9, ha="center", va="center")
    _finish(ax, "Gold of a response of one sentence", "sentence", "prompt class", title, grid="")
    ax.set_xticks(range(len(sentences)), [_short(name, 24) for name in sentences], rotation=25, ha="right",
                  parse_math=False)
    ax.set_yticks(range(len(rows)), [_short(name, 24) for name in rows], parse_math=False)
    ax.tick_params(length=0)
    return ax


def plot_annotators(differences: Floats, chances: Mapping[str, Floats], ax: Axes | None = None, *,
                    title: str | None = None) -> Axes:
    """P(first is preferred) against the difference in gold, raw units; one line an annotator.

    differences: (N,) gold of the first response minus gold of the second. chances: name -> (N,) probabilities. Raises
    ValueError if there are none or lengths differ.
    """
    _require("chances", chances)
    differences = _array("differences", differences)
    ax = _axes(ax, 7.5, 3.4)
    handles = []
    for (name, line), (colour, _, style, _) in zip(chances.items(), SERIES, strict=False):
        line = _array("chances", line)
        _same_length("differences", differences, _short(f"chances[{name!r}]", 60), line)
        handles += ax.plot(differences, line, color=colour, ls=style, lw=2)
    ax.axhline(0.5, color=MUTED, lw=0.8)
    ax.axvline(0, color=MUTED, lw=0.8)
    _finish(ax, "How annotators decide", "gold of the first response − gold of the second, raw units",
            "P(first is preferred)", title)
    ax.set_ylim(0, 1)
    _legend(ax, handles, list(chances)[: len(handles)])
    return ax


def plot_sampling_error(sizes: Floats, errors: Mapping[str, Floats], theory: Floats, ax: Axes | None = None, *,
                        title: str | None = None) -> Axes:
    """Root-mean-square error of a sample mean, raw gold, against the number of samples n, both axes logarithmic.

    sizes: (N,) n. errors: prompt class -> (N,). theory: (N,) σ/√n. Raises ValueError if there are none or lengths
    differ.
    """
    _require("errors", errors)
    sizes, theory = _array("sizes", sizes), _array("theory", theory)
    _same_length("sizes", sizes, "theory", theory)
    ax = _axes(ax, 7.5, 3.2)
    handles = []
    for (name, line), (colour, marker, style, _) in zip(errors.items(), SERIES, strict=False):
        line = _array("errors", line)
        _same_length("sizes", sizes, _short(f"errors[{name!r}]", 60), line)
        handles += ax.plot(sizes, line, color=colour, marker=marker, ls=style, ms=5, lw=1.2)
    names = list(errors)[: len(handles)]
    handles += ax.plot(sizes, theory, color=INK, lw=2.2)
    ax.set_xscale("log")
    ax.set_yscale("log")
    _finish(ax, "Error of a sample mean", "n, samples of a prompt", "error of their mean, raw gold", title)
    ax.set_xticks(sizes, [f"{size:g}" for size in sizes])
    ax.minorticks_off()
    _legend(ax, handles, [*names, "theory: σ/√n"], loc="lower left")
    return ax


def plot_floor(floor: float, losses: Mapping[str, float], entropies: Mapping[str, float], ax: Axes | None = None, *,
               title: str | None = None) -> Axes:
    """Each model's loss in its two parts, nats per token: the demonstrators' entropy, and KL(demonstrators ‖ model).

    floor: H(p), the demonstrators' entropy. losses: model -> loss on demonstrations. entropies: model -> the model's
    own entropy on them, drawn as a diamond. Raises ValueError if there are none or lengths differ.
    """
    _require("losses", losses)
    _same_length("losses", losses, "entropies", entropies)
    loss, own = _array("losses", list(losses.values())), _array("entropies", list(entropies.values()))
    ax = _axes(ax, 7.5, 1.4 + 0.5 * len(losses))
    places = np.arange(len(losses))[::-1]
    floor_bar = ax.barh(places, np.full(len(loss), floor), color=BLUE, alpha=0.45, height=0.6)
    kl_bar = ax.barh(places, loss - floor, left=floor, color=VERMILION, alpha=0.6, height=0.6, hatch="////")
    marks = ax.scatter(own, places, marker="D", color=INK, s=34, zorder=4)
    _finish(ax, "Loss = entropy of the demonstrators + KL", "nats per token", "model", title, grid="x")
    ax.set_yticks(places, [_short(name, 34) for name in losses], parse_math=False)
    ax.set_xlim(0, 1.08 * max(loss.max(), own.max(), floor))
    ax.set_ylim(-1.4, len(loss) - 0.5)  # room for the legend
    _legend(ax, [floor_bar, kl_bar, marks], ["entropy of the demonstrators", "KL(demonstrators ‖ model)",
            "the model's own entropy"], loc="lower left", ncols=3, fontsize=8, columnspacing=1.2, handlelength=1.5)
    return ax
