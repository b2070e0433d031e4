"""Run notebooks as jobs: one notebook, or the whole course, in a run directory that can be resumed.

RUN/jobs.json records the state of each notebook, before, during and at the end of its run. The notebook file itself
never decides whether a notebook has finished. A job's key is made of the notebook's source, its parameters, alignkit's
code and the results of earlier notebooks in RUN. A finished job with the same key is not repeated.
"""

import contextlib
import errno
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from alignkit.errors import ParameterError, RunError
from alignkit.jobs.estimate import WHERE, notebook_seconds
from alignkit.jobs.job import Job, files_made, finished, job_key, why_run
from alignkit.jobs.parameters import Parameter, declared, notebook_parameters, typed_values
from alignkit.jobs.preconditions import check_before, check_model, check_shard
from alignkit.jobs.progress import Progress
from alignkit.jobs.stage_parameters import addressed, values_by_notebook, where_they_went
from alignkit.jobs.usage import nearest
from alignkit.metrics import duration
from alignkit.runs.lock import lock_handles, run_lock
from alignkit.runs.records import READING, check_not_fetched, check_run, record_seconds, run_facts, start_run
from alignkit.runs.stage_folders import (
    NEW,
    STAGE_OF_JOB,
    delete_checkpoints,
    is_finished,
    set_aside,
    set_aside_unfinished,
)
from alignkit.safe_text import one_line
from alignkit.sources import local_path
from alignkit.stages import CHAIN, NEEDS, PROCESSES, TRAINED_TOGETHER, has_number
from alignkit.storage import file_hash, plain, read_json, write_json


def find_notebooks() -> dict[str, Path]:
    """alignkit's notebooks, name -> path: from a clone or from the installed package, course notebooks first."""
    package = Path(__file__).parents[1]
    for folder in (package / "notebooks", package.parent / "notebooks"):
        if notebooks := {path.stem: path for path in sorted(folder.glob("*.ipynb"))}:
            return notebooks
    return {}


def find_notebook(notebook: str | Path) -> Path:
    """A notebook by path, by name (`03b_ppo`) or by number (`3`, `03`, `03a`).

    If two lessons share a number, the digits alone mean the one that makes a stage: `3` is 03b_ppo. Raises
    FileNotFoundError that lists them.
    """
    path, known = Path(notebook), find_notebooks()
    if path.suffix == ".ipynb" and path.is_file():
        return path.absolute()
    name = path.stem if path.suffix == ".ipynb" else str(notebook)
    chosen = known.get(name) or next((known[other] for other in known if has_number(other, name)), None)
    if not chosen:
        raise FileNotFoundError(
            f"no notebook {str(notebook)!r}{'; the course is run by `alignkit course`' if name == 'course' else ''}"
            f"{nearest(name, known)}; expected a path to an .ipynb file or one of: "
            f"{', '.join(known) or 'none'}"
        )
    return chosen


def run_notebook(
    notebook: str | Path,
    out: str | Path,
    parameters: Mapping[str, object] | None = None,
    *,
    timeout: float | None = None,
    progress: bool = True,
    force: bool = False,
    restart: bool = False,
    track: str | None = None,
    processes: int = 1,
    shard: str | None = None,
    spare=None,
) -> Path:
    """Run one notebook in the run directory `out`, unless it has already finished; returns the executed notebook.

    An interrupted run continues from its last checkpoint. The results of an earlier finished run stay until the new run
    has finished, and are then set aside. parameters: name -> value; `run` is set to `out`; model, data, seed and the
    way to read the data are by default those of the run in `out`. STAGE.NAME is also accepted if this notebook makes
    STAGE. timeout: seconds. progress: print one line about the notebook. force: run even if it has already finished.
    restart: start again instead of continuing. track: a tracker that receives the training's metrics (`jobs.tracking`).
    processes: how many of them train, in a notebook of PPO or DPO (`alignkit.followers`); with the same results, up to
    rounding. shard: "optimizer", if each of them keeps a part of the optimiser states only; None: all of them keep all.
    spare: a kernel that already runs (`jobs.spare_kernel.Spare`), to use instead of a new one.
    Raises ParameterError; RunError if the directory belongs to another run, lacks a stage, or holds a stage that was
    changed, or if the model cannot be read; DataError; RunInUse (all of these before a kernel starts); NotebookFailed,
    which names the cell.
    """
    job = job_of(find_notebook(notebook), out, parameters)
    out = job.out
    if processes > 1 and CHAIN.get(job.name) not in TRAINED_TOGETHER:
        raise ParameterError(f"processes is {processes}, expected 1 for {job.name}: several processes train in the "
                             f"notebooks of {' and '.join(TRAINED_TOGETHER)} only")
    check_shard(shard, processes)
    _check_tracker(track, job)
    check_before([job])
    _check_stages(job)
    with run_lock(run_directory(out)):
        _check_facts(job)
        expected = _expected([job]).get(job.name) if progress else None
        return _run(job, timeout=timeout, progress=progress, force=force or restart, expected=expected, restart=restart,
                    track=track, processes=processes, shard=shard, spare=spare)


