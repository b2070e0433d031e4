"""The runs: one dial is turned, everything else stays as it is.

All runs of a world start from its SFT policy and use its labels (`experiments.claims.arms.Ground`), and every policy is
measured by its probability of all responses to the held-out prompts. A *part* is what is measured together: its record
is kept in a file, and is not made again while settings and code are the same.
"""

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from alignkit import exact
from alignkit.configs import DPOConfig
from alignkit.dpo import DPOState, Pairs, dpo_iteration
from alignkit.formulas.losses import dpo_loss
from alignkit.formulas.randomness import seeded
from alignkit.forward.reading import response_logps
from alignkit.forward.sampling import generate_texts
from alignkit.models.heads import reward_model_from
from alignkit.optim import adamw, set_learning_rate
from alignkit.ppo import PPOState, ppo_iteration
from alignkit.reward import RewardScorer, train_reward_model
from alignkit.storage import plain
from experiments.claims.arms import ITERATIONS, Ground, Size
from experiments.claims.order import LATE, Measure, at_kl
from experiments.sweep import kept, strata

METRICS = ("kl", "proxy", "gold", "risky_failures", "over_refusal", "paraphrase_agreement")


@dataclass(frozen=True)
class Plan:
    """How each dial is turned.

    betas, prices: of DPO and of PPO with all labels; beta, price: the middle ones, the course's own. trainings: of the
    middle ones. blocks: of a PPO run, two iterations each. epochs: at which DPO is read when it is followed, the last
    is its end. labels: the smaller numbers of labels. passes: how many times as many passes over them 16 times fewer
    labels get, of DPO and of the reward model alike. few_betas, few_price: DPO and PPO with fewer labels. relay_blocks,
    relay_price: the relay's first stage, PPO.
    """

    betas: tuple[float, ...] = (0.05, 0.15, 0.5, 1.5, 5.0)
    prices: tuple[float, ...] = (0.1, 0.35, 1.2)
    beta: float = 0.5
    price: float = 0.35
    trainings: int = 3
    blocks: int = 6
    epochs: tuple[int, ...] = (1, 2, 4, 6)
    labels: tuple[int, ...] = (375, 1500)
    passes: int = 4
    few_betas: tuple[float, ...] = (0.05, 0.3, 1.5, 5.0)
    few_price: float = 0.7
    relay_blocks: int = 3
    relay_price: float = 1.4


class Bench:
    """A world, ready for runs: its ground, its pairs with the reference's log-probs, and what SFT is."""

    def __init__(self, ground: Ground, plan: Plan):
        self.ground, self.plan, self.measure = ground, plan, Measure(ground)
        self.pairs = encoded(ground, ground.pairs)
        self.sft, self.sft_table = self.read(ground.truth.ref_logps)

    def read(self, logps: Tensor) -> tuple[dict[str, float], np.ndarray]:
        """The figures of METRICS, and the probability of each behaviour, (prompts, behaviours)."""
        table = self.measure.behaviours(logps)
        figures = self.measure.figures(logps, table)
        return {name: figures[name] for name in METRICS}, table

    def read_policy(self, policy: nn.Module) -> tuple[dict[str, float], np.ndarray]:
        """The same of a policy."""
        return self.read(self.ground.truth.enumerate(policy))


# ---- the same KL
def matched(points: Iterable[Mapping[str, float]], kl: float) -> dict[str, float] | None:
    """The figures of METRICS at `kl`, between the two points around it; None if it lies outside.

    Linear in √KL, because rewards leave a reference in proportion to it (Gao 2022: R = d(α − βd), d = √KL).
    """
    rows = sorted(({**{name: point[name] for name in METRICS}, "kl": math.sqrt(point["kl"])} for point in points),
                  key=lambda row: row["kl"])
    at = at_kl(rows, math.sqrt(kl))
    return at and {**at, "kl": kl}


# ---- DPO
def encoded(ground: Ground, rows: Sequence[dict], policy: nn.Module | None = None) -> Pairs:
    """Pairs with the log-probs of `policy`, or of SFT."""
    return DPOState.start(ground.policy() if policy is None else policy, ground.tokenizer, list(rows),
                          ground.size.dpo).pairs


