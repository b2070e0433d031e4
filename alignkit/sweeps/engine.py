"""The driver of a sweep, and the local engine: worker processes on this machine run the jobs.

The driver (this process) hands each worker one job at a time and is the only one to publish what they made. A worker
that dies is replaced, and its job is repeated. Local workers have their own session, so that Ctrl-C reaches the driver
alone, which then interrupts their jobs; they end with the driver, however it ends.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from alignkit.jobs.spare_kernel import LAUNCHER
from alignkit.sweeps.job import give_up, next_attempt, own_seconds, publish, stopped_at
from alignkit.sweeps.plan import Spec

# the alignkit of this process, as for kernels, wherever it was imported from
PROGRAM = (f"import runpy, sys; runpy.run_path({str(LAUNCHER)!r})['import_alignkit'](); "
           "from alignkit.sweeps.worker import main; sys.exit(main())")
STOP_SECONDS = 25  # for interrupted jobs to save their state; a kernel has less than that
TICK = 0.5


@dataclass
class Task:
    """A job under way: how often it died, which attempt runs, and when that began."""

    spec: Spec
    deaths: int = 0
    attempt: str = ""
    started: float = 0.0


@dataclass
class Engine:
    """Hands out the jobs of a sweep and publishes what they made; where they run is said by `LocalEngine` and
    `ray_engine.RayEngine`. on_event(kind, spec, record) is called for "started", "finished", "failed", "again" (it died
    and is repeated) and "interrupted"; on_tick() about twice a second."""

    root: Path
    workers: int
    retries: int = 1
    timeout: float | None = None
    on_event: Callable[[str, Spec, dict], None] = lambda kind, spec, record: None
    on_tick: Callable[[], None] = lambda: None
    waiting: list[Task] = field(default_factory=list)
    done: set[str] = field(default_factory=set)
    stopping: bool = False

    def run(self, specs: Sequence[Spec]) -> None:
        """Run all jobs; returns when none is left, whether they finished or failed. A job whose base is one of them
        waits for it; any other base is there already.

        Raises KeyboardInterrupt, after running jobs were interrupted and had time to save their state.
        """
        self.waiting = [Task(spec) for spec in specs]
        self.done = {spec.base for spec in specs if spec.base} - {spec.id for spec in specs}
        try:
            while self.waiting or self.running():
                self._assign()
                self._listen(TICK)
                self.on_tick()
            self._end()
        except KeyboardInterrupt:
            self._interrupt()
            raise
        finally:
            self._close()

    def running(self) -> list[Task]:
        """The jobs that were handed out and have not ended."""
        raise NotImplementedError

    def _has_room(self) -> bool:
        """Whether one more job may be handed out."""
        raise NotImplementedError

    def _start(self, task: Task, following: Spec | None) -> None:
        """Hand out a job, and say which one comes next."""
        raise NotImplementedError

    def _listen(self, seconds: float) -> None:
        """Wait at most so long for jobs to end; call `_ended` or `_died` for each that has."""
        raise NotImplementedError

    def _stop(self) -> None:
        """Interrupt the running jobs, as Ctrl-C does."""
        raise NotImplementedError

    def _end(self) -> None:
        """Let the workers end by themselves: there are no more jobs."""

    def _close(self) -> None:
        """End at once whatever is left."""

    def _ready(self) -> list[Task]:
        return [task for task in self.waiting if not task.spec.base or task.spec.base in self.done]

    def _assign(self) -> None:
        """Hand out the first ready jobs, as long as there is room."""
        ready = self._ready()
        while ready and self._has_room():
            task = ready.pop(0)
            self.waiting.remove(task)
            task.attempt, finished = next_attempt(self.root, task.spec)
            if finished:  # its worker, or the driver, was killed before it could say so
                seconds = own_seconds(task.spec, self.root / "attempts" / task.attempt)
                self._ended(task, {"status": "finished", "error": "", "cell": None, "seconds": seconds,
                                   "host": socket.gethostname()})
                ready = self._ready()
                continue
            task.started = time.monotonic()
            self._start(task, ready[0].spec if ready else None)
            self.on_event("started", task.spec, {"attempt": task.attempt})

    def _died(self, task: Task, words: str, host: str | None) -> None:
        """A job's worker died, with these last words."""
        notebook, cell = stopped_at(self.root / "attempts" / task.attempt)
        where = f", in cell {cell} of {notebook}" if cell else f", in {notebook}" if notebook else ""
        self._ended(task, {"status": "interrupted" if self.stopping else "died", "cell": cell, "host": host,
                           "error": f"its worker died: {words}{where}",
                           "seconds": round(time.monotonic() - task.started, 1)})

    def _ended(self, task: Task, record: dict) -> None:
        """Publish what an attempt made, or repeat what died, or give up."""
        status, spec = record["status"], task.spec
        if status == "died":
            task.deaths += 1
            if task.deaths <= self.retries and not self.stopping:
                self.waiting.insert(0, task)
                self.on_event("again", spec, record)
                return
        if status == "finished":
            publish(self.root, spec, task.attempt, record)
            self.done.add(spec.id)
            self.on_event("finished", spec, record)
        elif status == "interrupted":
            self.on_event("interrupted", spec, record)
        else:
            give_up(self.root, spec, task.attempt, record)
            self.on_event("failed", spec, record)
            self._without(spec, record)

    def _without(self, base: Spec, record: dict) -> None:
        """The jobs that would have begun with a shared job that failed fail too."""
        for task in [task for task in self.waiting if task.spec.base == base.id]:
            self.waiting.remove(task)
            lost = {**record, "status": "failed", "seconds": 0.0,
                    "error": f"what it begins with failed ({base.id}): {record['error']}"}
            task.attempt, _ = next_attempt(self.root, task.spec)
            give_up(self.root, task.spec, task.attempt, lost)
            self.on_event("failed", task.spec, lost)
            self._without(task.spec, record)

    def _interrupt(self) -> None:
        """Interrupt the running jobs and wait until they have saved; a second Ctrl-C ends the wait."""
        self.waiting.clear()
        self.stopping = True
        self._stop()
        end = time.monotonic() + STOP_SECONDS
        while self.running() and time.monotonic() < end:
            self._listen(TICK)
        self._end()


