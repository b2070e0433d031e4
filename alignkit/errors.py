"""The errors that alignkit raises on purpose. The message says what is wrong and what to do."""

import re
from collections.abc import Iterable

_OUT_OF_MEMORY = re.compile(
    r"^(\w+\.)*(MemoryError|OutOfMemoryError|_ArrayMemoryError)\b|out of memory|can't allocate memory|"
    r"cannot allocate memory|Unable to allocate|bad_alloc|bad allocation", re.IGNORECASE)


class AlignkitError(Exception):
    """Base of all errors that alignkit raises on purpose: the command prints their message and nothing else."""


class NonFinite(AlignkitError, ValueError):
    """A model produced NaN or infinite numbers. step, batch: where, and the token ids that it was training on, if a
    trainer raised it."""

    def __init__(self, message: str, step: int | None = None, batch: dict | None = None):
        super().__init__(message)
        self.step, self.batch = step, batch


class OutOfMemory(AlignkitError, MemoryError):
    """There was not enough memory for a step; nothing was changed. The message says what to lower, and to what."""


class DataError(AlignkitError, ValueError):
    """A source that cannot be used; the message says where, why and what to do."""


class RunError(AlignkitError, ValueError):
    """A run directory belongs to another run, or one of its records cannot be read."""


class ManifestError(AlignkitError, ValueError):
    """A checkpoint is not what its manifest says, or must not be frozen as it is; `files` names the files."""

    def __init__(self, message: str, files: Iterable[str] = ()):
        super().__init__(message)
        self.files = tuple(files)


class InvariantError(AlignkitError, RuntimeError):
    """Something that must hold before the first optimizer step does not hold (checked by PPO and DPO)."""


class RunInUse(AlignkitError, RuntimeError):
    """Another job is at work in this run directory."""


class NotebookFailed(AlignkitError, RuntimeError):
    """A notebook did not reach its end. status: "failed", "timeout", "interrupted"; cell: from 0, None: none began."""

    def __init__(self, message: str, status: str = "failed", cell: int | None = None, error: str = ""):
        super().__init__(message)
        self.status, self.cell, self.error = status, cell, error


class MissingExtra(AlignkitError, ImportError):
    """A package that is not among those always installed is needed; the message says how to install it."""


class ParameterError(AlignkitError, ValueError):
    """A parameter that the notebook does not have, or a value that is not of its type."""


def is_out_of_memory(error: BaseException | str) -> bool:
    """Whether an error, or its text "Name: message", says that memory ran out: Python's, numpy's or torch's."""
    return bool(_OUT_OF_MEMORY.search(error if isinstance(error, str) else f"{type(error).__name__}: {error}"))
