"""Where a stage is built, how it moves to its final place, and what happens to the stage that it replaces.

A finished stage (with results.json and without checkpoints) stays in place until a new one has finished, which is built
beside it. The replaced stage goes to RUN/aside with the date and its parameters. Only checkpoints are deleted, except
by `prune`.
"""

import itertools
import os
import re
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from alignkit.errors import RunError
from alignkit.folders import MARK, discard, is_held, leftovers, recover
from alignkit.killpoints import reached
from alignkit.stages import CHAIN, STAGES
from alignkit.storage import flush, read_json, write_json

CHECKPOINTS = "checkpoints"  # a folder of this name in a stage holds what a run needs to go on, until it has finished
STAGE_OF_JOB = "ALIGNKIT_STAGE_OF_JOB"  # environment variable of a job's kernel: the stage that the job makes
NEW = ".new"  # RUN/STAGE.new is built while RUN/STAGE holds a finished stage


def stage_folder(run: str | Path, stage: str, *, restart: bool = False) -> Path:
    """The folder in which to build a stage, created if missing: RUN/STAGE, or RUN/STAGE.new if RUN/STAGE holds a
    finished stage, which stays there until `write_results(…, built=…)` replaces it.

    The files of an unfinished run of the stage are kept in that folder, so that the run can continue. restart: set them
    aside.
    """
    built = stage_in_work(Path(run), stage)
    if restart:
        set_aside_unfinished(run, stage, "begun anew")
    built.mkdir(parents=True, exist_ok=True)
    return built


def stage_in_work(run: Path, stage: str) -> Path:
    """The folder in which a stage is or will be built: RUN/STAGE, or RUN/STAGE.new if RUN/STAGE is finished."""
    place, new = run / stage_name(stage), run / f"{stage}{NEW}"
    recover(place)
    if not place.exists() and (new / "results.json").exists():
        os.rename(new, place)  # a process was killed after setting the old stage aside
    return new if is_finished(place) else place


def is_finished(folder: Path) -> bool:
    """Whether a stage's folder holds a finished stage."""
    return (folder / "results.json").exists() and not checkpoint_folders(folder)


def checkpoint_folders(folder: Path) -> list[Path]:
    """The checkpoint folders at any depth of a stage; a folder or link of that name with other content does not
    count."""
    ours = re.compile(rf"\d+|\.?ended\.json(\.\w+)?|\..*{re.escape(MARK)}-.*")
    return [path for path in sorted(folder.rglob(CHECKPOINTS)) if path.is_dir() and not path.is_symlink()
            and all(ours.fullmatch(each.name) for each in path.iterdir())]


def set_aside_unfinished(run: str | Path, stage: str, why: str) -> Path | None:
    """Set aside the files of an unfinished run of a stage; returns their new path, None if there were none."""
    built = stage_in_work(Path(run), stage)
    return set_aside(run, built, why) if built.is_dir() and any(built.iterdir()) else None


def finish_stage(run: Path, stage: str, built: Path) -> None:
    """Move a built stage, which has its results, to its final place, and set the previous stage aside.

    Its checkpoints are deleted last. If a job makes this stage, the job deletes them, because a job killed before its
    end continues from them.
    """
    reached("stage.results")
    place = run / stage_name(stage)
    if built.resolve() != place.resolve():
        if place.exists():
            set_aside(run, place, "made again")
        reached("stage.aside")
        os.rename(built, place)
        flush(run)
    if os.environ.get(STAGE_OF_JOB) != stage:
        delete_checkpoints(place)


def delete_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a finished stage, and the leftovers of killed processes in it."""
    for checkpoints in checkpoint_folders(folder):
        discard(checkpoints)
    for part in leftovers(folder):
        shutil.rmtree(part, ignore_errors=True)


def set_aside(run: str | Path, folder: str | Path, why: str) -> Path:
    """Move a stage's folder to RUN/aside/STAGE-DATE/STAGE, beside an aside.json with the reason, whether the stage was
    finished, and its parameters, as far as RUN/jobs.json and its results record them. Returns the new path."""
    run, folder = Path(run), Path(folder)
    stage, date = folder.name.removesuffix(NEW), datetime.now(UTC)
    names = (f"{stage}-{date:%Y-%m-%d-%H%M%S}{f'-{n}' if n else ''}" for n in itertools.count())
    aside = next(run / "aside" / name for name in names if not (_aside(run) / name).exists())
    finished = is_finished(folder)
    jobs = _known(run / "jobs.json")
    job = next((record for name, record in jobs.items() if CHAIN.get(name) == stage and isinstance(record, dict)), {})
    of_folder = job.get("kept", job) if finished else job  # while a job runs again, `kept` is the finished one's record
    key = of_folder.get("key") if isinstance(of_folder, dict) else None
    aside.mkdir(parents=True)
    write_json(aside / "aside.json", {
        "stage": stage, "moved": date.isoformat(timespec="seconds"), "why": why, "finished": finished,
        "parameters": key.get("parameters") if isinstance(key, dict) else None,
        "config": _known(folder / "results.json").get("config"), "run": _known(run / "run.json"),
    })
    os.rename(folder, aside / stage)
    flush(run)
    return aside / stage


@dataclass(frozen=True)
class Removable:
    """A folder of a run that is no longer needed: its path, its size in bytes, and a description."""

    path: Path
    bytes: int
    what: str


def removable(run: str | Path) -> list[Removable]:
    """The folders that `alignkit runs prune` would delete: everything set aside, and temporary folders of killed
    processes.

    Raises RunError if `run` is not a run directory.
    """
    run = Path(run)
    if not (run / "run.json").exists() and not (run / "jobs.json").exists():
        raise RunError(f"{run} is no run directory: it has neither run.json nor jobs.json")
    folders = []
    for path in sorted(_aside(run).iterdir()) if _aside(run).is_dir() else []:
        record = _known(path / "aside.json")
        if path.is_symlink() or not path.is_dir() or not record:
            continue  # not what `set_aside` put there
        state = "finished" if record.get("finished") else "unfinished"
        what, moved = record.get("stage", "folder"), record.get("moved", "at some time")
        folders.append((path, f"{state} {what}, set aside {moved}: {record.get('why', 'no reason is recorded')}"))
    folders += [(path, "left by a process that was killed")
                for path in leftovers(run) if run / "aside" not in path.parents and not is_held(path)]
    return [Removable(path, sum(file.lstat().st_size for file in path.rglob("*") if file.is_file()), what)
            for path, what in folders]


def prune(folders: list[Removable]) -> None:
    """Delete what `removable` listed."""
    for folder in folders:
        shutil.rmtree(folder.path)


def _aside(run: Path) -> Path:
    if (run / "aside").is_symlink():
        raise RunError(f"{run / 'aside'} is a link, expected a folder or nothing; delete the link")
    return run / "aside"


def stage_name(stage: str) -> str:
    """`stage`, if it is a valid name of a stage's folder. Raises ValueError otherwise."""
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", stage):
        raise ValueError(f"stage is {stage!r}, expected a short name such as {', '.join(STAGES)}")
    return stage


def _known(path: Path) -> dict:
    """A record, or {} if it cannot be read, because the stage must be set aside in any case."""
    try:
        return read_json(path)
    except (OSError, RunError):
        return {}
