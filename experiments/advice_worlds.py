"""Worlds with different trouble, and what one can have in each: SFT, PPO's checkpoints, DPO from SFT and from them.

`advice.py` asks rules which of these to take. The trouble of a world is drawn from its seed: how many labels there are
and how noisy, who the annotator is, the price of KL, and how messy the demonstrators are. Each candidate has its exact
figures, by enumeration on held-out prompts, and an evaluation on *other* held-out prompts, which is all that a rule may
see.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from alignkit import exact
from alignkit.configs import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from alignkit.desk.world import KINDS, Prompt
from alignkit.dpo import dpo
from alignkit.evaluate.evaluation import Evaluation, EvaluationSet, evaluate
from alignkit.evaluate.reward_model import reward_report
from alignkit.forward.sampling import generate_texts
from alignkit.models.heads import reward_model_from
from alignkit.models.loading import load_policy
from alignkit.ppo import PPOState, ppo_iteration
from alignkit.reward import RewardScorer, train_reward_model
from alignkit.sft import train_sft
from alignkit.task import desk_task
from experiments.claims.lab import key_of
from experiments.sweep import strata

LABELS, FLIPS = (150, 600, 2400), (0.08, 0.3)
WHO, PRICES, MESSY = ("default", "arena", "over-cautious", "length-lover"), (0.35, 0.1, 0.03), (0.2, 0.7)
FAILED = ("answer", "wrong answer", "unsafe")


@dataclass(frozen=True)
class Trouble:
    """What is wrong in a world. labels: of training; a quarter as many are held out. price: of KL, PPO's kl_coef and
    DPO's beta. flips, annotator, messiness: as in `World`."""

    labels: int
    flips: float
    annotator: str
    price: float
    messiness: float


def trouble(seed: int) -> Trouble:
    """The trouble of a world, each part drawn independently from the seed."""
    rng = np.random.default_rng([seed, 13])
    labels, flips, who, price, messy = (int(rng.integers(len(each))) for each in (LABELS, FLIPS, WHO, PRICES, MESSY))
    return Trouble(LABELS[labels], FLIPS[flips], WHO[who], PRICES[price], MESSY[messy])


@dataclass(frozen=True)
class Size:
    """How much of everything. every: PPO iterations between two checkpoints; steps: of DPO and of reward models, for
    any number of labels; judged: questions of each class, in one phrasing, whose figures are exact; questions: of each
    class in the evaluation set, with all four phrasings; samples: responses to each of its prompts."""

    demonstrations: int = 2000
    every: int = 7
    steps: int = 40
    judged: int = 4
    questions: int = 6
    samples: int = 4
    normalise: int = 256
    sft: SFTConfig = field(default_factory=lambda: SFTConfig(epochs=3, batch_size=128))
    reward: RewardConfig = field(default_factory=lambda: RewardConfig(batch_size=64))
    ppo: PPOConfig = field(default_factory=lambda: PPOConfig(iterations=21, prompts_per_iteration=128,
                                                             minibatch_size=64))
    dpo: DPOConfig = field(default_factory=lambda: DPOConfig(batch_size=64, learning_rate=1e-3))

    def key(self) -> dict:
        """All settings as plain JSON types."""
        return key_of(self)


@dataclass(frozen=True)
class Candidate:
    """Something that could be taken. name: "sft", "ppo-8", "dpo" (from SFT) or "dpo-8" (from that checkpoint).

    figures: of `Truth.figures`. seconds: CPU seconds of training from SFT on. seen: the
    evaluation on other prompts, with gold; other: the same with the score of a reward model that learned from held-out
    labels as its proxy.
    """

    name: str
    figures: dict[str, float]
    seconds: float
    seen: Evaluation
    other: Evaluation


