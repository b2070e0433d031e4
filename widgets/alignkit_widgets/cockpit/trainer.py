"""Show a Trainer's log in a cockpit."""

from __future__ import annotations

import time
from typing import Protocol

from transformers import TrainerCallback

from alignkit_widgets.cockpit.remote import Remote


class Opens(Protocol):
    """The part of a TrainingCockpit that a callback needs."""

    total: int | None

    def open(self, mode: str, start: int = 0, unit: str = "iteration") -> Remote:
        """Start a session."""


class CockpitCallback(TrainerCallback):
    """Sends a Trainer's logs to a cockpit: `SFTTrainer(…, callbacks=[cockpit.callback()])`.

    The picture is shown when training ends; if it is interrupted or fails, at the end of the cell.
    """

    def __init__(self, cockpit: Opens) -> None:
        self.cockpit, self.session, self._seen = cockpit, None, 0.0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Open the charts, with the Trainer's number of steps."""
        self.cockpit.total = state.max_steps
        self.session = self.cockpit.open("watch", start=state.global_step, unit="step").session
        self._seen = time.perf_counter()
        _at_the_end_of_the_cell(self.session)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """One row per log, under its step. The summary at the end of training is omitted."""
        logs = {k: v for k, v in (logs or {}).items() if isinstance(v, (int, float))}
        if self.session is None or not logs or "train_runtime" in logs:
            return
        now = time.perf_counter()
        self.session.record(state.global_step, logs, now - self._seen)
        self._seen = now

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Show the picture."""
        self.session.close("finished")


def _at_the_end_of_the_cell(session) -> None:
    """Close the session when the cell ends, in case the Trainer did not finish."""
    from IPython import get_ipython

    shell = get_ipython()
    if shell is None:
        return

    def close(result=None) -> None:
        shell.events.unregister("post_run_cell", close)
        error = getattr(result, "error_in_exec", None)
        session.close("interrupted" if isinstance(error, KeyboardInterrupt) else "failed" if error else "stopped")

    shell.events.register("post_run_cell", close)
