"""When is DPO enough, does a better ranking mean a better policy, and how firmly does a wrong direction stick?

Everything starts from worlds whose demonstrators differ in nothing but how messy they are (`Messy`). PPO and DPO are
compared at the same labels and the same KL, as in `experiments.claims.order`. The other parts use the middle level: the
ranking of held-out pairs along one long run of DPO; a wrong direction, PPO on a reward model of annotators who like
compliance, with DPO after it or without, and its repair; and the steps that undo a policy.
"""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

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
from alignkit.models.loading import load_policy
from alignkit.optim import adamw
from alignkit.task import desk_task
from experiments.claims.arms import ARMS, Ground, Size, ppo_blocks
from experiments.claims.order import FAILED, LATE, NEAR, Measure, Trail, follow_priced, mean_point, sweep_stage
from experiments.sweep import Truth, kept, some_prompts

WRONG = "arena"  # the annotator with the wrong direction: likes compliance on risky prompts


@dataclass(frozen=True)
class MessySize(Size):
    """How much of everything. levels: of messiness. middle: the level of the other parts. heldout: pairs whose ranking
    is followed; path_beta, path_epochs, every: of the run that is followed, `every` steps. wrong_blocks, wrong_kl: of
    PPO in the wrong direction; repair: labels of DPO after it, and again of its repair. contrary: demonstrations that
    undo a policy in `undo_steps` steps."""

    levels: tuple[float, ...] = (0.0, 0.5, 1.0)
    middle: float = 0.5
    heldout: int = 500
    path_beta: float = 0.1
    path_epochs: int = 4
    every: int = 12
    wrong_blocks: int = 4
    wrong_kl: float = 1.0
    repair: int = 2000
    contrary: int = 32
    undo_steps: int = 16
    undo_rate: float = 1e-3
    betas: tuple[float, ...] = field(default=(0.2, 0.4, 0.8))


class Messy(Ground):
    """A world at one level of messiness: one reward model, from all labels."""

    def __init__(self, seed: int, folder: Path, size: MessySize, messiness: float):
        self.seed, self.size, self.task = seed, size, desk_task(seed, messiness=messiness)
        self.folder, self._key = folder / f"messy-{messiness:g}-{seed}", {"size": size.key(), "messiness": messiness}
        kept(self.folder / "sft.json", self._key, self._make_sft)
        self.sft, self.tokenizer = load_policy(self.folder / "sft")
        self.pairs = self.task.preference_pairs(self.sft, self.tokenizer, size.labels, seed=seed)
        self.judges = {"all": self._judge("all", self.pairs)}
        prompts = some_prompts(self.task.world.heldout_prompts, size.keys, seed)
        self.truth = Truth(self.task, prompts, self.sft, self.tokenizer, self.judges["all"], self.folder / "cache")


# ---- messiness × method
def compare(ground: Messy) -> tuple[dict, dict[str, nn.Module]]:
    """SFT, and PPO and DPO at the same labels and KL: the record, and the policies of PPO and DPO.

    "at" of a method: figures as in `order.follow`, None if it did not reach the KL; "gold_sd": raw gold of one SFT-sd.
    """
    size, trail, policy = ground.size, Trail(ground), ground.policy()
    follow_priced(ground, policy, ARMS["PPO"][0], 0, size.last, size.blocks, trail)
    at = mean_point(trail.points[-LATE:])
    other, _, at_dpo = sweep_stage(ground, ground.policy(), ARMS["DPO"][0], 0, size.last, Trail(ground))
    mean, sd = ground.truth.gold_scale
    row = {"SFT": trail.points[0], "PPO": at if abs(at["kl"] - size.last) <= NEAR else None, "DPO": at_dpo,
           "ends": {"PPO": at["kl"]}, "gold_mean": mean, "gold_sd": sd}
    return row, {"PPO": policy, "DPO": other}


# ---- the ranking along DPO's path
class Ranking:
    """Held-out pairs of SFT's responses with the default annotator's labels, and which response gold prefers."""

    def __init__(self, ground: Messy):
        rows = ground.task.preference_pairs(ground.sft, ground.tokenizer, ground.size.heldout, seed=ground.seed + 11,
                                            split="heldout")
        sides = [encode_rows(ground.tokenizer, rows, side, ground.task.max_new_tokens) for side in
                 ("chosen", "rejected")]
        self.pairs = with_reference(ground.sft, Pairs(*sides))
        prompts = [row["prompt"] for row in rows]
        gold = [ground.task.world.gold_scores(prompts, [row[side] for row in rows]) for side in ("chosen", "rejected")]
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


