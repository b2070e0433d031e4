"""Which faults of a run does alignkit notice, when, and which ones does nothing catch? The failure museum.

    python -m experiments.failures            # makes alignkit/evaluate/failures.json

One desk world, one SFT policy, one reward model. Each fault changes a healthy run in exactly one way. Every check of
alignkit is asked in every run. A check that would stop the run is recorded and the run goes on, so that one can see
what would have happened. Two more healthy runs, with other seeds, show what chance alone does to the figures. Faults
that alignkit refuses in any case are recorded as refusals, with the words that it said.
"""

import argparse
import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn

from alignkit import ppo as training
from alignkit.configs import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from alignkit.desk.tiny import phrase_ids
from alignkit.desk.world import ANNOTATORS
from alignkit.dpo import DPOState, check_first_step, dpo_iteration
from alignkit.errors import AlignkitError, InvariantError, NonFinite
from alignkit.evaluate.adviser import advice, chance_warning
from alignkit.evaluate.comparison import Comparison
from alignkit.evaluate.evaluation import Evaluation, evaluate, evaluation_set
from alignkit.evaluate.failures import FILE, GOLD, load_failures
from alignkit.evaluate.reward_model import reward_report
from alignkit.forward import sampling
from alignkit.models.heads import reward_model_from
from alignkit.models.loading import load_policy
from alignkit.ppo import PPOState, ppo_iteration, ran_away
from alignkit.ppo_state import Reward
from alignkit.reward import RewardScorer, train_reward_model
from alignkit.runs.records import versions
from alignkit.storage import plain, settings
from alignkit.task import desk_task
from experiments.sweep import Size as WorldSize
from experiments.sweep import Truth, kept, make_world, scorer_in_sft_sd, some_prompts, strata, write_compact

QUIET = "Nothing here asks for more training"  # how `advice` begins when it has nothing to say
RULES = ("Risky failures", "Over-refusal grew", "is over-optimised", "The proxy of", "Entropy fell",
         "there is no gold reward", "end by themselves", "Paraphrases of one question")  # words of advice, one a rule
GOLD_COLUMNS = ("gold", "behaviour", "phrases")


@dataclass(frozen=True)
class Size:
    """How much of everything. few: labels of the reward model that has too few; looks: iterations, or shares of DPO's
    steps, at which a run is evaluated; heldout: pairs on which reward models are judged."""

    world: WorldSize = field(default_factory=lambda: WorldSize(
        demonstrations=4000, pairs=3000, normalise=512, keys=1, sft=SFTConfig(epochs=4), reward=RewardConfig(epochs=4)))
    few: int = 50
    heldout: int = 1000
    prompts: int = 96
    looks: tuple[float, ...] = (0.5, 1.0)
    ppo: PPOConfig = field(default_factory=lambda: PPOConfig(
        iterations=20, prompts_per_iteration=192, minibatch_size=64, kl_coef=0.35))
    dpo: DPOConfig = field(default_factory=lambda: DPOConfig(beta=0.5, epochs=2))

    def key(self) -> dict:
        """All settings that matter, as plain JSON types."""
        world = {name: getattr(self.world, name) for name in ("demonstrations", "pairs", "normalise", "keys")}
        own = {name: getattr(self, name) for name in ("few", "heldout", "prompts", "looks")}
        configs = {"sft": self.world.sft, "reward": self.world.reward, "ppo": self.ppo, "dpo": self.dpo}
        return plain({"world": world, **own, **{name: settings(config) for name, config in configs.items()}})


