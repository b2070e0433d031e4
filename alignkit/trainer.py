"""Use TRL's trainers for SFT and the reward model, continue from checkpoints, and measure the time of a training
step."""

import contextlib
import dataclasses
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from alignkit.errors import NonFinite
from alignkit.killpoints import reached
from alignkit.models.identity import weights_hash
from alignkit.optim import check_weights, copy_weights, trained_weights
from alignkit.storage import data_hash

TOKENS = "_total_train_tokens"  # TRL's count of the tokens trained on, which it logs


@contextlib.contextmanager
def narrow_logits(vocabulary: int) -> Iterator[None]:
    """Reduce the memory of TRL's loss to the size of the logits.

    TRL's buffer for logits is 32,768 tokens wide, half a gigabyte at each step; with a vocabulary of 52, each row lies
    in a separate memory page. A TRL version without that buffer is not changed.
    """
    from trl.trainer import utils

    name = "_CHUNKED_LOGPROB_CHUNK_SIZE"
    width = getattr(utils, name, None)
    if not isinstance(width, int):
        yield
        return
    setattr(utils, name, min(width, vocabulary))  # still one tile with the same logits
    try:
        yield
    finally:
        setattr(utils, name, width)


def trainer_arguments(name: str, config, model: nn.Module, **more):
    """TRL's config class `name` with the common settings of SFT and reward training: nothing is saved, every step is
    logged."""
    import trl

    on_gpu = model.device.type == "cuda"
    with warnings.catch_warnings():  # gradient_checkpointing has a new name that older transformers lack
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
    kind: type, model: nn.Module, args, rows: list[dict], batch: Callable, tokenizer, callbacks: Sequence,
    checkpoints: Callable | None = None,
) -> list[dict]:
    """Train on tokenised rows, which `batch` converts to tensors; returns the logged steps as rows with `step` first.

    checkpoints: makes the run's Checkpoints of its state; a run with checkpoints continues from the newest. Raises
    NonFinite, before a weight is changed, if a loss or a gradient is not finite.
    """
    from datasets import Dataset
    from transformers import PrinterCallback

    if not rows:
        raise ValueError(f"max_length is {args.max_length}, and every row is longer")
    # TRL checks a Dataset, and trains on anything with a length. From a list a batch comes in a tenth of the time
    more = {"data_collator": batch, "processing_class": tokenizer, "callbacks": list(callbacks)}
    trainer = _resumable(kind)(model, args=args, train_dataset=Dataset.from_list(rows[:1]), **more)
    trainer.train_dataset = rows
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_guard(trainer))
    if checkpoints is None:
        trainer.train()
    else:
        _train_on(trainer, checkpoints(TrainerState(trainer)))
    trainer.model.eval()
    # accelerate leaves a `forward` bound to this object: a deep copy (PPO's reference, say) would run its weights
    trainer.model.__dict__.pop("forward", None)
    return [
        {"step": row["step"], **{k: v for k, v in row.items() if k != "step"}}
        for row in trainer.state.log_history
        if "loss" in row
    ]


class TrainerState:
    """Everything that a run of TRL's trainer changes: weights, optimiser, schedule, position in the data, torch's
    generators."""

    def __init__(self, trainer):
        self.trainer = trainer

    @property
    def step(self) -> int:
        """Number of completed steps."""
        return self.trainer.state.global_step

    def facts(self) -> dict:
        """The initial weights and the tokenised rows."""
        return {"model": weights_hash(self.trainer.model), "data": data_hash(self.trainer.train_dataset)}

    def state_dict(self) -> dict:
        """The state for `load_state_dict`. The tensors are not copied."""
        trainer = self.trainer
        generators = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            generators["cuda"] = torch.cuda.get_rng_state_all()
        place = {**dataclasses.asdict(trainer.state), "stateful_callbacks": {}}
        return {"weights": trained_weights(trainer.model),
                "optimizer": trainer.optimizer.state_dict(), "schedule": trainer.lr_scheduler.state_dict(),
                "generators": generators, "place": json.dumps(place),
                "tokens": getattr(trainer, TOKENS, 0)}

    def load_state_dict(self, saved: Mapping) -> None:
        """Restore the weights now; the trainer requests the rest when it starts."""
        weights = trained_weights(self.trainer.model)
        check_weights(weights, saved["weights"], "saved['weights']")
        copy_weights(weights, saved["weights"])
        self.trainer.saved = saved
        setattr(self.trainer, TOKENS, saved["tokens"])


