"""Checks of a model folder before any file in it is opened, because the folder may come from a stranger.

Weights must be safetensors files inside the folder. Records must be JSON of limited size with values of the right
types. Nothing in the folder may make transformers or peft fetch, import or run anything.
"""

import contextlib
import math
import re
import stat
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from alignkit.errors import ManifestError
from alignkit.folders import recover
from alignkit.storage import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pt2", ".pth", ".pkl", ".pickle", ".ckpt")
CHECKPOINT_FILES = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|config\.json|generation_config\.json"
    r"|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|tokenizer\.model|spiece\.model|chat_template\.(jinja|json)"
)
RECORDS = re.compile(r"(config|generation_config|tokenizer|tokenizer\..+|tokenizer_config|special_tokens_map"
                     r"|added_tokens|vocab|chat_template|adapter_config|model\.safetensors\.index)\.json")
ATTENTION = ("eager", "sdpa", "flex_attention")  # built into torch; all others import or fetch code
ELSEWHERE = ("transformers_weights", "configuration_files", "gguf_file", "tokenizer_object", "__slow_tokenizer")
LAYERS = re.compile(r"(?!.*(size|dim|width|channel)).*(layer|depth|attention_types|num_labels).*")
MOST_LAYERS = 1000  # a config may name as many, or as many as there are tensors
LARGEST = 2**53  # of other whole numbers in a config; how large a model may get, `confined` sees


@dataclass(frozen=True)
class Contents:
    """Result of the checks: the records (name -> JSON object), the weight files, and each tensor's file and size."""

    folder: Path
    records: dict[str, dict]
    files: list[Path] = field(default_factory=list)
    tensors: dict[str, Path] = field(default_factory=dict)
    elements: int = 0


def check_model_folder(folder: str | Path, *, adapter: bool = False) -> Contents:
    """Check a local model folder without opening its model; every reader calls this first.

    adapter: the folder holds a LoRA adapter, not a whole model. Raises ManifestError, naming the file, on: weights that
    are not complete safetensors files inside the folder; links that leave the folder (except those of the Hub's cache
    to its own blobs); records that are not JSON objects with values of the right types; code (`auto_map`), kernels,
    quantisation, or anything else that would be fetched or run.
    """
    folder = Path(folder)
    with _reading(folder):
        recover(folder)
        if not folder.is_dir():
            raise ManifestError(f"{folder} is not a folder")
        names = _entries(folder)
        records = {name: read_json(folder / name, error=ManifestError) for name in names if RECORDS.fullmatch(name)}
        needed = [ADAPTER] if adapter else ["config.json"]
        files = [ADAPTER_WEIGHTS] if adapter else _weight_files(folder, names, records.get(INDEX))
        for name in (*needed, *files):
            if name not in names:
                raise _lacking(folder, name, names)
        if not adapter and ADAPTER in names:
            raise ManifestError(f"{folder} has {ADAPTER} beside a config.json; expected a whole model: merge the "
                                "adapter (peft's merge_and_unload), then save_pretrained", [ADAPTER])
        tensors, elements, rank = {}, 0, 0
        for name in files:
            shapes = _shapes(folder / name)
            tensors |= dict.fromkeys(shapes, folder / name)
            elements += sum(map(math.prod, shapes.values()))
            rank = max(rank, *(shape[0] for tensor, shape in shapes.items() if shape and "lora_" in tensor
                               and "_A" in tensor), 0)
        for name, record in records.items():
            check_record(record, folder / name, len(tensors), rank)
        return Contents(folder, records, [folder / name for name in files], tensors, elements)


