"""GAEExplorer: the advantage of each token of a response, for each γ and λ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from alignkit_widgets.explorers.blocks import Axis, Chart, Series, Text, Tokens, fixed
from alignkit_widgets.explorers.explorer import Explorer, Slider
from alignkit_widgets.explorers.worked_numbers import ResponseNumbers, example_response, token_advantages


class GAEExplorer(Explorer):
    """A response with its tokens coloured by advantage.

    Args:
        numbers: of a real response, `alignkit_widgets.read_response(policy, ref_policy, critic, …)`; by default an
            example with invented figures.
        state, hide: as for every Explorer.
    """

    page_grid: ClassVar = {"gamma": 9, "lambda": 21, "kl_coef": 6}

    def __init__(self, numbers: ResponseNumbers | None = None, *, state: str = "", hide: Sequence[str] = ()) -> None:
        self.numbers = example_response() if numbers is None else numbers
        share = np.linspace(0, 1, 41).round(3).tolist()
        controls = [Slider("gamma", share, 1.0, "γ, discount"), Slider("lambda", share, 0.95, "λ of GAE"),
                    Slider("kl_coef", np.linspace(0, 1, 41).round(3).tolist(), 0.2, "β, price of KL")]
        super().__init__("Credit for each token: generalised advantage estimation", controls, self._rows, state=state,
                         hide=hide)

    def _rows(self, state: Mapping) -> list:
        numbers, gamma, lam = self.numbers, state["gamma"], state["lambda"]
        rewards, advantages = token_advantages(numbers, kl_coef=state["kl_coef"], gamma=gamma, gae_lambda=lam)
        best, worst = int(advantages.argmax()), int(advantages.argmin())
        if lam == 0:
            kind = "λ = 0: the advantage is one step, r + γV(next) − V, and depends on the critic entirely."
        elif lam == 1 and gamma == 1:
            kind = "λ = 1: the advantage is the remaining reward minus V; the critic is a baseline only."
        else:
            kind = f"A surprise counts {fixed(gamma * lam)} one token earlier, {fixed((gamma * lam) ** 2)} two earlier."
        most, least = (f"“{numbers.tokens[i].strip()}” ({fixed(float(advantages[i]), sign=True)})"
                       for i in (best, worst))
        says = f"{kind} Most credit: {most}; least: {least}."
        places = range(1, len(numbers.tokens) + 1)
        ends = {lam_: token_advantages(numbers, kl_coef=state["kl_coef"], gamma=gamma, gae_lambda=lam_)[1]
                for lam_ in (0.0, 1.0)}
        values = [v for a in ends.values() for v in a.tolist()] + [0.0]
        margin = 0.15 * (max(values) - min(values)) + 0.05
        chart = Chart("Between one step (λ = 0) and the whole remaining reward (λ = 1)",
                      Axis("token", 0.7, len(numbers.tokens) + 0.3, whole=True),
                      Axis("advantage, SFT-sd", min(values) - margin, max(values) + margin),
                      [Series("λ = 0", list(zip(places, ends[0.0].tolist(), strict=True)), "dotted"),
                       Series("λ = 1", list(zip(places, ends[1.0].tolist(), strict=True)), "vermilion"),
                       Series("this λ", list(zip(places, advantages.tolist(), strict=True)), "blue", big=True)],
                      [("y", 0, "as expected")], height=240)
        source = numbers.source if numbers.source == "made-up figures" else f"answer to “{numbers.source}”"
        tokens = Tokens(f"A: advantage, r: reward, V: what the critic expected · {source}",
                        numbers.tokens, advantages, {"r": rewards, "V": numbers.values})
        return [[Text(says, lead=True)], [tokens], [chart]]
