"""BetaExplorer: DPO's margin, loss, and the pair's weight in the gradient, from four log-probabilities and β."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch

from alignkit.configs import LOSSES
from alignkit.formulas.losses import dpo_loss, implicit_reward
from alignkit_widgets.explorers.blocks import Axis, Chart, Series, Table, Text, fixed, number
from alignkit_widgets.explorers.explorer import Choice, Explorer, Slider

_NAMES = {"chosen": "log π, chosen", "rejected": "log π, rejected", "ref_chosen": "log π_ref, chosen",
          "ref_rejected": "log π_ref, rejected"}


class BetaExplorer(Explorer):
    """One preference pair.

    Args:
        logps: log π(chosen), log π(rejected), log π_ref(chosen), log π_ref(rejected), nats per response; by default
            the worked example of notebook 05.
        state, hide: as for every Explorer.
    """

    page_grid: ClassVar = {"beta": (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1, 1.5, 2, 3, 5),
                           "chosen": 5, "rejected": 5, "ref_chosen": 1, "ref_rejected": 1}

    def __init__(self, logps: Sequence[float] = (-12.0, -11.0, -13.0, -10.5), *, state: str = "",
                 hide: Sequence[str] = ()) -> None:
        low, high = np.floor(min(logps)) - 6, min(0.0, np.ceil(max(logps)) + 6)
        stops = np.arange(low, high + 0.25, 0.5).tolist()
        losses = {name: name for name in LOSSES if name != "robust"}  # without flipped labels robust equals sigmoid
        controls = [Slider("beta", [float(f"{b:.2g}") for b in np.geomspace(0.01, 5, 55)], 0.1, "β, price of KL"),
                    Choice("loss", losses, "sigmoid", "loss")]
        controls += [Slider(name, stops, start, label) for (name, label),
                     start in zip(_NAMES.items(), logps, strict=True)]
        super().__init__("DPO on one pair: margin, loss and pull", controls, _rows, state=state, hide=hide)


def loss_and_pull(margins: torch.Tensor, beta: float, loss_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`dpo.dpo_loss` at each margin (N,), and −d loss / d log π(chosen), per nat: (N,) each."""
    chosen = (margins / beta).requires_grad_(True)
    nothing = torch.zeros_like(margins)
    loss = dpo_loss(chosen, nothing, nothing, nothing, beta=beta, loss_type=loss_type)
    (slope,) = torch.autograd.grad(loss.sum(), chosen)
    return loss.detach(), -slope


def _rows(state: Mapping) -> list:
    beta, kind = state["beta"], state["loss"]
    chosen, rejected, ref_chosen, ref_rejected = (torch.tensor([state[name]], dtype=torch.float64) for name in _NAMES)
    rewards = [float(implicit_reward(logps, ref, beta)) for logps,
               ref in ((chosen, ref_chosen), (rejected, ref_rejected))]
    margin = rewards[0] - rewards[1]
    reach = max(4.0, np.ceil(1.2 * abs(margin)))
    places = torch.linspace(-reach, reach, 97, dtype=torch.float64)
    losses, pulls = loss_and_pull(places, beta, kind)
    (loss,), (pull,) = (t.tolist() for t in loss_and_pull(torch.tensor([margin], dtype=torch.float64), beta, kind))
    x, mark = Axis("margin, β · nats", -reach, reach), [("x", margin, f"margin {fixed(margin, sign=True)}")]
    here = {"line": False, "big": True}
    top, most = 1.05 * float(losses.max()), 1.15 * max(float(pulls.max()), 1e-9)
    charts = [Chart("Loss of the pair", x, Axis("loss, nats" if kind == "sigmoid" else "loss", 0, top),
                    [Series("loss", torch.stack([places, losses], 1), "blue"),
                     Series("this pair", [(margin, loss)], "blue", **here)], mark),
              Chart("Gradient: chosen up, rejected down", x,
                    Axis("pull per nat", min(0.0, 1.1 * float(pulls.min())), most),
                    [Series("pull", torch.stack([places, pulls], 1), "vermilion"),
                     Series("this pair", [(margin, pull)], "vermilion", **here)], mark)]
    rows = [[name, fixed(float(logps)), fixed(float(ref)), fixed(float(logps - ref), sign=True),
             fixed(reward, 3, sign=True)]
            for name, logps, ref, reward in zip(("chosen", "rejected"), (chosen, rejected), (ref_chosen, ref_rejected),
                                                rewards, strict=True)]
    table = Table("", ["response", "log π", "log π_ref", "log-ratio, nats", "implicit reward, β · nats"], rows)
    says = f"Margin {fixed(margin, 3, sign=True)}, loss {fixed(loss, 4)}"
    if kind == "sigmoid":
        says += f" (ln 2 = 0.6931 at margin 0); weight of the pair in the gradient σ(−margin) = {fixed(pull / beta)}"
    says += f", pull β · {number(pull / beta)} = {number(pull)} per nat." if pull else ": no pull left."
    if pull < 0:
        says += " The margin is past this loss's target, so the gradient pulls it back."
    if (margin > 0) != (chosen > rejected):
        says += (" The pair is ranked correctly, yet the rejected response is the likelier one" if margin > 0 else
                 " The pair is ranked wrongly, although the chosen response is the likelier one")
        says += ": only the change against the reference counts."
    return [[Text(says, lead=True)], charts, [table]]
