"""Time to quality: seconds and samples until PPO is as good as asked, beside TRL's PPO, and what makes it sooner.

    python -m benchmarks.quality --trl-ppo runs/trl-ppo --record      # benchmarks/results/quality.json, docs/quality.md
    python -m benchmarks.quality --page                               # the page again, from the record
    python -m benchmarks.quality --quick --runs /tmp/quick            # tiny sizes: does it run?

What is asked and tried is in `benchmarks.quality.rules`. The runs of a seed alternate iteration by iteration on one
thread each; policies are measured by enumeration, outside of every clock. Finished parts are kept in --runs and not
made again as long as the code that trains is the same. Without --trl-ppo only alignkit is measured.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path

import torch

from alignkit.configs import SFTConfig
from alignkit.runs.records import versions
from benchmarks.quality import page, rules, stages
from benchmarks.steps.trl_ppo import VERSION, Process
from benchmarks.steps.work import _quiet, _threads
from experiments import sweep

RECORD = Path("benchmarks/results/quality.json")
PAGE = Path("docs/quality.md")
PICTURE = Path("docs/images/quality.png")


def measure(bench: stages.Bench, tries: dict, tuning: tuple, varied: tuple, evaluation: tuple, *, sizes=stages.SIZES,
            changes=rules.changes) -> dict:
    """All parts in their order; returns the record. changes: as `rules.changes`, from a setting to groups."""
    load = [os.getloadavg()[0]]
    tried, chosen = stages.tune(bench, tries, tuning)
    mine = tries[chosen["alignkit"]]
    changed, fields, soonest = stages.vary(bench, mine, changes(mine), varied)
    sides = {"alignkit": ("alignkit", mine, {}), "alignkit, changed": ("alignkit", mine, fields[soonest])}
    if "trl" in chosen:
        sides["trl"] = ("trl", tries[chosen["trl"]], {})
    evaluated = stages.evaluate(bench, sides, evaluation)
    grown = stages.grow(bench, sizes)
    return {
        "command": "python -m benchmarks.quality --trl-ppo runs/trl-ppo --record",
        "versions": versions() | ({"trl_ppo": bench.process.said["trl"]} if bench.process else {}),
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(),
                    "load": [*load, os.getloadavg()[0]]},
        "rules": {"price": rules.PRICE, "share": rules.SHARE, "most_kl": rules.MOST_KL, "gold": rules.GOLD,
                  "every": bench.every, "prompts": 8 * 2 * bench.size.keys},
        "tries": {name: vars(setting) for name, setting in tries.items()},
        "chosen": chosen, "changes": fields, "soonest": soonest,
        "tuning": tried, "varied": changed, "evaluation": evaluated, "growth": grown,
    }


def main(arguments: list[str] | None = None) -> dict:
    """Measure, print the page's tables, and write record, page and picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="where finished parts are kept")
    parser.add_argument("--trl-ppo", type=Path, metavar="FOLDER",
                        help=f"measure the PPO of trl {VERSION} beside it, from an environment here (made on demand)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run? Its figures mean nothing")
    todo = parser.add_mutually_exclusive_group()
    todo.add_argument("--record", action="store_true", help=f"write {RECORD}, {PAGE} and {PICTURE}")
    todo.add_argument("--page", action="store_true", help="measure nothing: write the page from the record")
    given = parser.parse_args(arguments)
    if given.quick and given.record:
        parser.error("--record does not go with --quick, whose figures mean nothing")
    if given.page:
        record = page.load(RECORD)
    else:
        with _quiet(), _threads(1):
            record = _measured(given)
    if given.record:
        sweep.write_compact(RECORD, record)
        record = page.load(RECORD)
    if given.record or given.page:
        page.write(record, PAGE, PICTURE)
    print(page.tables(record))
    return record


def _measured(given: argparse.Namespace) -> dict:
    process = Process(given.trl_ppo, "benchmarks.quality.trl_ppo") if given.trl_ppo else None
    try:
        if given.quick:
            tiny = replace(sweep.PROBE, demonstrations=320, pairs=64, normalise=64, sft=SFTConfig(epochs=1))
            bench = stages.Bench(given.runs, process, tiny, every=1)
            return measure(bench, {"tiny": rules.TINY}, (0,), (0,), (0,), sizes=(),
                           changes=lambda _: {"critic": {"shared trunk": {"shared_trunk": True}}})
        return measure(stages.Bench(given.runs, process), rules.TRIES, rules.TUNING, rules.VARIED, rules.EVALUATION)
    finally:
        if process is not None:
            process.close()


if __name__ == "__main__":
    main()