@dataclass
class LocalEngine(Engine):
    """Runs jobs in `workers` processes on this machine, which inherit the descriptors `lock`."""

    lock: tuple[int, ...] = ()
    pool: list["_Worker"] = field(default_factory=list)
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)

    def running(self) -> list[Task]:
        """The jobs that a worker is at."""
        return [worker.task for worker in self.pool if worker.task]

    def _has_room(self) -> bool:
        return len(self.pool) < self.workers or any(not worker.task for worker in self.pool)

    def _start(self, task: Task, following: Spec | None) -> None:
        worker = next((worker for worker in self.pool if not worker.task), None)
        if worker is None:
            worker = _Worker(self)
            self.selector.register(worker.answers, selectors.EVENT_READ, worker)
            self.pool.append(worker)
        worker.give(task, following)

    def _listen(self, seconds: float) -> None:
        """Wait for answers, or for the end of a worker, at most so long."""
        if not self.selector.get_map():
            return
        for key, _ in self.selector.select(seconds):
            worker = key.data
            task, lines, ended = worker.task, *worker.read()
            if ended:
                self.selector.unregister(worker.answers)
                self.pool.remove(worker)
            for line in lines if task else []:
                worker.task = None
                self._ended(task, json.loads(line))
                task = None
            words = worker.last_words() if ended else ""
            if ended and task:
                self._died(task, words, socket.gethostname())

    def _stop(self) -> None:
        for worker in self.pool:
            worker.interrupt()

    def _end(self) -> None:
        for worker in self.pool:
            worker.end()

    def _close(self) -> None:
        for worker in self.pool:
            worker.kill()
        self.selector.close()


class _Worker:
    """A worker's process, and the job that it is at."""

    def __init__(self, engine: LocalEngine):
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        share = max(1, (len(cores) or os.cpu_count() or 1) // engine.workers)
        first = len(engine.pool) * share
        taken = {core for worker in engine.pool for core in worker.cores}
        free = [core for core in cores if core not in taken] or cores[first % max(1, len(cores)):]
        self.cores = free[:share] if cores and engine.workers > 1 else []
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `kill`)
        options = [f"--threads={share}", *([f"--cores={','.join(map(str, self.cores))}"] if self.cores else []),
                   *(f"--lock={handle}" for handle in engine.lock),
                   *([f"--timeout={engine.timeout}"] if engine.timeout else [])]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", PROGRAM, str(engine.root), *options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, pass_fds=engine.lock,
            start_new_session=True, env={**os.environ, "JPY_PARENT_PID": str(os.getpid())},
        )
        self.answers, self.task, self.left = self.process.stdout, None, b""
        os.set_blocking(self.answers.fileno(), False)

    def give(self, task: Task, following: Spec | None) -> None:
        """Hand it a job, and say which one comes next, whose kernel may start meanwhile."""
        self.task = task
        self._say({"job": task.spec.as_json(), "attempt": task.attempt,
                   "next": following.as_json() if following else None})

    def read(self) -> tuple[list[bytes], bool]:
        """The whole lines that it has written, and whether it has ended."""
        content = b""
        while part := self._part():
            content += part
        ended = part == b""
        *lines, self.left = (self.left + content).split(b"\n")
        return [line for line in lines if line], ended

    def interrupt(self) -> None:
        """Interrupt its job, as Ctrl-C does."""
        if self.task:
            with contextlib.suppress(OSError):
                self.process.send_signal(signal.SIGINT)

    def end(self) -> None:
        """Let it end by itself."""
        self._say({"end": True})
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)

    def kill(self) -> None:
        """End it now, if it has not ended; its kernels end with it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            with contextlib.suppress(OSError):
                stream.close()

    def last_words(self) -> str:
        """How it ended, and what it last wrote."""
        code = self.process.wait()
        self.log.seek(0)
        words = self.log.read()[-2000:].decode(errors="replace").strip()
        how = f"killed by {signal.Signals(-code).name}" if -code in iter(signal.Signals) else f"exit code {code}"
        self.kill()
        return f"{how}{f'; it last wrote: {words}' if words else ''}"

    def _part(self) -> bytes | None:
        """Some bytes of its answers; b"" at their end, None if there are none at present."""
        try:
            return os.read(self.answers.fileno(), 65536)
        except BlockingIOError:
            return None

    def _say(self, command: dict) -> None:
        with contextlib.suppress(OSError):  # it has died, which is noticed when its answers are read
            self.process.stdin.write(json.dumps(command).encode() + b"\n")
            self.process.stdin.flush()
