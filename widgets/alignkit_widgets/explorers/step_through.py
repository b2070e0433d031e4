"""StepThroughExplorer: one PPO update on one short response, with all numbers, one stage at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from alignkit_widgets.explorers.blocks import Table, Text, Tokens, fixed
from alignkit_widgets.explorers.explorer import Along, Button, Explorer, Slider
from alignkit_widgets.explorers.worked_numbers import ResponseNumbers, example_response, ppo_update

STAGES = ("sampled", "KL", "rewards", "advantages", "ratio", "clip", "update")


class StepThroughExplorer(Explorer):
    """Rollout → KL → reward → advantage → ratio → clip → update, for each token.

    Args:
        numbers: of a real response, `alignkit_widgets.read_response(…)`; by default an example with invented figures.
        state, hide: as for every Explorer.
    """

    page_grid: ClassVar = {"kl_coef": (0, 0.2, 0.4, 0.7, 1), "clip": (0.1, 0.2, 0.4), "rate": (0.5, 1, 4)}

    def __init__(self, numbers: ResponseNumbers | None = None, *, state: str = "", hide: Sequence[str] = ()) -> None:
        self.numbers = example_response() if numbers is None else numbers
        stage = Slider("stage", range(1, len(STAGES) + 1), 1, "stage", between=False, names=STAGES)
        controls = [stage, Slider("steps", range(9), 0, "steps made before", between=False),
                    Slider("kl_coef", np.linspace(0, 1, 41).round(3).tolist(), 0.2, "β, price of KL"),
                    Slider("clip", np.linspace(0.05, 0.5, 46).round(2).tolist(), 0.2, "clip range ε"),
                    Slider("rate", (0.25, 0.5, 1, 2, 4, 8, 16), 1, "learning rate"),
                    Button("back", "◀ stage", Along(stage, -1)), Button("next", "stage ▶", Along(stage, 1))]
        super().__init__("One PPO update, number by number", controls, self._rows, state=state, hide=hide)

    def _rows(self, state: Mapping) -> list:
        numbers, stage = self.numbers, int(state["stage"])
        update = ppo_update(numbers, kl_coef=state["kl_coef"], clip_range=state["clip"], learning_rate=state["rate"],
                            steps=int(state["steps"]))
        beta, clip = fixed(state["kl_coef"]), fixed(state["clip"])
        lines = [  # stage, name, figures, signed
            (1, "log π_old", update.old, False), (2, "log π_ref", update.ref, False),
            (2, "KL: log π_old − log π_ref", update.kl, True),
            (3, f"reward: −{beta} · KL, + score at the end", update.rewards, True),
            (4, "V, the critic's estimate", numbers.values, True),
            (4, "advantage A (γ = 1, λ = 0.95)", update.advantages, True), (5, "log π now", update.now, False),
            (5, "ratio ρ = π / π_old", update.ratio, False), (6, "objective min(ρA, clip(ρ)A)", update.objective, True)]
        rows = [[name, *(fixed(float(v), sign=signed) for v in values)] for at, name, values,
                signed in lines if at <= stage]
        hot = [i for i, line in enumerate([line for line in lines if line[0] <= stage]) if line[0] == stage]
        if stage >= 6:
            rows.append(["gradient", *("none" if still else "yes" for still in update.still)])
            hot += [len(rows) - 1] * (stage == 6)
        if stage >= 7:
            change = update.new - update.now
            rows += [["log π after the step", *(fixed(float(v)) for v in update.new)],
                     ["change", *(fixed(float(v), 3, sign=True) for v in change)]]
            hot = [len(rows) - 2, len(rows) - 1]
        says = {
            1: "Sampled: the policy wrote these tokens, each with this log-probability. That policy is now π_old.",
            2: "KL: the log-ratio of policy and reference for each token. It can be negative on one sample.",
            3: f"Reward: each token pays {beta} per nat; the score, {fixed(numbers.score)}, comes with the last one.",
            4: "Advantage: the outcome less what the critic expected. Here the score reaches earlier tokens.",
            5: f"Ratio: after {int(state['steps'])} steps, how much likelier is each token than when it was sampled?"
               + (" Before the first step it is 1, exactly." if not state["steps"] else ""),
            6: f"Clip: {int(update.still.sum())} of {len(update.still)} tokens went past 1 ± {clip}: no gradient.",
            7: "Update: the step raises the tokens with A > 0 and lowers those with A < 0, except the clipped ones.",
        }[stage]
        title = f"{stage} of {len(STAGES)} · {STAGES[stage - 1]}"
        source = numbers.source if numbers.source == "made-up figures" else f"answer to “{numbers.source}”"
        shown = {1: update.old, 2: update.kl, 3: update.rewards}.get(stage, update.advantages)
        name, unit = {1: ("log π", "nats"), 2: ("KL", "nats"), 3: ("r", "SFT-sd")}.get(stage, ("A", "SFT-sd"))
        strip = [[Tokens(f"Tokens, coloured by advantage ({source})", numbers.tokens, shown)]] if name == "A" else []
        columns = [f"{title} ({unit})" if stage < 4 else title, *(token.strip() for token in numbers.tokens)]
        note = ("The step is plain gradient descent on each position's logits. A network shares weights between "
                "positions.")
        return [[Text(f"{stage} of {len(STAGES)} · {says}", lead=True)], *strip, [Table("", columns, rows, hot)],
                [Text(note)]]