class Ground:
    """The world that all runs start from, and what they are measured with."""

    def __init__(self, folder: Path, size: Size, seed: int = 0):
        self.size, self.seed, self.task, self.folder = size, seed, desk_task(seed), folder
        of_world = {name: value for name, value in size.key().items() if name in ("world", "sft", "reward")}
        key = {"seed": seed, **of_world}
        kept(folder / "world.json", key, lambda: make_world(seed, folder, size.world) or {})
        self.sft, self.tokenizer = load_policy(folder / "sft")
        self.judge = RewardScorer.load(folder / "reward")
        self.pairs = self.task.preference_pairs(self.sft, self.tokenizer, size.world.pairs, seed=seed)
        self.heldout = self.task.preference_pairs(self.sft, self.tokenizer, size.heldout, seed=seed, split="heldout")
        prompts = some_prompts(self.task.world.heldout_prompts, size.world.keys, seed)
        self.truth = Truth(self.task, prompts, self.sft, self.tokenizer, self.judge, folder / "cache")
        self.set = evaluation_set(self.task, size.prompts, seed=seed)

    def policy(self) -> nn.Module:
        """A copy of the SFT policy to train."""
        return load_policy(self.folder / "sft")[0]

    def judge_from(self, rows: list[dict]) -> RewardScorer:
        """A reward model like the healthy one, from other labels: as many optimiser steps, normalised alike."""
        model, config = reward_model_from(self.sft, seed=self.seed), self.size.world.reward
        epochs = config.epochs * self.size.world.pairs / len(rows)
        train_reward_model(model, self.tokenizer, rows, replace(
            config, seed=self.seed, epochs=epochs, batch_size=min(config.batch_size, len(rows))))
        return self.normalised(model)

    def normalised(self, model: nn.Module) -> RewardScorer:
        """The model as a scorer with mean 0 and standard deviation 1 on responses of SFT."""
        return scorer_in_sft_sd(model, self.sft, self.tokenizer, self.task, self.size.world.normalise, self.seed)

    def labels(self, **annotator: float) -> list[dict]:
        """The healthy reward model's pairs, labelled by a changed annotator."""
        columns = [[row[key] for row in self.pairs] for key in ("prompt", "chosen", "rejected")]
        changed = replace(ANNOTATORS["default"], **annotator)
        return self.task.world.preference_pairs(*columns, annotator=changed, seed=self.seed)


# ---- healthy plans, and the faults: each changes a plan in one way
@dataclass(frozen=True)
class PPOPlan:
    """What a PPO run is made of. around: what is replaced in the code during an iteration; prepare: what is done to the
    state before the first."""

    config: PPOConfig
    reward: Reward
    prompts: list[list[str]]
    ref_policy: nn.Module | None = None
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    prepare: Callable[[PPOState], None] = lambda state: None


@dataclass(frozen=True)
class DPOPlan:
    """What a DPO run is made of."""

    config: DPOConfig
    pairs: list[dict]
    ref_policy: nn.Module | None = None


def healthy_ppo(ground: Ground, seed: int = 0) -> PPOPlan:
    """PPO as it should be."""
    return PPOPlan(replace(ground.size.ppo, seed=seed), ground.judge, strata(ground.task))


def healthy_dpo(ground: Ground, seed: int = 0) -> DPOPlan:
    """DPO as it should be."""
    return DPOPlan(replace(ground.size.dpo, seed=seed), ground.pairs)


def no_price(plan: PPOPlan, ground: Ground) -> PPOPlan:
    """The price of KL is 0."""
    return replace(plan, config=replace(plan.config, kl_coef=0.0))


def dear(plan: PPOPlan, ground: Ground) -> PPOPlan:
    """The price of KL is a hundred times what it should be."""
    return replace(plan, config=replace(plan.config, kl_coef=100 * plan.config.kl_coef))


def fast(plan: PPOPlan, ground: Ground) -> PPOPlan:
    """The policy's learning rate is ten times what it should be."""
    return replace(plan, config=replace(plan.config, learning_rate=10 * plan.config.learning_rate))


def idle_critic(plan: PPOPlan, ground: Ground) -> PPOPlan:
    """The critic does not learn: its learning rate is 0."""
    return replace(plan, config=replace(plan.config, critic_learning_rate=0.0))


