"""What causes over-optimisation: biased annotators, noisy labels, or few pairs? (Gao, Schulman and Hilton 2022)

    python -m experiments.causes --worlds 0 1 2 --trainings 3

A factorial experiment, bias × noise, and two arms with another number of pairs. For each world one SFT policy, trained
as in the course. For each world and training new pairs of its responses, new draws of the labels and a new seed of the
reward model's training. All arms of a world and training share the pairs, the random numbers behind the labels, the
seed and the number of optimiser steps, so that they differ in nothing but the factor. The exact optimum of each reward
model's score is then followed from SFT outwards, and gold along it (SFT-sd, over SFT) is read: no policy is trained.

A reward model that is in runs/causes/ and was made with the same settings is not made again.
"""

import argparse
import functools
import itertools
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from alignkit import exact
from alignkit.configs import RewardConfig, SFTConfig
from alignkit.desk.world import ANNOTATORS, KINDS, Annotator
from alignkit.exact.causes import AT, FACTORS, FILE, Causes, load_causes, turn
from alignkit.forward.sampling import generate_texts
from alignkit.models.heads import reward_model_from
from alignkit.models.loading import load_policy, save_model
from alignkit.reward import RewardScorer, train_reward_model
from alignkit.runs.records import versions
from alignkit.storage import plain, write_atomically
from alignkit.task import desk_task
from experiments.sweep import kept, some_prompts, strata, train_sft_policy, write_compact

CLEAN = {"sharpness": 20.0, "flips": 0.0}  # a difference of 0.1 raw units decides 88 % of labels, one of 0.25 99 %
UNBIASED = {"politeness": 0.0, "length": 0.0}
GRID = tuple(np.arange(0, 7.01, 0.25).tolist())  # KL of the recorded curves, nats
CURVE = tuple(np.geomspace(20, 0.03, 40).tolist())  # β of the frontiers
TITLES = {"peak": "most gold", "peak_kl": "its KL, nats", "far": "gold at 6 nats", "fall": "fall up to 6 nats",
          "lost at 1": "gold lost at 1 nat", "lost at 2": "gold lost at 2 nats"}


@dataclass(frozen=True)
class Arm:
    """What the labels of a reward model are."""

    biased: bool
    noisy: bool
    share: float = 1.0  # of Size.pairs

    @property
    def annotator(self) -> Annotator:
        changes = {**({} if self.noisy else CLEAN), **({} if self.biased else UNBIASED)}
        return replace(ANNOTATORS["default"], **changes)


ARMS = {"bias and noise": Arm(True, True), "noise alone": Arm(False, True), "bias alone": Arm(True, False),
        "neither": Arm(False, False), "a quarter of the pairs": Arm(True, True, 0.25),
        "four times the pairs": Arm(True, True, 4.0)}


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    demonstrations: int = 8000
    pairs: int = 2000
    keys: int = 2  # held-out questions of each class, in one phrasing each
    sft: SFTConfig = field(default_factory=SFTConfig)
    reward: RewardConfig = field(default_factory=lambda: RewardConfig(epochs=4.0))


