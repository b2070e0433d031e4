"""A sweep in small, and a truth that fits it: random tables, measured as the real ones are; a record of nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch

from alignkit import exact
from alignkit.desk.world import BEHAVIOURS, World
from alignkit.exact.prompts import Enumerated
from alignkit.exact.sweep import RecordedRun, RecordedWorld, Sweep

VALUES = {"ppo": (0.1, 0.35, 1.5), "dpo": (0.3, 1.0, 4.0)}
BETAS = np.geomspace(40, 0.02, 40)


def small_truth(seed: int = 0, prompts: int = 4) -> Enumerated:
    """Enumerated prompts of the real world with made-up chances, and a proxy that is gold and something else."""
    rng, n = np.random.default_rng(seed), len(exact.response_space())
    ref = torch.from_numpy(rng.normal(0, 2.5, (prompts, n))).log_softmax(-1)
    gold = torch.from_numpy(rng.normal(0, 1, (prompts, n)))
    proxy = 0.7 * gold + torch.from_numpy(rng.normal(0, 0.7, (prompts, n))) - 0.03 * gold.square()
    gold = gold - 0.25 * proxy.clamp(min=0).square()
    gold = gold - exact.expectation(ref, gold).mean()
    behaviour = torch.from_numpy(rng.integers(len(BEHAVIOURS), size=(prompts, n)))
    return Enumerated(seed, World(seed).heldout_prompts[:prompts], ref, proxy, gold, behaviour)


def measured(truth: Enumerated, logps: torch.Tensor) -> dict:
    return {
        "kl": float(exact.response_kl(logps, truth.ref_logps).mean()),
        "proxy": float(exact.expectation(logps, truth.proxy).mean()),
        "gold": float(exact.expectation(logps, truth.gold).mean()),
        "entropy": float(exact.response_entropy(logps).mean()),
    }


def small_sweep(seeds=(0, 1)) -> Sweep:
    """Two worlds and a few runs, which are optima of a proxy that was seen through noise."""
    worlds, runs = {}, []
    for seed in seeds:
        truth = small_truth(seed)
        curve, gold = (exact.frontier(truth.ref_logps, table, BETAS, truth.gold) for table in (truth.proxy, truth.gold))
        sft = measured(truth, truth.ref_logps)
        worlds[seed] = RecordedWorld(
            seed,
            [p.text for p in truth.prompts],
            [p.kind for p in truth.prompts],
            [p.key for p in truth.prompts],
            {
                "beta": [None, *curve.beta[1:].tolist()],
                "kl": curve.kl.tolist(),
                "proxy": curve.reward.tolist(),
                "gold": curve.other.tolist(),
            },
            {"beta": [None, *gold.beta[1:].tolist()], "kl": gold.kl.tolist(), "gold": gold.reward.tolist()},
            {"n": [1.0], "kl": [0.0], "proxy": [sft["proxy"]], "gold": [sft["gold"]]},
            sft,
            {},
            (0.0, 1.0),
            {},
        )
        rng = np.random.default_rng([seed, 1])
        for method, spread in (("ppo", 0.15), ("dpo", 0.6)):
            for value in VALUES[method]:
                seen = truth.proxy + torch.from_numpy(rng.normal(0, spread, truth.proxy.shape))
                end = measured(truth, exact.optimum(truth.ref_logps, seen, value)[0])
                gap = exact.gap(end["kl"], end["proxy"], curve)
                known = {
                    "method": method,
                    "value": value,
                    "seed": seed,
                    **end,
                    "optimum": gap.optimum,
                    "share": gap.share,
                }
                runs.append(RecordedRun(**{field.name: known.get(field.name, {}) for field in fields(RecordedRun)}))
    return Sweep("tests/small_sweep.py", {}, {}, {}, worlds, tuple(runs), {})


def write_sweep(path: Path) -> None:
    """As `alignkit.exact.sweep.load_sweep` reads it."""
    sweep = small_sweep()
    record = {
        **{name: getattr(sweep, name) for name in ("command", "versions", "sources", "configs", "probe")},
        "worlds": [asdict(world) for world in sweep.worlds.values()],
        "runs": [asdict(run) for run in sweep.runs],
    }
    path.write_text(json.dumps(record))
