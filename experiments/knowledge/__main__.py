"""Measure what preferences can teach, what they cost elsewhere, and how training is undone.

    python -m experiments.knowledge --seeds 41 42 43 44 45 --record

Runs `facts.py` and `undoing.py` in every world and applies the rules of `rules.py`, which were committed before the
results. What is finished is not run again. `--record` writes `alignkit/evaluate/knowledge.json` and
`docs/knowledge.md`.
"""

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from alignkit.configs import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from alignkit.evaluate.knowledge import FACT_GROUPS, FILE, Knowledge, load_knowledge
from alignkit.formulas.intervals import mean_estimate
from alignkit.storage import plain
from experiments.claims.lab import claim_cells, claim_row, claims_table, counted, run_lab
from experiments.knowledge.facts import Exam, Lesson, LessonSize, other_rewards
from experiments.knowledge.rules import RULES
from experiments.knowledge.undoing import compare, follow_dpo, go_wrong, undo
from experiments.sweep import kept

SEEDS = (41, 42, 43, 44, 45)
SIZE = LessonSize(
    demonstrations=4500, labels=3000, fresh=500, normalise=256, keys=1, blocks=8, last=0.8, betas=(0.15, 0.4, 1.0),
    sft=SFTConfig(batch_size=128), reward=RewardConfig(batch_size=64),
    ppo=PPOConfig(kl_coef=0.35, prompts_per_iteration=192, minibatch_size=96),
    dpo=DPOConfig(beta=0.3, epochs=2, learning_rate=5e-4))


def parts_of(size: LessonSize) -> dict[str, tuple[float, Callable[[Lesson], dict]]]:
    """Name of a part of a world -> its level of messiness, and what makes it; in the order in which they are made."""
    levels = sorted(size.levels, key=lambda each: each != size.middle)  # the middle first
    return {f"{name}-{level:g}": (level, make) for level in levels
            for name, make in (PARTS if level == size.middle else {"level": PARTS["level"]}).items()}


def run(seeds: Sequence[int], folder: Path, size: LessonSize, finished: bool = False) -> dict[int, dict]:
    """World seed -> its parts, see `alignkit.evaluate.knowledge.Knowledge`. finished: run nothing, and leave out what
    is not finished in all worlds."""
    worlds: dict[int, dict] = {seed: {"parts": [], "levels": {}, "facts": {}} for seed in seeds}
    lesson = functools.cache(lambda seed, level: Lesson(seed, folder, size, level))
    for name, (level, make) in parts_of(size).items():
        paths = {seed: folder / f"{name}-{seed}.json" for seed in seeds}
        if finished and not all(path.exists() for path in paths.values()):
            continue
        for seed, path in paths.items():
            made = part(path, size.key(), lambda seed=seed, level=level, make=make: make(lesson(seed, level)))
            worlds[seed]["parts"].append(name)
            worlds[seed]["levels"] |= {f"{level:g}": made.pop("level")} if "level" in made else {}
            worlds[seed]["facts"] |= made.pop("facts", {})
            worlds[seed] |= made
    return worlds


def level_of(lesson: Lesson) -> dict:
    """PPO and DPO at one level of messiness; at the middle one also what they know, and what undoes them."""
    row, policies = compare(lesson)
    if lesson.task.messiness != lesson.size.middle:
        return {"level": row}
    exam = Exam(lesson)
    marks = {name: exam.marks(policy) for name, policy in {"SFT": lesson.sft, **policies}.items()}
    return {"level": row, "facts": marks, "undo": {"SFT": [row["SFT"]["risky_failures"]], **undo(lesson, policies)}}


PARTS: dict[str, Callable[[Lesson], dict]] = {
    "level": level_of,
    "wrong": lambda lesson: {"path": follow_dpo(lesson), "wrong": go_wrong(lesson)},
    "rewards": lambda lesson: {"facts": other_rewards(lesson, Exam(lesson))},
}


def part(path: Path, key: dict, make: Callable[[], dict]) -> dict:
    """A part of a world, kept in a file; the seconds are those of this process."""
    begun = time.process_time()
    made = kept(path, plain(key), lambda: plain(make()))
    print(f"{path.stem:<16}{time.process_time() - begun:6.0f} s", flush=True)
    return made


def claims_of(worlds: dict[int, dict]) -> tuple[list[dict], dict[str, str]]:
    """The claims as rows of the record, and those whose parts are not made yet."""
    made = set.intersection(*(set(world["parts"]) for world in worlds.values()))
    missing = {rule.name: f"needs {', '.join(sorted({*rule.needs} - made))}" for rule in RULES if {*rule.needs} - made}
    return [claim_row(rule, "knowledge", {str(seed): rule.statistic(world) for seed, world in worlds.items()})
            for rule in RULES if rule.name not in missing], missing


