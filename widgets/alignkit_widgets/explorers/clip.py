"""ClipExplorer: PPO's clipped objective, and where its gradient is zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch

from alignkit.formulas.losses import clipped, policy_loss
from alignkit_widgets.explorers.blocks import Axis, Chart, Series, Text, fixed
from alignkit_widgets.explorers.explorer import Choice, Explorer, Slider

_RATIOS = np.linspace(0.4, 1.8, 71).round(2).tolist()


class ClipExplorer(Explorer):
    """One token: the objective and its slope for its ratio ρ = π / π_old, its advantage A and the clip range ε.

    Raises ValueError on a bad `state` or `hide`.
    """

    page_grid: ClassVar = {"ratio": 29, "size": (0.5, 1.0, 2.0), "clip": 8}

    def __init__(self, *, state: str = "", hide: Sequence[str] = ()) -> None:
        controls = [Slider("ratio", _RATIOS, 1.3, "ratio ρ"),
                    Choice("sign", {"up": "A > 0: better than expected", "down": "A < 0: worse than expected"}, "up",
                           "advantage"),
                    Slider("size", np.linspace(0.2, 2.0, 19).round(1).tolist(), 1.0, "|A|"),
                    Slider("clip", np.linspace(0.05, 0.5, 46).round(2).tolist(), 0.2, "clip range ε")]
        super().__init__("PPO's clip: how far one batch may move a token", controls, _rows, state=state, hide=hide)


def objective_and_slope(ratio: torch.Tensor, advantage: float, clip: float) -> tuple[torch.Tensor, torch.Tensor,
                                                                                     torch.Tensor]:
    """−`policy_loss` at each ratio, its derivative with respect to the ratio, and `clipped`. Same shape each."""
    logprobs = ratio.log().requires_grad_(True)
    old, advantages = torch.zeros_like(ratio), torch.full_like(ratio, advantage)
    value = -policy_loss(logprobs, old, advantages, clip)
    (slope,) = torch.autograd.grad(value.sum(), logprobs)
    return value.detach(), slope / ratio, clipped(logprobs.detach(), old, advantages, clip)


def _rows(state: Mapping) -> list:
    ratio, clip = state["ratio"], state["clip"]
    advantage = state["size"] if state["sign"] == "up" else -state["size"]
    places = torch.linspace(0.4, 1.8, 141, dtype=torch.float64)
    value, slope, _ = objective_and_slope(places, advantage, clip)
    here = torch.tensor([ratio], dtype=torch.float64)
    (value_here,), (slope_here,), (no_gradient,) = objective_and_slope(here, advantage, clip)
    zone = (1 + clip, 1.8) if advantage > 0 else (0.4, 1 - clip)
    look = "blue" if advantage > 0 else "vermilion"
    marks = [("x", 1 - clip, "1 − ε"), ("x", 1 + clip, "1 + ε")]
    x = Axis("ratio ρ = π(token) / π_old(token)", 0.4, 1.8)
    hand = ("ratio", [(stop, stop) for stop in _RATIOS])
    edge = 1.9 * state["size"]
    low, high = (0, edge) if advantage > 0 else (-edge, 0)
    unclipped = Series("without clip, ρA", [(0.4, 0.4 * advantage), (1.8, 1.8 * advantage)], "dotted")
    objective = Chart("The objective (PPO maximises it)", x, Axis("objective, units of A", low, high), [
        unclipped, Series("min(ρA, clip(ρ)A)", torch.stack([places, value], 1), look),
        Series("this token", [(ratio, float(value_here))], look, line=False, big=True)], marks, [(*zone, "")],
        drag=hand)
    gradient = Chart("Slope of the objective", x,
                     Axis("d objective / dρ, units of A", *sorted((-0.15 * advantage, 1.3 * advantage))),
                     [Series("slope", torch.stack([places, slope], 1), look),
                      Series("this token", [(ratio, float(slope_here))], look, line=False, big=True)], marks,
                      [(*zone, "no gradient")], drag=hand)
    moved = "more" if ratio > 1 else "less" if ratio < 1 else "as"
    want = "likelier" if advantage > 0 else "rarer"
    if no_gradient:
        says = (f"No gradient: the token is {fixed(ratio)} times as likely as when it was sampled, beyond "
                f"{fixed(1 + clip if advantage > 0 else 1 - clip)}. It is {want} already, "
                "so this batch no longer moves it.")
    elif (ratio > 1 + clip) or (ratio < 1 - clip):
        says = (f"Full gradient, although ρ is outside the clip: the token moved the wrong way ({moved} likely), and "
                "PPO may correct that. The clip is one-sided.")
    else:
        says = f"Inside the clip: the slope is A = {fixed(advantage, sign=True)}, and the step makes the token {want}."
    edges = f"ρA = {fixed(ratio * advantage)}, clip(ρ)A = {fixed(min(max(ratio, 1 - clip), 1 + clip) * advantage)}"
    detail = (f"{edges}; the smaller is the objective, {fixed(float(value_here))}, "
              f"with slope {fixed(float(slope_here))}.")
    return [[Text(says, lead=True)], [Text(detail)], [objective, gradient]]
