"""Pictures of the claims lab: every claim with its interval and its rule, and the paths of the arms."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alignkit.plots.style import (
    BLUE,
    FOR_TEXT,
    GREEN,
    GRID,
    INK,
    MUTED,
    VERMILION,
    Chart,
    Floats,
    Picture,
    _axes,
    _finish,
    _require,
    _same_length,
    _text,
)

LOOKS = {"confirmed": (GREEN, "o"), "refuted": (VERMILION, "X"), "undecided": (MUTED, "s")}
EDGE = 6.0  # in units of the rule: where a dot that lies further out is drawn, with its number beside it


def plot_claims(claims: Sequence, ax: Axes | None = None, *, title: str = "") -> Axes:
    """A row a claim: the value of each world, the mean with its 95 % interval, and the verdict.

    claims: objects with the fields of `alignkit.Claim`. Units differ between claims, so each row is divided by the
    claim's margin, or by the spread over worlds if the rule has no margin, and turned so that the claimed side is on
    the right; a claim of no difference says that the statistic is inside the grey band, the margin. Raises ValueError
    if there are no claims.
    """
    _require("claims", claims)
    ax = _axes(ax, 8.6, 0.9 + 0.27 * len(claims))
    ax.axvspan(-1, 1, color=GRID, lw=0)
    ax.axvline(0, color=INK, lw=0.9)
    for y, claim in enumerate(claims):
        (colour, marker), estimate = LOOKS[claim.verdict], claim.estimate
        turn = -1 if claim.side == "below" else 1
        values = turn * np.array(claim.values)
        unit = claim.margin or (values.std() if len(values) > 1 else 0.0) or 1.0
        ax.plot((values / unit).clip(-EDGE, EDGE), np.full(len(values), y), "|", color=colour, alpha=0.45, ms=7)
        mean = float(values.mean() / unit) if len(values) else 0.0
        if estimate.low is not None:
            ends = np.sort(turn * np.array([estimate.low, estimate.high])) / unit
            ax.plot(ends.clip(-EDGE, EDGE), [y, y], color=colour, lw=2.2, solid_capstyle="butt")
        ax.plot(np.clip(mean, -EDGE, EDGE), y, marker, color=colour, mec="white", ms=8, zorder=4)
        _text(ax, 1.01, y, f"{estimate.value:.3g}, {claim.verdict}", FOR_TEXT.get(colour, colour), 8, where="right",
              va="center")
    ax.set(xlim=(-1.08 * EDGE, 1.08 * EDGE), ylim=(len(claims) - 0.5, -0.5))
    names = [f"{claim.name} {claim.english}{' (≈ 0)' if claim.side == 'within' else ''}" for claim in claims]
    ax.set_yticks(range(len(claims)), names, parse_math=False)
    _finish(ax, "", "in units of the smallest difference that matters; right is as claimed", "", title, grid="x")
    return ax


def plot_paths_panels(paths: Mapping[str, Sequence[tuple[Floats, Floats]]], *, ylabel: str = "gold, SFT-sd") -> Figure:
    """The training paths of several arms, a panel each on one scale: a line a world, with a dot at its end.

    paths: arm -> one (kl, reward) for each world, each (N,), nats and `ylabel`. Raises ValueError if there are no arms
    or lengths differ.
    """
    _require("paths", paths)
    figure = Picture(figsize=(0.6 + 2.7 * len(paths), 3.0), facecolor="white", layout="constrained")
    first = None
    for place, (arm, worlds) in enumerate(paths.items(), start=1):
        first = ax = figure.add_subplot(1, len(paths), place, axes_class=Chart, sharex=first, sharey=first)
        for kl, reward in worlds:
            _same_length("kl", kl, "reward", reward)
            ax.plot(kl, reward, color=BLUE, lw=0.9, alpha=0.55)
            ax.plot(kl[-1], reward[-1], "o", color=BLUE, ms=4)
        _finish(ax, str(arm), "KL to SFT, nats", ylabel if place == 1 else "", small=True)
    return figure
