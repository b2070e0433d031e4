"""What to do next with a run: stay in PPO, freeze, switch to DPO, roll back, or repair something first.

`decide` asks a few rules in order; the first that applies decides, and each says why, with its numbers. The rules and
their limits are `DECISION_RULES`, which notebook `advice` prints beside their regret in worlds that they were not tuned
on (`python -m experiments.advice`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from alignkit.evaluate.adviser import FAR, RISKY_FAILURES, chance_warning
from alignkit.formulas.intervals import Estimate, mean_estimate
from alignkit.metrics import is_number

DECISIONS = ("stay in PPO", "freeze now", "switch to DPO", "roll back", "neither: repair first")
MATTERS = 0.05  # SFT-sd: the smallest difference of gold that matters, as in the registry of claims
HOPEFUL = 0.6  # accuracy on held-out pairs: an interval that ends below it leaves no room for a useful reward model
WIDE = 0.4  # SFT-sd: half the interval of a change; wider than most whole gains of PPO in the desk world
TRUSTED = 0.5  # nats per token without gold: about where gold peaks in docs/causes.md (1.2 to 2.0 nats per 3 tokens)
STEP_KL = 0.2  # nats per token to the old policy; healthy runs of the failure museum have 0.04 to 0.06, rate × 10 0.57
USELESS = -0.1  # explained variance, below 0 worse than a constant; healthy runs have 0.6, a dead critic −0.9
IDLE_LOSS = 0.98 * math.log(2)  # a DPO loss that has hardly fallen from ln 2
MOVED = 0.5  # nats between chosen and rejected: by which a policy has moved all the same


@dataclass(frozen=True)
class Decision:
    """What to do next. decision: one of DECISIONS. step: the checkpoint to keep: to freeze, to go back to, or to go on
    from. reasons: sentences with numbers, the deciding one first. unknown: what could not be known, and why."""

    decision: str
    step: str
    reasons: tuple[str, ...]
    unknown: tuple[str, ...]

    def __str__(self) -> str:
        named = {"freeze now": f"freeze {self.step} now", "roll back": f"roll back to {self.step}",
                 "neither: repair first": f"neither: repair first; keep {self.step} meanwhile"}
        unknown = [f"not known: {sentence}" for sentence in self.unknown]
        return "\n".join([named.get(self.decision, f"{self.decision}, from {self.step}"), *self.reasons, *unknown])


class Seen:
    """The facts that the rules read, from a comparison in the order of training.

    score: the metric that judges: gold where all checkpoints have it, else the proxy. held_out: a comparison of the
    same checkpoints whose proxy is the score of another reward model.
    """

    def __init__(self, comparison, stages: Mapping[str, str] | None = None, reward: Mapping | None = None,
                 held_out=None):
        self.comparison, self.held_out, self.reward = comparison, held_out, reward or {}
        self.names = list(comparison.evaluations)
        self.stages = {name: (stages or {}).get(name) or _stage(name, place) for place, name in enumerate(self.names)}
        self.first, self.last = self.names[0], self.names[-1]
        self.before = self.names[-2] if len(self.names) > 1 else None
        metrics = [evaluation.metrics for evaluation in comparison.evaluations.values()]
        self.gold = all("gold_mean" in each for each in metrics)
        self.score = "gold_mean" if self.gold else "proxy_mean" if all("proxy_mean" in each for each in metrics) else ""
        self.judged = comparison if self.gold or held_out is None else held_out

    def value(self, name: str, metric: str) -> float | None:
        found = self.comparison.evaluations[name].metrics.get(metric)
        return None if found is None else found.value

    def change(self, earlier: str | None, later: str, metric: str = "", comparison=None) -> Estimate | None:
        """Change of a metric, by default the score, between two checkpoints; None if one of them lacks it."""
        comparison, metric = comparison or self.comparison, metric or self.score
        if not earlier or earlier == later or any(
                metric not in comparison.evaluations[name].metrics for name in (earlier, later)):
            return None
        return comparison.difference(earlier, later, metric)

    @cached_property
    def best(self) -> str:
        """The checkpoint with the most gold; without gold, with the highest score of the held-out reward model if there
        is one, else the highest proxy; the later of equals."""
        if not self.score:
            return self.last
        of = {name: self.judged.evaluations[name].metrics[self.score].value for name in self.names}
        return max(reversed(self.names), key=of.__getitem__)

    @cached_property
    def behind(self) -> Estimate | None:
        """How much the last checkpoint lies above the best one (below 0), by the score that judges."""
        return self.change(self.best, self.last, comparison=self.judged)

    def kl(self, name: str) -> float | None:
        """KL to the first checkpoint, nats per token; None if unknown."""
        kl, length = self.value(name, "kl_to_sft"), self.value(name, "length")
        return None if kl is None or length is None else kl / (length + 1)

    @property
    def wide(self) -> bool:
        """Whether the change since the checkpoint before is too uncertain to say anything."""
        change = self.change(self.before, self.last)
        return bool(self.gold and change and change.low is not None and not change.excludes_zero
                    and change.high - change.low > 2 * WIDE)


def _stage(name: str, place: int) -> str:
    """What made a checkpoint, by its name; the first is the start, and what is not called dpo is PPO's."""
    return "sft" if place == 0 else "dpo" if name.rpartition("/")[2].lower().startswith("dpo") else "ppo"


