"""The reward model: training with TRL's RewardTrainer, and the scorer that all other modules use.

A response is always scored with its end token (EOS, or the chat template's own) appended, as in training, so the API
and PPO give the same score.
"""

import importlib
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from alignkit.configs import RewardConfig
from alignkit.data.encoding import encode_pairs
from alignkit.data.ends import end_after
from alignkit.data.own_template import in_own_template
from alignkit.errors import ManifestError, NonFinite
from alignkit.forward.precision import autocast
from alignkit.forward.reading import token_values
from alignkit.forward.rollout import right_pad
from alignkit.models.fitness import context_length
from alignkit.models.gate import is_folder
from alignkit.models.loading import load_reward_model, save_model
from alignkit.runs.checkpoints import Checkpoints
from alignkit.trainer import run_trainer, trainer_arguments


def train_reward_model(
    model: nn.Module, tokenizer, pairs: list[dict], config: RewardConfig, *, callbacks: Sequence = (),
    checkpoints: str | Path | None = None, checkpoint_seconds: float | None = None,
) -> list[dict]:
    """Train `model` in place on rows prompt / chosen / rejected (texts) with the Bradley–Terry loss −log σ(r_c − r_r).

    Returns TRL's log, one dict per step. checkpoints, checkpoint_seconds: as in `train_sft`. Raises ValueError if there
    are no pairs, and as `train_sft`.
    """
    from trl import RewardTrainer

    if not pairs:
        raise ValueError("pairs is empty, expected at least one preference pair")
    prompts = [row["prompt"] for row in pairs]
    chosen, rejected = (_ids(tokenizer, prompts, [row[side] for row in pairs]) for side in ("chosen", "rejected"))
    config = replace(config, max_length=min(config.max_length, context_length(model) or config.max_length))
    rows = [
        {"chosen_ids": c, "rejected_ids": r}
        for c, r in zip(chosen, rejected, strict=True)
        if max(len(c), len(r)) <= config.max_length  # a response without its end token has no score
    ]

    def batch(rows: list[dict]) -> dict[str, Tensor]:
        both = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
        ids, mask = right_pad(both, tokenizer.pad_token_id)
        return {"input_ids": ids, "attention_mask": mask.long()}

    args = trainer_arguments("RewardConfig", config, model, center_rewards_coefficient=config.centre or None)
    kept = checkpoints and partial(Checkpoints, checkpoints, config=config, every=checkpoint_seconds)
    return run_trainer(RewardTrainer, model, args, rows, batch, tokenizer, callbacks, kept)


class RewardScorer:
    """A reward model as a function: prompts, responses -> scores (N,), shifted by `mean` and scaled by `std`.

    The score is read at the end of the response, whatever the padding token is.
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
        """Unnormalised scores (N,) of the model. Raises NonFinite, with the prompt's number, on NaN or infinity."""
        rows, limit, scores = self.ids(prompts, responses), context_length(self.model), []
        longest = max(range(len(rows)), key=lambda row: len(rows[row]), default=0)
        if limit and rows and len(rows[longest]) > limit:
            raise ValueError(f"prompt {longest} and its response have {len(rows[longest])} tokens, the reward model's "
                             f"context is {limit}; shorten them (file_task does, with max_length={limit})")
        for start in range(0, len(rows), batch_size):
            ids, mask = right_pad(rows[start : start + batch_size], self.tokenizer.pad_token_id)
            ids, mask = ids.to(self.model.device), mask.to(self.model.device)
            with autocast(ids.device):
                values = token_values(self.model, ids, mask, ids.shape[1])
            scores.append(values.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1).cpu())
        scores = torch.cat(scores) if scores else torch.zeros(0)
        if not scores.isfinite().all():
            first = int((~scores.isfinite()).nonzero()[0])
            raise NonFinite(f"the reward model's score of prompt {first} and its response is {float(scores[first])} "
                            f"({int((~scores.isfinite()).sum())} of {len(scores)} scores are not finite): its training "
                            "diverged, go back to an earlier checkpoint")
        return scores

    def ids(self, prompts: Sequence[str], responses: Sequence[str]) -> list[list[int]]:
        """The token ids of each prompt and response, as `train_reward_model` uses them in training."""
        return _ids(self.tokenizer, prompts, responses)

    def normalised(self, prompts: Sequence[str], responses: Sequence[str]) -> "RewardScorer":
        """The same scorer, normalised to mean 0 and standard deviation 1 on these responses (the reference
        policy's)."""
        raw = self.raw(prompts, responses)
        return RewardScorer(self.model, self.tokenizer, float(raw.mean()), float(raw.std()))

    def save(self, directory: str | Path) -> Path:
        """Write model, tokenizer and normalisation to a folder for `load_reward`."""
        self.model.config.alignkit_normalisation = {"mean": self.mean, "std": self.std}
        return save_model(self.model, self.tokenizer, directory)

    @classmethod
    def load(cls, directory: str | Path, *, device: str = "auto") -> "RewardScorer":
        """Load a scorer from a folder written by `save`. Raises as `load_reward_model`, and on an invalid
        normalisation."""
        model, tokenizer = load_reward_model(directory, device=device)
        norm = getattr(model.config, "alignkit_normalisation", None)
        norm = {"mean": 0.0, "std": 1.0} if norm is None else norm
        sound = isinstance(norm, dict) and all(
            isinstance(norm.get(key), (int, float)) and not isinstance(norm[key], bool) and abs(norm[key]) < math.inf
            for key in ("mean", "std"))
        if not sound or not norm["std"] > 0:
            raise ManifestError(f"{Path(directory) / 'config.json'}: alignkit_normalisation is {str(norm)[:80]}, "
                                "expected a mapping with two finite numbers, mean and std, std above 0",
                                ["config.json"])
        return cls(model, tokenizer, float(norm["mean"]), float(norm["std"]))


def load_reward(source: str | Path, *, device: str = "auto"):
    """A reward from a folder (a trained reward model) or from "module:function" taking prompts, responses -> scores.

    The module is searched on Python's path and, last, in the current folder. Raises ValueError that says which part of
    the name was not found.
    """
    source = str(source)
    if is_folder(source):
        return RewardScorer.load(source, device=device)
    module, colon, function = source.partition(":")
    if not colon:
        raise ValueError(f"reward is {source!r}, expected a reward model's folder or 'module:function'")
    try:
        reward = getattr(_import_from_here(module), function)
    except ImportError as error:
        raise ValueError(f"reward {source!r}: module {module!r} could not be imported ({error})") from error
    except AttributeError:
        raise ValueError(f"reward {source!r}: module {module!r} has no {function!r}") from None
    if not callable(reward):
        raise ValueError(f"reward {source!r}: {function!r} is not a function")
    return reward


def _import_from_here(module: str):
    """Import a module named by the user; the current folder is added to the end of the path during the import."""
    importlib.invalidate_caches()  # the file may be only seconds old
    sys.path.append("")
    try:
        return importlib.import_module(module)
    finally:
        del sys.path[len(sys.path) - 1 - sys.path[::-1].index("")]  # only the last: the user may have added one


def _ids(tokenizer, prompts: Sequence[str], responses: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt and response, with the end of the reply; conversations rendered by another model's chat
    template are rendered again with the tokenizer's own."""
    prompts, responses = in_own_template(tokenizer, prompts, responses)
    ends, pairs = [end_after(tokenizer, prompt) for prompt in prompts], encode_pairs(tokenizer, prompts, responses)[0]
    return [[*prompt, *response, end] for (prompt, response), end in zip(pairs, ends, strict=True)]
