"""Supervised fine-tuning: a thin front on TRL's SFTTrainer, which sees only the response (and its EOS) as labels."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from alignkit.data import encode_pairs
from alignkit.sampling import right_pad

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports every run otherwise


@dataclass(frozen=True)
class SFTConfig:
    """What a user can turn. Defaults are for the desk world.

    epochs, batch_size: passes over the rows, rows a step. learning_rate: AdamW's, after a short warm-up, falling to 0
    as a cosine. max_length: tokens a row; longer ones are cut at the end.
    """

    epochs: float = 4
    batch_size: int = 256
    learning_rate: float = 2e-3
    max_length: int = 512
    seed: int = 0


def train_sft(
    policy: nn.Module, tokenizer, rows: list[dict], config: SFTConfig, *, callbacks: Sequence = ()
) -> list[dict]:
    """Train `policy` in place on rows prompt / completion (texts); returns TRL's log, one dict a step.

    Raises ValueError if there are no rows.
    """
    from trl import SFTTrainer

    if not rows:
        raise ValueError("rows is empty, expected at least one demonstration")
    encoded, end = [], tokenizer.eos_token_id
    for prompt, completion in encode_pairs(
        tokenizer, [row["prompt"] for row in rows], [row["completion"] for row in rows]
    )[0]:
        response = [*completion, end]
        ids, labels = [*prompt, *response], [-100] * len(prompt) + response
        if len(prompt) < config.max_length:  # or nothing of the response is left
            encoded.append({"input_ids": ids[: config.max_length], "labels": labels[: config.max_length]})

    def batch(rows: list[dict]) -> dict[str, Tensor]:
        ids, mask = right_pad([row["input_ids"] for row in rows], tokenizer.pad_token_id)
        labels, _ = right_pad([row["labels"] for row in rows], -100)
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}

    args = trainer_arguments("SFTConfig", config, policy)
    with _narrow_logits(policy.get_output_embeddings().weight.shape[0]):
        return run_trainer(SFTTrainer, policy, args, encoded, batch, tokenizer, callbacks)


@contextlib.contextmanager
def _narrow_logits(vocabulary: int) -> Iterator[None]:
    """Let TRL's loss take no more memory than the logits need.

    Its buffer for them is 32,768 tokens wide, half a gigabyte at each step; of a vocabulary of 52 each row lies in a
    page of its own. A TRL without that buffer is left as it is.
    """
    from trl.trainer import utils

    name = "_CHUNKED_LOGPROB_CHUNK_SIZE"
    width = getattr(utils, name, None)
    if not isinstance(width, int):
        yield
        return
    setattr(utils, name, min(width, vocabulary))  # one tile as before, and the same logits in it
    try:
        yield
    finally:
        setattr(utils, name, width)


def trainer_arguments(name: str, config, model: nn.Module, **more):
    """TRL's config class `name` with what SFT and reward training share: nothing is saved, every step is logged."""
    import trl

    on_gpu = model.device.type == "cuda"
    with warnings.catch_warnings():  # gradient_checkpointing has a new name, which older transformers do not know
        warnings.simplefilter("ignore", FutureWarning)
        return getattr(trl, name)(
            output_dir=os.fspath(Path(os.environ.get("TMPDIR", "/tmp")) / "alignkit-trainer"),
            num_train_epochs=config.epochs,
            per_device_train_batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            max_length=config.max_length,
            seed=config.seed,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            max_grad_norm=1.0,
            remove_unused_columns=False,
            **more,
        )


def run_trainer(
    kind: type, model: nn.Module, args, rows: list[dict], batch: Callable, tokenizer, callbacks: Sequence
) -> list[dict]:
    """Train on tokenized rows, which `batch` makes tensors of; returns the logged steps as rows with `step` first."""
    from datasets import Dataset
    from transformers import PrinterCallback

    if not rows:
        raise ValueError(f"max_length is {args.max_length}, and every row is longer")
    # TRL checks a Dataset, and trains on anything with a length. From a list a batch comes in a tenth of the time
    more = {"data_collator": batch, "processing_class": tokenizer, "callbacks": list(callbacks)}
    trainer = kind(model, args=args, train_dataset=Dataset.from_list(rows[:1]), **more)
    trainer.train_dataset = rows
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.model.eval()
    # accelerate leaves a `forward` bound to this object: a deep copy (PPO's reference, say) would run its weights
    trainer.model.__dict__.pop("forward", None)
    return [
        {"step": row["step"], **{k: v for k, v in row.items() if k != "step"}}
        for row in trainer.state.log_history
        if "loss" in row
    ]
