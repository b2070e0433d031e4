"""A worker of the local engine: a process that runs one job after the other, with the next job's kernel kept warm.

It reads a JSON object a line from its standard input: {"job", "attempt", "next"}, or {"end": true}. It answers each job
with its record, a line on what was its standard output. If its input ends without "end", the driver has died: the
worker kills itself, and its kernels, which are tied to it, end too.
"""

import argparse
import contextlib
import json
import os
import queue
import signal
import sys
import threading
from pathlib import Path

from alignkit.jobs.ipykernel_launcher import end_with_parent
from alignkit.jobs.notebooks import kernel_environment
from alignkit.jobs.spare_kernel import Spare, needed_by
from alignkit.sweeps.job import THREADS, run_job, set_threads
from alignkit.sweeps.plan import Spec, as_jobs, spec_from

# a parser of addresses that jsonschema would use for formats that notebooks do not have; it takes seconds to import
NOT_NEEDED = "rfc3987_syntax"


def main(arguments: list[str] | None = None) -> int:
    """Run jobs until the driver says that there are no more."""
    parser = argparse.ArgumentParser(prog="alignkit.sweeps.worker", description=__doc__.split("\n")[0])
    parser.add_argument("root", type=Path, help="the folder of the sweep")
    parser.add_argument("--threads", type=int, default=1, help="threads for an operation, where a job may use several")
    parser.add_argument("--cores", type=lambda text: {int(core) for core in text.split(",")}, help="the cores to use")
    parser.add_argument("--lock", type=int, help="the descriptor of the sweep's lock, which kernels hold too")
    parser.add_argument("--timeout", type=float, help="seconds for each notebook")
    given = parser.parse_args(arguments)
    end_with_parent()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    if given.cores and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, given.cores)
    sys.modules.setdefault(NOT_NEEDED, None)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever is printed here is no answer
    work = Work(given.root, given.threads, () if given.lock is None else (given.lock,), given.timeout)
    try:
        for command in _commands():
            print(json.dumps(work.run(command)), file=answers, flush=True)
    except KeyboardInterrupt:
        return 130
    finally:
        work.close()
    return 0


class Work:
    """What a worker keeps from one job to the next: a kernel that is ready, and for which environment it was made."""

    def __init__(self, root: Path, threads: int, lock: tuple[int, ...], timeout: float | None):
        self.root, self.threads, self.lock, self.timeout = root, threads, lock, timeout
        self.users = os.environ.get(THREADS)
        self.ready: tuple[dict, tuple, Spare] | None = None

    def run(self, command: dict) -> dict:
        """Run the job of one command; returns its record."""
        spec = spec_from(command["job"])
        set_threads(spec, self.users, self.threads)
        spare = self._take(spec) if spec.alone else None
        try:
            import alignkit.jobs.kernel  # noqa: F401 (papermill takes a second, which is not the job's)

            if command.get("next"):
                following = spec_from(command["next"])
                if following.alone:
                    set_threads(following, self.users, self.threads)
                    self.ready = self._kernel(following)
                    set_threads(spec, self.users, self.threads)
            return run_job(spec, self.root, command["attempt"], timeout=self.timeout, spare=spare)
        finally:
            if spare:
                spare.close()

    def close(self) -> None:
        """Stop the kernel that nobody needs any more."""
        if self.ready:
            self.ready[2].close()
            self.ready = None

    def _take(self, spec: Spec) -> Spare:
        """The kernel that is ready, if it fits the job and lives; otherwise a new one."""
        env, needed = self._wanted(spec)
        if self.ready and self.ready[:2] == (env, needed) and self.ready[2].is_alive():
            spare, self.ready = self.ready[2], None
            return spare
        self.close()
        return self._kernel(spec)[2]

    def _kernel(self, spec: Spec) -> tuple[dict, tuple, Spare]:
        env, needed = self._wanted(spec)
        return env, needed, Spare(env, Path.cwd(), self.lock, needed)

    def _wanted(self, spec: Spec) -> tuple[dict, tuple]:
        job = as_jobs(spec, self.root / "jobs" / spec.id)[-1]
        return kernel_environment(job), needed_by(job.notebook)


def _commands():
    """The commands that come from the driver, until it says "end"; a thread waits for them, and for the driver's
    death."""
    lines: queue.Queue[dict] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            command = json.loads(line)
            lines.put(command)
            if command.get("end"):
                return
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

    threading.Thread(target=read, daemon=True).start()
    while not (command := lines.get()).get("end"):
        yield command

