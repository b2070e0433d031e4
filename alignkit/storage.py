"""Files that are whole or absent: JSON without NaN, logs that lose no line, hashes of what is in them, and locks.

What differs between POSIX and Windows stands here alone: `locked` and `flush`.
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

FAR_AWAY = 2**30  # the byte of a file that is locked on Windows
MOST_JSON, DEEPEST_JSON = 256 * 2**20, 64  # bytes of a JSON file, and lists or mappings inside one another, to be read
MOST_PARTS = 2**20  # lists and mappings in a JSON file; a tokenizer of 256,000 tokens has about 600,000


def append_metrics(path: str | Path, row: Mapping) -> None:
    """Add one row to a metrics.jsonl, as one line in one write.

    A torn last line, left by a killed process, is cut off first. Raises ValueError, naming the metric, on NaN or
    infinity.
    """
    path = Path(path)
    line = json.dumps(plain(row, "metrics"), allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not _ends_whole(path):
        trim_metrics(path)
    with _naming(path), path.open("ab", buffering=0) as file:
        left = line.encode()
        while left := left[file.write(left):]:  # a full disk takes a part without a word; the next write raises
            pass
    reached("metrics.row")


def read_metrics(path: str | Path) -> list[dict]:
    """The rows of a metrics.jsonl; [] if there is no file. Changes nothing, so a run that is still writing can be read.

    A torn last line is left out with a warning. Raises RunError with file and line if another line is not a JSON
    object.
    """
    rows, torn = _metrics(Path(path))
    if torn:
        warnings.warn(f"{path}: the last line is torn (the process that wrote it was killed, or is still writing); it "
                      f"was left out, {len(rows)} rows are whole", stacklevel=2)
    return rows


def trim_metrics(path: str | Path, last_step: int | None = None) -> list[dict]:
    """Cut off a torn last line and, to resume from a checkpoint at `last_step`, the rows after it; returns the rest."""
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
    """Move the rows after `last_step` from a metrics.jsonl to metrics.branch-N.jsonl beside it: a run goes back there,
    and on another way. Returns the new file, or None if there were no such rows.

    The branch is written whole before the log is cut: a crash in between leaves its rows in both files. cut=False
    leaves the cutting (`trim_metrics`) to the caller.
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
    """The files that `branch_metrics` made beside a metrics.jsonl, oldest first."""
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
    """SHA-256 (hex) of a config: a dataclass or a mapping. The order of the fields does not matter."""
    return content_hash(settings(config))


def settings(config) -> dict:
    """A config as plain JSON types. An infinite limit, which means no limit, becomes the text "inf"."""
    fields = asdict(config) if is_dataclass(config) else dict(config)
    return {name: plain(str(value) if isinstance(value, float) and math.isinf(value) else value, f"config.{name}")
            for name, value in fields.items()}


def data_hash(rows: Iterable) -> str:
    """SHA-256 (hex) of rows in their order (dicts or strings), one row at a time."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(content_hash(row).encode() + b"\n")
    return digest.hexdigest()


def plain(value, where: str = "value"):
    """`value` as plain JSON types: dataclasses, paths, NumPy and torch numbers and arrays converted.

    Raises ValueError with the place of a number that is NaN or infinite, TypeError on anything that JSON has no word
    for.
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        kinds = {type(item) for item in value}
        if kinds <= {bool, int, str} or (kinds == {float} and all(map(math.isfinite, value))):
            return list(value)  # nearly all of an evaluation is plain already
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
    """The JSON value in a file, checked to be of `kind`; the one way in which alignkit reads a record.

    Raises FileNotFoundError if there is no such file, and `error`, naming the file, on all else that is wrong with it:
    not UTF-8, not JSON, NaN or Infinity, a value of another kind, more than MOST_JSON bytes, nested deeper than
    DEEPEST_JSON.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise error(f"{path} is no plain file")  # to read a pipe would take for ever
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
    """The JSON value that `content` holds, under the limits of `read_json`; `where` names its source in messages."""
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
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can say and UTF-8 cannot
        content = json.dumps(value, indent=1, allow_nan=False).encode() + b"\n"
    write_atomically(path, content)


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Replace the file `path` by `content` in one step: a reader, or a crash, sees the old bytes or the new ones."""
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
    """Have an OSError of the block name `path`: the system does not say where a disk is full."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[int]:
    """Hold the lock of a file or folder while the block runs; the system lets go of it when this process ends, however.

    Yields the file descriptor that holds it: a child process that inherits it holds the lock with its parent. Raises
    BlockingIOError if another process, or another place of this one, holds it. POSIX locks `path` itself. Windows can
    lock no folder: there a hidden file beside it is locked instead. Where Python has neither kind of lock, nobody is
    stopped.
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
            os.lseek(handle, FAR_AWAY, os.SEEK_SET)  # Windows lets nobody read a locked byte: none that is there
            try:
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            except OSError as error:
                raise BlockingIOError(error.errno, f"{path} is locked") from error
        yield handle
    finally:
        os.close(handle)


def flush(path: str | Path) -> None:
    """Make sure that a file, or what a folder lists, is on the disk. Windows cannot do that for a folder."""
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
