"""The configs of SFT, reward model, PPO and DPO, with a description of every setting.

A config checks its settings when it is made. `preset` chooses settings for a pretrained model.
"""

import math
import textwrap
from dataclasses import dataclass, field, fields
from typing import Any

PRECISIONS = ("fp32", "bf16")
ADVANTAGES = ("gae", "rloo", "grpo")
WITHOUT_CRITIC = ("rloo", "grpo")  # advantages that compare the responses to one prompt
KL_PENALTIES = ("reward", "k1", "k2", "k3")


def knob(default: Any, meaning: str, *, group: str = "") -> Any:
    """A field with its default and a one-sentence description. group: the heading that starts at this field, if any."""
    return field(default=default, metadata={"meaning": meaning, "group": group})


def documented(config: type) -> type:
    """Add the description of each setting to the config's docstring, by group, so that `help` shows it."""
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
    """Settings of PPO. The defaults are for the desk world."""

    # Sampling
    iterations: int = knob(40, "Number of PPO iterations; each samples one rollout and then takes optimiser steps on "
                               "it.", group="Sampling")
    prompts_per_iteration: int = knob(512, "Number of prompts drawn for each rollout.")
    samples_per_prompt: int = knob(1, "Number of responses sampled for each prompt; the rollout has prompts × samples "
                                      "responses.")
    max_new_tokens: int = knob(4, "Maximum length of a response in tokens; a longer response is truncated.")
    temperature: float = knob(1.0, "Sampling temperature; log-probs are computed at the same temperature.")

    # KL penalty
    kl_coef: float = knob(0.2, "KL coefficient: the penalty for one nat of KL(π ‖ π_ref), in units of the score; the "
                               "same quantity as DPO's beta.", group="KL penalty")
    kl_penalty: str = knob("reward", 'Where the KL penalty enters. "reward": k1 in the token rewards. "k1", "k2" or '
                                     '"k3": that estimator of each token, times kl_coef, is added to the loss. As a '
                                     "loss k1 has expected gradient 0 and trains nothing; k2 has the gradient of each "
                                     "token's KL(π ‖ π_ref); k3, GRPO's, that of KL(π_ref ‖ π). Whitening would "
                                     "change the price of a nat in the loss, so all three are refused with "
                                     'whiten_rewards, and with whiten_advantages if advantage is "gae".')
    target_kl: float | None = knob(None, "Target KL in nats per response: kl_coef is adapted towards it (Ziegler "
                                         "2019); None keeps kl_coef fixed.")
    kl_horizon: int = knob(10_000, "Number of responses over which kl_coef is adapted; a smaller horizon adapts "
                                   "faster.")
    max_kl: float | None = knob(None, "Training stops when objective/kl exceeds this many nats per response. None: 2 "
                                      "nats × max_new_tokens, which no healthy run has reached; inf: never stop.")
    max_step_kl: float | None = knob(None, "Skip the remaining epochs of an iteration when the KL to the policy that "
                                           "sampled reaches this many nats per token; None: never skip.")

    # Losses
    gamma: float = knob(1.0, "Discount factor γ for later rewards.", group="Losses")
    gae_lambda: float = knob(0.95, "The λ of GAE: 0 relies on the critic, 1 relies on the sampled rewards.")
    clip_range: float = knob(0.2, "Clip range ε: the ratio π / π_old is clipped to 1 ± ε (inf: no clipping).")
    value_clip_range: float = knob(0.2, "Clip range of the critic's values around their old values (inf: no clipping).")
    value_coef: float = knob(1.0, "Weight of the critic's loss; it has an effect only with shared_trunk.")
    entropy_coef: float = knob(0.0, "Entropy bonus per nat and token.")
    ptx_coef: float = knob(0.0, "Weight of the SFT loss on demonstrations that is added at each step.")

    # Rewards and advantages
    advantage: str = knob("gae", '"gae": from token rewards and a critic. "rloo": the total reward of a response minus '
                                 'the mean of the other responses to the same draw of its prompt. "grpo": minus the '
                                 "mean of all of them, divided by their standard deviation; if kl_penalty puts the KL "
                                 "into the loss, kl_coef is a price in units of that deviation, which differs between "
                                 "prompts. rloo and grpo give all tokens of a response the same advantage, have no "
                                 "critic, need samples_per_prompt of 2 or more, and use neither gae_lambda nor "
                                 "whiten_advantages.", group="Rewards and advantages")
    missing_eos_penalty: float = knob(0.0, "Subtracted once from the score of a truncated response.")
    score_clip: float = knob(math.inf, "Scores are clipped to ± this value.")
    whiten_rewards: bool = knob(False, "Scale the token rewards of each batch to variance 1 without changing their "
                                       "mean.")
    whiten_advantages: bool = knob(True, "Shift and scale the advantages of each batch to mean 0 and variance 1; only "
                                         'with advantage "gae".')

    # Optimiser
    epochs: int = knob(2, "Number of passes over each rollout.", group="Optimiser")
    minibatch_size: int = knob(128, "Number of responses per optimiser step.")
    learning_rate: float = knob(1e-3, "Learning rate of AdamW for the policy.")
    critic_learning_rate: float = knob(2e-3, "Learning rate of AdamW for the critic.")
    max_grad_norm: float = knob(1.0, "Gradients with a larger norm are scaled down to this norm.")
    critic_warmup: int = knob(0, "Number of initial iterations that train only the critic.")
    lr_decay: bool = knob(True, "Decrease both learning rates linearly to 0 over the iterations.")

    # Model, precision and memory
    shared_trunk: bool = knob(False, "Make the critic a value head on the policy's own body, initialised to 0. The "
                                     "critic's loss then also trains the body, and a step needs one forward pass "
                                     "instead of two.", group="Model, precision and memory")
    precision: str = knob("fp32", 'On a CPU: "fp32", or "bf16" for the linear layers of policy, reference and critic '
                                  "(attention and heads stay in fp32 if `alignkit.forward.cpu` reads the model). bf16 "
                                  "is faster only if the CPU multiplies bf16 in hardware (AMX). A GPU always uses "
                                  "bf16.")
    tokens_per_pass: int | None = knob(None, "Maximum number of tokens per forward pass, padding included. A larger "
                                             "minibatch is sorted by length and split into parts, and the gradients of "
                                             "the parts are added up. None: no split. The notebooks have no such "
                                             "parameter, because it changes only memory and rounding.")
    gradient_checkpointing: bool = knob(False, "Recompute the layers in the backward pass instead of storing their "
                                               "activations. The notebooks have no such parameter, for the same "
                                               "reason.")
    halve_passes: bool = knob(False, "If an iteration runs out of memory, repeat it with half as many tokens per pass "
                                     "instead of stopping.")

    # Randomness
    seed: int = knob(0, "Seed of all random draws.", group="Randomness")

    @property
    def kl_limit(self) -> float:
        """The objective/kl, in nats per response, above which training stops."""
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
        _check_advantage(self)
        _check_kl_penalty(self)


