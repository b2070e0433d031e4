"""What a run's metrics.jsonl says of how it was steered: enough to run it again."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

from alignkit.records import read_metrics


def replay(log: str | Path) -> dict[int, dict[str, float]]:
    """{iteration: the control values that it ran with}, from a run's log.

    Give it to `TrainingCockpit.run(step, replay=replay(log))` to run the run again as it was steered.
    Raises ValueError where the rows hold no controls.
    """
    controls = {row["step"]: row["controls"] for row in read_metrics(log) if "controls" in row}
    if not controls:
        raise ValueError(f"{log} has no row with 'controls': the run had nothing to steer, or did not begin")
    return controls


def marks_of(rows: list[dict]) -> list[dict]:
    """Where controls changed, from the rows of a log: [{"step", "name", "old", "new"}]."""
    return [
        {"step": after["step"], "name": name, "old": before["controls"].get(name, value), "new": value}
        for before, after in pairwise(row for row in rows if "controls" in row)
        for name, value in after["controls"].items()
        if value != before["controls"].get(name, value)
    ]


def finite(value: float) -> float | None:
    """`value`, or None for NaN and the infinities: JSON has none of them, and a chart shows a gap."""
    return value if math.isfinite(value) else None
