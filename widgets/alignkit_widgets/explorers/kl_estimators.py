"""KLEstimatorsExplorer: k1, k2 and k3 compared with the exact KL, on samples from five outcomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch

from alignkit_widgets.explorers.blocks import Axis, Bars, Chart, Series, Table, Text, fixed, number
from alignkit_widgets.explorers.explorer import Along, Button, Choice, Explorer, Slider
from alignkit_widgets.explorers.worked_numbers import kl_estimates, tilted

_REF = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05], dtype=torch.float64).log()
_DIRECTION = torch.tensor([-1.0, 0.2, -0.4, 1.0, 1.6], dtype=torch.float64)
_WORDS = ("answer", "hedge", "ask", "refuse", "greet")
_LOOKS = {"k1": "blue", "k2": "vermilion", "k3": "green"}


class KLEstimatorsExplorer(Explorer):
    """The error of each estimator of KL(π ‖ π_ref): for these samples, and on average.

    Raises ValueError on a bad `state` or `hide`.
    """

    page_grid: ClassVar = {"distance": 8, "samples": (4, 16, 64, 256, 1024), "seed": range(4)}

    def __init__(self, *, state: str = "", hide: Sequence[str] = ()) -> None:
        samplers = {"policy": "the policy π (correct)", "reference": "the reference π_ref (a mistake)"}
        seed = Slider("seed", range(1000), 0, "seed", kept=True, between=False)
        controls = [Slider("distance", np.linspace(0.05, 2, 40).round(2).tolist(), 0.3, "distance from π_ref"),
                    Slider("samples", (4, 8, 16, 32, 64, 128, 256, 512, 1024), 64, "samples", between=False),
                    Choice("sampler", samplers, "policy", "samples come from"),
                    seed, Button("again", "draw other samples", Along(seed, 1, around=True))]
        super().__init__("KL from samples: k1, k2, k3", controls, _rows, state=state, hide={*hide, "seed"})


def _rows(state: Mapping) -> list:
    logps, n = tilted(_REF, _DIRECTION, state["distance"]), int(state["samples"])
    exact = float((logps.exp() * (logps - _REF)).sum())
    wrong = state["sampler"] == "reference"
    estimates = kl_estimates(logps, _REF, n, int(state["seed"]), _REF if wrong else None)
    count = np.arange(1, n + 1)
    shown = np.unique(np.geomspace(1, n, 160).astype(int)) - 1
    series, rows, sizes = [], [], []
    for name, (values, mean, sd) in estimates.items():
        running = np.cumsum(values.numpy()) / count
        series.append(Series(name, list(zip(count[shown].tolist(), running[shown].tolist(), strict=True)),
                             _LOOKS[name]))
        sizes += [abs(running[-1]), abs(mean), 2 * sd / n**0.5 + abs(mean)]
        rows.append([name, fixed(running[-1], 4), fixed(mean, 4), fixed(mean - exact, 4, sign=True),
                     number(sd / n**0.5, 2)])
    reach = 2.2 * max(*sizes, exact)
    leaves = any(not -0.5 * reach <= y <= reach for each in series for _, y in each.points)
    chart = Chart("Mean of the samples so far" + " (arrow: beyond the axis)" * leaves, Axis("samples", 1, n, log=True),
                  Axis("estimate, nats", -0.5 * reach, reach), [
        *series], [("y", exact, f"exact KL {fixed(exact, 3)}"), ("y", 0.0, "")], height=200, weight=1.3)
    bars = Bars("A distribution over five tokens", {"π_ref": "muted", "π": "blue"},
                list(zip(_WORDS, _REF.exp().tolist(), logps.exp().tolist(), strict=True)), "probability", percent=True)
    table = Table(f"From {n:,} samples: estimate and error",
                  ["estimator", "these samples", "on average", "bias", "± (one sd)"],
                  [["exact KL", fixed(exact, 4), "", "", ""], *rows], hot=[0])
    k1, k3 = (float(estimates[name][0].mean()) for name in ("k1", "k3"))
    if wrong:
        says = (f"With samples of the reference, no estimator estimates KL(π ‖ π_ref) = {fixed(exact, 3)}: "
                f"on average k1 is {fixed(estimates['k1'][1], 3)}, which is −KL(π_ref ‖ π); "
                "more samples do not correct that.")
    elif k1 < 0:
        says = (f"k1 is negative here, {fixed(k1, 4)}, which is no error: the mean of {n} samples is off by "
                f"± {number(estimates['k1'][2] / n**0.5, 2)}, and the KL is only {fixed(exact, 4)}. "
                "k3 has the same mean and cannot be negative.")
    else:
        says = (f"The exact KL is {fixed(exact, 4)} nats; k1 says {fixed(k1, 4)}, k3 {fixed(k3, 4)}. k1 and k3 are "
                f"right on average; k2 has a bias of {fixed(estimates['k2'][1] - exact, 4, sign=True)}.")
    return [[Text(says, lead=True)], [chart, bars], [table]]
