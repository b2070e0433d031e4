"""The label, unit, direction and number format of each metric."""

from dataclasses import dataclass, field


def stat(name: str, meaning: str):
    """A field of a statistics dataclass: TRL's name for the number, and its meaning."""
    return field(metadata={"name": name, "meaning": meaning})


@dataclass(frozen=True)
class Metric:
    """How a number is displayed.

    label: the name shown; {reference} stands for the reference policy. unit: "" for a pure number. about: text below
    the label if there is room; by default the unit. better: "up", "down", "". spec: number format beside an interval; a
    format that ends in % marks a share.
    """

    label: str
    unit: str = ""
    about: str = ""
    better: str = ""
    spec: str = ".2f"

    def title(self, reference: str = "the reference") -> str:
        """Label and unit on one line."""
        return ", ".join(filter(None, (self.label.format(reference=reference), self.unit)))

    def format(self, value: object) -> str:
        """`value` with all significant digits."""
        return share(value) if self.spec.endswith("%") else number(value)


METRICS = {
    # evaluation on held-out prompts: results.json, summary.json, comparisons
    "gold_mean": Metric("gold reward", "SFT-sd", "SFT standard deviations", "up", "+.2f"),
    "proxy_mean": Metric("proxy reward", "", "what was optimised", "up", "+.2f"),
    "risky_failure_rate": Metric("risky failures", "", "risky prompts answered or met unsafely", "down", ".1%"),
    "over_refusal_rate": Metric("over-refusal", "", "harmless prompts refused", "down", ".1%"),
    "answered_gold": Metric("gold where not refused", "SFT-sd", "responses that do not refuse, on prompts that are not "
                            "risky", "up", "+.2f"),
    "kl_to_sft": Metric("KL to {reference}", "nats", "nats per response"),
    "kl_rao_blackwell": Metric("KL, Rao–Blackwellised", "nats"),
    "kl_k3": Metric("KL, k3", "nats"),
    "self_agreement": Metric("self-agreement", "", "same behaviour for the same prompt"),
    "paraphrase_agreement": Metric("paraphrase agreement", "", "same behaviour for the same question", "up"),
    "entropy": Metric("entropy", "nats per token"),
    "sequence_entropy": Metric("entropy", "nats per response"),
    "length": Metric("length", "tokens", spec=".1f"),
    "eos_rate": Metric("ended by itself", "", "share of responses", spec=".1%"),
    "distinct_1": Metric("distinct words", spec=".1%"),
    "distinct_2": Metric("distinct word pairs", spec=".1%"),
    # reward model on held-out pairs
    "accuracy_labels": Metric("accuracy", "", "against the labels of held-out pairs", "up", ".1%"),
    "bayes_accuracy": Metric("its ceiling", "", "what an ideal model reaches on these labels", spec=".1%"),
    "accuracy_gold": Metric("accuracy against gold", "", "held-out pairs", "up", ".1%"),
    "ece": Metric("calibration error", "", "ECE", "down", ".3f"),
    # PPO's metrics.jsonl, by the names of PPOStats
    "objective/scores": Metric("proxy", "SFT-sd"),
    "objective/rlhf_reward": Metric("proxy − price·KL", "SFT-sd"),
    "objective/kl": Metric("KL to SFT", "nats per response"),
    "objective/kl_k3": Metric("KL, by k3", "nats per response"),
    "objective/kl_coef": Metric("price of KL", "SFT-sd per nat"),
    "gold": Metric("gold", "SFT-sd"),  # of the responses sampled in training, where it is known
    "objective/entropy": Metric("entropy", "nats per response"),
    "objective/length": Metric("response length", "tokens"),
    "val/eos_rate": Metric("ended with EOS", "share of responses"),
    "val/explained_variance": Metric("critic: explained variance", "share"),
    "val/ratio_max": Metric("largest ratio", "π / π_old"),
    "policy/clipfrac_avg": Metric("clip fraction", "share of tokens"),
    "policy/approxkl_avg": Metric("KL to the old policy", "nats per token"),
    "policy/grad_norm": Metric("gradient norm", "norm"),
    "loss/policy_avg": Metric("policy", "loss"),
    "loss/value_avg": Metric("value", "loss"),
    "loss/ptx_avg": Metric("SFT loss mixed in", "nats per token"),
    # DPO's, by the names of DPOStats
    "rewards/chosen": Metric("chosen", "β · nats"),
    "rewards/rejected": Metric("rejected", "β · nats"),
    "rewards/margins": Metric("implicit-reward margin", "β · nats"),
    "rewards/accuracies": Metric("pairs ranked rightly", "share of pairs"),
    "logps/chosen": Metric("chosen", "nats per response"),
    "logps/rejected": Metric("rejected", "nats per response"),
    "logps/chosen_shift": Metric("chosen", "nats per response"),
    "logps/rejected_shift": Metric("rejected", "nats per response"),
    # SFT's and the reward model's, by the names of TRL's trainers
    "loss": Metric("training loss", "nats"),
    "eval_loss": Metric("held-out loss", "nats"),
    "accuracy": Metric("accuracy", "share of pairs"),
    "eval_accuracy": Metric("held-out accuracy", "share of pairs"),
    "margin": Metric("score margin", "raw score"),
    "mean_token_accuracy": Metric("next token guessed", "share of tokens"),
    "learning_rate": Metric("learning rate", "a step"),
    "grad_norm": Metric("gradient norm", "norm"),
}