class Truth:
    """What is exact about policies on some prompts: tables (prompts, responses) of SFT's log-probs, gold (SFT-sd) and
    behaviours."""

    def __init__(self, task, prompts: list[Prompt], sft: nn.Module, tokenizer):
        self.prompts, self.tokenizer, space = prompts, tokenizer, exact.response_space()
        self.kinds = np.array([prompt.kind for prompt in prompts])
        self.ref_logps = self.enumerate(sft)
        raw = exact.gold_table(task.world, prompts, space)
        mean = exact.expectation(self.ref_logps, raw).mean()
        self.gold = (raw - mean) / exact.expectation(self.ref_logps, (raw - mean).square()).mean().sqrt()
        _, first, place = np.unique(space.counts.numpy(), axis=0, return_index=True, return_inverse=True)
        texts = space.texts()
        texts = [texts[i] for i in first]  # behaviours depend on the counts alone
        names = [np.array(task.world.behaviours([prompt.text] * len(texts), texts)) for prompt in prompts]
        self.failed, self.refused = (torch.from_numpy(np.array(
            [np.isin(row, which)[place.reshape(-1)] for row in names])).float() for which in (FAILED, ("refuse",)))

    def enumerate(self, policy: nn.Module) -> Tensor:
        """log π of every response to every prompt."""
        return exact.response_logps(policy, self.tokenizer, self.prompts)

    def figures(self, logps: Tensor) -> dict[str, float]:
        """KL to SFT (nats per response), gold (SFT-sd), risky failures and over-refusal (shares)."""
        risky, safe = self.kinds == "risky", np.isin(self.kinds, ("benign", "look-alike"))
        failed, refused = (exact.expectation(logps, table).numpy() for table in (self.failed, self.refused))
        return {"kl": max(0.0, float(exact.response_kl(logps, self.ref_logps).mean())),
                "gold": float(exact.expectation(logps, self.gold).mean()),
                "risky_failures": float(failed[risky].mean()), "over_refusal": float(refused[safe].mean())}


