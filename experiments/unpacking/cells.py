"""The cells of the factorial data × algorithm × reward model × prompts: each is one policy, measured at a common KL.

All cells of a world start from the same SFT policy. DPO has neither a reward model nor prompts of its own, so a world
has one DPO policy for each data set and one PPO policy for each data set, reward model and mix of prompts. Each policy
is trained once. `brought_to` then moves its KL to the common value along π_ref^(1 − t) π^t, which is exact on the table
of all responses, so no cell is compared at another KL and none drops out.
"""

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from alignkit import exact
from alignkit.configs import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from alignkit.desk.tiny import tiny_reward_model
from alignkit.desk.world import KINDS, phrase_counts
from alignkit.dpo import dpo
from alignkit.evaluate.unpacking import DATA, DPO, MIXES, PPO, REWARDS, USUAL
from alignkit.forward.sampling import generate_texts
from alignkit.models.heads import reward_model_from, value_model_from
from alignkit.models.loading import load_policy, save_model
from alignkit.ppo import PPOState, ppo
from alignkit.ppo_state import Reward
from alignkit.reward import RewardScorer, train_reward_model
from alignkit.sft import train_sft
from alignkit.storage import plain
from alignkit.task import desk_task
from experiments.claims.lab import key_of
from experiments.claims.order import Measure
from experiments.sweep import Truth, kept, some_prompts, strata

LABELS = {  # data -> annotator, and whether it has few labels
    "overall": ("default", False),
    "multi-aspect": ("multi-aspect", False),
    "arena": ("arena", False),
    "few, expert": ("expert", True),
}
WEIGHTS = {  # how many of 4 or 8 strata are of each class
    "even": {kind: 1 for kind in KINDS},
    "targeted": {"benign": 1, "look-alike": 1, "ambiguous": 3, "risky": 3},
}
DOMAIN = ("ambiguous", "risky")  # the classes that the targeted mix aims at
LARGEST = 16.0  # the largest power to which a policy is raised
NEAR = 1e-4  # nats


