"""The claims of S2 about data, algorithm, reward model and prompts, and their rules, fixed before the run.

A statistic takes a world of `alignkit.evaluate.unpacking.Unpacking`. The *range* of a factor is the mean gold of its
best level minus that of its worst, averaged over the other factors, at the same KL; what it is depends on which levels
were chosen, so each rule names them. A range is never negative, and that of a factor without any effect is the range
of chance, so these rules compare two ranges.
"""

from collections.abc import Callable, Mapping

import numpy as np

from alignkit.evaluate.unpacking import (
    DATA,
    MIXES,
    PARTS,
    REWARDS,
    level_means,
    place_of,
    world_table,
)
from experiments.claims.lab import claim_row
from experiments.claims.registry import GOLD, SHARE, Rule

BAG, SMALL, LARGE = REWARDS
Statistic = Callable[[Mapping], float]


def spread(factor: str, *, without: str | None = None) -> Statistic:
    """The range of a factor in gold. without: a level that is left out."""
    part, axis = place_of(factor)

    def statistic(world: Mapping) -> float:
        means = level_means(world_table(world, part, "gold"), axis)
        kept = [mean for level, mean in zip(PARTS[part][factor], means, strict=True) if level != without]
        return float(np.ptp(kept))

    return statistic


def minus(first: Statistic, second: Statistic) -> Statistic:
    """One statistic minus another."""
    return lambda world: first(world) - second(world)


def algorithm(metric: str) -> Statistic:
    """PPO minus DPO, averaged over all data sets; PPO with the transformer and even prompts."""
    def statistic(world: Mapping) -> float:
        dpo, ppo = level_means(world_table(world, "all", metric), 1)
        return float(ppo - dpo)

    return statistic


def data(first: str, second: str, metric: str) -> Statistic:
    """One data set minus another, averaged over DPO and PPO."""
    def statistic(world: Mapping) -> float:
        means = dict(zip(DATA, level_means(world_table(world, "all", metric), 0), strict=True))
        return float(means[first] - means[second])

    return statistic


def reward(first: str, second: str, metric: str) -> Statistic:
    """PPO with one reward model minus PPO with another, averaged over both mixes of prompts."""
    def statistic(world: Mapping) -> float:
        means = dict(zip(REWARDS, level_means(world_table(world, "ppo", metric), 0), strict=True))
        return float(means[first] - means[second])

    return statistic


def alone(first: str, second: str, figure: str) -> Statistic:
    """A figure of one reward model minus that of another."""
    return lambda world: world["rewards"][first][figure] - world["rewards"][second][figure]


def targeted(metric: str, *models: str) -> Statistic:
    """Targeted minus even prompts, averaged over these reward models."""
    def statistic(world: Mapping) -> float:
        table = world_table(world, "ppo", metric)[[REWARDS.index(model) for model in models]]
        even, aimed = (table[:, MIXES.index(mix)] for mix in MIXES)
        return float((aimed - even).mean())

    return statistic


ORDER = "偏好数据质量最关键……之后是学习算法的差异……再往后是一款更健全的奖励模型……最后……有针对性的提示"
SAFER = "推理、编程和安全性方面，PPO 相对提升更明显"
BETTER = "更大规模（70B），或者采用更多训练数据（Mix RM），确实能让奖励函数更精准，BoN 选择的回答质量提升明显"
AIMED = "当奖励模型足够强（如 70B 规模）且提示分布与数学足够贴近时，测试成绩可以从 46% 提升到 62%"

