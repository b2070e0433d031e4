"""Notebooks as jobs: one notebook, or the whole course, in a run directory that can be resumed.

RUN/jobs.json says of each notebook how far it came, written before, during and last of all: whether a notebook finished
is never judged from the notebook itself. A job is known by its key: the notebook's source, its parameters, the code of
alignkit and what the notebooks before it left in RUN. A finished job with the same key is not repeated.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from alignkit.estimate import notebook_seconds
from alignkit.parameters import ParameterError, check_name, check_parameters, notebook_parameters, unknown_name
from alignkit.progress import Progress, clock
from alignkit.records import RunError, content_hash, plain, record_seconds, start_run, write_json

try:
    import fcntl
except ImportError:  # Windows has no flock: there, nobody stops two jobs in one folder
    fcntl = None

__all__ = [
    "CHAIN",
    "NotebookFailed",  # noqa: F822 (by __getattr__)
    "ParameterError",
    "RunInUse",
    "absolute",
    "check_parameters",
    "course",
    "find_notebook",
    "find_notebooks",
    "notebook_parameters",
    "run_notebook",
]

CHAIN = {  # the notebooks of the course, in order, and the folder of RUN that is each one's own
    "00_the_world": None,
    "01_sft": "sft",
    "02_reward_model": "reward",
    "03_ppo": "ppo",
    "04_freeze_and_evaluate": "frozen",
    "05_dpo": "dpo",
}
# what later notebooks may add to, in any folder
RECORDS = ("results.json", "metrics.jsonl", "evaluation.json", "samples.json")
# code that changes nothing in a run
PRESENTATION = ("cli.py", "jobs.py", "kernel.py", "page.py", "parameters.py", "progress.py", "report.py", "spare.py")


class RunInUse(RuntimeError):
    """Another job is at work in this run directory."""


def __getattr__(name: str):  # papermill takes a second to import, and refusing a parameter does not need it
    if name == "NotebookFailed":
        from alignkit.kernel import NotebookFailed

        return NotebookFailed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def find_notebooks() -> dict[str, Path]:
    """The course's notebooks, name -> path in order of name: those of a clone, or those installed with the package."""
    package = Path(__file__).parent
    for folder in (package / "notebooks", package.parent / "notebooks"):
        found = {path.stem: path for path in sorted(folder.glob("[0-9]*.ipynb"))}
        if found:
            return found
    return {}


def find_notebook(notebook: str | Path) -> Path:
    """A notebook by path, by name (`03_ppo`) or by number (`3`, `03`). Raises FileNotFoundError that lists them."""
    path, known = Path(notebook), find_notebooks()
    if path.suffix == ".ipynb" and path.is_file():
        return path.absolute()
    name = path.stem if path.suffix == ".ipynb" else str(notebook)
    number = name.zfill(2) + "_" if name.isdecimal() else None
    found = known.get(name) or next((known[other] for other in known if number and other.startswith(number)), None)
    if not found:
        raise FileNotFoundError(
            f"no notebook {str(notebook)!r}; expected a path to an .ipynb file or one of: {', '.join(known) or 'none'}"
        )
    return found


def run_notebook(
    notebook: str | Path,
    out: str | Path,
    parameters: Mapping[str, object] | None = None,
    *,
    timeout: float | None = None,
    progress: bool = True,
    force: bool = False,
) -> Path:
    """Run one notebook in the run directory `out`, unless that was done already; returns the executed notebook.

    parameters: name -> value, checked before a kernel starts; `run` is set to `out`. timeout: seconds. progress: print
    one line about it. force: run even if it was done. Raises ParameterError; RunInUse; NotebookFailed, with the cell.
    """
    notebook, out = find_notebook(notebook), _run_directory(out)
    job = _job(notebook, out, parameters or {})
    with _locked(out):
        expected = _expected([job]).get(job.name) if progress else None
        return _run(job, timeout=timeout, progress=progress, force=force, expected=expected)


