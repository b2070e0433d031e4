"""What a sweep will run: the jobs of a grid, checked, and the stages that they share.

A job is a series of notebooks with the values of each. For `course` it is the course; for a notebook that reads stages
(03b_ppo), or whose metadata name notebooks that it comes after, those, and itself last; for any other, that notebook.
Jobs whose first notebooks get the same values share them: they are run once, as a job of their own, and each job begins
with its files.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from alignkit.errors import DataError, ParameterError, RunError
from alignkit.jobs.notebooks import find_notebook, notebook_job
from alignkit.jobs.parameters import Parameter, declared, notebook_parameters
from alignkit.jobs.preconditions import check_before, check_values
from alignkit.jobs.stage_parameters import OF_THE_RUN, READING, addressed, values_by_notebook
from alignkit.stages import CHAIN, NEEDS
from alignkit.storage import content_hash, plain
from alignkit.sweeps.grid import Range, axis, grid, job_id

COURSE = "course"
OF_ALL = (*OF_THE_RUN, *READING, "skip_bad")  # a bare name that goes to the notebooks that make a notebook's stages too
MOST_ERRORS = 20


@dataclass(frozen=True)
class Spec:
    """One job, in plain JSON types, so that any engine can hand it to a worker.

    notebooks: paths, in order; values: notebook -> parameter -> value, as far as given; alone: only the last notebook
    is run, the others are the base's; base: the ID of the shared job that this one begins with; shared: it is one of
    those; shown: the given parameters under the names that the user gave them.
    """

    id: str
    notebooks: tuple[str, ...]
    values: dict[str, dict]
    shown: dict[str, object]
    alone: bool
    base: str | None = None
    shared: bool = False

    @property
    def model(self) -> str:
        """The model that the job's notebooks train."""
        return next((str(values["model"]) for values in self.values.values() if "model" in values), "tiny")

    def as_json(self) -> dict:
        """The job as a JSON object; `spec_from` reads it."""
        return plain(asdict(self))


def spec_from(content: Mapping) -> Spec:
    """The job that `as_json` wrote."""
    return Spec(**{**content, "notebooks": tuple(content["notebooks"])})


@dataclass(frozen=True)
class Plan:
    """The jobs of a grid, the shared jobs that they need, by ID, and what each parameter was given."""

    name: str
    jobs: list[Spec]
    shared: dict[str, Spec]
    axes: dict[str, list[str] | str] = field(default_factory=dict)

    @property
    def stems(self) -> list[str]:
        """The names of a job's notebooks."""
        return [Path(path).stem for path in self.jobs[0].notebooks]


def plan(
    notebook: str,
    out: Path,
    given: Mapping[str, str],
    *,
    draws: int | None = None,
    seed: int = 0,
    series: Sequence[str | Path] = tuple(CHAIN),
) -> Plan:
    """The jobs of `notebook`, or of the course, over the grid that `given` (name -> its values as text) describes.

    draws, seed: of a random search (`grid.grid`). series: the notebooks of the course. Nothing is written. Raises
    ParameterError that lists every wrong name and value; RunError or DataError if a model or data cannot be used.
    """
    paths = _series(notebook, series)
    known = {Path(path).stem: parameters_of(path) for path in paths}
    alone = notebook != COURSE
    axes = _axes(paths, known, given, alone, out, draws is not None)
    varied = [name for name, values in axes.items() if isinstance(values, Range) or len(values) > 1]
    specs = [_spec(paths, known, chosen, alone, out, varied) for chosen in grid(axes, draws=draws, seed=seed)]
    specs = list({spec.id: spec for spec in specs}.values())  # 0.1 and 0.10 are one job
    _check(specs, out)
    jobs, shared = _share(specs, known)
    said = {name: str(values) if isinstance(values, Range) else values for name, values in axes.items()}
    return Plan(COURSE if not alone else Path(paths[-1]).stem, jobs, shared, said)


@functools.cache
def parameters_of(path: str) -> dict[str, Parameter]:
    """The parameters of a notebook, read once."""
    return notebook_parameters(path)