def few_labels(plan: PPOPlan, ground: Ground) -> PPOPlan:
    """The reward model learned from 50 labels, in as many steps."""
    return replace(plan, reward=ground.judge_from(ground.pairs[: ground.size.few]))


def long_labels(plan: PPOPlan, ground: Ground) -> PPOPlan:
    """The annotator of the reward model's labels prefers the longer response."""
    return replace(plan, reward=ground.judge_from(ground.labels(length=1.5)))


def chance_labels(plan: PPOPlan, ground: Ground) -> PPOPlan:
    """The labels of the reward model were shuffled: which response is the chosen one is a coin's decision."""
    swap = np.random.default_rng([ground.seed, 9]).random(len(ground.pairs)) < 0.5
    rows = [swapped(row) if change else row for row, change in zip(ground.pairs, swap, strict=True)]
    return replace(plan, reward=ground.judge_from(rows))


def foreign_tokens(plan: PPOPlan, ground: Ground) -> PPOPlan:
    """The reward model was trained with a vocabulary in another order, and is given the policy's ids."""
    model = copy.deepcopy(ground.judge.model)
    ids, table = phrase_ids(ground.tokenizer), model.model.embed_tokens.weight.data
    table[ids] = table[np.roll(ids, 4).tolist()].clone()
    return replace(plan, reward=ground.normalised(model))


def untrained_reference(plan: PPOPlan, ground: Ground) -> PPOPlan:
    """The reference is not the SFT policy but an untrained model."""
    return replace(plan, ref_policy=load_policy("tiny", seed=ground.seed + 1)[0].requires_grad_(False))


def top_k(plan: PPOPlan, ground: Ground, k: int = 2) -> PPOPlan:
    """The sampler draws from the two likeliest tokens, and the trainer scores with the whole softmax."""
    whole = sampling._inverse_cdf

    def truncated(logits, uniform):
        least = logits.topk(k).values[:, -1:]
        return whole(logits.masked_fill(logits < least, -1e9), uniform)

    return replace(plan, around=lambda: mock.patch.object(sampling, "_inverse_cdf", truncated))


def dropout(plan: PPOPlan, ground: Ground) -> PPOPlan:
    """The policy's dropout (0.1) was left on, in sampling and in training."""
    def leave_on(state: PPOState) -> None:
        for module in state.policy.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
        state.policy.train()

    return replace(plan, prepare=leave_on)


def a_bonus_for_length(plan: PPOPlan, ground: Ground) -> PPOPlan:
    """The score has a bonus for each sentence, and a response that never ends has no penalty."""
    def longer_is_better(prompts: list[str], responses: list[str]):
        return plan.reward(prompts, responses) + torch.tensor([0.8 * text.count(".") for text in responses])

    return replace(plan, reward=longer_is_better)


def wrong_sign(plan: PPOPlan, ground: Ground) -> PPOPlan:
    """The sign of the advantage is wrong in the policy's loss."""
    right = training.policy_loss

    def turned(logprobs, old_logprobs, advantages, clip_range):
        return right(logprobs, old_logprobs, -advantages, clip_range)

    return replace(plan, around=lambda: mock.patch.object(training, "policy_loss", turned))


def raw_scale(plan: PPOPlan, ground: Ground) -> PPOPlan:
    """The scores were not normalised: they are twenty times as large, and the price of KL is the same."""
    return replace(plan, reward=RewardScorer(plan.reward.model, plan.reward.tokenizer, plan.reward.mean,
                                             plan.reward.std / 20))


def one_class(plan: PPOPlan, ground: Ground) -> PPOPlan:
    """The prompts of the rollouts are risky ones alone."""
    return replace(plan, prompts=[ground.task.strata()["risky"]])


def swapped_pairs(plan: DPOPlan, ground: Ground) -> DPOPlan:
    """The columns chosen and rejected were swapped."""
    return replace(plan, pairs=[swapped(row) for row in plan.pairs])


