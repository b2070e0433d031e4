"""The answer key of the graded lab (alignkit/teaching/lab.ipynb), and wrong answers that its checks must notice.

Here and not in the package, so that an installed alignkit does not contain it.
"""

RIGHT = {
    "masked-mean": """
def masked_mean(values, mask):
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)
""",
    "reward-loss": """
def reward_loss(chosen, rejected):
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()
""",
    "sampled-kl": """
def sampled_kl(policy, ref, draws, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.multinomial(policy, draws, replacement=True, generator=generator)
    x = (ref.log() - policy.log())[tokens]
    return (torch.expm1(x) - x).mean()
""",
    "advantages": """
def advantages(rewards, values, mask, gamma, gae_lambda):
    values = torch.where(mask, values, 0.0)
    result, following, next_value = torch.zeros_like(values), 0.0, torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = torch.where(mask[:, t], delta + gamma * gae_lambda * following, 0.0)
        result[:, t], next_value = following, values[:, t]
    return result, result + values
""",
    "silent-bug": """
def train(reward, ref_logits, kl_coef, seed):
    generator = torch.Generator().manual_seed(seed)
    ref = ref_logits.log_softmax(-1)
    logits = ref_logits.clone().requires_grad_()
    for _ in range(60):
        old = logits.detach().log_softmax(-1)
        response = torch.multinomial(old.exp(), 512, replacement=True, generator=generator)
        score = reward[response] - kl_coef * (old - ref)[response]
        advantage = score - score.mean()
        for _ in range(2):
            logprobs = logits.log_softmax(-1)[response]
            ratio = torch.exp(logprobs - old[response])
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            gradient = torch.autograd.grad(-surrogate.mean(), logits)[0]
            logits = (logits - gradient).detach().requires_grad_()
    return logits.detach()
""",
    "checkpoint": """
def choose(checkpoints, limit):
    allowed = checkpoints["sft"]["over_refusal"] + limit
    gold = {name: sum(row["gold"]) / len(row["gold"]) for name, row in checkpoints.items()
            if row["over_refusal"] <= allowed}
    name = max(gold, key=gold.get)
    changes = torch.tensor(checkpoints[name]["gold"]) - torch.tensor(checkpoints["sft"]["gold"])
    half = 1.96 * changes.std() / math.sqrt(len(changes))
    return name, float(changes.mean()), float(changes.mean() - half), float(changes.mean() + half)
""",
    "dpo": """
def dpo(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    margin = beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))
    return -torch.nn.functional.logsigmoid(margin)
""",
    "interval": """
def verdict(low, high, smallest):
    if -smallest < low and high < smallest:
        return "too small to matter"
    return "better" if low > 0 else "worse" if high < 0 else "cannot be told"
""",
}


def _changed(task: str, old: str, new: str) -> str:
    assert RIGHT[task].count(old) == 1, f"{task}: {old!r}"
    return RIGHT[task].replace(old, new)


WRONG = {  # task -> (what is wrong, the code, the points that it still gets)
    "masked-mean": (
        ("mean over the padding too", "def masked_mean(values, mask):\n    return values.mean()", 0),
        ("mean of the rows' means", "def masked_mean(values, mask):\n    kept = torch.where(mask, values, 0.0).sum(1)\n"
         "    return (kept / mask.sum(1).clamp(min=1)).mean()", 0),
        ("times the mask", "def masked_mean(values, mask):\n    return (values * mask).sum() / mask.sum()", 1),
    ),
    "reward-loss": (
        ("sign turned", _changed("reward-loss", "chosen - rejected", "rejected - chosen"), 0),
        ("overflows", _changed("reward-loss", "torch.nn.functional.logsigmoid(chosen - rejected)",
                               "torch.sigmoid(chosen - rejected).log()"), 2),
        ("sum instead of mean", _changed("reward-loss", ".mean()", ".sum()"), 0),
    ),
    "sampled-kl": (
        ("the reference's samples", _changed("sampled-kl", "multinomial(policy", "multinomial(ref"), 0),
        ("k1 instead of k3", _changed("sampled-kl", "(torch.expm1(x) - x).mean()", "-x.mean()"), 2),
        ("log-ratio turned over", _changed("sampled-kl", "ref.log() - policy.log()", "policy.log() - ref.log()"), 0),
    ),
    "advantages": (
        ("sign of the values", _changed("advantages", "next_value - values[:, t]", "next_value + values[:, t]"), 0),
        ("λ forgotten", _changed("advantages", "gamma * gae_lambda * following", "gamma * following"), 0),
        ("padding bootstraps", _changed("advantages", "    values = torch.where(mask, values, 0.0)\n", ""), 3),
    ),
    "silent-bug": (
        ("k1 in the loss", _changed("silent-bug", " - kl_coef * (old - ref)[response]", "").replace(
            "-surrogate.mean()", "-surrogate.mean() + kl_coef * (logprobs - ref[response]).mean()"), 0),
        ("sign of the price", _changed("silent-bug", "- kl_coef *", "+ kl_coef *"), 0),
        ("the known optimum, without training",
         "def train(reward, ref_logits, kl_coef, seed):\n    return ref_logits + reward / kl_coef", 0),
        ("half the price", _changed("silent-bug", "- kl_coef *", "- 0.4 * kl_coef *"), 0),
    ),
    "checkpoint": (
        ("by proxy", _changed("checkpoint", 'sum(row["gold"]) / len(row["gold"])', 'row["proxy"]'), 0),
        ("limit ignored", _changed("checkpoint", "<= allowed", "<= 1"), 0),
        ("interval of unpaired means", _changed("checkpoint", "1.96 * changes.std()", '1.96 * torch.tensor('
         'checkpoints[name]["gold"] + checkpoints["sft"]["gold"]).std()'), 2),
    ),
    "dpo": (
        ("no reference", _changed("dpo", "((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))",
                                  "(policy_chosen - policy_rejected)"), 0),
        ("β outside", "def dpo(a, b, c, d, beta):\n    return -beta * torch.sigmoid(a - b - c + d).log()", 0),
        ("no gradient", _changed("dpo", "logsigmoid(margin)", "logsigmoid(margin.detach())"), 3),
    ),
    "interval": (
        ("covering 0 is no effect", _changed("interval", '"cannot be told"', '"too small to matter"'), 0),
        ("never too small", _changed("interval", "-smallest < low and high < smallest", "False"), 1),
        ("by the middle", 'def verdict(low, high, smallest):\n    return "better" if low + high > 0 else "worse"', 0),
    ),
}
