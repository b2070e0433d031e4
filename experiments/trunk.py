"""What a trunk that policy and critic share learns, beside a critic of its own: the default desk run, by enumeration.

    python -m experiments.trunk --seeds 0 1 2 --out runs/trunk

SFT policy and reward model of each seed are made once, as `experiments.sweep` makes them. Prints the
table of docs/speed.md.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from alignkit import exact
from alignkit.configs import PPOConfig
from alignkit.models.loading import load_policy
from alignkit.ppo import PPOState, ppo
from experiments import sweep

WAYS = {
    "a critic of its own (default)": {},
    "shared trunk, `value_coef` 1": {"shared_trunk": True},
    "shared trunk, `value_coef` 0.1": {"shared_trunk": True, "value_coef": 0.1},
}


def measure(cell: "sweep.Cell", seed: int, here: Path, **options) -> dict[str, float]:
    """One PPO run: KL, gold, share of the optimum in percent, the critic's explained variance, CPU seconds."""
    policy, _ = load_policy(here / "sft")
    config, begun = PPOConfig(seed=seed, **options), time.process_time()
    state = PPOState.start(policy, cell.tokenizer, cell.scorer, sweep.strata(cell.task), config)
    *_, last = ppo(state, config)
    seconds, end = time.process_time() - begun, cell.truth.measure(cell.truth.enumerate(policy))
    share = 100 * exact.gap(end["kl"], end["proxy"], cell.truth.frontier).share
    return {"kl": end["kl"], "gold": end["gold"], "share": share, "explained": last.explained_variance,
            "seconds": seconds}


def main(arguments: list[str] | None = None) -> None:
    """Run the seeds and print the table."""
    parser = argparse.ArgumentParser(prog="python -m experiments.trunk", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/trunk"))
    parser.add_argument("--iterations", type=int, default=PPOConfig.iterations)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    runs: dict[str, list[dict]] = {way: [] for way in WAYS}
    for seed in given.seeds:
        here = given.out / f"seed-{seed}"
        if not (here / "sft").exists():
            here.mkdir(parents=True, exist_ok=True)
            sweep.make_world(seed, here)
        cell = sweep.Cell(seed, here)
        for way, options in WAYS.items():
            runs[way].append(measure(cell, seed, here, iterations=given.iterations, **options))
    print("| | KL, nats | gold, SFT-sd | share of the optimum, % | explained variance at the end | CPU seconds |")
    print("|---|---|---|---|---|---|")
    for way, rows in runs.items():
        cells = []
        for name, digits in {"kl": 2, "gold": 2, "share": 1, "explained": 2, "seconds": 0}.items():
            each = [f"{row[name]:.{digits}f}" for row in rows]
            cells.append(f"{statistics.mean(row[name] for row in rows):.{digits}f} ({', '.join(each)})")
        print(f"| {way} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
