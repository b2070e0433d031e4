"""Read records from files and Hub data sets one at a time, each with its position. `data.rows` converts them to rows.

Supported: JSON lines, one JSON array, CSV and Parquet, each also gzipped (detected by the first bytes, not by the
name), a folder written by `datasets.save_to_disk`, or a Hub id. Files are read in pieces, so memory is bounded by one
record. An invalid record is yielded as a `Fault`, and reading continues if the next record can be found.
"""

import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import re
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from alignkit.errors import DataError
from alignkit.sources import local_path

LINE_LIMIT = 16 * 2**20  # bytes in a line of a file, characters in an item of an array or in a text
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
SMALL, GIBIBYTE = 64 * 2**20, 2**30
MOST_INFLATED = 200  # maximum inflation of a packed file, relative to its size, above SMALL bytes
MANY_ROWS = 100_000  # rows of a Parquet file, above which each row must occupy at least a byte
MOST_COPIED = 4 * GIBIBYTE  # maximum bytes of a Parquet file unpacked to disk
_GZIP_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)


class Fault(Exception):
    """Why one record, or one field of it, cannot be used."""

    def __init__(self, reason: str, field: str = ""):
        super().__init__(reason)
        self.reason, self.field = reason, field


class _Inflated(io.RawIOBase):
    """The inflated content of a gzip file; raises Fault if it is more than MOST_INFLATED times the file's size."""

    def __init__(self, path: Path):
        self._packed = open(path, "rb")  # noqa: SIM115 (closed by `close`)
        self._plain, self._count = gzip.GzipFile(fileobj=self._packed), 0
        self._most = path.stat().st_size * MOST_INFLATED

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self._plain.readinto(buffer)
        self._count += count
        if self._count > SMALL and self._count > min(self._most, (self._packed.tell() + 2**16) * MOST_INFLATED):
            raise Fault(f"the gzip file inflates to more than {self._count / 2**20:,.0f} MiB, more than "
                        f"{MOST_INFLATED} times its size: is it a bomb? Unpack it yourself if you want to read it")
        return count

    def close(self) -> None:
        self._plain.close()
        self._packed.close()
        super().close()


def _open(path: Path) -> io.BufferedIOBase:
    """A file's bytes, inflated if the file is gzipped."""
    with open(path, "rb") as stream:
        zipped = stream.read(2) == b"\x1f\x8b"
    return io.BufferedReader(_Inflated(path), 2**17) if zipped else open(path, "rb")


def _read_through(path: Path) -> None:
    """Raise Fault if the first GIBIBYTE of a gzip file's inflated content is out of proportion to its size.

    This takes a fraction of the time for reading its rows, and detects a bomb early: rows of one character inflate a
    thousand times faster than they can be read.
    """
    with _Inflated(path) as stream, contextlib.suppress(*_GZIP_ERRORS):
        buffer, count = bytearray(2**18), 0
        while count < GIBIBYTE and (size := stream.readinto(buffer)):
            count += size


def _is_inflated(stream: io.BufferedIOBase) -> bool:
    return isinstance(getattr(stream, "raw", None), _Inflated)


def records(source: str | os.PathLike, split: str | None = None) -> tuple[str, Iterator[tuple[int, object]]]:
    """("line" or "row", the records of a source): pairs of a number, from 1, and a JSON value or a Fault.

    split: the split of a saved or a Hub data set; for a file, the value in its column `split`. Raises DataError if
    there is no such source; the iterator raises Fault for an error of the whole source.
    """
    name, path = str(source), local_path(source, error=DataError)
    if path is None:
        return "row", _dataset_records(name, split)
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if path.is_dir():
        if not any((path / part).is_file() for part in ("state.json", "dataset_dict.json")):
            raise DataError(f"{name}: is a folder; expected a file, or a folder written by datasets.save_to_disk")
        return "row", _dataset_records(str(path), split)
    if suffix not in SUFFIXES or not path.is_file():
        raise DataError(f"{name}: unknown kind of file {suffix!r}; expected {', '.join(SUFFIXES)}, each also with .gz")
    reader = {".csv": _csv_records, ".parquet": _parquet_records}.get(suffix, _jsonl_records)
    if suffix == ".json":
        with _open(path) as stream, contextlib.suppress(*_GZIP_ERRORS):
            if stream.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                reader = _array_records

    def read() -> Iterator[tuple[int, object]]:
        with _open(path) as stream:
            if _is_inflated(stream):
                _read_through(path)
            yield from reader(stream) if split is None else _of_split(reader(stream), split)

    return ("row" if reader in (_array_records, _parquet_records) else "line"), read()


def readable(source: str | os.PathLike, split: str | None = None) -> None:
    """Raise DataError if a file or folder cannot be read; its records are not checked."""
    try:
        next(records(source, split)[1], None)
    except Fault as fault:
        raise DataError(f"{source}: {fault.reason}") from None