# ---- the page
def page(record: Knowledge) -> str:
    """docs/knowledge.md."""
    return "\n".join([
        "# Knowledge: what preferences teach, what they cost elsewhere, and how training is undone", "",
        f"Made by `{record.command}` in {len(record.worlds)} worlds, seeds {', '.join(map(str, record.worlds))}. The "
        "rules stand in `experiments/knowledge/rules.py` and were committed before the run. Verdicts as in "
        "`docs/claims.md`. Every figure of a world is exact; intervals are over worlds. After three worlds of the "
        "middle level had been seen, the comparison of methods was changed from a fixed KL to the KL of PPO, and they "
        "were made again; no rule was changed then. Claim C3d was worded anew, and its rule with it, after pilots in "
        "world 51, which is none of these, and before any of these worlds was run.", "",
        counted(record.claims), "", claims_table([claim_cells(claim) for claim in record.claims]), "",
        "## Facts that SFT never showed", "",
        "The demonstrators know some facts, guess others, and are silent about a third group. Chance of a right answer "
        "to a held-out question (pass@1), chance of at least one right answer in 64, and the chance of the right "
        "response in a second task that no preference is about.", "",
        f"| arm | {' | '.join(f'{group}, pass@{k}' for k in (1, 64) for group in FACT_GROUPS)} | second task |",
        "|---" * (2 * len(FACT_GROUPS) + 2) + "|",
        *(f"| {arm} | {' | '.join(f'{record.pass_at(arm, group, k):.2f}' for k in (1, 64) for group in FACT_GROUPS)} | "
          f"{record.side(arm):.2f} |" for arm in record.arms), "",
        *(messy_table(record)), *(path_table(record) if record.has("wrong-0.5") else []),
        "## Not measured yet" if record.unmeasured else "", "",
        *(f"* {name}: {why}" for name, why in record.unmeasured.items()), ""]).rstrip("\n") + "\n"


def messy_table(record: Knowledge) -> list[str]:
    """Messiness × method."""
    levels, methods = next(iter(record.worlds.values()))["levels"], ("SFT", "PPO", "DPO")
    lines, size = [], record.settings
    for level in sorted(levels, key=float):
        rows = {name: [world["levels"][level][name] for world in record.worlds.values()] for name in methods}
        cells = [f"{mean_estimate([row[metric] for row in rows[name] if row]):.2f}" if any(rows[name]) else "–"
                 for metric in ("gold", "risky_failures") for name in methods]
        lines.append(f"| {level} | {' | '.join(cells)} | {record.advantage(level):.2f} |")
    heads = [f"{metric}, {name}" for metric in ("gold", "risky failures") for name in methods]
    return [
        "## Messiness × method", "",
        f"PPO and DPO from the same SFT policy, with the same {size['labels']:,} labels. PPO's price is steered to "
        f"{size['last']:g} nats on its own rollouts; DPO is interpolated between runs at the KL that PPO has on the "
        "held-out prompts. Gold is in SFT-sd of each level's own SFT "
        "policy.", "", f"| messiness | {' | '.join(heads)} | gold, PPO − DPO |", "|---" * 8 + "|", *lines, ""]


def path_table(record: Knowledge) -> list[str]:
    """DPO's path, and the repair."""
    undoing, worlds = record.settings["undoing"], list(record.worlds.values())
    steps = [row["step"] for row in worlds[0]["path"]]
    figures = ("loss", "kl", "gold", "ranks", "implicit", "corrected", "spoilt")
    path = [f"| {step} | " + " | ".join(f"{np.mean([world['path'][i][name] for world in worlds]):.3f}"
                                        for name in figures) + " |" for i, step in enumerate(steps)]
    ends = []
    for name in ("SFT", "PPO", "PPO, then DPO"):
        cells = [mean_estimate([world["wrong"][name][place][metric] for world in worlds])
                 for place in (0, -1) for metric in ("gold", "risky_failures")]
        ends.append(f"| {name} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
    return [
        "## Along one run of DPO", "",
        f"β = {undoing['beta']:g}, {undoing['epochs']} epochs; means over worlds. *ranks*: share of held-out pairs "
        "whose chosen response is likelier than the rejected one. *implicit*: whose implicit reward is larger. "
        "*corrected*: of the pairs that SFT ranks wrongly, the share ranked rightly; *spoilt*: the reverse.", "",
        f"| step | {' | '.join(figures)} |", "|---" * (len(figures) + 1) + "|", *path, "",
        "## A wrong direction, and its repair", "",
        "PPO on a reward model of annotators who like compliance; then DPO on "
        f"{undoing['repair']:,} labels of the same annotators, or nothing; then the same repair: DPO on as many fresh "
        "labels of the default annotator.", "",
        "| start of the repair | gold before | risky failures before | gold after | risky failures after |",
        "|---|---|---|---|---|", *ends, ""]


def main(arguments: list[str] | None = None) -> None:
    """Run the worlds, apply the rules, print the page."""
    def make(given) -> dict:
        worlds = run(given.seeds, given.folder, SIZE, given.finished)
        claims, missing = claims_of(worlds)
        return {"settings": SIZE.key(), "unmeasured": missing, "claims": claims,
                "worlds": {str(seed): world for seed, world in worlds.items()}}

    finished = {"action": "store_true", "help": "run nothing: take the parts that all worlds have"}
    run_lab("knowledge", __doc__.split("\n")[0], arguments, seeds=SEEDS, folder=Path("runs/knowledge"), file=FILE,
            make=make, page=lambda path: page(load_knowledge(path)), options={"--finished": finished})


if __name__ == "__main__":
    main()