@dataclass(frozen=True)
class Size:
    """How much of everything. few: labels of the data set that has few; every data set has the same number of optimiser
    steps. normalise: SFT responses that set the scale of a reward model's score. keys: held-out questions of each
    class, with all their paraphrases. small, small_rate: hidden size and learning rate of the small transformer, which
    has one layer and is new. n: of best-of-n, for `asked` held-out prompts of each class. kl: to SFT, of every cell,
    nats a response."""

    demonstrations: int = 4000
    labels: int = 1500
    few: int = 200
    normalise: int = 512
    keys: int = 2
    small: int = 32
    small_rate: float = 3e-3
    n: int = 16
    asked: int = 48
    kl: float = 0.8
    sft: SFTConfig = field(default_factory=SFTConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    ppo: PPOConfig = field(default_factory=lambda: PPOConfig(
        kl_coef=0.35, iterations=8, prompts_per_iteration=192, minibatch_size=48))
    dpo: DPOConfig = field(default_factory=lambda: DPOConfig(beta=0.2, epochs=3))

    def key(self) -> dict:
        """All settings as plain JSON types."""
        return key_of(self)


# ---- the same KL for all
def brought_to(kl: float, logps: Tensor, ref_logps: Tensor) -> tuple[Tensor, float]:
    """The policy ∝ π_ref^(1 − t) π^t with this mean KL to π_ref: its table (prompts, N), and t.

    logps, ref_logps: (prompts, N), of π and π_ref. t = 0 is π_ref, t = 1 is π, and the KL rises with t. If π is the
    optimum of a reward at price β, this is its optimum at price β / t. Raises ValueError if no t up to 16 reaches the
    KL. (decoding-time realignment, Liu et al. 2024)
    """
    ratio = logps - ref_logps

    def mixed(power: float) -> Tensor:
        table = ref_logps + power * ratio
        return table - table.logsumexp(1, keepdim=True)

    low, high, power = 0.0, math.inf, 1.0
    for _ in range(60):
        table = mixed(power)
        found = float(exact.response_kl(table, ref_logps).mean())
        if abs(found - kl) < NEAR:
            return table, power
        low, high = (power, high) if found < kl else (low, power)
        if low >= LARGEST:
            break
        slope = power * float(exact.variance(table, ratio).mean())  # d KL / d t
        newton = power + (kl - found) / slope if slope > 0 else math.inf
        power = newton if low < newton < high else (low + high) / 2 if high < math.inf else 2 * power
    raise ValueError(f"kl is {kl}, and no power of the policy up to {LARGEST:g} has it: the policy hardly differs from "
                     "its reference, or the KL is more than its best response has")


# ---- reward models
class BagOfPhrases:
    """A reward model that sees how often each phrase occurs and nothing else, not even the prompt: a weight a phrase.

    The weights (11,) maximise the Bradley–Terry likelihood of the pairs, with a penalty of `ridge` / 2 on their
    squares; Newton's method. The scores are shifted and scaled as `RewardScorer.normalised` does.
    """

    def __init__(self, pairs: Sequence[Mapping], ridge: float = 1.0):
        sides = [phrase_counts([row[side] for row in pairs]) for side in ("chosen", "rejected")]
        x = (sides[0] - sides[1]).astype(float)
        self.weights, self.mean, self.std = np.zeros(x.shape[1]), 0.0, 1.0
        for _ in range(20):
            losing = 1 / (1 + np.exp(x @ self.weights))
            slope = x.T @ losing - ridge * self.weights
            bend = (x * (losing * (1 - losing))[:, None]).T @ x + ridge * np.eye(x.shape[1])
            self.weights = self.weights + np.linalg.solve(bend, slope)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Scores (N,)."""
        return torch.from_numpy((phrase_counts(list(responses)) @ self.weights - self.mean) / self.std).float()

    def normalised(self, prompts: Sequence[str], responses: Sequence[str]) -> "BagOfPhrases":
        """Shift and scale the scores to mean 0 and standard deviation 1 on these responses."""
        scores = self(prompts, responses).double()
        self.mean, self.std = float(scores.mean()), float(scores.std())
        return self


# ---- a world
def recipes(data: str) -> list[tuple[str | None, str | None]]:
    """The reward models and mixes of prompts of a data set's policies; (None, None) is DPO."""
    usual = (USUAL["reward model"], USUAL["prompts"])
    return [(None, None), *(itertools.product(REWARDS, MIXES) if data == USUAL["data"] else [usual])]


class Ground:
    """One world: its SFT policy, its data sets, their reward models, and what is exact on held-out prompts.

    Models are kept in `folder` and made once.
    """

    def __init__(self, seed: int, folder: Path, size: Size, code: str = ""):
        torch.set_num_threads(1)
        self.seed, self.size, self.task = seed, size, desk_task(seed)
        self.folder, self.key = folder / f"world-{seed}", {"size": size.key(), "code": code}
        kept(self.folder / "sft.json", self.key, self._make_sft)
        self.sft, self.tokenizer = load_policy(self.folder / "sft")
        self._pairs: dict[str, list[dict]] = {}
        self._judges: dict[tuple[str, str], Reward] = {}

    def _make_sft(self) -> bool:
        policy, tokenizer = load_policy("tiny", seed=self.seed)
        train_sft(policy, tokenizer, self.task.demonstrations(self.size.demonstrations, seed=self.seed),
                  replace(self.size.sft, seed=self.seed))
        save_model(policy, tokenizer, self.folder / "sft")
        return True

    def pairs(self, data: str) -> list[dict]:
        """The labels of a data set; all data sets label the same pairs of responses, the few a part of them."""
        if data not in self._pairs:
            annotator, few = LABELS[data]
            rows = self.task.preference_pairs(self.sft, self.tokenizer, self.size.labels, seed=self.seed,
                                              annotator=annotator)
            self._pairs[data] = rows[: self.size.few] if few else rows
        return self._pairs[data]

    def longer(self, data: str) -> float:
        """How many times as many epochs a data set needs for the same number of steps as a full one."""
        return self.size.labels / len(self.pairs(data))

    def judge(self, data: str, reward: str) -> Reward:
        """A reward model of a data set, its scores normalised on SFT's responses."""
        if (data, reward) not in self._judges:
            self._judges[data, reward] = self._judge(data, reward)
        return self._judges[data, reward]

    def _judge(self, data: str, reward: str) -> Reward:
        if reward == "bag of phrases":
            return BagOfPhrases(self.pairs(data)).normalised(*self.typical)
        name = self.folder / f"judge-{data}-{reward}".replace(", ", "-").replace(" ", "-")

        def train() -> bool:
            config = replace(self.size.reward, seed=self.seed, epochs=self.size.reward.epochs * self.longer(data))
            if reward == "transformer":
                model = reward_model_from(self.sft, seed=self.seed)
            else:
                model = tiny_reward_model(self.tokenizer, hidden=self.size.small, layers=1, seed=self.seed)
                config = replace(config, learning_rate=self.size.small_rate)
            train_reward_model(model, self.tokenizer, self.pairs(data), config)
            RewardScorer(model, self.tokenizer).normalised(*self.typical).save(name)
            return True

        kept(name.with_suffix(".json"), self.key, train)
        return RewardScorer.load(name)

    @cached_property
    def typical(self) -> tuple[list[str], list[str]]:
        """Training prompts, equally many of each class, and a response of SFT to each."""
        rng = np.random.default_rng([self.seed, 1])
        asked = [texts[i] for texts in strata(self.task)
                 for i in rng.integers(len(texts), size=self.size.normalise // len(KINDS))]
        drawn = generate_texts(self.sft, self.tokenizer, asked, max_new_tokens=self.task.max_new_tokens,
                               seed=self.seed + 2)
        return asked, [texts[0] for texts in drawn]

    @cached_property
    def truth(self) -> Truth:
        """What is exact about SFT on the held-out prompts; its proxy is the small transformer's, which is cheap."""
        prompts = some_prompts(self.task.world.heldout_prompts, self.size.keys, self.seed)
        scorer = self.judge("overall", "small transformer")
        return Truth(self.task, prompts, self.sft, self.tokenizer, scorer, self.folder / "cache")

    @cached_property
    def measure(self) -> Measure:
        """The measurements of the claims lab, on the same prompts."""
        return Measure(self)

    @cached_property
    def aspects(self) -> dict[str, Tensor]:
        """Aspect of gold -> its table (prompts, N), in SFT-sd of gold; their sum is gold up to a constant."""
        counts, place = np.unique(exact.response_space().counts.numpy(), axis=0, return_inverse=True)
        rows = [self.task.world.gold_aspects(prompt, counts) for prompt in self.truth.prompts]
        return {name: torch.from_numpy(np.stack([row[name][place.reshape(-1)] for row in rows])).double()
                / self.truth.gold_scale[1] for name in rows[0]}

    def figures(self, logps: Tensor) -> dict[str, float]:
        """`order.Measure.figures` without its proxy, gold of each class and of the targeted ones, and the aspects."""
        found = self.measure.figures(logps, self.measure.behaviours(logps))
        gold = exact.expectation(logps, self.truth.gold).numpy()
        by_kind = {kind: float(gold[self.measure.kinds == kind].mean()) for kind in KINDS}
        return {**{name: value for name, value in found.items() if name != "proxy"},
                **{f"gold_{kind}": value for kind, value in by_kind.items()},
                "gold_domain": float(np.mean([by_kind[kind] for kind in DOMAIN])),
                **{name: float(exact.expectation(logps, table).mean()) for name, table in self.aspects.items()}}

    # ---- training
    def train(self, data: str, reward: str | None = None, mix: str | None = None) -> nn.Module:
        """A policy: DPO without a reward model, otherwise PPO on its score, on a mix of prompts."""
        policy, _ = load_policy(self.folder / "sft")
        if reward is None:
            config = replace(self.size.dpo, seed=self.seed, epochs=round(self.size.dpo.epochs * self.longer(data)))
            for _ in dpo(policy, self.tokenizer, self.pairs(data), config):
                pass
            return policy
        config = replace(self.size.ppo, seed=self.seed)
        classes = self.task.strata()
        prompts = [classes[kind] for kind, times in WEIGHTS[mix].items() for _ in range(times)]
        state = PPOState.start(policy, self.tokenizer, self.judge(data, reward), prompts, config,
                               critic=value_model_from(policy))  # the same critic, whatever the reward model
        for _ in ppo(state, config):
            pass
        return policy

    def cell(self, data: str, reward: str | None = None, mix: str | None = None) -> dict:
        """Train one cell and measure it at the common KL."""
        if reward is not None:
            self.judge(data, reward)  # its seconds are not the policy's
        begun = time.process_time()
        policy = self.train(data, reward, mix)
        seconds, truth = time.process_time() - begun, self.truth
        logps = truth.enumerate(policy)
        at, power = brought_to(self.size.kl, logps, truth.ref_logps)
        row = {"data": data, "algorithm": DPO if reward is None else PPO, "reward model": reward, "prompts": mix,
               "trained_kl": truth.measure(logps)["kl"], "power": power, "seconds": seconds, "at": self.figures(at)}
        if (data, reward, mix) == ("overall", "small transformer", "even"):
            proxy = truth.measure(at)["proxy"]
            row["share"] = exact.gap(self.size.kl, proxy, truth.frontier).share
        return row

    # ---- reward models by themselves
    @cached_property
    def candidates(self) -> tuple[list[str], list[str], np.ndarray]:
        """n responses of SFT to held-out prompts, equally many of each class, the classes one after the other: prompts,
        responses (both M · n), and gold in SFT-sd (M, n)."""
        rng = np.random.default_rng([self.seed, 4])
        asked = [texts[i] for texts in self.task.strata("heldout").values()
                 for i in rng.permutation(len(texts))[: self.size.asked]]
        drawn = generate_texts(self.sft, self.tokenizer, asked, max_new_tokens=self.task.max_new_tokens,
                               samples=self.size.n, seed=self.seed + 3)
        prompts = [prompt for prompt in asked for _ in range(self.size.n)]
        responses = [text for texts in drawn for text in texts]
        gold = self.task.world.gold_scores(prompts, responses).reshape(-1, self.size.n)
        return prompts, responses, gold / self.truth.gold_scale[1]

    def judged(self, data: str, reward: str) -> dict[str, float]:
        """accuracy: share of pairs of SFT's responses to held-out prompts that are ranked as gold ranks them;
        best_of_n: gold of the response with the highest score, minus the mean gold of SFT, SFT-sd."""
        prompts, responses, gold = self.candidates
        scores = np.asarray(self.judge(data, reward)(prompts, responses), dtype=float).reshape(gold.shape)
        pairs = gold[:, 0] != gold[:, 1]
        right = (scores[:, 0] > scores[:, 1]) == (gold[:, 0] > gold[:, 1])
        gain = gold[np.arange(len(gold)), scores.argmax(1)] - gold.mean(1)
        return {"accuracy": float(right[pairs].mean()), "best_of_n": float(gain.mean())}


def run_world(seed: int, folder: Path, size: Size, code: str) -> dict:
    """All cells of a world; each is kept in a file and not run again while size and code are the same."""
    ground = Ground(seed, folder, size, code)

    def keep(name: str, make) -> dict:
        path = ground.folder / f"{name.replace(', ', '-').replace(' ', '-')}.json"
        return kept(path, ground.key, lambda: plain(make()))

    cells = []
    for data in DATA:
        for reward, mix in recipes(data):
            name = f"cell {data} {f'{reward} {mix}' if reward else DPO}"
            row = keep(name, lambda data=data, reward=reward, mix=mix: ground.cell(data, reward, mix))
            cells.append(row)
            print(f"world {seed}  {name:<48} kl {row['trained_kl']:5.2f}  t {row['power']:5.2f}  "
                  f"gold {row['at']['gold']:6.3f}  share {row.get('share', float('nan')):.3f}", flush=True)
    rewards = {reward: keep(f"judged {reward}", lambda reward=reward: ground.judged(USUAL["data"], reward))
               for reward in REWARDS}
    start = keep("start", lambda: ground.figures(ground.truth.ref_logps))
    return {"world": seed, "start": start, "cells": cells, "rewards": rewards}
