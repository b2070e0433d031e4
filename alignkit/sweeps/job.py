"""One job of a sweep: where it lies, what it begins with, the function that runs it, and how it is published.

DIR/attempts/ID.N is the folder of attempt N. A finished one becomes DIR/jobs/ID (DIR/shared/ID if other jobs begin with
it) by one rename, a failed one DIR/failed/ID. The folder of an attempt is an ordinary run directory, and job.json in it
says how it ended. Only the driver publishes; `run_job` is what every engine calls.
"""

import contextlib
import itertools
import os
import re
import shutil
import socket
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from alignkit.errors import AlignkitError, NotebookFailed, RunError
from alignkit.folders import is_held
from alignkit.jobs.job import finished, job_key
from alignkit.jobs.notebooks import course, read_jobs, run_notebook
from alignkit.jobs.stage_parameters import OF_THE_RUN
from alignkit.storage import flush, read_json, write_json
from alignkit.sweeps.plan import Spec, as_jobs

RECORD = "job.json"  # beside the run's own records
THREADS = "OMP_NUM_THREADS"
NOT_TAKEN_ALONG = (RECORD, ".lock", "report.html")  # files of a shared job that a job does not begin with


def run_job(spec: Spec, root: str | Path, attempt: str, *, timeout: float | None = None, spare=None) -> dict:
    """Run a job in ROOT/attempts/ATTEMPT and return its record: status, seconds, host, and how it failed.

    status: "finished", "failed", "timeout", "interrupted", or "died" if its kernel ended. timeout: seconds for each
    notebook. spare: a kernel that already runs. Raises nothing but what ends this process.
    """
    root, started = Path(root), time.monotonic()
    folder = root / "attempts" / attempt
    record = {"status": "finished", "error": "", "cell": None, "host": socket.gethostname()}
    try:
        if not folder.exists() and spec.base:
            begin_with(root / "shared" / spec.base, folder)
        _own_seed(spec, folder)
        if spec.alone:
            notebook = Path(spec.notebooks[-1])
            run_notebook(notebook, folder, spec.values[notebook.stem], timeout=timeout, progress=False, spare=spare)
        else:
            course(folder, parameters=_addressed(spec), notebooks=spec.notebooks, timeout=timeout, progress=False,
                   report=False)
        record["seconds"] = own_seconds(spec, folder)
    except NotebookFailed as error:
        cell = None if error.cell is None else error.cell + 1
        record |= {"status": "died" if error.died else error.status, "error": str(error), "cell": cell}
    except KeyboardInterrupt:
        record |= {"status": "interrupted", "error": "interrupted"}
    except (AlignkitError, OSError) as error:
        record |= {"status": "failed", "error": str(error)}
    except Exception as error:  # a fault of alignkit's own stops this job and no other
        record |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    return {"seconds": round(time.monotonic() - started, 1), **record}


def place_of(root: Path, spec: Spec) -> Path:
    """The folder of a finished job."""
    return root / ("shared" if spec.shared else "jobs") / spec.id


def is_done(folder: Path, spec: Spec) -> bool:
    """Whether `folder` holds the finished job, made by the same notebooks, values, inputs and code as it would be now.

    The rule is that of `alignkit run`, but for the bytes of what was made, which are not read again here.
    """
    try:
        records = read_jobs(folder)
        for job in as_jobs(spec, folder):
            record = records.get(job.name, {})
            if record.get("status") != "finished" or not job.executed.exists():
                return False
            if record["key"] != job_key(job, records):
                return False
    except (RunError, OSError):
        return False
    return True


def next_attempt(root: Path, spec: Spec) -> tuple[str, bool]:
    """The name of a new attempt of a job, and whether it is finished already, so that it need only be published.

    An earlier attempt that was killed, interrupted or failed is continued, in a folder with the new attempt's name, if
    its notebooks continue from checkpoints; otherwise it is deleted, unless a process still holds it.
    """
    attempts = root / "attempts"
    attempts.mkdir(parents=True, exist_ok=True)
    before = earlier_attempts(root, spec)
    failed = root / "failed" / spec.id
    number = 1 + max([*before, attempts_of(read_record(failed))], default=0)
    name = f"{spec.id}.{number}"
    for folder in (*(before[at] for at in sorted(before, reverse=True)), failed):
        if not folder.is_dir() or _is_held(folder):
            continue
        if folder.name.startswith("."):  # its process was killed while it made the folder
            shutil.rmtree(folder, ignore_errors=True)
        elif (attempts / name).exists():
            if folder != failed:
                shutil.rmtree(folder, ignore_errors=True)
        elif is_done(folder, spec):
            os.rename(folder, attempts / name)
            return name, True
        elif _continues(root, spec, folder):
            os.rename(folder, attempts / name)
        elif folder != failed:
            shutil.rmtree(folder, ignore_errors=True)
    return name, False


def earlier_attempts(root: Path, spec: Spec) -> dict[int, Path]:
    """The folders of the attempts of a job that were neither published nor given up, by number."""
    pattern = re.compile(rf"\.?{re.escape(spec.id)}\.(\d+)")
    with contextlib.suppress(OSError):
        return {int(found[1]): path for path in sorted((root / "attempts").iterdir())
                if (found := pattern.fullmatch(path.name))}
    return {}


def publish(root: Path, spec: Spec, attempt: str, record: Mapping[str, object]) -> Path:
    """Give a finished attempt its final name by one rename; a job that it replaces goes to DIR/aside. Returns it."""
    place = place_of(root, spec)
    _settle(root, spec, attempt, record, place)
    shutil.rmtree(root / "failed" / spec.id, ignore_errors=True)
    return place


