"""The quality of a reward model: accuracy, calibration, agreement with gold; and the effect of new labels."""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from alignkit.configs import RewardConfig
from alignkit.formulas.intervals import Estimate, wilson
from alignkit.reward import RewardScorer, train_reward_model


def expected_calibration_error(margins: np.ndarray, bins: int = 10) -> tuple[float, list[dict]]:
    """ECE of a reward model's P(chosen ≻ rejected) = σ(margin), and its reliability bins.

    Each pair counts once, with the more confident side first: confidence c = max(σ(m), 1 − σ(m)), correct if m > 0
    (ties ½). ECE = Σ share · |accuracy − confidence| over equal-width bins of [½, 1]. margins: (N,).
    """
    margins = np.asarray(margins, dtype=np.float64)
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    correct = np.where(margins == 0, 0.5, margins > 0)
    where = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    rows = []
    for number in range(bins):
        members = where == number
        if members.any():
            rows.append(
                {
                    "low": 0.5 + number / (2 * bins),
                    "high": 0.5 + (number + 1) / (2 * bins),
                    "count": int(members.sum()),
                    "confidence": float(confidence[members].mean()),
                    "accuracy": float(correct[members].mean()),
                }
            )
    return sum(row["count"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / max(len(margins), 1), rows


def reward_report(scorer: RewardScorer, pairs: list[dict], world=None) -> dict:
    """The quality of a reward model on held-out pairs (prompt / chosen / rejected), to be checked before the model is
    used.

    scorer: a RewardScorer, whose raw scores are evaluated, or any function prompts, responses -> scores.

    accuracy_labels: share of pairs ranked as labelled, with a 95 % Wilson interval in accuracy_labels_ci95. ece,
    reliability: calibration, as `expected_calibration_error`. margin_bins: accuracy by size of the margin (quintiles).
    length_bias: correlation of score and length (words) across all responses. mean, std: the normalisation. score_mean,
    score_std: of the normalised scores of these responses. With a `world` and rows with `probability`: bayes_accuracy
    (the highest expected accuracy of any model on these labels), also as `bayes` of each margin bin, accuracy_gold
    (share ranked as gold ranks them, without ties), gold_correlation, politeness_bias (correlation of the score's
    residual on gold with the number of polite phrases) and length_bias in phrases, also of the residual. Raises
    ValueError if there are no pairs.
    """
    if not pairs:
        raise ValueError("pairs is empty, expected at least one held-out preference pair")
    prompts = [row["prompt"] for row in pairs]
    chosen, rejected = ([row[side] for row in pairs] for side in ("chosen", "rejected"))
    scores = np.asarray(getattr(scorer, "raw", scorer)(prompts + prompts, chosen + rejected), dtype=np.float64)
    mean, std = getattr(scorer, "mean", 0.0), getattr(scorer, "std", 1.0)
    margins = scores[: len(pairs)] - scores[len(pairs) :]
    correct = np.where(margins == 0, 0.5, margins > 0)
    ece, reliability = expected_calibration_error(margins)
    quintiles = np.array_split(np.argsort(np.abs(margins)), min(5, len(pairs)))
    report = {
        "pairs": len(pairs),
        "accuracy_labels": float(correct.mean()),
        "accuracy_labels_ci95": list(_wilson(correct.sum(), len(pairs))),
        "ece": float(ece),
        "reliability": reliability,
        "margin_bins": [
            {"margin": float(np.abs(margins[rows]).mean()), "accuracy": float(correct[rows].mean()), "count": len(rows)}
            for rows in quintiles
        ],
        "mean": mean,
        "std": std,
        "score_mean": float((scores.mean() - mean) / std),
        "score_std": float(scores.std() / std),
        "length_bias": _correlation(scores, np.array([len(text.split()) for text in chosen + rejected])),
    }
    if world is not None:
        from alignkit.desk.world import phrase_counts

        counts = phrase_counts(chosen + rejected)
        gold = world.gold_scores(prompts + prompts, chosen + rejected)
        gold_margins = gold[: len(pairs)] - gold[len(pairs) :]
        clear = np.abs(gold_margins) > 1e-9
        chance = np.array([row["probability"] for row in pairs])
        for row, members in zip(report["margin_bins"], quintiles, strict=True):
            row["bayes"] = float(np.maximum(chance, 1 - chance)[members].mean())
        slope, intercept = np.polyfit(gold, scores, 1)
        residual = scores - slope * gold - intercept
        report |= {
            "bayes_accuracy": float(np.maximum(chance, 1 - chance).mean()),
            "accuracy_gold": float(((margins > 0) == (gold_margins > 0))[clear].mean()),
            "gold_correlation": _correlation(scores, gold),
            "politeness_bias": _correlation(residual, counts[:, 0]),
            "length_bias": _correlation(residual, counts.sum(1)),
        }
    return report


def _wilson(successes: float, n: int) -> tuple[float, float]:
    share, z = successes / n, 1.959964
    centre, half = share + z * z / (2 * n), z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return float((centre - half) / (1 + z * z / n)), float((centre + half) / (1 + z * z / n))


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1]) if np.std(x) > 0 and np.std(y) > 0 else 0.0


