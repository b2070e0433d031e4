"""Measure what a coefficient, a reference, the number of labels, the number of steps and DPO's rejected term change.

    python -m experiments.dials --seeds 31 32 33 34 35 --record

Runs the parts of `runs.py` in every world and applies the rules of `rules.py`, which were committed before the results.
A world's SFT policy and reward models are those of `experiments.claims`, and are made if they are missing. What is
finished is not run again. `--record` writes `alignkit/evaluate/dials.json` and `docs/dials.md`.
"""

import argparse
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from alignkit.evaluate.dials import FILE, load_dials
from alignkit.runs.records import versions
from alignkit.storage import plain, write_atomically
from experiments.claims.arms import Size
from experiments.claims.order import code
from experiments.dials import runs
from experiments.dials.page import page
from experiments.dials.rules import RULES, by_labels, values
from experiments.dials.runs import PARTS, Plan, run_part
from experiments.sweep import write_compact

PAGE = Path(__file__).parents[2] / "docs" / "dials.md"
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
    fixed = ("name", "source", "original", "english", "quantity", "side", "margin")
    return plain({
        "command": f"python -m experiments.dials --seeds {' '.join(map(str, worlds))} --record",
        "versions": versions(), "settings": {**size.key(), "plan": vars(plan)},
        "claims": [{**{name: getattr(rule, name) for name in fixed}, "experiment": "dials",
                    "worlds": values(rule, worlds)} for rule in RULES],
        "worlds": [{"seed": seed, **parts, "labels": {"rows": by_labels(parts)}} for seed, parts in worlds.items()]})


def main(arguments: list[str] | None = None) -> None:
    """Run the parts, apply the rules, print the page."""
    parser = argparse.ArgumentParser(prog="python -m experiments.dials", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--folder", type=Path, default=Path("runs/claims/full"),
                        help="where the worlds' models and finished parts are kept")
    parser.add_argument("--json", type=Path, default=None, help="write the record here")
    parser.add_argument("--record", action="store_true", help="write the shipped record and docs/dials.md")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, one thread each")
    given = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    size, plan = Size(), Plan()
    worlds = run(given.seeds, given.folder, size, plan, given.workers)
    target = FILE if given.record else given.json or given.folder / "dials.json"
    write_compact(target, recorded(worlds, size, plan))
    text = page(load_dials(target))
    if given.record:
        write_atomically(PAGE, text)
    print(text)


if __name__ == "__main__":
    main()
