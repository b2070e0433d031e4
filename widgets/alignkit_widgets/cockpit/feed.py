"""Messages from a cockpit to its front end: new points a few times a second, and all points for a page that opens
later."""

from __future__ import annotations

import time
from collections.abc import Callable

from alignkit.safe_text import visible
from alignkit_widgets.notebook import TextProgress, has_front_end

_AGAIN = 2.0  # seconds; a page cannot request missed points from a busy kernel, so all are sent again


class Feed:
    """Sends rows, marks and samples to a live panel, or as a line of text if there is no front end.

    Nothing is copied: a message contains the new entries of `rows` and `marks` since the last one. `branches`, the rows
    that rewinds abandoned, are sent only with the whole run.
    """

    def __init__(self, config: dict, on_message: Callable[[dict], None], every: float) -> None:
        self.config, self.every = config, every
        self.keys = [key for chart in config["charts"] for key in chart["keys"]]
        self.rows: list[dict] = []
        self.marks: list[dict] = []
        self.branches: list[dict] = []
        self.samples: dict | None = None
        self.seconds = 0.0  # kernel time spent on the updates
        self.updates = 0
        self._sent = (0, 0, None)
        self._last = self._whole = 0.0
        self.panel = self.text = None
        if has_front_end():
            from alignkit_widgets.cockpit.panel import PanelDisplay

            self.panel = PanelDisplay(config, on_message)
        else:
            self.text = TextProgress(config["title"], self.keys)

    def show_samples(self, step: int, pairs: list, limit: int = 8) -> None:
        """Keep the first `limit` (prompt, response) pairs of an iteration for the table."""
        self.samples = {"step": step, "pairs": [[visible(p), visible(r)] for p, r in pairs[:limit]]}

    def update(self, state: dict, force: bool = False) -> None:
        """Send the new entries if `every` seconds have passed since the last update, or at once with `force`."""
        begun = time.perf_counter()
        if not force and begun - self._last < self.every:
            return
        if self.panel is not None:
            whole = self.config["mode"] == "watch" and begun - self._whole > _AGAIN
            self.panel.send(self._message(state, *((0, 0, None) if whole else self._sent), whole=whole))
            self._whole = begun if whole and self.rows else self._whole
        elif self.rows:
            self.text.update(state["place"], self.rows[-1], final=state["over"])
        self._sent, self._last = (len(self.rows), len(self.marks), self.samples), time.perf_counter()
        self.updates, self.seconds = self.updates + 1, self.seconds + self._last - begun

    def resend(self, state: dict) -> None:
        """Send the whole run: a page was loaded during the run, or the run was rewound."""
        if self.panel is not None:
            self.panel.send(self._message(state, 0, 0, None, whole=True))
            self._sent = (len(self.rows), len(self.marks), self.samples)

    def _message(self, state: dict, rows_from: int, marks_from: int, samples: dict | None, whole: bool) -> dict:
        rows = self.rows[rows_from:]
        return {
            "whole": whole,
            "from": rows_from,
            "to": len(self.rows),
            **self._drawn(rows),
            "branches": [self._drawn(branch["rows"]) for branch in self.branches] if whole else [],
            "marks": self.marks[marks_from:],
            "samples": None if self.samples is samples else self.samples,
            "state": state,
        }

    def _drawn(self, rows: list[dict]) -> dict:
        return {
            "points": {key: [[row["step"], row[key]] for row in rows if key in row] for key in self.keys},
            "shares": [[row["step"], row["shares"]] for row in rows if "shares" in row],
        }
