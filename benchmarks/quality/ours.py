"""alignkit's side: a world's models and exact truth, and a PPO run that says what each iteration took."""

import functools
import time
from pathlib import Path

import torch

from alignkit import exact
from alignkit.models.loading import load_policy
from alignkit.ppo import PPOState, ppo_iteration
from alignkit.reward import RewardScorer
from alignkit.storage import config_hash
from alignkit.task import desk_task
from benchmarks.quality.rules import PRICE, Setting
from experiments import sweep


class World:
    """A world's SFT policy and reward model, made as in the recorded sweep, and what is exact about held-out prompts.

    gold_best: gold of the exact optimum at PRICE, in SFT-sd above SFT.
    """

    def __init__(self, seed: int, folder: Path, size: sweep.Size = sweep.COURSE):
        self.seed, self.folder = seed, folder
        folder.mkdir(parents=True, exist_ok=True)
        key = {"code": "quality", "configs": [config_hash(sweep.COURSE.sft), config_hash(sweep.COURSE.reward)],
               "keys": sweep.COURSE.keys, "pairs": size.pairs}
        sweep.kept(folder / "models.json", key, lambda: sweep.make_world(seed, folder, size))
        self.task, self.scorer = desk_task(seed), RewardScorer.load(folder / "reward")
        policy, self.tokenizer = self.policy()
        prompts = sweep.some_prompts(self.task.world.heldout_prompts, size.keys, seed)
        self.truth = sweep.Truth(self.task, prompts, policy, self.tokenizer, self.scorer, folder / "cache")

    def policy(self):
        """A fresh copy of the SFT policy, and its tokenizer."""
        return load_policy(self.folder / "sft")

    @functools.cached_property
    def gold_best(self) -> float:
        best, _ = exact.optimum(self.truth.ref_logps, self.truth.proxy, PRICE)
        return self.truth.measure(best)["gold"]

    def measure(self, policy) -> dict[str, float]:
        """KL, share of the exact optimum at that KL (0 at the start), and gold, by enumeration."""
        seen = self.truth.measure(self.truth.enumerate(policy))
        share = exact.gap(seen["kl"], seen["proxy"], self.truth.frontier).share if seen["kl"] > 1e-6 else 0.0
        return {"kl": seen["kl"], "share": share, "gold": seen["gold"]}


class Alignkit:
    """A PPO run of alignkit: each call is an iteration and returns its seconds, CPU and wall."""

    def __init__(self, world: World, setting: Setting, **changes):
        self.config = setting.config(world.seed, **changes)
        self.policy, tokenizer = world.policy()
        self.state = PPOState.start(self.policy, tokenizer, world.scorer, sweep.strata(world.task), self.config)
        self.iterations = self.config.iterations
        self.samples = self.config.prompts_per_iteration * self.config.samples_per_prompt
        self.said: dict[str, float] = {}

    def __call__(self) -> dict[str, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        stats = ppo_iteration(self.state, self.config)
        seconds = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        self.said = {"steps": stats.steps, "kl": stats.kl_to_ref, "score": stats.score}
        return seconds

    def weights(self) -> torch.nn.Module:
        """The policy as it is now."""
        return self.policy

    def close(self) -> None:
        """Nothing is left open."""
