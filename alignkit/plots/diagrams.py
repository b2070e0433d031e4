"""Pictures that explain: the relay, the advantages of a response, the clip."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

from alignkit.plots.style import (
    BLUE,
    DASHED,
    DOTTED,
    GREEN,
    INK,
    MUTED,
    SKY,
    VERMILION,
    Floats,
    _array,
    _arrow,
    _axes,
    _backing,
    _beside,
    _end_labels,
    _finish,
    _require,
    _same_length,
    _short,
    _signed,
    _text,
    _tint,
    _width,
)
from alignkit.stages import STAGES

STAGE_COLOURS = {"sft": MUTED, "reward": GREEN, "ppo": BLUE, "frozen": SKY, "dpo": VERMILION}


# ---------------------------------------------------------------- pictures that explain
def plot_relay(headlines: Mapping[str, str] | None = None, here: str | None = None, ax: Axes | None = None, *,
               title: str = "") -> Axes:
    """The chain SFT → reward model → PPO → freeze, evaluate → DPO, a headline under each box, and "you are here".

    headlines: stage ("sft", "reward", "ppo", "frozen", "dpo") -> a few words with a figure. here: the stage to mark.
    Raises ValueError on a stage that is not in the chain.
    """
    if unknown := ({*(headlines or ())} | ({here} if here else set())) - set(STAGES):
        raise ValueError(f"headlines and here name {sorted(unknown)}, expected some of {list(STAGES)}")
    under = {stage: textwrap.wrap(_short(words, 66), 23)[:3] for stage, words in (headlines or {}).items()}
    low = 0.3 * max(map(len, under.values())) / 1.35 + 0.1 if under else 0
    high = 1.3 if here else 1.02
    ax = _axes(ax, 9, 0.95 * (high + low) + 0.25 * bool(title))
    for x, (stage, (name, what)) in enumerate(STAGES.items()):
        is_here, colour = stage == here, STAGE_COLOURS[stage]
        face, edge = _tint(colour, 0.3 if is_here else 0.1), 3 if is_here else 1.3
        ax.add_patch(FancyBboxPatch((x + 0.04, 0.06), 0.8, 0.88, boxstyle="round,pad=0,rounding_size=0.07",
                                    mutation_aspect=1.6, linewidth=edge, facecolor=face, edgecolor=colour))
        _text(ax, x + 0.44, 0.74, name, size=9.5, ha="center", va="center", fontweight="bold")
        _text(ax, x + 0.44, 0.36, textwrap.fill(what, 17), ha="center", va="center", linespacing=1.25)
        if is_here:
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
