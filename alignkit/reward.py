"""The reward model: a thin front on TRL's RewardTrainer, the scorer that all else uses, and its report.

A response is always scored with EOS after it, as in training, so that a score is the same through the API and inside
PPO.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from alignkit.data import encode_pairs
from alignkit.models import autocast, load_reward_model, save_model, token_values
from alignkit.sampling import right_pad
from alignkit.sft import run_trainer, trainer_arguments


@dataclass(frozen=True)
class RewardConfig:
    """What a user can turn. Defaults are for the desk world; the names are SFTConfig's.

    centre: weight of (r_chosen + r_rejected)², which keeps scores near 0 (TRL's center_rewards_coefficient).
    """

    epochs: float = 4
    batch_size: int = 128
    learning_rate: float = 1e-3
    max_length: int = 512
    centre: float = 0.01
    seed: int = 0


def train_reward_model(
    model: nn.Module, tokenizer, pairs: list[dict], config: RewardConfig, *, callbacks: Sequence = ()
) -> list[dict]:
    """Train `model` in place on rows prompt / chosen / rejected (texts) with the Bradley–Terry loss −log σ(r_c − r_r).

    Returns TRL's log, one dict a step. Raises ValueError if there are no pairs.
    """
    from trl import RewardTrainer

    if not pairs:
        raise ValueError("pairs is empty, expected at least one preference pair")
    prompts = [row["prompt"] for row in pairs]
    chosen, rejected = (_ids(tokenizer, prompts, [row[side] for row in pairs]) for side in ("chosen", "rejected"))
    rows = [
        {"chosen_ids": c, "rejected_ids": r}
        for c, r in zip(chosen, rejected, strict=True)
        if max(len(c), len(r)) <= config.max_length  # without its end a response has no score
    ]

    def batch(rows: list[dict]) -> dict[str, Tensor]:
        both = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
        ids, mask = right_pad(both, tokenizer.pad_token_id)
        return {"input_ids": ids, "attention_mask": mask.long()}

    args = trainer_arguments("RewardConfig", config, model, center_rewards_coefficient=config.centre or None)
    return run_trainer(RewardTrainer, model, args, rows, batch, tokenizer, callbacks)


class RewardScorer:
    """A reward model as a function: prompts, responses -> scores (N,), shifted by `mean` and scaled by `std`.

    The reward is read at the EOS after the response, whatever the padding token is.
    """

    def __init__(self, model: nn.Module, tokenizer, mean: float = 0.0, std: float = 1.0):
        if not std > 0:
            raise ValueError(
                f"std is {std}, expected more than 0: the reward model gives every response the same score"
            )
        self.model, self.tokenizer, self.mean, self.std = model.eval(), tokenizer, mean, std

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Normalised scores (N,), float32, on the CPU."""
        return (self.raw(prompts, responses) - self.mean) / self.std

    @torch.no_grad()
    def raw(self, prompts: Sequence[str], responses: Sequence[str], batch_size: int = 512) -> Tensor:
        """Scores (N,) as the model gives them."""
        rows = _ids(self.tokenizer, prompts, responses)
        scores = []
        for start in range(0, len(rows), batch_size):
            ids, mask = right_pad(rows[start : start + batch_size], self.tokenizer.pad_token_id)
            ids, mask = ids.to(self.model.device), mask.to(self.model.device)
            with autocast(ids.device):
                values = token_values(self.model, ids, mask, ids.shape[1])
            scores.append(values.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1).cpu())
        return torch.cat(scores) if scores else torch.zeros(0)

    def normalised(self, prompts: Sequence[str], responses: Sequence[str]) -> "RewardScorer":
        """The same scorer with mean 0 and standard deviation 1 on these responses (the reference policy's)."""
        raw = self.raw(prompts, responses)
        return RewardScorer(self.model, self.tokenizer, float(raw.mean()), float(raw.std()))

    def save(self, directory: str | Path) -> Path:
        """Write model, tokenizer and normalisation to a folder that `load_reward` reads."""
        self.model.config.alignkit_normalisation = {"mean": self.mean, "std": self.std}
        return save_model(self.model, self.tokenizer, directory)

    @classmethod
    def load(cls, directory: str | Path, *, device: str = "auto") -> "RewardScorer":
        model, tokenizer = load_reward_model(directory, device=device)
        norm = getattr(model.config, "alignkit_normalisation", None) or {"mean": 0.0, "std": 1.0}
        return cls(model, tokenizer, norm["mean"], norm["std"])


