"""What the articles say about these settings, the quantity that decides each sentence, and the rule, before the run.

The form is that of `experiments.claims.registry`. A statistic is of one world: part -> its record, see `runs.PARTS`.
"""

import math
from collections.abc import Mapping

import numpy as np

from experiments.claims.arms import Size
from experiments.claims.registry import GOLD, RATIO, Rule, Statistic, World
from experiments.dials.runs import Plan, matched

MIDDLE = slice(1, 4)  # of the five β: three of them, the middle one and its neighbours, as of the three prices
PRICE = Plan().price


# ---- how much a setting matters
def deviation(golds: list[float]) -> float:
    """Standard deviation of gold over runs, SFT-sd."""
    return float(np.std(golds, ddof=1))


def golds(rows: list[Mapping]) -> list[float]:
    """Gold of each run."""
    return [row["gold"] for row in rows]


def beta_matters(world: World) -> float:
    """Standard deviation of DPO's gold over all β minus that over trainings with one β."""
    part = world["beta"]
    return deviation(golds(part["runs"])) - deviation(golds(part["trainings"]))


def untuned(world: World) -> float:
    """Gold of the best of the three middle β minus the mean of the three: what is lost, on average, without tuning."""
    values = golds(world["beta"]["runs"][MIDDLE])
    return max(values) - float(np.mean(values))


def more_sensitive(world: World) -> float:
    """Standard deviation of gold over three β of DPO minus that over three prices of PPO, three times apart each."""
    return deviation(golds(world["beta"]["runs"][MIDDLE])) - deviation(golds(world["price"]["runs"]))


def unlike(world: World) -> float:
    """log of DPO's over PPO's: total variation between trainings over total variation from SFT."""
    dpo, ppo = world["beta"], world["price"]
    return math.log(dpo["apart"] / dpo["moved"]) - math.log(ppo["apart"] / ppo["moved"])


def unsteady(world: World) -> float:
    """log of the standard deviation of gold over trainings, DPO's over PPO's."""
    dpo, ppo = (deviation(golds(world[part]["trainings"])) for part in ("beta", "price"))
    return math.log(dpo / ppo)


# ---- PPO's reference
def end_of(world: World, reference: str) -> Mapping[str, float]:
    """Figures at the end of PPO at the middle price with a reference: "fixed", "moving", "average", or "none", no
    price."""
    if reference == "fixed":
        part = world["price"]
        return next(run for run in part["runs"] if run["price"] == PRICE)
    return world["reference"]["arms"][reference]["end"]


def further(reference: str, other: str) -> Statistic:
    """log of the KL to SFT at the end, PPO with one reference over PPO with another."""
    return lambda world: math.log(end_of(world, reference)["kl"] / end_of(world, other)["kl"])


def better(reference: str) -> Statistic:
    """Gold at the end, PPO with another reference minus PPO with SFT as reference."""
    return lambda world: end_of(world, reference)["gold"] - end_of(world, "fixed")["gold"]


def stopped(reference: str) -> Statistic:
    """Gold of PPO with another reference on its way, at the KL at which PPO with SFT as reference ends, minus that of
    the latter."""
    def statistic(world: World) -> float | None:
        part, fixed = world["reference"], end_of(world, "fixed")
        at = matched([part["sft"], *part["arms"][reference]["path"]], fixed["kl"])
        return at and at["gold"] - fixed["gold"]

    return statistic


# ---- the number of labels
def by_labels(world: World) -> list[dict[str, float | None]]:
    """Number of labels -> gold of DPO and of PPO at the KL at which PPO with as many labels ends; None if that is not
    between two runs of DPO.

    With all labels, PPO and DPO are read from their sweeps at the KL of PPO with the fewest.
    """
    rows = []
    for part in (world["fewest"], world["fewer"]):
        dpo = matched(part["dpo"], part["ppo"]["kl"])
        rows.append({"labels": part["labels"], "kl": part["ppo"]["kl"], "dpo": dpo and dpo["gold"],
                     "ppo": part["ppo"]["gold"]})
    kl = world["fewest"]["ppo"]["kl"]
    return [*rows, {"labels": Size().labels, "kl": kl, "dpo": all_labels(world, "beta"),
                    "ppo": all_labels(world, "price")}]