def _check_advantage(config: PPOConfig) -> None:
    """Raise ValueError if `advantage` is unknown, or if another setting does not go with it."""
    kind = config.advantage
    if kind not in ADVANTAGES:
        raise ValueError(f"advantage is {kind!r}, expected one of {', '.join(ADVANTAGES)}")
    if kind not in WITHOUT_CRITIC:
        return
    if config.samples_per_prompt < 2:
        raise ValueError(f"samples_per_prompt is {config.samples_per_prompt}, expected at least 2 with advantage "
                         f"{kind!r}, which compares the responses to one prompt")
    if config.shared_trunk:
        raise ValueError(f"shared_trunk is True, expected False with advantage {kind!r}, which has no critic to share "
                         "a trunk with")
    if config.critic_warmup > 0:
        raise ValueError(f"critic_warmup is {config.critic_warmup}, expected 0 with advantage {kind!r}, which has no "
                         "critic to warm up")
    if config.gamma != 1:
        raise ValueError(f"gamma is {config.gamma}, expected 1 with advantage {kind!r}, which compares the whole "
                         "rewards of responses, without discount")


def _check_kl_penalty(config: PPOConfig) -> None:
    """Raise ValueError if `kl_penalty` is unknown, or if whitening would change the price of a nat."""
    kind = config.kl_penalty
    if kind not in KL_PENALTIES:
        raise ValueError(f"kl_penalty is {kind!r}, expected one of {', '.join(KL_PENALTIES)}")
    whitened = ["whiten_rewards"] * config.whiten_rewards
    whitened += ["whiten_advantages"] * (config.whiten_advantages and config.advantage == "gae")
    if kind != "reward" and whitened:
        raise ValueError(f"{whitened[0]} is True, expected False with kl_penalty {kind!r}: whitening scales the reward "
                         "by a number of the batch, and not the KL in the loss, so that a nat would have another price "
                         "in each batch")


