"""Train and measure the factorial data × algorithm × reward model × prompts in several worlds.

    python -m experiments.unpacking --seeds 41 42 43 44 45 --record

What is finished is not run again. `--record` writes `alignkit/evaluate/unpacking.json` and `docs/unpacking.md`.
"""

from pathlib import Path

from alignkit.evaluate.unpacking import DATA, FILE, PARTS, REWARDS, USUAL, Unpacking, load_unpacking
from experiments.claims.lab import claim_cells, claims_table, counted, run_lab
from experiments.claims.order import code
from experiments.unpacking import cells
from experiments.unpacking.cells import Size, run_world
from experiments.unpacking.rules import measured

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
        "The rules stand in `experiments/unpacking/rules.py` and were committed before the run; `docs/claims.md` "
        f"explains the verdicts. {counted(record.claims)}", "",
        claims_table([claim_cells(claim) for claim in record.claims]), "",
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
    def make(given) -> dict:
        size, made_by = Size(), code(cells)
        worlds = [run_world(seed, given.folder, size, made_by) for seed in given.seeds]
        return {"settings": size.key(), "claims": measured({row["world"]: row for row in worlds}), "worlds": worlds}

    run_lab("unpacking", __doc__.split("\n")[0], arguments, seeds=SEEDS, folder=Path("runs/unpacking"), file=FILE,
            make=make, page=lambda path: page(load_unpacking(path)))


if __name__ == "__main__":
    main()
