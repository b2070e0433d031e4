"""A job of a sweep on another machine: what is sent there, its run in a folder for this job alone, what comes back.

The driver calls `errand` and `receive`, the other machine `run_here`. What is sent: the notebooks, the shared job that
it begins with, and what an earlier attempt has left. What comes back: the folder of the attempt, without the files that
it had from the shared job and did not change; the driver has those and links them.
"""

import contextlib
import itertools
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from alignkit import __version__
from alignkit.errors import RunError
from alignkit.folders import is_held
from alignkit.jobs.job import finished, job_key, why_run
from alignkit.jobs.notebooks import read_jobs
from alignkit.runs.lock import run_lock
from alignkit.runs.records import code_hash
from alignkit.safe_text import one_line
from alignkit.storage import file_hash
from alignkit.sweeps.job import NOT_TAKEN_ALONG, THREADS, link, run_job, set_threads
from alignkit.sweeps.parcel import pack, unpack
from alignkit.sweeps.plan import Spec, as_jobs, spec_from
from alignkit.sweeps.worker import NOT_NEEDED

SCRATCH = "alignkit-job-"  # folders of jobs, in the folder for temporary files
OLD_SECONDS = 60  # a younger scratch folder without a lock may be in the making


def errand(root: Path, spec: Spec, attempt: str, *, timeout: float | None, threads: int) -> dict:
    """All that another machine needs to run a job, but for its base (`base_parcel`)."""
    folder = root / "attempts" / attempt
    earlier = pack(folder, lambda name: name != ".lock") if folder.is_dir() and any(folder.iterdir()) else None
    return {"spec": spec.as_json(), "attempt": attempt, "timeout": timeout, "threads": threads,
            "users_threads": os.environ.get(THREADS), "cwd": str(Path.cwd()), "earlier": earlier,
            "notebooks": {Path(path).name: Path(path).read_bytes() for path in spec.notebooks},
            "files": _files(spec, folder), "code": code_hash(), "version": __version__}


def base_parcel(root: Path, base: str) -> bytes:
    """The shared job `base`, as it is sent to the jobs that begin with it."""
    return pack(root / "shared" / base, lambda name: name not in ("aside", *NOT_TAKEN_ALONG))


def run_here(task: Mapping, base: bytes | None) -> dict:
    """Run the job of an errand on this machine. Returns its record, its folder as a parcel, or None if there is
    nothing to send, and the names of the files that it has unchanged from its base."""
    sys.modules.setdefault(NOT_NEEDED, None)
    spec = spec_from(task["spec"])
    if wrong := _differs(task):
        return _failed(wrong)
    with _scratch() as root:
        try:
            spec = _lay_out(spec, task, base, root)
            cwd = task["cwd"] if os.path.isdir(task["cwd"]) else root / "work"
            with contextlib.chdir(cwd):
                if wrong := _differing_file(spec, root, task["files"]):
                    return _failed(wrong)
                set_threads(spec, task["users_threads"], task["threads"])
                record = run_job(spec, root, task["attempt"], timeout=task["timeout"])
        except (RunError, OSError) as error:
            return _failed(str(error))
        try:
            return {"record": record, **_made(spec, root, root / "attempts" / task["attempt"])}
        except (RunError, OSError) as error:
            return _failed(record["error"] or str(error))


def receive(root: Path, spec: Spec, attempt: str, answer: Mapping) -> None:
    """Unpack what came back into the folder of the attempt, in the place of what it had. For a finished job everything
    is checked: notebooks, values, inputs and code are those of here, and each file that it made has its SHA-256.

    Raises RunError if not; OSError if the disk is full.
    """
    folder = root / "attempts" / attempt
    new = folder.with_name(f".{folder.name}")
    shutil.rmtree(new, ignore_errors=True)
    unpack(answer["content"], new)
    base = root / "shared" / spec.base if spec.base else None
    made = _made_by(base) if base else {}
    for name in answer["unchanged"]:
        if name not in made:
            raise RunError(f"what was sent names {str(name)[:200]!r}, which is no file of {spec.base}")
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        link(base / name, new / name)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(new, folder)
    if answer["record"]["status"] == "finished" and (why := _why_not(spec, folder, base)):
        raise RunError(f"what came back from {one_line(answer['record']['host'], 100)} is not what this machine would "
                       f"have made: {why}")