def check_precision(precision: str) -> None:
    """Raise ValueError if `precision` is not "fp32" or "bf16"."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")


def check_memory(tokens_per_pass: int | None, gradient_checkpointing: bool) -> None:
    """Raise ValueError if an option that saves memory has an invalid value."""
    if tokens_per_pass is not None and not (type(tokens_per_pass) is int and tokens_per_pass >= 1):
        raise ValueError(f"tokens_per_pass is {tokens_per_pass!r}, expected None or a whole number of at least 1")
    if type(gradient_checkpointing) is not bool:
        raise ValueError(f"gradient_checkpointing is {gradient_checkpointing!r}, expected True or False")


def _check_steps(config) -> None:
    """Raise ValueError if a setting that SFT, reward training and DPO share is out of range."""
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
    """Settings of DPO. The defaults are for the desk world."""

    # KL penalty
    beta: float = knob(0.5, "KL coefficient β, the same quantity as PPO's kl_coef: a larger beta keeps the policy "
                            "closer to the reference.", group="KL penalty")

    # Loss
    loss_type: str = knob("sigmoid", '"sigmoid" (DPO), "ipo", "hinge" or "robust" (DPO for flipped labels).',
                                     group="Loss")
    label_smoothing: float = knob(0.0, "Assumed share of flipped labels, below 0.5. With sigmoid this is cDPO, whose "
                                       "loss has its minimum at a finite margin. With robust, the mean of the loss "
                                       "over the flips equals the loss without flips.")
    length_normalised: bool = knob(False, "Use log-probs per token instead of per response in the loss; logged values "
                                          "stay per response.")
    max_new_tokens: int = knob(4, "Maximum length of a response in tokens, EOS included; a longer response is "
                                  "truncated.")

    # Optimiser
    epochs: int = knob(3, "Number of passes over the pairs.", group="Optimiser")
    batch_size: int = knob(128, "Number of pairs per optimiser step.")
    learning_rate: float = knob(3e-4, "Learning rate of AdamW.")
    max_grad_norm: float = knob(1.0, "Gradients with a larger norm are scaled down to this norm.")
    warmup: float = knob(0.1, "Share of the steps over which the learning rate increases linearly.")

    # Precision and memory
    precompute_reference: bool = knob(True, "Compute the reference's log-probs of all pairs once, before training.",
                                            group="Precision and memory")
    precision: str = knob("fp32", 'On a CPU: "fp32", or "bf16" for the linear layers of policy and reference, as in '
                                  "PPOConfig.")
    tokens_per_pass: int | None = knob(None, "Maximum number of tokens per forward pass, padding included. A larger "
                                             "batch is sorted by length and split into parts, with one forward pass "
                                             "for the chosen and one for the rejected responses; the gradients of the "
                                             "parts are added up. None: no split. The notebooks have no such "
                                             "parameter, because it changes only memory and rounding.")
    gradient_checkpointing: bool = knob(False, "Recompute the layers in the backward pass instead of storing their "
                                               "activations. The notebooks have no such parameter, for the same "
                                               "reason.")
    halve_passes: bool = knob(False, "If a step runs out of memory, repeat it with half as many tokens per pass "
                                     "instead of stopping.")

    # Randomness
    seed: int = knob(0, "Seed of all random draws.", group="Randomness")

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
    """Settings of supervised fine-tuning (SFT). The defaults are for the desk world."""

    epochs: float = knob(4, "Number of passes over the rows.", group="Optimiser")
    batch_size: int = knob(256, "Number of rows per optimiser step.")
    learning_rate: float = knob(2e-3, "Learning rate of AdamW, with a short warm-up and cosine decay to 0.")
    max_length: int = knob(512, "Maximum length of a row in tokens; a longer row is truncated at its end.",
                                group="Rows")
    seed: int = knob(0, "Seed of all random draws.", group="Randomness")

    def __post_init__(self):
        _check_steps(self)


@documented
@dataclass(frozen=True)
class RewardConfig:
    """Settings of reward-model training. The defaults are for the desk world; the names are those of SFTConfig."""

    epochs: float = knob(4, "Number of passes over the pairs.", group="Optimiser")
    batch_size: int = knob(128, "Number of pairs per optimiser step.")
    learning_rate: float = knob(1e-3, "Learning rate of AdamW, with a short warm-up and cosine decay to 0.")
    max_length: int = knob(512, "Maximum length of prompt and response in tokens; pairs with a longer side are "
                                "skipped.", group="Pairs")
    centre: float = knob(0.01, "Weight of (r_chosen + r_rejected)², which keeps scores near 0 (TRL's "
                               "center_rewards_coefficient).", group="Loss")
    seed: int = knob(0, "Seed of all random draws.", group="Randomness")

    def __post_init__(self):
        _check_steps(self)
        if not self.centre >= 0:
            raise ValueError(f"centre is {self.centre}, expected 0 or more")


# A pretrained model needs a much smaller learning rate than a new one (Ivison 2024; Huang 2024).
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
    """The config for `model` ("tiny", a folder or a Hub id) with the user's choices; None keeps the preset's value.

    Raises TypeError, which lists the valid options, if the config has no such option.
    """
    options = [f.name for f in fields(config_class)]
    for name in chosen:
        if name not in options:
            raise TypeError(f"{config_class.__name__} has no option {name!r}; it has {', '.join(options)}")
    start = {} if str(model) == "tiny" else PRETRAINED[config_class]
    return config_class(**{**start, **{name: value for name, value in chosen.items() if value is not None}})