def dpo_run(policy: nn.Module, pairs: Pairs, config: DPOConfig) -> Iterator[dict[str, float]]:
    """DPO in place on pairs whose reference is the policy as it is now; yields each epoch's mean log."""
    state = DPOState(policy, pairs, adamw(policy.parameters(), config.learning_rate))
    each = state.steps(config) // config.epochs
    for _ in range(config.epochs):
        rows = [dpo_iteration(state, config) for _ in range(each)]
        yield {name: float(np.mean([getattr(row, name) for row in rows]))
               for name in ("loss", "chosen_shift", "rejected_shift")}


def dpo_config(ground: Ground, beta: float, *, number: int = 0, epochs: int | None = None) -> DPOConfig:
    """The settings of the claims' DPO with another β, a training's seed, and another number of epochs."""
    start = ground.size.dpo
    return replace(start, beta=beta, seed=ground.seed + 1000 * number, epochs=epochs or start.epochs)


def one_sided(policy: nn.Module, pairs: Pairs, config: DPOConfig, *, rejected: str) -> None:
    """DPO in place, on the same batches as `dpo_iteration`, with another treatment of the rejected responses.

    rejected: "trained", DPO itself; "weighs", their log-probs count in the loss but have no gradient, so that a pair
    still weighs less once its margin is large; "ignored", the likelihood of the chosen response alone, β unused.
    """
    optimizer = adamw(policy.parameters(), config.learning_rate)
    each = math.ceil(len(pairs) / config.batch_size)
    warmup = config.warmup * each * config.epochs
    for step in range(each * config.epochs):
        epoch, place = divmod(step, each)
        order = torch.randperm(len(pairs), generator=seeded(config.seed, epoch, 4))
        batch = pairs[order[place * config.batch_size : (place + 1) * config.batch_size]]
        optimizer.zero_grad(set_to_none=True)
        one_sided_loss(policy, batch, config.beta, rejected).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        set_learning_rate(optimizer, config.learning_rate * (min((step + 1) / warmup, 1.0) if warmup else 1.0))
        optimizer.step()


def one_sided_loss(policy: nn.Module, batch: Pairs, beta: float, rejected: str) -> Tensor:
    """The mean loss of `one_sided` on a batch."""
    chosen = response_logps(policy, batch.chosen)
    if rejected == "ignored":
        return -chosen.sum() / batch.chosen.response_mask.sum()
    with torch.set_grad_enabled(rejected == "trained"):
        other = response_logps(policy, batch.rejected)
    return dpo_loss(chosen, other, batch.ref_chosen_logps, batch.ref_rejected_logps, beta=beta).mean()


def promised(ground: Ground, betas: Iterable[float]) -> list[dict[str, float]]:
    """At each β: KL, proxy and gold of π* ∝ π_ref exp(s / β), s the reward model's score before normalisation.

    That is where DPO would end with endless labels of a Bradley–Terry annotator with reward s (Rafailov 2023, eq. 4).
    """
    truth, std = ground.truth, ground.judges["all"].std
    rows = [(beta, truth.measure(exact.optimum(truth.ref_logps, truth.proxy, beta / std)[0])) for beta in betas]
    return [{"beta": beta, **{name: row[name] for name in ("kl", "proxy", "gold")}} for beta, row in rows]


# ---- PPO
def move_reference(ref_policy: nn.Module, policy: nn.Module, anchor: str) -> None:
    """What the reference does after a block. "fixed": it stays SFT. "moving": it becomes the policy. "average": it
    becomes the mean of itself and the policy, an exponential moving average with a half-life of one block."""
    share = {"fixed": 0.0, "average": 0.5, "moving": 1.0}[anchor]
    with torch.no_grad():
        for old, new in zip(ref_policy.parameters(), policy.parameters(), strict=True):
            old.lerp_(new, share)


