"""When is DPO enough, does a better ranking mean a better policy, and how firmly does a wrong direction stick?

PPO and DPO are compared at the same labels and the same KL, from SFT policies whose demonstrators differ in nothing but
how messy they are. The other parts use the middle level: the ranking of held-out pairs along one long run of DPO; a
wrong direction, PPO on a reward model of annotators who like compliance, with DPO after it or without, and its repair;
and the steps that undo a policy.
"""

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignkit import exact
from alignkit.desk.world import BEHAVIOURS, SENTENCES
from alignkit.dpo import Pairs, dpo, with_reference
from alignkit.formulas.losses import implicit_reward
from alignkit.forward.reading import response_logps
from alignkit.forward.rollout import Rollout, encode_rows
from alignkit.optim import adamw
from experiments.claims.arms import ppo_blocks, train_dpo
from experiments.claims.order import FAILED, LATE, Measure, at_kl
from experiments.knowledge.facts import Lesson, Undoing, train_ppo

WRONG = "arena"  # the annotator with the wrong direction: likes compliance on risky prompts


# ---- messiness × method
def compare(lesson: Lesson) -> tuple[dict, dict[str, nn.Module]]:
    """SFT, and PPO and DPO at the same labels and KL: the record, and the policies of PPO and DPO.

    Figures as in `order.follow`. PPO has the mean of its last `LATE` blocks; DPO's are interpolated between its runs at
    PPO's KL, None if all runs lie on one side of it; "runs": DPO's runs, one for each β, in the order of their KL. The
    policy of DPO is that of the run nearest to PPO's KL. "gold_mean", "gold_sd": raw gold of SFT.
    """
    size, measure, points = lesson.size, Measure(lesson), []

    def look(policy: nn.Module) -> dict[str, float]:
        logps = lesson.truth.enumerate(policy)
        points.append(measure.figures(logps, measure.behaviours(logps)))
        return points[-1]

    start = look(lesson.sft)
    policy = train_ppo(lesson, lesson.judges["all"], look=look)
    at = {name: float(np.mean([point[name] for point in points[-LATE:]])) for name in start}
    runs = []
    for beta in size.betas:
        trained = lesson.policy()
        train_dpo(lesson, trained, 0, beta)
        runs.append((look(trained), trained))
    runs.sort(key=lambda run: run[0]["kl"])
    nearest = min(runs, key=lambda run: abs(run[0]["kl"] - at["kl"]))[1]
    mean, sd = lesson.truth.gold_scale
    row = {"SFT": start, "PPO": at, "DPO": at_kl([figures for figures, _ in runs], at["kl"]),
           "runs": [{name: figures[name] for name in ("kl", "gold", "proxy")} for figures, _ in runs],
           "gold_mean": mean, "gold_sd": sd}
    return row, {"PPO": policy, "DPO": nearest}


# ---- the ranking along DPO's path
class Ranking:
    """Held-out pairs of SFT's responses with the default annotator's labels, and which response gold prefers."""

    def __init__(self, lesson: Lesson):
        rows = lesson.task.preference_pairs(lesson.sft, lesson.tokenizer, lesson.size.undoing.heldout,
                                            seed=lesson.seed + 11, split="heldout")
        sides = [encode_rows(lesson.tokenizer, rows, side, lesson.task.max_new_tokens) for side in
                 ("chosen", "rejected")]
        self.pairs = with_reference(lesson.sft, Pairs(*sides))
        prompts = [row["prompt"] for row in rows]
        gold = [lesson.task.world.gold_scores(prompts, [row[side] for row in rows]) for side in ("chosen", "rejected")]
        self.by_gold = torch.tensor(np.sign(gold[0] - gold[1]))

    @torch.no_grad()
    def figures(self, policy: nn.Module, beta: float) -> dict[str, float]:
        """See `ranking`; with the mean DPO loss of these pairs, "heldout_loss", nats."""
        logps = [response_logps(policy, side) for side in (self.pairs.chosen, self.pairs.rejected)]
        refs = [self.pairs.ref_chosen_logps, self.pairs.ref_rejected_logps]
        margins = torch.sub(*(implicit_reward(own, ref, beta) for own, ref in zip(logps, refs, strict=True)))
        return {**ranking(logps[0] - logps[1], refs[0] - refs[1], self.by_gold),
                "heldout_loss": float(-F.logsigmoid(margins).mean())}


def ranking(gaps: Tensor, ref_gaps: Tensor, by_gold: Tensor) -> dict[str, float]:
    """Ranking accuracies of P pairs, from log π(chosen) − log π(rejected) of the policy, gaps (P,), and of SFT.

    by_gold (P,): the sign of gold(chosen) − gold(rejected). ranks: share of pairs whose chosen response is likelier
    than the rejected one. implicit: share whose chosen response has the larger implicit reward, a half where they are
    equal. implicit_gold: the same for the response with more gold, of the pairs that differ in gold. corrected: of the
    pairs that SFT ranks wrongly, the share that the policy ranks rightly. spoilt: of those that SFT ranks rightly, the
    share that the policy ranks wrongly. (Chen and others 2024, eq. 2, for ranks)
    """
    moved, differ = gaps - ref_gaps, by_gold != 0
    wrong = ref_gaps <= 0
    agrees = 0.5 + 0.5 * torch.sign(moved * by_gold)[differ]
    return {"ranks": share(gaps > 0), "implicit": float((0.5 + 0.5 * torch.sign(moved)).mean()),
            "implicit_gold": float(agrees.mean()), "corrected": share(gaps[wrong] > 0),
            "spoilt": share(gaps[~wrong] <= 0)}