def check_record(record: dict, path: Path, tensors: int = MOST_LAYERS, rank: int = 0, *, code: bool = True) -> None:
    """Raise ManifestError if one of a model's records asks for code, or holds invalid values.

    path: the file, whose name determines the checks. tensors: number of tensors in the weights. rank: the largest of an
    adapter. code=False permits `auto_map`, for a Hub model for which transformers has its own code.
    """
    def wrong(what: str) -> ManifestError:
        return ManifestError(f"{path} {_printable(what)}", [path.name])

    if path.name == INDEX:
        shards = record.get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise wrong("has no weight_map (tensor -> file)")
        for shard in shards.values():
            if not _plain_name(shard) or not shard.endswith(".safetensors"):
                raise wrong(f"names {_short(shard)}; expected the plain name of a .safetensors file in the folder")
    if path.name not in ("config.json", "tokenizer_config.json", "generation_config.json", ADAPTER):
        return
    for key, value in _items(record):
        if key == "auto_map" and code:
            raise wrong("points to model code of its own (auto_map), which is never run")
        if key in ("quantization_config", "compression_config") and value is not None:
            raise wrong(f"has a {key}: quantised weights need code that is not alignkit's; save the model in float32 "
                        "or bfloat16 without it")
        if key in ("use_kernels", "kernel_config", "megatron_config") and value:
            raise wrong(f"has {key}, which loads code from elsewhere; remove it")
        if key in ELSEWHERE and value is not None:
            raise wrong(f"has {key}, which names another source than the folder's own files; remove it")
        if "attn_implementation" in key or "experts_implementation" in key:
            for name in _texts(value):
                if name and name not in ATTENTION and not _native(name):
                    raise wrong(f"has {key} {_short(name)}, which would be fetched or run; expected one of "
                                f"{', '.join(ATTENTION)}")
        if key == "model_type" and not isinstance(value, str | None):
            raise wrong(f"has model_type {_short(value)}, expected text")
        if key == "architectures" and not (value is None or (isinstance(value, list)
                                           and all(isinstance(name, str) for name in value))):
            raise wrong("has architectures that are not a list of names")
        if key in ("dtype", "torch_dtype") and not _is_dtype(value):
            raise wrong(f"has {key} {_short(value)}, which is no dtype of torch")
        if key in ("num_hidden_layers", "n_layer") and isinstance(value, int) and value < 1:
            raise wrong(f"has {key} {value}, expected at least 1")
        for number in _numbers(value) if path.name == "config.json" else ():
            if number > (max(MOST_LAYERS, tensors) if LAYERS.fullmatch(key) else LARGEST):
                raise wrong(f"has {key} {_short(number)}, far more than weights of {tensors} tensors can have")
    if path.name == "config.json" and not record.get("model_type"):
        raise wrong("has no model_type, expected the name of an architecture that transformers has")
    if path.name == "tokenizer_config.json":
        _check_tokenizer_config(record, path.parent, wrong)
    if path.name == ADAPTER:
        if record.get("peft_type") != "LORA":
            raise wrong(f"has peft_type {_short(record.get('peft_type'))}, expected 'LORA'")
        ranks = _numbers([record.get("r"), *_leaves(record.get("rank_pattern") or [])])
        if not ranks or not 0 < min(ranks) <= max(ranks) <= rank:
            raise wrong(f"has rank {_short(record.get('r'))}, expected one that its weights have")


def drop_attention(config) -> None:
    """Let the model choose its attention if its config names an external library's (flash attention)."""
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))):
        for name in ("_attn_implementation", "_experts_implementation"):
            if getattr(part, name, None) not in (None, *ATTENTION):
                setattr(part, f"{name}_internal", None)


_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def confined(contents: Contents) -> Iterator[None]:
    """Open a folder that passed the gate inside the block: without network, and with no model larger than its weights.

    Raises ManifestError if a config makes transformers build (before memory is allocated) far more than the weights
    hold.
    """
    thread, built = threading.get_ident(), {"parameters": 0, "elements": 0, "bytes": 0}

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is None or not tensor.is_meta or threading.get_ident() != thread:
            return
        if isinstance(tensor, nn.Parameter):
            built["parameters"] += 1
            built["elements"] += tensor.numel()
        else:
            built["bytes"] += tensor.numel() * tensor.element_size()
        if (built["parameters"] > 4 * len(contents.tensors) + MOST_LAYERS
                or built["elements"] > 2 * contents.elements + 2**22
                or built["bytes"] > 4 * contents.elements + 2**28):
            raise ManifestError(f"{contents.folder / 'config.json'} describes a model far larger than its weights "
                                f"({len(contents.tensors)} tensors, {contents.elements} numbers)", ["config.json"])

    with _one_at_a_time:
        offline = constants.HF_HUB_OFFLINE
        constants.HF_HUB_OFFLINE = True
        hooks = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            constants.HF_HUB_OFFLINE = offline


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that contains NaN or infinity; None if there is none. Reads each tensor once."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            exact = torch.float64 if tensor.dtype == torch.float64 else torch.float32
            # a sum keeps NaN and infinity, but can also overflow; the slow check below distinguishes these
            if not math.isfinite(tensor.sum(dtype=exact)) and not tensor.to(exact).isfinite().all():
                return name
    return None


def weights_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that are saved with a model, tied ones once: (name, tensor)."""
    seen = set()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and (tensor.data_ptr(), tensor.shape) not in seen:
            seen.add((tensor.data_ptr(), tensor.shape))
            yield name, tensor


def left_over(model: nn.Module, unexpected: Iterable[str]) -> str | None:
    """A tensor in the files that belongs to an additional layer for which the config has no place; None if there is
    none.

    Other unused tensors (tables of older versions, image parts) are harmless.
    """
    def kind(name: str) -> str:
        return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)

    unexpected = sorted(unexpected)
    kinds = {kind(name) for name in model.state_dict()} if unexpected else set()
    return next((name for name in unexpected if "*" in kind(name) and kind(name) in kinds), None)


def of_a_model(name: str) -> bool:
    """Whether a file of this name is part of a model: it is deleted when the model is replaced; a stage's records are
    kept."""
    return bool(CHECKPOINT_FILES.fullmatch(name)) or name in (ADAPTER, ADAPTER_WEIGHTS, "additional_chat_templates")


def check_vocabulary(model: nn.Module, tokenizer) -> None:
    """Raise ValueError, with both numbers, if the tokenizer has a token without an embedding in the model."""
    rows, largest = model.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise ValueError(f"the tokenizer does not fit the model: its largest token id is {largest}, the model has "
                         f"{rows} embeddings (ids 0 to {rows - 1})")


def is_folder(name: str | Path) -> bool:
    """Whether a name is that of an existing folder (recovered, if necessary); False for an impossible folder name."""
    try:
        recover(name)
        return Path(name).is_dir()
    except (OSError, ValueError):
        return False


def reason(error: BaseException) -> str:
    """An error as one printable line; its type if it has no message."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return _printable(lines[0][:500] if lines else type(error).__name__)


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RecursionError) as error:
        raise ManifestError(f"{folder} cannot be read: {reason(error)}") from error