# ---- the rules: each returns (decision, checkpoint, reason), or None if it does not apply
Answer = tuple[str, str, str] | None


def reward_at_chance(seen: Seen) -> Answer:
    """Without gold: the reward model cannot be told from a coin. With gold, which shows what training does: only before
    the first training, and only if the reward model's interval ends below 60 %. Repair it, keep the start."""
    warning = chance_warning(seen.reward)
    if not warning or (seen.gold and (seen.last != seen.first or seen.reward["accuracy_labels_ci95"][1] >= HOPEFUL)):
        return None
    return "neither: repair first", seen.first, warning


def made_worse(seen: Seen) -> Answer:
    """The start has a higher score than every checkpoint since, and the last one's interval excludes 0: training does
    the contrary of what it should."""
    if seen.best != seen.first or not seen.behind or not seen.behind.excludes_zero:
        return None
    what = "gold" if seen.gold else "the score of reward models"
    return "neither: repair first", seen.first, (
        f"Training lowers {what}: {seen.last} has {seen.behind:+.2f} of {seen.first}. Look at the sign of the reward, "
        "at whether chosen and rejected are swapped, and at the learning rate.")


def too_few_prompts(seen: Seen) -> Answer:
    """With gold: half the interval of the last change is above 0.4 SFT-sd and contains 0: evaluate on more prompts."""
    if not seen.wide:
        return None
    change = seen.change(seen.before, seen.last)
    times = ((change.high - change.low) / 2 / (2 * MATTERS)) ** 2
    return "neither: repair first", seen.best, (
        f"The evaluation cannot tell {seen.last} from {seen.before} ({change:+.2f} SFT-sd): to see a change of "
        f"{2 * MATTERS:g} it needs about {times:.0f} times as many questions.")


def score_fell(seen: Seen) -> Answer:
    """An earlier checkpoint has a higher score, by 0.05 SFT-sd or more or with an interval that excludes 0: go back to
    the best."""
    if seen.best == seen.last or not seen.behind:
        return None
    if not seen.behind.excludes_zero and not (seen.gold and seen.behind.value <= -MATTERS):
        return None
    what = "gold" if seen.gold else "a held-out reward model's score" if seen.held_out else "proxy"
    proxy = seen.change(seen.best, seen.last, "proxy_mean") if seen.gold or seen.held_out else None
    rose = f", while the proxy changed by {proxy:+.2f}" if proxy else ""
    return "roll back", seen.best, f"{seen.last} has {seen.behind:+.2f} {what} compared with {seen.best}{rose}."


