"""Pictures of single steps of PPO: the ratios of its tokens."""

from collections.abc import Mapping

from matplotlib.axes import Axes

from alignkit.plots.shift import plot_histogram
from alignkit.plots.style import YELLOW, Floats, _finite, _require


def plot_ratios(ratios: Mapping[str, Floats], clip_range: float = 0.2, ax: Axes | None = None, *, top: float = 3.0,
                title: str | None = None) -> Axes:
    """Histogram of token ratios π / π_old, with 1 ± clip_range shaded.

    ratios: name -> (N,) ratios, one a token; those above `top` are counted at it. Raises ValueError if there are none,
    or one is below 0.
    """
    _require("ratios", ratios)
    arrays = {name: _finite(f"ratios[{name!r}]", values) for name, values in ratios.items()}
    if negative := [name for name, values in arrays.items() if values.min() < 0]:
        raise ValueError(f"ratios[{negative[0]!r}] has a value below 0, expected probabilities divided by each other")
    ax = plot_histogram({name: values.clip(max=top) for name, values in arrays.items()},
                        f"ratio π / π_old of a token (above {top:g}: counted at {top:g}; shaded: 1 ± clip_range)", ax,
                        title=title or f"Ratios after one iteration, clip_range = {clip_range:g}")
    ax.set_ylabel("share of tokens, %")
    ax.axvspan(max(1 - clip_range, 0), min(1 + clip_range, top), color=YELLOW, alpha=0.35, zorder=0)
    return ax
