"""What the notebooks took where they were recorded: the estimate of a job's time before it starts.

The times are of one machine with two CPU cores, and are not scaled to this one: a probe of numpy's speed differed 25
times with the instructions that numpy uses, while training took the same. `python -m benchmarks.seconds RUN` makes
`seconds.json`.
"""

import json
from pathlib import Path

RECORDED = Path(__file__).with_name("seconds.json")
WHERE = "two CPU cores"


def notebook_seconds() -> dict[str, float]:
    """Seconds that each notebook took with its default settings where they were recorded (WHERE)."""
    return json.loads(RECORDED.read_text(encoding="utf-8"))["notebooks"]
