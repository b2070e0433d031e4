"""Pictures of gradient estimates beside the exact gradient: how far from it, and how well they point along it."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from alignkit.plots.style import (
    BLUE,
    INK,
    MUTED,
    VERMILION,
    Chart,
    Floats,
    Picture,
    _array,
    _finish,
    _finite,
    _legend,
    _number,
    _require,
    _short,
    _text,
)


def plot_gradient_noise_panels(distances: Mapping[str, Floats], cosines: Mapping[str, Floats], *,
                               title: str = "") -> Figure:
    """Each estimator's mean squared distance to ∇J (bars), and each estimate's cosine with ∇J (dots; diamond: mean).

    distances: estimator -> (repeats,) squared distance of one estimate to ∇J, in |∇J|². cosines: the same names ->
    (repeats,). The bar's line is the standard error of its mean. Raises ValueError if there are none, or names differ.
    """
    _require("distances", distances)
    if list(cosines) != list(distances):
        raise ValueError(f"cosines has the names {list(cosines)}, expected {list(distances)} (those of distances)")
    figure = Picture(figsize=(8.4, 1.1 + 0.34 * len(distances)), layout="constrained", facecolor="white")
    left, right = (figure.add_subplot(1, 2, place, axes_class=Chart) for place in (1, 2))
    for place, name in enumerate(distances):
        noise, pointing = _finite(f"distances[{name!r}]", distances[name]), _finite(f"cosines[{name!r}]", cosines[name])
        error = noise.std() / np.sqrt(max(len(noise) - 1, 1))
        left.barh(place, noise.mean(), color=BLUE, height=0.6)
        left.plot([noise.mean() - error, noise.mean() + error], [place, place], color=INK, lw=1.2)
        _text(left, noise.mean() + error, place, f" {_number(noise.mean(), 10)}", va="center")
        jitter = 0.5 * (np.arange(len(pointing)) * 0.618 % 1 - 0.5)
        right.plot(pointing, place + jitter, "o", ms=2.5, color=BLUE, alpha=0.4, mew=0)
        right.plot(pointing.mean(), place, "D", color=VERMILION, ms=7, mec="white")
    left.set_yticks(range(len(distances)), [_short(name, 30) for name in distances], parse_math=False)
    right.set_yticks(range(len(distances)), [])
    left.set_xlim(right=1.18 * left.get_xlim()[1])
    for ax in (left, right):
        ax.set_ylim(len(distances) - 0.5, -0.5)
    _finish(left, "", "mean squared distance to ∇J, |∇J|²   (line: ± its standard error)", "estimator", title,
            grid="x", small=True)
    _finish(right, "", "cosine with ∇J   (a dot an estimate; diamond: mean)", "estimator", "", grid="x", small=True)
    return figure


def plot_clip_gradient_panels(estimates: Mapping[tuple[int, str], Floats]) -> Figure:
    """What becomes of a gradient estimate as its samples grow old: distance, component and cosine, by epochs.

    estimates: (epochs, estimator) -> (repeats, 3), of each estimate the squared distance to ∇J in |∇J|², the component
    along ∇J in |∇J|, and the cosine with ∇J. Lines join the means; bars are ± their standard errors. Raises ValueError
    if there are none, or one has another shape.
    """
    _require("estimates", estimates)
    epochs, names = sorted({key[0] for key in estimates}), list(dict.fromkeys(key[1] for key in estimates))
    labels = ("mean squared distance to ∇J, |∇J|²", "component along ∇J, |∇J| (1 is right)", "cosine with ∇J")
    looks = [("o", "-", MUTED), ("s", "--", BLUE), ("^", ":", VERMILION)]
    figure = Picture(figsize=(8.4, 3.2), layout="constrained", facecolor="white")
    panels = [figure.add_subplot(1, 3, place + 1, axes_class=Chart) for place in range(3)]
    for number, name in enumerate(names):
        marker, line, colour = looks[number % len(looks)]
        rows = {e: _array(f"estimates[{e, name!r}]", estimates[e, name], ndim=(2,)) for e in epochs
                if (e, name) in estimates}
        if any(each.shape[1] != 3 for each in rows.values()):
            raise ValueError(f"estimates of {name!r} have other columns, expected (repeats, 3)")
        for column, ax in enumerate(panels):
            means = [each[:, column].mean() for each in rows.values()]
            errors = [each[:, column].std() / np.sqrt(max(len(each) - 1, 1)) for each in rows.values()]
            places = [epochs.index(e) + 0.06 * (number - 1) for e in rows]
            ax.errorbar(places, means, errors, marker=marker, ls=line, color=colour, lw=1.6, ms=5.5, elinewidth=1)
    for ax, label in zip(panels, labels, strict=True):
        ax.axhline(0, color=INK, lw=0.8)
        ax.set_xticks(range(len(epochs)), [str(e) for e in epochs])
        _finish(ax, "", "epochs on one rollout", label, "", small=True)
    panels[1].axhline(1, color=INK, lw=0.8, ls=":")
    handles = [container[0] for container in panels[0].containers]
    _legend(panels[0], handles, [_short(name, 26) for name in names], loc="upper right")
    return figure
