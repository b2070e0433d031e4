"""Every setting that a user can turn, each with its sentence: SFT, reward model, PPO, DPO.

Settings are checked when a config is made. `preset` chooses them for a pretrained model.
"""

import math
import textwrap
from dataclasses import dataclass, field, fields
from typing import Any

PRECISIONS = ("fp32", "bf16")


def knob(default: Any, meaning: str, *, group: str = "") -> Any:
    """A setting: its default, and the sentence that says what it does. group: the heading that it opens, if it does."""
    return field(default=default, metadata={"meaning": meaning, "group": group})


def documented(config: type) -> type:
    """Write the sentence of each knob into the config's docstring, in groups, where `help` shows them."""
    lines = [config.__doc__ or ""]
    for setting in fields(config):
        if setting.metadata["group"]:
            lines.append(f"\n    {setting.metadata['group']}")
        sentence = f"{setting.name} = {setting.default!r}: {setting.metadata['meaning']}"
        lines += textwrap.wrap(sentence, 110, initial_indent=" " * 6, subsequent_indent=" " * 10)
    config.__doc__ = "\n".join(lines)
    return config


@documented
@dataclass(frozen=True)
class PPOConfig:
    """What a user of PPO can turn. Defaults are for the desk world."""

    # Sampling
    iterations: int = knob(40, "How many rollouts, each followed by its optimiser steps.", group="Sampling")
    prompts_per_iteration: int = knob(512, "Prompts drawn for a rollout.")
    samples_per_prompt: int = knob(1, "Responses to each of them; prompts times samples is the size of a rollout.")
    max_new_tokens: int = knob(4, "Tokens after which a response is cut.")
    temperature: float = knob(1.0, "Temperature of sampling and of scoring alike.")

    # Price of KL
    kl_coef: float = knob(0.2, "Price of a nat of KL(π ‖ π_ref), in units of the score; the same quantity as DPO's "
                          "beta.", group="Price of KL")
    target_kl: float | None = knob(None, "Nats a response towards which kl_coef is adapted (Ziegler 2019); None keeps "
                                   "kl_coef fixed.")
    kl_horizon: int = knob(10_000, "Responses over which that adaptation takes effect; smaller is faster.")
    max_kl: float | None = knob(None, "Nats a response of objective/kl above which training stops; None: 2 nats for "
                                "each of max_new_tokens, which no healthy run was seen to reach; inf: never.")
    max_step_kl: float | None = knob(None, "Nats a token from the policy that sampled, at which an iteration's "
                                     "remaining epochs are left out; None: never.")

    # Losses
    gamma: float = knob(1.0, "Discount of later rewards.", group="Losses")
    gae_lambda: float = knob(0.95, "GAE's λ: 0 trusts the critic, 1 trusts the sampled rewards.")
    clip_range: float = knob(0.2, "Half-width of the clip of π / π_old around 1 (inf: no clip).")
    value_clip_range: float = knob(0.2, "Half-width of the clip of the critic's values around their old ones (inf: no "
                                   "clip).")
    value_coef: float = knob(1.0, "Weight of the critic's loss; in effect with shared_trunk only.")
    entropy_coef: float = knob(0.0, "Bonus for a nat of entropy a token.")
    ptx_coef: float = knob(0.0, "Weight of the SFT loss on demonstrations that each step mixes in.")

    # Rewards and advantages
    missing_eos_penalty: float = knob(0.0, "Taken off the score, once, of a response that was cut.",
                                      group="Rewards and advantages")
    score_clip: float = knob(math.inf, "Scores are clipped to plus or minus this.")
    whiten_rewards: bool = knob(False, "Scale the rewards of tokens to variance 1 a batch, without moving their mean.")
    whiten_advantages: bool = knob(True, "Shift and scale the advantages to mean 0 and variance 1 a batch.")

    # Optimiser
    epochs: int = knob(2, "Passes over a rollout.", group="Optimiser")
    minibatch_size: int = knob(128, "Responses a step.")
    learning_rate: float = knob(1e-3, "AdamW's learning rate for the policy.")
    critic_learning_rate: float = knob(2e-3, "AdamW's learning rate for the critic.")
    max_grad_norm: float = knob(1.0, "Gradients of a larger norm are scaled down to it.")
    critic_warmup: int = knob(0, "First iterations, which train the critic alone.")
    lr_decay: bool = knob(True, "Let both learning rates fall linearly to 0 over the iterations.")

    # Model, precision and memory
    shared_trunk: bool = knob(False, "Make the critic a value head on the policy's own body, 0 at first, whose loss "
                              "trains that body too: one forward pass a step instead of two.",
                              group="Model, precision and memory")
    precision: str = knob("fp32", 'On a CPU "fp32", or "bf16" for the linear layers of policy, reference and critic '
                          "(attention and heads stay in fp32 where `alignkit.forward.cpu` reads the model), which pays "
                          "where the CPU multiplies bf16 in hardware (AMX). A GPU always takes bf16.")
    tokens_per_pass: int | None = knob(None, "Tokens, padding included, beyond which a minibatch is sorted by length "
                                       "and read in parts, by one forward pass each; the gradients of its parts add up "
                                       "to its own. None: all at once. No parameter of the notebooks, since it changes "
                                       "nothing but memory and rounding.")
    gradient_checkpointing: bool = knob(False, "Compute layers again in the backward pass instead of keeping them. No "
                                        "parameter of the notebooks, for the same reason.")
    halve_passes: bool = knob(False, "When memory runs out in an iteration, make it again with half the tokens a pass, "
                              "instead of stopping.")

    # Randomness
    seed: int = knob(0, "Start of every random draw.", group="Randomness")

    @property
    def kl_limit(self) -> float:
        """Nats a response of objective/kl above which training stops."""
        return 2.0 * self.max_new_tokens if self.max_kl is None else self.max_kl

    def __post_init__(self):
        check_precision(self.precision)
        check_memory(self.tokens_per_pass, self.gradient_checkpointing)
        for name in (
            "iterations",
            "prompts_per_iteration",
            "samples_per_prompt",
            "max_new_tokens",
            "epochs",
            "minibatch_size",
            "kl_horizon",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("kl_coef", "entropy_coef", "ptx_coef", "value_coef", "missing_eos_penalty", "learning_rate",
                     "critic_learning_rate", "critic_warmup", "clip_range", "value_clip_range"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more")
        for name in ("temperature", "max_grad_norm", "score_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected more than 0")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number between 0 and 1")


def check_precision(precision: str) -> None:
    """Raise ValueError if `precision` is not "fp32" or "bf16"."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")


def check_memory(tokens_per_pass: int | None, gradient_checkpointing: bool) -> None:
    """Raise ValueError if an option that saves memory is not what its name says."""
    if tokens_per_pass is not None and not (type(tokens_per_pass) is int and tokens_per_pass >= 1):
        raise ValueError(f"tokens_per_pass is {tokens_per_pass!r}, expected None or a whole number of at least 1")
    if type(gradient_checkpointing) is not bool:
        raise ValueError(f"gradient_checkpointing is {gradient_checkpointing!r}, expected True or False")


def _check_steps(config) -> None:
    """Raise ValueError if what SFT, reward training and DPO have in common is out of its range."""
    if not config.epochs > 0:
        raise ValueError(f"epochs is {config.epochs}, expected more than 0")
    if not config.learning_rate >= 0:
        raise ValueError(f"learning_rate is {config.learning_rate}, expected 0 or more")
    for name in ("batch_size", "max_length"):
        if getattr(config, name, 1) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}, expected at least 1")
    if not getattr(config, "max_grad_norm", 1) > 0:
        raise ValueError(f"max_grad_norm is {config.max_grad_norm}, expected more than 0")


LOSSES = ("sigmoid", "ipo", "hinge", "robust")
SMOOTHED = ("sigmoid", "robust")  # those that read label_smoothing


@documented
@dataclass(frozen=True)
class DPOConfig:
    """What a user of DPO can turn. Defaults are for the desk world."""

    # Price of KL
    beta: float = knob(0.5, "Price of KL, the same quantity as PPO's kl_coef: a larger beta keeps the policy closer to "
                       "the reference.", group="Price of KL")

    # Loss
    loss_type: str = knob("sigmoid", '"sigmoid" (DPO), "ipo", "hinge" or "robust" (DPO for flipped labels).',
                          group="Loss")
    label_smoothing: float = knob(0.0, "Share of labels assumed flipped, below 0.5. With sigmoid it is cDPO, which "
                                  "expects flips and stops at a finite margin; with robust the loss is, on average "
                                  "over the flips, the one without them.")
    length_normalised: bool = knob(False, "Take log-probs per token rather than per response in the loss; what is "
                                   "logged stays per response.")
    max_new_tokens: int = knob(4, "Tokens, EOS included, after which a response is cut.")

    # Optimiser
    epochs: int = knob(3, "Passes over the pairs.", group="Optimiser")
    batch_size: int = knob(128, "Pairs a step.")
    learning_rate: float = knob(3e-4, "AdamW's learning rate.")
    max_grad_norm: float = knob(1.0, "Gradients of a larger norm are scaled down to it.")
    warmup: float = knob(0.1, "Share of the steps over which the learning rate rises linearly.")

    # Precision and memory
    precompute_reference: bool = knob(True, "Score all pairs with the reference once, before training.",
                                      group="Precision and memory")
    precision: str = knob("fp32", 'On a CPU "fp32", or "bf16" for the linear layers of policy and reference, as in '
                          "PPOConfig.")
    tokens_per_pass: int | None = knob(None, "Tokens, padding included, beyond which a batch is sorted by length and "
                                       "read in parts, chosen and rejected by one forward pass each; the gradients of "
                                       "the parts add up to its own. None: all at once. No parameter of the notebooks, "
                                       "since it changes nothing but memory and rounding.")
    gradient_checkpointing: bool = knob(False, "Compute layers again in the backward pass instead of keeping them. No "
                                        "parameter of the notebooks, for the same reason.")
    halve_passes: bool = knob(False, "When memory runs out in a step, make it again with half the tokens a pass, "
                              "instead of stopping.")

    # Randomness
    seed: int = knob(0, "Start of every random draw.", group="Randomness")

    def __post_init__(self):
        check_precision(self.precision)
        check_memory(self.tokens_per_pass, self.gradient_checkpointing)
        if not self.beta > 0:
            raise ValueError(f"beta is {self.beta}, expected more than 0")
        if self.loss_type not in LOSSES:
            raise ValueError(f"loss_type is {self.loss_type!r}, expected one of {', '.join(LOSSES)}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}, expected a share of flipped labels from 0 to below 0.5"
            )
        if self.label_smoothing and self.loss_type not in SMOOTHED:
            expected = " or ".join(map(repr, SMOOTHED))
            raise ValueError(f"label_smoothing goes with loss_type {expected} only, not with {self.loss_type!r}")
        for name in ("max_new_tokens", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is {self.warmup}, expected a share of the steps between 0 and 1")
        _check_steps(self)


@documented
@dataclass(frozen=True)
class SFTConfig:
    """What a user of supervised fine-tuning can turn. Defaults are for the desk world."""

    epochs: float = knob(4, "Passes over the rows.", group="Optimiser")
    batch_size: int = knob(256, "Rows a step.")
    learning_rate: float = knob(2e-3, "AdamW's learning rate, after a short warm-up, falling to 0 as a cosine.")
    max_length: int = knob(512, "Tokens a row; a longer one is cut at its end.", group="Rows")
    seed: int = knob(0, "Start of every random draw.", group="Randomness")

    def __post_init__(self):
        _check_steps(self)


@documented
@dataclass(frozen=True)
class RewardConfig:
    """What a user of reward-model training can turn. Defaults are for the desk world; the names are SFTConfig's."""

    epochs: float = knob(4, "Passes over the pairs.", group="Optimiser")
    batch_size: int = knob(128, "Pairs a step.")
    learning_rate: float = knob(1e-3, "AdamW's learning rate, after a short warm-up, falling to 0 as a cosine.")
    max_length: int = knob(512, "Tokens of prompt and response; a pair with a longer side is left out.", group="Pairs")
    centre: float = knob(0.01, "Weight of (r_chosen + r_rejected)², which keeps scores near 0 (TRL's "
                         "center_rewards_coefficient).", group="Loss")
    seed: int = knob(0, "Start of every random draw.", group="Randomness")

    def __post_init__(self):
        _check_steps(self)
        if not self.centre >= 0:
            raise ValueError(f"centre is {self.centre}, expected 0 or more")


# A pretrained model moves with much smaller steps than one that was just made (Ivison 2024; Huang 2024).
PRETRAINED = {
    SFTConfig: {"epochs": 1, "batch_size": 16, "learning_rate": 2e-5},
    RewardConfig: {"epochs": 1, "batch_size": 16, "learning_rate": 1e-5},
    PPOConfig: {
        "iterations": 20,
        "prompts_per_iteration": 64,
        "epochs": 4,
        "minibatch_size": 16,
        "max_new_tokens": 32,
        "learning_rate": 3e-6,
        "critic_learning_rate": 1e-5,
        "kl_coef": 0.05,
    },
    DPOConfig: {"epochs": 1, "batch_size": 16, "learning_rate": 1e-6, "beta": 0.1, "max_new_tokens": 512},
}


def preset(config_class, model: str, **chosen):
    """A config for `model` ("tiny", a folder or a Hub id) with what the user chose; None keeps the preset's value.

    Raises TypeError, naming the known options, on an option that the config does not have.
    """
    options = [f.name for f in fields(config_class)]
    for name in chosen:
        if name not in options:
            raise TypeError(f"{config_class.__name__} has no option {name!r}; it has {', '.join(options)}")
    start = {} if str(model) == "tiny" else PRETRAINED[config_class]
    return config_class(**{**start, **{name: value for name, value in chosen.items() if value is not None}})