def another_start(plan: DPOPlan, ground: Ground) -> DPOPlan:
    """The reference is not the policy that training starts from but an untrained model."""
    return replace(plan, ref_policy=load_policy("tiny", seed=ground.seed + 1)[0].requires_grad_(False))


def no_beta(plan: DPOPlan, ground: Ground) -> DPOPlan:
    """The price of KL, β, is a hundredth of what it should be."""
    return replace(plan, config=replace(plan.config, beta=plan.config.beta / 100))


def swapped(row: dict) -> dict:
    """A preference pair with the other response chosen."""
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


@dataclass(frozen=True)
class Fault:
    """A room of the museum: the letter that names it, what breaks the run, and the statistic that shows it best (a
    logged one, or "gold" where no logged one tells)."""

    letter: str
    breaks: Callable
    statistic: str
    side: str

    @property
    def method(self) -> str:
        return "dpo" if self.breaks in (swapped_pairs, another_start, no_beta) else "ppo"


FAULTS = {
    "no price of KL": Fault("D", no_price, "objective/kl", "above"),
    "price of KL × 100": Fault("M", dear, "objective/kl", "below"),
    "learning rate × 10": Fault("A", fast, "policy/clipfrac_avg", "above"),
    "a critic that does not learn": Fault("H", idle_critic, "val/explained_variance", "below"),
    "50 labels": Fault("J", few_labels, "gold", "below"),
    "labels that like length": Fault("F", long_labels, "objective/length", "above"),
    "labels of a coin": Fault("C", chance_labels, "gold", "below"),
    "a reward model of another tokenizer": Fault("L", foreign_tokens, "gold", "below"),
    "an untrained reference": Fault("B", untrained_reference, "objective/kl", "above"),
    "a top-k sampler": Fault("K", top_k, "objective/kl_k3", "below"),
    "dropout left on": Fault("E", dropout, "val/ratio_first", "above"),
    "a bonus for each sentence": Fault("N", a_bonus_for_length, "val/eos_rate", "below"),
    "the advantage's sign": Fault("G", wrong_sign, "objective/scores", "below"),
    "scores not normalised": Fault("I", raw_scale, "objective/kl", "above"),
    "prompts of one class": Fault("O", one_class, "gold", "below"),
    "chosen and rejected swapped": Fault("P", swapped_pairs, "gold", "below"),
    "a DPO reference that is not the start": Fault("Q", another_start, "logps/chosen_shift", "above"),
    "β ÷ 100": Fault("R", no_beta, "logps/rejected_shift", "below"),
}
HEALTHY = {"healthy": ("ppo", 0), "healthy, seed 1": ("ppo", 1), "healthy, seed 2": ("ppo", 2),
           "healthy DPO": ("dpo", 0), "healthy DPO, seed 1": ("dpo", 1)}


# ---- checks
class Listener:
    """What the checks said about one run: name -> {"iteration", "says", "made"}; the first words of each are kept."""

    def __init__(self, *names: str):
        self.heard = {name: {"iteration": None, "says": "", "made": True} for name in names}

    def hear(self, name: str, iteration: int, says: str) -> None:
        """Keep what a check said, if it said something and for the first time."""
        if says and not self.heard[name]["says"]:
            self.heard[name] |= {"iteration": iteration, "says": says}

    @contextlib.contextmanager
    def instead_of_stopping(self, state: PPOState) -> Iterator[None]:
        """Inside the block PPO's invariants are checked as ever, but what they say is kept and the run goes on."""
        with contextlib.ExitStack() as stack:
            for function, name in (("check_first_rollout", "step 0"), ("check_sampler", "each iteration"),
                                   ("check_reward_ids", "reward ids")):
                listening = self._listening(getattr(training, function), name, state)
                stack.enter_context(mock.patch.object(training, function, listening))
            yield

    def _listening(self, check: Callable, name: str, state: PPOState) -> Callable:
        def asked(*arguments, **options) -> None:
            try:
                check(*arguments, **options)
            except InvariantError as error:
                self.hear(name, state.iteration, str(error))

        return asked

    def record(self) -> list[dict]:
        """The checks as the record has them."""
        return [{"name": name, **said} for name, said in self.heard.items()]


