"""A whole sweep: check the grid, say what it costs, run what is not done yet, write the tables and the page.

DIR/sweep.json records every grid that was run in DIR, with its command, the seed of its draws, and versions. Everything
else is read from the jobs' folders, so that a sweep goes on wherever it was stopped.
"""

import contextlib
import math
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from alignkit.errors import ParameterError, RunError
from alignkit.jobs.estimate import WHERE, notebook_seconds
from alignkit.jobs.notebooks import find_notebooks, run_directory, run_place
from alignkit.metrics import duration, is_number
from alignkit.runs.lock import lock_handles, run_lock
from alignkit.runs.records import versions
from alignkit.safe_text import one_line
from alignkit.stages import CHAIN
from alignkit.storage import read_json, write_json
from alignkit.sweeps.engine import Engine, LocalEngine
from alignkit.sweeps.grid import MOST_JOBS, is_id
from alignkit.sweeps.job import is_done, place_of, read_record
from alignkit.sweeps.one import refuse_while_jobs_run, run_one
from alignkit.sweeps.plan import COURSE, Plan, Spec, plan
from alignkit.sweeps.progress import SweepProgress
from alignkit.sweeps.ray_engine import Cluster, RayEngine, connected
from alignkit.sweeps.table import row_of, write_junit, write_tables

RECORD = "sweep.json"
TABLE_SECONDS = 10  # between two writings of the tables while jobs run


def sweep(
    notebook: str | Path,
    out: str | Path,
    parameters: Mapping[str, str],
    *,
    workers: int | None = None,
    draws: int | None = None,
    seed: int = 0,
    retries: int = 1,
    timeout: float | None = None,
    dry_run: bool = False,
    job: int | None = None,
    cluster: Cluster | None = None,
    series: Sequence[str | Path] = tuple(CHAIN),
) -> int:
    """Run `notebook` (or "course") for each point of the grid, in the folder `out`; returns 0, or 1 if a job failed.

    parameters: name -> its values as text (`grid.axis`). draws, seed: of a random search. workers: jobs at a time; by
    default as many as there are cores, 1 for other models than `tiny`, or as many as the cluster has room for. retries:
    of a job whose kernel, worker or node died. timeout: seconds for each notebook. dry_run: check, list the jobs, write
    nothing. job: run only the job of this number, counted from 0 (`one.run_one`). cluster: run the jobs on this Ray
    cluster instead of on this machine. series: the course's notebooks.
    Raises ParameterError, RunError and DataError before anything starts; RunInUse if another sweep uses `out`;
    KeyboardInterrupt after running jobs have saved their state.
    """
    if os.name != "posix":
        raise RunError("sweeps need a POSIX system (Linux, macOS, WSL)")
    if retries < 0:
        raise ParameterError(f"retries is {retries}, expected 0 or more")
    if cluster and job is not None:
        raise ParameterError("--job runs a job on this machine, for another scheduler: give it without --address")
    root = run_place(out)
    planned = plan(str(notebook), root, parameters, draws=draws, seed=seed, series=series)
    record = _recorded(root, planned.name)
    planned = _with_known_ids(root, planned, record)
    done = {spec.id for spec in planned.jobs if is_done(place_of(root, spec), spec)}
    asked = workers
    with contextlib.ExitStack() as stack:
        if cluster and not dry_run and len(done) < len(planned.jobs):
            stack.enter_context(connected(cluster))
            workers = min(workers or MOST_JOBS, cluster.room())
        workers = min(workers or _usual_workers(planned), max(1, len(planned.jobs)))
        at_once = workers if cluster else min(workers, cores())
        _say(root, planned, done, None if cluster and dry_run else workers, at_once, draws, seed)
        if dry_run:
            _list(planned, done)
            return 0
        if job is not None:
            return run_one(run_directory(root), planned, job, retries=retries, timeout=timeout)
        stack.enter_context(run_lock(run_directory(root)))
        refuse_while_jobs_run(root)
        record = _recorded(root, planned.name)
        _note(root, record, planned, _command(notebook, out, parameters, draws, seed), draws, seed)
        return _run(root, planned, record, workers, LocalEngine(
            root, workers, retries, timeout, lock=lock_handles(root)) if not cluster else RayEngine(
            root, asked or MOST_JOBS, retries, timeout, cluster=cluster))