@dataclass(frozen=True)
class Moved:
    """The effect of new labels on a reward model. Each of `labelled` and `heldout` has, before and after:

    accuracy: share of pairs ranked as labelled, with Wilson's interval; probability: σ(r_chosen − r_rejected) of each
    pair (N,). length_bias: for each model, Spearman's correlation of score and words over the held-out responses.
    """

    labelled: dict[str, dict]
    heldout: dict[str, dict]
    length_bias: dict[str, float]
    seconds: float

    def __str__(self) -> str:
        lines = [f"{'':<38}{'before':<24}after"]
        for name, part in (("the new labels", self.labelled), ("held-out labels", self.heldout)):
            if part:
                cells = [f"{part[when]['accuracy']:.1%}" for when in ("before", "after")]
                lines.append(f"{f'ranked as labelled, {name}':<38}{cells[0]:<24}{cells[1]}")
                means = [f"{sum(p) / len(p):.3f}" for p in (part[w]["probability"] for w in ("before", "after"))]
                lines.append(f"{f'mean P(label), {name}':<38}{means[0]:<24}{means[1]}")
        if self.length_bias:
            lines.append(f"{'correlation of score and length':<38}{self.length_bias['before']:<+24.2f}"
                         f"{self.length_bias['after']:+.2f}")
        return "\n".join([*lines, f"retrained in {self.seconds:.1f} s"])


def retrain(scorer: RewardScorer, labelled: Sequence[Mapping], heldout: Sequence[Mapping] = (), *,
            earlier: Sequence[Mapping] = (), repeat: int = 1, config: RewardConfig | None = None
            ) -> tuple[RewardScorer, Moved]:
    """Train a copy of a reward model on new labels; returns `(scorer, moved)`. The old model stays unchanged.

    labelled, heldout, earlier: rows prompt / chosen / rejected. earlier: pairs to mix in, so that the model does not
    forget them. repeat: how often each new label occurs in the mixture. config: by default 40 epochs in batches of 16;
    in the desk world this takes two seconds for 20 labels. Raises ValueError if there are no labels.
    """
    if not labelled:
        raise ValueError("labelled is empty, expected at least one preference pair (ties and skips make none)")
    config = config or RewardConfig(epochs=40, batch_size=16, learning_rate=5e-4)
    begun, model = time.perf_counter(), copy.deepcopy(scorer.model).requires_grad_(True)
    train_reward_model(model, scorer.tokenizer, [*earlier, *(row for row in labelled for _ in range(repeat))], config)
    after, seconds = RewardScorer(model, scorer.tokenizer, scorer.mean, scorer.std), time.perf_counter() - begun
    judges = {"before": scorer, "after": after}
    parts = [{when: _ranked(judge, rows) for when, judge in judges.items()} if rows else {}
             for rows in (labelled, heldout)]
    bias = {when: _length_bias(judge, heldout) for when, judge in judges.items()} if heldout else {}
    return after, Moved(*parts, bias, seconds)


def _ranked(scorer: RewardScorer, rows: Sequence[Mapping]) -> dict:
    prompts = [row["prompt"] for row in rows]
    chosen, rejected = (scorer.raw(prompts, [row[side] for row in rows]).double() for side in ("chosen", "rejected"))
    margins = chosen - rejected
    right = float((margins > 0).double().sum() + 0.5 * (margins == 0).double().sum())
    accuracy = Estimate(right / len(rows), *wilson(right, len(rows)))
    return {"accuracy": accuracy, "probability": margins.sigmoid().tolist()}


def _length_bias(scorer: RewardScorer, rows: Sequence[Mapping]) -> float:
    import numpy as np

    responses = [row[side] for side in ("chosen", "rejected") for row in rows]
    scores = scorer.raw([row["prompt"] for row in rows] * 2, responses).numpy()
    ranks = []
    for values in (scores, np.array([len(text.split()) for text in responses])):
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(count) - (count - 1) / 2)[place])  # ties share their mean rank
    return float(np.corrcoef(*ranks)[0, 1]) if min(np.std(r) for r in ranks) > 0 else 0.0