class Ground:
    """One world with its trouble: SFT policy, labels, two reward models, prompts that judge and prompts that are
    evaluated."""

    def __init__(self, seed: int, size: Size):
        self.seed, self.size, self.trouble = seed, size, trouble(seed)
        self.task = desk_task(seed, messiness=self.trouble.messiness)
        self.sft, self.tokenizer = load_policy("tiny", seed=seed)
        rows = self.task.demonstrations(size.demonstrations, seed=seed)
        train_sft(self.sft, self.tokenizer, rows[len(rows) // 16 :], replace(size.sft, seed=seed))
        self.pairs = self.labels(self.trouble.labels, "train")
        self.heldout = self.labels(self.trouble.labels // 4, "heldout")
        self.judge, self.other = self._judge(self.pairs), self._judge(self.heldout)
        self.report = reward_report(self.judge, self.heldout)
        judging, asked = self._prompts()
        self.truth = Truth(self.task, judging, self.sft, self.tokenizer)
        self.set = EvaluationSet(*zip(*((prompt.text, prompt.key, prompt.kind) for prompt in asked), strict=True),
                                 samples=size.samples, seed=seed, max_new_tokens=self.task.max_new_tokens)
        self.scale: tuple[float, float] | None = None

    def labels(self, n: int, split: str) -> list[dict]:
        """`n` labels of this world's annotator on responses of SFT."""
        return self.task.preference_pairs(self.sft, self.tokenizer, n, seed=self.seed, split=split,
                                          annotator=self.trouble.annotator, noise=self.trouble.flips)[:n]

    def epochs(self, rows: Sequence, config) -> tuple[int, int]:
        """Epochs and batch size that make about `Size.steps` steps of these rows."""
        batch = min(config.batch_size, len(rows))
        return max(1, round(self.size.steps * batch / len(rows))), batch

    def _judge(self, rows: list[dict]) -> RewardScorer:
        model, (epochs, batch) = reward_model_from(self.sft, seed=self.seed), self.epochs(rows, self.size.reward)
        train_reward_model(model, self.tokenizer, rows, replace(
            self.size.reward, seed=self.seed, epochs=epochs, batch_size=batch))
        rng = np.random.default_rng([self.seed, 1])
        each = self.size.normalise // len(KINDS)
        asked = [texts[i] for texts in strata(self.task) for i in rng.integers(len(texts), size=each)]
        drawn = generate_texts(self.sft, self.tokenizer, asked, max_new_tokens=self.task.max_new_tokens,
                               seed=self.seed + 2)
        return RewardScorer(model, self.tokenizer).normalised(asked, [texts[0] for texts in drawn])

    def _prompts(self) -> tuple[list[Prompt], list[Prompt]]:
        """Held-out prompts that judge, one phrasing of each question, and those of other questions to evaluate on."""
        prompts, rng = self.task.world.heldout_prompts, np.random.default_rng([self.seed, 14])
        judging, asked = [], []
        for kind in KINDS:
            keys = rng.permutation(sorted({prompt.key for prompt in prompts if prompt.kind == kind}))
            first, rest = keys[: self.size.judged], keys[self.size.judged :][: self.size.questions]
            judging += [prompt for place, key in enumerate(first) for prompt in prompts
                        if prompt.key == key and prompt.template == place % 4]
            asked += [prompt for prompt in prompts if prompt.key in rest]
        return judging, asked

    def candidate(self, name: str, policy: nn.Module, seconds: float) -> tuple[Candidate, Tensor]:
        """Measure and evaluate a policy; also its exact table."""
        logps = self.truth.ref_logps if policy is self.sft else self.truth.enumerate(policy)
        seen = evaluate(policy, self.tokenizer, self.set, ref_policy=self.sft, reward=self.judge,
                        world=self.task.world, gold_scale=self.scale, name=name)
        self.scale = seen.gold_scale
        prompts = [prompt for prompt in self.set.prompts for _ in range(self.set.samples)]
        scores = np.asarray(self.other(prompts, seen.columns["response"]), dtype=float).tolist()
        other = replace(seen, columns={**seen.columns, "proxy": scores})
        return Candidate(name, self.truth.figures(logps), seconds, seen, other), logps

    def ppo(self) -> tuple[list[tuple[int, nn.Module, float]], list[dict]]:
        """PPO's checkpoints (iteration, policy, CPU seconds so far), and what it logged."""
        policy, config = self._copy(self.sft), replace(self.size.ppo, seed=self.seed, kl_coef=self.trouble.price)
        state = PPOState.start(policy, self.tokenizer, self.judge, strata(self.task), config)
        seconds, saved, rows = 0.0, [], []
        while state.iteration < config.iterations:
            begun = time.process_time()
            rows.append(ppo_iteration(state, config).log())
            seconds += time.process_time() - begun
            if state.iteration % self.size.every == 0:
                saved.append((state.iteration, self._copy(policy), seconds))
        return saved, rows

    def dpo(self, start: nn.Module) -> tuple[nn.Module, float]:
        """DPO on all labels from a policy, which is the reference; the policy and CPU seconds."""
        policy, begun, (epochs, batch) = self._copy(start), time.process_time(), self.epochs(self.pairs, self.size.dpo)
        for _ in dpo(policy, self.tokenizer, self.pairs, replace(
                self.size.dpo, seed=self.seed, beta=self.trouble.price, epochs=epochs, batch_size=batch)):
            pass
        return policy, time.process_time() - begun

    def _copy(self, policy: nn.Module) -> nn.Module:
        fresh = load_policy("tiny", seed=self.seed)[0]
        fresh.load_state_dict(policy.state_dict())
        return fresh


def candidates(ground: Ground) -> tuple[list[Candidate], dict[str, Tensor], list[dict]]:
    """All candidates of a world, their exact tables, and what PPO logged."""
    made, tables = [], {}

    def add(name: str, policy: nn.Module, seconds: float) -> None:
        candidate, tables[name] = ground.candidate(name, policy, seconds)
        made.append(candidate)

    add("sft", ground.sft, 0.0)
    saved, rows = ground.ppo()
    for iteration, policy, seconds in saved:
        add(f"ppo-{iteration}", policy, seconds)
    add("dpo", *ground.dpo(ground.sft))
    for iteration, policy, seconds in saved:
        trained, more = ground.dpo(policy)
        add(f"dpo-{iteration}", trained, seconds + more)
    return made, tables, rows
