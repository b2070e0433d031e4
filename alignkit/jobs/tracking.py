"""Experiment trackers: the rows of a job's metrics.jsonl are also sent to TensorBoard, W&B, MLflow or trackio.

Tracking is off unless `--track` names a tracker. The tracker reads the file from the job's process, outside the kernel,
so the training code is independent of it, and a failing tracker does not affect the training. Every step is sent once,
even if a job continues after it was killed: RUN/tracking.json records how far each file was sent, and the tracker's
run.

A tracker is any object with `log(step, metrics)` and `finish()`. The names are those of metrics.jsonl, which are TRL's
if TRL has the number (docs/publishing.md has the table).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from alignkit.errors import ParameterError, RunError
from alignkit.metrics import is_number
from alignkit.runs.records import run_facts
from alignkit.safe_text import one_line
from alignkit.storage import content_hash, parse_json, read_json, write_json

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
LOGS = ("metrics.jsonl", "overoptimised/metrics.jsonl")  # in a stage's folder
RECORD, FOLDER = "tracking.json", "tracking"  # in RUN: the progress, and the folder of trackers that work offline
PROJECT = "alignkit"
SECONDS = 2.0  # between two reads of the file
LAST_SECONDS = 60.0  # maximum time for a tracker to finish


class Tracker(Protocol):
    """Receives the metrics of one training."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the numbers of one step."""

    def finish(self) -> None:
        """Called after all steps have been sent."""


def check_tracker(name: str) -> None:
    """Raise ParameterError, which says what to install, if the package of the tracker `name` is missing."""
    if name not in PACKAGES:
        raise ParameterError(f"--track is {one_line(name, 80)!r}, expected one of {', '.join(PACKAGES)}")
    if importlib.util.find_spec(PACKAGES[name]) is None:
        raise ParameterError(f"--track {name} needs the package {PACKAGES[name]}, which is not installed: "
                             f"in alignkit's folder, pip install -e '.[{name}]'")


def flat(row: Mapping) -> dict[str, float]:
    """The numbers of one row of a metrics.jsonl: name -> value; nested mappings as NAME/KEY; everything else, and
    `step`, is omitted.

    PPO's rows also get TRL's objective/non_score_reward, which is objective/rlhf_reward − objective/scores.
    """
    numbers = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            numbers |= {f"{name}/{key}": inner for key, inner in flat(value).items()}
        elif is_number(value) and name != "step":
            numbers[name] = float(value)
    if {"objective/rlhf_reward", "objective/scores"} <= numbers.keys():
        numbers["objective/non_score_reward"] = numbers["objective/rlhf_reward"] - numbers["objective/scores"]
    return numbers


@contextlib.contextmanager
def following(name: str | None, run: Path, stage: str, folders: Callable[[], Path], *, key: Mapping, settings: Mapping,
              anew: bool = False) -> Iterator[None]:
    """Send new rows of the stage's logs to the tracker `name` while the block runs, and the rest afterwards; None: no
    tracker.

    folders: () -> the folder in which the stage is being built at that moment. key: everything that determines the
    job's result; with another key, or with `anew`, a new tracker run starts, otherwise the earlier one continues.
    settings: the job's parameters, shown by the tracker. Raises nothing: an error gives one warning, and the block
    continues.
    """
    if name is None:
        yield
        return
    over = threading.Event()
    follower = _Follower(name, run, stage, folders, content_hash(key), settings, anew)
    with contextlib.suppress(OSError, RunError):  # the run's record contains it too
        write_json(run / "run.json", {**run_facts(run), "track": name})
    thread = threading.Thread(target=follower.follow, args=(over,), daemon=True)  # a hanging tracker ends with us
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(LAST_SECONDS)
        if thread.is_alive():
            follower.warn(f"it did not finish in {LAST_SECONDS:.0f} seconds")