def _list(planned: Plan, done: set[str]) -> None:
    """Print the jobs, each with its number."""
    for number, spec in enumerate(planned.jobs):
        print(f"{number}  {one_line(spec.id, 300)}  {_words(spec)}{'  (done already)' if spec.id in done else ''}")


def rows(root: Path, record: Mapping) -> list[dict]:
    """The rows of the tables: one for each job of each grid that was run in the folder, in that order."""
    found = []
    for job, parameters in record["jobs"].items():
        folder = root / "jobs" / job
        ended = read_record(folder)
        found.append(row_of(job, parameters, ended or read_record(root / "failed" / job), folder if ended else None))
    return found


def _run(root: Path, planned: Plan, record: dict, workers: int, engine: Engine) -> int:
    """Run what is not done, with its shared jobs first, and write the tables; returns the exit code."""
    ahead = [spec for spec in planned.jobs if not is_done(place_of(root, spec), spec)]
    shared = _needed(root, ahead, planned.shared)
    progress = SweepProgress(len(planned.jobs), len(planned.jobs) - len(ahead), len(shared), workers)
    written = [time.monotonic()]

    def on_event(kind: str, spec: Spec, ended: dict) -> None:
        progress.event(kind, spec, ended)
        if kind in ("finished", "failed") and time.monotonic() - written[0] > TABLE_SECONDS:
            written[0] = time.monotonic()
            _write(root, record, parquet=False)

    engine.on_event, engine.on_tick = on_event, lambda: progress.tick(len(engine.running()))
    try:
        engine.run([*shared, *ahead])
    finally:
        progress.end()
        _write(root, record)
    from alignkit.sweeps.page import report_sweep  # which loads matplotlib

    report_sweep(root, progress.say)
    failed = len(planned.jobs) - progress.finished
    print(f"{progress.finished} of {len(planned.jobs)} jobs finished"
          + (f", {failed} failed (in {_shown(root)}/failed)" if failed else "")
          + f"; {_shown(root)}/table.csv, {_shown(root)}/sweep.html")
    return 1 if failed else 0


def _write(root: Path, record: Mapping, *, parquet: bool = True) -> None:
    table = rows(root, record)
    write_tables(root, table, parquet=parquet)
    write_junit(root, str(record["notebook"]), table)


def _needed(root: Path, ahead: Sequence[Spec], shared: Mapping[str, Spec]) -> list[Spec]:
    """The shared jobs that these jobs begin with and that are not done, each after the one that it begins with."""
    needed: dict[str, Spec] = {}

    def add(name: str | None) -> None:
        if name and name not in needed and not is_done(place_of(root, shared[name]), shared[name]):
            add(shared[name].base)
            needed[name] = shared[name]

    for spec in ahead:
        add(spec.base)
    return list(needed.values())


def _recorded(root: Path, notebook: str) -> dict:
    """The content of DIR/sweep.json, or an empty one. Raises RunError if it is damaged or of another notebook."""
    path = root / RECORD
    try:
        record = read_json(path)
    except FileNotFoundError:
        return {"notebook": notebook, "grids": [], "jobs": {}}
    except RunError as error:
        raise RunError(f"{error}; delete it, and the sweep goes on with the jobs that are there") from None
    for name, kind in (("notebook", str), ("grids", list), ("jobs", dict)):
        if not isinstance(record.get(name), kind):
            raise RunError(f"{path}: {name} is no {kind.__name__}; delete the file, and the sweep goes on")
    if not all(isinstance(each, dict) for each in [*record["grids"], *record["jobs"].values()]):
        raise RunError(f"{path}: a grid or a job is no mapping; delete the file, and the sweep goes on")
    if odd := next((name for name in record["jobs"] if not is_id(name)), None):
        raise RunError(f"{path}: job {one_line(odd, 80)} has no name of a job; delete the file, and the sweep goes on")
    if record["notebook"] != notebook:
        raise RunError(f"{root} is a sweep of {one_line(record['notebook'])}, not of {notebook}; choose another folder")
    return record


def _command(notebook: str | Path, out: str | Path, given: Mapping[str, str], draws: int | None, seed: int) -> str:
    """The command that runs this grid."""
    words = [str(notebook), *(word for name, text in given.items() for word in ("-p", f"{name}={text}"))]
    words += [] if draws is None else ["--random", str(draws), "--random-seed", str(seed)]
    return shlex.join(["alignkit", "sweep", *words, "--out", str(out)])


