"""Progress of a notebook on one line of a terminal or in a log, including the notebook's own progress messages."""

import re
import shutil
import sys
import threading
import time
import unicodedata

from alignkit.metrics import duration
from alignkit.safe_text import one_line

LOG_SECONDS = 30  # between two lines of a log if something has changed, otherwise twice as long
# "step 44 of 80", "12 of 40, 31.0 s left", "63 steps of 128 pairs, 0.21 s each: about 30 s"
_OF_PROGRESS = re.compile(r"\b\d[\d,]* of \d|\babout \d[\d.,:]* ?(s|min|h)\b|\bleft\b")


class Progress:
    """One line about one notebook: redrawn in a terminal; in a log, printed every half minute and at the end.

    expected: seconds that it took before, None if it was never run.
    """

    def __init__(self, name: str, expected: float | None):
        self.name, self.expected, self.live = name, expected, sys.stdout.isatty()
        self.started, self.place, self.bar, self.own = time.monotonic(), "", "", ""
        self.over, self.thread = threading.Event(), None

    def say(self, what: str) -> None:
        """Print a separate line."""
        print(f"{self.name:<24}{what}", flush=True)

    def at(self, cell: int, cells: int, printed: str = "") -> None:
        """The notebook is at cell number `cell`, counted from 0, of `cells`, or has just `printed` some text."""
        if printed:
            self.own = last_of_progress(printed) or self.own
            return
        filled = round(20 * cell / cells)
        self.place, self.bar = f"cell {cell + 1} of {cells}", "█" * filled + "░" * (20 - filled)
        if "about" not in self.own:  # an estimate refers to the training in a later cell
            self.own = ""
        if not self.thread:
            self.thread = threading.Thread(target=self._tick, daemon=True)
            self.thread.start()

    def end(self, what: str) -> None:
        """Stop, and print how the notebook ended."""
        self.over.set()
        if self.thread:
            self.thread.join()
        print("\r\x1b[K" if self.live else "", end="")
        self.say(what)

    def words(self) -> str:
        """The notebook's position, its elapsed time, the remaining time according to earlier runs, and its own
        message."""
        seconds = time.monotonic() - self.started
        left = self.expected - seconds if self.expected else 0
        return (f"{self.place}, {duration(seconds)}" + (f", about {duration(left)} left" if left > 0 else "")
                + (f" · {self.own}" if self.own else ""))

    def line(self, columns: int) -> str:
        """Name, bar and words in at most `columns` columns; the words take precedence over the bar."""
        words = self.words()
        whole = f"{self.name:<24}{self.bar} {words}"
        return whole if _width(whole) <= columns else clipped(f"{self.name} {words}", columns)

    def _tick(self) -> None:
        shown, ticks = "", 0
        while not self.over.wait(0.25 if self.live else LOG_SECONDS):
            if self.live:
                print(f"\r\x1b[K{self.line(shutil.get_terminal_size().columns - 1)}", end="", flush=True)
                continue
            ticks, before, shown = ticks + 1, shown, self.place + self.own
            if shown != before or ticks % 2 == 0:
                self.say(self.words())


def last_of_progress(text: str) -> str:
    """The last printed line of a cell that reports progress or an estimate, escaped; "" if there is none.

    A carriage return restarts the line, as on a terminal.
    """
    lines = re.split(r"[\r\n]+", text[-4000:])
    line = next((line for line in reversed(lines) if _OF_PROGRESS.search(line)), "")
    return one_line(line.strip(), 200)


def clipped(text: str, columns: int) -> str:
    """`text` in at most `columns` terminal columns (wide characters take two), with … if it is cut."""
    if _width(text) <= columns:
        return text
    while _width(text) >= columns:
        text = text[:-1]
    return f"{text}…"


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