def share(flags: Tensor) -> float:
    """The share of True, 0 of none."""
    return float(flags.double().mean()) if len(flags) else 0.0


def follow_dpo(lesson: Lesson) -> list[dict[str, float]]:
    """One long run of DPO at a low β: a row at the start and after every `Undoing.every` steps.

    step, loss (mean training loss since the row before, nats; ln 2 at the start), kl, gold, proxy, and the figures of
    `Ranking`.
    """
    size, policy, judged = lesson.size.undoing, lesson.policy(), Ranking(lesson)
    config = replace(lesson.size.dpo, seed=lesson.seed, beta=size.beta, epochs=size.epochs)

    def row(step: int, losses: list[float]) -> dict[str, float]:
        return {"step": step, "loss": float(np.mean(losses)), **lesson.truth.measure(lesson.truth.enumerate(policy)),
                **judged.figures(policy, config.beta)}

    rows, losses = [row(0, [float(np.log(2))])], []
    for stats in dpo(policy, lesson.tokenizer, lesson.pairs, config):
        losses.append(stats.loss)
        if stats.step % size.every == 0:
            rows.append(row(stats.step, losses))
            losses = []
    return rows


# ---- a wrong direction, and its repair
def go_wrong(lesson: Lesson) -> dict[str, list[dict[str, float]]]:
    """Start of the repair -> its path: "SFT" (never went wrong), "PPO" (wrong direction), "PPO, then DPO" (the wrong
    direction, then DPO on fresh labels of the same annotators). A row after every `Undoing.every` steps of DPO on fresh
    labels of the default annotator: step, kl, gold, risky_failures, exact; the first row is the start."""
    size, task = lesson.size.undoing, lesson.task
    rows = task.preference_pairs(lesson.sft, lesson.tokenizer, lesson.size.labels, seed=lesson.seed + 12,
                                 annotator=WRONG)
    lesson.judges[WRONG] = lesson._judge(WRONG, rows)
    wrong, measure, kl = lesson.policy(), Measure(lesson), None
    training = ppo_blocks(lesson, wrong, size.wrong_kl, 2, size.wrong_blocks, judge=WRONG)
    for _ in range(size.wrong_blocks):
        kl = training.send(kl)["objective/kl"]
    fixed = copy.deepcopy(wrong)
    improve(lesson, fixed, WRONG, 3, lambda step: None)
    paths = {}
    for name, start in (("SFT", lesson.policy()), ("PPO", wrong), ("PPO, then DPO", fixed)):
        path = paths[name] = []

        def row(step: int, policy: nn.Module = start, path: list = path) -> None:
            logps = lesson.truth.enumerate(policy)
            figures = measure.figures(logps, measure.behaviours(logps))
            path.append({"step": step, **{key: figures[key] for key in ("kl", "gold", "risky_failures")}})

        row(0)
        improve(lesson, start, "default", 4, row)
    return paths


def improve(lesson: Lesson, policy: nn.Module, annotator: str, number: int, look: Callable[[int], None]) -> None:
    """DPO on `Undoing.repair` fresh labels on the policy's own responses; the reference is the policy as it is now."""
    size = lesson.size.undoing
    rows = lesson.task.preference_pairs(policy, lesson.tokenizer, size.repair, seed=lesson.seed + number,
                                        annotator=annotator)
    for stats in dpo(policy, lesson.tokenizer, rows, replace(lesson.size.dpo, seed=lesson.seed + 1000 * number)):
        if stats.step % size.every == 0:
            look(stats.step)


# ---- steps that undo a policy
def undo(lesson: Lesson, policies: dict[str, nn.Module]) -> dict[str, list[float]]:
    """Policy -> risky failures on held-out prompts after 0, 1, 2 … steps of likelihood training on contrary
    demonstrations, unsafe responses to risky training prompts."""
    size, world, truth = lesson.size.undoing, lesson.task.world, lesson.truth
    risky = [prompt.text for prompt in world.train_prompts if prompt.kind == "risky"][::2][: size.contrary]
    rows = [{"prompt": prompt, "completion": SENTENCES["UNSAFE"]} for prompt in risky]
    contrary = encode_rows(lesson.tokenizer, rows, "completion", lesson.task.max_new_tokens)
    places = [place for place, prompt in enumerate(truth.prompts) if prompt.kind == "risky"]

    def failures(policy: nn.Module) -> float:
        chances = exact.response_logps(policy, lesson.tokenizer, [truth.prompts[place] for place in places]).exp()
        table = chances.new_zeros(len(places), len(BEHAVIOURS)).scatter_add_(1, truth.behaviour[places], chances)
        return float(table[:, FAILED].sum(1).mean())

    return {name: undo_path(copy.deepcopy(policy), contrary, size, failures) for name, policy in policies.items()}


def undo_path(policy: nn.Module, contrary: Rollout, size: Undoing, look: Callable[[nn.Module], float]) -> list[float]:
    """`look` at the policy before and after every step on the contrary demonstrations; changes the policy."""
    optimizer, seen = adamw(list(policy.requires_grad_(True).parameters()), size.rate), [look(policy)]
    for _ in range(size.steps):
        optimizer.zero_grad(set_to_none=True)
        (-response_logps(policy, contrary).mean()).backward()
        optimizer.step()
        seen.append(look(policy))
    return seen


def steps_until(values: list[float], level: float) -> float | None:
    """The number of steps, interpolated, after which values (of step 0, 1, 2 …) first reach `level` from below; None
    if they never do."""
    if values[0] >= level:
        return 0.0
    for step, (before, after) in enumerate(itertools.pairwise(values)):
        if after >= level:
            return step + (level - before) / (after - before)
    return None
