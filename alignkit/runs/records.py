"""A run's records: run.json, results.json of each stage, seconds.json and summary.json.

This module needs neither torch nor transformers. JSON here has no NaN and no infinity: a missing number is omitted or
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

READING = ("kind", "split", "columns")  # arguments of `load_task` that say how a run's data is read
PRESENTATION = ("jobs", "pages", "publish", "sweeps")  # folders of code that does not affect a run's results


def start_run(run: str | Path, model: str, data: str, seed: int, reading: Mapping | None = None) -> Path:
    """The run directory, created if missing, with the facts of the whole run in run.json. Every notebook starts here.

    reading: how the data is read: kind, split and columns (None if not given); None if this notebook reads no data. A
    relative `run` is relative to the project's folder, also in a notebook that was opened in its notebooks/ folder or
    in a folder of runs/, as the lab's copies are. Raises RunError as `check_run`.
    """
    run = _in_project(Path(run))
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


def _in_project(run: Path) -> Path:
    """`run`, seen from the project's folder. JupyterLab and VS Code start a kernel in the folder of its notebook."""
    here = Path.cwd()
    if run.is_absolute():
        return run
    if here.name == "notebooks":
        return here.parent / run
    in_runs = here.parent.name == "runs" and run.parts[:1] == ("runs",)
    return here.parents[1] / run if in_runs else run


def check_run(run: str | Path, model: str, data: str, seed: int, reading: Mapping | None = None) -> dict:
    """The content of RUN/run.json, {} if there is none. Raises RunError that lists the differing keys if it belongs to
    a run with another model, data or seed, or to one that reads its data differently and has finished a stage."""
    facts = {"model": str(model), "data": str(data), "seed": int(seed)}
    if reading is not None and any(Path(run).glob("*/results.json")):  # before that, the user may correct it
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

    results: numbers, text, lists and mappings. built: the folder from `stage_folder`; these results finish the stage.
    Its checkpoints are deleted, it moves to its final place, and the stage that it replaces goes to RUN/aside. Raises
    ValueError with the position of a NaN or an infinity; then nothing is written.
    """
    run = Path(run)
    folder = run / stage_name(stage) if built is None else Path(built)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", plain(results, f"results of {stage}"))
    if built is not None:
        finish_stage(run, stage, folder)
    return _summarise(run)


def record_seconds(run: str | Path, notebook: str, seconds: float) -> dict:
    """Record in RUN/seconds.json how long a notebook took, and rebuild RUN/summary.json; returns the summary."""
    run = Path(run)
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"seconds of {notebook} is {seconds}, expected a duration of 0 or more")
    write_json(run / "seconds.json", {**_read(run / "seconds.json", {}), notebook: round(float(seconds), 3)})
    return _summarise(run)


def run_facts(run: str | Path) -> dict[str, object]:
    """The facts in run.json, {"model": text, "data": text, "seed": int} and the given ones of READING, as far as they
    are recorded; {} without run.json.

    Raises RunError, naming file and field, if the record is invalid. Never fetch a name in it: it may come from a
    stranger.
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
    """Raise RunError if the `name` ("model" or "data") in a run's record would be fetched from the Hub, because the
    record may come from a stranger. give: how the user can give the name, such as "--data"."""
    value = facts.get(name)
    if value not in (None, "tiny", "desk") and not os.path.exists(value):
        raise RunError(f"{run} is a run of {name} {value!r}, which is not a file or folder here, and a name in a run "
                       f"directory is not fetched: give it, {give}{value}")


def versions() -> dict[str, str]:
    """Versions of python, alignkit and the libraries that affect the numbers: name -> version, for installed ones."""
    installed = {"python": platform.python_version()}
    for name in ("alignkit", "torch", "transformers", "trl", "peft", "numpy"):
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


@functools.cache
def code_hash() -> str:
    """SHA-256 (hex) of all of alignkit's code that can affect a run's results."""
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


def gold_scale(run: Path) -> tuple[float, float]:
    """Mean and sd of raw gold under SFT, in whose units the run reports gold. Raises RunError, or OSError, if notebook
    01 has not stored them in the run."""
    scale = read_json(run / "sft" / "results.json").get("gold_scale")
    if not (isinstance(scale, list) and len(scale) == 2 and all(type(each) in (int, float) and abs(each) < 1e9
                                                                for each in scale) and scale[1] > 0):
        raise RunError(f"{run / 'sft' / 'results.json'} has no gold_scale, a mean and a standard deviation")
    return scale[0], scale[1]
