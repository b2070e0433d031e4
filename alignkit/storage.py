"""Atomic files, JSON without NaN, logs that lose no line, content hashes, and locks.

Only `locked` and `flush` differ between POSIX and Windows.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import stat
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path

from alignkit.errors import RunError
from alignkit.killpoints import reached

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import msvcrt
except ImportError:  # POSIX
    msvcrt = None

FAR_AWAY = 2**30  # the byte that is locked on Windows
MOST_JSON, DEEPEST_JSON = 256 * 2**20, 64  # limits for reading JSON: bytes, and nesting depth
MOST_PARTS = 2**20  # lists and mappings in a JSON file; a tokenizer of 256,000 tokens has about 600,000


def append_metrics(path: str | Path, row: Mapping) -> None:
    """Add one row to a metrics.jsonl, as one line in one write.

    A torn last line, left by a killed process, is removed first. Raises ValueError, naming the metric, on NaN or
    infinity.
    """
    path = Path(path)
    line = json.dumps(plain(row, "metrics"), allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not _ends_whole(path):
        trim_metrics(path)
    with _naming(path), path.open("ab", buffering=0) as file:
        left = line.encode()
        while left := left[file.write(left):]:  # a full disk silently writes only a part; the next write raises
            pass
    reached("metrics.row")


def read_metrics(path: str | Path) -> list[dict]:
    """The rows of a metrics.jsonl; [] if there is no file. Changes nothing, so the file of a running job can be read.

    A torn last line is skipped with a warning. Raises RunError with file and line if another line is not a JSON object.
    """
    rows, torn = _metrics(Path(path))
    if torn:
        warnings.warn(f"{path}: the last line is torn (the process that wrote it was killed, or is still writing); it "
                      f"was left out, {len(rows)} rows are whole", stacklevel=2)
    return rows


def trim_metrics(path: str | Path, last_step: int | None = None) -> list[dict]:
    """Remove a torn last line and, to resume from a checkpoint at `last_step`, the rows after it; returns the other
    rows."""
    path = Path(path)
    rows, torn = _metrics(path)
    kept = [row for row in rows if last_step is None or row.get("step", 0) <= last_step]
    if torn:
        warnings.warn(f"{path}: the last line was torn (the process that wrote it was killed) and has been removed",
                      stacklevel=2)
    if len(kept) < len(rows) or not _ends_whole(path):
        write_atomically(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept))
    return kept


def branch_metrics(path: str | Path, last_step: int, *, cut: bool = True) -> Path | None:
    """Move the rows after `last_step` from a metrics.jsonl to metrics.branch-N.jsonl beside it, when a run returns to
    that step and continues differently. Returns the new file, or None if there were no such rows.

    The branch is written completely before the log is trimmed; after a crash in between, both files contain the rows.
    cut=False leaves the trimming (`trim_metrics`) to the caller.
    """
    path = Path(path)
    left = [row for row in trim_metrics(path) if row.get("step", 0) > last_step]
    if not left:
        return None
    branch = _branch(path, len(branch_files(path)) + 1)
    write_atomically(branch, "".join(json.dumps(row, allow_nan=False) + "\n" for row in left))
    if cut:
        trim_metrics(path, last_step)
    return branch


def branch_files(path: str | Path) -> list[Path]:
    """The files made by `branch_metrics` beside a metrics.jsonl, oldest first."""
    return list(itertools.takewhile(Path.exists, (_branch(Path(path), number) for number in itertools.count(1))))


def content_hash(value) -> str:
    """SHA-256 (hex) of the canonical JSON of `value`: sorted keys, no spaces, UTF-8. Raises ValueError on NaN."""
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def file_hash(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def config_hash(config) -> str:
    """SHA-256 (hex) of a config, a dataclass or a mapping. The order of the fields does not matter."""
    return content_hash(settings(config))


def settings(config) -> dict:
    """A config as plain JSON types. An infinite limit becomes the text "inf"."""
    fields = asdict(config) if is_dataclass(config) else dict(config)
    return {name: plain(str(value) if isinstance(value, float) and math.isinf(value) else value, f"config.{name}")
            for name, value in fields.items()}


def data_hash(rows: Iterable) -> str:
    """SHA-256 (hex) of rows (dicts or strings) in their order, computed row by row."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(content_hash(row).encode() + b"\n")
    return digest.hexdigest()


