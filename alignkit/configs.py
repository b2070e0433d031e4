"""Every setting that a user can turn, checked when it is made: SFT, reward model, PPO, DPO, and presets for pretrained models."""

import math
from dataclasses import dataclass, fields

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class PPOConfig:
    """What a user can turn. Defaults are for the desk world.

    iterations: rollouts, each followed by its steps. prompts_per_iteration, samples_per_prompt: their product is the
    batch. max_new_tokens: response limit, tokens. temperature: of sampling and of scoring alike.
    kl_coef: price of a nat of KL(π ‖ π_ref), in units of the score; the same quantity as DPO's beta.
    target_kl: None keeps kl_coef fixed; a number (nats a response) adapts it (Ziegler 2019) with kl_horizon
    (responses). max_kl: stop training when objective/kl exceeds this many nats. max_step_kl: leave an iteration's
    remaining steps out when the policy has moved this far (nats a token) from the one that sampled.
    gamma, gae_lambda: discount and GAE's λ. clip_range, value_clip_range: half-widths of the clips (inf: none).
    value_coef: weight of the critic's loss; only in effect with shared_trunk. entropy_coef: bonus per nat.
    ptx_coef: weight of the SFT loss on demonstrations.
    missing_eos_penalty: taken off the score, once, of a response cut at the limit. score_clip: scores are clipped to ±
    this. whiten_rewards: scale per-token rewards to variance 1 (no mean shift). whiten_advantages: mean 0, variance 1 a
    batch. epochs, minibatch_size: passes over a rollout, responses a step. learning_rate, critic_learning_rate,
    max_grad_norm: AdamW's and the clip. critic_warmup: first iterations that train the critic alone. lr_decay: linear
    decay of both rates to 0 over `iterations`. shared_trunk: the critic is a value head on the policy's own body, 0 at
    first, and its loss trains that body too: one forward pass a step instead of two. precision: "fp32", or "bf16" for
    the linear layers of policy, reference and critic on a CPU (attention and heads stay in fp32 where `alignkit.forward.cpu`
    reads the model); it pays where the CPU multiplies bf16 in hardware (AMX). A GPU always takes bf16.
    tokens_per_pass: a minibatch with more tokens, padding included, is sorted by length and read in parts of at most so
    many, by one forward pass each; the gradients of its parts add up to its own. None: all at once.
    gradient_checkpointing: layers are computed again in the backward pass instead of kept. Both save memory, change
    nothing but rounding, and are no parameters of the notebooks.
    """

    iterations: int = 40
    prompts_per_iteration: int = 512
    samples_per_prompt: int = 1
    max_new_tokens: int = 4
    temperature: float = 1.0
    kl_coef: float = 0.2
    target_kl: float | None = None
    kl_horizon: int = 10_000
    max_kl: float | None = None
    max_step_kl: float | None = None
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    value_coef: float = 1.0
    entropy_coef: float = 0.0
    ptx_coef: float = 0.0
    missing_eos_penalty: float = 0.0
    score_clip: float = math.inf
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    epochs: int = 2
    minibatch_size: int = 128
    learning_rate: float = 1e-3
    critic_learning_rate: float = 2e-3
    max_grad_norm: float = 1.0
    critic_warmup: int = 0
    lr_decay: bool = True
    shared_trunk: bool = False
    precision: str = "fp32"
    tokens_per_pass: int | None = None
    gradient_checkpointing: bool = False
    seed: int = 0

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


LOSSES = ("sigmoid", "ipo", "hinge")


@dataclass(frozen=True)
class DPOConfig:
    """What a user can turn. Defaults are for the desk world.

    beta: the price of KL, the same quantity as PPO's kl_coef: a larger beta keeps the policy closer to the reference.
    loss_type: "sigmoid" (DPO), "ipo" or "hinge". label_smoothing: the share of labels assumed flipped (cDPO), sigmoid
    only. length_normalised: the loss is on log-probs per token rather than per response (what is logged stays per
    response). max_new_tokens: responses, EOS included, are cut there. epochs, batch_size: passes over the pairs, pairs
    a step. learning_rate, max_grad_norm: AdamW's and the clip. warmup: the share of steps over which the rate rises
    linearly. precompute_reference: score all pairs with the reference once, before training. precision: "fp32", or
    "bf16" for the linear layers of policy and reference on a CPU, as in PPOConfig.
    tokens_per_pass: a batch with more tokens, padding included, is sorted by length and read in parts of at most so
    many, chosen and rejected by one forward pass each; the gradients of the parts add up to its own. None: all at once.
    gradient_checkpointing: layers are computed again in the backward pass instead of kept. Both save memory, change
    nothing but rounding, and are no parameters of the notebooks.
    """

    beta: float = 0.5
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    length_normalised: bool = False
    max_new_tokens: int = 4
    epochs: int = 3
    batch_size: int = 128
    learning_rate: float = 3e-4
    max_grad_norm: float = 1.0
    warmup: float = 0.1
    precompute_reference: bool = True
    precision: str = "fp32"
    tokens_per_pass: int | None = None
    gradient_checkpointing: bool = False
    seed: int = 0

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
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(f"label_smoothing goes with loss_type 'sigmoid' only, not with {self.loss_type!r}")
        for name in ("max_new_tokens", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is {self.warmup}, expected a share of the steps between 0 and 1")


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
    known = [f.name for f in fields(config_class)]
    for name in chosen:
        if name not in known:
            raise TypeError(f"{config_class.__name__} has no option {name!r}; it has {', '.join(known)}")
    start = {} if str(model) == "tiny" else PRETRAINED[config_class]
    return config_class(**{**start, **{name: value for name, value in chosen.items() if value is not None}})
