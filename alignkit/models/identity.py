"""What tells two models apart."""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor


def weights_hash(model) -> str:
    """SHA-256 of what decides a model's output: its class, configuration, every weight, and which adapters are on."""
    unrelated = ("_name_or_path", "transformers_version")
    config = {name: value for name, value in model.config.to_dict().items() if name not in unrelated}
    adapters = [[name, module.disable_adapters, module.merged, module.active_adapters, getattr(module, "scaling", None)]
                for name, module in model.named_modules() if hasattr(module, "merged_adapters")]  # peft's layers
    weights = model.state_dict()
    if not weights:
        raise ValueError(f"{type(model).__name__} has no weights of its own to hash; pass the model that holds them")
    kind = json.dumps([type(model).__name__, config, adapters], sort_keys=True, default=str)
    return tensors_hash(weights, kind)


def tensors_hash(tensors: Mapping[str, Tensor], kind: str = "") -> str:
    """SHA-256 (hex) of tensors by name: names, types, shapes and bytes, after the text `kind`."""
    digest = hashlib.sha256(kind.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
