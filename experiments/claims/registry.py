"""The claims: what the articles say, the quantity that decides it, and the rule, all fixed before the run.

S0 is "Can PPO and DPO be used together?", S1 "PPO or DPO?", S2 the summary of *Unpacking DPO and PPO* (Ivison 2024),
S3 "What PPO fine-tuning is", S4 "PPO and DPO in LLM training". A claim says that its statistic is above (or below) 0 by
more than a margin, or within it. Margins: 0.05 SFT-sd of gold, 0.02 for shares, 0.05 for agreements, 0.05 nats, log
1.25 for ratios.

A statistic comes from the arms at matched labels and KL (`order.py`), or from a reading of the notebooks that
`experiments.readings` recorded in the same way for every world. The other labs (`__main__.LABS`) have rules of their
own, and their claims stand in the same record.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

GOLD, SHARE, AGREEMENT, NATS, RATIO = 0.05, 0.02, 0.05, 0.05, math.log(1.25)

World = Mapping[str, Mapping]  # arm -> the record of `order.follow`
Statistic = Callable[[World], float | None]


@dataclass(frozen=True)
class Rule:
    """A claim before it is measured; the fields of `alignkit.evaluate.claims.Claim`. statistic: of a world's arms, or
    the name of a reading."""

    name: str
    source: str
    original: str
    english: str
    quantity: str
    statistic: Statistic | str
    side: str
    margin: float

    @property
    def experiment(self) -> str:
        """What measures it."""
        return f"reading {self.statistic}" if isinstance(self.statistic, str) else "arms"


# ---- statistics of a world's arms; None where an arm was not run or did not reach the KL
def reached(world: World, arm: str) -> Mapping | None:
    """The arm's figures at the common KL."""
    return world[arm]["at"] if arm in world else None


def difference(arm: str, other: str, metric: str) -> Statistic:
    """`metric` of `arm` minus that of `other` at the same KL."""
    def statistic(world: World) -> float | None:
        rows = [reached(world, name) for name in (arm, other)]
        return None if None in rows else rows[0][metric] - rows[1][metric]

    return statistic


def change(arm: str, metric: str) -> Statistic:
    """`metric` of `arm` minus SFT's."""
    def statistic(world: World) -> float | None:
        row = reached(world, arm)
        return None if row is None else row[metric] - world[arm]["start"][metric]

    return statistic


def longer_way(arm: str, other: str = "PPO") -> Statistic:
    """log of the arm's detour over the other's: the path of the behaviour distribution over its net displacement."""
    return lambda world: math.log(world[arm]["detour"] / world[other]["detour"])


def boundary(arm: str) -> Statistic:
    """KL of ambiguous and risky prompts minus KL of benign and look-alike prompts, nats a response."""
    def statistic(world: World) -> float | None:
        row = reached(world, arm)
        return row and (row["kl_ambiguous"] + row["kl_risky"] - row["kl_benign"] - row["kl_look-alike"]) / 2

    return statistic


def cost(arm: str, other: str) -> Statistic:
    """log of the arm's CPU seconds over the other's."""
    def statistic(world: World) -> float | None:
        rows = [reached(world, name) for name in (arm, other)]
        return None if None in rows else math.log(rows[0]["seconds"] / rows[1]["seconds"])

    return statistic


RELAY, REVERSE, FRESH = "PPO, then DPO", "DPO, then PPO", "PPO, then DPO on fresh pairs"
SUM, ALTERNATING = "PPO + DPO", "alternating, four blocks"
LONGER = {"DPO": "DPO, six epochs", RELAY: "PPO, then DPO, six epochs"}  # arm -> the same with more epochs of DPO

RULES = (
    # ---- what PPO does
    Rule("C1", "S3", "模型在“模糊、边界、灰色问题”上的变化最大。", "PPO changes boundary prompts most.",
         "KL of ambiguous and risky prompts − KL of the others, PPO, nats", boundary("PPO"), "above", NATS),
    Rule("C2", "S3", "边界问题，分布本来就发散", "They move most because SFT's distribution is dispersed there.",
         "Spearman of PPO's KL by prompt: with SFT's entropy − with the variance of the reward",
         lambda world: world["PPO"]["moved_by_entropy"] - world["PPO"]["moved_by_variance"], "above", 0.05),
    Rule("C4", "S0", "PPO 往往会让模型：更频繁拒答", "PPO makes the model refuse more often.",
         "share of harmless prompts refused, PPO − SFT", change("PPO", "over_refusal"), "above", SHARE),
    Rule("C5", "S3", "KL 约束是 PPO 能用的前提条件。", "Without the KL constraint PPO goes wrong.",
         "gold, PPO without a price − with it, SFT-sd", "03b.without_kl_gold", "below", GOLD),
    Rule("C7", "S1", "reward 被模型 hack", "The model hacks the reward.",
         "gold at the end − at its peak while the proxy rises, PPO at a low price, SFT-sd", "03b.gold_falls", "below",
         GOLD),
    Rule("C8", "S1", "前几轮训练，行为变化很大……甚至短期效果变差", "PPO is worse at first, before it gets better.",
         "least gold on PPO's way − SFT's gold, SFT-sd",
         lambda world: world["PPO"]["least_gold"] - world["PPO"]["start"]["gold"], "below", GOLD),
    Rule("C12", "S4", "通过裁剪机制保证训练稳定性", "The clip keeps the policy near the one that sampled.",
         "KL(π_old ‖ π), without the clip − with it, nats a token", "03a.clip_holds_to_old", "above", NATS),
    Rule("C12b", "S4", "策略更新幅度被限制在 ±20% 以内", "The clip bounds each token's ratio to 1 ± 0.2.",
         "share of tokens outside 1 ± 0.2 after an iteration", "03a.clip_is_no_bound", "within", SHARE),
    Rule("C13", "S4", "减少方差：相比直接使用奖励，优势函数提供了更稳定的学习信号",
         "A baseline lowers the variance of the gradient.",
         "squared distance to the exact gradient, REINFORCE − mean baseline, |∇J|²", "10.mean_baseline", "above", 0.0),
    Rule("C14", "S3", "PPO 需要选择空间，而不是单一答案。", "PPO needs several candidates for each prompt.",
         "objective after − before 8 iterations with one response a prompt, SFT-sd", "10.ppo_one_sample", "within",
         GOLD),
    Rule("C14b", "S3", "responses = policy_model.generate(prompt, n=4)",
         "Four candidates a prompt are better than one, at the same number of responses.",
         "proxy, RLOO with four responses a prompt − PPO with one at the same KL, SFT-sd",
         difference("RLOO", "PPO", "proxy"), "above", GOLD),
    Rule("C15", "S4", "PPO……训练复杂度高", "PPO costs more computation than DPO.",
         "log of CPU seconds of training, PPO over DPO", cost("PPO", "DPO"), "above", RATIO),
    Rule("C9", "S1", "这些变化，往往是不可逆的。", "What training changed cannot be undone.",
         "risky failures of the relay's policy, after − before 16 steps on 32 contrary demonstrations", "05.undone",
         "within", 0.25),
    # ---- what DPO does
    Rule("C17", "S1", "如果模型本身行为分布就很混乱，DPO 并不能“救你一把”。",
         "DPO cannot rescue a messy model: it leaves more risky failures than PPO.",
         "risky failures, DPO − PPO at the same KL and labels", difference("DPO", "PPO", "risky_failures"), "above",
         SHARE),
    Rule("C17b", "S1", "DPO 那很可能：学不到有效信号", "From a messy model DPO learns no useful signal.",
         "gold, DPO − SFT, SFT-sd", change("DPO", "gold"), "within", GOLD),
    Rule("C19", "S0", "DPO 往往会让模型：输出更一致", "DPO makes the outputs more consistent than SFT.",
         "paraphrase agreement, DPO − SFT", change("DPO", "paraphrase_agreement"), "above", AGREEMENT),
    Rule("C19b", "S0", "DPO 往往会让模型：输出更一致、选择更集中", "DPO makes them more consistent than PPO does.",
         "paraphrase agreement, DPO − PPO at the same KL", difference("DPO", "PPO", "paraphrase_agreement"), "above",
         AGREEMENT),
    Rule("C20", "S1", "对边界问题影响有限", "DPO hardly affects boundary prompts.",
         "KL of ambiguous and risky prompts − KL of the others, DPO, nats", boundary("DPO"), "below", NATS),
    Rule("C21", "S4", "β……值越大更新越激进", "A larger β makes DPO more aggressive.",
         "KL at β = 0.05 − KL at β = 5, nats", "05.beta_is_a_price", "below", NATS),
    Rule("C24", "S4", "提高 log π(y_w|x)（增加生成 Chosen 回答的概率）", "DPO makes the chosen responses likelier.",
         "log π − log π_ref of chosen responses, DPO from SFT, nats a response",
         lambda world: (at := reached(world, "DPO")) and at["chosen_shift"], "above", NATS),
    Rule("C25", "S4", "损失值 Loss 也就很小。这表示模型已经学习得很好了", "A lower DPO loss means a better policy.",
         "gold, last epoch − first, while the loss falls, SFT-sd", "05.gold_falls_with_the_loss", "above", GOLD),
    Rule("C26", "S4", "探索能力有限：可能无法探索到远离参考策略的新策略", "DPO cannot get far from its reference.",
         "KL to the reference, DPO with β = 0.1 − PPO with β = 0.5, nats", "08.dpo_moves_further", "below", NATS),
    Rule("C29", "S4", "在理论上与基于奖励的 RLHF 等价", "DPO ends where the KL-regularised optimum is, as PPO does.",
         "KL to the optimum, PPO − DPO at the same β, nats", "08.ppo_nearer", "within", NATS),
    Rule("C29b", "S4", "在理论上与基于奖励的 RLHF 等价", "At the same KL, DPO has as much gold as PPO, or more.",
         "gold, DPO − PPO at the same KL and labels, SFT-sd", difference("DPO", "PPO", "gold"), "above", 0.0),
    Rule("C30", "S4", "DPO：单轮训练，计算效率更高", "DPO costs less computation than PPO (the measurement of C15).",
         "log of CPU seconds of training, DPO over PPO", cost("DPO", "PPO"), "below", RATIO),
    Rule("E30", "S3", "你无法用 SFT 教会模型“偏好”。", "SFT cannot teach a preference.",
         "gold, likelihood training on the best of n − SFT, SFT-sd", change("best of n, distilled", "gold"), "within",
         GOLD),
    Rule("E22", "S4", "避免了奖励建模的误差", "DPO avoids the error of the reward model.",
         "share ranked rightly on SFT's pairs, reward model − DPO's implicit reward", "05.implicit_reward_behind",
         "below", SHARE),
    # ---- combining them
    Rule("C33", "S0", "模型行为却开始“左右横跳”", "With the sum of the losses the behaviour oscillates.",
         "log of the detour of behaviour, sum over PPO", longer_way(SUM), "above", RATIO),
    Rule("C33b", "S0", "如果你把它们当成两个 loss 往一起加，大概率会翻车。", "The sum ends worse than PPO alone.",
         "gold, sum − PPO at the same KL and labels, SFT-sd", difference(SUM, "PPO", "gold"), "below", GOLD),
    Rule("C33c", "S0", "优化目标互相拉扯，训练信号变得混乱", "The two gradients pull in opposite directions.",
         "mean cosine of PPO's and DPO's gradients in the sum", lambda world: world[SUM]["cosine"], "below", 0.0),
    Rule("C33d", "S0", "如果你把它们当成两个 loss 往一起加，大概率会翻车。", "The sum ends worse than the relay.",
         "gold, sum − relay at the same KL and labels, SFT-sd", difference(SUM, RELAY, "gold"), "below", GOLD),
    Rule("C34", "S0", "PPO 一个 epoch，DPO 一个 epoch 交替", "With alternation the behaviour oscillates.",
         "log of the detour of behaviour, alternating every four blocks over PPO", longer_way(ALTERNATING), "above",
         RATIO),
    Rule("C34b", "S0", "PPO 一个 epoch，DPO 一个 epoch 交替……这种“硬拼”", "Alternation ends worse than PPO alone.",
         "gold, alternating every four blocks − PPO at the same KL and labels, SFT-sd",
         difference(ALTERNATING, "PPO", "gold"), "below", GOLD),
    Rule("C34c", "S0", "PPO 一个 epoch，DPO 一个 epoch 交替……这种“硬拼”", "Alternation ends worse than the relay.",
         "gold, alternating every four blocks − relay at the same KL and labels, SFT-sd",
         difference(ALTERNATING, RELAY, "gold"), "below", GOLD),
    Rule("C35", "S0", "还是只是“学会不说话”", "Together, they teach the model not to speak.",
         "share of harmless prompts refused, sum − PPO at the same KL", difference(SUM, "PPO", "over_refusal"),
         "above", SHARE),
    Rule("C37", "S0", "顺序一旦错，风险会被放大", "The reverse order, DPO then PPO, has more risky failures.",
         "risky failures, reverse − relay at the same KL and labels", difference(REVERSE, RELAY, "risky_failures"),
         "above", SHARE),
    Rule("C37b", "S0", "PPO 和 DPO 的正确关系，不是并行，而是接力。", "The relay has more gold than the reverse order.",
         "gold, relay − reverse at the same KL and labels, SFT-sd", difference(RELAY, REVERSE, "gold"), "above",
         GOLD),
    Rule("C39", "S0", "让模型在相似场景下更一致", "After PPO, DPO brings more consistency than more PPO.",
         "paraphrase agreement, relay − PPO at the same KL", difference(RELAY, "PPO", "paraphrase_agreement"),
         "above", AGREEMENT),
    Rule("C39b", "S0", "降低 PPO 继续训练的风险", "After PPO, DPO has fewer risky failures than more PPO.",
         "risky failures, relay − PPO at the same KL", difference(RELAY, "PPO", "risky_failures"), "below", SHARE),
    Rule("C11", "S0", "替代 PPO，而不是叠加 PPO", "When PPO's gains shrink, DPO brings more gold than more PPO.",
         "gold, relay − PPO at the same KL and labels, SFT-sd", difference(RELAY, "PPO", "gold"), "above", GOLD),
    Rule("C11b", "S0", "替代 PPO，而不是叠加 PPO", "The same with DPO on fresh pairs of the frozen policy.",
         "gold, relay on fresh pairs − PPO at the same KL and labels, SFT-sd", difference(FRESH, "PPO", "gold"),
         "above", GOLD),
    # ---- data
    Rule("C50", "S2", "缺乏在线探索……DPO 可能覆盖不足", "Fresh pairs of the policy are better than old pairs.",
         "gold, relay on fresh pairs − on old pairs at the same KL and labels, SFT-sd",
         difference(FRESH, RELAY, "gold"), "above", GOLD),
    Rule("C43", "S2", "PPO 整体略优于 DPO", "PPO is slightly better than DPO.",
         "gold, PPO − DPO at the same KL and labels, SFT-sd", difference("PPO", "DPO", "gold"), "above", GOLD),
    Rule("C27", "S4", "对偏好数据的质量要求较高", "DPO needs good labels.",
         "gold, DPO on the expert's labels − on the default annotator's, SFT-sd", "05.better_labels", "above", GOLD),
)

# Rules that are applied once more with the arms of LONGER in place of DPO and of the relay. Each of them may then get
# another verdict, which is to say that the verdict depends on the number of epochs. Not among them are C37 and C37b,
# because the reverse order has no arm with six epochs.
AGAIN = ("C15", "C17", "C17b", "C19", "C19b", "C20", "C24", "C29b", "C30", "C33d", "C34c", "C39", "C39b", "C11", "C43")


def longer(rule: Rule) -> Rule:
    """The same rule of the arms whose DPO has six epochs, see LONGER; None in a world without them."""
    def statistic(world: World) -> float | None:
        others = {name: row for name, row in world.items() if name not in LONGER}
        return rule.statistic(others | {name: world[long] for name, long in LONGER.items() if long in world})

    return replace(rule, statistic=statistic)


UNMEASURED: dict[str, str] = {}  # name -> why; the claims of the articles that nothing measures
