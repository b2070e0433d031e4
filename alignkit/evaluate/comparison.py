"""Compare checkpoints on the same prompts and the same random numbers: paired differences, a table and pictures."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from alignkit.errors import ManifestError, NonFinite
from alignkit.evaluate import suites
from alignkit.evaluate.adviser import advice, chance_warning
from alignkit.evaluate.decision import decide
from alignkit.evaluate.evaluation import Evaluation, EvaluationSet, difference, evaluate, evaluation_set, win_rate
from alignkit.evaluate.suite_records import Measurement, suites_of
from alignkit.folders import recover
from alignkit.formulas.intervals import Estimate
from alignkit.metrics import METRICS
from alignkit.models.loading import load_policy, same_vocabulary
from alignkit.runs.frozen import LINEAGE, MANIFEST, read_lineage, verify
from alignkit.runs.records import check_not_fetched, run_facts
from alignkit.safe_text import csv_cell, markdown_cell, one_line
from alignkit.sources import local_path
from alignkit.storage import plain, read_json, write_atomically, write_json
from alignkit.task import load_task

TABLE = (  # the metrics of the table, in order
    "gold_mean", "proxy_mean", "risky_failure_rate", "over_refusal_rate", "answered_gold", "kl_to_sft",
    "kl_rao_blackwell", "kl_k3", "self_agreement", "paraphrase_agreement", "entropy", "sequence_entropy", "length",
    "eos_rate", "distinct_1", "distinct_2",
)
PANELS = (  # the metrics drawn with their intervals
    "gold_mean", "proxy_mean", "kl_to_sft", "risky_failure_rate", "over_refusal_rate", "paraphrase_agreement",
    "self_agreement", "entropy", "length",
)


@dataclass(frozen=True)
class Comparison:
    """Evaluations of several checkpoints on one evaluation set, by name, in order; the first is the reference.

    suites: the results of evaluation suites, by checkpoint name, where they were measured.
    """

    evaluations: dict[str, Evaluation]
    notes: tuple[str, ...] = field(default=())
    warning: str = ""  # why the proxy is not meaningful
    suites: Mapping[str, Sequence[Measurement]] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """The name of the first checkpoint."""
        return next(iter(self.evaluations))

    def difference(self, first: str, second: str, metric: str) -> Estimate:
        """metric(second) − metric(first) with its paired 95 % interval."""
        return difference(self.evaluations[first], self.evaluations[second], metric)

    @cached_property
    def differences(self) -> dict[str, dict[str, Estimate]]:
        """Paired differences of each later checkpoint to the first: name -> metric -> Estimate."""
        known = self.evaluations[self.reference].metrics
        return {name: {metric: self.difference(self.reference, name, metric)
                       for metric in evaluation.metrics if metric in known}
                for name, evaluation in self.evaluations.items() if name != self.reference}

    @cached_property
    def win_rates(self) -> dict[str, dict[str, Estimate]]:
        """Win rate of each later checkpoint against the first, ties ½: name -> "gold" | "proxy" -> Estimate."""
        first = self.evaluations[self.reference]
        return {name: {score: win_rate(first, evaluation, score) for score in ("gold", "proxy")
                       if score in first.columns and score in evaluation.columns}
                for name, evaluation in self.evaluations.items() if name != self.reference}

    def table(self) -> list[dict]:
        """One row per checkpoint: {"checkpoint": name, metric: Estimate, …, "win_rate_gold": Estimate, …}."""
        rows = []
        for name, evaluation in self.evaluations.items():
            known = {metric: evaluation.metrics[metric] for metric in TABLE if metric in evaluation.metrics}
            wins = {f"win_rate_{score}": rate for score, rate in self.win_rates.get(name, {}).items()}
            rows.append({"checkpoint": name, **known, **wins})
        return rows

    def cells(self) -> list[list[str]]:
        """The table as text: a heading line, then a line for each metric with a column for each checkpoint.

        "*" marks a value whose paired difference to the first checkpoint has an interval that excludes 0.
        """
        rows = self.table()
        lines = [["", *self.evaluations]]
        for metric in TABLE:
            if not any(metric in row for row in rows):
                continue
            cells = []
            for row in rows:
                changed = self.differences.get(row["checkpoint"], {}).get(metric)
                mark = "*" if changed and changed.excludes_zero else ""
                cells.append(f"{row[metric]:{METRICS[metric].spec}}{mark}" if metric in row else "–")
            lines.append([METRICS[metric].title(self.reference), *cells])
        for score in ("gold", "proxy"):
            wins = [row.get(f"win_rate_{score}") for row in rows]
            if any(wins):
                lines.append([f"wins over {self.reference}, {score}", *(f"{win:.1%}" if win else "–" for win in wins)])
        measured = {name: self.suites.get(name, ()) for name in self.evaluations}
        return [*lines, *([label, *cells] for label, _, *cells in suites.table(measured)[1:])]

    def __str__(self) -> str:
        lines = [[*map(one_line, line)] for line in self.cells()]
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
        remarks = [one_line(remark, 5000) for remark in self.remarks()]
        return "\n".join([*("  ".join(line).rstrip() for line in padded), "", *remarks])

    def markdown(self) -> str:
        """The table as Markdown."""
        head, *lines = [[*map(markdown_cell, line)] for line in self.cells()]
        ruled = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
        remarks = (f"{markdown_cell(remark, 5000)}\n" for remark in self.remarks())
        return "\n".join([*("| " + " | ".join(line) + " |" for line in ruled), "", *remarks])

    def remarks(self) -> list[str]:
        """Explanations of the table, remarks on how it was made, what to do next if the checkpoints are in the order of
        training, and advice."""
        evalset = self.evaluations[self.reference].set
        about = (f"{len(evalset.prompts)} prompts × {evalset.samples} samples, evaluation set {evalset.hash[:12]}. In "
                 f"brackets: 95 % intervals, paired cluster bootstrap over {len(set(evalset.keys))} prompt keys. "
                 f"*: differs from {self.reference}.")
        said, reason, *_ = str(decide(self)).splitlines()
        return [*filter(None, [self.warning]), about, *self.notes, *suites.remarks(self.suites),
                f"What next? {said[:1].upper()}{said[1:]}. {reason}", *advice(self)]

    def to_csv(self) -> str:
        """A line per checkpoint and metric: value, low, high, and the difference to the first with its low and high."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        change_columns = ["difference", "difference_low", "difference_high"]
        writer.writerow(["checkpoint", "metric", "value", "low", "high", *change_columns])
        for row in self.table():
            for metric, estimate in row.items():
                if isinstance(estimate, Estimate):
                    change = self.differences.get(row["checkpoint"], {}).get(metric)
                    cells = [row["checkpoint"], metric, estimate.value, estimate.low, estimate.high,
                             *((change.value, change.low, change.high) if change else ("", "", ""))]
                    writer.writerow(map(csv_cell, cells))
        for name, measured in self.suites.items():
            for line in suites.lines(measured).values():
                cells = [name, line.label + line.cut, line.score.value, line.score.low, line.score.high, "", "", ""]
                writer.writerow(map(csv_cell, cells))
        return text.getvalue()

    def to_dict(self) -> dict:
        """Everything as plain numbers and text, for compare.json and for the HTML page."""
        return plain({
            "reference": self.reference, "evaluation_set": self.evaluations[self.reference].set.hash,
            "checkpoints": {name: evaluation.summary() for name, evaluation in self.evaluations.items()},
            "differences": self.differences, "win_rates": self.win_rates, "table": self.cells(),
            "suites": {name: list(measured) for name, measured in self.suites.items()},
            "remarks": self.remarks(), "samples": self.samples(),
        })

    def samples(self, prompts_per_kind: int = 2, responses: int = 2) -> list[dict]:
        """Responses of all checkpoints to a few prompts of each class: {"prompt", "kind", "responses": {name: [text,
        …]}}."""
        evalset = self.evaluations[self.reference].set
        shown = []
        for kind in dict.fromkeys(evalset.kinds):
            keys = {}
            for position, (key, own_kind) in enumerate(zip(evalset.keys, evalset.kinds, strict=True)):
                if own_kind == kind:
                    keys.setdefault(key, position)
            for position in list(keys.values())[:prompts_per_kind]:
                start = position * evalset.samples
                shown.append({"prompt": str(evalset.prompts[position]), "kind": kind, "responses": {
                    name: evaluation.columns["response"][start : start + min(responses, evalset.samples)]
                    for name, evaluation in self.evaluations.items()}})
        return shown

    def pictures(self) -> dict:
        """Matplotlib figures by name: intervals, and in the desk world also behaviour and tradeoff."""
        from alignkit import plots

        panels = {}
        for metric in PANELS:
            values = {name: (e.value,) if e.low is None else (e.value, e.low, e.high)
                      for name, evaluation in self.evaluations.items() if (e := evaluation.metrics.get(metric))}
            if values:
                panels[METRICS[metric].title(self.reference)] = values
        figures = {"intervals": plots.plot_intervals_panels(panels)}
        summaries = {name: evaluation.summary() for name, evaluation in self.evaluations.items()}
        if all(summary["behaviour_shares"] for summary in summaries.values()):
            shares = {name: summary["behaviour_shares"] for name, summary in summaries.items()}
            figures["behaviour"] = plots.plot_behaviour(shares)
        if all({"over_refusal_rate", "risky_failure_rate"} <= summary.keys() for summary in summaries.values()):
            figures["tradeoff"] = plots.plot_tradeoff(
                [{"name": name, **summary} for name, summary in summaries.items()])
        return figures