def ppo_run(bench: Bench, price: float, *, number: int = 0, anchor: str = "fixed", judge: str = "all",
            policy: nn.Module | None = None, blocks: int | None = None) -> dict:
    """PPO at a fixed price, in place, from `policy` or SFT.

    Returns {"path": figures after every second block and after the last two, "end": the mean of the last two, "table":
    behaviours at the end}.
    """
    ground, blocks = bench.ground, blocks or bench.plan.blocks
    config = replace(ground.size.ppo, kl_coef=price, iterations=ITERATIONS * blocks, seed=ground.seed + 1000 * number)
    policy = ground.policy() if policy is None else policy
    state = PPOState.start(policy, ground.tokenizer, ground.judges[judge], strata(ground.task), config)
    path = []
    for block in range(1, blocks + 1):
        for _ in range(ITERATIONS):
            ppo_iteration(state, config)
        move_reference(state.ref_policy, policy, anchor)
        if block % 2 == 0 or block > blocks - LATE:
            figures, table = bench.read_policy(policy)
            path.append({"block": block, **figures})
    end = {name: float(np.mean([point[name] for point in path[-LATE:]])) for name in METRICS}
    return {"price": price, "path": path, "end": end, "table": table}


def apart(tables: Sequence[np.ndarray]) -> float:
    """Mean total variation between the behaviours of two trainings, over all pairs of trainings and all prompts."""
    return float(np.mean([np.abs(one - other).sum(1).mean() / 2 for one, other in itertools.combinations(tables, 2)]))


def spread(bench: Bench, tables: Sequence[np.ndarray]) -> dict[str, float]:
    """apart: between trainings. moved: the mean total variation between a training and SFT."""
    return {"apart": apart(tables), "moved": float(np.mean([apart([bench.sft_table, table]) for table in tables]))}


# ---- parts: each the record of a world
def part_beta(bench: Bench) -> dict:
    """DPO at each β; and `trainings` of the middle one, which differ in the order of the pairs only."""
    ground, plan, runs, tables, trainings = bench.ground, bench.plan, [], [], []
    for beta, number in [*((beta, 0) for beta in plan.betas), *((plan.beta, n) for n in range(1, plan.trainings))]:
        policy = ground.policy()
        logged = list(dpo_run(policy, bench.pairs, dpo_config(ground, beta, number=number)))[-1]
        figures, table = bench.read_policy(policy)
        if number == 0:
            runs.append({"beta": beta, **figures, **logged})
        if beta == plan.beta:
            trainings.append(figures)
            tables.append(table)
    return {"sft": bench.sft, "runs": runs, "promised": promised(ground, plan.betas), "trainings": trainings,
            **spread(bench, tables)}


def part_price(bench: Bench) -> dict:
    """PPO at each price; and `trainings` of the middle one, which differ in what is sampled and in its order."""
    plan = bench.plan
    runs = [ppo_run(bench, price) for price in plan.prices]
    middle = runs[plan.prices.index(plan.price)]
    same = [middle, *(ppo_run(bench, plan.price, number=number) for number in range(1, plan.trainings))]
    return {"sft": bench.sft, "runs": [{"price": run["price"], **run["end"]} for run in runs],
            "path": middle["path"], "trainings": [run["path"][-1] for run in same],
            **spread(bench, [run["table"] for run in same])}


def part_reference(bench: Bench) -> dict:
    """PPO at the middle price with a reference that moves, and with no price; `part_price` has it with SFT."""
    runs = {anchor: ppo_run(bench, bench.plan.price, anchor=anchor) for anchor in ("moving", "average")}
    runs["none"] = ppo_run(bench, 0.0)
    return {"sft": bench.sft, "arms": {name: {"path": run["path"], "end": run["end"]} for name, run in runs.items()}}


def passes(plan: Plan, size: Size, labels: int, epochs: int) -> int:
    """Passes over `labels` labels in place of `epochs` over all: `plan.passes` times as many for a 16th of them."""
    return round(epochs * (size.labels / labels) ** (math.log(plan.passes) / math.log(16)))