def job_of(notebook: Path, out: str | Path, parameters: Mapping[str, object] | None) -> Job:
    """A notebook as a job in the run directory `out`, with the values given and those of the run there; see
    `run_notebook`."""
    out, known, given = run_place(out), notebook_parameters(notebook), dict(parameters or {})
    given = addressed(notebook.stem, known, given)
    return notebook_job(notebook, out, known, {**_of_run(notebook, out, known, given), **given})


def course(
    out: str | Path,
    model: str = "tiny",
    data: str = "desk",
    parameters: Mapping[str, object] | None = None,
    *,
    notebooks: Sequence[str | Path] = tuple(CHAIN),
    timeout: float | None = None,
    progress: bool = True,
    restart: bool = False,
    track: str | None = None,
    report: bool = True,
) -> Path:
    """Run the series of notebooks in order as one job, then write report.html; returns the run directory.

    Each notebook gets those of `parameters` that it knows. STAGE.NAME goes only to that stage (`ppo.learning_rate`) and
    overrides NAME there. With progress, a line says which notebooks got each parameter. A name that no notebook knows
    is refused before a kernel starts. Finished notebooks are not repeated, and unfinished ones continue from the last
    checkpoint; with `restart` everything starts again. If a notebook fails, the earlier results are kept and reported.
    report=False leaves out the page, whose code loads torch.
    Raises as `run_notebook` does, and RunError if `out` belongs to a run of another model, data or seed.
    """
    # check every name and value before anything starts
    out, paths = run_place(out), {path.stem: path for path in map(find_notebook, notebooks)}
    known = {name: notebook_parameters(path) for name, path in paths.items()}
    anywhere = {name: parameter for parameters_there in known.values() for name, parameter in parameters_there.items()}
    values = values_by_notebook(known, parameters or {})
    whole = {"model": model, "data": data}
    jobs = [notebook_job(paths[name], out, own, {key: whole[key] for key in whole if key in own} | values[name])
            for name, own in known.items()]
    _check_tracker(track)
    check_before(jobs)
    facts = {name: next((job.values[name] for job in jobs if name in job.values), None)  # of the whole run
             for name in ("model", "data", "seed")}
    if facts["seed"] is None:
        facts["seed"] = anywhere["seed"].default if "seed" in anywhere else 0
    if progress:
        for line in where_they_went(known, parameters or {}):
            print(line, flush=True)
    # run one notebook at a time; the kernel of the next one starts meanwhile
    with run_lock(run_directory(out)):
        start_run(out, facts["model"] or model, facts["data"] or data, facts["seed"])
        spare = _spare(jobs[0]) if jobs else None
        try:
            expected = _expected(jobs) if progress else {}
            if spare:
                import alignkit.jobs.kernel  # noqa: F401 (papermill takes seconds: not beside two kernels)
            for job, following in itertools.zip_longest(jobs, jobs[1:]):
                present, spare = spare, _spare(following)
                with contextlib.closing(present) if present else contextlib.nullcontext():
                    _check_facts(job)
                    _run(job, timeout=timeout, progress=progress, expected=expected.get(job.name), spare=present,
                         force=restart, restart=restart, track=track)
        except BaseException:
            if spare:
                spare.close()
            with contextlib.suppress(Exception):  # report the first error
                _report(out, report)
            raise
        _report(out, report)
    return out


def _report(out: Path, wanted: bool) -> None:
    if wanted:
        from alignkit.jobs.report import build_report

        build_report(out)


def notebook_job(notebook: Path, out: Path, known: dict[str, Parameter], given: Mapping[str, object]) -> Job:
    """A notebook with the parameters `known` as a job in `out`, with the values `given`, which are checked.

    Raises ParameterError that lists all wrong names and values.
    """
    if "run" in given:
        raise ParameterError("run: the run directory is given by `--out` (out=…), not as a parameter")
    if (out / notebook.name).resolve() == notebook.resolve():
        raise ParameterError(
            f"out is {str(out)!r}, the folder of the notebook itself: it would be overwritten by its executed copy"
        )
    values = {name: absolute(name, value) for name, value in typed_values(known, given, notebook.stem).items()}
    return Job(notebook, out, known, values | ({"run": str(out)} if "run" in known else {}))


