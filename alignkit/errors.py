"""The exceptions of alignkit. Each message says what is wrong and what to do."""

import re
from collections.abc import Iterable

_OUT_OF_MEMORY = re.compile(
    r"^(\w+\.)*(MemoryError|OutOfMemoryError|_ArrayMemoryError)\b|out of memory|can't allocate memory|"
    r"cannot allocate memory|Unable to allocate|bad_alloc|bad allocation", re.IGNORECASE)


class AlignkitError(Exception):
    """Base class of alignkit's exceptions; the `alignkit` command prints only their message, without a traceback."""


class NonFinite(AlignkitError, ValueError):
    """A model produced NaN or infinite numbers. step, batch: the training step and its token ids, if a trainer raised
    this."""

    def __init__(self, message: str, step: int | None = None, batch: dict | None = None):
        super().__init__(message)
        self.step, self.batch = step, batch


class OutOfMemory(AlignkitError, MemoryError):
    """A step did not fit into memory; nothing was changed. The message says which setting to lower, and to what
    value."""


class DataError(AlignkitError, ValueError):
    """A data source cannot be used; the message says where, why and what to do."""


class RunError(AlignkitError, ValueError):
    """A run directory belongs to another run, or one of its records cannot be read."""


class ManifestError(AlignkitError, ValueError):
    """A checkpoint differs from its manifest, or must not be frozen in its present state; `files` names the files."""

    def __init__(self, message: str, files: Iterable[str] = ()):
        super().__init__(message)
        self.files = tuple(files)


class InvariantError(AlignkitError, RuntimeError):
    """A condition that must hold before the first optimiser step is violated (checked by PPO and DPO)."""


class RunInUse(AlignkitError, RuntimeError):
    """Another process is using this run directory."""


class NotebookFailed(AlignkitError, RuntimeError):
    """A notebook did not finish. status: "failed", "timeout" or "interrupted"; cell: number from 0, None: no cell
    started. died: its kernel ended, which may not be the notebook's own fault."""

    def __init__(self, message: str, status: str = "failed", cell: int | None = None, error: str = "",
                 died: bool = False):
        super().__init__(message)
        self.status, self.cell, self.error, self.died = status, cell, error, died


class MissingExtra(AlignkitError, ImportError):
    """An optional package is needed; the message says how to install it."""


class ParameterError(AlignkitError, ValueError):
    """The notebook has no such parameter, or the value has the wrong type."""


def is_out_of_memory(error: BaseException | str) -> bool:
    """Whether an error, or its text "Name: message", reports that memory ran out (in Python, numpy or torch)."""
    return bool(_OUT_OF_MEMORY.search(error if isinstance(error, str) else f"{type(error).__name__}: {error}"))
