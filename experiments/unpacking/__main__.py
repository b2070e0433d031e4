"""Train and measure the factorial data × algorithm × reward model × prompts in several worlds.

    python -m experiments.unpacking --seeds 41 42 43 44 45 --record

What is finished is not run again. `--record` writes `alignkit/evaluate/unpacking.json` and `docs/unpacking.md`.
"""

import argparse
import os
from pathlib import Path

import torch

from alignkit.evaluate.unpacking import DATA, FILE, PARTS, REWARDS, USUAL, Unpacking, load_unpacking
from alignkit.exact.sweep import source_hashes
from alignkit.runs.records import versions
from alignkit.storage import content_hash, plain, write_atomically
from experiments.claims import order
from experiments.claims.__main__ import bound
from experiments.sweep import write_compact
from experiments.unpacking import cells
from experiments.unpacking.cells import Size, run_world
from experiments.unpacking.rules import measured

PAGE = Path(__file__).parents[2] / "docs" / "unpacking.md"
SEEDS = (41, 42, 43, 44, 45)
METRICS = {  # metric -> name on the page
    "gold": "gold, SFT-sd", "gold_domain": "gold on ambiguous and risky prompts, SFT-sd", "helpful": "helpful, SFT-sd",
    "safe": "safe, SFT-sd", "concise": "concise, SFT-sd", "polite": "polite, SFT-sd",
    "risky_failures": "risky failures", "over_refusal": "over-refusal", "wrong_answer": "wrong answers"}


def effects_table(record: Unpacking, part: str) -> list[str]:
    """The main effects of a part of the factorial, a row a level."""
    shown = ("gold", "gold_domain", "risky_failures", "over_refusal", "wrong_answer")
    lines = [f"| factor | level | {' | '.join(METRICS[metric] for metric in shown)} |",
             "|---" * (len(shown) + 2) + "|"]
    for factor, levels in PARTS[part].items():
        found = {metric: record.effects(factor, metric) for metric in shown}
        lines += [f"| {factor} | {level} | {' | '.join(f'{found[metric][level]:.3f}' for metric in shown)} |"
                  for level in levels]
    return lines


