"""The results of a sweep as tables: one row per job in table.csv, table.jsonl and table.parquet, and junit.xml for CI.

A row has the job's ID, its parameters, how it ended, and every number of its results: those of each
RUN/STAGE/results.json, as STAGE.NAME, with a dot for each level below. A list's numbers are NAME.0, NAME.1, …, up to
LONGEST of them.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from alignkit.errors import RunError
from alignkit.metrics import is_number
from alignkit.safe_text import csv_cell, visible
from alignkit.storage import plain, read_json, write_atomically

FACTS = ("status", "host", "seconds", "attempts", "error")
LONGEST = 64  # numbers of a list; longer ones are curves, and no figures of a run
Row = dict[str, object]


def row_of(job: str, parameters: Mapping[str, object], record: Mapping[str, object], folder: Path | None) -> Row:
    """The row of one job. record: its job.json, {} if it has not run; folder: that of its results, if it finished."""
    row: Row = {"job": job}
    row |= {name if name not in ("job", *FACTS) else f"parameter.{name}": value for name, value in parameters.items()}
    row |= {"status": record.get("status", "not run"), "host": record.get("host"), "seconds": record.get("seconds"),
            "attempts": record.get("attempts"), "error": record.get("error") or None}
    for name, value in (numbers(folder) if folder else {}).items():
        row[f"result.{name}" if name in row else name] = value
    return row


def numbers(folder: Path) -> dict[str, float | int]:
    """Every number of the results in a run directory, by name, in the order of the stages' names."""
    found: dict[str, float | int] = {}
    for path in [folder / "results.json", *sorted(folder.glob("*/results.json"))]:
        try:
            results = read_json(path)
        except FileNotFoundError:
            continue
        except RunError:
            continue  # `alignkit report` says so; the other figures stand
        _flatten(results, "" if path.parent == folder else path.parent.name, found)
    return found


def write_tables(root: Path, rows: Sequence[Row], *, parquet: bool = True) -> list[Path]:
    """Write table.csv and table.jsonl, and table.parquet if pyarrow is installed; returns their paths."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns = _in_order(rows, columns)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([csv_cell(_cell(row.get(name))) for name in columns] for row in rows)
    write_atomically(root / "table.csv", text.getvalue())
    write_atomically(root / "table.jsonl", "".join(
        json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows))
    written = [root / "table.csv", root / "table.jsonl"]
    if parquet and (content := _parquet(rows, columns)):
        write_atomically(root / "table.parquet", content)
        written.append(root / "table.parquet")
    return written


def write_junit(root: Path, name: str, rows: Sequence[Row]) -> Path:
    """Write junit.xml: a test case a job; one that failed, died or ran out of time has its error, one that did not run
    is skipped."""
    count = {state: sum(_state(row) == state for row in rows) for state in ("failure", "skipped")}
    seconds = sum(_seconds(row) for row in rows)
    suite = ElementTree.Element("testsuite", name=_xml(name), tests=str(len(rows)), failures=str(count["failure"]),
                                errors="0", skipped=str(count["skipped"]), time=f"{seconds:.1f}")
    for row in rows:
        case = ElementTree.SubElement(suite, "testcase", classname=_xml(name), name=_xml(row["job"]),
                                      time=f"{_seconds(row):.1f}")
        if _state(row) == "failure":
            message = _xml(row.get("error") or row["status"])
            ElementTree.SubElement(case, "failure", message=message[:500], type=_xml(row["status"])).text = message
        elif _state(row) == "skipped":
            ElementTree.SubElement(case, "skipped", message=_xml(row["status"]))
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    content = ElementTree.tostring(suites, encoding="utf-8", xml_declaration=True)
    write_atomically(root / "junit.xml", content + b"\n")
    return root / "junit.xml"


def _flatten(value: object, name: str, found: dict[str, float | int]) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _flatten(item, f"{name}.{key}" if name else str(key), found)
    elif isinstance(value, list):
        for at, item in enumerate(value if len(value) <= LONGEST else ()):
            _flatten(item, f"{name}.{at}", found)
    elif is_number(value):
        found[name] = value


def _in_order(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """Job, parameters, facts, results: as a row has them, and results that only some rows have at the end."""
    before = list(dict.fromkeys(name for row in rows for name in list(row)[:list(row).index("status")])) or ["job"]
    return [*before, *FACTS, *(name for name in columns if name not in before and name not in FACTS)]


def _cell(value: object) -> object:
    """A value as a cell: lists and mappings as JSON, truth as text."""
    if isinstance(value, list | dict | bool):
        return json.dumps(plain(value), ensure_ascii=False)
    return value


def _parquet(rows: Sequence[Row], columns: Sequence[str]) -> bytes | None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return None
    table = pyarrow.table({name: _column(pyarrow, [row.get(name) for row in rows]) for name in columns})
    sink = io.BytesIO()
    parquet.write_table(table, sink)
    return sink.getvalue()


def _column(pyarrow, values: Sequence[object]):
    """A column with one type: numbers, truth or text; values of several types become text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return pyarrow.array(values, pyarrow.bool_())
    if kinds == {int} and all(value is None or abs(value) < 2**63 for value in values):
        return pyarrow.array(values, pyarrow.int64())
    if kinds and kinds <= {int, float}:
        return pyarrow.array([None if value is None else float(value) for value in values], pyarrow.float64())
    return pyarrow.array([None if value is None else visible(_cell(value), 10_000) for value in values],
                         pyarrow.string())


def _state(row: Row) -> str:
    status = row["status"]
    return "passed" if status == "finished" else "skipped" if status in ("not run", "interrupted") else "failure"


def _seconds(row: Row) -> float:
    return float(row["seconds"]) if is_number(row.get("seconds")) else 0.0


def _xml(text: object) -> str:
    return visible(text, 5000)
