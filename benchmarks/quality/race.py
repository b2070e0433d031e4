"""Runs that alternate, iteration by iteration, and what each had spent and reached at every measurement.

They alternate so that a busy moment of the machine falls on all of them. Policies are measured exactly, in this process
and outside of every clock.
"""

import math
import sys
import time
from collections.abc import Mapping

from benchmarks.quality.reached import UNITS, Reached, reached
from benchmarks.quality.rules import EVERY, GOLD, MOST_KL, SHARE

LEVELS = ("proxy", "gold")


def race(world, runs: Mapping[str, object], every: int = EVERY, late: float = math.inf) -> dict[str, dict]:
    """Let the runs alternate until each has reached both levels or has ended: name -> its points.

    world: `ours.World`. runs: objects like `ours.Alignkit`. late: a run ends early once it has taken `late` times the
    CPU time that the first run took altogether. Returns columns cpu, wall (seconds of training), samples,
    kl, share and gold, the first before training, and "steps", the most optimiser steps of an iteration.
    """
    start = {"kl": 0.0, "share": 0.0, "gold": 0.0}
    points = {name: {column: [0.0] for column in (*UNITS, *start)} for name in runs}
    spent = {name: dict.fromkeys(UNITS, 0.0) for name in runs}
    steps, left, made, first = dict.fromkeys(runs, 0), dict(runs), 0, next(iter(runs))
    while left:
        made += 1
        for name, run in list(left.items()):
            for unit, seconds in run().items():
                spent[name][unit] += seconds
            spent[name]["samples"] += run.samples
            steps[name] = max(steps[name], int(run.said["steps"]))
            limit = math.inf if first in left else late * spent[first]["cpu"]
            ended = made == run.iterations or spent[name]["cpu"] >= limit
            if made % every and not ended:
                continue
            for column, value in {**spent[name], **world.measure(run.weights())}.items():
                points[name][column].append(value)
            if ended or not any(one.censored for one in both(points[name], world.gold_best).values()):
                run.close()
                del left[name]
                _say(world.seed, name, made, points[name], world.gold_best)
    return {name: {**points[name], "steps": steps[name]} for name in runs}


def both(points: Mapping, gold_best: float) -> dict[str, Reached]:
    """When a run reached each of `LEVELS`."""
    return {"proxy": reached(points, "share", SHARE, MOST_KL), "gold": reached(points, "gold", GOLD * gold_best)}


def _say(seed: int, name: str, iterations: int, points: Mapping, gold_best: float) -> None:
    at = "  ".join(f"{level} {'—' if one.censored else f'{one.cpu:.1f} s'}"
                   for level, one in both(points, gold_best).items())
    end = "  ".join(f"{column} {points[column][-1]:.3f}" for column in ("kl", "share", "gold"))
    print(f"{time.strftime('%H:%M:%S')} seed {seed} {name}: {iterations} iterations, {points['cpu'][-1]:.1f} s CPU, "
          f"{points['wall'][-1]:.1f} s wall  {end}  reached: {at}", file=sys.stderr, flush=True)
