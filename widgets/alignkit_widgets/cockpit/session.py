"""One run of a cockpit: its rows, its state, its log on disk, its front end, and the final picture."""

from __future__ import annotations

import base64
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from alignkit.metrics import duration
from alignkit.safe_text import visible
from alignkit.storage import append_metrics, branch_files, branch_metrics, trim_metrics, write_atomically
from alignkit_widgets.cockpit.controls import Controls
from alignkit_widgets.cockpit.feed import Feed
from alignkit_widgets.cockpit.log import branch, branches_of, checked, marks_of, samples_file, trim_samples
from alignkit_widgets.cockpit.snapshots import Snapshots
from alignkit_widgets.looks import finite
from alignkit_widgets.notebook import in_kernel

OVER = ("finished", "stopped", "interrupted", "failed")
LONG = 1.0  # seconds of an iteration from which on its own progress is shown


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
        goes_on: bool = False,
    ) -> None:
        self.config, self.controls, self.total = config, controls, config["total"]
        self.log = Path(log) if log is not None else None
        self.feed = Feed(config, on_message, every)
        self.rows, self.marks, self.branches = self.feed.rows, self.feed.marks, self.feed.branches
        self.rows += _rows_before(self.log, start, goes_on)
        self.branches += branches_of(self.log, self.rows) if self.log is not None else []
        self.resumed = [{"step": start, "name": "resumed", "old": None, "new": None}] if start and self.rows else []
        self.marks += marks_of(self.rows, self.branches) + self.resumed
        if self.rows:  # a continued run keeps its last control values
            controls.values.update(self.rows[-1].get("controls", {}))
        self.state, self.note, self.stop = "running", "", ""
        self.snapshots: Snapshots | None = None
        self.checkpoints = None  # the run's Checkpoints, if any
        self.done, self.ran, self.busy = start, 0, 0.0
        self.inside: dict | None = None  # what a long iteration is doing
        self.feed.update(self.status(), force=True)

    def show_on(self, panel: object) -> None:
        """Send everything to another panel from now on: an object with `send(message)`."""
        self.feed.panel = panel

    def keep(self, state: object) -> None:
        """Take snapshots of `state` from now on, for rewinding; none if there is no page that could request a
        rewind."""
        if self.feed.panel is not None:
            self.snapshots = Snapshots(state, self.total)
            self.snapshots.take(self.done)
            self.feed.update(self.status(), force=True)

    def rewind(self, iteration: object) -> None:
        """Return to the snapshot of `iteration`. The later rows become a branch: they move to a separate file, and
        their lines stay on the charts. Anything but an earlier iteration with a snapshot is ignored."""
        if self.snapshots is None or type(iteration) is not int or iteration not in self._earlier():
            return
        if self.log is not None:  # trim the log last, so it is never ahead of the checkpoints
            branch_metrics(self.log, iteration, cut=False)
        self.snapshots.restore(iteration)
        if self.checkpoints is not None:
            self.checkpoints.go_back(iteration)
        if self.log is not None:
            trim_metrics(self.log, iteration)
        self.branches.append(branch(self.rows, iteration))
        self.rows[:] = [row for row in self.rows if row["step"] <= iteration]
        self.marks[:] = marks_of(self.rows, self.branches) + self.resumed
        self.controls.rewind(self.rows[-1].get("controls", {}) if self.rows else self.controls.starts())
        self.done, self.feed.samples = iteration, None
        self.feed.resend(self.status())

    def mark(self, iteration: int, changed: Mapping[str, tuple[float, float]]) -> None:
        """Draw a line on the charts where controls changed."""
        for name, (old, new) in changed.items():
            self.marks.append({"step": iteration, "name": name, "old": old, "new": new})

    def tell_inside(self, words: str, share: float) -> None:
        """Show what the next iteration is doing, and the share of it that is done, if iterations take a second or
        more."""
        if self.state not in OVER and not (self.ran and self.busy < self.ran * LONG):
            self.inside = {"words": words, "share": share}
            self.feed.update(self.status(), force=True)

    def record(self, iteration: int, metrics: Mapping[str, object], seconds: float = 0.0) -> None:
        """Add the metrics of one iteration, which took `seconds`. Raises TypeError for a metric that is not a
        number."""
        metrics = dict(metrics)
        samples, shares, self.stop = (metrics.pop(name, None) for name in ("samples", "shares", "stop"))
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
            if self.log is not None:
                shown = {"step": iteration, "way": len(self.branches), "pairs": self.feed.samples["pairs"]}
                append_metrics(samples_file(self.log), shown)
        self.done, self.ran, self.busy = iteration, self.ran + 1, self.busy + seconds
        long, self.inside = self.inside is not None, None
        if self.snapshots is not None:
            self.snapshots.take(iteration)
        if self.checkpoints is not None:
            self.checkpoints.offer(iteration)
        if self.stop:
            self.note = self.stop
        self.feed.update(self.status(), force=long)

    def status(self) -> dict:
        """The text of the panel's header."""
        left = self.busy / self.ran * (self.total - self.done) if self.ran and self.total else None
        place = f"{self.config['unit']} {self.done}" + (f" of {self.total}" if self.total else "")
        if self.state in OVER:
            place += f", {self.state} after {duration(self.busy)}"
        elif left is not None:
            place += f", {duration(left)} left"
        return {
            "name": self.state,
            "over": self.state in OVER,
            "place": place,
            "done": self.done,
            "inside": self.inside,
            "note": self.note,
            "controls": self.controls.values,
            "waiting": self.controls.waiting,
            "snapshots": self._earlier() if self.snapshots is not None else None,
        }

    def move(self, state: str, note: str | None = None) -> None:
        """Change the state and announce it at once."""
        self.state, self.note = state, self.note if note is None else note
        self.feed.update(self.status(), force=True)

    def close(self, state: str) -> None:
        """End the session: send the last points, and replace the panel by one picture. Does nothing the second time."""
        if self.state in OVER:
            return
        self.snapshots = self.inside = None
        if self.checkpoints is not None:
            self.checkpoints.close(self.done)
            if self.stop:
                self.checkpoints.end(self.done, self.stop)
        self.move(state)
        if self.stop:
            print(f"{self.config['title']} stopped: {self.stop}")
        missing = [key for key in self.feed.keys if not any(key in row for row in self.rows)]
        if missing and self.rows:
            reported = sorted({key for row in self.rows for key in row} - {"step", "controls", "shares"})
            warnings.warn(f"charts name {missing}, which the run did not report; it reported {reported}", stacklevel=3)
        if (self.rows or self.branches) and in_kernel():
            self._leave_picture()

    def send_picture(self) -> None:
        """Send the picture of the run so far to the page, which saves it. Before the first row there is none."""
        from alignkit_widgets.cockpit.picture import draw_run

        if self.feed.panel is None or not self.rows:
            return
        try:
            png, _ = draw_run(self.config, self.rows, self.marks, self.status()["place"], self.branches)
        except ValueError as error:  # no row has a charted metric
            self.note = str(error)
        else:
            self.feed.panel.send({"picture": base64.b64encode(png).decode()})

    def _leave_picture(self) -> None:
        from alignkit_widgets.cockpit.picture import draw_run
        from alignkit_widgets.notebook import display_png

        text = f"{self.config['title']}: {self.status()['place']}"
        try:
            picture = draw_run(self.config, self.rows, self.marks, self.status()["place"], self.branches)
        except Exception as error:  # a failed picture must not lose the result of the run
            warnings.warn(f"the picture of the run could not be drawn: {type(error).__name__}: {error}", stacklevel=4)
            return
        (self.feed.panel.replace if self.feed.panel is not None else display_png)(picture, text)
        if self.feed.samples is not None:
            print("\n".join(_sample_lines(self.feed.samples)))

    def _earlier(self) -> list[int]:
        """Iterations that the run can be rewound to."""
        return [iteration for iteration in self.snapshots.kept if iteration < self.done]

    def _number(self, iteration: int, key: str, value: object) -> float | None:
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"metric {key!r} is {value!r} ({type(value).__name__}), expected a number") from None
        if finite(number) is None:
            self.note = f"{key} is {number} at iteration {iteration}"
        return finite(number)


def _rows_before(log: Path | None, start: int, goes_on: bool) -> list[dict]:
    """Prepare the log: empty for a new run, or with the rows up to `start` for a continued one; returns those rows.

    The branches of an earlier run are removed with its log, unless this run `goes_on` with it.
    """
    if log is None:
        return []
    if start or goes_on:
        trim_samples(log, start, len(branch_files(log)))
    else:
        samples_file(log).unlink(missing_ok=True)
    if start:
        return checked(trim_metrics(log, start), log)
    log.parent.mkdir(parents=True, exist_ok=True)
    for file in reversed(branch_files(log)) if not goes_on else ():
        file.unlink()
    write_atomically(log, "")
    return []


def _sample_lines(samples: Mapping) -> Sequence[str]:
    lines = [f"Samples at iteration {samples['step']}"]
    for prompt, response in samples["pairs"]:
        lines += [f"  {visible(prompt, 120)}", f"    → {visible(response, 200)}"]
    return lines
