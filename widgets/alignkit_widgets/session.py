"""One run as a cockpit sees it: its rows, its state, its log on disk, its front end, and the picture in the end."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from alignkit.records import append_metrics, trim_metrics, write_atomically
from alignkit.text import visible
from alignkit_widgets.controls import Controls
from alignkit_widgets.feed import Feed
from alignkit_widgets.headless import in_kernel
from alignkit_widgets.runlog import finite, marks_of

OVER = ("finished", "stopped", "interrupted", "failed")


class Session:
    """Opened when a run starts, closed once, however the run ends."""

    def __init__(
        self,
        config: dict,
        controls: Controls,
        log: str | Path | None,
        start: int,
        every: float,
        on_message: Callable[[dict], None],
    ) -> None:
        self.config, self.controls, self.total = config, controls, config["total"]
        self.log = Path(log) if log is not None else None
        self.feed = Feed(config, on_message, every)
        self.rows, self.marks = self.feed.rows, self.feed.marks
        self.rows += _rows_before(self.log, start)
        self.marks += marks_of(self.rows)
        if self.rows:  # a run that goes on, goes on as it was steered
            controls.values.update(self.rows[-1].get("controls", {}))
        self.state, self.note = "running", ""
        self.done, self.start, self.busy = start, start, 0.0
        self.feed.update(self.status(), force=True)

    def mark(self, iteration: int, changed: Mapping[str, tuple[float, float]]) -> None:
        """Draw a line on the charts where controls changed."""
        for name, (old, new) in changed.items():
            self.marks.append({"step": iteration, "name": name, "old": old, "new": new})

    def record(self, iteration: int, metrics: Mapping[str, object], seconds: float = 0.0) -> None:
        """Add the metrics of one iteration, which took `seconds`. Raises TypeError for one that is not a number."""
        metrics = dict(metrics)
        samples, shares = metrics.pop("samples", None), metrics.pop("shares", None)
        row: dict[str, object] = {"step": iteration}
        for key, value in metrics.items():
            row[key] = self._number(iteration, key, value)
        if self.controls.values:
            row["controls"] = dict(self.controls.values)
        if shares is not None:
            row["shares"] = {
                kind: {name: self._number(iteration, f"shares of {name!r}", share) for name, share in part.items()}
                for kind, part in shares.items()
            }
        if self.log is not None:
            append_metrics(self.log, row)
        self.rows.append(row)
        if samples is not None:
            self.feed.show_samples(iteration, samples)
        self.done, self.busy = iteration, self.busy + seconds
        self.feed.update(self.status())

    def status(self) -> dict:
        """What the header of the panel says."""
        ran = self.done - self.start
        left = self.busy / ran * (self.total - self.done) if ran and self.total else None
        place = f"{self.config['unit']} {self.done}" + (f" of {self.total}" if self.total else "")
        if self.state in OVER:
            place += f", {self.state} after {clock(self.busy)}"
        elif left is not None:
            place += f", {clock(left)} left"
        return {
            "name": self.state,
            "over": self.state in OVER,
            "place": place,
            "done": self.done,
            "note": self.note,
            "controls": self.controls.values,
            "waiting": self.controls.waiting,
        }

    def move(self, state: str, note: str | None = None) -> None:
        """Go to another state and say so at once."""
        self.state, self.note = state, self.note if note is None else note
        self.feed.update(self.status(), force=True)

    def close(self, state: str) -> None:
        """End the session: the last points, and one picture in place of the panel. Does nothing the second time."""
        if self.state in OVER:
            return
        self.move(state)
        missing = [key for key in self.feed.keys if not any(key in row for row in self.rows)]
        if missing and self.rows:
            there = sorted({key for row in self.rows for key in row} - {"step", "controls", "shares"})
            warnings.warn(f"charts name {missing}, which the run did not report; it reported {there}", stacklevel=3)
        if self.rows and in_kernel():
            self._leave_picture()

    def _leave_picture(self) -> None:
        from alignkit_widgets.panel import display_png
        from alignkit_widgets.picture import draw_run

        text = f"{self.config['title']}: {self.status()['place']}"
        try:
            picture = draw_run(self.config, self.rows, self.marks, self.status()["place"])
        except Exception as error:  # a run's result must not be lost because its picture failed
            warnings.warn(f"the picture of the run could not be drawn: {type(error).__name__}: {error}", stacklevel=4)
            return
        (self.feed.panel.replace if self.feed.panel is not None else display_png)(picture, text)
        if self.feed.samples is not None:
            print("\n".join(_sample_lines(self.feed.samples)))

    def _number(self, iteration: int, key: str, value: object) -> float | None:
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"metric {key!r} is {value!r} ({type(value).__name__}), expected a number") from None
        if finite(number) is None:
            self.note = f"{key} is {number} at iteration {iteration}"
        return finite(number)


def _rows_before(log: Path | None, start: int) -> list[dict]:
    """Make the log ready: empty for a new run, or with the rows up to `start` for one that goes on; returns those."""
    if log is None:
        return []
    if start:
        return trim_metrics(log, start)
    log.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(log, "")
    return []


def clock(seconds: float) -> str:
    """Seconds as 0:07, 12:30 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _sample_lines(samples: Mapping) -> Sequence[str]:
    lines = [f"Samples at iteration {samples['step']}"]
    for prompt, response in samples["pairs"]:
        lines += [f"  {visible(prompt, 120)}", f"    → {visible(response, 200)}"]
    return lines