def _note(root: Path, record: dict, planned: Plan, command: str, draws: int | None, seed: int) -> None:
    """Add the grid to DIR/sweep.json; one that is there already is only dated."""
    entry = {"command": command, "values": planned.axes, "random": draws and {"count": draws, "seed": seed},
             "jobs": [spec.id for spec in planned.jobs], "shared": sorted(planned.shared), "versions": versions(),
             "begun": datetime.now(UTC).isoformat(timespec="seconds")}
    record["grids"] = [each for each in record["grids"] if each.get("command") != command] + [entry]
    record["jobs"] |= {spec.id: record["jobs"].get(spec.id, {}) | spec.shown for spec in planned.jobs}
    write_json(root / RECORD, record)


def _with_known_ids(root: Path, planned: Plan, record: Mapping) -> Plan:
    """The plan with the IDs under which its jobs are known in DIR already: the same job may have been given with other
    words, for example without a parameter that has its default here."""
    folders = (path.name for kind in ("failed", "jobs") for path in sorted((root / kind).glob("*")))
    known = {name.rpartition("_")[2]: name for name in (*folders, *record["jobs"])}
    jobs = [replace(spec, id=known.get(spec.id.rpartition("_")[2], spec.id)) for spec in planned.jobs]
    return replace(planned, jobs=jobs)


def _usual_workers(planned: Plan) -> int:
    return 1 if any(spec.model != "tiny" for spec in planned.jobs) else cores()  # 1: all of the memory, or the GPU


def cores() -> int:
    """The cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _say(root: Path, planned: Plan, done: set[str], workers: int | None, at_once: int, draws: int | None,
         seed: int) -> None:
    """Print how many jobs there are, how they share stages, and how long they will take, as far as that is known.
    workers: jobs at a time, None if a cluster will say so; at_once: those of them that have a core of their own."""
    ahead = [spec for spec in planned.jobs if spec.id not in done]
    shared = _needed(root, ahead, planned.shared)
    name = "the course" if planned.name == COURSE else planned.name
    words = f"{len(planned.jobs)} job{'s' * (len(planned.jobs) > 1)} of {name}"
    words += f", {len(done)} of them done already" if done else ""
    if shared:
        words += f"; {len(shared)} series of earlier notebooks, made once and shared"
    if ahead and workers:
        words += f"; {workers} at a time, {_estimate(root, ahead, shared, workers, at_once)}"
    if draws is not None:
        words += f"; drawn with seed {seed}"
    print(words, flush=True)


def _estimate(root: Path, ahead: Sequence[Spec], shared: Sequence[Spec], workers: int, at_once: int) -> str:
    """How long the jobs will take together, in words: from the jobs in DIR that have finished, or from what alignkit's
    notebooks took by default where they were recorded."""
    took = [record["seconds"] for path in sorted((root / "jobs").glob("*")) if path.is_dir()
            and is_number((record := read_record(path)).get("seconds"))]
    paths = {path for spec in ahead for path in spec.notebooks}
    ours = paths <= {str(path) for path in find_notebooks().values()} and all(spec.model == "tiny" for spec in ahead)
    usual = notebook_seconds() if ours else {}
    if not (took or (usual and {Path(path).stem for path in paths} <= usual.keys())):
        return "for how long is known after the first"

    def usually(spec: Spec) -> float:
        base = next((each for each in shared if each.id == spec.base), None)
        own = spec.notebooks[-1:] if spec.alone else spec.notebooks[len(base.notebooks) if base else 0:]
        return sum(usual.get(Path(path).stem, 0) for path in own)

    begun = in_rounds([usually(spec) for spec in shared], at_once)
    if took:  # while as many others ran
        return f"about {duration(begun + in_rounds([sum(took) / len(took)] * len(ahead), workers))}, as the first took"
    own = in_rounds([usually(spec) for spec in ahead], at_once)
    return f"about {duration(begun + own)} with the defaults, as recorded on {WHERE}"


def in_rounds(seconds: Sequence[float], width: int) -> float:
    """Seconds until jobs that take these are done, `width` at a time, if each takes their mean."""
    return math.ceil(len(seconds) / width) * sum(seconds) / max(1, len(seconds))


def _words(spec: Spec) -> str:
    return " ".join(f"{name}={one_line(value, 80)}" for name, value in spec.shown.items())


def _shown(path: Path) -> str:
    with contextlib.suppress(ValueError, OSError):
        return one_line(path.relative_to(Path.cwd()), 1000)
    return one_line(path, 1000)
