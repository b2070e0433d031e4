"""Some prompts with all their responses: the SFT policy's probabilities, the rewards, and the optimum at each KL
coefficient.

These are the tables of the frontier's slider. All values are exact for the given policy and reward model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from alignkit import exact
from alignkit.desk.world import BEHAVIOURS, Prompt, World


@dataclass(frozen=True, eq=False)
class Enumerated:
    """P prompts × N responses, in the order of `exact.response_space()`.

    ref_logps (P, N): log π_ref, nats. proxy, gold (P, N): each in units of its standard deviation under π_ref (gold is
    also centred on its mean). behaviour (P, N): indices into alignkit.world.BEHAVIOURS. seed: the world's.
    """

    seed: int
    prompts: tuple[Prompt, ...]
    ref_logps: Tensor
    proxy: Tensor
    gold: Tensor
    behaviour: Tensor

    def frontier(self, betas: Sequence[float]) -> dict[str, list[float]]:
        """"beta", "kl", "proxy", "gold" of the optimum at each β, largest first, means over the prompts."""
        curve = exact.frontier(self.ref_logps, self.proxy, betas, self.gold)
        columns = {"beta": curve.beta, "kl": curve.kl, "proxy": curve.reward, "gold": curve.other}
        return {name: values[1:-1].tolist() for name, values in columns.items()}  # without the ends, β = ∞ and 0

    def optimum(self, prompt: int, beta: float) -> Tensor:
        """log π* (N,) of one prompt: π* ∝ π_ref exp(proxy / β). Raises ValueError if β is not positive."""
        return exact.optimum(self.ref_logps[[prompt]], self.proxy[[prompt]], beta)[0][0]

    def shares(self, prompt: int, logps: Tensor) -> dict[str, float]:
        """Behaviour -> probability under log-probs (N,) of the responses to one prompt."""
        total = logps.new_zeros(len(BEHAVIOURS)).index_add_(0, self.behaviour[prompt], logps.exp())
        return dict(zip(BEHAVIOURS, total.tolist(), strict=True))

    def likeliest(self, logps: Tensor, n: int = 6) -> list[tuple[int, str]]:
        """The n responses with the largest log-probs (N,): their numbers and their texts."""
        texts = _texts()
        return [(i, texts[i]) for i in logps.topk(n).indices.tolist()]


def enumerate_world(policy, tokenizer, scorer, world: World, prompts: Sequence[Prompt], *,
                    directory: str | Path | None = None) -> Enumerated:
    """Enumerate a desk-world policy and score all responses: about a second for eight prompts.

    scorer: any reward, prompts, responses -> scores; the scores of a RewardScorer are already in SFT-sd. directory:
    where to store tables for the next call. Raises ValueError if `prompts` is empty, and as `exact.response_logps`
    does.
    """
    if not prompts:
        raise ValueError("prompts is empty, expected at least one prompt of the world")
    space = exact.response_space()
    ref_logps = exact.response_logps(policy, tokenizer, prompts, directory=directory)
    proxy = exact.proxy_table(scorer, prompts, space, directory=directory)
    raw = exact.gold_table(world, prompts, space)
    mean = exact.expectation(ref_logps, raw).mean()
    gold = (raw - mean) / exact.expectation(ref_logps, (raw - mean).square()).mean().sqrt()
    _, first, place = np.unique(space.counts.numpy(), axis=0, return_index=True, return_inverse=True)
    responses = [_texts()[i] for i in first]  # the order of sentences does not affect the behaviour
    named = [[BEHAVIOURS.index(b) for b in world.behaviours([p.text] * len(responses), responses)] for p in prompts]
    return Enumerated(world.seed, tuple(prompts), ref_logps, proxy, gold, torch.tensor(named)[:, place.reshape(-1)])


def at_price(frontier: Mapping[str, Sequence[float | None]], beta: float) -> dict[str, float]:
    """The optimum at β: every column of `frontier` except "beta", by a cubic in log β through the nearest four points.

    frontier: "beta" and other columns; entries with β None, 0 or ∞ are ignored. Exact at its β; between those of the
    recorded sweep, which are 20 % apart, the error is about 0.1 %. Raises ValueError outside their range.
    """
    recorded = [i for i, b in enumerate(frontier["beta"]) if b and math.isfinite(b)]
    logs = np.log([frontier["beta"][i] for i in recorded])
    order = np.argsort(logs)
    recorded, logs, at = np.array(recorded)[order], logs[order], math.log(beta) if beta > 0 else -math.inf
    if not logs[0] - 1e-9 <= at <= logs[-1] + 1e-9:
        low, high = math.exp(logs[0]), math.exp(logs[-1])
        raise ValueError(f"beta is {beta:g}, expected {low:.4g} to {high:.4g} (the frontier's)")
    start = int(np.clip(np.searchsorted(logs, at) - 2, 0, max(0, len(logs) - 4)))
    near = slice(start, start + 4)
    weights = [math.prod((at - b) / (a - b) for b in logs[near] if b != a) for a in logs[near]]  # Lagrange's
    return {name: float(np.dot(weights, [values[i] for i in recorded[near]])) for name, values in frontier.items()
            if name != "beta"}


def _texts() -> list[str]:
    if not _TEXTS:
        _TEXTS.extend(exact.response_space().texts())
    return _TEXTS


_TEXTS: list[str] = []