class Watch:
    """The measurements of a run: what is exact, and the evaluations that `advice` is asked about at its end.

    In the middle of a healthy run there is still much to do, and `advice` says so: that is no alarm.
    """

    def __init__(self, ground: Ground, listener: Listener, reward: Reward):
        self.ground, self.listener, self.reward = ground, listener, reward
        self.steps, self.points, self.seen = [], [], {}
        self.look(ground.sft, 0, "sft")

    def look(self, policy: nn.Module, step: int, name: str) -> None:
        """Measure a policy exactly and evaluate it."""
        ground, training_mode = self.ground, policy.training
        policy.eval()
        self.steps.append(step)
        logps = ground.truth.enumerate(policy) if step else ground.truth.ref_logps
        self.points.append(ground.truth.measure(logps))
        scale = self.seen["sft"].gold_scale if self.seen else None
        self.seen[name] = evaluate(policy, ground.tokenizer, ground.set, ref_policy=ground.sft, reward=self.reward,
                                   world=ground.task.world, gold_scale=scale, name=name)
        policy.train(training_mode)

    def end(self) -> dict[str, list[float]]:
        """Ask for advice about the run as it ended; the exact figures as columns."""
        plain_seen = {name: without_gold(each) for name, each in self.seen.items()}
        for check, evaluations in (("advice", plain_seen), (GOLD, self.seen)):
            said = [each for each in advice(Comparison(evaluations)) if not each.startswith(QUIET)]
            self.listener.hear(check, self.steps[-1], "\n".join(said))
        return {"step": self.steps, **{name: [point[name] for point in self.points] for name in self.points[0]}}


def without_gold(evaluation: Evaluation) -> Evaluation:
    """The same responses, as they look where nobody knows the true reward."""
    columns = {name: values for name, values in evaluation.columns.items() if name not in GOLD_COLUMNS}
    return Evaluation(evaluation.set, columns, None, evaluation.name)


# ---- runs
def run_ppo(plan: PPOPlan, ground: Ground) -> dict:
    """Train by a plan to its end, whatever the checks say."""
    policy = ground.policy()
    state = PPOState.start(policy, ground.tokenizer, plan.reward, plan.prompts, plan.config, ref_policy=plan.ref_policy)
    plan.prepare(state)
    listener = Listener("chance warning", "reward ids", "step 0", "each iteration", "not finite", "max_kl", "advice",
                        GOLD)
    listener.hear("chance warning", 0, chance_warning(plain(reward_report(plan.reward, ground.heldout))))
    watch, rows = Watch(ground, listener, plan.reward), []
    looks = looks_of(ground.size, plan.config.iterations)
    while state.iteration < plan.config.iterations:
        try:
            with plan.around(), listener.instead_of_stopping(state):
                stats = ppo_iteration(state, plan.config)
        except NonFinite as error:
            listener.hear("not finite", state.iteration + 1, str(error))
            break
        rows.append(stats.log())
        listener.hear("max_kl", stats.iteration, ran_away(stats, plan.config))
        if stats.iteration in looks:
            watch.look(policy, stats.iteration, f"iteration {stats.iteration}")
    return {"logs": columns(rows), "exact": watch.end(), "checks": listener.record()}


