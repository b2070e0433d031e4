"""A run's records: run.json, results.json of each stage, seconds.json and summary.json.

Needs neither torch nor transformers. JSON here has no NaN and no infinity: a number that is not there is left out or
None.
"""

import functools
import hashlib
import importlib.metadata
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path

from alignkit.errors import RunError
from alignkit.runs.stage_folders import finish_stage, stage_name
from alignkit.stages import in_order
from alignkit.storage import content_hash, plain, read_json, write_json

READING = ("kind", "split", "columns")  # how the data of a run is read, as `load_task` takes it
PRESENTATION = ("jobs", "pages", "publish")  # folders of code that changes nothing in a run


def start_run(run: str | Path, model: str, data: str, seed: int, reading: Mapping | None = None) -> Path:
    """The run directory, made if need be, with what is true of the whole run in run.json. Every notebook starts here.

    reading: how the data is read, its kind, split and columns (None where nothing was said); None if none is read here.
    A relative `run` counts from the project's folder, also in a notebook that was opened in its notebooks/ folder.
    Raises RunError as `check_run`.
    """
    run = Path(run)
    if not run.is_absolute() and Path.cwd().name == "notebooks":  # where JupyterLab starts the course's kernels
        run = Path.cwd().parent / run
    facts = {"model": str(model), "data": str(data), "seed": int(seed)}
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"run directory {run} cannot be made: {error}") from error
    before = check_run(run, model, data, seed, reading)
    facts = {**before, **facts, **{name: value for name, value in (reading or {}).items() if value is not None}}
    if facts != before:
        try:
            write_json(run / "run.json", facts)
        except OSError as error:
            raise RunError(f"run directory {run} cannot be written: {error}") from error
    return run


def check_run(run: str | Path, model: str, data: str, seed: int, reading: Mapping | None = None) -> dict:
    """What RUN/run.json holds, {} if there is none. Raises RunError that lists the differing keys if it is of a run of
    another model, data or seed, or of one that read its data in another way and has finished a stage."""
    facts = {"model": str(model), "data": str(data), "seed": int(seed)}
    if reading is not None and any(Path(run).glob("*/results.json")):  # until then it may have been a mistake
        facts |= reading
    before = run_facts(run)
    differing = [f"{key} was {before[key]!r}, now {value!r}" for key, value in facts.items()
                 if before.get(key, value) != value]
    if differing:
        raise RunError(f"{run} belongs to another run: {'; '.join(differing)}. Choose another run directory, or delete "
                       "this one")
    return before


def write_results(run: str | Path, stage: str, results: Mapping, *, built: str | Path | None = None) -> dict:
    """Write RUN/STAGE/results.json and rebuild RUN/summary.json; returns the summary.

    results: numbers, text, lists and mappings. built: the folder that `stage_folder` gave: with these results the stage
    is finished. Its checkpoints are deleted, and it takes its place; what it replaces goes to RUN/aside. Raises
    ValueError with the place of a NaN or an infinity; nothing is written then.
    """
    run = Path(run)
    folder = run / stage_name(stage) if built is None else Path(built)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", plain(results, f"results of {stage}"))
    if built is not None:
        finish_stage(run, stage, folder)
    return _summarise(run)


def record_seconds(run: str | Path, notebook: str, seconds: float) -> dict:
    """Note in RUN/seconds.json how long a notebook took, and rebuild RUN/summary.json; returns the summary."""
    run = Path(run)
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"seconds of {notebook} is {seconds}, expected a duration of 0 or more")
    write_json(run / "seconds.json", {**_read(run / "seconds.json", {}), notebook: round(float(seconds), 3)})
    return _summarise(run)


def run_facts(run: str | Path) -> dict[str, object]:
    """What run.json says of a run, {"model": text, "data": text, "seed": int} and what of READING was said, as far as
    it says it; {} without one.

    Raises RunError, naming file and field, if it is no such record. A name in it is a stranger's: never fetch it.
    """
    path = Path(run) / "run.json"
    facts = _read(path, {})
    for name in ("model", "data", *READING):
        if name in facts and not (isinstance(facts[name], str) and facts[name] and "\0" not in facts[name]):
            raise RunError(f"{path}: {name} is no text")
    if "seed" in facts and not (type(facts["seed"]) is int and 0 <= facts["seed"] < 2**63):
        raise RunError(f"{path}: seed is not a whole number from 0 to 2**63 - 1")
    return facts


def check_not_fetched(run: str | Path, facts: Mapping, name: str, give: str) -> None:
    """Raise RunError if the `name` ("model" or "data") that a run's record holds would be fetched from the Hub: a name
    in a file is a stranger's. give: how the user says it himself, such as "--data"."""
    value = facts.get(name)
    if value not in (None, "tiny", "desk") and not os.path.exists(value):
        raise RunError(f"{run} is a run of {name} {value!r}, which is not a file or folder here, and a name in a run "
                       f"directory is not fetched: give it, {give}{value}")


def versions() -> dict[str, str]:
    """Versions of python, alignkit and the libraries that decide the numbers: name -> version, for those installed."""
    installed = {"python": platform.python_version()}
    for name in ("alignkit", "torch", "transformers", "trl", "peft", "numpy"):
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


@functools.cache
def code_hash() -> str:
    """SHA-256 (hex) of all code of alignkit that a run's outcome can depend on."""
    package = Path(__file__).parents[1]
    paths = [path for path in sorted(package.rglob("*")) if path.suffix in (".py", ".json")]
    files = {path.relative_to(package): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    return content_hash({name.as_posix(): digest for name, digest in files.items()
                         if name.parts[0] not in PRESENTATION})


def _summarise(run: Path) -> dict:
    results = {path.parent.name: _read(path, {}) for path in sorted(run.glob("*/results.json"))}
    facts = _read(run / "run.json", {})
    summary = {
        "versions": versions(), "seed": facts.get("seed"), "model": facts.get("model"), "data": facts.get("data"),
        "stages": {stage: results[stage] for stage in in_order(results)}, "seconds": _read(run / "seconds.json", {}),
    }
    write_json(run / "summary.json", summary)
    return summary


def _read(path: Path, default: dict) -> dict:
    try:
        return read_json(path)
    except FileNotFoundError:
        return default
    except RunError as error:
        raise RunError(f"{error}; delete it and run that stage again") from None