RULES = (
    Rule("C42", "S2", ORDER, "The data matter more than the algorithm.",
         "range over four data sets − range of DPO and PPO, gold at the same KL, SFT-sd",
         minus(spread("data"), spread("algorithm")), "above", GOLD),
    Rule("C42b", "S2", ORDER, "The algorithm matters more than the reward model.",
         "range of DPO and PPO − range over two transformers as reward models, gold at the same KL, SFT-sd",
         minus(spread("algorithm"), spread("reward model", without=BAG)), "above", GOLD),
    Rule("C42c", "S2", ORDER, "The reward model matters more than the prompts.",
         "range over two transformers as reward models − range of two mixes of prompts, gold at the same KL, SFT-sd",
         minus(spread("reward model", without=BAG), spread("prompts")), "above", GOLD),
    Rule("C42d", "S2", ORDER, "The algorithm matters more than the reward model, a bag of phrases included.",
         "range of DPO and PPO − range over three reward models, gold at the same KL, SFT-sd",
         minus(spread("algorithm"), spread("reward model")), "above", GOLD),
    Rule("C44", "S2", SAFER, "PPO is safer than DPO.",
         "risky failures, PPO − DPO at the same KL, mean over four data sets", algorithm("risky_failures"), "below",
         SHARE),
    Rule("C44b", "S2", SAFER, "PPO is more helpful than DPO (the aspect that holds right answers).",
         "helpful part of gold, PPO − DPO at the same KL, mean over four data sets, SFT-sd", algorithm("helpful"),
         "above", GOLD),
    Rule("C44c", "S2", "但在真值性方面，却平均下降了 2.5 个点", "PPO is less truthful than DPO.",
         "share of prompts with a wrong answer, PPO − DPO at the same KL, mean over four data sets",
         algorithm("wrong_answer"), "above", SHARE),
    Rule("C45", "S2", "“合成 + 多维度标注”往往效果最好", "Labels by aspect are better than overall labels.",
         "gold, labels by aspect − overall labels, as many of both, mean of DPO and PPO, SFT-sd",
         data("multi-aspect", "overall", "gold"), "above", GOLD),
    Rule("C45b", "S2", "即使 HelpSteer 数据量更小，也能胜过大规模人工数据 HH-RLHF",
         "Few clean labels beat many noisy ones.",
         "gold, few labels of an expert − all overall labels, mean of DPO and PPO, SFT-sd",
         data("few, expert", "overall", "gold"), "above", GOLD),
    Rule("C46", "S2", BETTER, "A better reward model picks better responses.",
         "gold of best-of-n, transformer − small transformer, SFT-sd", alone(LARGE, SMALL, "best_of_n"), "above",
         GOLD),
    Rule("C46b", "S2", "但对其他通用任务帮助不大", "A better reward model hardly helps PPO.",
         "gold of PPO at the same KL, transformer − small transformer, SFT-sd", reward(LARGE, SMALL, "gold"), "within",
         GOLD),
    Rule("C46c", "S2", "在综合多任务场景中也不一定能带来大幅度性能跃升",
         "What a better reward model gains in best-of-n, PPO gains only in part.",
         "gain from bag of phrases to transformer in gold, best-of-n − PPO at the same KL, SFT-sd",
         minus(alone(LARGE, BAG, "best_of_n"), reward(LARGE, BAG, "gold")), "above", GOLD),
    Rule("C47", "S2", AIMED, "Targeted prompts help in their domain if the reward model is strong.",
         "gold on ambiguous and risky prompts, targeted − even prompts, transformer, SFT-sd",
         targeted("gold_domain", LARGE), "above", GOLD),
    Rule("C47b", "S2", "如果奖励模型较弱……增益受限", "Targeted prompts help less with a weak reward model.",
         "the same gain, transformer − bag of phrases, SFT-sd",
         minus(targeted("gold_domain", LARGE), targeted("gold_domain", BAG)), "above", GOLD),
    Rule("C47c", "S2", "但对全面多任务性能的增益相对有限", "Targeted prompts hardly help overall.",
         "gold on all prompts, targeted − even prompts, all reward models, SFT-sd", targeted("gold", *REWARDS),
         "within", GOLD),
    Rule("C49", "S2", "部分 Arena 数据在安全性上较差", "Arena-like labels make the policy less safe.",
         "risky failures, arena − overall labels, mean of DPO and PPO", data("arena", "overall", "risky_failures"),
         "above", SHARE),
)


def measured(worlds: Mapping[int, Mapping]) -> list[dict]:
    """Every rule as a row of the record, with the statistic of every world."""
    return [claim_row(rule, "unpacking", {str(seed): rule.statistic(world) for seed, world in worlds.items()})
            for rule in RULES]