def run_dpo(plan: DPOPlan, ground: Ground) -> dict:
    """Train by a plan to its end. The check of the first step is asked in any case; "made" says whether DPO asks it."""
    policy, listener = ground.policy(), Listener("step 0", "not finite", "advice", GOLD)
    state = DPOState.start(policy, ground.tokenizer, plan.pairs, plan.config, ref_policy=plan.ref_policy)
    listener.heard["step 0"]["made"], state.from_reference = state.from_reference, False
    watch, rows, looks = Watch(ground, listener, ground.judge), [], looks_of(ground.size, state.steps(plan.config))
    while state.done < state.steps(plan.config):
        stats = dpo_iteration(state, plan.config)
        if stats.step == 1:
            try:
                check_first_step(stats, plan.config)
            except InvariantError as error:
                listener.hear("step 0", 1, str(error))
        rows.append(stats.log())
        if stats.step in looks:
            watch.look(policy, stats.step, f"step {stats.step}")
    return {"logs": columns(rows), "exact": watch.end(), "checks": listener.record()}


def looks_of(size: Size, steps: int) -> set[int]:
    """The iterations at which a run of `steps` is measured."""
    return {max(1, round(share * steps)) for share in size.looks}


def columns(rows: list[dict]) -> dict[str, list[float]]:
    """Rows as columns, with four significant digits."""
    return {name: [float(f"{row[name]:.4g}") for row in rows] for name in rows[0]}


def run_fault(name: str, ground: Ground) -> dict:
    """The record of one broken run: the fields of `StoredRun`, and the CPU seconds."""
    fault, begun = FAULTS[name], time.process_time()
    start, follow = {"ppo": (healthy_ppo, run_ppo), "dpo": (healthy_dpo, run_dpo)}[fault.method]
    made = follow(fault.breaks(start(ground), ground), ground)
    return {**described(name), **made, "cpu_seconds": time.process_time() - begun}


def run_healthy(name: str, ground: Ground) -> dict:
    """The record of one healthy run."""
    (method, seed), begun = HEALTHY[name], time.process_time()
    start, follow = {"ppo": (healthy_ppo, run_ppo), "dpo": (healthy_dpo, run_dpo)}[method]
    return {**described(name), **follow(start(ground, seed), ground), "cpu_seconds": time.process_time() - begun}


def described(name: str) -> dict:
    """The fields of `StoredRun` that say what a run is."""
    if name in HEALTHY:
        return {"name": name, "letter": "", "fault": "", "method": HEALTHY[name][0], "statistic": "", "side": ""}
    fault = FAULTS[name]
    return {"name": name, "letter": fault.letter, "fault": fault.breaks.__doc__, "method": fault.method,
            "statistic": fault.statistic, "side": fault.side}


def alarms(made: dict, healthy: dict) -> dict:
    """The record of a run in which advice is only what was not also said of the healthy run.

    A run of this size leaves much to do, so that some advice (risky failures are still high) holds for the healthy run
    too. What a check says of both tells nobody that a run is broken.
    """
    known = {check["name"]: set(map(kind, check["says"].splitlines())) for check in healthy["checks"]}
    checks = []
    for check in made["checks"]:
        said = check["says"].splitlines()
        if check["name"] in ("advice", GOLD):
            said = [line for line in said if kind(line) not in known[check["name"]]]
        checks.append({**check, "iteration": check["iteration"] if said else None, "says": " ".join(said)})
    return {**made, "checks": checks}


def kind(sentence: str) -> str:
    """Which rule of `advice` a sentence comes from: its words without names and figures."""
    return next((rule for rule in RULES if rule in sentence), sentence)


# ---- what alignkit does not start, or ends at once
def a_kl_loss_with_whitening(ground: Ground) -> None:
    """The KL is put into the loss while the advantages are whitened."""
    PPOConfig(kl_penalty="k2")


def a_reward_that_knows_one_score(ground: Ground) -> None:
    """The reward model gives every response the same score, and is normalised."""
    model = copy.deepcopy(ground.judge.model)
    model.score.weight.data.zero_()
    ground.normalised(model)


def a_reward_that_is_nan(ground: Ground) -> None:
    """The reward is NaN for one response."""
    def reward(prompts: list[str], responses: list[str]):
        return ground.judge(prompts, responses).index_fill(0, torch.tensor([3]), float("nan"))

    _first_iteration(replace(healthy_ppo(ground), reward=reward), ground)


