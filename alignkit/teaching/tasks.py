"""The tasks of the graded lab: hidden inputs, drawn anew for each grading, and what a right answer must do with them.

A task is a function that the student writes. Its checks hold calls of that function and a judgement of what came back,
which is made in the grader's process from alignkit's own formulas. The first check of a task is the basic one: without
it the others give no points.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alignkit.formulas.kl import k3
from alignkit.formulas.losses import dpo_loss, gae
from alignkit.formulas.tokens import masked_mean


@dataclass(frozen=True)
class Check:
    """Calls of the student's function, and `right(answers)`, which says whether what they returned is right.

    failure: what the row of the CSV says if it is not. gradient: the position of the argument by which the result is
    differentiated, None to take the result itself.
    """

    points: int
    failure: str
    calls: Sequence[tuple]
    right: Callable[[list], bool]
    gradient: int | None = None


@dataclass(frozen=True)
class Task:
    """One task: the tag `task-NAME` of its cell, the function that the cell must define, and its checks."""

    name: str
    function: str
    checks: tuple[Check, ...] = field(repr=False)

    @property
    def points(self) -> int:
        return sum(check.points for check in self.checks)


def lab_tasks(seed: int) -> list[Task]:
    """The tasks in the order of the lab, with inputs drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    makers = (_masked_mean, _reward_loss, _sampled_kl, _advantages, _silent_bug, _checkpoint, _dpo, _interval)
    return [make(generator) for make in makers]


def same(answer: object, expected: object, tolerance: float = 1e-5) -> bool:
    """Whether an answer, as `probe.packed_answer` made it, is the tensor, number, text or tuple that was expected.

    tolerance: absolute, and relative to the expected number. NaN is never right, and a shape must be the same.
    """
    if isinstance(expected, str):
        return isinstance(answer, dict) and answer.get("text") == expected
    if isinstance(expected, tuple):
        return isinstance(answer, list) and len(answer) == len(expected) and all(
            same(one, other, tolerance) for one, other in zip(answer, expected, strict=True))
    expected = expected.tolist() if isinstance(expected, Tensor) else expected
    if isinstance(expected, list):
        return isinstance(answer, list) and len(answer) == len(expected) and all(
            same(one, other, tolerance) for one, other in zip(answer, expected, strict=True))
    return abs(number(answer) - expected) <= tolerance * max(1.0, abs(expected))


def number(answer: object) -> float:
    """An answer that is one number, or a tensor that holds one, as a float; NaN for all others."""
    while isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, bool) or not isinstance(answer, (int, float)):
        return math.nan
    return float(answer) if abs(answer) < 1e300 else math.nan


def equal_to(*expected: object) -> Callable[[list], bool]:
    """A judgement: the answers are `expected`, one for each call."""
    return lambda answers: all(same(answer, each) for answer, each in zip(answers, expected, strict=True))