def course(
    out: str | Path,
    model: str = "tiny",
    data: str = "desk",
    parameters: Mapping[str, object] | None = None,
    *,
    notebooks: Sequence[str | Path] = tuple(CHAIN),
    timeout: float | None = None,
    progress: bool = True,
) -> Path:
    """Run the series of notebooks in order as one job, then write report.html; returns the run directory.

    Each notebook gets those of `parameters` that it knows; one that none knows is refused, before a kernel starts. What
    an earlier call finished is not repeated. When a notebook fails, what came before it is kept and reported.
    Raises as `run_notebook` does, and RunError if `out` belongs to a run of another model, data or seed.
    """
    from alignkit.report import build_report

    out, given = _run_directory(out), {"model": model, "data": data, **(parameters or {})}
    paths = [find_notebook(notebook) for notebook in notebooks]
    known = {path: notebook_parameters(path) for path in paths}
    everywhere = {name: parameter for found in known.values() for name, parameter in found.items()}
    for name in parameters or {}:
        check_name(name)
        if name not in everywhere:
            raise ParameterError(unknown_name(name, everywhere, "no notebook of the course has such a parameter"))
    jobs = [_job(path, out, {name: value for name, value in given.items() if name in known[path]}) for path in paths]
    facts = {
        name: next((job.values[name] for job in jobs if name in job.values), None) for name in ("model", "data", "seed")
    }
    if facts["seed"] is None:
        facts["seed"] = everywhere["seed"].default if "seed" in everywhere else 0
    with _locked(out):
        start_run(out, facts["model"] or model, facts["data"] or data, facts["seed"])
        spare = _spare(jobs[0]) if jobs else None
        try:
            expected = _expected(jobs) if progress else {}
            if spare:
                import alignkit.kernel  # noqa: F401 (papermill takes seconds; two kernels and this would be too many)
            for job, following in itertools.zip_longest(jobs, jobs[1:]):
                present, spare = spare, _spare(following)
                with contextlib.closing(present) if present else contextlib.nullcontext():
                    _run(job, timeout=timeout, progress=progress, expected=expected.get(job.name), spare=present)
        except BaseException:
            if spare:
                spare.close()
            with contextlib.suppress(Exception):  # what went wrong first is what has to be told
                build_report(out)
            raise
        build_report(out)
    return out


@dataclass(frozen=True)
class _Job:
    notebook: Path
    out: Path
    values: dict[str, object]

    @property
    def name(self) -> str:
        return self.notebook.stem

    @property
    def executed(self) -> Path:
        return self.out / self.notebook.name

    @property
    def folder(self) -> Path | None:
        return self.out / CHAIN[self.name] if CHAIN.get(self.name) else None


def _job(notebook: Path, out: Path, given: Mapping[str, object]) -> _Job:
    if "run" in given:
        raise ParameterError("run: the run directory is given by `--out` (out=…), not as a parameter")
    if (out / notebook.name).resolve() == notebook.resolve():
        raise ParameterError(
            f"out is {str(out)!r}, the folder of the notebook itself: it would be overwritten by its executed copy"
        )
    values = {name: absolute(name, value) for name, value in check_parameters(notebook, given).items()}
    return _Job(notebook, out, values | ({"run": str(out)} if "run" in notebook_parameters(notebook) else {}))


def absolute(name: str, value: object) -> object:
    """The value of parameter `name`, with a path made absolute; `tiny`, `desk`, Hub ids and all else as they are.

    Raises ParameterError if a `model` or `data` that can only be a path is not there.
    """
    if not isinstance(value, str) or value in ("tiny", "desk"):
        return value
    path = os.path.abspath(os.path.expanduser(value))
    is_source = name in ("model", "data")
    if value.startswith(("./", "../", "~/", "/")) or value in (".", ".."):
        if is_source and not os.path.exists(path):
            raise ParameterError(f"{name} is {value!r}, and there is no such file or folder")
        return path
    return path if is_source and os.path.exists(path) else value


