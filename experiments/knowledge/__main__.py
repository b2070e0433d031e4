"""Measure what preferences can teach, what they cost elsewhere, and how training is undone.

    python -m experiments.knowledge --seeds 41 42 43 44 45 --record

Runs `facts.py` and `undoing.py` in every world and applies the rules of `rules.py`, which were committed before the
results. What is finished is not run again. `--record` writes `alignkit/evaluate/knowledge.json` and
`docs/knowledge.md`.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from alignkit.configs import PPOConfig
from alignkit.evaluate.claims import VERDICTS
from alignkit.evaluate.knowledge import FACT_GROUPS, FILE, Knowledge, load_knowledge
from alignkit.formulas.intervals import mean_estimate
from alignkit.runs.records import versions
from alignkit.storage import plain, write_atomically
from experiments.claims.__main__ import bound
from experiments.knowledge.facts import Lesson, LessonSize, examine
from experiments.knowledge.rules import RULES
from experiments.knowledge.undoing import Messy, MessySize, compare, follow_dpo, go_wrong, undo
from experiments.sweep import kept, write_compact

PAGE = Path(__file__).parents[2] / "docs" / "knowledge.md"
SEEDS = (41, 42, 43, 44, 45)
SMALL = {"demonstrations": 4000, "labels": 2000, "fresh": 500, "normalise": 512}
LESSON = LessonSize(**SMALL, ppo=PPOConfig(prompts_per_iteration=192, minibatch_size=96))
MESSY = MessySize(**SMALL, keys=1, blocks=8, last=0.8,
                  ppo=PPOConfig(kl_coef=0.35, prompts_per_iteration=192, minibatch_size=96))


def run(seeds: Sequence[int], folder: Path, lesson: LessonSize, messy: MessySize) -> dict[int, dict]:
    """World seed -> its parts, see `alignkit.evaluate.knowledge.Knowledge`."""
    worlds: dict[int, dict] = {seed: {"levels": {}} for seed in seeds}
    for seed in seeds:
        worlds[seed]["facts"] = part(folder / f"facts-{seed}.json", lesson.key(),
                                     lambda seed=seed: examine(Lesson(seed, folder, lesson)))
    for level in sorted(messy.levels, key=lambda each: each != messy.middle):  # the middle first
        for seed in seeds:
            made = part(folder / f"level-{level:g}-{seed}.json", messy.key(),
                        lambda seed=seed, level=level: level_of(Messy(seed, folder, messy, level)))
            worlds[seed]["levels"][f"{level:g}"] = made.pop("level")
            worlds[seed] |= made
    return worlds


def level_of(ground: Messy) -> dict:
    """A world at one level of messiness: "level", and at the middle one "path", "wrong" and "undo"."""
    row, policies = compare(ground)
    if ground.task.messiness != ground.size.middle:
        return {"level": row}
    undone = {"SFT": [row["SFT"]["risky_failures"]], **undo(ground, policies)}
    return {"level": row, "path": follow_dpo(ground), "wrong": go_wrong(ground), "undo": undone}


def part(path: Path, key: dict, make: Callable[[], dict]) -> dict:
    """A part of a world, kept in a file; the seconds are those of this process."""
    begun = time.process_time()
    made = kept(path, plain(key), lambda: plain(make()))
    print(f"{path.stem:<16}{time.process_time() - begun:6.0f} s", flush=True)
    return made


def claims_of(worlds: dict[int, dict]) -> list[dict]:
    """The claims as rows of the record, in the form of `experiments.claims`."""
    fixed = ("name", "source", "original", "english", "quantity", "side", "margin", "experiment")
    return [{**{name: getattr(rule, name) for name in fixed},
             "worlds": {str(seed): rule.statistic(world) for seed, world in worlds.items()}} for rule in RULES]


# ---- the page
def page(record: Knowledge) -> str:
    """docs/knowledge.md."""
    counts = {name: sum(claim.verdict == name for claim in record.claims) for name in VERDICTS}
    lines = [f"| {claim.name} | {claim.source}: {claim.english}<br>{claim.original} | {claim.quantity} | "
             f"{bound(claim)} | {claim.estimate:.3f} | {len(claim.values)} | **{claim.verdict}** |"
             for claim in record.claims]
    return "\n".join([
        "# Knowledge: what preferences teach, what they cost elsewhere, and how training is undone", "",
        f"Made by `{record.command}` in {len(record.worlds)} worlds, seeds {', '.join(map(str, record.worlds))}. The "
        "rules stand in `experiments/knowledge/rules.py` and were committed before the run. Verdicts as in "
        "`docs/claims.md`. Every figure of a world is exact; intervals are over worlds.", "",
        f"{len(record.claims)} claims: {', '.join(f'{counts[name]} {name}' for name in VERDICTS)}. The intervals are "
        f"not corrected for their number: of {len(record.claims)} true values about {0.05 * len(record.claims):.0f} "
        "lie outside their interval by chance.", "",
        "| claim | what the article says | quantity | rule | mean [95 % interval] | worlds | verdict |",
        "|---|---|---|---|---|---|---|", *lines, "",
        "## Facts that SFT never showed", "",
        "The demonstrators know some facts, guess others, and are silent about a third group. Chance of a right answer "
        "to a held-out question (pass@1), chance of at least one right answer in 64, and the chance of the right "
        "response in a second task that no preference is about.", "",
        f"| arm | {' | '.join(f'{group}, pass@{k}' for k in (1, 64) for group in FACT_GROUPS)} | second task |",
        "|---" * (2 * len(FACT_GROUPS) + 2) + "|",
        *(f"| {arm} | {' | '.join(f'{record.pass_at(arm, group, k):.2f}' for k in (1, 64) for group in FACT_GROUPS)} | "
          f"{record.side(arm):.2f} |" for arm in record.arms), "",
        *messy_tables(record)])


def messy_tables(record: Knowledge) -> list[str]:
    """Messiness × method, DPO's path, and the repair."""
    levels, methods = next(iter(record.worlds.values()))["levels"], ("SFT", "PPO", "DPO")
    lines = []
    for level in levels:
        rows = {name: [world["levels"][level][name] for world in record.worlds.values()] for name in methods}
        cells = [f"{mean_estimate([row[metric] for row in rows[name] if row]):.2f}" if any(rows[name]) else "–"
                 for metric in ("gold", "risky_failures") for name in methods]
        lines.append(f"| {level} | {' | '.join(cells)} | {record.advantage(level):.2f} |")
    heads = [f"{metric}, {name}" for metric in ("gold", "risky failures") for name in methods]
    size = record.settings["messy"]
    steps = [row["step"] for row in next(iter(record.worlds.values()))["path"]]
    figures = ("loss", "kl", "gold", "ranks", "implicit", "corrected", "spoilt")
    path = [[np.mean([world["path"][i][name] for world in record.worlds.values()]) for name in figures]
            for i in range(len(steps))]
    ends = []
    for name in ("SFT", "PPO", "PPO, then DPO"):
        cells = [mean_estimate([world["wrong"][name][place][metric] for world in record.worlds.values()])
                 for place in (0, -1) for metric in ("gold", "risky_failures")]
        ends.append(f"| {name} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
    return [
        "## Messiness × method", "",
        f"PPO and DPO from the same SFT policy, with the same {size['labels']:,} labels, at {size['last']:g} nats from "
        "SFT. Gold is in SFT-sd of each level's own SFT policy.", "",
        f"| messiness | {' | '.join(heads)} | gold, PPO − DPO |", "|---" * 8 + "|", *lines, "",
        "## Along one run of DPO", "",
        f"β = {size['path_beta']:g}, {size['path_epochs']} epochs; means over worlds. *ranks*: share of held-out pairs "
        "whose chosen response is likelier than the rejected one. *implicit*: whose implicit reward is larger. "
        "*corrected*: of the pairs that SFT ranks wrongly, the share ranked rightly; *spoilt*: the reverse.", "",
        f"| step | {' | '.join(figures)} |", "|---" * (len(figures) + 1) + "|",
        *(f"| {step} | {' | '.join(f'{value:.3f}' for value in row)} |" for step, row in zip(steps, path, strict=True)),
        "", "## A wrong direction, and its repair", "",
        f"PPO on a reward model of annotators who like compliance; then DPO on {size['repair']:,} labels of the same "
        f"annotators, or nothing; then the same repair: DPO on {size['repair']:,} fresh labels of the default "
        "annotator.", "",
        "| start of the repair | gold before | risky failures before | gold after | risky failures after |",
        "|---|---|---|---|---|", *ends, ""]


def main(arguments: list[str] | None = None) -> None:
    """Run the worlds, apply the rules, print the page."""
    parser = argparse.ArgumentParser(prog="python -m experiments.knowledge", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--folder", type=Path, default=Path("runs/knowledge"), help="where finished parts are kept")
    parser.add_argument("--json", type=Path, default=None, help="write the record here")
    parser.add_argument("--record", action="store_true", help="write the shipped record and docs/knowledge.md")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    worlds = run(given.seeds, given.folder, LESSON, MESSY)
    record = plain({
        "command": f"python -m experiments.knowledge --seeds {' '.join(map(str, given.seeds))} --record",
        "versions": versions(), "settings": {"lesson": LESSON.key(), "messy": MESSY.key()},
        "claims": claims_of(worlds), "worlds": {str(seed): world for seed, world in worlds.items()}})
    target = FILE if given.record else given.json or given.folder / "knowledge.json"
    write_compact(target, record)
    text = page(load_knowledge(target))
    if given.record:
        write_atomically(PAGE, text)
    print(text)


if __name__ == "__main__":
    main()