def _lines(stream: io.BufferedIOBase) -> Iterator[tuple[int, bytes | Fault]]:
    """Yield (line number, line with its end), or a Fault for a line that is too long; a UTF-8 BOM is removed."""
    for number in itertools.count(1):
        try:
            line = stream.readline(LINE_LIMIT + 1)
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line:
                return
            too_long = len(line) > LINE_LIMIT
            while too_long and line and not line.endswith(b"\n"):
                line = stream.readline(2**16)
        except _GZIP_ERRORS as error:
            yield number, Fault(f"the gzip stream is damaged or cut off here ({error}); compress the file again")
            return
        yield number, Fault(f"the line is longer than {LINE_LIMIT // 2**20} MiB") if too_long else line


class _Json:
    """A JSON decoder that also refuses duplicate keys, NaN and Infinity."""

    def __init__(self):
        self._faults: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant)

    def _object(self, pairs: list[tuple[str, object]]) -> dict:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            self._faults.append(f"the key {max(names, key=names.count)!r} is there twice")
        return dict(pairs)

    def _constant(self, name: str) -> None:
        self._faults.append(f"{name} is not JSON; expected a number, text or null")

    def decode(self, text: str, start: int = 0) -> tuple[object, int]:
        """Return (value or Fault, end). Raises json.JSONDecodeError if the text is not JSON or incomplete."""
        self._faults.clear()
        try:
            value, end = self._decoder.raw_decode(text, start)
        except RecursionError:
            raise json.JSONDecodeError("nested too deeply", text, start) from None
        except ValueError as error:
            if isinstance(error, json.JSONDecodeError):
                raise
            raise json.JSONDecodeError(str(error), text, start) from None
        return (Fault(self._faults[0]) if self._faults else value), end


