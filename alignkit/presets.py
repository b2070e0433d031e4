"""Settings to start from: the desk world's are the configs' own defaults, any other model's are below."""

from dataclasses import fields

from alignkit.dpo import DPOConfig
from alignkit.ppo import PPOConfig
from alignkit.reward import RewardConfig
from alignkit.sft import SFTConfig

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
