"""Hashes that identify models."""

import functools
import hashlib
import inspect
import json
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from alignkit.storage import content_hash


def weights_hash(model) -> str:
    """SHA-256 of everything that determines a model's output: class, configuration, all weights, and the active
    adapters."""
    unrelated = ("_name_or_path", "transformers_version")
    config = {name: value for name, value in model.config.to_dict().items() if name not in unrelated}
    adapters = [[name, module.disable_adapters, module.merged, module.active_adapters, getattr(module, "scaling", None)]
                for name, module in model.named_modules() if hasattr(module, "merged_adapters")]  # peft's layers
    weights = model.state_dict()
    if not weights:
        raise ValueError(f"{type(model).__name__} has no weights of its own to hash; pass the model that holds them")
    kind = json.dumps([type(model).__name__, config, adapters], sort_keys=True, default=str)
    return tensors_hash(weights, kind)


def function_hash(function: object) -> str:
    """SHA-256 (hex) of what determines a callable's result, as far as it can be inspected: its name, its code, and its
    data (closures, partial arguments, attributes). For a model's reward: its weights."""
    return hashlib.sha256(json.dumps(_parts(function, 0), sort_keys=True, default=str).encode()).hexdigest()


def _parts(value: object, depth: int) -> object:
    if hasattr(value, "state_dict") and hasattr(value, "parameters"):
        return tensors_hash(value.state_dict())
    if isinstance(value, Tensor):
        return tensors_hash({"": value})
    if depth > 4:
        return type(value).__qualname__
    if isinstance(value, functools.partial):
        return ["partial", *(_parts(each, depth + 1) for each in (value.func, list(value.args), value.keywords))]
    if inspect.ismethod(value):
        return [_parts(value.__func__, depth + 1), _parts(value.__self__, depth + 1)]
    if inspect.isfunction(value):
        held = [cell.cell_contents for cell in value.__closure__ or ()]
        code = [value.__code__.co_code.hex(), [_parts(each, depth + 1) for each in value.__code__.co_consts]]
        return [value.__module__, value.__qualname__, code,
                *(_parts(each, depth + 1) for each in (held, list(value.__defaults__ or ()), value.__kwdefaults__))]
    if isinstance(value, Mapping):
        return {str(key): _parts(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        ordered = value if isinstance(value, list | tuple) else sorted(value, key=str)
        return [_parts(item, depth + 1) for item in ordered]
    if inspect.iscode(value):
        return [value.co_code.hex(), [_parts(each, depth + 1) for each in value.co_consts]]
    if isinstance(value, str | int | float | bool | bytes | None):
        return repr(value)
    if hasattr(value, "get_vocab"):
        return content_hash(value.get_vocab())
    if callable(value) and hasattr(value, "__dict__") and not inspect.isclass(value):
        called = getattr(type(value).__call__, "__code__", None)
        return [type(value).__module__, type(value).__qualname__, _parts(called, depth + 1),
                _parts(vars(value), depth + 1)]
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def tensors_hash(tensors: Mapping[str, Tensor], kind: str = "") -> str:
    """SHA-256 (hex) of named tensors: names, types, shapes and bytes, after the text `kind`."""
    digest = hashlib.sha256(kind.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