def too_far_without_gold(seen: Seen) -> Answer:
    """Without gold: KL is above 0.5 nats per token, where gold has passed its peak in the desk world: go back to the
    checkpoint nearest to that."""
    kl = seen.kl(seen.last)
    if seen.gold or kl is None or kl <= TRUSTED:
        return None
    near = min((name for name in seen.names if seen.kl(name) is not None),
               key=lambda name: abs(seen.kl(name) - TRUSTED))
    words = (f"{seen.last} is {kl:.2f} nats per token from {seen.first}, further than {TRUSTED:g}, up to where a proxy "
             "was still worth something in the desk world, and there is no gold to show that it still is.")
    return ("freeze now" if near == seen.last else "roll back"), near, words


def still_gaining(seen: Seen) -> Answer:
    """The last stage is the start or PPO, and the score rose since the checkpoint before: by 0.05 SFT-sd of gold or
    more; without gold, the proxy's interval excludes 0 and another such step would not pass 0.5 nats per token."""
    if seen.last == seen.first:
        return "stay in PPO", seen.last, f"{seen.first} is the start, and nothing here speaks against training it."
    change = seen.change(seen.before, seen.last)
    if seen.stages[seen.last] != "ppo" or not change:
        return None
    kl, before = seen.kl(seen.last), seen.kl(seen.before)
    if not seen.gold and kl is not None and before is not None and 2 * kl - before > TRUSTED:
        return None
    if (change.value < MATTERS) if seen.gold else (change.low is None or change.low <= 0):
        return None
    return "stay in PPO", seen.last, (f"{'Gold' if seen.gold else 'The proxy'} still rises: {change:+.2f} from "
                                      f"{seen.before} to {seen.last}{_price(seen, change)}.")


def flat_with_gold(seen: Seen) -> Answer:
    """With gold, PPO gains no more: DPO on preference pairs is the next thing to try, because an evaluation with gold
    shows whether to keep it."""
    if not seen.gold or seen.stages[seen.last] != "ppo" or seen.last == seen.first:
        return None
    change = seen.change(seen.before, seen.last)
    return "switch to DPO", seen.last, f"Gold has stopped rising: {change:+.2f} from {seen.before} to {seen.last}."


def otherwise(seen: Seen) -> Answer:
    """Nothing asks for more training: freeze the last checkpoint."""
    return "freeze now", seen.last, f"Nothing here speaks for more training or against {seen.last}."


DECISION_RULES: tuple[Callable[[Seen], Answer], ...] = (
    reward_at_chance, made_worse, too_few_prompts, score_fell, too_far_without_gold, still_gaining, flat_with_gold,
    otherwise)


def decide(evaluated, *, stages: Mapping[str, str] | None = None, reward: Mapping | None = None, held_out=None,
           history: Mapping[str, Sequence[Mapping]] | None = None, seconds: Mapping[str, float] | None = None
           ) -> Decision:
    """What to do next with a run: the first of DECISION_RULES that applies decides.

    evaluated: a Comparison whose checkpoints are in the order of training, or one Evaluation. stages: what made each
    checkpoint, "sft", "ppo" or "dpo"; by default the first is the start, a name that begins with dpo is DPO's, and the
    others are PPO's. reward: the result of `reward_report`, or the content of RUN/reward/results.json. held_out: a
    Comparison of the same checkpoints whose proxy is the score of another reward model. history: "ppo" and "dpo" ->
    rows of metrics.jsonl. seconds: of training up to each checkpoint.

    Raises ValueError if `held_out` has other checkpoints.
    """
    if not hasattr(evaluated, "evaluations"):
        evaluated = _Alone(evaluated)
    if held_out is not None and list(held_out.evaluations) != list(evaluated.evaluations):
        raise ValueError(f"held_out has the checkpoints {', '.join(held_out.evaluations)}, expected "
                         f"{', '.join(evaluated.evaluations)}")
    seen = Seen(evaluated, stages, reward, held_out)
    decision, step, reason = next(answer for rule in DECISION_RULES if (answer := rule(seen)))
    more = [*_observations(seen, seconds or {}), *warnings_of(history or {})]
    return Decision(decision, step, (reason, *more), tuple(_unknown(seen, history or {})))


