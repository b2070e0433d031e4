"""Tables that took long to compute, kept on disk under a hash of everything they depend on."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

VERSION = 1  # of the enumeration's order and arithmetic: part of the key of the disk cache


# ---- the cache on disk
def cached(directory: str | Path, key: object, table: Callable[[], Tensor]) -> Tensor:
    """The table kept in `directory` under the hash of `key` (anything JSON can hold); made and kept if there is none.

    Written under a temporary name and then renamed: a reader never sees half a file. A file that cannot be read is made
    again.
    """
    digest = hashlib.sha256(json.dumps([VERSION, key]).encode()).hexdigest()
    path = Path(directory) / f"{digest[:32]}.npy"
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError):
        pass
    values = table()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, values.numpy(), allow_pickle=False)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return values


def weights_hash(model) -> str:
    """SHA-256 of what decides a model's output: its class, configuration, every weight, and which adapters are on."""
    unrelated = ("_name_or_path", "transformers_version")
    config = {name: value for name, value in model.config.to_dict().items() if name not in unrelated}
    adapters = [[name, module.disable_adapters, module.merged, module.active_adapters, getattr(module, "scaling", None)]
                for name, module in model.named_modules() if hasattr(module, "merged_adapters")]  # peft's layers
    digest = hashlib.sha256(json.dumps([type(model).__name__, config, adapters], sort_keys=True, default=str).encode())
    weights = sorted(model.state_dict().items())
    if not weights:
        raise ValueError(f"{type(model).__name__} has no weights of its own to hash; pass the model that holds them")
    for name, tensor in weights:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