def shares_table(record: Unpacking, part: str) -> list[str]:
    """The shares of variance of a part of the factorial, a row a metric."""
    names = list(record.shares(part, "gold"))
    lines = [f"| metric | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for metric, title in METRICS.items():
        found = record.shares(part, metric)
        lines.append(f"| {title} | {' | '.join(f'{found[name]:.2f}' for name in names)} |")
    return lines


def claims_table(record: Unpacking) -> list[str]:
    """The claims with their rules and verdicts, a row a claim."""
    lines = ["| claim | what the article says | quantity | rule | mean [95 % interval] | verdict |", "|---" * 6 + "|"]
    return lines + [f"| {claim.name} | {claim.english}<br>{claim.original} | {claim.quantity} | {bound(claim)} | "
                    f"{claim.estimate:.3f} | **{claim.verdict}** |" for claim in record.claims]


def page(record: Unpacking) -> str:
    """docs/unpacking.md: the design, the main effects, the shares of variance, the reward models by themselves."""
    size, worlds = record.settings, list(record.worlds.values())
    every = [cell for world in worlds for cell in world["cells"]]
    powers, shares = [cell["power"] for cell in every], [cell["share"] for cell in every if cell.get("share")]
    ranges = {factor: record.ranges(factor, "gold") for factor in USUAL}
    alone = {figure: record.rewards(figure) for figure in ("accuracy", "best_of_n")}
    return "\n".join([
        "# Unpacking: data, algorithm, reward model or prompts?", "",
        f"Made by `{record.command}`: {len(worlds)} worlds, {len(every) // len(worlds)} policies each. Every policy "
        f"starts from its world's SFT policy and is measured at {size['kl']:g} nats from it, by enumeration of all "
        "responses to 32 held-out prompts. Figures are means over worlds with 95 % t intervals; the intervals are not "
        "corrected for their number.", "",
        "## Design", "",
        f"* **data**: {size['labels']:,} labels of the default annotator (*overall*), of one who labels four aspects "
        "separately and takes the majority (*multi-aspect*), of one who likes compliance with risky prompts "
        f"(*arena*), and {size['few']:,} labels of an expert (*few, expert*). All label the same pairs of responses, "
        "and all have the same number of optimiser steps.",
        "* **algorithm**: DPO, or PPO on a reward model's score.",
        "* **reward model** of PPO: weights on phrase counts (*bag of phrases*), a one-layer transformer from scratch "
        "(*small transformer*), or a copy of the SFT policy's body (*transformer*).",
        "* **prompts** of PPO: equally many of each class (*even*), or three quarters ambiguous and risky "
        "(*targeted*).", "",
        f"DPO has neither a reward model nor prompts. Part *all*: {len(DATA)} data sets × 2 algorithms, PPO with the "
        f"transformer and even prompts. Part *ppo*: PPO on {USUAL['data']} labels, {len(REWARDS)} reward models × 2 "
        "mixes of prompts. One training run a cell: chance is part of the interactions, and the intervals over worlds "
        "hold it.", "",
        f"Limits. PPO is short ({size['ppo']['iterations']} iterations of {size['ppo']['prompts_per_iteration']} "
        f"responses): with the small transformer and overall labels it has {min(shares):.2f} to {max(shares):.2f} of "
        "the most proxy at its KL. Each policy was trained once, and moved to the common KL along π_ref^(1 − t) π^t "
        f"with t from {min(powers):.2f} to {max(powers):.2f}.", "",
        "## What the article says", "",
        f"{len(record.claims)} claims, by rules in `experiments/unpacking/rules.py` that were committed before the "
        "run; `docs/claims.md` explains the verdicts. If the true value of every claim were 0, about "
        f"{0.025 * len(record.claims):.1f} of them would be called confirmed by chance, at most.", "",
        *claims_table(record), "",
        "## How far apart the best and the worst level are", "", "| factor | range of mean gold, SFT-sd |", "|---|---|",
        *(f"| {factor} | {estimate:.3f} |" for factor, estimate in ranges.items()), "",
        "A range is never negative; chance alone makes it greater than 0, and more so over four levels than over two.",
        "",
        *(line for part in PARTS for line in (
            f"## Main effects, part *{part}*", "", "A level's mean minus the mean of all levels.", "",
            *effects_table(record, part), "", f"## Shares of variance, part *{part}*", "",
            "Shares of the sum of squares over a world's policies.", "", *shares_table(record, part), "")),
        "## The reward models by themselves", "",
        f"Trained on {USUAL['data']} labels, judged on SFT's responses to {4 * size['asked']} held-out prompts, "
        "equally many of each class.", "",
        f"| reward model | pairs ranked as gold ranks them | gold of best-of-{size['n']} over SFT, SFT-sd |",
        "|---|---|---|",
        *(f"| {name} | {alone['accuracy'][name]:.3f} | {alone['best_of_n'][name]:.3f} |" for name in REWARDS), ""])


def main(arguments: list[str] | None = None) -> None:
    """Run the worlds, write the record, print the page."""
    parser = argparse.ArgumentParser(prog="python -m experiments.unpacking", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--folder", type=Path, default=Path("runs/unpacking"), help="where finished cells are kept")
    parser.add_argument("--json", type=Path, default=None, help="write the record here")
    parser.add_argument("--record", action="store_true", help="write the shipped record and docs/unpacking.md")
    given = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    here = [Path(module.__file__).read_text(encoding="utf-8") for module in (cells, order)]
    code, size = content_hash([source_hashes(), here]), Size()
    worlds = [run_world(seed, given.folder, size, code) for seed in given.seeds]
    claims = measured({row["world"]: row for row in worlds})
    target = FILE if given.record else given.json or given.folder / "unpacking.json"
    write_compact(target, plain({
        "command": f"python -m experiments.unpacking --seeds {' '.join(map(str, given.seeds))} --record",
        "versions": versions(), "settings": size.key(), "claims": claims, "worlds": worlds}))
    text = page(load_unpacking(target))
    if given.record:
        write_atomically(PAGE, text)
    print(text)


if __name__ == "__main__":
    main()
