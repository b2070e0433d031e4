"""What a sweep says while it runs: one line that is redrawn on a terminal, one line an event elsewhere."""

import shutil
import sys
import time

from alignkit.jobs.progress import clipped
from alignkit.metrics import duration
from alignkit.safe_text import one_line
from alignkit.sweeps.plan import Spec

MOST_ERROR = 500


class SweepProgress:
    """Counts a sweep's jobs and prints. jobs: how many the grid has; done: how many of them had finished before;
    shared: how many shared series are to be made; workers: how many jobs run at a time."""

    def __init__(self, jobs: int, done: int, shared: int, workers: int):
        self.jobs, self.finished, self.failed, self.running = jobs, done, 0, 0
        self.shared, self.workers = shared, workers
        self.live = sys.stdout.isatty()
        self.took: dict[bool, list[float]] = {True: [], False: []}
        self.shown = 0.0

    def event(self, kind: str, spec: Spec, record: dict) -> None:
        """Count one event of the engine, and say it: on a terminal only what went wrong."""
        name = one_line(spec.id, 200)
        error = one_line(record.get("error") or "", MOST_ERROR)
        if kind == "started":
            self._log(f"{name}: started")
        elif kind == "finished":
            self.finished += not spec.shared
            self.shared -= spec.shared
            self.took[spec.shared].append(record["seconds"])
            self._log(f"{name}: finished in {duration(record['seconds'])}")
        elif kind == "failed":
            self.failed += not spec.shared
            self.say(f"{name}: {record['status'].upper()}: {error}")
        elif kind == "again":
            self.say(f"{name}: again, because it died: {error}")
        else:
            self._log(f"{name}: {kind}")

    def words(self) -> str:
        """Jobs done, running and failed, and the time left according to those that have finished."""
        left = self.seconds_left()
        return (f"{self.finished} of {self.jobs} jobs done, {self.running} running, {self.failed} failed"
                + (f", about {duration(left)} left" if left else ""))

    def seconds_left(self) -> float | None:
        """Seconds until the end, if jobs take as long as those that have finished; None if none has."""
        ahead = self.jobs - self.finished - self.failed
        if not self.took[False] or not ahead:
            return None
        of_shared = self.took[True] and self.shared * sum(self.took[True]) / len(self.took[True])
        work = ahead * sum(self.took[False]) / len(self.took[False]) + (of_shared or 0)
        return work / min(self.workers, ahead)

    def tick(self, running: int) -> None:
        """Redraw the line of a terminal."""
        self.running = running
        if self.live and time.monotonic() - self.shown > 0.4:
            self.shown = time.monotonic()
            print(f"\r\x1b[K{clipped(self.words(), shutil.get_terminal_size().columns - 1)}", end="", flush=True)

    def say(self, text: str) -> None:
        """Print a line of its own, on a terminal too."""
        print(f"{self._clear()}{text}" if self.live else self._numbered(text), flush=True)

    def end(self) -> None:
        """Clear the line of a terminal."""
        print(self._clear(), end="", flush=True)

    def _log(self, text: str) -> None:
        if not self.live:
            print(self._numbered(text), flush=True)

    def _numbered(self, text: str) -> str:
        return f"[{self.finished}/{self.jobs}] {text}"

    def _clear(self) -> str:
        return "\r\x1b[K" if self.live else ""