def compare(evaluations: Mapping[str, Evaluation], notes: Sequence[str] = (), warning: str = "",
            suites: Mapping[str, Sequence[Measurement]] | None = None) -> Comparison:
    """Compare evaluations, and the results of suites. warning: shown in red above the comparison. Raises ValueError if
    the evaluation sets or the units of gold differ."""
    if not evaluations:
        raise ValueError("evaluations is empty, expected at least one checkpoint")
    comparison = Comparison(dict(evaluations), tuple(notes), warning, suites or {})
    _ = comparison.differences  # raises if they cannot be paired
    return comparison


def compare_directories(directories: Sequence[str | Path], data: str | None = None, out: str | Path | None = None, *,
                        reward=None, seed: int | None = None, prompts: int = 192, samples: int = 8,
                        batch_size: int = 512, kind: str | None = None, split: str | None = None,
                        columns: str | None = None) -> Comparison:
    """Evaluate checkpoint folders on one evaluation set; write table, pictures, page and JSON to `out`.

    A folder with a manifest is verified first: ManifestError if a byte differs. KL is measured against the first
    folder, which also sets the scale of gold. If the first folder lies in a run with the same data, that run's
    evaluation_set.json, seed and reward model are used; otherwise `prompts` held-out prompts of `data` (seed 0 by
    default). data: by default that of the first folder's run, else the desk world. reward: a callable prompts,
    responses -> scores.
    kind, split, columns: how to read `data`, as in `load_task`; by default as in the run, if `data` is the run's. The
    results in a folder's suites.json are shown too.
    Writes compare.md, compare.csv, compare.json, compare.html and PNG files.
    """
    directories = [Path(directory) for directory in directories]
    for directory in directories:  # check that all exist before the first is loaded
        recover(directory)
        local_path(directory, error=ManifestError)
    loaded = {name: _load(directory) for name, directory in zip(_names(directories), directories, strict=True)}
    first, tokenizer = next(iter(loaded.values()))
    run = directories[0].parent
    facts = run_facts(run)
    if data is None:
        check_not_fetched(run, facts, "data", "--data ")
        data = facts.get("data", "desk")
    of_run = facts.get("data") == str(data)
    reading = {name: facts.get(name) if value is None and of_run else value
               for name, value in {"kind": kind, "split": split, "columns": columns}.items()}
    task = load_task(data, tokenizer, seed=seed if seed is not None else facts.get("seed", 0) if of_run else 0,
                     **reading)
    if of_run and seed is None and (run / "evaluation_set.json").exists():
        evalset = EvaluationSet.load(run / "evaluation_set.json")
    else:
        evalset = evaluation_set(task, prompts=prompts, samples=samples)
    warning = ""
    if reward is None and of_run and (run / "reward" / "config.json").exists():
        from alignkit.reward import load_reward

        reward = load_reward(run / "reward")
        if (run / "reward" / "results.json").exists():
            warning = chance_warning(read_json(run / "reward" / "results.json"))
    notes = [f"{name} was frozen with another evaluation set ({frozen_with[:12]}…)."
             for name, directory in zip(loaded, directories, strict=True)
             if (frozen_with := _frozen_with(directory)) not in (None, evalset.hash)]
    measured = {}
    for name, directory in zip(loaded, directories, strict=True):
        rows, remark = suites_of(directory)
        measured |= {name: rows} if rows else {}
        notes += [f"{name}: {remark}"] if remark else []
    evaluations, scale = {}, None
    for name, (policy, own_tokenizer) in loaded.items():
        same = same_vocabulary(tokenizer, own_tokenizer)
        if not same:
            notes.append(f"{name} has another vocabulary than {next(iter(loaded))}: there is no KL between them.")
        evaluations[name] = evaluate(policy, own_tokenizer, evalset, ref_policy=first if same else None, reward=reward,
                                     world=task.world, gold_scale=scale, batch_size=batch_size, name=name)
        scale = evaluations[name].gold_scale
    comparison = compare(evaluations, notes, warning, measured)
    if out is not None:
        _write(comparison, Path(out))
    return comparison


