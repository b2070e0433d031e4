"""A Trainer's log in a cockpit."""

from __future__ import annotations

import time
from typing import Protocol

from transformers import TrainerCallback

from alignkit_widgets.cockpit.remote import Remote


class Opens(Protocol):
    """What a callback needs of a TrainingCockpit."""

    total: int | None

    def open(self, mode: str, start: int = 0, unit: str = "iteration") -> Remote:
        """Start a session."""


class CockpitCallback(TrainerCallback):
    """Feeds what a Trainer logs to a cockpit: `SFTTrainer(…, callbacks=[cockpit.callback()])`.

    The picture is left when training ends; when it is interrupted or fails, at the end of the cell.
    """

    def __init__(self, cockpit: Opens) -> None:
        self.cockpit, self.session, self._seen = cockpit, None, 0.0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Open the charts; the run is as long as the Trainer says."""
        self.cockpit.total = state.max_steps
        self.session = self.cockpit.open("watch", start=state.global_step, unit="step").session
        self._seen = time.perf_counter()
        _at_the_end_of_the_cell(self.session)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """One row per log, under the step that it belongs to. The summary at the end of training is left out."""
        logs = {k: v for k, v in (logs or {}).items() if isinstance(v, (int, float))}
        if self.session is None or not logs or "train_runtime" in logs:
            return
        now = time.perf_counter()
        self.session.record(state.global_step, logs, now - self._seen)
        self._seen = now

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Leave the picture."""
        self.session.close("finished")


def _at_the_end_of_the_cell(session) -> None:
    """Close the session when the cell is over, in case the Trainer did not come to its end."""
    from IPython import get_ipython

    shell = get_ipython()
    if shell is None:
        return

    def close(result=None) -> None:
        shell.events.unregister("post_run_cell", close)
        error = getattr(result, "error_in_exec", None)
        session.close("interrupted" if isinstance(error, KeyboardInterrupt) else "failed" if error else "stopped")

    shell.events.register("post_run_cell", close)
