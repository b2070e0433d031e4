"""Reward and value models: a body with a head that outputs one number per token."""

import copy

import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
)

from alignkit.formulas.randomness import seeded_weights
from alignkit.models.adapters import _has_adapter, merged


def reward_model_from(policy: nn.Module, seed: int = 0) -> nn.Module:
    """A sequence classifier with the policy's body and a new linear head with standard deviation 1/√(hidden + 1)."""
    policy = merged(policy)
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise ValueError(f"{config.model_type} models have no class that scores a text (…ForSequenceClassification) in "
                         "transformers, so this policy's body cannot be a reward model or a critic of its own; use "
                         "another architecture for it, shared_trunk=True for PPO's critic, or DPO, which needs neither")
    with seeded_weights(seed):
        reward_model = AutoModelForSequenceClassification.from_config(config, dtype=policy.dtype)
    body(reward_model).load_state_dict(body(policy).state_dict())
    head = score_head(reward_model)
    with seeded_weights(seed), torch.no_grad():
        head.weight.normal_(0, (head.in_features + 1) ** -0.5)
    return reward_model.to(policy.device).eval()


def value_model_from(model: nn.Module) -> nn.Module:
    """A critic: a copy of a reward model or, if `model` is a policy, its body with a zero head."""
    if hasattr(model, "score"):
        return copy.deepcopy(model).requires_grad_(True)
    critic = reward_model_from(model)
    with torch.no_grad():
        score_head(critic).weight.zero_()
    return critic


class SharedCritic(nn.Module):
    """A critic that is a value head, initialised to 0, on the policy's own body. Its only parameters are the head's.

    `token_values` reads it like any other critic, with a separate forward pass.
    """

    base_model_prefix = "trunk"

    def __init__(self, policy: nn.Module):
        super().__init__()
        self._policy = [policy]  # in a list, so that its parameters are not this module's
        self.score = nn.Linear(policy.config.get_text_config().hidden_size, 1, bias=False, device=policy.device,
                               dtype=policy.dtype)
        nn.init.zeros_(self.score.weight)

    @property
    def policy(self) -> nn.Module:
        return self._policy[0]

    @property
    def trunk(self) -> nn.Module:
        return body(self.policy.get_base_model() if _has_adapter(self.policy) else self.policy)


def body(model: nn.Module) -> nn.Module:
    """The transformer without its head."""
    return getattr(model, model.base_model_prefix)


def score_head(model: nn.Module) -> nn.Linear:
    """The head that outputs one number per token. Raises ValueError if the model has none, or one with more outputs."""
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise ValueError(f"{type(model).__name__} has no `score` head with one output; expected a causal "
                         "…ForSequenceClassification model with num_labels=1")
    return head