def _jsonl_records(stream: io.BufferedIOBase) -> Iterator[tuple[int, object]]:
    decoder = _Json()
    for number, line in _lines(stream):
        if isinstance(line, Fault):
            yield number, line
            continue
        torn = "" if line.endswith(b"\n") else "the file ends in the middle of this line (a torn write?): "
        try:
            text = line.decode("utf-8").strip()
            if not text:
                continue
            value, end = decoder.decode(text)
            yield number, value if end == len(text) else Fault(f"more text after the JSON value, at column {end + 1}")
        except UnicodeDecodeError as error:
            hint = "; the file looks like UTF-16, save it as UTF-8" if line[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
            yield number, Fault(f"{torn}invalid UTF-8 at byte {error.start + 1} of the line{hint}")
        except json.JSONDecodeError as error:
            nul = " (the line contains NUL bytes)" if b"\0" in line else ""
            yield number, Fault(f"{torn}not valid JSON: {error.msg} at column {error.pos + 1}{nul}")


def _array_records(stream: io.BufferedIOBase) -> Iterator[tuple[int, object]]:
    """The items of one JSON array, read in pieces of a MiB; invalid JSON ends the reading."""
    source = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    decoder, text, position, row, more = _Json(), "", 0, 0, True
    stops = "; reading stops here"
    try:
        while True:  # one item and the comma, or the bracket, before and after it
            separator = re.compile(r"\s*,\s*" if row else r"\s*\[\s*").match(text, position)
            value, end, error = None, None, None
            if separator and separator.end() < len(text):
                if text[separator.end()] == "]" and row == 0:
                    return
                try:
                    value, end = decoder.decode(text, separator.end())
                except json.JSONDecodeError as problem:
                    error = f"not valid JSON: {problem.msg}"
            after = re.compile(r"\s*([,\]])").match(text, end) if end else None
            if after is None and more and len(text) - position <= LINE_LIMIT:
                piece = source.read(max(2**20, len(text) - position))  # doubles: an item is parsed O(log size) times
                text, position, more = text[position:] + piece, 0, bool(piece)
                continue
            row += 1
            if after is None:
                error = f"{error or 'not an item'}, or longer than {LINE_LIMIT // 2**20} MiB" if more else error
                yield row, Fault((error or "the file ends inside the array (a torn write?)") + stops)
                return
            try:
                text[position:end].encode()
                yield row, value
            except UnicodeEncodeError:
                yield row, Fault("invalid UTF-8")
            position = end
            if after[1] == "]":
                return
    except _GZIP_ERRORS as error:
        yield row + 1, Fault(f"the gzip stream is damaged or cut off here ({error}); compress the file again")


def _csv_records(stream: io.BufferedIOBase) -> Iterator[tuple[int, object]]:
    csv.field_size_limit(max(csv.field_size_limit(), LINE_LIMIT))

    def texts() -> Iterator[str]:
        for _, line in _lines(stream):
            if isinstance(line, Fault):
                raise line
            yield line.decode("utf-8", "surrogateescape")

    reader, header = csv.reader(texts(), strict=True), None
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except Fault as fault:
            yield number, Fault(f"{fault.reason}; reading stops here")
            return
        except csv.Error as error:
            yield number, Fault(f"not valid CSV: {error}")
            continue
        if not cells:
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            if len(set(header)) < len(header):
                raise Fault(f"two columns have the same name: {', '.join(map(repr, header))}")
        elif any(re.search("[\udc80-\udcff]", cell) for cell in cells):
            yield number, Fault("invalid UTF-8")
        elif len(cells) > len(header):
            yield number, Fault(f"{len(cells)} cells, the header has {len(header)}")
        else:
            yield number, dict(zip(header, cells, strict=False))  # a short row lacks its last columns


def _parquet_records(stream: io.BufferedIOBase) -> Iterator[tuple[int, object]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise Fault("Parquet files need pyarrow: pip install pyarrow") from None
    with tempfile.TemporaryFile() as plain:
        if _is_inflated(stream):  # Parquet is read from its end
            while piece := stream.read(2**20):
                plain.write(piece)
                if plain.tell() > MOST_COPIED:
                    raise Fault(f"unpacked, it has more than {MOST_COPIED // GIBIBYTE} GiB; unpack it yourself")
            stream = plain
        try:
            size = stream.seek(0, os.SEEK_END)
            table, row, content = parquet.ParquetFile(stream), 0, 0
            _check_proportion(table.metadata, size)
            for batch in table.iter_batches(batch_size=_at_once(table.metadata, size)):
                content += batch.nbytes
                if content > max(4 * SMALL, MOST_INFLATED * size):  # one value repeated a million times takes few bytes
                    raise Fault(f"{size:,} bytes of Parquet that hold more than {content / 2**20:,.0f} MiB, more than "
                                f"{MOST_INFLATED} times their size: is it a bomb?")
                for index in range(len(batch)):
                    row += 1
                    try:
                        yield row, batch.slice(index, 1).to_pylist()[0]
                    except UnicodeDecodeError:
                        yield row, Fault("invalid UTF-8")
        except (pyarrow.ArrowException, OSError, MemoryError, RecursionError) as error:
            raise Fault(f"not a readable Parquet file: {type(error).__name__}: {error}"[:500]) from None


def _check_proportion(facts, size: int) -> None:
    """Raise Fault if a Parquet file of `size` bytes claims more content than it can hold."""
    inflated = _inflated(facts)
    if inflated > max(SMALL, MOST_INFLATED * size) or facts.num_rows > max(MANY_ROWS, size):
        raise Fault(f"{size:,} bytes of Parquet that hold {facts.num_rows:,} rows and {inflated / 2**20:,.0f} MiB, "
                    f"more than so few can hold ({MOST_INFLATED} times their size, a row for a byte): is it a bomb?")


def _at_once(facts, size: int) -> int:
    """Number of Parquet rows read together: few if a single value, stored once and repeated, may be large."""
    groups = [facts.row_group(number) for number in range(facts.num_row_groups)]
    widest = max((group.column(number).total_uncompressed_size for group in groups
                  for number in range(group.num_columns)), default=0)
    return 64 if widest * 64 <= SMALL else 4 if _inflated(facts) <= 50 * size else 1


def _inflated(facts) -> int:
    return sum(facts.row_group(number).total_byte_size for number in range(facts.num_row_groups))


def _dataset_records(source: str, split: str | None = None) -> Iterator[tuple[int, object]]:
    """A split of a saved or a Hub data set, by default "train" or the only one. Code in its repository is never run."""
    try:
        import datasets
    except ImportError:
        raise Fault("data sets from the Hub need the package datasets: pip install datasets") from None
    try:
        data = datasets.load_from_disk(source) if os.path.isdir(source) else datasets.load_dataset(source)
    except Exception as error:  # the Hub client raises many kinds
        reason = str(error).partition("\n")[0][:200]
        saved = os.path.isdir(source)
        readings = "" if saved else "there is no such file or folder here, and alignkit "
        raise Fault(f"{readings}cannot load this as a {'saved' if saved else 'Hub'} data set ({type(error).__name__}: "
                     f"{reason}). Offline, or the name is wrong? Download the data and give a local file "
                     f"({', '.join(SUFFIXES)}, each also .gz)") from error
    if not isinstance(data, dict):
        rows = enumerate(data, 1)
        yield from rows if split in (None, str(getattr(data, "split", None))) else _of_split(rows, split)
        return
    names = ", ".join(data)
    if split is not None and split not in data:
        raise Fault(f"it has no split {split!r}; its splits are {names}")
    if split is None and "train" not in data and len(data) != 1:
        raise Fault(f"it has the splits {names}, none is called train; say which: --split NAME (split=…)")
    yield from enumerate(data[split] if split else data["train"] if "train" in data else next(iter(data.values())), 1)


def _of_split(rows: Iterator[tuple[int, object]], split: str) -> Iterator[tuple[int, object]]:
    """The rows whose column `split` is `split`."""
    count, others = 0, {}
    for number, record in rows:
        if isinstance(record, dict) and "split" not in record:
            raise Fault(f"split is {split!r}, and this is one file without a column 'split'; leave --split out")
        if isinstance(record, dict) and record["split"] != split:
            others[str(record["split"])[:40]] = None
            continue
        count += 1
        yield number, record
    if not count and others:
        raise Fault(f"no row has the split {split!r}; there are {', '.join(list(others)[:20])}")
