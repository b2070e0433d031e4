"""Which models the fast paths may read, and what the CPU's and the GPU's share."""

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
    """What was read where mask (B, T) is True, (n, …) row by row, in its place: (B, T, …), 0 elsewhere."""
    if mask.all():
        return packed.view(*mask.shape, *packed.shape[1:])
    place = mask.flatten().nonzero().squeeze(1)
    return (
        packed.new_zeros(mask.numel(), *packed.shape[1:])
        .index_copy(0, place, packed)
        .view(*mask.shape, *packed.shape[1:])
    )


def as_complex(heads: Tensor) -> Tensor:
    """(…, width) as (…, width / 2) complex numbers, the same memory."""
    return torch.view_as_complex(heads.unflatten(-1, (-1, 2)))


@functools.lru_cache
def rotation_order(heads: int, width: int, turned: int, device: torch.device) -> Tensor:
    """The rows of q and k, head by head, with the dimensions that are rotated together side by side."""
    pairs = torch.arange(turned, device=device).view(2, -1).t().flatten()
    within = torch.cat([pairs, torch.arange(turned, width, device=device)])
    return (torch.arange(heads, device=device).unsqueeze(1) * width + within).flatten()


def product_dtype() -> torch.dtype | None:
    """The dtype in which a CPU multiplies in the torch.autocast that is on; None if none is."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


def readable(model: nn.Module, device: str = "cpu") -> bool:
    """Whether the model is made of nothing but what is written out here, on this kind of device."""
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
    """Whether a module is one of torch's or transformers' own, unhooked, with float32 weights on this device."""
    attributes = vars(module)
    if "forward" in attributes or any(attributes[hooks] for hooks in HOOKS) or attributes.get("gradient_checkpointing"):
        return False  # someone watches it, or changes what it does
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