def _entries(folder: Path) -> set[str]:
    """The names of the files in a folder. Refuses links that leave the folder, and entries that are neither file nor
    folder."""
    root = folder.resolve()
    homes = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        homes.append(root.parent.parent / "blobs")  # the Hub's cache: a snapshot is links to its blobs
    names = set()
    templates = folder / "additional_chat_templates"
    for path in [*folder.iterdir(), *(templates.iterdir() if templates.is_dir() else [])]:
        if path.is_symlink():
            target = path.resolve()
            if not any(target.is_relative_to(home) for home in homes):
                raise ManifestError(f"{path} is a link that leaves the folder (to {target}); copy the files",
                                    [path.name])
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            if path.is_symlink():
                raise ManifestError(f"{path} is a link that leads nowhere", [path.name]) from None
            continue  # deleted in the meantime
        if stat.S_ISREG(mode):
            if path.parent == folder:
                names.add(path.name)
        elif not stat.S_ISDIR(mode) or CHECKPOINT_FILES.fullmatch(path.name):
            raise ManifestError(f"{path} is not a file", [path.name])
    return names


def _weight_files(folder: Path, names: set[str], index: dict | None) -> list[str]:
    """The names of the files from which transformers will read the weights."""
    if index is not None:
        check_record(index, folder / INDEX)
    return [WEIGHTS] if WEIGHTS in names or index is None else sorted(set(index["weight_map"].values()))


def _lacking(folder: Path, name: str, names: set[str]) -> ManifestError:
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles and name.endswith(".safetensors"):
        return ManifestError(f"{folder} has no {name}, only {pickles[0]}, which may hold a pickle (it can run code "
                             "when it is opened); save the model as safetensors (save_pretrained)", [name])
    known = sorted(name for name in names if CHECKPOINT_FILES.fullmatch(name))
    return ManifestError(f"{folder} has no {name}, so it is not a whole checkpoint (it has "
                         f"{', '.join(known) or 'nothing'})", [name])


def _shapes(path: Path) -> dict[str, list[int]]:
    """The shapes of the tensors in a safetensors file; ManifestError, naming the file, if it is incomplete."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError, OverflowError, RuntimeError, MemoryError) as error:
        raise ManifestError(f"{path} is no whole safetensors file: {reason(error)}", [path.name]) from error


def _check_tokenizer_config(record: dict, folder: Path, wrong) -> None:
    for key, value in record.items():
        if key == "tokenizer_class" and not isinstance(value, str | None):
            raise wrong(f"has tokenizer_class {_short(value)}, expected text")
        if key == "init_inputs" and value:
            raise wrong("has init_inputs, which may name files elsewhere; remove them")
        if key == "fast_tokenizer_files" and not (isinstance(value, list) and all(map(_plain_name, value))):
            raise wrong(f"has fast_tokenizer_files {_short(value)}, expected plain file names")
        if key == "chat_template" and not isinstance(value, str | list | dict | None):
            raise wrong(f"has chat_template of type {type(value).__name__}, expected text")
        overruled = ("special_tokens_map_file", "tokenizer_file")[: 1 + (folder / "tokenizer.json").is_file()]
        if key.endswith("_file") and key not in overruled and value is not None and not _plain_name(value):
            raise wrong(f"has {key} {_short(value)}, expected the plain name of a file in the folder")


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _short(value) -> str:
    return repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:80]}…"


def _plain_name(name) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not re.search(r'[/\\:\x00]', name)


def _is_dtype(value) -> bool:
    if isinstance(value, str) and value != "auto":
        return isinstance(getattr(torch, value.removeprefix("torch."), None), torch.dtype)
    return isinstance(value, str | dict | None)


def _native(name: str) -> bool:
    """Whether a name means flash attention: accepted, because valid configs name it, but not used."""
    return re.fullmatch(r"flash_attention_\d", name) is not None


def _items(value) -> Iterator[tuple[str, object]]:
    """Every key and value of the mappings in a JSON value, at any depth."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key, item
            yield from _items(item)
    elif isinstance(value, list):
        for item in value:
            yield from _items(item)


def _leaves(value) -> Iterator[object]:
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value


def _texts(value) -> list[str]:
    return [str(leaf) for leaf in _leaves(value) if leaf is not None]


def _numbers(value) -> list[int]:
    """The integers in a number, or in a list at any depth (mappings are checked by their own keys)."""
    if isinstance(value, list):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, int) and not isinstance(value, bool) else []
