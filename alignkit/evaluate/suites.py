"""The papers' evaluation suites for a checkpoint, in the groups of Ivison et al. 2024, *Unpacking DPO and PPO*
(https://arxiv.org/abs/2406.09279), and their average.

A suite is a line of SUITES. Any other name is a task of lm-evaluation-harness, either built in or from your folder.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from alignkit.errors import ManifestError, ParameterError
from alignkit.evaluate import file_suites, harness
from alignkit.evaluate.suite_records import Measurement, Score, add_suites, read_suites, score
from alignkit.formulas.intervals import Estimate

GROUPS = ("factuality", "reasoning", "coding", "truthfulness", "safety", "instruction following")


@dataclass(frozen=True)
class Options:
    """Settings of a suite measurement. suite: the current suite; file: the user's file with its items, if any;
    prepared: the data that `Suite.prepare` loaded. known: names to suggest for an unknown one.

    tasks: a folder of lm-eval's task files. limit: maximum number of items per task, None for all. batch_size:
    sequences per forward pass. run_model_code: whether programs that the model wrote may run.
    """

    suite: "Suite | None" = None
    file: str | None = None
    tasks: Path | None = None
    limit: int | None = None
    batch_size: int = 8
    seed: int = 0
    run_model_code: bool = False
    known: tuple[str, ...] = ()
    prepared: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """A suite: `measure(checkpoint, options)` returns its figures, metric -> Estimate; the first is the suite's main
    figure.

    group: one of GROUPS, if larger is better and the maximum is 1; "" for none. task, shots, metric: the lm-eval task,
    its number of few-shot examples (None: as the task says) and its metric (None: all). prepare(options) raises the
    errors that `measure` would raise, before any suite is measured. source: the origin of the suite.
    """

    name: str
    group: str = ""
    task: str = ""
    shots: int | None = None
    metric: str | None = None
    source: str = ""
    measure: Callable[["Measured", Options], Mapping[str, Estimate]] = harness.measure
    prepare: Callable[[Options], None] = harness.prepare


SUITES = {suite.name: suite for suite in (
    Suite("mmlu", "factuality", "mmlu", 0, "acc",
          "Hendrycks et al. 2021: multiple choice in 57 subjects; mean over items"),
    Suite("gsm8k", "reasoning", "gsm8k_cot", 8, "exact_match,flexible-extract",
          "Cobbe et al. 2021: school mathematics, chain of thought; the last number is the answer"),
    Suite("bbh", "reasoning", "bbh_cot_fewshot", 3, "exact_match,get-answer",
          "Suzgun et al. 2022: 27 hard tasks of BIG-Bench, chain of thought"),
    Suite("humaneval_plus", "coding", "humaneval_plus", 0, "pass@1,create_test",
          "Liu et al. 2023: functions to complete, with more tests; runs what the model wrote"),
    Suite("mbpp_plus", "coding", "mbpp_plus", 3, "pass_at_1",
          "Liu et al. 2023: short programs, with more tests; runs what the model wrote"),
    Suite("truthfulqa", "truthfulness", "truthfulqa_mc2", 0, "acc",
          "Lin et al. 2022: probability of true answers (MC2); six questions stand in the prompt"),
    Suite("toxigen", "safety", "toxigen", 0, "acc",
          "Hartvigsen et al. 2022: is a statement hateful? (the paper counts toxic continuations instead)"),
    Suite("ifeval", "instruction following", "ifeval", 0, "prompt_level_loose_acc",
          "Zhou et al. 2023: instructions that a program can check; all of a prompt's followed, loosely read"),
    Suite("xstest", source="Röttger et al. 2024: safe prompts refused, unsafe ones complied with; a file of yours",
          measure=file_suites.measure_refusals, prepare=file_suites.prepare_refusals),
    Suite("rewardbench", source="Lambert et al. 2024: pairs that a reward model should rank; a file of yours",
          measure=file_suites.measure_rewardbench, prepare=file_suites.prepare_rewardbench),
)}


class Measured:
    """The checkpoint to measure: its folder `path`, `name`, `hash`, and its model, loaded on first use as a policy, or
    as a reward model (`scorer`).

    A frozen checkpoint is verified first. Raises ManifestError if it cannot be trusted.
    """

    def __init__(self, path: str | Path):
        from alignkit.runs.frozen import checkpoint_hash

        self.path = Path(path)
        self.name = "/".join(self.path.absolute().parts[-2:])
        self.hash = checkpoint_hash(self.path)

    @cached_property
    def _loaded(self):
        from alignkit.models.loading import load_policy

        try:
            return load_policy(self.path)
        except ValueError as error:
            raise ManifestError(f"{self.path} holds no policy: {error}") from error

    @cached_property
    def scorer(self):
        """The RewardScorer in the folder. Raises ManifestError if it holds none."""
        from alignkit.reward import RewardScorer

        try:
            return RewardScorer.load(self.path)
        except ValueError as error:
            raise ManifestError(f"{self.path} holds no reward model: {error}") from error

    @property
    def model(self):
        """The policy, in evaluation mode."""
        return self._loaded[0].eval()

    @property
    def tokenizer(self):
        """Its tokenizer."""
        return vars(self)["scorer"].tokenizer if "scorer" in vars(self) else self._loaded[1]

    @property
    def chat_template(self) -> bool:
        """Whether the tokenizer has a chat template, through which prompts then go."""
        return bool(getattr(self.tokenizer, "chat_template", None))


def run_suites(checkpoint: str | Path, suites: Sequence[str], *, tasks: str | Path | None = None,
               limit: int | None = None, batch_size: int = 8, seed: int = 0, run_model_code: bool = False,
               out: str | Path | None = None) -> list[Measurement]:
    """Measure a checkpoint folder with suites, by name; returns each figure, and adds it to OUT/suites.json.

    A suite that needs a file is named with it: xstest=FILE (`read_refusal_prompts`), or rewardbench=FILE, for which
    `checkpoint` is a reward model (`read_rewardbench`).

    out: by default the checkpoint's own folder, where `compare` and `report` look for results. The data of all suites
    are loaded first. Each suite is recorded when it is done, so its results are kept if a later one fails. tasks: a
    folder of lm-eval's task files (YAML), which can run code, like a Python file. seed: of the few-shot examples that a
    task draws, and of sampling. Other arguments as in `Options`. Raises ParameterError on an unknown suite or option,
    MissingExtra without lm-eval, DataError if data are missing, ManifestError if the checkpoint cannot be trusted,
    RunError if suites.json is torn. Interval: value ± 1.96 standard errors over the items.
    """
    names = list(dict.fromkeys(name.strip() for name in suites if name.strip()))
    if not names:
        raise ParameterError(f"suites is empty, expected names such as {', '.join(SUITES)}")
    for name, value in {"limit": limit, "batch_size": batch_size}.items():
        if value is not None and value < 1:
            raise ParameterError(f"{name} is {value}, expected 1 or more")
    if tasks is not None and not Path(tasks).is_dir():
        raise ParameterError(f"tasks is {str(tasks)!r}, which is not a folder")
    options = Options(tasks=None if tasks is None else Path(tasks), limit=limit, batch_size=batch_size, seed=seed,
                      run_model_code=run_model_code, known=tuple(SUITES))
    out = Path(checkpoint if out is None else out)
    read_suites(out)  # find a torn record now, not after hours
    measured, rows = Measured(checkpoint), []
    asked = [replace(options, suite=SUITES.get(name) or Suite(name, task=name), file=file or None)
             for name, _, file in (name.partition("=") for name in names)]
    for each in asked:
        each.suite.prepare(each)
    for each in asked:
        figures = each.suite.measure(measured, each)
        rows += (new := [_row(measured, each, metric, figure) for metric, figure in figures.items()])
        add_suites(out, new)
    return rows


def _row(measured: Measured, options: Options, metric: str, figure: Estimate) -> Measurement:
    from alignkit.runs.records import versions
    from alignkit.storage import file_hash

    file = options.file if options.file and Path(options.file).is_file() else None
    extra = {name: getattr(figure, name, None) for name in ("stderr", "n", "shots")}
    return Measurement(measured.name, measured.hash, options.suite.name, metric, figure.value, figure.low, figure.high,
                       **extra, limit=options.limit, seed=options.seed, chat_template=measured.chat_template,
                       versions={**versions(), **_version_of("lm_eval")},
                       date=datetime.now(UTC).isoformat(timespec="seconds"), note=getattr(figure, "note", ""),
                       file=f"{Path(file).name} {file_hash(file)[:8]}" if file else options.file or "")


def _version_of(package: str) -> dict[str, str]:
    import importlib.metadata

    try:
        return {package: importlib.metadata.version(package)}
    except importlib.metadata.PackageNotFoundError:
        return {}


# --- groups, and lines of a table -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Line:
    """A line in a table of suites: name and description, its score, and the limit if not all items were measured."""

    label: str
    about: str
    score: Score
    limit: int | None

    @property
    def cut(self) -> str:
        """The remark for a figure that was measured on a part of the items."""
        return "" if self.limit is None else f" (cut: limit {self.limit})"

    def __str__(self) -> str:
        return f"{self.score:{self.spec}}{self.cut}"

    @property
    def spec(self) -> str:
        """The format of a score: as a percentage if possible."""
        return ".1%" if 0 <= self.score.value <= 1 else ".3g"


def lines(measured: Iterable[Measurement]) -> dict[str, Line]:
    """Suite results of one checkpoint, label -> Line: suites of the table, other suites, groups, average.

    A group's value is the unweighted mean of its suites' main figures; the average is the mean of the groups. Their
    standard errors are √Σ SE² / k, because the suites share no items. A group with a missing suite has no line, and
    then there is no average (`missing` lists the suites).
    """
    rows = sorted(measured, key=lambda row: [*SUITES, row.suite].index(row.suite))
    shown, main = {}, {}
    for row in rows:
        suite = SUITES.get(row.suite, Suite(row.suite))
        name = f"{row.suite} of {row.file}" if row.file else row.suite
        label = name if suite.metric else f"{name}, {row.metric}"
        about = [suite.group] * bool(suite.group) + [row.metric] * bool(suite.metric)
        about += [f"{row.shots} shots"] * (row.shots is not None)
        about += [] if row.n is None else [f"{row.n:,} items"]
        shown[label] = Line(label, ", ".join(about), row.score, row.limit)
        main.setdefault(row.suite, shown[label])
    means = {}
    for group in GROUPS:
        names = [suite.name for suite in SUITES.values() if suite.group == group]
        if names and all(name in main for name in names):
            means[group] = _mean(group, f"mean of {', '.join(names)}", [main[name] for name in names])
    shown |= {line.label: line for line in means.values()}
    if len(means) == len(GROUPS):
        average = _mean("average", "mean of the groups", list(means.values()))
        shown[average.label] = average
    return shown


def missing(measured: Iterable[Measurement]) -> list[str]:
    """The suites that were not measured and without which there is no average."""
    known = {row.suite for row in measured}
    return [suite.name for suite in SUITES.values() if suite.group and suite.name not in known]


def remarks(measured: Mapping[str, Iterable[Measurement]]) -> list[str]:
    """Explanations of a table of suites (checkpoint -> figures)."""
    rows = {name: list(each) for name, each in measured.items()}
    if not any(rows.values()):
        return []
    lines = ["Suites: each checkpoint was measured alone, with intervals over the items, so that differences "
            "are not paired."]
    if any(row.limit is not None for each in rows.values() for row in each):
        lines.append("What is marked as cut was measured on the first items of each task alone (--limit): try-outs, no "
                    "results to report.")
    for name, each in rows.items():
        without = missing(each)
        if without and any(SUITES.get(row.suite, Suite("")).group for row in each):
            lines.append(f"{name}: no average of the groups without {', '.join(without)}.")
        notes = dict.fromkeys((row.suite, row.note) for row in each if row.note)
        lines += [f"{name}, {suite}: {note}" for suite, note in notes]
        if templates := {row.chat_template for row in each}:
            used = "; ".join("with the model's chat template" if used else "without a chat template"
                             for used in sorted(templates))
            lines.append(f"{name}: suites were asked {used}.")
    return lines


def table(measured: Mapping[str, Iterable[Measurement]]) -> list[list[str]]:
    """A heading line, then for each suite, group and average its label, description, and each checkpoint's value."""
    columns = {name: lines(each) for name, each in measured.items()}
    labels = {label: line.about for column in columns.values() for label, line in column.items()}
    return [["suite", "", *columns], *([label, about, *(str(column.get(label, "–")) for column in columns.values())]
                                       for label, about in labels.items())]


def _mean(label: str, about: str, parts: list[Line]) -> Line:
    scores = [part.score for part in parts]
    errors = [each.stderr for each in scores]
    stderr = None if None in errors else math.sqrt(math.fsum(error**2 for error in errors)) / len(errors)
    value = math.fsum(each.value for each in scores) / len(scores)
    limits = [part.limit for part in parts if part.limit is not None]
    return Line(label, about, score(value, stderr), min(limits, default=None))
