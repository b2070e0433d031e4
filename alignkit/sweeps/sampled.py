"""The frontier of a sweep's worlds estimated from the responses of SFT that its runs have stored, without any model.

Where responses cannot be enumerated this is what can be said: an estimate that falls short long before its ceiling, log
N nats of KL for N responses to a prompt (notebook 06, section 8).
"""

import json
import math
from pathlib import Path

import numpy as np

from alignkit.errors import RunError
from alignkit.storage import content_hash, read_json
from alignkit.sweeps.results import SweepResults

BETAS = tuple(map(float, np.geomspace(20, 0.05, 30)))
STORED = Path("sft") / "evaluation.json"


def sampled_frontier(results: SweepResults, seed: int | None) -> dict | None:
    """The most proxy at each KL, estimated by importance weights from SFT's stored responses of one seed.

    Returns {"samples": N, "ceiling": log N, "beta", "kl", "proxy", "gold"} with lists, means over the prompts, in the
    units of the sweep; "gold" is None where it was not measured. None if the runs of this seed are not at hand, stored
    fewer than two scored responses a prompt, or began with different SFT policies or reward models.
    """
    found: dict[str, dict] = {}
    for row in results.finished:
        run = results.run_of(row)
        if run is not None and row.get("seed") == seed and (stored := _stored(run)):
            found[content_hash(stored)] = stored
    if len(found) != 1:
        return None
    return _frontier(next(iter(found.values())))


def run_frontier(run: Path) -> dict | None:
    """`sampled_frontier` of one run directory; None if its SFT stored no two scored responses a prompt."""
    stored = _stored(run)
    return _frontier(stored) if stored else None


def _stored(run: Path) -> dict | None:
    """Scores of SFT's responses in a run directory: "samples", "proxy", "gold"; None if they are not there."""
    try:
        content = read_json(run / STORED)
        columns, samples = content["columns"], content["set"]["samples"]
        proxy, gold = columns["proxy"], columns.get("gold")
        stored = {"samples": int(samples), "proxy": [float(score) for score in proxy],
                  "gold": [float(score) for score in gold] if gold else None, "scale": content.get("gold_scale")}
        json.dumps(stored, allow_nan=False)
    except (OSError, RunError, KeyError, TypeError, ValueError):
        return None
    whole = stored["samples"] > 1 and len(proxy) % stored["samples"] == 0 and (not gold or len(gold) == len(proxy))
    return stored if whole and proxy else None


def _frontier(stored: dict) -> dict:
    import torch

    from alignkit.exact.sampled import sampled_optimum

    shape = (-1, stored["samples"])
    proxy = torch.tensor(stored["proxy"], dtype=torch.float64).reshape(shape)
    gold = None
    if stored["gold"]:
        mean, sd = stored["scale"] or (0.0, 1.0)
        gold = (torch.tensor(stored["gold"], dtype=torch.float64).reshape(shape) - mean) / sd
    optima = [sampled_optimum(proxy, beta, other=gold) for beta in BETAS]
    return {"samples": stored["samples"], "ceiling": math.log(stored["samples"]), "beta": list(BETAS),
            "kl": [float(each.kl.mean()) for each in optima], "proxy": [float(each.reward.mean()) for each in optima],
            "gold": None if gold is None else [float(each.other.mean()) for each in optima]}