# What the words of widgets and pages mean: tooltips. A key is the text shown, up to its first comma or colon.
GLOSSARY = {
    "gold": "The true reward: in the desk world a program that knows which answer is right. Training never sees it.",
    "proxy": "The reward that is optimised: the reward model's score, learned from labels. Its zero is SFT's mean.",
    "score": "The proxy reward of a whole response: what the reward model says of it.",
    "SFT-sd": "The unit of rewards: the standard deviation of the reward over the SFT policy's own responses.",
    "reward": "Gold or proxy reward, in standard deviations over the SFT policy's responses (SFT-sd).",
    "KL": "How far the policy has moved from the reference, in nats: the mean of log π − log π_ref over its responses.",
    "KL to SFT": "How far the policy has moved from SFT, in nats per response: 0 if nothing has changed.",
    "β": "The price of KL, in formulas: reward that one nat of KL costs. PPO's kl_coef and DPO's beta.",
    "price of KL": "Reward that one nat of KL to the reference costs. PPO's kl_coef and DPO's beta are both this β.",
    "of possible gain": "The run's gain in proxy over SFT, as a share of the largest gain possible at the run's KL.",
    "entropy": "How undecided the policy is, in nats per response: 0 if it always says the same.",
    "critic": "The network that predicts the rest of a response's reward. 1: it explains all variance; 0: none.",
    "advantage": "How much better the outcome was than the critic expected.",
    "clip range ε": "PPO stops moving a token once its ratio π / π_old has left 1 ± ε in the direction of the step.",
    "ratio ρ": "How much likelier the token is now than when it was sampled: π(token) / π_old(token).",
    "λ of GAE": "How far a surprise reaches back: 0 is one step, 1 the whole remaining reward.",
    "γ": "Discount: a reward one token later counts γ times as much.",
    "implicit reward": "DPO's reward of a response: β · (log π − log π_ref).",
    "margin": "Implicit reward of the chosen response less that of the rejected one.",
    "log-ratio": "How much likelier the policy finds the response than the reference does: log π − log π_ref, nats.",
    "bias": "How far the estimator is off on average, with any number of samples.",
    "kl_coef": "The price of KL: reward that one nat of KL costs. Higher: the policy stays closer to SFT.",
    "learning_rate": "Step size of the policy's optimiser.",
    "clip_range": "The ε of PPO: a token whose ratio π / π_old has left 1 ± ε the way of the step is moved no more.",
    "policy": "The language model that is trained: it gives every response to a prompt a probability.",
    "SFT": "Supervised fine-tuning: the policy learns to imitate demonstrations. PPO starts from the result.",
    "PPO": "Proximal policy optimisation: the policy answers, a reward model scores, and high scores get likelier.",
    "DPO": "Direct preference optimisation: the policy learns from preference pairs, without a reward model.",
    "reward model": "A model that learned from preference pairs to score a response. Its score is the proxy.",
    "reference": "The unchanged policy that KL is measured from: SFT's in PPO, the frozen one in the course's DPO.",
    "nat": "The unit of KL and entropy: a bit with the natural logarithm. A KL of 0 nats: nothing has changed.",
    "over-optimisation": "Gold falls while the proxy rises: the policy finds what the reward model overrates.",
    "desk world": "The built-in help desk: 2,560 prompts, eleven sentences to answer with, and gold that is a program.",
    "world": "One seed of the desk world: which answers are right, which prompts are held out, all random draws.",
    "frontier": "The highest proxy that any policy can have at each KL to SFT; exact in the desk world.",
    "frozen": "A finished checkpoint with a manifest of hashes: no change of it goes unseen. DPO starts from it.",
    "benign": "A prompt that is harmless and sounds so. It should be answered.",
    "look-alike": "A prompt that sounds harmful and is not: 'break into a demo account'. It should be answered.",
    "ambiguous": "A prompt that may be harmful or not. The policy should ask back, or answer with a word of caution.",
    "risky": "A harmful prompt. It should be refused.",
    "hedge": "A response that asks back or warns, and neither answers nor refuses.",
    "alternative": "A response that offers another way, and neither answers, refuses nor warns.",
    "unsafe": "A response that explains how to do it, whatever the harm.",
    "risky failures": "Share of risky prompts that get an answer or an unsafe response. Lower is better.",
    "over-refusal": "Share of benign and look-alike prompts that are refused. Lower is better.",
    "paraphrase agreement": "Share of pairs of phrasings of one question that get the same behaviour.",
}


def label(name: str) -> str:
    """The label of the metric `name`; `name` itself for an unknown metric."""
    return METRICS[name].label if name in METRICS else name


def is_number(value: object) -> bool:
    """Whether a value is an integer or a float; True and False are not numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(value: object) -> str:
    """A number with three decimals, or as many as its magnitude requires; other values unchanged."""
    if not is_number(value):
        return "–" if value is None else str(value)
    size = abs(value) if abs(value) > 1e-12 else 0  # rounding turns a mean that is 0 by definition into 1e-17
    if isinstance(value, int) or size >= 1000 or not size:
        shown = f"{size:,.0f}"
    else:
        shown = f"{size:.3g}" if size >= 100 else f"{size:.3f}" if size >= 1e-3 else f"{size:.2e}"
    return f"−{shown}" if value < 0 and size else shown


def share(value: object) -> str:
    """A share as a percentage; a value that is not a number as `number` formats it."""
    return f"{value:.1%}" if is_number(value) else number(value)


def duration(seconds: float) -> str:
    """A readable duration: 4.2 s, 1:07 min."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
