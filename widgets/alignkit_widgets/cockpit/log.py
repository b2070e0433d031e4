"""What a run's metrics.jsonl says of how it was steered: enough to run it again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from alignkit.storage import branch_files, read_metrics


def replay(log: str | Path) -> dict[int, dict[str, float]]:
    """{iteration: the control values that it ran with}, from a run's log.

    Give it to `TrainingCockpit.run(step, replay=replay(log))` to run the run again as it was steered.
    Raises ValueError where the rows hold no controls.
    """
    controls = {row["step"]: row["controls"] for row in read_metrics(log) if "controls" in row}
    if not controls:
        raise ValueError(f"{log} has no row with 'controls': the run had nothing to steer, or did not begin")
    return controls


def marks_of(rows: list[dict], branches: Sequence[dict] = ()) -> list[dict]:
    """Where controls changed, and where the run was rewound, from its rows: [{"step", "name", "old", "new"}]."""
    marks = [
        {"step": after["step"], "name": name, "old": before["controls"].get(name, value), "new": value}
        for before, after in pairwise(row for row in rows if "controls" in row)
        for name, value in after["controls"].items()
        if value != before["controls"].get(name, value)
    ]
    marks += [{"step": b["at"], "name": "rewind", "old": b["rows"][-1]["step"], "new": b["at"]} for b in branches]
    return sorted(marks, key=lambda mark: mark["step"])


def branches_of(log: str | Path, rows: list[dict]) -> list[dict]:
    """What a run left behind when it was rewound, oldest first; `rows` are those of its log. See `branch`."""
    branches = []
    for left in reversed([read_metrics(file) for file in branch_files(log)]):
        at = left[0]["step"] - 1
        rows = [row for row in rows if row["step"] <= at] + left  # the log as it was before that rewind
        branches.insert(0, branch(rows, at))
    return branches


def branch(rows: list[dict], at: int) -> dict:
    """{"at", "rows"}: the rows that are left when a run goes back to iteration `at`, and first the one of `at`."""
    return {"at": at, "rows": [row for row in rows if row["step"] >= at]}