def few(world: World, arm: str) -> float | None:
    """Gold with the fewest labels, at the KL at which PPO with them ends: "dpo", "ppo" or "relay".

    DPO and the relay are read between two of their runs, never between their start and a run.
    """
    part = world["fewest"]
    at = part["ppo"] if arm == "ppo" else matched(part[arm], part["ppo"]["kl"])
    return at and at["gold"]


def all_labels(world: World, part: str) -> float | None:
    """Gold with all labels at the same KL, between two runs of part "beta" or "price"."""
    at = matched(world[part]["runs"], world["fewest"]["ppo"]["kl"])
    return at and at["gold"]


def with_few(arm: str, other: str) -> Statistic:
    """Gold with the fewest labels, `arm` minus `other` at the same KL."""
    def statistic(world: World) -> float | None:
        first, second = few(world, arm), few(world, other)
        return None if None in (first, second) else first - second

    return statistic


def loses_more(world: World) -> float | None:
    """Gold that is lost with the fewest labels instead of all: DPO's minus PPO's."""
    values = [all_labels(world, "beta"), few(world, "dpo"), all_labels(world, "price"), few(world, "ppo")]
    return None if None in values else (values[0] - values[1]) - (values[2] - values[3])


# ---- DPO's steps and its rejected term
def grown(world: World) -> float:
    """log of KL after the last epoch over KL after two epochs."""
    kl = {row["epoch"]: row["kl"] for row in world["steps"]["rows"]}
    return math.log(kl[max(kl)] / kl[2])


def beyond_promise(world: World) -> float:
    """log of KL after the last epoch over the KL of the KL-regularised optimum at the same β."""
    part = world["steps"]
    return math.log(part["rows"][-1]["kl"] / part["promised"]["kl"])


def fallen(world: World) -> float:
    """Gold after the last epoch minus its largest value at any epoch."""
    values = golds(world["steps"]["rows"])
    return values[-1] - max(values)


def rejected_matters(rejected: str, *, same_kl: bool) -> Statistic:
    """Gold of DPO minus that of the run without the rejected term, at that run's KL or at the same β."""
    def statistic(world: World) -> float | None:
        part = world["beta"]
        run = next(run for run in world["rejected"]["runs"] if run["rejected"] == rejected)
        row = (matched([part["sft"], *part["runs"]], run["kl"]) if same_kl else
               next(row for row in part["runs"] if row["beta"] == run["beta"]))
        return row and row["gold"] - run["gold"]

    return statistic