def as_jobs(spec: Spec, folder: Path) -> list:
    """The notebooks of a job as jobs in `folder`."""
    return [notebook_job(Path(path), folder, parameters_of(path), spec.values[Path(path).stem])
            for path in spec.notebooks]


def _series(notebook: str, series: Sequence[str | Path]) -> list[str]:
    """The paths of the notebooks that a job of `notebook` consists of, each after those that it reads."""
    if notebook == COURSE:
        return [str(find_notebook(each)) for each in series]
    of_course = {find_notebook(each).stem: each for each in series}
    makers = {stage: name for name, stage in CHAIN.items() if stage}
    paths: dict[str, str] = {}

    def add(path: Path, later: tuple[Path, ...] = ()) -> None:
        known = Path(paths.get(path.stem) or next((each for each in later if each.stem == path.stem), path))
        if known.resolve() != path.resolve():
            raise ParameterError(f"{known} and {path} have the same name, under which a run directory keeps one "
                                 "notebook: give one of them another name")
        if any(each.stem == path.stem for each in later):
            raise ParameterError(f"{path} comes after itself: see `after` in the metadata of "
                                 f"{' and '.join(each.stem for each in later)}")
        if path.stem in paths:
            return
        later = (*later, path)
        for stage in NEEDS.get(path.stem, ()):
            add(find_notebook(of_course.get(makers[stage], makers[stage])), later)
        for name in declared(path)[0]:
            beside = path.parent / name
            try:
                found = beside.resolve() if beside.is_file() else find_notebook(of_course.get(Path(name).stem, name))
            except FileNotFoundError as error:
                raise ParameterError(f"`after` in the metadata of {path}: {error}") from None
            add(found, later)
        paths[path.stem] = str(path)

    add(find_notebook(notebook))
    return list(paths.values())


def _distributed(given: Mapping[str, object], known: Mapping[str, Mapping[str, Parameter]], alone: bool) -> dict:
    """Notebook -> its values. In a course a bare name goes to all that know it; else to the notebook itself, and to
    those that make its stages only if it belongs to the whole run. STAGE.NAME goes to that stage."""
    if not alone:
        return values_by_notebook(known, given)
    target = list(known)[-1]
    own = {name: value for name, value in given.items()
           if len(known) == 1 or ("." not in name and name not in OF_ALL)}
    values = values_by_notebook(known, {name: value for name, value in given.items() if name not in own})
    return values | {target: addressed(target, known[target], own) | values[target]}


def _axes(paths: Sequence[str], known: Mapping, given: Mapping[str, str], alone: bool, out: Path, drawn: bool) -> dict:
    """The values of each parameter. Raises ParameterError that lists every wrong name and value."""
    errors: dict[str, None] = {}
    axes: dict[str, list[str] | Range] = {}
    for name, text in given.items():
        try:
            stems = _distributed({name: "0"}, known, alone)
            kinds = (known[stem][own].type for stem, values in stems.items() for own in values if own in known[stem])
            axes[name] = axis(name, text, drawn=drawn, integer=next(kinds, "") == "int")
        except ParameterError as error:
            errors[str(error)] = None
            continue
        values = axes[name]
        for value in (values.low, values.high) if isinstance(values, Range) else values:
            try:
                _spec(paths, known, {name: int(value) if isinstance(values, Range) and values.integer else value},
                      alone, out)
            except ParameterError as error:
                errors |= dict.fromkeys(str(error).split("\n"))
    _raise(errors)
    return axes


def _spec(paths: Sequence[str], known: Mapping, chosen: Mapping[str, object], alone: bool, out: Path,
          varied: Sequence[str] = ()) -> Spec:
    """The job with the chosen values, which are converted and checked one by one; `varied` come first in its ID."""
    given = _distributed(chosen, known, alone)
    values, errors = {}, {}
    for path in paths:
        stem = Path(path).stem
        try:
            job = notebook_job(Path(path), out / "jobs" / "ID", known[stem], given[stem])
            values[stem] = {name: job.values[name] for name in given[stem]}
        except ParameterError as error:
            errors |= dict.fromkeys(str(error).split("\n"))
    _raise(errors, most=None)
    shown = {}
    for name in chosen:
        stem, own = next((stem, own) for stem, each in _distributed({name: chosen[name]}, known, alone).items()
                         for own in each)
        shown[name] = values[stem][own]
    name = Path(paths[-1]).stem if alone else COURSE
    return Spec(job_id(name, shown, _differing(values, known), varied), tuple(paths), values, shown, alone)


