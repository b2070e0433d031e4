"""Resolve the name of a model or a data set: a local path or an id on the Hub. All modules use this function.

A name that can only be a path is never looked up on the Hub, where a stranger may have registered it.
"""

import difflib
import os
import re
from pathlib import Path

from alignkit.errors import AlignkitError, ParameterError
from alignkit.safe_text import one_line

FILE_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".gz", ".safetensors", ".ipynb")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


def local_path(name: str | os.PathLike, what: str = "", *, error: type[AlignkitError] = ParameterError) -> Path | None:
    """The local path that `name` refers to, with `~` expanded; None for a Hub id (`org/name`, `gpt2`) that is not a
    local path.

    A name is a path if the path exists, if it is a PathLike, or if it cannot be a Hub id: it begins with `.`, `~`, `/`
    or a drive, ends in a slash or a data file's suffix, contains a backslash or two slashes, or begins with an existing
    folder. what: first word of the message ("model", "data"). Raises `error`, with the nearest existing name, if such a
    path does not exist.
    """
    text = os.fspath(name)
    try:
        path = Path(text).expanduser()
        if os.path.exists(path):
            return path
    except (OSError, ValueError, RuntimeError):  # too long, with a NUL byte, or an unknown user's home
        path = None
    if not isinstance(name, os.PathLike) and not _only_a_path(text):
        return None
    subject = f"{what} is {text[:500]!r}, and there" if what else f"{one_line(text, 500)}: there"
    raise error(f"{subject} is no such file or folder{nearest(path) if path else ''}")


def nearest(path: Path) -> str:
    """"; did you mean …?" with similar names to the first missing part of `path`; "" if there are none."""
    path = Path(os.path.abspath(path))
    missing = path
    while not os.path.isdir(missing.parent) and missing.parent != missing:
        missing = missing.parent
    try:
        beside = sorted(entry.name for entry in os.scandir(missing.parent))[:10_000]
    except OSError:
        return ""
    close = difflib.get_close_matches(missing.name, beside, n=3)
    rest = path.relative_to(missing)
    whole = [candidate for name in close if os.path.exists(candidate := missing.parent / name / rest)]
    names = whole or [missing.parent / name for name in close]
    if names:
        return f"; did you mean {' or '.join(_shown(name) for name in names)}?"
    return "" if missing == path else f" ({_shown(missing)} is not there)"


def _only_a_path(text: str) -> bool:
    if not _HUB_ID.fullmatch(text) or text.lower().endswith(FILE_ENDINGS):
        return True
    first, slash, _ = text.partition("/")
    return bool(slash) and os.path.isdir(first)


def _shown(path: Path) -> str:
    here = Path.cwd()
    return one_line(path.relative_to(here) if path.is_relative_to(here) else path, 300)
