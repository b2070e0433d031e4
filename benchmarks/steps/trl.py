"""TRL's side of the benchmark."""

import copy
import os
from pathlib import Path

import datasets
import torch
import trl

from alignkit import optim
from alignkit.models.adapters import frozen_copy
from benchmarks.steps.work import BETA, Work


class TRL:
    """A TRL trainer's `training_step`, clip and optimiser step, on the batch that its data loader made of our rows."""

    def __init__(self, work: Work, what: str):
        common = {
            "output_dir": os.fspath(Path(os.environ.get("TMPDIR", "/tmp")) / "alignkit-benchmark"),
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "report_to": "none",
            "disable_tqdm": True,
            "max_grad_norm": 1.0,
            "per_device_train_batch_size": len(work.pairs),
            "max_length": 512,
        }
        options = {"processing_class": work.tokenizer}
        if what == "sft":
            model, trainer, config = (
                copy.deepcopy(work.policy),
                trl.SFTTrainer,
                trl.SFTConfig(**common, completion_only_loss=True),
            )
            rows = [
                {
                    "input_ids": ids,
                    "completion_mask": [0] * (len(ids) - work.sizes.new_tokens) + [1] * work.sizes.new_tokens,
                }
                for ids in work.encoded("chosen")
            ]
        elif what == "reward":
            model, trainer, config = copy.deepcopy(work.reward_model), trl.RewardTrainer, trl.RewardConfig(**common)
            rows = [
                {"chosen_ids": chosen, "rejected_ids": rejected}
                for chosen, rejected in zip(work.encoded("chosen"), work.encoded("rejected"), strict=True)
            ]
        else:
            model, trainer, rows = copy.deepcopy(work.policy), trl.DPOTrainer, work.pairs
            config = trl.DPOConfig(**common, beta=BETA, precompute_ref_log_probs=what == "dpo_precomputed")
            options["ref_model"] = frozen_copy(work.ref)
        self.trainer = trainer(
            model,
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            optimizers=(optim.adamw(list(model.parameters()), 1e-5), None),
            **options,
        )
        self.trainer.current_gradient_accumulation_steps = 1  # what Trainer.train() would set
        self.batch = next(iter(self.trainer.get_train_dataloader()))
        self.items = (self.batch["labels"] != -100).sum() if what == "sft" else None

    def step(self) -> float:
        trainer = self.trainer
        loss = trainer.training_step(trainer.model, dict(self.batch), self.items)
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        return loss.item()