def _of_run(notebook: Path, out: Path, known: Mapping, given: Mapping) -> dict[str, object]:
    """Model, data, seed and the way to read the data, taken from the run in `out`, for the parameters that were not
    given. A name in a file that the notebook would fetch from the Hub is not used: RunError asks the user for it."""
    names = ("model", "data", "seed", *(READING if _reads_data(known) else ()))
    facts = {name: value for name, value in run_facts(out).items()
             if name in names and name in known and name not in given}
    reads_run_only = CHAIN.get(notebook.stem, "sft") != "sft"  # these take the model from a stage
    for name in facts.keys() & ({"data"} if reads_run_only else {"model", "data"}):
        check_not_fetched(out, facts, name, f"-p {name}=")
    return facts


def _reads_data(parameters: Mapping) -> bool:
    """Whether a notebook's parameters say how to read its data; in a user's notebook, `split` alone may mean
    anything."""
    return {"data", *READING} <= parameters.keys()


def absolute(name: str, value: object) -> object:
    """The value of parameter `name`, with a path made absolute; `tiny`, `desk`, Hub ids and other values unchanged.

    Raises ParameterError if a `model` or `data` that can only be a path does not exist.
    """
    if not isinstance(value, str) or value in ("tiny", "desk"):
        return value
    if name in ("model", "data"):
        path = local_path(value, name)
        return value if path is None else os.path.abspath(path)
    if value.startswith(("./", "../", "~/", "/")) or value in (".", ".."):
        return os.path.abspath(os.path.expanduser(value))
    return value


def run_place(out: str | Path) -> Path:
    """The path of an existing or future run directory; nothing is created. RunError if it cannot be created."""
    try:
        place = Path(out).expanduser().absolute()
        if not place.is_dir() and os.path.lexists(place):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        os.lstat(place)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: an unknown user's home (~name)
        raise RunError(f"run directory {str(out)!r} cannot be made: {error}") from None
    return place


def run_directory(out: Path) -> Path:
    """`out`, created if missing; RunError if it cannot be created or written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise RunError(f"run directory {str(out)!r} cannot be made: {error}") from None
    try:
        with tempfile.TemporaryFile(dir=out) as probe:
            probe.write(b" " * 4096)
    except OSError as error:
        raise RunError(f"run directory {str(out)!r} cannot be written to: {error.strerror or error}") from None
    return out


def _expected(jobs: Sequence[Job]) -> dict[str, float]:
    """Print the recorded duration of the notebooks to run; returns their seconds by name, if known in advance."""
    done, usual = read_jobs(jobs[0].out), {"model": "tiny", "data": "desk"}
    ahead = [job for job in jobs if done.get(job.name, {}).get("status") != "finished"]
    changed = any(set(job.values) - {"run", "seed", *usual} for job in ahead)
    changed = changed or any(job.values.get(name, value) != value for job in ahead for name, value in usual.items())
    known = notebook_seconds() if ahead and not changed else {}
    if ahead and {job.name for job in ahead} <= known.keys():
        what = ahead[0].name if len(ahead) == 1 else f"{len(ahead)} notebooks"
        print(f"{what}: about {duration(sum(known[job.name] for job in ahead))}, as recorded on {WHERE} where nothing "
              "else ran; less than 2 GB of memory", flush=True)
    elif ahead:
        print("each notebook prints its time and memory before it trains", flush=True)
    return known


def _run(
    job: Job,
    *,
    timeout: float | None,
    progress: bool,
    force: bool = False,
    expected: float | None = None,
    spare=None,
    restart: bool = False,
    track: str | None = None,
    processes: int = 1,
    shard: str | None = None,
) -> Path:
    records = read_jobs(job.out)
    before, key = records.get(job.name, {}), job_key(job, records)
    changed = why_run(job, before, key)
    line = Progress(job.name, before.get("seconds", expected)) if progress else None
    if before.get("status") == "finished":  # its process may have been killed right after writing this
        _needs_no_checkpoints(job)
    if not changed and not force:
        if line:
            line.say(f"done already, in {duration(before['seconds'])}")
        return job.executed
    if line and before and changed:
        line.say(f"again: {changed}")
    other_run = "begun anew" if restart else changed if before and before.get("key") != key else ""
    moved = _clear(job, finished(before), other_run)
    record = {"status": "running", "key": key, "given": plain(job.given), "pid": os.getpid(), "started": _now()}
    if finished(before) and not moved:  # keep its results until this run has finished
        record["kept"] = {name: value for name, value in finished(before).items() if name != "kept"}
    executing = job.executed.with_suffix(".new.ipynb") if "kept" in record else job.executed
    started = time.monotonic()

    def note(**facts: object) -> None:
        record.update(facts, seconds=round(time.monotonic() - started, 1))
        write_json(job.out / "jobs.json", {**records, job.name: record})

    def on_cell(cell: int, cells: int, printed: str = "") -> None:
        if not printed:
            note(cell=cell + 1, cells=cells)
        if line:
            line.at(cell, cells, printed)

    note()
    try:
        with _tracked(job, track, key, anew=force):
            _execute(job, executing, timeout, on_cell, spare, kernel_environment(job, processes, shard))
    except BaseException as error:
        if moved and not job.folder.exists():
            os.rename(moved, job.folder)
        otherwise = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        note(status=getattr(error, "status", otherwise), error=str(error))
        if line:
            line.end(f"{record['status'].upper()} after {duration(record['seconds'])}")
        raise
    record.pop("kept", None)
    _take_place(job, executing)
    note(status="finished", made=files_made(job.folder))
    _needs_no_checkpoints(job)
    record_seconds(job.out, job.name, record["seconds"])
    if line:
        line.end(f"done in {duration(record['seconds'])}")
    return job.executed


def _check_tracker(track: str | None, job: Job | None = None) -> None:
    """Raise ParameterError if the requested tracker is not installed, or if a notebook does not train."""
    if track is None:
        return
    from alignkit.jobs.tracking import check_tracker

    check_tracker(track)
    if job and not job.folder:
        raise ParameterError(f"--track {track}: {job.name} is not the notebook of a stage, so there is no training to "
                             f"follow; expected one of {', '.join(name for name in CHAIN if CHAIN[name])}")


@contextlib.contextmanager
def _tracked(job: Job, track: str | None, key: Mapping, *, anew: bool) -> Iterator[None]:
    """Send the metrics of the job's training to the tracker, if one is requested."""
    if track is None or not job.folder:
        yield
        return
    from alignkit.jobs.tracking import following

    finished_before = is_finished(job.folder)  # then the new stage is built beside it and replaces it at the end
    place = [job.folder.with_name(f"{job.folder.name}{NEW}") if finished_before else job.folder]
    with following(track, job.out, job.folder.name, lambda: place[0], key=key, settings=job.settings, anew=anew):
        yield
        place[0] = job.folder