def _why_not(spec: Spec, folder: Path, base: Path | None) -> str:
    """Why a job that came back is not finished as it would be here; "" if it is."""
    records, shared = read_jobs(folder), read_jobs(base) if base else {}
    for job in as_jobs(spec, folder):
        record = records.get(job.name, {})
        if job.name in shared:
            why = "" if record.get("key") == shared[job.name].get("key") else "an earlier stage changed"
        else:
            why = why_run(job, record, job_key(job, records))
        if why:
            return f"{job.name}: {why}"
    return ""


def _differs(task: Mapping) -> str:
    """What is wrong if this machine has another alignkit than the driver; "" if it has the same."""
    if code_hash() == task["code"]:
        return ""
    here, there = __version__, task["version"]
    what = f"alignkit {here} where the sweep was started with {there}" if here != there else (
        f"another source of alignkit {here} than the sweep was started with")
    return f"{socket.gethostname()} has {what} (in {Path(__file__).parents[1]}): install the same on all nodes"


def _files(spec: Spec, folder: Path) -> dict:
    """The digests of the files and folders that a job's parameters name, by notebook and parameter."""
    return {job.name: files for job in as_jobs(spec, folder) if (files := job_key(job, {})["files"])}


def _differing_file(spec: Spec, root: Path, expected: Mapping) -> str:
    """Which file or folder that a parameter names this machine does not have as the driver has it; "" if none."""
    present = _files(spec, root / "attempts" / "ID")
    for stem, files in expected.items():
        for name, digest in files.items():
            if (here := present.get(stem, {}).get(name)) != digest:
                how = "does not have" if here is None else "has another content of"
                return (f"{socket.gethostname()} {how} {spec.values[stem].get(name)} ({name} of {stem}): files that "
                        "parameters name are not sent; put the same under that path on all nodes, for a folder with "
                        "its times (rsync -a)")
    return ""


def _lay_out(spec: Spec, task: Mapping, base: bytes | None, root: Path) -> Spec:
    """Write what was sent below `root`; returns the job with the paths that its notebooks have here."""
    for folder in ("notebooks", "work"):
        (root / folder).mkdir()
    for name, content in task["notebooks"].items():
        (root / "notebooks" / Path(name).name).write_bytes(content)
    if base is not None:
        unpack(base, root / "shared" / spec.base)
    if task["earlier"] is not None:
        unpack(task["earlier"], root / "attempts" / task["attempt"])
    return replace(spec, notebooks=tuple(str(root / "notebooks" / Path(path).name) for path in spec.notebooks))


def _made(spec: Spec, root: Path, folder: Path) -> dict:
    """The folder of an attempt as it is sent back."""
    if not folder.is_dir():
        return {"content": None, "unchanged": []}
    made = _made_by(root / "shared" / spec.base) if spec.base else {}
    unchanged = [name for name, digest in made.items()
                 if (folder / name).is_file() and not (folder / name).is_symlink()
                 and file_hash(folder / name) == digest]
    left_out = {".lock", *unchanged}
    return {"content": pack(folder, lambda name: name not in left_out), "unchanged": unchanged}


def _made_by(folder: Path) -> dict[str, str]:
    """The files that the jobs in `folder` made, with their SHA-256."""
    return dict(itertools.chain.from_iterable(
        finished(record).get("made", {}).items() for record in read_jobs(folder).values()))


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for one job, deleted at the end; those of killed processes are deleted now."""
    place = Path(tempfile.gettempdir())
    for folder in place.glob(f"{SCRATCH}*"):
        with contextlib.suppress(OSError):
            state = folder.lstat()
            if state.st_uid != os.getuid() or folder.is_symlink():
                continue
            if time.time() - state.st_mtime > OLD_SECONDS and not is_held(folder / ".lock"):
                shutil.rmtree(folder, ignore_errors=True)
    root = Path(tempfile.mkdtemp(prefix=SCRATCH))
    try:
        with run_lock(root):
            yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _failed(error: str) -> dict:
    record = {"status": "failed", "error": error, "cell": None, "host": socket.gethostname(), "seconds": 0.0}
    return {"record": record, "content": None, "unchanged": []}
