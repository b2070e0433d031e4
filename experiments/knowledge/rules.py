"""The claims about knowledge, other abilities, ranking, repair and messiness, with rules fixed before the run.

As in `experiments.claims.registry`: a claim says that its statistic is above (or below) 0 by more than a margin, or
within it. Margins: 0.05 for chances of a right answer, otherwise those of the registry. A statistic is computed from
the record of one world: {"facts": arm -> marks, "levels", "path", "wrong", "undo"}, see `facts.py` and `undoing.py`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from alignkit.evaluate.knowledge import pass_at_k, share_of_right
from experiments.claims.registry import GOLD, RATIO, SHARE, Rule
from experiments.knowledge.undoing import steps_until

CHANCE = 0.05  # smallest difference in the chance of a right answer that matters

World = Mapping[str, Mapping]
Statistic = Callable[[World], float | None]


@dataclass(frozen=True)
class KnowledgeRule(Rule):
    """A claim before it is measured; the statistic is of a world's record of this experiment.

    needs: the parts of a world that the statistic reads, as in `__main__.parts_of`.
    """

    needs: tuple[str, ...] = ("level-0.5",)


# ---- statistics of a world
def taught(arm: str, group: str) -> Statistic:
    """Chance of a right answer to questions about the facts of a group, `arm` − SFT."""
    def statistic(world: World) -> float:
        return float(np.mean(world["facts"][arm]["right"][group]) - np.mean(world["facts"]["SFT"]["right"][group]))

    return statistic


def reached(arm: str, group: str, k: int) -> Statistic:
    """pass@k on questions about the facts of a group, `arm` − SFT."""
    def statistic(world: World) -> float:
        return pass_at_k(world["facts"][arm]["right"][group], k) - pass_at_k(world["facts"]["SFT"]["right"][group], k)

    return statistic


def surer(arm: str, group: str) -> Statistic:
    """Share of right ones among answers, `arm` − SFT."""
    return lambda world: (share_of_right(world["facts"][arm], group) - share_of_right(world["facts"]["SFT"], group))


def elsewhere(arm: str, other: str = "SFT") -> Statistic:
    """Chance of the right response in the second task, `arm` − `other`."""
    return lambda world: float(np.mean(world["facts"][arm]["side"]) - np.mean(world["facts"][other]["side"]))


def advantage(level: float) -> Statistic:
    """Gold of PPO − gold of DPO at the same KL and labels, at a level of messiness; None if one missed the KL."""
    def statistic(world: World) -> float | None:
        rows = [world["levels"][f"{level:g}"][name] for name in ("PPO", "DPO")]
        return None if None in rows else rows[0]["gold"] - rows[1]["gold"]

    return statistic


def growing(world: World) -> float | None:
    """PPO's advantage with the messiest demonstrators − with the least messy ones."""
    ends = [advantage(level)(world) for level in (1.0, 0.0)]
    return None if None in ends else ends[0] - ends[1]


def along(metric: str, start: int | None = 0) -> Statistic:
    """A figure at the end of DPO's path − at its row `start`; None: at the row with the most gold."""
    def statistic(world: World) -> float:
        path = world["path"]
        row = max(path, key=lambda each: each["gold"]) if start is None else path[start]
        return path[-1][metric] - row[metric]

    return statistic


def repaired(path: str, metric: str, other: str | None = None) -> Statistic:
    """A figure at the end of a repair − at the end of another's repair, or, without `other`, of SFT at its start."""
    def statistic(world: World) -> float:
        end = world["wrong"][path][-1][metric]
        return end - (world["wrong"]["SFT"][0] if other is None else world["wrong"][other][-1])[metric]

    return statistic


def firmer(world: World) -> float | None:
    """log of the steps that bring DPO's policy back to SFT's risky failures over those that bring PPO's back."""
    level = world["undo"]["SFT"][0]
    steps = [steps_until(world["undo"][name], level) for name in ("DPO", "PPO")]
    return None if None in steps or min(steps) <= 0 else math.log(steps[0] / steps[1])