def _run_directory(out: str | Path) -> Path:
    out = Path(out).expanduser().absolute()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise RunError(f"run directory {str(out)!r} cannot be made: {error}") from None
    if not os.access(out, os.W_OK | os.X_OK):
        raise RunError(f"run directory {str(out)!r} cannot be written to")
    return out


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold RUN/.lock. The system lets go of it when this process ends, however it ends."""
    with open(out / ".lock", "a+", encoding="utf-8") as lock:
        if fcntl:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise RunInUse(
                    f"{out} is in use by {lock.read().strip() or 'another process'}; wait, or choose another --out"
                ) from None
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} since {_now()}\n")
        lock.flush()
        yield
        lock.truncate(0)


def _expected(jobs: Sequence[_Job]) -> dict[str, float]:
    """Say what the notebooks that are to run will take; their seconds by name, where that is known before they run."""
    done, usual = _read_jobs(jobs[0].out), {"model": "tiny", "data": "desk"}
    ahead = [job for job in jobs if done.get(job.name, {}).get("status") != "finished"]
    changed = any(set(job.values) - {"run", "seed", *usual} for job in ahead)
    changed = changed or any(job.values.get(name, value) != value for job in ahead for name, value in usual.items())
    known = notebook_seconds() if ahead and not changed else {}
    if ahead and {job.name for job in ahead} <= known.keys():
        what = ahead[0].name if len(ahead) == 1 else f"{len(ahead)} notebooks"
        print(f"{what}: about {clock(sum(known[job.name] for job in ahead))} on this machine if nothing else runs, "
              "less than 2 GB of memory", flush=True)
    elif ahead:
        print("each notebook says how long it will train, and what memory it needs, before it does", flush=True)
    return known


def _run(
    job: _Job,
    *,
    timeout: float | None,
    progress: bool,
    force: bool = False,
    expected: float | None = None,
    spare=None,
) -> Path:
    records = _read_jobs(job.out)
    before, key = records.get(job.name, {}), _key(job, records)
    changed = _changed(job, before, key)
    line = Progress(job.name, before.get("seconds", expected)) if progress else None
    if not changed and not force:
        if line:
            line.say(f"done already, in {clock(before['seconds'])}")
        return job.executed
    if before and before.get("key") != key:
        _set_aside(job, before)
    if line and before and changed:
        line.say(f"again: {changed}")
    record = {"status": "running", "key": key, "pid": os.getpid(), "started": _now()}
    started = time.monotonic()

    def note(**facts: object) -> None:
        record.update(facts, seconds=round(time.monotonic() - started, 1))
        write_json(job.out / "jobs.json", {**records, job.name: record})

    def on_cell(cell: int, cells: int) -> None:
        note(cell=cell + 1, cells=cells)
        if line:
            line.at(cell, cells)

    note()
    try:
        _execute(job, timeout, on_cell, spare)
    except BaseException as error:
        note(status=getattr(error, "status", "failed"), error=str(error))
        if line:
            line.end(f"{record['status'].upper()} after {clock(record['seconds'])}")
        raise
    note(status="finished", made=_made(job.folder))
    record_seconds(job.out, job.name, record["seconds"])
    if line:
        line.end(f"done in {clock(record['seconds'])}")
    return job.executed


def _spare(job: _Job | None):
    """A kernel that starts while other work goes on; None if there is no job, or it was finished once."""
    if job is None or _read_jobs(job.out).get(job.name, {}).get("status") == "finished":
        return None
    from alignkit.spare import Spare

    return Spare(_environment(job), Path.cwd())


def _environment(job: _Job) -> dict[str, str]:
    env = {**os.environ, "ALIGNKIT_HEADLESS": "1"}
    for name, value in {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        **({"OMP_NUM_THREADS": "1"} if job.values.get("model", "tiny") == "tiny" else {}),
    }.items():
        env.setdefault(name, value)  # the tiny model's matrices are too small to be worth a second thread
    return env


def _execute(job: _Job, timeout: float | None, on_cell, spare) -> None:
    from alignkit.kernel import NotebookFailed, execute

    place = {"env": _environment(job), "cwd": Path.cwd(), "spare": spare}
    try:
        execute(job.notebook, job.executed, job.values, timeout=timeout, on_cell=on_cell, **place)
    except NotebookFailed as error:
        how = {"failed": "failed", "timeout": "ran out of time", "interrupted": "was interrupted"}[error.status]
        raise NotebookFailed(
            f"{job.name} {how}{': ' if error.cell is None else ' in '}{error}", error.status, error.cell, error.error
        ) from None


def _key(job: _Job, records: Mapping[str, dict]) -> dict[str, object]:
    """What decides the outcome of a job, part by part, so that a difference can be named."""
    earlier = {name: record.get("made") for name, record in records.items() if name < job.name and record.get("made")}
    files = {
        name: _digest(Path(value))
        for name, value in job.values.items()
        if name != "run" and isinstance(value, str) and os.path.isabs(value) and os.path.exists(value)
    }
    return plain(
        {
            "notebook": hashlib.sha256(job.notebook.read_bytes()).hexdigest(),
            "parameters": {
                name: job.values.get(name, known.default)
                for name, known in notebook_parameters(job.notebook).items()
                if name != "run"
            },
            "files": files,
            "alignkit": _code_hash(),
            "earlier": content_hash(earlier),
        }
    )


def _changed(job: _Job, before: Mapping, key: Mapping) -> str:
    """Why a job has to run (again); "" if it is finished and nothing changed."""
    was = before.get("key", {})
    if before.get("status") != "finished":
        return f"{before.get('status', 'not')} before".replace("running", "interrupted").replace(
            "not before", "not run yet"
        )
    if was.get("parameters") != key["parameters"]:
        old, new = was.get("parameters", {}), key["parameters"]
        differing = [
            f"{name} was {old[name]!r}, now {new[name]!r}" for name in new if name in old and old[name] != new[name]
        ]
        return "; ".join(differing) or "the notebook has other parameters now"
    reasons = {
        "notebook": "the notebook changed",
        "files": "the model or data changed",
        "alignkit": "alignkit's code changed",
        "earlier": "an earlier stage changed",
    }
    for part, reason in reasons.items():
        if was.get(part) != key[part]:
            return reason
    if not job.executed.exists():
        return f"{job.executed.name} is missing"
    made, there = before.get("made", {}), _made(job.folder)
    differing = sorted(name for name in made if made[name] != there.get(name))
    return f"{differing[0]} is not what it wrote" if differing else ""


def _set_aside(job: _Job, before: Mapping) -> None:
    """Clear a job's folder of what another key made: delete what can be made again, move all else to RUN/aside."""
    if not job.folder or not job.folder.exists():
        return
    if before.get("status") == "finished" and _made(job.folder) == before.get("made"):
        shutil.rmtree(job.folder)
        return
    aside = job.out / "aside"
    aside.mkdir(exist_ok=True)
    taken = {path.name for path in aside.iterdir()}
    number = next(n for n in range(1, len(taken) + 2) if f"{job.folder.name}-{n}" not in taken)
    os.rename(job.folder, aside / f"{job.folder.name}-{number}")


def _made(folder: Path | None) -> dict[str, str]:
    """SHA-256 of each file in a job's folder, by path below RUN; without records, which later notebooks may change."""
    if folder is None or not folder.is_dir():
        return {}
    return {
        path.relative_to(folder.parent).as_posix(): _digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in RECORDS
    }


def _digest(path: Path) -> str:
    """SHA-256 of a file's bytes; of a folder, the names, sizes and times of what is in it."""
    if path.is_dir():
        return content_hash(
            [
                [str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns]
                for file in sorted(path.rglob("*"))
                if file.is_file()
            ]
        )
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _code_hash() -> str:
    package = Path(__file__).parent
    return content_hash(
        {path.name: _digest(path) for path in sorted(package.glob("*.py")) if path.name not in PRESENTATION}
    )


def _read_jobs(out: Path) -> dict[str, dict]:
    try:
        found = json.loads((out / "jobs.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(record, dict) for record in found.values()):
        raise RunError(f"{out / 'jobs.json'} is damaged; delete it, and the notebooks run again")
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
