"""Estimates of the training time before training starts: from a few real steps that change nothing, or from recorded
times and a probe.

`seconds.json` holds the recorded time of each notebook, and the probe's time on that machine at the same time; `python
-m benchmarks.seconds RUN` makes it.
"""

import json
import time
from pathlib import Path

import numpy as np

RECORDED = Path(__file__).with_name("seconds.json")


def notebook_seconds(speed: float | None = None) -> dict[str, float]:
    """Seconds that each notebook takes on this machine with default settings, from the recorded times and the machine's
    speed.

    speed: of this machine relative to the recorded one; None: measured by a probe, which takes about a second.
    """
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    speed = recorded["probe"] / probe_seconds() if speed is None else speed
    return {name: seconds / speed for name, seconds in recorded["notebooks"].items()}


def probe_seconds() -> float:
    """CPU seconds of a fixed computation on one thread: elementwise functions of small arrays. Best of five."""
    start = np.linspace(-2, 2, 65536, dtype=np.float32)
    best = float("inf")
    for _ in range(5):
        begun, x = time.thread_time(), start
        for _ in range(500):
            x = np.tanh(x) * 0.5 + start
        best = min(best, time.thread_time() - begun)
    return best
