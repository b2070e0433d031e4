"""ShiftViewer: move through checkpoints and see how the responses to a prompt changed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from alignkit.evaluate.shift import Shift, measure_shift
from alignkit.safe_text import visible
from alignkit_widgets.explorers.blocks import Axis, Bars, Chart, Series, Table, Text, fixed
from alignkit_widgets.explorers.explorer import Choice, Explorer, Slider


class ShiftViewer(Explorer):
    """Next-token probabilities, KL by position and sampled responses of each checkpoint, for a prompt.

    Args:
        checkpoints: [(name, policy), …] in the order of training, or a `Shift` that was measured before.
        tokenizer, prompts: of the policies. Everything is computed once at the start; the slider only selects.
        samples, max_new_tokens, seed: of `alignkit.measure_shift`.
        state, hide: as for every Explorer.

    Raises ValueError as `measure_shift` does.
    """

    def __init__(
        self,
        checkpoints: Shift | Sequence[tuple],
        tokenizer=None,
        prompts: Sequence[str] = (),
        *,
        samples: int = 8,
        max_new_tokens: int = 4,
        seed: int = 0,
        state: str = "",
        hide: Sequence[str] = (),
    ) -> None:
        self.shift = checkpoints if isinstance(checkpoints, Shift) else measure_shift(
            checkpoints, tokenizer, prompts, samples=samples, max_new_tokens=max_new_tokens, seed=seed)
        last = len(self.shift.names) - 1
        controls = [Slider("checkpoint", range(last + 1), last, "checkpoint", between=False, names=self.shift.names),
                    Choice("prompt", {str(i): prompt for i, prompt in enumerate(self.shift.prompts)}, "0", "prompt")]
        super().__init__("What changed from checkpoint to checkpoint", controls, self._rows, state=state, hide=hide)

    def _rows(self, state: Mapping) -> list:
        shift, at, prompt = self.shift, int(state["checkpoint"]), int(state["prompt"])
        name, first = shift.names[at], shift.names[0]
        tokens, now, before = shift.tokens[prompt], shift.chances[prompt][at], shift.chances[prompt][0]
        moved = sorted(range(len(tokens)), key=lambda i: now[i] - before[i])
        groups = {first: "muted", name: "blue"} if at else {first: "muted"}
        bars = Bars("The first token of the answer", groups,
                    [(token.strip() or "(end)", before[i], now[i])[: 1 + len(groups)] for i,
                     token in enumerate(tokens)],
                    "probability", high=max(max(row) for row in shift.chances[prompt]), percent=True)
        every = shift.kl[prompt]
        known = [value for row in every for value in row if not math.isnan(value)]
        lines = [Series(other, _points(row), "dotted") for other,
                 row in zip(shift.names, every, strict=True) if other not in (name, first)]
        lines = [Series("" if i else "other checkpoints", s.points, s.look) for i, s in enumerate(lines)]
        chart = Chart(f"KL to {first}, by position",
                      Axis("position in the response, tokens", 0.8, len(every[0]) + 0.2, whole=True),
                      Axis("KL, nats per token", 0, 1.1 * max([*known, 0.1])),
                      [*lines, Series(name, _points(every[at]), "blue", marks=True)])
        counted = Counter(shift.responses[prompt][at]).most_common(6)
        responses = [[text.strip() or "(nothing)", f"{n} of {len(shift.responses[prompt][at])}"] for text, n in counted]
        total = sum(value for value in every[at] if not math.isnan(value))
        says = f"{name}: {fixed(total)} nats from {first} on this prompt."
        if at:
            up, down = moved[-1], moved[0]
            change = [fixed(100 * (new - old), 0, sign=True) for new, old in zip(now, before, strict=True)]
            most, least = (f"“{visible(tokens[i].strip(), 60)}”, {change[i]} points" for i in (up, down))
            says += f" Up most: {most}. Down most: {least}."
        return [[Text(says, lead=True)], [bars, chart],
                [Table(f"What {name} says", ["sampled response", "how often"], responses)]]


def _points(row: Sequence[float]) -> list[tuple[int, float]]:
    return [(position, value) for position, value in enumerate(row, 1) if not math.isnan(value)]
