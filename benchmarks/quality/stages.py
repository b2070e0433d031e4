"""The benchmark's parts: the tries, the changes, the evaluation, and what an iteration costs as things grow.

Each part of each seed is kept in a folder as JSON, under a hash of the code that trains and of what was asked, and is
not made again.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from alignkit.desk.tiny import desk_tokenizer, tiny_policy
from alignkit.exact.sweep import source_hashes
from alignkit.models.heads import reward_model_from
from alignkit.models.loading import load_policy, save_model
from alignkit.reward import RewardScorer
from alignkit.storage import content_hash
from alignkit.task import desk_task
from benchmarks.quality import rules
from benchmarks.quality.ours import Alignkit, World
from benchmarks.quality.race import both, race
from benchmarks.quality.reached import ratio, soonest
from benchmarks.quality.rules import Setting
from benchmarks.quality.trl_ppo import TRL
from experiments import sweep

SIZES = ({}, {"prompts": 128}, {"prompts": 2048}, {"hidden": 128}, {"layers": 4})  # of `grow`


class Bench:
    """Where things are kept and how large they are. process: TRL's, or None."""

    def __init__(self, folder: Path, process=None, size: sweep.Size = sweep.COURSE, every: int = rules.EVERY):
        self.folder, self.process, self.size, self.every = folder, process, size, every
        self.code = content_hash(source_hashes())
        self._world: World | None = None

    def world(self, seed: int) -> World:
        """The world of a seed; the last one is held."""
        if self._world is None or self._world.seed != seed:
            self._world = World(seed, self.folder / f"seed-{seed}", self.size)
        return self._world

    def run(self, name: str, seed: int, sides: Mapping[str, tuple[str, Setting, dict]], late: float = math.inf) -> dict:
        """A race on a seed, kept: {"gold_best", "runs": label -> its points}.

        sides: label -> (side, setting, changes of PPOConfig). late: as in `race`.
        """
        asked = {label: [side, asdict(setting), changes] for label, (side, setting, changes) in sides.items()}
        key = {"code": self.code, "asked": asked, "every": self.every, "price": rules.PRICE}

        def make() -> dict:
            world = self.world(seed)
            runs = {label: TRL(self.process, world, setting) if side == "trl" else Alignkit(world, setting, **changes)
                    for label, (side, setting, changes) in sides.items()}
            return {"gold_best": world.gold_best, "runs": race(world, runs, self.every, late)}

        return sweep.kept(self.folder / f"seed-{seed}" / f"{name}-{content_hash(asked)[:12]}.json", key, make)


def levels(rows: Sequence[Mapping], label: str, level: str = "proxy") -> list:
    """When the runs with a label reached a level, a `Reached` a seed. rows: of a stage, as `Bench.run` returns them."""
    return [both(row["runs"][label], row["gold_best"])[level] for row in rows]


def tune(bench: Bench, tries: Mapping[str, Setting], seeds: Sequence[int]) -> tuple[list[dict], dict[str, str]]:
    """The tries on both sides: a row a seed and try (seed, try, gold_best, runs), and side -> the try that is soonest.

    The two sides of a try alternate. Without TRL only alignkit's are made.
    """
    sides = ["alignkit"] + ["trl"] * (bench.process is not None)
    rows = [{"seed": seed, "try": name, **bench.run("try", seed, {side: (side, setting, {}) for side in sides})}
            for seed in seeds for name, setting in tries.items()]
    chosen = {side: soonest({name: levels([row for row in rows if row["try"] == name], side) for name in tries})
              for side in sides}
    return rows, chosen


def vary(bench: Bench, setting: Setting, groups: Mapping[str, Mapping[str, dict]], seeds: Sequence[int]
         ) -> tuple[list[dict], dict[str, dict], str]:
    """Changes of alignkit's try: rows (seed, gold_best, runs), name -> fields, and the name that is soonest of all.

    groups: single changes, as `rules.changes`. Those of a seed alternate with the try itself, "no change"; then those
    of `rules.together` do.
    """
    single = {"no change": {}, **{name: fields for group in groups.values() for name, fields in group.items()}}
    first = [bench.run("change", seed, _ours(setting, single), rules.LATE) for seed in seeds]
    gains = {}
    for name in single:
        found = ratio(levels(first, "no change"), levels(first, name))
        gains[name] = found.value if found.bound in ("", "at least") else 0.0
    joined = rules.together(setting, groups, gains)
    second = [bench.run("joined", seed, _ours(setting, joined)) if joined else {"runs": {}} for seed in seeds]
    rows = [{"seed": seed, "gold_best": one["gold_best"], "runs": {**one["runs"], **other["runs"]}}
            for seed, one, other in zip(seeds, first, second, strict=True)]
    fields = {**single, **joined}
    return rows, fields, soonest({name: levels(rows, name) for name in fields})


def _ours(setting: Setting, changes: Mapping[str, dict]) -> dict[str, tuple]:
    return {name: ("alignkit", setting, fields) for name, fields in changes.items()}


def evaluate(bench: Bench, sides: Mapping[str, tuple[str, Setting, dict]], seeds: Sequence[int]) -> list[dict]:
    """The chosen tries on seeds that no choice has seen: a row a seed (seed, gold_best, runs)."""
    return [{"seed": seed, **bench.run("evaluation", seed, sides)} for seed in seeds]


def grow(bench: Bench, sizes: Sequence[Mapping] = SIZES, iterations: int = 2) -> list[dict]:
    """CPU seconds of an iteration of untrained models, a row a size: changed, parameters, and a number a side.

    The mean of `iterations` after a first one; 2 epochs in minibatches of a quarter of the prompts.
    """
    return [sweep.kept(bench.folder / "growth" / f"{content_hash(dict(changed))[:12]}.json",
                       {"code": bench.code, "changed": dict(changed), "iterations": iterations},
                       lambda changed=changed: _grown(bench, dict(changed), iterations)) for changed in sizes]


def _grown(bench: Bench, changed: dict, iterations: int) -> dict:
    folder = bench.folder / "growth" / content_hash(changed)[:12]
    tokenizer, shape = desk_tokenizer(), {name: changed[name] for name in ("hidden", "layers") if name in changed}
    policy = tiny_policy(tokenizer, **shape)
    save_model(policy, tokenizer, folder / "sft")
    RewardScorer(reward_model_from(policy), tokenizer).save(folder / "reward")
    prompts = changed.get("prompts", 512)
    setting = replace(Setting(), iterations=iterations + 1, prompts=prompts, minibatch=prompts // 4)
    world = Untrained(folder)
    sides = {"alignkit": Alignkit(world, setting), "shared trunk": Alignkit(world, setting, shared_trunk=True)}
    if bench.process is not None:
        sides["trl"] = TRL(bench.process, world, setting)
    taken = {name: [] for name in sides}
    for _ in range(iterations + 1):
        for name, side in sides.items():
            taken[name].append(side()["cpu"])
    for side in sides.values():
        side.close()
    return {"changed": changed, "parameters": sum(p.numel() for p in policy.parameters()),
            "seconds": {name: statistics.mean(each[1:]) for name, each in taken.items()}}


class Untrained:
    """What `Alignkit` and `TRL` need of a world, without its truth: for models that are not worth measuring."""

    seed = 0

    def __init__(self, folder: Path):
        self.folder, self.task, self.scorer = folder, desk_task(0), RewardScorer.load(folder / "reward")

    def policy(self):
        """A fresh copy of the policy, and its tokenizer."""
        return load_policy(self.folder / "sft")

