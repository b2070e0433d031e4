"""How SFT and the reward model use TRL's trainers, and how long a step of them takes."""

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import nn


@contextlib.contextmanager
def narrow_logits(vocabulary: int) -> Iterator[None]:
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


def step_seconds(
    train: Callable[[list], object], rows: Sequence, batch_size: int, steps: int = 4
) -> tuple[float, float]:
    """Seconds that training takes to begin, and seconds of one more step: `(start, step)`.

    train: trains one pass over the rows it is given, at learning rate 0, so that no weight moves; it is called with one
    batch and with 1 + steps of them. rows: training data; fewer than two batches are repeated.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("rows is empty, expected at least one row to train on")
    few = [rows[i % len(rows)] for i in range((1 + steps) * batch_size)]
    train(few[:batch_size])  # the first call warms up
    begun = time.perf_counter()
    train(few[:batch_size])
    between = time.perf_counter()
    train(few)
    one, more = between - begun, time.perf_counter() - between
    step = max(more - one, 0.0) / steps
    return max(one - step, 0.0), step
