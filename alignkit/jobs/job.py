"""One notebook as a job: what its result depends on, and whether that has changed since it ran."""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from alignkit.jobs.parameters import Parameter, declared
from alignkit.runs.records import code_hash
from alignkit.runs.stage_folders import CHECKPOINTS
from alignkit.stages import CHAIN, RUN_FILES
from alignkit.storage import content_hash, file_hash, plain


@dataclass(frozen=True)
class Job:
    """A notebook, its run directory, its parameters, and the given values."""

    notebook: Path
    out: Path
    parameters: dict[str, Parameter]
    values: dict[str, object]

    @property
    def name(self) -> str:
        return self.notebook.stem

    @property
    def executed(self) -> Path:
        return self.out / self.notebook.name

    @property
    def settings(self) -> dict[str, object]:
        """The value of every parameter that can affect the result."""
        return {name: self.values.get(name, parameter.default) for name, parameter in self.parameters.items()
                if name not in ("run", "checkpoint_seconds")}

    @property
    def given(self) -> dict[str, object]:
        """The settings that differ from the notebook's defaults, without model and data, which belong to the
        whole run."""
        return {name: value for name, value in self.settings.items()
                if name not in ("model", "data") and value != self.parameters[name].default}

    @property
    def builds_beside(self) -> bool:
        """Whether the notebook leaves a finished stage unchanged until it has finished itself."""
        return b"stage_folder(" in self.notebook.read_bytes()

    @property
    def folder(self) -> Path | None:
        """The notebook's own folder in RUN: that of its stage, or the one that its metadata names."""
        makes = CHAIN.get(self.name) or declared(self.notebook)[1]
        return self.out / makes if makes else None

    @property
    def after(self) -> tuple[str, ...]:
        """The names of the notebooks that this one comes after, as its metadata names them."""
        return tuple(Path(each).stem for each in declared(self.notebook)[0])


def job_key(job: Job, records: Mapping[str, dict]) -> dict[str, object]:
    """Everything that determines the result of a job, part by part, so that a message can name a difference."""
    after = job.after
    made = {name: finished(record).get("made") for name, record in records.items()
            if name in after or (name in CHAIN and name < job.name)}
    earlier = {name: files for name, files in made.items() if files}
    named = {name: Path(value) for name, value in job.values.items() if name != "run" and isinstance(value, str)
             and os.path.isabs(value)}
    code = job.values.get("reward")
    if isinstance(code, str) and re.fullmatch(r"[\w.]+:\w+", code):  # a module in the current folder
        named["reward"] = Path.cwd() / f"{code.partition(':')[0].replace('.', '/')}.py"
    files = {name: _digest(path) for name, path in named.items() if path.exists()}
    return plain(
        {
            "notebook": hashlib.sha256(job.notebook.read_bytes()).hexdigest(),
            "parameters": job.settings,
            "files": files,
            "alignkit": code_hash(),
            "earlier": content_hash(earlier),
        }
    )


def why_run(job: Job, before: Mapping, key: Mapping) -> str:
    """The reason why a job must run (again); "" if it is finished and nothing has changed."""
    status, last = before.get("status", ""), before
    before = finished(before)
    was = before.get("key", {})
    if not before or (status != "finished" and last.get("key") == key):
        return {"": "not run yet", "running": "interrupted before"}.get(status, f"{status} before")
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
    wrote, present = before.get("made", {}), files_made(job.folder)
    differing = sorted(name for name in wrote if wrote[name] != present.get(name))
    return f"{differing[0]} is not what it wrote" if differing else ""


def finished(record: Mapping) -> Mapping:
    """The record of a job's last finished run, whose results are in its folder: `record` itself, or the record kept in
    it; {} if the job has never finished."""
    return record if record.get("status") == "finished" else record.get("kept", {})


def files_made(folder: Path | None) -> dict[str, str]:
    """SHA-256 of each file in a job's folder, by path below RUN; without records, which later notebooks may change."""
    if folder is None or not folder.is_dir():
        return {}
    return {
        path.relative_to(folder.parent).as_posix(): _digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in RUN_FILES and CHECKPOINTS not in path.relative_to(folder).parts
    }


def _digest(path: Path) -> str:
    """SHA-256 of a file's bytes; for a folder, of the names, sizes and times of its files."""
    if path.is_dir():
        return content_hash(
            [
                [str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns]
                for file in sorted(path.rglob("*"))
                if file.is_file()
            ]
        )
    return file_hash(path)