def plain(value, where: str = "value"):
    """`value` as plain JSON types: dataclasses, paths, NumPy and torch numbers and arrays are converted.

    Raises ValueError with the position of a NaN or infinite number, TypeError on a type that JSON does not have.
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        kinds = {type(item) for item in value}
        if kinds <= {bool, int, str} or (kinds == {float} and all(map(math.isfinite, value))):
            return list(value)  # nearly all values of an evaluation are already plain
        return [plain(item, f"{where}[{position}]") for position, item in enumerate(value)]
    if hasattr(value, "tolist"):
        return plain(value.tolist(), where)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}; JSON has no such number (leave it out or use None)")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{where} is of type {type(value).__name__}, expected numbers, text, lists, mappings, a dataclass")


def read_json(path: str | Path, kind: type = dict, *, error: type[Exception] = RunError) -> object:
    """The JSON value in a file, checked to be of `kind`. All of alignkit's records are read by this function.

    Raises FileNotFoundError if there is no such file, and `error`, naming the file, on any other fault: not UTF-8, not
    JSON, NaN or Infinity, a value of another kind, more than MOST_JSON bytes, nesting deeper than DEEPEST_JSON.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise error(f"{path} is no plain file")  # reading a pipe could block for ever
        with path.open("rb") as file:
            content = file.read(MOST_JSON + 1)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as problem:
        raise error(f"{path} cannot be read: {problem}") from None
    if len(content) > MOST_JSON:
        raise error(f"{path} has more than {MOST_JSON // 2**20} MiB, too much for a record")
    return parse_json(content, kind, where=str(path), error=error)


def parse_json(content: str | bytes, kind: type = dict, *, where: str, error: type[Exception] = RunError) -> object:
    """The JSON value in `content`, under the limits of `read_json`; `where` names its source in messages."""
    opening = ("[", "{") if isinstance(content, str) else (b"[", b"{")
    parts = sum(map(content.count, opening))
    if parts > MOST_PARTS:
        raise error(f"{where} has more than {MOST_PARTS:,} lists and mappings, too many for a record")
    try:
        value = json.loads(content, parse_constant=_no_constant)
    except RecursionError:
        raise error(f"{where} is nested deeper than {DEEPEST_JSON} lists and mappings") from None
    except ValueError as problem:  # not UTF-8, not JSON, an integer of thousands of digits
        raise error(f"{where} is not valid JSON: {problem}") from None
    if not isinstance(value, kind):
        raise error(f"{where} holds {_KINDS.get(type(value), 'a number')}, expected {_KINDS[kind]}")
    level, depth = [value], 0
    while level := [item for each in level if isinstance(each, (dict, list))
                    for item in (each.values() if isinstance(each, dict) else each)]:
        depth += 1
        if depth > DEEPEST_JSON:
            raise error(f"{where} is nested deeper than {DEEPEST_JSON} lists and mappings")
    return value


_KINDS = {dict: "a JSON object", list: "a list", str: "text", type(None): "null", bool: "true or false"}


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def write_json(path: str | Path, value) -> None:
    """Write `value` as JSON, atomically. Raises as `plain` does."""
    value = plain(value, Path(path).name)
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        content = text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can represent but UTF-8 cannot
        content = json.dumps(value, indent=1, allow_nan=False).encode() + b"\n"
    write_atomically(path, content)


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Replace the file `path` by `content` atomically: a reader, or a crash, sees the old bytes or the new ones."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        with _naming(path):
            with temporary.open("xb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add `path` to an OSError in the block, because the system does not say which disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[int]:
    """Hold the lock of a file or folder inside the block; the system releases it when this process ends for any reason.

    Yields the file descriptor of the lock; a child process that inherits it holds the lock together with its parent.
    Raises BlockingIOError if another process, or another part of this one, holds the lock. POSIX locks `path` itself.
    Windows cannot lock a folder, so a hidden file beside it is locked. If Python has neither kind of lock, nothing is
    locked.
    """
    path = Path(path)
    if not fcntl and path.is_dir():
        path = path.with_name(f".{path.name}.lock")
        path.touch()
    handle = os.open(path, os.O_RDONLY if fcntl else os.O_RDWR)
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt:
            os.lseek(handle, FAR_AWAY, os.SEEK_SET)  # on Windows a locked byte is unreadable: lock one beyond the end
            try:
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            except OSError as error:
                raise BlockingIOError(error.errno, f"{path} is locked") from error
        yield handle
    finally:
        os.close(handle)


def flush(path: str | Path) -> None:
    """Ensure that a file, or a folder's list of entries, is on disk. Windows cannot do this for a folder."""
    if os.name == "nt" and Path(path).is_dir():
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _branch(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}.branch-{number}{path.suffix}")


def _metrics(path: Path) -> tuple[list[dict], bool]:
    """Rows of a metrics file, and whether its last line is torn."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], False
    lines = content.split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line, where=f"{path}:{number}") if line.strip() else None
        except RunError:
            row = False
        if isinstance(row, dict):
            if not isinstance(row.get("step", 0), int | float):
                raise RunError(f"{path}:{number}: step is not a number")
            rows.append(row)
        elif number < len(lines):
            raise RunError(f"{path}:{number}: not a JSON object: {line[:80]!r}")
    return rows, bool(lines[-1]) and not isinstance(row, dict)


def _ends_whole(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return True
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
