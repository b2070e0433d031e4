"""BradleyTerryExplorer: how two scores give a preference, and what noisy labels reveal about the scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch

from alignkit.formulas.losses import bradley_terry_loss, preference_chance
from alignkit_widgets.explorers.blocks import Axis, Chart, Series, Text, fixed
from alignkit_widgets.explorers.explorer import Along, Button, Explorer, Slider
from alignkit_widgets.explorers.worked_numbers import labels_for_first

_SCORES = np.linspace(-3, 3, 61).round(1).tolist()


class BradleyTerryExplorer(Explorer):
    """Two responses with true scores, annotators who compare them, and the loss of a reward model with a given
    difference.

    Raises ValueError on a bad `state` or `hide`.
    """

    page_grid: ClassVar = {"first": 13, "second": 5, "labels": (1, 5, 20, 50, 200, 1000), "noise": 5, "seed": (0, 1)}

    def __init__(self, *, state: str = "", hide: Sequence[str] = ()) -> None:
        seed = Slider("seed", range(1000), 0, "seed", kept=True, between=False)
        controls = [Slider("first", _SCORES, 1.0, "score of the first"),
                    Slider("second", _SCORES, 0.0, "score of the second"),
                    Slider("labels", (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000), 50, "labels", between=False),
                    Slider("noise", np.linspace(0, 0.4, 41).round(2).tolist(), 0.0, "share of flipped labels"),
                    seed, Button("again", "ask other annotators", Along(seed, 1, around=True))]
        super().__init__("Bradley–Terry: from scores to labels and back", controls, _rows, state=state,
                         hide={*hide, "seed"})


def _rows(state: Mapping) -> list:
    true, labels, noise = state["first"] - state["second"], int(state["labels"]), state["noise"]
    wins = labels_for_first(true, labels, noise, int(state["seed"]))
    chance = float(preference_chance(true, noise))
    places = torch.linspace(-6, 6, 97, dtype=torch.float64)
    losses = bradley_terry_loss(places, wins, labels)
    x = "difference of the scores, nats"
    curve = [Series("without flips", torch.stack([places, preference_chance(places)], 1), "dotted")] if noise else []
    left = Chart("P(the first response is preferred)", Axis(x, -6, 6), Axis("probability", 0, 1), [
        *curve, Series("σ(difference)" if not noise else "with flips",
                       torch.stack([places, preference_chance(places, noise)], 1), "blue"),
        Series("these two", [(true, chance)], "blue", line=False, big=True)],
        drag=("first", [(score - state["second"], score) for score in _SCORES]))
    fitted = math.log(wins / (labels - wins)) if 0 < wins < labels else math.copysign(math.inf, wins - 0.5)
    best = [Series("least loss", [(fitted, float(bradley_terry_loss(fitted, wins, labels)))], "vermilion", line=False,
                   big=True)]
    right = Chart(f"Loss of a reward model on {labels:,} label{'s' if labels > 1 else ''}", Axis(x, -6, 6),
                  Axis("loss, nats per label", 0, 3),
                  [Series("loss", torch.stack([places, losses], 1), "vermilion"),
                   *(best if abs(fitted) < 6 else [])], [("x", true, "the truth")])
    says = (f"A difference of {fixed(true, 1, sign=True)} makes the first win in {100 * chance:.0f} % of labels; "
            f"{wins:,} of {labels:,} preferred it. ")
    if math.isinf(fitted):
        says += "All labels agree, so the loss has no minimum: training keeps pulling the scores apart."
    else:
        says += (
            f"The loss is least at log(wins / losses), {fixed(fitted, sign=True)}; the truth: {fixed(true, sign=True)}."
        )
        if noise:
            says += " Flipped labels pull this minimum towards 0; more labels do not correct that."
    shift = ("Only the difference of the scores counts: adding a number to both changes no probability and no loss. "
             "So rewards have no absolute zero, and rewards of two prompts cannot be compared.")
    return [[Text(says, lead=True)], [left, right], [Text(shift)]]