class _Alone:
    """One evaluation as a comparison with itself."""

    def __init__(self, evaluation):
        self.evaluations = {evaluation.name or "this checkpoint": evaluation}


# ---- what is said beside the decision
def _price(seen: Seen, change: Estimate) -> str:
    """The gain for each nat of KL that it cost, in words; "" if KL did not rise."""
    kl = seen.change(seen.before, seen.last, "kl_to_sft")
    if not kl or kl.low is None or kl.low <= 0 or change.low is None:
        return ""
    return f", {Estimate(*(end / kl.value for end in (change.value, change.low, change.high))):+.2f} for a nat of KL"


def _observations(seen: Seen, seconds: Mapping[str, float]) -> list[str]:
    """Sentences about what the decision rests on."""
    said = []
    accuracy, pairs = seen.reward.get("accuracy_labels"), seen.reward.get("accuracy_labels_ci95")
    if is_number(accuracy) and isinstance(pairs, list) and len(pairs) == 2 and all(map(is_number, pairs)):
        said.append(f"The reward model ranks {Estimate(accuracy, *pairs):.1%} of held-out pairs as their labels do.")
    change = seen.change(seen.before, seen.last)
    spent = seconds.get(seen.last, 0) - seconds.get(seen.before, 0) if seen.before in seconds else 0
    if change and spent > 0:
        minutes = Estimate(*(None if end is None else end * 60 / spent for end in
                             (change.value, change.low, change.high)))
        said.append(f"The last step took {spent:.0f} s: {minutes:+.2f} {seen.score.removesuffix('_mean')} a minute.")
    risky, refused = (seen.change(seen.before, seen.last, f"{name}_rate") for name in ("risky_failure", "over_refusal"))
    if risky and refused:
        said.append(f"Since {seen.before}: risky failures {risky:+.1%}, over-refusal {refused:+.1%}."
                    + " Obedient rather than better." * (refused.low is not None and refused.low > 0
                                                         and risky.value > -refused.value))
    now = seen.comparison.evaluations[seen.last].metrics.get("risky_failure_rate")
    if now and now.low is not None and now.low > RISKY_FAILURES:
        said.append(f"Risky failures of {seen.last} are {now:.1%}, above {RISKY_FAILURES:.0%}.")
    gap = _gap(seen)
    if gap:
        said.append(gap)
    stable = stability(seen.comparison.evaluations, seen.score.removesuffix("_mean"))
    if stable and len(seen.names) > 1:
        said.append(f"Taken one draw of responses at a time, {stable[1]} of {stable[2]} would choose {stable[0]}.")
    return said


def _gap(seen: Seen) -> str:
    """How far the proxy has risen beyond what judges it, in words."""
    other = seen.comparison if seen.gold else seen.held_out
    proxy = seen.change(seen.first, seen.last, "proxy_mean")
    judged = other and seen.change(seen.first, seen.last, "gold_mean" if seen.gold else "proxy_mean", other)
    if not proxy or not judged:
        return ""
    return (f"Since {seen.first} the proxy changed by {proxy:+.2f}, "
            f"{'gold' if seen.gold else 'a held-out reward model'} by {judged:+.2f}.")


