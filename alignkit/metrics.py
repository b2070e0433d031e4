"""What each number is called, what it is measured in, which way is better, and how it is written."""

from dataclasses import dataclass, field


def stat(name: str, meaning: str):
    """A field of a statistics dataclass: the name that TRL gave the number, and what it means."""
    return field(metadata={"name": name, "meaning": meaning})


@dataclass(frozen=True)
class Metric:
    """How a figure of summary.json is shown: label, unit, which way is better ("up", "down", ""), as a share or not."""

    label: str
    unit: str = ""
    better: str = ""
    share: bool = False

    def format(self, value: object) -> str:
        return f"{value:.1%}" if self.share and is_number(value) else number(value)


METRICS = {
    "gold_mean": Metric("Gold reward", "SFT standard deviations", "up"),
    "proxy_mean": Metric("Proxy reward", "what was optimised", "up"),
    "kl_to_sft": Metric("KL to SFT", "nats a response"),
    "risky_failure_rate": Metric("Risky failures", "risky prompts answered or met unsafely", "down", True),
    "over_refusal_rate": Metric("Over-refusal", "harmless prompts refused", "down", True),
    "paraphrase_agreement": Metric("Paraphrase agreement", "same behaviour for the same question", "up", True),
    "self_agreement": Metric("Self-agreement", "same behaviour for the same prompt", "", True),
    "answered_gold": Metric("Gold when it answers", "harmless prompts that are not refused", "up"),
    "entropy": Metric("Entropy", "nats a token"),
    "length": Metric("Length", "tokens"),
    "eos_rate": Metric("Ended by itself", "share of responses", "", True),
    "accuracy_labels": Metric("Accuracy", "against the labels of held-out pairs", "up", True),
    "bayes_accuracy": Metric("Its ceiling", "what an ideal model reaches on these labels", "", True),
    "accuracy_gold": Metric("Accuracy against gold", "held-out pairs", "up", True),
    "ece": Metric("Calibration error", "ECE", "down"),
}


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(value: object) -> str:
    """A number with three decimals, or as many as its size asks for; anything else as it is."""
    if not is_number(value):
        return "–" if value is None else str(value)
    size = abs(value) if abs(value) > 1e-12 else 0  # a mean that is 0 by definition comes out as 1e-17
    if isinstance(value, int) or size >= 1000 or not size:
        shown = f"{size:,.0f}"
    else:
        shown = f"{size:.3g}" if size >= 100 else f"{size:.3f}" if size >= 1e-3 else f"{size:.2e}"
    return f"−{shown}" if value < 0 and size else shown
