"""A disk cache for tables that are slow to compute, keyed by a hash of everything they depend on."""

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
    """Return the table stored in `directory` under the hash of `key` (any JSON value); compute and store it if missing.

    The file is written under a temporary name and then renamed, so a reader never sees half a file. An unreadable file
    is computed again.
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