def follow_dpo(ground: Messy) -> list[dict[str, float]]:
    """One long run of DPO at a low β: a row at the start and after every `Size.every` steps.

    step, loss (mean training loss since the row before, nats; ln 2 at the start), kl, gold, proxy, and the figures of
    `Ranking`.
    """
    size, policy, judged = ground.size, ground.policy(), Ranking(ground)
    config = replace(size.dpo, seed=ground.seed, beta=size.path_beta, epochs=size.path_epochs)

    def row(step: int, losses: list[float]) -> dict[str, float]:
        return {"step": step, "loss": float(np.mean(losses)), **ground.truth.measure(ground.truth.enumerate(policy)),
                **judged.figures(policy, config.beta)}

    rows, losses = [row(0, [float(np.log(2))])], []
    for stats in dpo(policy, ground.tokenizer, ground.pairs, config):
        losses.append(stats.loss)
        if stats.step % size.every == 0:
            rows.append(row(stats.step, losses))
            losses = []
    return rows


# ---- a wrong direction, and its repair
def go_wrong(ground: Messy) -> dict[str, list[dict[str, float]]]:
    """Start of the repair -> its path: "SFT" (never went wrong), "PPO" (wrong direction), "PPO, then DPO" (the wrong
    direction, then DPO on fresh labels of the same annotators). A row after every `Size.every` steps of DPO on fresh
    labels of the default annotator: step, kl, gold, risky_failures, exact; the first row is the start."""
    size, task = ground.size, ground.task
    rows = task.preference_pairs(ground.sft, ground.tokenizer, size.labels, seed=ground.seed + 12, annotator=WRONG)
    ground.judges[WRONG] = ground._judge(WRONG, rows)
    wrong, measure, kl = ground.policy(), Measure(ground), None
    training = ppo_blocks(ground, wrong, size.wrong_kl, 2, size.wrong_blocks, judge=WRONG)
    for _ in range(size.wrong_blocks):
        training.send(kl)
        kl = ground.truth.measure(ground.truth.enumerate(wrong))["kl"]
    fixed = copy.deepcopy(wrong)
    improve(ground, fixed, WRONG, 3, lambda step: None)
    paths = {}
    for name, start in (("SFT", ground.policy()), ("PPO", wrong), ("PPO, then DPO", fixed)):
        path = paths[name] = []

        def row(step: int, policy: nn.Module = start, path: list = path) -> None:
            logps = ground.truth.enumerate(policy)
            figures = measure.figures(logps, measure.behaviours(logps))
            path.append({"step": step, **{key: figures[key] for key in ("kl", "gold", "risky_failures")}})

        row(0)
        improve(ground, start, "default", 4, row)
    return paths


def improve(ground: Messy, policy: nn.Module, annotator: str, number: int, look: Callable[[int], None]) -> None:
    """DPO on `Size.repair` fresh labels on the policy's own responses; the reference is the policy as it is now."""
    size = ground.size
    rows = ground.task.preference_pairs(policy, ground.tokenizer, size.repair, seed=ground.seed + number,
                                        annotator=annotator)
    for stats in dpo(policy, ground.tokenizer, rows, replace(size.dpo, seed=ground.seed + 1000 * number)):
        if stats.step % size.every == 0:
            look(stats.step)


# ---- steps that undo a policy
def undo(ground: Messy, policies: dict[str, nn.Module]) -> dict[str, list[float]]:
    """Policy -> risky failures on held-out prompts after 0, 1, 2 … steps of likelihood training on contrary
    demonstrations, unsafe responses to risky training prompts."""
    size, world, truth = ground.size, ground.task.world, ground.truth
    risky = [prompt.text for prompt in world.train_prompts if prompt.kind == "risky"][::2][: size.contrary]
    rows = [{"prompt": prompt, "completion": SENTENCES["UNSAFE"]} for prompt in risky]
    contrary = encode_rows(ground.tokenizer, rows, "completion", ground.task.max_new_tokens)
    places = [place for place, prompt in enumerate(truth.prompts) if prompt.kind == "risky"]

    def failures(policy: nn.Module) -> float:
        chances = exact.response_logps(policy, ground.tokenizer, [truth.prompts[place] for place in places]).exp()
        table = chances.new_zeros(len(places), len(BEHAVIOURS)).scatter_add_(1, truth.behaviour[places], chances)
        return float(table[:, FAILED].sum(1).mean())

    return {name: undo_path(copy.deepcopy(policy), contrary, size, failures) for name, policy in policies.items()}


def undo_path(policy: nn.Module, contrary: Rollout, size: MessySize, look: Callable[[nn.Module], float]) -> list[float]:
    """`look` at the policy before and after every step on the contrary demonstrations; changes the policy."""
    optimizer, seen = adamw(list(policy.requires_grad_(True).parameters()), size.undo_rate), [look(policy)]
    for _ in range(size.undo_steps):
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