class _Follower:
    def __init__(self, name: str, run: Path, stage: str, folders: Callable[[], Path], key: str, settings: Mapping,
                 anew: bool):
        self.name, self.run, self.stage, self.folders, self.settings = name, run, stage, folders, settings
        self.trackers: dict[str, Tracker] = {}
        self.broken = False
        before = _record(run).get(stage)
        same = isinstance(before, dict) and not anew and before.get("key") == key and before.get("tracker") == name
        self.state = before if same else {"tracker": name, "key": key, "id": uuid.uuid4().hex[:8], "sent": {}}

    def follow(self, over: threading.Event) -> None:
        """Send new rows until `over`, then the last ones."""
        try:
            while not over.wait(SECONDS):
                self.send()
            self.send()
            for tracker in self.trackers.values():
                tracker.finish()
        except Exception as error:  # errors of a package, server or disk must not stop the training
            self.warn(f"{type(error).__name__}: {one_line(error, 300)}")

    def send(self) -> None:
        """Send each complete row that has not been sent yet."""
        folder = self.folders()
        for log in LOGS:
            sent = self.state["sent"].get(log, 0)
            rows = [row for row in _whole_rows(folder / log) if row["step"] > sent]
            if rows and log not in self.trackers:
                what = self.stage + (f"-{Path(log).parent.name}" if "/" in log else "")
                self.trackers[log] = OPENERS[self.name](self.run, what, f"{what}-{self.state['id']}", self.settings)
            for row in rows:
                self.trackers[log].log(int(row["step"]), flat(row))
            if rows:
                self.state["sent"][log] = rows[-1]["step"]
                write_json(self.run / RECORD, {**_record(self.run), self.stage: self.state})

    def warn(self, why: str) -> None:
        """Report once that the tracker has failed."""
        if not self.broken:
            self.broken = True
            print(f"alignkit: --track {self.name} has failed and gets nothing more of {self.stage}; the training goes "
                  f"on ({why})", file=sys.stderr, flush=True)


def _record(run: Path) -> dict:
    try:
        return read_json(run / RECORD)
    except (FileNotFoundError, RunError):
        return {}


def _whole_rows(path: Path) -> list[dict]:
    """The complete rows of a log that is being written; an incomplete line is left for the next time."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError:  # does not exist yet, or its folder is being renamed
        return []
    rows = [parse_json(line, where=str(path)) for line in lines if line.strip()]
    return [row for row in rows if is_number(row.get("step"))]


# --- trackers: each keeps its files in RUN/tracking unless its own settings say otherwise ----------------------------
class _TensorBoard:
    """Event files in RUN/tracking/tensorboard, without TensorFlow: `tensorboard --logdir RUN/tracking/tensorboard`."""

    def __init__(self, run: Path, what: str, name: str, settings: Mapping):
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.writer = EventFileWriter(str(run / FOLDER / "tensorboard" / name))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self.writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()


class _WandB:
    """Weights & Biases: offline in RUN/tracking unless WANDB_MODE says otherwise (`wandb sync` uploads it later)."""

    def __init__(self, run: Path, what: str, name: str, settings: Mapping):
        import wandb

        (run / FOLDER).mkdir(exist_ok=True)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=f"{run.name}/{what}", id=name, resume="allow",
            dir=str(run / FOLDER), config=dict(settings), mode=os.environ.get("WANDB_MODE", "offline"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=step)

    def finish(self) -> None:
        self.run.finish()


class _MLflow:
    """MLflow: an SQLite file in RUN/tracking unless MLFLOW_TRACKING_URI names a server."""

    def __init__(self, run: Path, what: str, name: str, settings: Mapping):
        from mlflow import MlflowClient

        (run / FOLDER).mkdir(exist_ok=True)
        store = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(run / FOLDER / 'mlflow.db').absolute()}"
        self.client = MlflowClient(tracking_uri=store)
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self.client.get_experiment_by_name(title)
        experiment = known.experiment_id if known else self.client.create_experiment(title)
        runs = self.client.search_runs([experiment], f"tags.alignkit_id = '{name}'")
        run_ = runs[0] if runs else self.client.create_run(experiment, run_name=f"{run.name}/{what}",
                                                            tags={"alignkit_id": name})
        self.id = run_.info.run_id
        if not runs:
            for key, value in settings.items():
                self.client.log_param(self.id, key, value)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.id, [Metric(name, value, now, step) for name, value in metrics.items()])

    def finish(self) -> None:
        self.client.set_terminated(self.id)


class _Trackio:
    """trackio: on this machine (in TRACKIO_DIR), unless TRACKIO_SPACE_ID names a Space."""

    def __init__(self, run: Path, what: str, name: str, settings: Mapping):
        os.environ.setdefault("TRACKIO_DIR", str(run / FOLDER / "trackio"))
        import trackio

        self.run = trackio.init(project=PROJECT, name=f"{run.name}-{name}", config=dict(settings), resume="allow",
                                embed=False)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=step)

    def finish(self) -> None:
        self.run.finish()


OPENERS = {"tensorboard": _TensorBoard, "wandb": _WandB, "mlflow": _MLflow, "trackio": _Trackio}
