"""Supervised fine-tuning with TRL's SFTTrainer; only the response (and its end) is used as labels."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from alignkit.configs import SFTConfig
from alignkit.data.encoding import encode_pairs
from alignkit.data.ends import end_after, list_ends
from alignkit.forward.rollout import right_pad
from alignkit.models.fitness import context_length
from alignkit.runs.checkpoints import Checkpoints
from alignkit.trainer import narrow_logits, run_trainer, trainer_arguments

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports every run otherwise


def train_sft(
    policy: nn.Module, tokenizer, rows: list[dict], config: SFTConfig, *, callbacks: Sequence = (),
    checkpoints: str | Path | None = None, checkpoint_seconds: float | None = None,
) -> list[dict]:
    """Train `policy` in place on rows prompt / completion (texts); returns TRL's log, one dict per step.

    checkpoints: a folder for the run's checkpoints, from which an interrupted run continues; checkpoint_seconds: see
    `Checkpoints`. Raises ValueError if there are no rows, NonFinite (weights unchanged) if a loss or gradient is not
    finite, RunError if the folder holds an unfinished run with another config, model or data.
    """
    from trl import SFTTrainer

    if not rows:
        raise ValueError("rows is empty, expected at least one demonstration")
    config = replace(config, max_length=min(config.max_length, context_length(policy) or config.max_length))
    list_ends(policy, tokenizer)
    encoded, prompts = [], [row["prompt"] for row in rows]
    pairs, _ = encode_pairs(tokenizer, prompts, [row["completion"] for row in rows])
    for text, (prompt, completion) in zip(prompts, pairs, strict=True):
        response = [*completion, end_after(tokenizer, text)]
        ids, labels = [*prompt, *response], [-100] * len(prompt) + response
        if len(prompt) < config.max_length:  # otherwise the response would be empty
            encoded.append({"input_ids": ids[: config.max_length], "labels": labels[: config.max_length]})

    def batch(rows: list[dict]) -> dict[str, Tensor]:
        ids, mask = right_pad([row["input_ids"] for row in rows], tokenizer.pad_token_id)
        labels, _ = right_pad([row["labels"] for row in rows], -100)
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}

    args = trainer_arguments("SFTConfig", config, policy)
    kept = checkpoints and partial(Checkpoints, checkpoints, config=config, every=checkpoint_seconds)
    with narrow_logits(policy.get_output_embeddings().weight.shape[0]):
        return run_trainer(SFTTrainer, policy, args, encoded, batch, tokenizer, callbacks, kept)