def judge_of(ground: Ground, plan: Plan, labels: int) -> RewardScorer:
    """A reward model of the first labels, made as `Ground` makes its own."""
    model, size = reward_model_from(ground.sft, seed=ground.seed), ground.size
    config = replace(size.reward, seed=ground.seed, epochs=passes(plan, size, labels, size.reward.epochs))
    train_reward_model(model, ground.tokenizer, ground.pairs[:labels], config)
    asked = ground.training_prompts(size.normalise // 4, 1)
    texts = generate_texts(ground.sft, ground.tokenizer, asked, max_new_tokens=ground.task.max_new_tokens,
                           seed=ground.seed + 2)
    return RewardScorer(model, ground.tokenizer).normalised(asked, [each[0] for each in texts])


def few_dpo(bench: Bench, labels: int, policy: nn.Module, number: int = 0) -> list[dict]:
    """DPO from `policy`, which is its reference, on the first labels: a run for each of `few_betas`."""
    ground, plan, runs = bench.ground, bench.plan, []
    pairs = encoded(ground, ground.pairs[:labels], policy)
    epochs = passes(plan, ground.size, labels, ground.size.dpo.epochs)
    for beta in plan.few_betas:
        trained = copy.deepcopy(policy)
        logged = list(dpo_run(trained, pairs, dpo_config(ground, beta, number=number, epochs=epochs)))[-1]
        runs.append({"beta": beta, **bench.read_policy(trained)[0], "loss": logged["loss"]})
    return runs


def part_fewest(bench: Bench) -> dict:
    """DPO, PPO and the relay, PPO then DPO, each with the fewest labels in all."""
    labels, plan, policy = min(bench.plan.labels), bench.plan, bench.ground.policy()
    record = labelled(bench, labels)
    ppo_run(bench, plan.relay_price, judge=str(labels), policy=policy, blocks=plan.relay_blocks)
    return {**record, "first": bench.read_policy(policy)[0], "relay": few_dpo(bench, labels, policy, number=1)}


def part_fewer(bench: Bench) -> dict:
    """DPO and PPO with the larger of the smaller numbers of labels."""
    return labelled(bench, max(bench.plan.labels))


def labelled(bench: Bench, labels: int) -> dict:
    """DPO's runs on the first labels, and PPO on the score of their reward model."""
    bench.ground.judges[str(labels)] = judge_of(bench.ground, bench.plan, labels)
    ppo = ppo_run(bench, bench.plan.few_price, judge=str(labels))
    return {"sft": bench.sft, "labels": labels, "dpo": few_dpo(bench, labels, bench.ground.policy()),
            "ppo": ppo["end"]}


def part_steps(bench: Bench) -> dict:
    """DPO at the middle β, followed over several epochs."""
    ground, plan, policy, rows = bench.ground, bench.plan, bench.ground.policy(), []
    config = dpo_config(ground, plan.beta, epochs=plan.epochs[-1])
    for epoch, logged in enumerate(dpo_run(policy, bench.pairs, config), start=1):
        if epoch in plan.epochs:
            rows.append({"epoch": epoch, **bench.read_policy(policy)[0], **logged})
    return {"sft": bench.sft, "rows": rows, "promised": promised(ground, [plan.beta])[0]}


def part_rejected(bench: Bench) -> dict:
    """DPO whose rejected responses have no gradient, and the likelihood of the chosen responses, at the middle β."""
    ground, plan, runs = bench.ground, bench.plan, []
    for rejected in ("weighs", "ignored"):
        policy = ground.policy()
        one_sided(policy, bench.pairs, dpo_config(ground, plan.beta), rejected=rejected)
        runs.append({"rejected": rejected, "beta": plan.beta, **bench.read_policy(policy)[0]})
    return {"sft": bench.sft, "runs": runs}


PARTS: dict[str, Callable[[Bench], dict]] = {
    "beta": part_beta, "rejected": part_rejected, "steps": part_steps, "fewest": part_fewest, "price": part_price,
    "reference": part_reference, "fewer": part_fewer,
}


@functools.cache
def bench_of(seed: int, folder: Path, size: Size, plan: Plan) -> Bench:
    """The world's bench, made once in a process."""
    return Bench(Ground(seed, folder, size), plan)


def run_part(seed: int, part: str, folder: Path, size: Size, plan: Plan, code: str) -> dict:
    """The record of a part in a world, kept in a file and not made again while settings and code are the same."""
    torch.set_num_threads(1)
    key = plain({"size": size.key(), "plan": vars(plan), "code": code, "part": part})
    record = kept(folder / f"world-{seed}" / "dials" / f"{part}.json", key,
                  lambda: plain(PARTS[part](bench_of(seed, folder, size, plan))))
    print(f"world {seed}  {part}", flush=True)
    return record