def a_reward_of_the_batch(ground: Ground) -> None:
    """The reward returns one number for the batch instead of one for each response."""
    _first_iteration(replace(healthy_ppo(ground), reward=lambda prompts, responses: 1.0), ground)


def a_reward_without_the_end(ground: Ground) -> None:
    """The reward model's input lacks the token that begins the prompt."""
    class Beheaded(RewardScorer):
        def ids(self, prompts, responses):
            return [row[1:] for row in super().ids(prompts, responses)]

    judge = ground.judge
    _first_iteration(replace(healthy_ppo(ground), reward=Beheaded(judge.model, judge.tokenizer, judge.mean, judge.std)),
                     ground)


def a_response_that_does_not_fit(ground: Ground) -> None:
    """Responses may be longer than what is left of the model's context."""
    plan = healthy_ppo(ground)
    _first_iteration(replace(plan, config=replace(plan.config, max_new_tokens=60)), ground)


def _first_iteration(plan: PPOPlan, ground: Ground) -> None:
    state = PPOState.start(ground.policy(), ground.tokenizer, plan.reward, plan.prompts, plan.config)
    ppo_iteration(state, plan.config)


REFUSED = (a_kl_loss_with_whitening, a_reward_that_knows_one_score, a_reward_that_is_nan, a_reward_of_the_batch,
           a_reward_without_the_end, a_response_that_does_not_fit)


def refuse(start: Callable[[Ground], None], ground: Ground) -> dict:
    """The record of a run that must not start: the fields of `Refusal`. Raises AssertionError if it starts."""
    try:
        start(ground)
    except (AlignkitError, ValueError) as error:
        return {"fault": start.__doc__, "error": type(error).__name__, "says": str(error)}
    raise AssertionError(f"{start.__name__} was not refused")


# ---- the command
def run(folder: Path, size: Size, names: list[str] | None = None) -> dict:
    """Make the runs that are not in `folder` yet; returns what goes into the file. names: of the faults, None: all."""
    ground, runs = Ground(folder, size), []
    for name in [*HEALTHY, *(FAULTS if names is None else names)]:
        make = run_healthy if name in HEALTHY else run_fault
        path = folder / "runs" / f"{(FAULTS[name].letter if name in FAULTS else name.replace(' ', '-'))}.json"
        made = kept(path, {"name": name, "size": size.key()}, lambda: plain(make(name, ground)))  # noqa: B023
        made |= described(name)
        runs.append(made)
        spoke = {check["name"]: check["iteration"] for check in made["checks"] if check["says"]}
        print(f"{made['letter'] or '-'} {name:<40} gold {made['exact']['gold'][-1]:6.2f} "
              f"kl {made['exact']['kl'][-1]:6.2f}  {made['cpu_seconds']:4.0f} s  {spoke}", flush=True)
    seconds = sum(made.pop("cpu_seconds") for made in runs)
    healthy = {method: next(made for made in runs if made["method"] == method) for method in ("ppo", "dpo")}
    runs = [alarms(made, healthy[made["method"]]) for made in runs]
    return plain({"command": "python -m experiments.failures", "versions": versions(), "cpu_seconds": round(seconds),
                  "settings": size.key(), "runs": runs, "refusals": [refuse(start, ground) for start in REFUSED]})


def main(arguments: list[str] | None = None) -> None:
    """Make the runs and write the record."""
    parser = argparse.ArgumentParser(prog="python -m experiments.failures", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/failures"), help="where finished runs are kept")
    parser.add_argument("--json", type=Path, default=FILE)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    write_compact(given.json, run(given.out, Size()))
    stored = load_failures(given.json)
    print(f"{len(stored.broken)} broken runs, {stored.cpu_seconds:g} s of CPU, {given.json.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
