"""Advice when memory ran out: the job's own parameters to lower, with their current values."""

from collections.abc import Mapping
from pathlib import Path

from alignkit.configs import DPOConfig, PPOConfig, RewardConfig, SFTConfig, preset
from alignkit.errors import ParameterError
from alignkit.jobs.parameters import notebook_parameters

# parameters that affect memory, most effective first; max_new_tokens and max_length cost more than linearly (attention)
LOWER = ("minibatch_size", "batch_size", "tokens_per_pass", "prompts_per_iteration", "max_new_tokens", "max_length",
         "pairs", "demonstrations")
CONFIGS = {"01_sft": SFTConfig, "02_reward_model": RewardConfig, "03a_ppo_by_hand": PPOConfig, "03b_ppo": PPOConfig,
           "05_dpo": DPOConfig}


def memory_advice(notebook: Path, given: Mapping[str, object], error: str = "") -> str:
    """The parameters of `notebook` to lower, each to half of its current value (given or default).

    "" if `error`, the notebook's own message, already names one of them.
    """
    if any(name in error for name in LOWER):
        return ""
    try:
        own = notebook_parameters(notebook)
    except (OSError, ParameterError):
        own = {}
    values = {name: given.get(name, parameter.default) for name, parameter in own.items()}
    if config := CONFIGS.get(notebook.stem):
        usual = preset(config, str(values.get("model", "tiny")))
        values = {name: getattr(usual, name, None) if value is None else value for name, value in values.items()}
    lower = [f"{name} is {value:,}: try {value // 2:,}" if isinstance(value, int) and value > 1 else f"lower {name}"
             for name, value in values.items() if name in LOWER and value != 1]
    if not lower:
        lower = ["lower what the notebook works on at a time, such as minibatch_size, prompts_per_iteration, "
                 "tokens_per_pass or max_length"]
    return f"what needs less memory: {'; '.join(lower)} (-p NAME=VALUE), or a smaller model"