def _differing(values: Mapping[str, Mapping], known: Mapping) -> dict:
    """The values that are not the defaults: giving a default is the same job as not giving it."""
    return {stem: changed for stem, given in values.items()
            if (changed := {name: value for name, value in given.items() if value != known[stem][name].default})}


def _check(specs: Sequence[Spec], out: Path) -> None:
    """Raise what is wrong with the jobs' values, all of it, and then with a model or data, each checked once."""
    errors: dict[str, None] = {}
    checked: set[str] = set()
    for spec in specs:
        jobs = as_jobs(spec, out / "jobs" / spec.id)
        try:
            for job in jobs:
                check_values(job)
        except ParameterError as error:
            errors[str(error)] = None
    _raise(errors)
    names = ("model", *READING, "data", "skip_bad", "reward", "refusal_prompts")
    for spec in specs:
        jobs = as_jobs(spec, out / "jobs" / spec.id)
        inputs = content_hash([[job.settings.get(name) for name in names] for job in jobs])
        if inputs not in checked:
            checked.add(inputs)
            try:
                check_before(jobs)
            except (ParameterError, DataError, RunError) as error:
                raise type(error)(f"{_words(spec.shown)}: {error}" if spec.shown else str(error)) from None


def _share(specs: Sequence[Spec], known: Mapping) -> tuple[list[Spec], dict[str, Spec]]:
    """The jobs with their bases, and the shared jobs by ID.

    The first notebooks of several jobs are shared where their values are equal. A job that runs its last notebook alone
    has a base in any case. A run belongs to one seed, so a shared series must have a notebook that knows it; a base
    that knows none serves all seeds (`job._own_seed`).
    """
    def series(spec: Spec, length: int) -> str:
        stems = [Path(path).stem for path in spec.notebooks[:length]]
        return content_hash([[stem, _differing({stem: spec.values[stem]}, known)] for stem in stems])

    counts = Counter(series(spec, length) for spec in specs for length in range(len(spec.notebooks) + 1))
    shared: dict[str, Spec] = {}
    jobs = []
    for spec in specs:
        last = len(spec.notebooks) - 1
        knows_seed = list(itertools.accumulate(("seed" in known[Path(path).stem] for path in spec.notebooks), max))
        base = None
        for length in range(1, last + 1):
            forced = spec.alone and length == last
            here, after = counts[series(spec, length)], counts[series(spec, length + 1)]
            if not forced and (here < 2 or here == after or not knows_seed[length - 1]):
                continue
            paths = spec.notebooks[:length]
            stem = Path(paths[-1]).stem
            values = {Path(path).stem: spec.values[Path(path).stem] for path in paths}
            shown = {name: value for name, value in spec.shown.items() if _reaches(name, values)}
            made = Spec(f"{stem}_{job_id(stem, shown, _differing(values, known))}", paths, values, shown, False, base,
                        True)
            shared.setdefault(made.id, made)
            base = made.id
        jobs.append(replace(spec, base=base))
    return jobs, shared


def _reaches(name: str, values: Mapping[str, Mapping]) -> bool:
    """Whether a given name stands for a value of one of these notebooks."""
    stage, _, own = name.rpartition(".")
    return any(own in given and (not stage or stage in (stem, CHAIN.get(stem)) or stem.startswith(stage))
               for stem, given in values.items())


def _words(shown: Mapping[str, object]) -> str:
    return " ".join(f"{name}={value}" for name, value in shown.items())


def _raise(errors: Mapping[str, None], most: int | None = MOST_ERRORS) -> None:
    if errors:
        lines = list(errors)[:most]
        more = [f"… and {len(errors) - len(lines)} more"] if len(errors) > len(lines) else []
        raise ParameterError("\n".join([*lines, *more]))
