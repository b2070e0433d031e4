"""Measure what a coefficient, a reference, the number of labels, the number of steps and DPO's rejected term change.

    python -m experiments.dials --seeds 31 32 33 34 35 --record

Runs the parts of `runs.py` in every world and applies the rules of `rules.py`, which were committed before the results.
A world's SFT policy and reward models are those of `experiments.claims`, and are made if they are missing. What is
finished is not run again. `--record` writes `alignkit/evaluate/dials.json` and `docs/dials.md`.
"""

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from alignkit.evaluate.dials import FILE, load_dials
from experiments.claims.arms import Size
from experiments.claims.lab import WORKERS, claim_row, run_lab
from experiments.claims.order import code
from experiments.dials import runs
from experiments.dials.page import page
from experiments.dials.rules import RULES, by_labels, values
from experiments.dials.runs import PARTS, Plan, run_part

SEEDS = tuple(range(31, 36))


def run(seeds: Sequence[int], folder: Path, size: Size, plan: Plan, workers: int) -> dict[int, dict[str, dict]]:
    """World seed -> part -> its record. A part is run in all worlds before the next one begins."""
    made_by = code(runs)
    tasks = [(seed, part, folder, size, plan, made_by) for part in PARTS for seed in seeds]
    worlds: dict[int, dict[str, dict]] = {seed: {} for seed in seeds}
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for (seed, part, *_), record in zip(tasks, pool.map(run_part, *zip(*tasks, strict=True)), strict=True):
            worlds[seed][part] = record
    return worlds


def recorded(worlds: Mapping[int, Mapping[str, dict]], size: Size, plan: Plan) -> dict:
    """The record: settings, claims with their statistic in each world, and the worlds' parts."""
    return {
        "settings": {**size.key(), "plan": vars(plan)},
        "claims": [claim_row(rule, "dials", values(rule, worlds)) for rule in RULES],
        "worlds": [{"seed": seed, **parts, "labels": {"rows": by_labels(parts)}} for seed, parts in worlds.items()]}


def main(arguments: list[str] | None = None) -> None:
    """Run the parts, apply the rules, print the page."""
    size, plan = Size(), Plan()
    run_lab("dials", __doc__.split("\n")[0], arguments, seeds=SEEDS, folder=Path("runs/claims/full"), file=FILE,
            make=lambda given: recorded(run(given.seeds, given.folder, size, plan, given.workers), size, plan),
            page=lambda path: page(load_dials(path)), options=WORKERS)


if __name__ == "__main__":
    main()