def _load(directory: Path):
    recover(directory)
    if (directory / MANIFEST).exists():
        verify(directory)
    try:
        return load_policy(directory)
    except NonFinite:
        raise
    except ValueError as error:
        raise ManifestError(f"{directory}: {error}") from error


def _names(directories: Sequence[Path]) -> list[str]:
    """The shortest path endings that distinguish the folders."""
    paths = [directory.absolute().parts for directory in directories]
    if len(set(paths)) < len(paths):
        raise ManifestError(f"a folder is given twice: {', '.join(map(str, directories))}")
    depth = 1
    while len({path[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path[-depth:]) for path in paths]


def _frozen_with(directory: Path) -> str | None:
    return read_lineage(directory).get("evaluation_set_hash") if (directory / LINEAGE).exists() else None


def _write(comparison: Comparison, out: Path) -> None:
    from alignkit import plots
    from alignkit.pages.render import picture, render

    out.mkdir(parents=True, exist_ok=True)
    pictures = []
    for name, figure in comparison.pictures().items():
        path = plots.save_figure(figure, out / f"{name}.png")
        pictures.append(picture(path.read_bytes(), plots.describe(figure.get_figure(root=True))))
    write_atomically(out / "compare.md", comparison.markdown())
    write_atomically(out / "compare.csv", comparison.to_csv())
    samples = [{**sample, "responses": list(sample["responses"].values())} for sample in comparison.samples()]
    remarks = [remark for remark in comparison.remarks() if remark != comparison.warning]
    page = render("compare.html", names=list(comparison.evaluations), cells=comparison.cells(), remarks=remarks,
                  warning=comparison.warning, pictures=pictures, samples=samples)
    write_atomically(out / "compare.html", page)
    write_json(out / "compare.json", comparison.to_dict())