class Ground:
    """One world: its SFT policy, the held-out prompts, and the tables of SFT and gold over all responses to them."""

    def __init__(self, world: int, folder: Path, size: Size):
        self.task, self.size, self.seed = desk_task(world), size, world
        self.policy, self.tokenizer = self._sft(folder / f"world-{world}")
        prompts = some_prompts(self.task.world.heldout_prompts, size.keys, world)
        self.prompts = [prompt for place, prompt in enumerate(prompts) if prompt.template == place // 4 % 4]
        self.ref_logps = exact.response_logps(self.policy, self.tokenizer, self.prompts)
        self.gold = self.in_sft_sd(exact.gold_table(self.task.world, self.prompts, exact.response_space()))
        self.best = exact.frontier(self.ref_logps, self.gold, CURVE)

    def _sft(self, folder: Path):
        """The SFT policy of this world, trained as in notebook 01 the first time."""
        def train() -> bool:
            policy, tokenizer = train_sft_policy(self.task, self.size.demonstrations, self.size.sft, self.seed)
            save_model(policy, tokenizer, folder / "sft")
            return True

        kept(folder / "sft.json", plain({"demonstrations": self.size.demonstrations, "sft": self.size.sft}), train)
        return load_policy(folder / "sft")

    def in_sft_sd(self, table):
        """A table of rewards (prompts, N), shifted and scaled to mean 0 and standard deviation 1 under SFT."""
        table = table - exact.expectation(self.ref_logps, table).mean()
        return table / exact.expectation(self.ref_logps, table.square()).mean().sqrt()

    @functools.cache  # noqa: B019 (a handful of worlds, which live as long as the program)
    def responses(self, training: int, block: int) -> tuple[list[str], list[str], list[str]]:
        """A block of Size.pairs prompts, evenly over the classes, and two responses of SFT to each."""
        rng = np.random.default_rng([self.seed, training, block, 8])
        prompts = [texts[i] for texts in strata(self.task)
                   for i in rng.integers(len(texts), size=self.size.pairs // len(KINDS))]
        rng.shuffle(prompts)
        drawn = generate_texts(self.policy, self.tokenizer, prompts, max_new_tokens=self.task.max_new_tokens,
                               samples=2, seed=int(rng.integers(2**31)))
        first, second = map(list, zip(*drawn, strict=True))
        return prompts, first, second

    def labels(self, arm: Arm, training: int) -> list[dict]:
        """The preference pairs of an arm: rows prompt / chosen / rejected / probability."""
        n = int(self.size.pairs * arm.share)
        blocks = [self.responses(training, block) for block in range(math.ceil(arm.share))]
        columns = [list(itertools.chain(*parts))[:n] for parts in zip(*blocks, strict=True)]
        return self.task.world.preference_pairs(*columns, annotator=arm.annotator, seed=training)

    def judge(self, name: str, training: int) -> dict:
        """Train one reward model and follow the exact optimum of its score: the fields of `exact.causes.Judge`."""
        begun, rows = time.process_time(), self.labels(ARMS[name], training)
        model = reward_model_from(self.policy, seed=training)
        epochs = self.size.reward.epochs / ARMS[name].share  # the same number of steps for any number of pairs
        train_reward_model(model, self.tokenizer, rows, replace(self.size.reward, seed=training, epochs=epochs))
        scorer = RewardScorer(model, self.tokenizer)
        proxy = self.in_sft_sd(exact.proxy_table(scorer, self.prompts, exact.response_space()))
        curve = exact.frontier(self.ref_logps, proxy, CURVE, self.gold)
        gold, reward = (np.interp([*AT, *GRID], curve.kl, values) for values in (curve.other, curve.reward))
        most = self.best.reward_at(torch.tensor(AT)).numpy()
        figures = {**plain(turn(curve.kl, curve.other)), "proxy at 2": reward[AT.index(2.0)],
                   **{f"lost at {at:g}": most[place] - gold[place] for place, at in enumerate(AT)}}
        return plain({
            "arm": name, "world": self.seed, "training": training,
            "figures": {key: float(value) for key, value in figures.items()}, "labels": self.of_labels(rows),
            "gold": gold[len(AT):].tolist(), "proxy": reward[len(AT):].tolist(),
            "cpu_seconds": round(time.process_time() - begun, 1)})

    def of_labels(self, rows: list[dict]) -> dict[str, float]:
        """What is wrong with the labels: "turned" and "against gold", shares."""
        prompts = [row["prompt"] for row in rows]
        chosen, rejected = (self.task.world.gold_scores(prompts, [row[side] for row in rows])
                            for side in ("chosen", "rejected"))
        differs = np.abs(chosen - rejected) > 1e-9
        return {"turned": float(np.mean([row["probability"] < 0.5 for row in rows])),
                "against gold": float((chosen < rejected)[differs].mean())}


def run(worlds: list[int], trainings: int, folder: Path, size: Size, factorial: bool = False) -> dict:
    """Make what is not there yet; returns what goes into the file. factorial: the 2 × 2 alone."""
    grounds, judges = {world: Ground(world, folder, size) for world in worlds}, []
    arms = dict(list(ARMS.items())[:4]) if factorial else ARMS
    for training, name, world in [*itertools.product(range(trainings), list(arms)[:4], worlds),
                                  *itertools.product(range(trainings), list(arms)[4:], worlds)]:
        path = folder / f"world-{world}" / f"{name.replace(' ', '-')}-{training}.json"
        key = plain({"arm": ARMS[name], "annotator": ARMS[name].annotator, "size": size})
        judges.append(kept(path, key, functools.partial(grounds[world].judge, name, training)))
        shown = "  ".join(f"{figure} {value:5.2f}" for figure, value in judges[-1]["figures"].items())
        print(f"world {world} training {training} {name:<23} {shown}", flush=True)
    seconds = sum(judge.pop("cpu_seconds") for judge in judges)
    command = f"python -m experiments.causes --worlds {' '.join(map(str, worlds))} --trainings {trainings}"
    return plain({
        "command": command + " --factorial" * factorial, "versions": versions(), "cpu_seconds": round(seconds),
        "arms": {name: {"biased": arm.biased, "noisy": arm.noisy, "pairs": int(size.pairs * arm.share)}
                 for name, arm in arms.items()},
        "settings": {"size": size, "clean": CLEAN, "unbiased": UNBIASED, "default": ANNOTATORS["default"]},
        "kl": list(GRID), "judges": judges,
        "best": {str(world): ground.best.reward_at(torch.tensor(GRID)).tolist() for world, ground in grounds.items()}})


def table(causes: Causes) -> str:
    """docs/causes.md: the arms, and what each factor does, from the record."""
    prompts = causes.settings["size"]["keys"] * len(KINDS)
    repeats = f"{len(causes.worlds)} worlds × {len(causes.values('neither', 'peak')) // len(causes.worlds)} trainings"
    lines = [f"<!-- made by: {causes.command} -->",
             f"Means over {repeats}, in SFT-sd over SFT, along the exact optimum of each reward model's score on "
             f"{prompts} held-out\nprompts. *Turned*: labels that are not the annotator's likelier choice. *Against "
             "gold*: labels that prefer the\nresponse with less gold.", "",
             f"| labels | pairs | turned | against gold | {' | '.join(TITLES.values())} |",
             "|---" * (len(TITLES) + 4) + "|"]
    for name, arm in causes.arms.items():
        shares = [f"{100 * np.mean([judge.labels[key] for judge in causes.select(name)]):.1f} %"
                  for key in ("turned", "against gold")]
        cells = [f"{causes.values(name, key).mean():.2f}" for key in TITLES]
        lines.append(f"| {' | '.join([name, format(arm['pairs'], ','), *shares, *cells])} |")
    lines += ["", "What a factor does: with it − without it, mean and 95 % interval for these worlds; the trainings in "
              "each world are the repeats, so that nothing is said of other worlds.", "",
              f"| effect of | {' | '.join(TITLES.values())} |", "|---" * (len(TITLES) + 1) + "|"]
    for factor in FACTORS:
        lines.append(f"| {factor} | {' | '.join(f'{causes.effect(factor, key):+.2f}' for key in TITLES)} |")
    for name in list(causes.arms)[4:]:
        changes = (causes.mean(causes.values(name, key) - causes.values("bias and noise", key)) for key in TITLES)
        lines.append(f"| {name} | {' | '.join(f'{change:+.2f}' for change in changes)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Run the arms, print the table, write the record and the table."""
    parser = argparse.ArgumentParser(prog="python -m experiments.causes", description=__doc__.split("\n")[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trainings", type=int, default=3)
    parser.add_argument("--factorial", action="store_true", help="the 2 × 2 alone, without the arms of other pairs")
    parser.add_argument("--out", type=Path, default=Path("runs/causes"), help="where finished reward models are kept")
    parser.add_argument("--json", type=Path, default=FILE)
    parser.add_argument("--table", type=Path, default=Path("docs/causes.md"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    write_compact(given.json, run(given.worlds, given.trainings, given.out, Size(), given.factorial))
    given.table.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(given.table, table(load_causes(given.json)))
    print(given.table.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
