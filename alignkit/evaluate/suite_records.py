"""suites.json: the results of suites on checkpoints, with the settings of each figure, stored beside a checkpoint's
files.

Each figure stores the hash of its checkpoint, so a figure of other weights is never shown for this checkpoint.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from alignkit.errors import RunError
from alignkit.evaluate.stored import check_fields, is_a, is_figure
from alignkit.formulas.intervals import LEVEL, Estimate
from alignkit.storage import read_json, write_json

RECORD = "suites.json"
_Z = 1.959963984540054  # of LEVEL


@dataclass(frozen=True)
class Score(Estimate):
    """An Estimate of a suite, with its standard error, the number n of items, the few-shot examples (shots), and a
    remark (note)."""

    stderr: float | None = None
    n: int | None = None
    shots: int | None = None
    note: str = ""


def score(value: float, stderr: float | None, n: int | None = None, shots: int | None = None) -> Score:
    """value ± 1.96·stderr, the 95 % interval of a mean of n items.

    There is no interval if the standard error is missing or 0: if all items have the same result, their spread says
    nothing about the error.
    """
    if not stderr or not math.isfinite(stderr):
        return Score(value, None, None, None if stderr is None or not math.isfinite(stderr) else stderr, n, shots)
    return Score(value, value - _Z * stderr, value + _Z * stderr, stderr, n, shots)


@dataclass(frozen=True)
class Measurement:
    """One figure of a suite on one checkpoint: a row of suites.json.

    hash: of the checkpoint (its manifest's, if it is frozen). low, high: the 95 % interval. n: items; limit: maximum
    number of items per task, None for all. chat_template: whether prompts went through the model's template. file: name
    and shortened SHA-256 of the user's file with the items. note: remark to show with the figure.
    """

    checkpoint: str
    hash: str
    suite: str
    metric: str
    value: float
    low: float | None
    high: float | None
    stderr: float | None
    n: int | None
    shots: int | None
    limit: int | None
    seed: int
    chat_template: bool
    versions: dict
    date: str
    file: str = ""
    note: str = ""

    @property
    def score(self) -> Score:
        """The value with its interval, standard error and number of items."""
        return Score(self.value, self.low, self.high, self.stderr, self.n, self.shots)


def read_suites(folder: str | Path) -> list[Measurement]:
    """The rows of FOLDER/suites.json in their order; [] without one. Raises RunError, naming row and field, if the file
    is torn or not a valid record."""
    path = Path(folder) / RECORD
    try:
        rows = read_json(path).get("measured")
    except FileNotFoundError:
        return []
    if not isinstance(rows, list):
        raise RunError(f"{path}: measured is no list; delete the file, or put it right, and measure again")
    return [_measurement(row, f"{path}: measured[{position}]") for position, row in enumerate(rows)]


def add_suites(folder: str | Path, measured: Iterable[Measurement]) -> Path:
    """Add figures to FOLDER/suites.json, which is created if missing; returns its path. Figures of the same suite and
    file on the same checkpoint, with the same limit, are replaced. Raises RunError if the existing file is not a valid
    record, and leaves it unchanged."""
    new, folder = list(measured), Path(folder)
    again = {(each.hash, each.suite, each.file, each.limit) for each in new}
    kept = [each for each in read_suites(folder) if (each.hash, each.suite, each.file, each.limit) not in again]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECORD, {"level": LEVEL, "measured": [asdict(each) for each in [*kept, *new]]})
    return folder / RECORD


def suites_of(directory: str | Path) -> tuple[list[Measurement], str]:
    """Suite results for the checkpoint in `directory` in its present state, and a remark on omitted results ("").

    If a suite has several records, the one of all items counts, otherwise the one with the most. Raises RunError if the
    record cannot be read, ManifestError if the checkpoint cannot.
    """
    rows = read_suites(directory)
    if not rows:
        return [], ""
    from alignkit.runs.frozen import checkpoint_hash

    current = checkpoint_hash(directory)
    best: dict[tuple[str, str], list[Measurement]] = {}
    for row in (row for row in rows if row.hash == current):
        held = best.get((row.suite, row.file))
        if held is None or _items(row) > _items(held[0]):
            best[row.suite, row.file] = [row]
        elif held[0].limit == row.limit:
            held.append(row)
    other = len({(row.hash, row.suite) for row in rows if row.hash != current})
    remark = (f"{other} suites in {RECORD} were measured on other weights than the checkpoint has now; they are left "
              "out.") if other else ""
    return [row for rows in best.values() for row in rows], remark


def _items(row: Measurement) -> float:
    return math.inf if row.limit is None else row.limit


def _measurement(row: object, where: str) -> Measurement:
    if not isinstance(row, Mapping):
        raise RunError(f"{where} is no JSON object")
    check_fields(row, _CHECKS, where)
    return Measurement(**{name: row[name] for name in _CHECKS})


def _is_count(value: object) -> bool:
    return is_a(int)(value) and value >= 0


def _or_none(check):
    return lambda value: value is None or check(value)


_CHECKS = {
    **dict.fromkeys(("checkpoint", "hash", "suite", "metric", "date", "file", "note"), is_a(str)), "value": is_figure,
    **dict.fromkeys(("low", "high", "stderr"), _or_none(is_figure)),
    **dict.fromkeys(("n", "shots", "limit"), _or_none(_is_count)), "seed": _is_count, "chat_template": is_a(bool),
    "versions": is_a(dict),
}