def _drawn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _mask(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    """A response mask of rows of different lengths: the first is full, the second has one token."""
    lengths = torch.randint(2, columns, (rows,), generator=generator)
    lengths[0], lengths[1] = columns, 1
    return torch.arange(columns)[None] < lengths[:, None]


# --- SFT, reward model -----------------------------------------------------------------------------------------------
def _masked_mean(generator: torch.Generator) -> Task:
    values, mask = _drawn(generator, 4, 6), _mask(generator, 4, 6)
    spoilt = torch.where(mask, values, -torch.inf)
    mean, nothing = masked_mean(values, mask), torch.zeros_like(mask)
    return Task("masked-mean", "masked_mean", (
        Check(1, "the mean over what counts, finite values in the padding", [(values, mask)], equal_to(mean)),
        Check(1, "values outside the mask that are infinite", [(spoilt, mask)], equal_to(mean)),
        Check(1, "a mask in which nothing counts must give 0", [(values, nothing), (spoilt, nothing)],
              equal_to(0.0, 0.0)),
    ))


def _reward_loss(generator: torch.Generator) -> Task:
    chosen, rejected = _drawn(generator, 7), _drawn(generator, 7)
    loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
    slope = -torch.sigmoid(rejected - chosen) / 7
    far = torch.tensor([-1000.0, 3.0])
    large = -torch.nn.functional.logsigmoid(far).mean()
    return Task("reward-loss", "reward_loss", (
        Check(1, "the mean loss of pairs", [(chosen, rejected)], equal_to(loss)),
        Check(1, "its gradient by the chosen scores", [(chosen, rejected)], equal_to(slope), gradient=0),
        Check(1, "a score that is 1,000 below the other must not give infinity", [(far, torch.zeros(2))],
              equal_to(large)),
    ))


# --- KL --------------------------------------------------------------------------------------------------------------
def _sampled_kl(generator: torch.Generator) -> Task:
    draws = 20_000
    while True:  # until wrong samplers, signs and estimators can be told from the right ones
        policy, ref = (_drawn(generator, 6).softmax(-1) for _ in range(2))
        terms, ratios = k3(policy.log(), ref.log()), policy.log() - ref.log()
        kl = (policy * ratios).sum()
        error = max(float((policy * (each - kl).square()).sum() / draws) ** 0.5 for each in (terms, ratios))
        wrong = (ref * terms).sum(), -(ref * ratios).sum(), (policy * k3(ref.log(), policy.log())).sum()
        negative = float(policy[ratios < 0].sum())  # the chance that k1 of a draw is below 0
        if min(abs(kl - each) for each in wrong) > 12 * error + 0.05 and 0.2 < kl < 1 and negative > 0.3:
            break
    seeds = torch.randint(10**6, (40,), generator=generator).tolist()
    return Task("sampled-kl", "sampled_kl", (
        Check(2, "KL(policy ‖ reference) from 20,000 draws (whose samples? which sign?)",
              [(policy, ref, draws, seed) for seed in seeds[:2]],
              lambda answers: all(abs(number(each) - float(kl)) < 6 * error for each in answers)),
        Check(1, "k3 of single draws: never negative, and not always the same",
              [(policy, ref, 1, seed) for seed in seeds],
              lambda answers: min(map(number, answers)) >= -1e-6 and len(set(map(number, answers))) > 1),
    ))


# --- PPO -------------------------------------------------------------------------------------------------------------
def _advantages(generator: torch.Generator) -> Task:
    rewards, values = _drawn(generator, 3, 5), _drawn(generator, 3, 5)
    full, mask = torch.ones(3, 5, dtype=torch.bool), _mask(generator, 3, 5)
    spoilt = torch.where(mask, values, 7.0)
    return Task("advantages", "advantages", (
        Check(2, "advantages and returns of full rows, γ = 1, λ = 0.95", [(rewards, values, full, 1.0, 0.95)],
              equal_to(gae(rewards, values, full, 1.0, 0.95))),
        Check(1, "other γ and λ", [(rewards, values, full, 0.9, 0.7), (rewards, values, full, 0.8, 0.0)],
              equal_to(gae(rewards, values, full, 0.9, 0.7), gae(rewards, values, full, 0.8, 0.0))),
        Check(1, "shorter rows: 0 outside the mask, and nothing of the padding inside",
              [(rewards, spoilt, mask, 1.0, 0.95)], equal_to(gae(rewards, values, mask, 1.0, 0.95))),
    ))


def _silent_bug(generator: torch.Generator) -> Task:
    reward = _drawn(generator, 5)
    reward = (reward - reward.mean()) / reward.std()
    ref_logits = 0.5 * _drawn(generator, 5)
    seed = int(torch.randint(10**6, (1,), generator=generator))
    prices = (0.5, 1.0, 2.0)
    ref = ref_logits.log_softmax(-1)
    optima = [(ref + reward / price).log_softmax(-1) for price in prices]

    def distances(answers: list, others: Sequence[Tensor]) -> list[float]:
        policies = [torch.tensor([number(each) for each in answer], dtype=torch.float64).log_softmax(-1)
                    if isinstance(answer, list) and len(answer) == 5 else torch.full((5,), torch.nan)
                    for answer in answers]
        return [float((policy.exp() * (policy - other)).sum()) for policy, other in
                zip(policies, others, strict=True)]

    def price_acts(answers: list) -> bool:
        *answers, other_seed = answers
        if answers[0] == other_seed:  # the known optimum, without any training
            return False
        spent, best = distances(answers, [ref] * 3), [float((each.exp() * (each - ref)).sum()) for each in optima]
        return spent[0] > spent[1] > spent[2] and spent[2] < best[1] and spent[1] > best[2]

    calls = [*((reward, ref_logits, price, seed) for price in prices), (reward, ref_logits, prices[0], seed + 1)]
    return Task("silent-bug", "train", (
        Check(2, "a higher price must leave the policy nearer to the reference, and another seed draws other samples",
              calls, price_acts),
        Check(2, "training must end near the best policy for its price", calls,
              lambda answers: all(abs(each) < 0.02 for each in distances(answers[:3], optima))),
    ))


# --- evaluation, DPO -------------------------------------------------------------------------------------------------
def _interval_of(gold: list[float], before: list[float]) -> tuple[float, float, float]:
    changes = torch.tensor(gold, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    mean, half = float(changes.mean()), 1.96 * float(changes.std()) / math.sqrt(len(changes))
    return mean, mean - half, mean + half


def _checkpoint(generator: torch.Generator) -> Task:
    calls, expected = [], []
    for best in ("late", "middle"):
        prompts = _drawn(generator, 12)
        shifts = {"sft": 0.0, "early": 0.2, "middle": 0.5, "late": 0.3, "last": 0.8, "hacked": 0.1}
        shifts["late"] = 0.65 if best == "late" else shifts["late"]
        refusals = {name: 0.04 + (0.2 if name == "last" else 0.01) for name in shifts} | {"sft": 0.04}
        proxy = {name: shift + (3.0 if name == "hacked" else 0.0) for name, shift in shifts.items()}
        gold = {name: (prompts + shift + 0.05 * _drawn(generator, 12)).tolist() for name, shift in shifts.items()}
        calls.append(({name: {"gold": gold[name], "proxy": proxy[name], "over_refusal": refusals[name]}
                       for name in shifts}, 0.05))
        expected.append((best, *_interval_of(gold[best], gold["sft"])))
    first = [each[0] for each in expected]

    def part(place: slice) -> Callable[[list], bool]:
        return lambda answers: all(
            isinstance(answer, list) and len(answer) == 4 and same(answer[place], list(right[place]))
            for answer, right in zip(answers, expected, strict=True))

    return Task("checkpoint", "choose", (
        Check(1, "the name of the checkpoint (most gold among those within the limit)", calls,
              lambda answers: all(isinstance(answer, list) and answer and same(answer[0], name)
                                  for answer, name in zip(answers, first, strict=True))),
        Check(1, "its mean change of gold to SFT", calls, part(slice(1, 2))),
        Check(1, "the 95 % interval of the paired differences", calls, part(slice(2, 4))),
    ))


def _dpo(generator: torch.Generator) -> Task:
    logps = [3 * _drawn(generator, 6) - 10 for _ in range(4)]
    far = [torch.tensor([value, 1.0], dtype=torch.float64) for value in (-4000.0, 0.0, 0.0, 0.0)]
    watched = logps[0].clone().requires_grad_()
    dpo_loss(watched, *logps[1:], beta=0.3).sum().backward()
    return Task("dpo", "dpo", (
        Check(2, "the loss of each pair at β = 0.3 and β = 2", [(*logps, 0.3), (*logps, 2.0)],
              equal_to(dpo_loss(*logps, beta=0.3), dpo_loss(*logps, beta=2.0))),
        Check(1, "its gradient by the policy's log-probabilities of the chosen responses", [(*logps, 0.3)],
              equal_to(watched.grad), gradient=0),
        Check(1, "a margin of −4,000 must not give infinity", [(*far, 1.0)], equal_to(dpo_loss(*far, beta=1.0))),
    ))


def _interval(generator: torch.Generator) -> Task:
    low, width, smallest = (torch.rand(3, generator=generator) + 0.5).tolist()
    smallest /= 10
    cases = [
        ((low, low + width, smallest), "better"), ((-low - width, -low, smallest), "worse"),
        ((-low, width, smallest), "cannot be told"), ((-low, smallest / 2, smallest), "cannot be told"),
        ((-smallest / 2, width, smallest), "cannot be told"),
    ]
    small = [
        ((-smallest / 2, smallest / 3, smallest), "too small to matter"),
        ((smallest / 4, smallest / 2, smallest), "too small to matter"),
        ((-smallest / 2, -smallest / 3, smallest), "too small to matter"),
    ]
    return Task("interval", "verdict", tuple(
        Check(points, failure, [arguments for arguments, _ in group], equal_to(*(text for _, text in group)))
        for points, failure, group in (
            (1, "intervals that lie on one side of 0, or cover it and more than what matters", cases),
            (1, "intervals that lie within what is too small to matter", small),
        )))
