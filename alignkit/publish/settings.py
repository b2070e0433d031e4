"""The names of alignkit's settings in other tools, one table per tool and stage; `about` explains a missing
counterpart."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Mapped:
    """A setting in another tool. name: its name there; "" if it has no counterpart. values: for text settings,
    alignkit's -> the tool's.

    neutral: the value at which a setting without counterpart has no effect. about: a remark for the user.
    """

    name: str = ""
    about: str = ""
    values: Mapping[str, object] = field(default_factory=dict)
    neutral: object = None


@dataclass(frozen=True)
class Table:
    """The settings of a stage in a tool: those that a run may have changed, and the constant ones."""

    settings: Mapping[str, Mapped]
    fixed: Mapping[str, object]


OPTIMISER = {
    "epochs": Mapped("num_train_epochs"),
    "batch_size": Mapped("per_device_train_batch_size", "rows or pairs a step, on one device"),
    "learning_rate": Mapped("learning_rate"),
    "seed": Mapped("seed", "the order of training; the draws are not alignkit's"),
}
PRECISION = Mapped("bf16", "AdamW's weights stay in fp32 in alignkit", {"fp32": False, "bf16": True})
MEMORY = {
    "tokens_per_pass": Mapped("", "a batch is read whole there; use gradient accumulation", neutral=None),
    "halve_passes": Mapped("", "no second try when memory runs out", neutral=False),
    "gradient_checkpointing": Mapped("gradient_checkpointing"),
}
# SFT and the reward model: a warm-up of 5 % of the steps, then a cosine to 0, no weight decay (trainer.py)
COSINE = {"lr_scheduler_type": "cosine", "max_grad_norm": 1.0, "weight_decay": 0.0}
CONSTANT = {"lr_scheduler_type": "constant_with_warmup", "weight_decay": 0.0, "adam_epsilon": 1e-5}  # DPO (dpo.py)

# for `trl sft|reward|dpo --config`: TRL's SFTConfig, RewardConfig, DPOConfig, TRL 1.16
TRL_FIXED = {"warmup_steps": 0.05, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
             "logging_steps": 1, "save_strategy": "epoch"}
TRL = {
    "sft": Table({**OPTIMISER, "max_length": Mapped("max_length")}, {**TRL_FIXED, **COSINE}),
    "reward": Table({**OPTIMISER, "max_length": Mapped("max_length"), "centre": Mapped("center_rewards_coefficient")},
                    {**TRL_FIXED, **COSINE}),
    "dpo": Table({
        **OPTIMISER, **MEMORY, "precision": PRECISION, "beta": Mapped("beta"),
        "loss_type": Mapped("loss_type", values={name: name for name in ("sigmoid", "ipo", "hinge", "robust")}),
        "label_smoothing": Mapped("label_smoothing"), "max_grad_norm": Mapped("max_grad_norm"),
        "warmup": Mapped("warmup_steps", "a share of the steps, since it is below 1"),
        "precompute_reference": Mapped("precompute_ref_log_probs"),
        "length_normalised": Mapped("", "loss_type sigmoid_norm is the nearest", neutral=False),
        "max_new_tokens": Mapped("", "max_length there counts prompt and response together, 1024 by default"),
    }, {**TRL_FIXED, **CONSTANT}),
}

# for `llamafactory-cli train`: LLaMA-Factory 0.9.5. All weights are trained, as alignkit does without lora_rank
LF_FIXED = {"do_train": True, "finetuning_type": "full", "warmup_ratio": 0.05, "bf16": False, "fp16": False,
            "report_to": "none", "logging_steps": 1, "save_strategy": "epoch"}
LLAMA_FACTORY = {
    "sft": Table({**OPTIMISER, "max_length": Mapped("cutoff_len")}, {"stage": "sft", **LF_FIXED, **COSINE}),
    "reward": Table({
        **OPTIMISER, "max_length": Mapped("cutoff_len"),
        "centre": Mapped("", "its reward models have no such term", neutral=0.0),
    }, {"stage": "rm", **LF_FIXED, **COSINE}),
    "dpo": Table({
        **OPTIMISER, **MEMORY, "gradient_checkpointing": Mapped("", "disable_gradient_checkpointing is its opposite"),
        "precision": PRECISION, "beta": Mapped("pref_beta"),
        "loss_type": Mapped("pref_loss", "it has no robust loss", {name: name for name in ("sigmoid", "ipo", "hinge")}),
        "label_smoothing": Mapped("dpo_label_smoothing"), "max_grad_norm": Mapped("max_grad_norm"),
        "warmup": Mapped("warmup_ratio"),
        "precompute_reference": Mapped("", "the reference is read at each step, to the same numbers", neutral=True),
        "length_normalised": Mapped("", "it has no such loss", neutral=False),
        "max_new_tokens": Mapped("", "cutoff_len there counts prompt and response together, 2048 by default"),
    }, {"stage": "dpo", **LF_FIXED, **CONSTANT}),
    # the penalties and clips of PPOConfig are fixed in its trainer
    "ppo": Table({}, {"stage": "ppo", "do_train": True, "finetuning_type": "full", "reward_model_type": "full",
                      "per_device_train_batch_size": 16, "learning_rate": 3e-6, "num_train_epochs": 1.0,
                      "ppo_epochs": 4, "report_to": "none", "logging_steps": 1}),
}
