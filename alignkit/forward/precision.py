"""The precision rule, and layers that are recomputed in the backward pass."""

import contextlib
import functools

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def autocast(device: torch.device, precision: str = "fp32"):
    """The precision rule shared by sampling, scoring and training.

    bf16 autocast on a GPU; on a CPU if precision is "bf16", otherwise the current autocast state.
    """
    kind = torch.device(device).type
    if kind == "cuda" or (kind == "cpu" and precision == "bf16"):
        return torch.autocast(kind, torch.bfloat16)
    return contextlib.nullcontext()


@contextlib.contextmanager
def checkpointed(model: nn.Module, wanted: bool = True):
    """If `wanted`, the model's layers store only their inputs inside the block and are recomputed in the backward pass.

    The same layers as in transformers' gradient checkpointing, but in any mode: train mode would switch dropout on.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)] if wanted else []
    own = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward
