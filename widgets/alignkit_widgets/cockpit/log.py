"""Read from a run's metrics.jsonl how the run was steered, which is enough to replay it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from alignkit.errors import RunError
from alignkit.storage import branch_files, read_metrics, trim_metrics, write_atomically
from alignkit_widgets.cockpit.controls import is_finite


def replay(log: str | Path) -> dict[int, dict[str, float]]:
    """{iteration: its control values}, from a run's log.

    Pass it to `TrainingCockpit.run(step, replay=replay(log))` to repeat the run with the same steering. Raises
    ValueError if the rows contain no controls.
    """
    controls = {row["step"]: row["controls"] for row in checked(read_metrics(log), log) if "controls" in row}
    if not controls:
        raise ValueError(f"{log} has no row with 'controls': the run had nothing to steer, or did not begin")
    return controls


def checked(rows: list[dict], log: str | Path) -> list[dict]:
    """`rows` of a log, if each is a numbered iteration with metrics, controls and shares that the panel can draw.

    Raises RunError, naming log and row, otherwise.
    """
    for number, row in enumerate(rows, 1):
        facts = {name: value for name, value in row.items() if name not in ("step", "controls", "shares")}
        shares = row.get("shares", {})
        if not (type(row.get("step")) is int and _is_numbers(row.get("controls", {})) and _is_numbers(facts, empty=True)
                and isinstance(shares, dict) and all(_is_numbers(part, empty=True) for part in shares.values())):
            raise RunError(f"{log}: row {number} is not that of an iteration: a step, and numbers")
    return rows


def _is_numbers(values: object, empty: bool = False) -> bool:
    return isinstance(values, dict) and all(is_finite(value) or (empty and value is None) for value in values.values())


def marks_of(rows: list[dict], branches: Sequence[dict] = ()) -> list[dict]:
    """The changes of controls and the rewinds of the run, from its rows: [{"step", "name", "old", "new"}]."""
    marks = [
        {"step": after["step"], "name": name, "old": before["controls"].get(name, value), "new": value}
        for before, after in pairwise(row for row in rows if "controls" in row)
        for name, value in after["controls"].items()
        if value != before["controls"].get(name, value)
    ]
    marks += [{"step": b["at"], "name": "rewind", "old": b["rows"][-1]["step"], "new": b["at"]} for b in branches]
    return sorted(marks, key=lambda mark: mark["step"])


def branches_of(log: str | Path, rows: list[dict]) -> list[dict]:
    """The branches that rewinds left, oldest first; `rows` are those of the run's log. See `branch`."""
    branches = []
    for left in reversed([left for file in branch_files(log) if (left := checked(read_metrics(file), file))]):
        at = left[0]["step"] - 1
        rows = [row for row in rows if row["step"] <= at] + left  # the log before that rewind
        branches.insert(0, branch(rows, at))
    return branches


def ways_of(log: str | Path, rows: list[dict]) -> list[list[dict]]:
    """All rows of the run as they were before each rewind, oldest first, and last `rows`, those that were kept."""
    ways = [rows]
    for left in reversed(branches_of(log, rows)):
        ways.insert(0, [row for row in ways[0] if row["step"] <= left["at"]]
                    + [row for row in left["rows"] if row["step"] > left["at"]])
    return ways


def samples_file(log: str | Path) -> Path:
    """The file beside a run's log with the samples that the panel showed.

    It has a row per iteration: {"step", "way", "pairs"}; way: the number of rewinds before it. A rewind removes no row.
    """
    return Path(log).with_name("samples.jsonl")


def trim_samples(log: str | Path, last_step: int, way: int) -> None:
    """Remove the samples after `last_step` of the way that a run continues; those of earlier ways stay."""
    file = samples_file(log)
    if file.exists():
        kept = [row for row in trim_metrics(file) if row.get("way", 0) < way or row.get("step", 0) <= last_step]
        write_atomically(file, "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept))


def branch(rows: list[dict], at: int) -> dict:
    """{"at", "rows"}: the rows left behind when a run returns to iteration `at`, preceded by the row of `at`."""
    return {"at": at, "rows": [row for row in rows if row["step"] >= at]}
