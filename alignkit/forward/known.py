"""The models that the fast paths support, and functions that the CPU and GPU paths share."""

import functools

import torch
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PhiForCausalLM,
    PhiForSequenceClassification,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

GATED = (LlamaForCausalLM, LlamaForSequenceClassification, Qwen2ForCausalLM, Qwen2ForSequenceClassification)
PARALLEL = (PhiForCausalLM, PhiForSequenceClassification)  # attention and MLP read the same norm
WEIGHTS = (nn.Linear, nn.Embedding, nn.LayerNorm, LlamaRMSNorm, Qwen2RMSNorm)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def spread(packed: Tensor, mask: Tensor) -> Tensor:
    """Values (n, …) of the positions where mask (B, T) is True, row by row, put in their places: (B, T, …), 0
    elsewhere."""
    if mask.all():
        return packed.view(*mask.shape, *packed.shape[1:])
    place = mask.flatten().nonzero().squeeze(1)
    return (
        packed.new_zeros(mask.numel(), *packed.shape[1:])
        .index_copy(0, place, packed)
        .view(*mask.shape, *packed.shape[1:])
    )


def as_complex(heads: Tensor) -> Tensor:
    """(…, width) viewed as (…, width / 2) complex numbers in the same memory."""
    return torch.view_as_complex(heads.unflatten(-1, (-1, 2)))


@functools.lru_cache
def rotation_order(heads: int, width: int, turned: int, device: torch.device) -> Tensor:
    """The rows of q and k, head by head, with dimensions that are rotated together next to each other."""
    pairs = torch.arange(turned, device=device).view(2, -1).t().flatten()
    within = torch.cat([pairs, torch.arange(turned, width, device=device)])
    return (torch.arange(heads, device=device).unsqueeze(1) * width + within).flatten()


def product_dtype() -> torch.dtype | None:
    """The dtype of CPU products in the current torch.autocast; None if it is off."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


def readable(model: nn.Module, device: str = "cpu") -> bool:
    """Whether the model consists only of supported modules, on this kind of device."""
    config, attention = model.config, model.model.layers[0].self_attn
    rope = getattr(config, "rope_parameters", None) or {}
    supported = (
        rope.get("rope_type") == "default"
        and config._attn_implementation in ("sdpa", "eager")
        and not getattr(config, "qk_layernorm", False)
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and not (model.training and config.attention_dropout > 0)
        and getattr(attention, "rotary_ndims", 0) % 2 == 0
        and attention.head_dim % 2 == 0
        and (type(model) in PARALLEL or (config.hidden_act == "silu" and not getattr(config, "mlp_bias", False)))
    )
    return supported and all(_ordinary(module, device) for module in model.modules())


def _ordinary(module: nn.Module, device: str) -> bool:
    """Whether a module is one of torch's or transformers' own, without hooks, with float32 weights on this device."""
    attributes = vars(module)
    if "forward" in attributes or any(attributes[hooks] for hooks in HOOKS) or attributes.get("gradient_checkpointing"):
        return False  # a hook observes or changes it
    if not type(module).__module__.startswith(
        ("torch.nn.modules.", "transformers.models.", "transformers.activations")
    ):
        return False
    if isinstance(module, nn.Dropout):
        return not (module.training and module.p > 0)
    own = [weight for weight in attributes["_parameters"].values() if weight is not None]
    return not own or (
        type(module) in WEIGHTS
        and all(
            type(weight) is nn.Parameter and weight.device.type == device and weight.dtype == torch.float32
            for weight in own
        )
    )
