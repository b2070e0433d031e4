"""Seeded mutants of a saved model's files: bytes, JSON values, the header of the weights."""

import copy
import json
import random
import struct
from pathlib import Path

HOSTILE = (
    None, True, 0, -1, 5, 2.5, 1e308, -0.0, 10**9, 2**31, -(2**40), 10**30, "", "a", "0", "load", "../../x",
    "/etc/passwd", "a/b", "x\x00y", "\ud800", "A" * 5000, [], [None], [[]], [1, "a"], {}, {"a": None}, {"": []},
    [[["global"], 10**9]],
)
KEYS = (
    "auto_map", "quantization_config", "attn_implementation", "_attn_implementation", "experts_implementation",
    "use_kernels", "kernel_config", "transformers_weights", "num_labels", "id2label", "torch_dtype", "dtype",
    "architectures", "rope_scaling", "rope_parameters", "layer_types", "per_layer_config", "sub_configs",
    "tie_word_embeddings", "vocab_file", "tokenizer_file", "init_inputs", "extra_special_tokens",
    "added_tokens_decoder", "chat_template", "fast_tokenizer_files", "tokenizer_class", "name_or_path",
    "alignkit_normalisation", "text_config",
)


def mutant(content: bytes, name: str, rng: random.Random) -> bytes:
    """Another content for the file `name`: it may be harmless, it must not be dangerous."""
    if name.endswith(".json") and rng.random() < 0.8:
        return _json(json.loads(content), rng)
    if name.endswith(".safetensors") and rng.random() < 0.6:
        size = struct.unpack("<Q", content[:8])[0]
        header = _json(json.loads(content[8 : 8 + size]), rng)
        return struct.pack("<Q", len(header)) + header + content[8 + size :]
    return _bytes(content, rng)


def _bytes(content: bytes, rng: random.Random) -> bytes:
    changed, kind = bytearray(content), rng.randrange(5)
    place = rng.randrange(len(content))
    if kind == 0:
        return bytes(changed[: rng.choice((0, 1, 3, 7, 8, 9, 1000, len(content) - 1, place))])
    for _ in range(rng.choice((1, 1, 8, 64))):
        if kind == 1:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        elif kind == 2:
            changed[place : place + rng.randrange(1, 64)] = rng.randbytes(rng.randrange(64))
        elif kind == 3:
            changed[place:place] = rng.choice((b"\x00", b"[" * 200, b'{"a":' * 200, b"9" * 5000, b"\xff\xfe", b"NaN"))
        else:
            changed[:] = rng.choice((b"[]", b"null", b'"x"', b"{}", b"5", b"[" * 100_000, b"\xef\xbb\xbf{}", b"true"))
            break
    return bytes(changed)


def _json(value, rng: random.Random) -> bytes:
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        node, key = _somewhere(value, rng)
        if node is None:
            return json.dumps(rng.choice(HOSTILE)).encode()
        if isinstance(node, dict) and rng.random() < 0.3:
            key = rng.choice(KEYS)
        elif rng.random() < 0.15:
            del node[key]
            continue
        node[key] = copy.deepcopy(rng.choice(HOSTILE))
    return json.dumps(value).encode()


def _somewhere(value, rng: random.Random):
    """A mapping or list in `value`, and a key of it; each level is as likely to be stopped at."""
    node, key = None, None
    while isinstance(value, (dict, list)) and value and (node is None or rng.random() < 0.6):
        node, key = value, rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        value = node[key]
    return node, key


def write_mutant(source: Path, folder: Path, rng: random.Random) -> str:
    """Copy `source` to `folder` with one file changed; returns its name."""
    files = sorted(path for path in source.iterdir() if path.is_file())
    chosen = rng.choice(files)
    for path in files:
        content = path.read_bytes()
        (folder / path.name).write_bytes(mutant(content, path.name, rng) if path == chosen else content)
    return chosen.name