def _clear(job: Job, kept: Mapping, other_run: str) -> Path | None:
    """Set aside what another run of this job left unfinished, and the finished stage if this notebook would overwrite
    it; returns the new path of that stage, None if it stays. other_run: why the run is a different one, "" if it is
    not."""
    if job.folder and other_run:
        set_aside_unfinished(job.out, job.folder.name, other_run)
    if job.folder and kept and not job.builds_beside and job.folder.is_dir():
        return set_aside(job.out, job.folder, "made again")
    return None


def _take_place(job: Job, executing: Path) -> None:
    """After the last cell: rename the executed notebook to its final name; the replaced one goes to the old stage."""
    if executing != job.executed:
        replaced = sorted((job.out / "aside").glob(f"{job.folder.name}-*")) if job.folder else []
        if replaced and job.executed.exists():
            os.replace(job.executed, replaced[-1] / job.executed.name)
        os.replace(executing, job.executed)


def _needs_no_checkpoints(job: Job) -> None:
    """Delete the checkpoints of a job whose record says that it has finished."""
    if job.folder and job.folder.is_dir():
        delete_checkpoints(job.folder)


def _spare(job: Job | None):
    """A kernel that starts while other work continues; None if there is no job or it has already finished."""
    if job is None or read_jobs(job.out).get(job.name, {}).get("status") == "finished":
        return None
    from alignkit.jobs.spare_kernel import Spare, needed_by

    return Spare(kernel_environment(job), Path.cwd(), lock_handles(job.out), needed_by(job.notebook))


def kernel_environment(job: Job, processes: int = 1, shard: str | None = None) -> dict[str, str]:
    """The environment of the kernel of a job in which several processes train."""
    env = {**os.environ, "ALIGNKIT_HEADLESS": "1", STAGE_OF_JOB: job.folder.name if job.folder else ""}
    env.pop(PROCESSES, None)
    if processes > 1:
        values = {name: job.values.get(name, parameter.default) for name, parameter in job.parameters.items()}
        env[PROCESSES] = json.dumps({"count": processes, "shard": shard, "notebook": job.name, "values": plain(values)})
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    for name, value in {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        **({"OMP_NUM_THREADS": "1"} if job.values.get("model", "tiny") == "tiny" else {}),
    }.items():
        env.setdefault(name, value)  # the tiny model's matrices are too small for a second thread to help
    return env


