"""TrainingCockpit: watch a run, steer it, and keep a log for replaying it and a final picture."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from alignkit.errors import NonFinite
from alignkit.storage import read_metrics
from alignkit_widgets.cockpit.controls import Controls
from alignkit_widgets.cockpit.log import branches_of, marks_of
from alignkit_widgets.cockpit.remote import Remote
from alignkit_widgets.cockpit.session import Session

if TYPE_CHECKING:
    from transformers import TrainerCallback


class TrainingCockpit:
    """Live charts and controls for a training loop.

    ```python
    cockpit = TrainingCockpit("PPO", charts=[("KL to reference (nats)", ["objective/kl"])], total=40,
                              controls={"kl_coef": (0.0, 1.0, 0.05)}, log="runs/course/ppo/metrics.jsonl")
    rows = await cockpit.run(step)     # step(controls) -> {"objective/kl": 0.1, …}, once per iteration
    ```

    Args:
        title: name of the training.
        charts: (title with the unit, metric names) for each chart.
        total: iterations of the run; a Trainer's callback determines it itself.
        controls: {name: (low, high, start)}, or (low, high, start, "log") for a slider with log spacing.
        log: metrics.jsonl to write, a row per iteration: {"step", metrics…, "controls", "shares"}. None: no file.
        every: seconds between two updates of the panel.
        patience: seconds that a paused run waits for a closed page before it continues by itself.

    Raises ValueError for a chart without metrics, a bad control or a `total` below 1.
    """

    def __init__(
        self,
        title: str,
        charts: Sequence[tuple[str, Sequence[str]]],
        total: int | None = None,
        *,
        controls: Mapping[str, object] | None = None,
        log: str | Path | None = None,
        every: float = 0.125,
        patience: float = 180.0,
    ) -> None:
        if total is not None and total < 1:
            raise ValueError(f"total is {total}, expected at least 1 iteration, or None")
        for name, keys in charts:
            if isinstance(keys, str) or not keys:
                raise ValueError(f"chart {name!r} has the metrics {keys!r}, expected a list with at least one name")
        self.title, self.charts, self.total = title, [(name, list(keys)) for name, keys in charts], total
        self.specs, self.log, self.every, self.patience = dict(controls or {}), log, every, patience
        Controls(self.specs)  # check the ranges here, not when the run starts
        self.session: Session | None = None

    @property
    def rows(self) -> list[dict]:
        """The rows of the run so far, as they are in the log."""
        return self.session.rows if self.session is not None else []

    async def run(
        self, step: Callable, *, start: int = 0, replay: Mapping[int, Mapping] | None = None, state: object = None,
        checkpoints: object = None,
    ) -> list[dict]:
        """Call `step(controls)` for iterations start + 1 … total, and process buttons and sliders in between.

        `step` returns (or awaits) a dict of floats; three keys are special: "samples", a list of (prompt, response),
        "shares", {prompt class: {behaviour: share}}, and "stop", the reason to end the run after this iteration ("":
        continue). It may raise StopIteration to end the run early.
        `start`: number of earlier iterations; their rows of the log are kept. `replay`: the controls by iteration, as
        `replay(log)` returns them, instead of the sliders. `state`: the object that `step` changes, a PPOState or any
        object with PyTorch's `state_dict()` and `load_state_dict(saved)`; with it the panel can rewind the run. The
        rows after the rewind point move to metrics.branch-1.jsonl (-2, …) beside the log; their lines stay on the
        charts, dotted. Snapshots of the state (see `cockpit/snapshots.py`) are taken only if there is a panel.
        `checkpoints`: the run's `Checkpoints`; the run continues from the newest instead of `start`, writes checkpoints
        while it runs, and writes one at its end or when it is interrupted.

        Returns the rows. Interrupts and exceptions are passed on; the log is then complete too, and the picture shown.
        """
        if state is not None and not (hasattr(state, "state_dict") and hasattr(state, "load_state_dict")):
            raise TypeError(f"state is a {type(state).__name__}, expected one with state_dict() and load_state_dict()")
        start = checkpoints.resume() if checkpoints is not None else start
        with self._opened("control" if replay is None else "replay", start, checkpoints) as remote:
            if state is not None and replay is None:
                remote.session.keep(state)
            if checkpoints is not None and start:
                remote.session.stop = checkpoints.ended(start)
            if remote.session.stop:
                remote.session.close("stopped")
            while remote.session.done < self.total and not remote.session.stop:
                if not await remote.turn():
                    remote.session.close("stopped")
                    break
                iteration = remote.session.done + 1
                controls, begun = remote.take(iteration, replay), time.perf_counter()
                try:
                    metrics = step(controls)
                except StopIteration:
                    break
                metrics = await metrics if inspect.isawaitable(metrics) else metrics
                remote.session.record(iteration, metrics, time.perf_counter() - begun)
                if remote.session.stop:
                    remote.session.close("stopped")
        return self.rows

    def run_sync(self, step: Callable, *, start: int = 0, replay: Mapping[int, Mapping] | None = None) -> list[dict]:
        """`run` for plain scripts. In a notebook its charts are live too, but the run cannot be steered."""
        with self._opened("watch", start) as remote:
            for iteration in range(start + 1, self.total + 1):
                controls, begun = remote.take(iteration, replay), time.perf_counter()
                try:
                    metrics = step(controls)
                except StopIteration:
                    break
                remote.session.record(iteration, metrics, time.perf_counter() - begun)
                if remote.session.stop:
                    remote.session.close("stopped")
                    break
        return self.rows

    def callback(self) -> TrainerCallback:
        """A transformers TrainerCallback that shows and logs a Trainer's metrics.

        A Trainer blocks the cell: the charts are live, but the only control is Interrupt.
        """
        from alignkit_widgets.cockpit.trainer import CockpitCallback

        return CockpitCallback(self)

    def picture(self) -> tuple[bytes, dict]:
        """The run as a PNG with its size and alt text, from its rows, or from the log if this cockpit ran nothing."""
        from alignkit_widgets.cockpit.picture import draw_run

        session = self.session
        if session is not None and (session.rows or session.branches):
            return draw_run(session.config, session.rows, session.marks, session.status()["place"], session.branches)
        rows = read_metrics(self.log) if self.log is not None else []
        if not rows:
            raise ValueError("there is nothing to draw: this cockpit has run no iteration and has no log")
        branches = branches_of(self.log, rows)
        place = f"step {rows[-1]['step']}"
        return draw_run(self._config("watch", "step"), rows, marks_of(rows, branches), place, branches)

    def show(self) -> None:
        """Display `picture()`, for example after a reload or in another notebook."""
        from alignkit_widgets.notebook import display_png

        display_png(self.picture(), self.title)

    def open(self, mode: str, start: int = 0, unit: str = "iteration", goes_on: bool = False) -> Remote:
        """Start a session. `mode` is "control", "replay" or "watch"; `unit` is the unit of the x axis; `goes_on` says
        whether branches in the log belong to this run even at its start.

        The caller must close the session (`session.close`).
        """
        controls = Controls(self.specs)
        remote = Remote(controls, self.patience)
        self.session = remote.session = Session(
            self._config(mode, unit), controls, log=self.log, start=start, every=self.every, on_message=remote.receive,
            goes_on=goes_on
        )
        return remote

    @contextmanager
    def _opened(self, mode: str, start: int, checkpoints: object = None) -> Iterator[Remote]:
        if self.total is None:
            raise ValueError("total is None, expected the number of iterations to run")
        remote = self.open(mode, start, goes_on=checkpoints is not None)
        remote.session.checkpoints = checkpoints
        try:
            yield remote
        except (KeyboardInterrupt, asyncio.CancelledError):
            remote.session.close("interrupted")
            raise
        except BaseException as error:
            if checkpoints is not None and isinstance(error, NonFinite):
                checkpoints.keep_batch(error)
            remote.session.close("failed")
            raise
        else:
            remote.session.close("finished")

    def _config(self, mode: str, unit: str) -> dict:
        controls = [
            {"name": name, "stops": control.stops(), "start": control.start}
            for name, control in Controls(self.specs).ranges.items()
        ]
        return {
            "title": self.title,
            "charts": [{"title": name, "keys": keys} for name, keys in self.charts],
            "total": self.total,
            "mode": mode,
            "unit": unit,
            "controls": controls,
            "log": str(self.log) if self.log is not None else "",
            "picture": mode != "watch",  # a Trainer's cell cannot answer while it runs
        }