RULES = (
    # ---- PPO's reference
    Rule("C6", "S3", "因为你需要一个‘不会动的锚点’。",
         "Without an anchor that stands still, PPO at the same price goes further from SFT.",
         "log of the KL to SFT, reference = the policy one block before, over reference = SFT",
         further("moving", "fixed"), "above", RATIO),
    Rule("C6b", "S3", "没有 reference，KL 就失去了意义。",
         "With a reference that follows the policy, the price of KL does as little as no price.",
         "log of the KL to SFT, reference = the policy one block before, over no price",
         further("moving", "none"), "within", RATIO),
    Rule("C6c", "S3", "为什么 PPO 一定需要 Reference Model", "PPO without a fixed reference ends with less gold.",
         "gold at the end, reference = the policy one block before − reference = SFT, SFT-sd",
         better("moving"), "below", GOLD),
    Rule("C6d", "S3", "为什么 PPO 一定需要 Reference Model",
         "Stopped at the same KL, PPO without a fixed reference has less gold.",
         "gold, reference = the policy one block before, on its way − reference = SFT at the end, same KL, SFT-sd",
         stopped("moving"), "below", GOLD),
    Rule("C6e", "S3", "因为你需要一个‘不会动的锚点’。", "A reference that follows slowly is worse than a fixed one.",
         "gold at the end, reference = moving average of the policy − reference = SFT, SFT-sd",
         better("average"), "below", GOLD),
    # ---- stability over trainings
    Rule("C18", "S1", "行为变化可预期", "DPO's change of behaviour is more predictable than PPO's.",
         "log of (total variation between trainings / from SFT), DPO over PPO", unlike, "below", RATIO),
    Rule("C18b", "S1", "DPO 为什么看起来“更稳定”", "DPO's result varies less between trainings than PPO's.",
         "log of the standard deviation of gold over three trainings, DPO over PPO", unsteady, "below", RATIO),
    # ---- the coefficient
    Rule("C22", "S4", "温度参数敏感：β 的选择对性能影响较大", "DPO is sensitive to β.",
         "standard deviation of gold over β = 0.05 to 5 − over trainings with one β, SFT-sd", beta_matters, "above",
         GOLD),
    Rule("C23", "S1", "不再需要 KL 系数调参", "DPO needs no tuning of the KL coefficient.",
         "gold, best of β = 0.15, 0.5, 1.5 − mean of the three, SFT-sd", untuned, "within", GOLD),
    Rule("C23b", "S1", "不再需要 KL 系数调参", "DPO depends less on its coefficient than PPO does.",
         "standard deviation of gold over three β − over three prices of PPO, SFT-sd", more_sensitive, "below", GOLD),
    # ---- the number of labels
    Rule("C28", "S4", "数据效率高：直接使用偏好数据", "With few labels DPO is better than PPO.",
         "gold with 375 labels, DPO − PPO at the same KL, SFT-sd", with_few("dpo", "ppo"), "above", GOLD),
    Rule("C28b", "S4", "数据效率高：直接使用偏好数据", "DPO loses less than PPO when labels are few.",
         "gold lost with 375 labels instead of 6,000, DPO − PPO at the same KL, SFT-sd", loses_more, "below", GOLD),
    Rule("C40", "S0", "数据量很小……二选一，别想着组合。", "With few labels the relay is worse than PPO alone.",
         "gold with 375 labels, relay − PPO at the same KL, SFT-sd", with_few("relay", "ppo"), "below", GOLD),
    Rule("C40b", "S0", "数据量很小……二选一，别想着组合。", "With few labels the relay is worse than DPO alone.",
         "gold with 375 labels, relay − DPO at the same KL, SFT-sd", with_few("relay", "dpo"), "below", GOLD),
    # ---- DPO's steps
    Rule("C31", "S4", "DPO：通过 KL 散度约束保证稳定性", "DPO's KL constraint holds: KL stops growing.",
         "log of KL after six epochs over KL after two, β = 0.5", grown, "within", RATIO),
    Rule("C31b", "S4", "DPO：通过 KL 散度约束保证稳定性", "DPO goes as far as its price of KL allows, and no further.",
         "log of KL after six epochs over that of the KL-regularised optimum at the same β", beyond_promise, "within",
         RATIO),
    Rule("C31c", "S4", "确保策略模型不会为了迎合偏好而产生乱七八糟、不合语法的回答，从而保证了训练的稳定性",
         "Trained on, DPO does not get worse.", "gold after six epochs − its largest at any epoch, SFT-sd", fallen,
         "within", GOLD),
    # ---- DPO's rejected term
    Rule("C51", "S2", "强调……对负样本进行显式梯度更新的重要性", "The gradient of the rejected responses matters.",
         "gold, DPO − DPO whose rejected responses have no gradient, at the latter's KL, SFT-sd",
         rejected_matters("weighs", same_kl=True), "above", GOLD),
    Rule("C51b", "S2", "强调……对负样本进行显式梯度更新的重要性", "The same at the same β.",
         "gold, DPO − DPO whose rejected responses have no gradient, β = 0.5, SFT-sd",
         rejected_matters("weighs", same_kl=False), "above", GOLD),
    Rule("C51c", "S2", "强调……对负样本进行显式梯度更新的重要性",
         "DPO is better than the likelihood of the chosen responses.",
         "gold, DPO − likelihood training on the chosen responses, at the latter's KL, SFT-sd",
         rejected_matters("ignored", same_kl=True), "above", GOLD),
)


def values(rule: Rule, worlds: Mapping[int, World]) -> dict[str, float | None]:
    """World seed as text -> the rule's statistic."""
    return {str(seed): rule.statistic(world) for seed, world in worlds.items()}