def _needs(job: Job) -> Iterator[tuple[str, str]]:
    """The stages that a job reads, each with the notebook that makes it; unknown for a user's own notebook."""
    reads_stages = job.builds_beside or CHAIN.get(job.name, "") is None  # a lesson of the course that makes no stage
    for stage in NEEDS.get(job.name, ()) if reads_stages else ():
        if stage != "reward" or not job.settings.get("reward"):
            yield stage, next(name for name, folder in CHAIN.items() if folder == stage)


def _check_stages(job: Job) -> None:
    """Raise RunError if a stage that a job reads is missing, or if its model cannot be used for the job's stage."""
    for stage, maker in _needs(job):
        if not (job.out / stage / "config.json").exists():
            raise RunError(f"{job.out / stage} has no model: run notebook {maker} in the same run directory first")
    if job.name == "02_reward_model" and job.builds_beside and job.settings.get("model", "tiny") != "tiny":
        check_model(job.out / "sft", scored=True)


def _check_facts(job: Job) -> None:
    """Raise RunError if a job cannot run in its directory: it belongs to another run, or a stage that the job reads, or
    a notebook that it comes after, is missing, or what it made was changed after it was made."""
    settings, records = job.settings, read_jobs(job.out)
    if {"model", "data", "seed"} <= settings.keys():
        reading = {name: settings[name] for name in READING} if _reads_data(settings) else None
        check_run(job.out, settings["model"], settings["data"], settings["seed"], reading)
    _check_stages(job)
    before = {maker: finished(records.get(maker, {})) for maker in (*(maker for _, maker in _needs(job)), *job.after)}
    for each in declared(job.notebook)[0]:
        maker, beside = Path(each).stem, job.notebook.parent / each
        if not before[maker]:
            raise RunError(f"{job.out} holds no finished {one_line(maker, 100)}, which {job.name} comes after: run it "
                           "in the same run directory first (`alignkit sweep` does that by itself)")
        if beside.is_file() and before[maker]["key"].get("notebook") != file_hash(beside):
            raise RunError(f"{job.out} holds a finished {maker} that is not {beside} as it is now, which {job.name} "
                           "comes after: run that in the same run directory first, or in another one")
    for maker, record in before.items():
        made = record.get("made", {})
        present = {name: digest for folder in {name.partition("/")[0] for name in made}
                   for name, digest in files_made(job.out / folder).items()}
        differing = sorted(name for name in made if made[name] != present.get(name))
        if differing:
            raise RunError(f"{job.out / differing[0]} is not what notebook {maker} wrote (its SHA-256 differs from the "
                           f"one in jobs.json): run {maker} again, or the course, which does that by itself")


def _execute(job: Job, executing: Path, timeout: float | None, on_cell, spare, env: Mapping[str, str]) -> None:
    from alignkit.errors import NotebookFailed
    from alignkit.jobs.kernel import execute

    place = {"env": env, "cwd": Path.cwd(), "spare": spare,
             "lock": lock_handles(job.out)}
    try:
        execute(job.notebook, executing, job.values, timeout=timeout, on_cell=on_cell, **place)
    except NotebookFailed as error:
        how = {"failed": "failed", "timeout": "ran out of time", "interrupted": "was interrupted"}[error.status]
        raise NotebookFailed(
            f"{job.name} {how}{': ' if error.cell is None else ' in '}{error}", error.status, error.cell, error.error,
            error.died,
        ) from None


def read_jobs(out: Path) -> dict[str, dict]:
    """The record of each notebook in OUT/jobs.json, {} if there is none. RunError if the file is damaged."""
    damaged = f"{out / 'jobs.json'} is damaged; delete it, and the notebooks run again"
    try:
        records = read_json(out / "jobs.json")
    except FileNotFoundError:
        return {}
    except RunError as error:
        raise RunError(f"{damaged} ({error})") from None
    kinds = {"status": str, "key": dict, "made": dict, "given": dict, "kept": dict, "seconds": (int, float)}
    for name, record in records.items():
        if not isinstance(record, dict):
            raise RunError(f"{damaged} ({name} is no mapping)")
        for each in (record, record.get("kept", {})):
            wrong = [field for field, kind in kinds.items() if field in each and not isinstance(each[field], kind)]
            if not wrong and not isinstance(each.get("key", {}).get("parameters", {}), dict):
                wrong = ["key.parameters"]
            wrong += [f"no {field}" for field in ("key", "made", "seconds")
                      if each.get("status") == "finished" and field not in each]
            if wrong:
                raise RunError(f"{damaged} ({name}: {wrong[0]})")
    return records


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