def stability(evaluations: Mapping, column: str) -> tuple[str, int, int] | None:
    """How stable the choice of a checkpoint is over evaluation seeds: each draw of one response to every prompt chooses
    the checkpoint with the highest mean. Returns the checkpoint chosen most often, how often, and the number of draws;
    None if there are no two draws or the evaluations lack the column."""
    tables = []
    for evaluation in evaluations.values():
        values = getattr(evaluation, "columns", {}).get(column)
        if values is None or evaluation.set.samples < 2:
            return None
        tables.append(np.asarray(values, dtype=float).reshape(-1, evaluation.set.samples).mean(0))
    chosen = np.argmax(tables, 0)
    votes = np.bincount(chosen, minlength=len(tables))
    return list(evaluations)[int(votes.argmax())], int(votes.max()), len(chosen)


def _quarter(rows: Sequence[Mapping], name: str, number: int) -> list[float]:
    """The values of a statistic in the first (1) to last (4) quarter of the rows that have it."""
    values = [row[name] for row in rows if is_number(row.get(name))]
    part = max(1, len(values) // 4)
    return values[(number - 1) * part : number * part] if number < 4 else values[-part:]


def warnings_of(history: Mapping[str, Sequence[Mapping]]) -> list[str]:
    """What the logs of PPO and DPO give away: sentences, [] if nothing.

    history: "ppo" and "dpo" -> rows of metrics.jsonl. Of PPO: KL to the old policy above 0.2 nats per token in the
    first quarter; explained variance below −0.1 in the last; whether the score still rises, last quarter against the
    one before. Of DPO: a loss that stays near ln 2 while the policy moves by half a nat.
    """
    said, ppo, dpo = [], history.get("ppo", ()), history.get("dpo", ())
    if (early := _quarter(ppo, "policy/approxkl_avg", 1)) and np.mean(early) > STEP_KL:
        said.append(f"Early iterations move the policy by {np.mean(early):.2f} nats per token, above {STEP_KL:g}: the "
                    "learning rate is too high, or the batch too small.")
    if (late := _quarter(ppo, "val/explained_variance", 4)) and np.mean(late) < USELESS:
        said.append(f"The critic explains {np.mean(late):.2f} of the variance of returns, less than a constant: is it "
                    "trained?")
    third, fourth = (_quarter(ppo, "objective/scores", number) for number in (3, 4))
    if len(ppo) >= 8 and len(third) == len(fourth) > 1:
        rise = mean_estimate([later - earlier for earlier, later in zip(third, fourth, strict=True)])
        said.append(f"In the last quarter of PPO's iterations the score changed by {rise:+.2f}"
                    + (": it falls." if rise.high is not None and rise.high < 0 else "."))
    loss, chosen, rejected = (_quarter(dpo, name, 4) for name in ("loss", "logps/chosen_shift",
                                                                 "logps/rejected_shift"))
    if loss and chosen and np.mean(loss) > IDLE_LOSS and (gap := np.mean(chosen) - np.mean(rejected)) > MOVED:
        said.append(f"DPO's loss is still {np.mean(loss):.3f}, near ln 2, though chosen and rejected have moved apart "
                    f"by {gap:.1f} nats: beta is so small that nothing pays for KL.")
    return said


def _unknown(seen: Seen, history: Mapping) -> list[str]:
    """What could not be known, and why."""
    said = []
    if not seen.gold:
        judge = "another reward model, which may share the proxy's errors" if seen.held_out else "the proxy alone"
        said.append(f"whether people would agree: there is no gold reward, and {judge} judges. Have a sample of each "
                    "checkpoint labelled.")
        far = seen.value(seen.last, "kl_to_sft")
        if far is not None and far > FAR:
            said.append(f"whether the proxy still means anything at {far:.1f} nats per response.")
    if not is_number(seen.reward.get("accuracy_labels")):
        said.append("how good the reward model is: there is no report on held-out pairs.")
    if "risky_failure_rate" not in seen.comparison.evaluations[seen.last].metrics:
        said.append("whether risky prompts are answered or harmless ones refused: there are no behaviour classes.")
    if seen.last == seen.first:
        said.append("what training does: there is one checkpoint.")
    return said