def give_up(root: Path, spec: Spec, attempt: str, record: Mapping[str, object]) -> Path | None:
    """Move a failed attempt to DIR/failed/ID, in the place of an earlier one. None if it has no folder."""
    place = root / "failed" / spec.id
    shutil.rmtree(place, ignore_errors=True)
    (root / "attempts" / attempt).mkdir(parents=True, exist_ok=True)  # it may have failed before it had one
    _settle(root, spec, attempt, record, place)
    return place


def read_record(folder: Path) -> dict:
    """The content of job.json in the folder of a job; {} if there is none or it cannot be read."""
    try:
        return read_json(folder / RECORD)
    except (OSError, RunError):
        return {}


def attempts_of(record: Mapping[str, object]) -> int:
    """How many attempts a record counts; 0 if it does not say."""
    count = record.get("attempts")
    return count if type(count) is int and 0 <= count < 10**6 else 0


def begin_with(base: Path, folder: Path) -> None:
    """Make the folder of an attempt from the shared job `base`: hard links to what jobs.json lists with its SHA-256,
    copies of everything else.

    What a stage made (weights, tokenizer) is never written in place: a stage that is made again is built beside and
    replaces the old one, and a changed byte would be noticed by its hash. Records may be added to, so they are copied.
    """
    made = {name for record in read_jobs(base).values() for name in finished(record).get("made", {})}
    new = folder.with_name(f".{folder.name}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for path in sorted(base.rglob("*")):
        relative = path.relative_to(base)
        if relative.parts[0] == "aside" or relative.as_posix() in NOT_TAKEN_ALONG:
            continue
        target = new / relative
        if path.is_dir() and not path.is_symlink():
            target.mkdir(exist_ok=True)
        elif relative.as_posix() in made:
            link(path, target)
        else:
            shutil.copy2(path, target, follow_symlinks=False)
    os.rename(new, folder)


def link(path: Path, target: Path) -> None:
    """Give a file a second name; where the disk has no hard links, a copy."""
    try:
        os.link(path, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(path, target, follow_symlinks=False)


def set_threads(spec: Spec, users: str | None, share: int) -> None:
    """Where a job may use several threads (any model but the tiny one), no more than its share of the cores. users: the
    number that the user has set."""
    if spec.model == "tiny" and users is None:
        os.environ.pop(THREADS, None)  # `alignkit run` then gives its kernel one
    elif users is None or not users.isdecimal():
        os.environ[THREADS] = str(share)
    else:
        os.environ[THREADS] = str(min(int(users), share))


def stopped_at(folder: Path) -> tuple[str, int | None]:
    """The notebook and the cell, counted from 1, at which a killed attempt was, according to its own record."""
    with contextlib.suppress(RunError, OSError):
        for name, record in reversed(read_jobs(folder).items()):
            if record.get("status") == "running":
                return name, record.get("cell")
    return "", None


def _settle(root: Path, spec: Spec, attempt: str, record: Mapping[str, object], place: Path) -> None:
    folder = root / "attempts" / attempt
    number = int(attempt.rpartition(".")[2])
    write_json(folder / RECORD, {"id": spec.id, "parameters": spec.shown, "attempts": number, **record,
                                 "ended": datetime.now(UTC).isoformat(timespec="seconds")})
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():
        names = (f"{spec.id}-{n}" for n in itertools.count(1))
        aside = next(root / "aside" / name for name in names if not (root / "aside" / name).exists())
        aside.parent.mkdir(parents=True, exist_ok=True)
        os.rename(place, aside)
    os.rename(folder, place)
    flush(place.parent)


def _own_seed(spec: Spec, folder: Path) -> None:
    """Let run.json name the job's seed where the notebooks that it begins with know none, and so serve all seeds."""
    *earlier, own = (spec.values[Path(path).stem] for path in spec.notebooks)
    if spec.base and "seed" in own and not any("seed" in values for values in earlier):
        with contextlib.suppress(FileNotFoundError):
            write_json(folder / "run.json", read_json(folder / "run.json") | {"seed": own["seed"]})


def _addressed(spec: Spec) -> dict[str, object]:
    """The values of a series as parameters of `course`: what belongs to the whole run bare, all else by notebook."""
    given: dict[str, object] = {}
    for stem, values in spec.values.items():
        for name, value in values.items():
            given[name if name in OF_THE_RUN else f"{stem}.{name}"] = value
    return given


def own_seconds(spec: Spec, folder: Path) -> float:
    """What the job's own notebooks took, without those that it shares."""
    records, shared = read_jobs(folder), {}
    if spec.base:
        shared = read_jobs(folder.parents[1] / "shared" / spec.base)
    own = [record["seconds"] for name, record in records.items() if name not in shared]
    return round(sum(own), 1)


def _continues(root: Path, spec: Spec, folder: Path) -> bool:
    """Whether a job goes on from what an attempt left: its notebooks keep checkpoints, and its base is the same."""
    try:
        records = read_jobs(folder)
        base = read_jobs(root / "shared" / spec.base) if spec.base else {}
        own = as_jobs(spec, folder)[-1:] if spec.alone else as_jobs(spec, folder)
        return bool(records) and any(job.builds_beside for job in own) and all(
            records.get(name, {}).get("key") == record.get("key") for name, record in base.items())
    except (RunError, OSError):
        return False


def _is_held(folder: Path) -> bool:
    return (folder / ".lock").is_file() and is_held(folder / ".lock")
