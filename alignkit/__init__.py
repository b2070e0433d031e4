"""Learn, run and see LLM alignment: the public names, from the modules that define them, loaded when first used.

The loops `alignkit.ppo.ppo` and `alignkit.dpo.dpo`, and `alignkit.evaluate.evaluate`, bear their modules' names: import
them from there.
"""

import importlib

__version__ = "0.1.0"

_MODULES = {
    "data": ["check", "encode_pair", "load_rows"],
    "dpo": ["DPOConfig", "DPOStats", "Pairs", "dpo_loss", "dpo_step", "implicit_reward", "with_reference"],
    "evaluate": ["Evaluation", "EvaluationSet", "difference", "evaluation_set", "win_rate"],
    "exact": [
        "Frontier",
        "Responses",
        "best_of_n",
        "exact_gradient",
        "frontier",
        "gap",
        "optimum",
        "response_kl",
        "response_logps",
        "response_space",
        "sampled_best_of_n",
        "sampled_optimum",
    ],
    "files": ["DataError"],
    "kl": ["exact_kl", "k1", "k2", "k3"],
    "models": [
        "add_lora",
        "frozen_copy",
        "load_policy",
        "load_reward_model",
        "reference_policy",
        "reward_model_from",
        "save_model",
        "tiny_policy",
        "tiny_reward_model",
        "value_model_from",
    ],
    "ppo": [
        "PPOBatch",
        "PPOConfig",
        "PPOState",
        "PPOStats",
        "gae",
        "policy_loss",
        "ppo_iteration",
        "ppo_step",
        "token_rewards",
        "value_loss",
    ],
    "presets": ["preset"],
    "recorded": ["Sweep", "load_sweep"],
    "relay": ["InvariantError", "ManifestError", "advice", "freeze", "lineage", "verify"],
    "reward": ["RewardConfig", "RewardScorer", "load_reward", "reward_report", "train_reward_model"],
    "sampling": ["NonFinite", "Rollout", "generate_texts", "response_logits", "response_logprobs", "sample",
                 "seeded"],
    "sft": ["SFTConfig", "train_sft"],
    "task": ["Task", "desk_task", "file_task", "load_task"],
    "tokens": ["entropy", "masked_mean", "sequence_logps", "token_logprobs", "whiten"],
    "world": ["Annotator", "Prompt", "World", "desk_tokenizer"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'alignkit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"alignkit.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
