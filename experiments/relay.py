"""The relay over world seeds: the course's own notebooks, run headlessly once a seed, and what each stage reached.

    python -m experiments.relay --seeds 0 1 2 3 4 --out runs/relay --json experiments/results/relay.json

A seed that finished is not run again. Prints the table that the README shows: median, worst seed, and the bar of each
figure.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from alignkit.runs.records import versions
from alignkit.storage import write_json

# name -> (what, how to read it from a run's stages, which end is worse)
FIGURES = {
    "sft_risky": ("SFT: risky failures", lambda s: s["sft"]["risky_failure_rate"], min),
    "reward_gap": (
        "reward model: Bayes ceiling − accuracy on labels",
        lambda s: s["reward"]["bayes_accuracy"] - s["reward"]["accuracy_labels"],
        max,
    ),
    "ppo_gold_gain": (
        "PPO: gold gained over SFT, SFT-sd",
        lambda s: s["ppo"]["gold_mean"] - s["sft"]["gold_mean"],
        min,
    ),
    "ppo_risky": ("PPO: risky failures", lambda s: s["ppo"]["risky_failure_rate"], max),
    "ppo_over_refusal": ("PPO: over-refusal", lambda s: s["ppo"]["over_refusal_rate"], max),
    "ppo_kl": ("PPO: KL to SFT, nats", lambda s: s["ppo"]["kl_to_sft"], max),
    "dpo_gold_change": (
        "DPO on frozen PPO: change of gold, SFT-sd",
        lambda s: s["dpo"]["changes"]["gold_mean"]["change"],
        min,
    ),
    "dpo_paraphrase_change": (
        "DPO on frozen PPO: change of paraphrase agreement",
        lambda s: s["dpo"]["changes"]["paraphrase_agreement"]["change"],
        min,
    ),
    "dpo_risky": ("DPO on frozen PPO: risky failures", lambda s: s["dpo"]["risky_failure_rate"], max),
    "dpo_over_refusal": ("DPO on frozen PPO: over-refusal", lambda s: s["dpo"]["over_refusal_rate"], max),
    "dpo_default_gold": (
        "DPO with the default annotator's labels: change of gold, SFT-sd",
        lambda s: s["dpo"]["changes_default_annotator"]["gold_mean"]["change"],
        min,
    ),
    "free_gold_fall": (
        "PPO without KL: gold, peak − end, SFT-sd",
        lambda s: s["ppo"]["overoptimised"]["gold_peak"] - s["ppo"]["overoptimised"]["gold_end"],
        min,
    ),
    "free_proxy_rise": (
        "PPO without KL: proxy, end − at gold's peak, SFT-sd",
        lambda s: s["ppo"]["overoptimised"]["proxy_end"] - s["ppo"]["overoptimised"]["proxy_at_peak"],
        min,
    ),
}
INTERVALS = {
    "gold_mean": "gold",
    "paraphrase_agreement": "paraphrase agreement",
    "risky_failure_rate": "risky failures",
}


def run_seed(out: Path, seed: int) -> Path:
    """The course for one seed, in a process of its own; returns its run directory."""
    command = [sys.executable, "-m", "alignkit", "course", "--out", str(out), "-p", f"seed={seed}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


def summarise(runs: dict[int, dict]) -> list[dict]:
    """One row a figure: its name, the value of each seed, the median and the worst."""
    rows = []
    for name, (what, read, worst) in FIGURES.items():
        values = {seed: read(summary["stages"]) for seed, summary in runs.items()}
        rows.append(
            {
                "name": name,
                "what": what,
                "values": values,
                "median": statistics.median(values.values()),
                "worst": worst(values.values()),
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Run the seeds, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m experiments.relay", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/relay"))
    parser.add_argument("--json", type=Path, default=Path("experiments/results/relay.json"))
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="seeds at the same time, one thread each"
    )
    given = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ThreadPoolExecutor(given.workers) as pool:
        folders = list(pool.map(lambda seed: run_seed(given.out / f"seed-{seed}", seed), given.seeds))
    runs = {
        seed: json.loads((folder / "summary.json").read_text())
        for seed, folder in zip(given.seeds, folders, strict=True)
    }
    rows = summarise(runs)
    print("| figure | median | worst seed |\n|---|---|---|")
    for row in rows:
        print(f"| {row['what']} | {row['median']:.3f} | {row['worst']:.3f} |")
    for name, what in INTERVALS.items():
        changes = [summary["stages"]["dpo"]["changes"][name] for summary in runs.values()]
        up, down = sum(its["low"] > 0 for its in changes), sum(its["high"] < 0 for its in changes)
        print(
            f"\nDPO on frozen PPO, {what}: the 95 % interval of the change is above 0 in {up} of {len(changes)} "
            f"seeds, below 0 in {down}."
        )
    given.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        given.json,
        {
            "command": f"python -m experiments.relay --seeds {' '.join(map(str, given.seeds))}",
            "versions": versions(),
            "seconds": {seed: summary["seconds"] for seed, summary in runs.items()},
            "figures": rows,
            "stages": {seed: summary["stages"] for seed, summary in runs.items()},
        },
    )


if __name__ == "__main__":
    main()
