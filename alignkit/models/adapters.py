"""LoRA adapters, and the reference policy at the start of training."""

import copy
from pathlib import Path

import torch
from torch import nn

from alignkit.formulas.randomness import seeded_weights


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy that no optimiser can change: adapter merged, eval mode, no gradients."""
    return copy.deepcopy(merged(model)).eval().requires_grad_(False)


def add_lora(policy: nn.Module, *, rank: int = 8, alpha: int = 16, seed: int = 0) -> nn.Module:
    """`policy` with a new LoRA adapter on every linear layer (peft); only the adapter is trained."""
    from peft import LoraConfig, get_peft_model

    with seeded_weights(seed):
        return get_peft_model(
            policy, LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        )


def with_adapter(policy: nn.Module, folder: str | Path) -> tuple[nn.Module, set[str]]:
    """`policy` with the adapter from a folder that passed the gate, and the names of the tensors that the adapter
    requires."""
    from peft import PeftModel, get_peft_model_state_dict

    adapted = PeftModel.from_pretrained(policy, folder)
    return adapted, set(get_peft_model_state_dict(adapted, save_embedding_layers=False))


def merged(model: nn.Module) -> nn.Module:
    """The model itself or, if it has an adapter, a copy with the adapter merged in."""
    return copy.deepcopy(model).merge_and_unload() if _has_adapter(model) else model


def reference_policy(policy: nn.Module) -> nn.Module:
    """The current policy as the reference for KL.

    If the policy has an untrained adapter, the reference is the same model with the adapter switched off, which costs
    no memory. Otherwise it is a frozen copy. (With a trained adapter switched off, the reference would be the *base*
    model, not this policy.)
    """
    if _has_adapter(policy) and all(
        (weight == 0).all() for name, weight in policy.named_parameters() if "lora_B" in name
    ):
        return AdapterOff(policy)
    return frozen_copy(policy)


class AdapterOff(nn.Module):
    """A PEFT model that is read with its adapter switched off."""

    def __init__(self, policy: nn.Module):
        super().__init__()
        self._policy = [policy]  # in a list, so that its parameters are not this module's
        self.config = policy.config

    @property
    def device(self) -> torch.device:
        return self._policy[0].device

    def get_base_model(self) -> nn.Module:
        return self._policy[0].get_base_model()

    def forward(self, *args, **kwargs):
        with torch.no_grad(), self._policy[0].disable_adapter():
            return self._policy[0](*args, **kwargs)


def _has_adapter(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "merge_and_unload")