def _train_on(trainer, checkpoints) -> None:
    """Train to the end, from the newest checkpoint if there is one. The Trainer requires a folder with its position."""
    trainer.checkpoints = checkpoints
    with tempfile.TemporaryDirectory() as folder:
        saved = checkpoints.resume()
        if saved:
            Path(folder, "trainer_state.json").write_text(trainer.saved["place"], encoding="utf-8")
        try:
            trainer.train(resume_from_checkpoint=folder if saved else None)
        except NonFinite as error:
            checkpoints.keep_batch(error)
            raise


def _resumable(kind: type) -> type:
    """TRL's trainer `kind` with checkpoints in alignkit's format instead of its pickles."""

    class Trainer(kind):
        checkpoints = saved = batch = None

        def training_step(self, model, inputs, *rest):
            self.batch = inputs
            loss = super().training_step(model, inputs, *rest)
            if not torch.isfinite(loss):
                raise _non_finite(self, f"the loss is {float(loss)}")
            return loss

        def _load_from_checkpoint(self, *_):
            pass  # the weights are already loaded

        def _load_optimizer_and_scheduler(self, checkpoint):
            if checkpoint is not None:
                self.optimizer.load_state_dict(self.saved["optimizer"])
                self.lr_scheduler.load_state_dict(self.saved["schedule"])

        def _load_rng_state(self, checkpoint):
            if checkpoint is not None:
                torch.set_rng_state(self.saved["generators"]["cpu"])
                if "cuda" in self.saved["generators"]:
                    torch.cuda.set_rng_state_all(self.saved["generators"]["cuda"])

        def _save_checkpoint(self, *_):
            self.checkpoints.save(self.state.global_step)

    Trainer.__name__ = Trainer.__qualname__ = kind.__name__
    return Trainer


def _guard(trainer):
    """A callback that raises before a step that is not finite, and requests a checkpoint when one is due."""
    from transformers import TrainerCallback

    class Guard(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **_):
            gradients = [weight.grad for weight in trainer.model.parameters() if weight.grad is not None]
            if gradients and not torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all():
                raise _non_finite(trainer, "a gradient is not finite")

        def on_step_end(self, args, state, control, **_):
            reached("trainer.step")
            due = trainer.checkpoints is not None and trainer.checkpoints.due()
            control.should_save = due or (trainer.checkpoints is not None and state.global_step >= state.max_steps)

    return Guard()


def _non_finite(trainer, what: str) -> NonFinite:
    step = trainer.state.global_step + 1
    batch = {name: value.tolist() for name, value in trainer.batch.items() if hasattr(value, "tolist")}
    return NonFinite(f"step {step} of {type(trainer).__name__}: {what}; the weights are those before this step. A "
                     f"learning rate of {trainer.args.learning_rate:g} may be too high", step, batch)


def step_seconds(
    train: Callable[[list], object], rows: Sequence, batch_size: int, steps: int = 4
) -> tuple[float, float]:
    """Seconds to start training, and seconds per further step: `(start, step)`.

    train: trains one pass over the given rows at learning rate 0, so no weight changes; it is called with one batch and
    with 1 + steps batches. rows: training data; fewer than two batches are repeated.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("rows is empty, expected at least one row to train on")
    probe = [rows[i % len(rows)] for i in range((1 + steps) * batch_size)]
    train(probe[:batch_size])  # the first call warms up
    begun = time.perf_counter()
    train(probe[:batch_size])
    between = time.perf_counter()
    train(probe)
    one, more = between - begun, time.perf_counter() - between
    step = max(more - one, 0.0) / steps
    return max(one - step, 0.0), step