def load_reward(source: str | Path, *, device: str = "auto"):
    """A reward from a folder (a trained reward model) or from "module:function" taking prompts, responses -> scores.

    Raises ValueError that says which part of the name was not found.
    """
    source = str(source)
    if Path(source).is_dir():
        return RewardScorer.load(source, device=device)
    module, colon, function = source.partition(":")
    if not colon:
        raise ValueError(f"reward is {source!r}, expected a reward model's folder or 'module:function'")
    try:
        reward = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise ValueError(f"reward {source!r}: module {module!r} could not be imported ({error})") from error
    except AttributeError:
        raise ValueError(f"reward {source!r}: module {module!r} has no {function!r}") from None
    if not callable(reward):
        raise ValueError(f"reward {source!r}: {function!r} is not a function")
    return reward


def expected_calibration_error(margins: np.ndarray, bins: int = 10) -> tuple[float, list[dict]]:
    """ECE of a reward model's P(chosen ≻ rejected) = σ(margin), and its reliability bins.

    Each pair counts once as (σ(m), the label holds) with the more confident side first: confidence c = max(σ(m), 1 −
    σ(m)), correct where m > 0 (ties ½). ECE = Σ share · |accuracy − confidence| over equal-width bins of [½, 1].
    margins: (N,).
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
    """What to know of a reward model before anything uses it, on held-out pairs (prompt / chosen / rejected).

    accuracy_labels: share of pairs ranked as labelled, with a 95 % Wilson interval in accuracy_labels_ci95. ece,
    reliability: calibration, as `expected_calibration_error`. margin_bins: accuracy by size of the margin (quintiles).
    length_bias: correlation of score and length (words) across all responses. mean, std: the normalisation. score_mean,
    score_std: of these responses after it. With a `world` and rows that carry `probability`: bayes_accuracy (the best
    any model can do on these labels in expectation), also as `bayes` of each margin bin,
    accuracy_gold (share ranked as gold ranks them, ties left out), gold_correlation, politeness_bias (correlation of
    the score's residual on gold with the number of polite phrases) and length_bias in phrases, also of the residual.
    Raises ValueError if there are no pairs.
    """
    if not pairs:
        raise ValueError("pairs is empty, expected at least one held-out preference pair")
    prompts = [row["prompt"] for row in pairs]
    chosen, rejected = ([row[side] for row in pairs] for side in ("chosen", "rejected"))
    scores = scorer.raw(prompts + prompts, chosen + rejected).double().numpy()
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
        "mean": scorer.mean,
        "std": scorer.std,
        "score_mean": float((scores.mean() - scorer.mean) / scorer.std),
        "score_std": float(scores.std() / scorer.std),
        "length_bias": _correlation(scores, np.array([len(text.split()) for text in chosen + rejected])),
    }
    if world is not None:
        from alignkit.world import phrase_counts

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


def _ids(tokenizer, prompts: Sequence[str], responses: Sequence[str]) -> list[list[int]]:
    end = tokenizer.eos_token_id
    return [[*prompt, *response, end] for prompt, response in encode_pairs(tokenizer, prompts, responses)[0]]


def _wilson(successes: float, n: int) -> tuple[float, float]:
    share, z = successes / n, 1.959964
    centre, half = share + z * z / (2 * n), z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return float((centre - half) / (1 + z * z / n)), float((centre + half) / (1 + z * z / n))


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1]) if np.std(x) > 0 and np.std(y) > 0 else 0.0
