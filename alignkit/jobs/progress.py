"""How far a notebook is, on one line of a terminal or in a log."""

import sys
import threading
import time

from alignkit.metrics import duration


class Progress:
    """One line about one notebook: redrawn in a terminal; in a log, printed every minute and at the end.

    expected: seconds that it took before, None if it was never run.
    """

    def __init__(self, name: str, expected: float | None):
        self.name, self.expected, self.live = name, expected, sys.stdout.isatty()
        self.started, self.place, self.bar = time.monotonic(), "", ""
        self.over, self.thread = threading.Event(), None

    def say(self, what: str) -> None:
        """Print a line of its own."""
        print(f"{self.name:<24}{what}", flush=True)

    def at(self, cell: int, cells: int) -> None:
        """The notebook is at cell number `cell`, counted from 0, of `cells`."""
        filled = round(20 * cell / cells)
        self.place, self.bar = f"cell {cell + 1} of {cells}", "█" * filled + "░" * (20 - filled)
        if not self.thread:
            self.thread = threading.Thread(target=self._tick, daemon=True)
            self.thread.start()

    def end(self, what: str) -> None:
        """Stop, and say how it ended."""
        self.over.set()
        if self.thread:
            self.thread.join()
        print("\r\x1b[K" if self.live else "", end="")
        self.say(what)

    def _tick(self) -> None:
        while not self.over.wait(0.25 if self.live else 60):
            seconds = time.monotonic() - self.started
            left = self.expected - seconds if self.expected else 0
            words = f"{self.place}, {duration(seconds)}" + (f", about {duration(left)} left" if left > 0 else "")
            if self.live:
                print(f"\r\x1b[K{self.name:<24}{self.bar} {words}", end="", flush=True)
            else:
                self.say(words)
