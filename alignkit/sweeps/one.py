"""One job of a sweep by its number, for schedulers that start jobs themselves: Slurm arrays, indexed Kubernetes Jobs.

Processes on several machines share DIR. Each holds DIR/locks/ID while it runs job ID; a shared job that several begin
with is run by one of them, and the others wait for it. None writes the tables: the same command without a number does.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from alignkit.errors import ParameterError, RunInUse
from alignkit.folders import is_held
from alignkit.runs.lock import lock_handles, run_lock
from alignkit.safe_text import one_line
from alignkit.sweeps.engine import LocalEngine
from alignkit.sweeps.job import is_done, place_of
from alignkit.sweeps.plan import Plan, Spec
from alignkit.sweeps.progress import SweepProgress

WAIT_SECONDS = 2  # between two looks at a job that another process runs
LOCKS = "locks"


def run_one(root: Path, planned: Plan, number: int, *, retries: int = 1, timeout: float | None = None) -> int:
    """Run job `number` of the grid, counted from 0 as in `--dry-run`, after the shared jobs that it begins with.

    Nothing that is finished is run again. Returns 0, or 1 if it failed. Raises ParameterError if there is no such job;
    RunInUse if a sweep of the whole grid uses the folder.
    """
    if not 0 <= number < len(planned.jobs):
        raise ParameterError(f"--job is {number}, expected 0 to {len(planned.jobs) - 1}: the grid has "
                             f"{len(planned.jobs)} jobs")
    if (root / ".lock").is_file() and is_held(root / ".lock"):
        raise RunInUse(f"{root} is in use by a sweep of the whole grid, which runs this job too")
    chain = [planned.jobs[number]]
    while chain[0].base:
        chain.insert(0, planned.shared[chain[0].base])
    for spec in chain:
        with _alone(root, spec) as lock:
            if is_done(place_of(root, spec), spec):
                print(f"{one_line(spec.id, 200)}: done already", flush=True)
                continue
            progress = SweepProgress(1, 0, 0, 1)
            LocalEngine(root, 1, retries, timeout, progress.event, lambda progress=progress: progress.tick(1),
                        lock=lock).run([spec])
            progress.end()
            if not is_done(place_of(root, spec), spec):
                return 1
    return 0


def refuse_while_jobs_run(root: Path) -> None:
    """Raise RunInUse if a process runs a job of this sweep by its number."""
    for lock in sorted((root / LOCKS).glob("*/.lock")):
        if is_held(lock):
            raise RunInUse(f"job {one_line(lock.parent.name, 200)} of {root} is being run by its number (--job); "
                           "wait until all of them have ended")


@contextlib.contextmanager
def _alone(root: Path, spec: Spec) -> Iterator[tuple[int, ...]]:
    """Hold the lock of a job; wait while another process holds it."""
    place, said = root / LOCKS / spec.id, False
    while True:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(run_lock(place))
            except RunInUse:
                pass
            else:
                yield lock_handles(place)
                return
        if not said:
            print(f"{one_line(spec.id, 200)}: another process is at it; waiting", flush=True)
            said = True
        time.sleep(WAIT_SECONDS)