REWARDS, WRONG = ("level-0.5", "rewards-0.5"), ("wrong-0.5",)
RULES = (
    # ---- knowledge
    KnowledgeRule("C3", "S3", "它不会扩展模型的知识边界，只会重排“行为概率”。",
                  "PPO adds no knowledge: facts that SFT guesses stay guesses.",
                  "chance of a right answer, guessed facts, PPO − SFT", taught("PPO", "guessed"), "within", CHANCE),
    KnowledgeRule("C3b", "S3", "PPO 不会：加新知识", "PPO adds no fact that SFT never says.",
                  "chance of a right answer, silent facts, PPO on gold − SFT", taught("PPO, gold", "silent"), "within",
                  CHANCE, REWARDS),
    KnowledgeRule("C3c", "S3", "因为 PPO 的更新信号根本不是知识型的",
                  "With a reward model that never saw these facts, PPO does not teach them.",
                  "chance of a right answer, guessed facts, PPO on an ignorant reward model − SFT",
                  taught("PPO, ignorant", "guessed"), "within", CHANCE, REWARDS),
    KnowledgeRule("C3d", "S3", "它只是在做一件事：重新拉伸或压缩输出分布。",
                  "PPO narrows what is reached: in 64 tries SFT finds more facts that it hardly ever says.",
                  "pass@64, silent facts, PPO − SFT", reached("PPO", "silent", 64), "below", CHANCE),
    KnowledgeRule("C16", "S3", "PPO 是“行为对齐工具”，不是“性能优化工具”",
                  "PPO does not raise accuracy, not even on facts that SFT knows.",
                  "chance of a right answer, known facts, PPO − SFT", taught("PPO", "known"), "within", CHANCE),
    KnowledgeRule("C16b", "S3", "提升准确率……几乎一定会失望",
                  "When it answers, the model is right no more often after PPO.",
                  "share of right ones among answers, known facts, PPO − SFT", surer("PPO", "known"), "within", CHANCE),
    KnowledgeRule("C48", "S2", "对“知识准确”帮助不大", "Preference tuning (DPO) adds no factual knowledge.",
                  "chance of a right answer, guessed facts, DPO − SFT", taught("DPO", "guessed"), "within", CHANCE),
    KnowledgeRule("C48b", "S2", "对“知识准确”帮助不大", "Nor does it add facts that SFT never says.",
                  "chance of a right answer, silent facts, DPO − SFT", taught("DPO", "silent"), "within", CHANCE),
    KnowledgeRule("C10", "S1", "某些能力被压扁", "PPO flattens an ability that no preference is about.",
                  "chance of the right response in a second task, PPO − SFT", elsewhere("PPO"), "below", CHANCE),
    KnowledgeRule("C10b", "S1", "某些能力被压扁", "Demonstrations mixed into PPO keep that ability.",
                  "chance of the right response in a second task, PPO with demonstrations − PPO",
                  elsewhere("PPO with demonstrations", "PPO"), "above", CHANCE, REWARDS),
    # ---- ranking
    KnowledgeRule("C32", "S1", "DPO 更像是“偏好排序的稳定压缩器”", "DPO teaches the ranking of held-out pairs.",
                  "share of held-out pairs whose chosen response is likelier, end of DPO's path − SFT", along("ranks"),
                  "above", CHANCE, WRONG),
    KnowledgeRule("C32b", "S1", "我只是在它已有的认知里，帮它排个序", "A policy that ranks better is better.",
                  "gold, end of DPO's path − its best point, while the training loss falls, SFT-sd",
                  along("gold", None), "within", GOLD, WRONG),
    KnowledgeRule("C32c", "S1", "帮它排个序", "DPO turns over most pairs that SFT ranks wrongly.",
                  "share of pairs that SFT ranks wrongly and DPO rightly, end of the path − 0.5",
                  lambda world: world["path"][-1]["corrected"] - 0.5, "above", 0.0, WRONG),
    # ---- a wrong direction
    KnowledgeRule("C36", "S0", "把一个“暂时性的错误方向”，永久写进模型行为里。",
                  "DPO on a wrong direction makes it permanent.",
                  "risky failures after wrong PPO, wrong DPO and repair − SFT's before",
                  repaired("PPO, then DPO", "risky_failures"), "above", SHARE, WRONG),
    KnowledgeRule("C36b", "S0", "DPO 是定型工具，一旦定型，回滚更难。",
                  "The same repair helps less if DPO came in between.",
                  "risky failures after repair, wrong PPO then wrong DPO − wrong PPO alone",
                  repaired("PPO, then DPO", "risky_failures", "PPO"), "above", SHARE, WRONG),
    KnowledgeRule("C36c", "S0", "把一个“暂时性的错误方向”，永久写进模型行为里。",
                  "After the repair the policy is worse than if it had never gone wrong.",
                  "gold after repair, wrong PPO then wrong DPO − never wrong, SFT-sd",
                  repaired("PPO, then DPO", "gold", "SFT"), "below", GOLD, WRONG),
    KnowledgeRule("C9b", "S0", "一旦定型，回滚更难", "A DPO policy is harder to undo than a PPO policy at the same KL.",
                  "log of the steps on contrary demonstrations back to SFT's risky failures, DPO over PPO", firmer,
                  "above", RATIO),
    # ---- messiness
    KnowledgeRule("C41", "S1", "如果答案是 会 → PPO 更合适", "From a messy model PPO is the better choice.",
                  "gold, PPO − DPO at the same KL and labels, messiness 1, SFT-sd", advantage(1.0), "above", GOLD,
                  ("level-1",)),
    KnowledgeRule("C41b", "S1", "如果答案是 不会，只是细节不理想 → DPO 更合适",
                  "From an orderly model DPO is the better choice.",
                  "gold, PPO − DPO at the same KL and labels, messiness 0, SFT-sd", advantage(0.0), "below", GOLD,
                  ("level-0",)),
    KnowledgeRule("C41c", "S1", "一个非常重要的判断点：模型现在“乱不乱”",
                  "The messier the model, the larger PPO's advantage.",
                  "gold, PPO − DPO at the same KL and labels, messiness 1 − messiness 0, SFT-sd", growing, "above",
                  GOLD, ("level-0", "level-1")),
)
