"""report.html: a whole run on one page.

The charts are the PNG outputs of the executed notebooks' cells tagged `report` (of all cells if a notebook has no such
tag). A chart's caption is the cell's metadata `caption`, or the comment on its first line. Sample responses come from
RUN/STAGE/samples.json: [{"prompt", "response", "stage", "kind"}, …].
"""

import base64
import binascii
import itertools
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from alignkit.errors import AlignkitError, RunError
from alignkit.evaluate.adviser import chance_warning
from alignkit.evaluate.readings import METADATA
from alignkit.jobs.notebook_page import write_notebook_page
from alignkit.metrics import METRICS, duration, is_number, number, share
from alignkit.pages.render import Picture, picture, render
from alignkit.safe_text import in_red, one_line
from alignkit.stages import CHAIN, STAGES, in_order
from alignkit.storage import read_json, write_atomically

PROMPTS = 24  # number of prompts whose responses are shown
POLICY_FIGURES = ("gold_mean", "proxy_mean", "kl_to_sft", "risky_failure_rate", "over_refusal_rate",
                  "paraphrase_agreement", "self_agreement", "answered_gold", "entropy", "length", "eos_rate")
REWARD_FIGURES = ("accuracy_labels", "bayes_accuracy", "accuracy_gold", "ece")


def build_report(run: str | Path) -> Path:
    """Write RUN/report.html from the available results in the run directory; returns its path.

    Raises RunError if `run` is not a run directory.
    """
    seen = _Run(Path(run))
    policies = {stage: results for stage, results in seen.stages.items() if stage != "reward"}
    samples, sampled = _samples(seen)
    suites, torn = _suites(seen)
    verdict, warnings = _verdict(seen)
    page = render(
        "report.html",
        name=seen.name,
        verdict=verdict,
        facts={name: value for name in ("model", "data", "seed") if (value := seen.summary.get(name)) is not None},
        seconds=seen.seconds,
        chain=_chain(seen),
        failures=_failures(seen) + warnings + torn,
        policies=["Frozen" if stage == "frozen" else _name(stage) for stage in policies],
        compared=_figures(POLICY_FIGURES + REWARD_FIGURES, list(policies.values())),
        suites=suites,
        notebooks=list(filter(None, (_notebook(seen, path) for path in seen.notebooks))),
        sampled=[_name(stage) for stage in sampled],
        samples=samples,
        command=shlex.join(_command(seen)),
        versions=list(_mapping(seen.summary.get("versions")).items()),
    )
    write_atomically(seen.path / "report.html", page)
    return seen.path / "report.html"


def overview(run: str | Path) -> str:
    """Summary for the terminal after a run: the main figures of each stage, and where to find the details."""
    run = Path(run)
    seen = _Run(run)
    headlines = {stage: ", ".join(_headline(seen, stage)) for stage in seen.stages}
    lines = [f"{one_line(_name(stage)):<20}{words}" for stage, words in headlines.items() if words]
    if warning := chance_warning(seen.stages.get("reward", {})):
        lines += ["", in_red(warning)]
    shown = run.relative_to(Path.cwd()) if run.is_relative_to(Path.cwd()) else run
    places = {"report": "report.html", "figures": "summary.json"}
    if seen.notebooks:
        names = dict.fromkeys((seen.notebooks[0].name, seen.notebooks[-1].name))
        places["executed notebooks"] = " … ".join(map(one_line, names))
    listed = [f"  {what + ':':<20}{name}" for what, name in places.items()]
    return "\n".join([*lines, "", f"in {one_line(shown)}", *listed])


# --- what is in a run directory --------------------------------------------------------------------------------------
class _Run:
    """The readable records of a run."""

    def __init__(self, run: Path):
        if not run.is_dir():
            raise RunError(f"{run} is not a run directory: there is no such folder")
        self.path, self.name = run, run.absolute().name
        self.jobs = _mapping(_json(run / "jobs.json"))
        self.summary = _mapping(_json(run / "summary.json"))
        self.notebooks = [path for path in sorted(run.glob("*.ipynb")) if not path.name.endswith(".new.ipynb")]
        if not self.jobs and not self.summary and not self.notebooks:
            raise RunError(f"{run} is not a run directory: no jobs.json, summary.json or executed notebook in it")
        results = _mapping(self.summary.get("stages"))
        self.stages = {stage: _mapping(results[stage]) for stage in in_order(results)}
        seconds = _mapping(self.summary.get("seconds"))
        self.seconds = {name: value for name, value in seconds.items() if is_number(value)}

    def job(self, name: str) -> Mapping:
        return _mapping(self.jobs.get(name))


def _json(path: Path) -> object:
    try:
        return _tame(read_json(path, object))
    except (OSError, RunError):
        return None


def _tame(value: object) -> object:
    """A JSON value whose numbers all fit into a float; larger ones become text."""
    if isinstance(value, dict):
        return {name: _tame(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_tame(item) for item in value]
    return value if not is_number(value) or abs(value) < 1e300 else f"{value:.10}" if isinstance(value, float) else "∞"


def _list(value: object) -> list:
    return value if isinstance(value, list) else []


def _joined(value: object) -> str:
    """Text of a notebook cell, which is stored as one string or a list of lines."""
    return "".join(line for line in ([value] if isinstance(value, str) else _list(value)) if isinstance(line, str))


def _mapping(value: object) -> Mapping:
    return value if isinstance(value, Mapping) else {}


def _charts(notebook: Path) -> list[Picture]:
    """The PNG outputs of the cells tagged `report`, or of all cells if none has the tag."""
    cells = [cell for cell in _list(_mapping(_json(notebook)).get("cells")) if _list(_mapping(cell).get("outputs"))]
    tagged = [cell for cell in cells if "report" in _list(_mapping(cell.get("metadata")).get("tags"))]
    return [chart for cell in tagged or cells for chart in _cell_charts(cell)]


def _readings(notebook: Path) -> list[list[str]]:
    """The printed readings of an executed notebook: [verdict and sentence, numbers] each."""
    outputs = [output for cell in _list(_mapping(_json(notebook)).get("cells"))
               for output in map(_mapping, _list(_mapping(cell).get("outputs")))]
    texts = [_joined(_mapping(output.get("data")).get("text/plain")) for output in outputs
             if METADATA in _mapping(output.get("metadata"))]
    return [[line.strip() for line in text.split("\n", 1)] for text in texts]


def _cell_charts(cell: Mapping) -> list[Picture]:
    first = _joined(cell.get("source")).strip().partition("\n")[0]
    comment = first.lstrip("# ") if first.startswith("#") else ""
    caption = _mapping(cell.get("metadata")).get("caption") or comment
    pictures = []
    for output in map(_mapping, cell["outputs"]):
        data, facts = _mapping(output.get("data")), _mapping(_mapping(output.get("metadata")).get("image/png"))
        try:
            png = base64.b64decode(_joined(data.get("image/png")))
        except (binascii.Error, ValueError):
            continue
        pictures.append(picture(png, facts.get("alt") or "", caption, facts.get("width")))
    return [chart for chart in pictures if chart]


# --- the verdict -----------------------------------------------------------------------------------------------------
def _verdict(seen: _Run) -> tuple[list[tuple[str, str]], list[dict]]:
    """Three sentences on the run: what was reached, what it cost, what to do next; and the warnings of its figures.

    [] if fewer than two policies have figures.
    """
    copied = {"reward", "frozen"} if "ppo" in seen.stages else {"reward"}  # frozen is PPO's policy
    policies = {stage: results for stage, results in seen.stages.items() if stage not in copied}
    if len(policies) < 2:
        return [], []
    results = list(policies.values())
    reached = _path(("gold_mean" if "gold_mean" in results[-1] else "proxy_mean", "risky_failure_rate"), results)
    cost = _path(("kl_to_sft", "over_refusal_rate"), results)
    if seen.seconds:
        cost.append(f"{duration(sum(seen.seconds.values()))} of computing")
    asks, warnings = _advised(seen.path)
    way = " → ".join(map(_name, policies))
    sentences = [("Reached", f"{way}: {'; '.join(reached)}." if reached else ""),
                 ("Cost", f"{'; '.join(cost)}." if cost else ""), ("Next", asks)]
    return [(what, sentence) for what, sentence in sentences if sentence], warnings


def _path(names: Sequence[str], policies: Sequence[Mapping]) -> list[str]:
    """Figures along the policies in which they are known, with the interval of the last one."""
    paths = []
    for name in names:
        known = [results for results in policies if is_number(results.get(name))]
        if len(known) > 1:
            metric, between = METRICS[name], _with_interval(known[-1], name)["between"]
            values = " → ".join(metric.format(results[name]) for results in known)
            unit = f" {metric.unit}" if metric.unit else ""
            interval = f" (95 % interval {between})" if between else ""
            paths.append(f"{metric.label.format(reference='SFT')} {values}{unit}{interval}")
    return paths


def _advised(run: Path) -> tuple[str, list[dict]]:
    """What to do next, by the adviser, and a warning if a later policy refuses more harmless prompts than an earlier
    one. From the stored evaluations of the stages; ("", []) if there are fewer than two, or if they do not match."""
    places = {stage: run / stage / "evaluation.json" for stage in ("sft", "ppo", "dpo")}
    places = {stage: place for stage, place in places.items() if place.exists()}
    if len(places) < 2:
        return "", []
    from alignkit.evaluate.adviser import advice  # which loads torch
    from alignkit.evaluate.comparison import compare
    from alignkit.evaluate.evaluation import Evaluation

    try:
        compared = compare({_name(stage): Evaluation.load(place) for stage, place in places.items()})
        asks, warnings = advice(compared)[0], []
        for earlier, later in itertools.pairwise(compared.evaluations):
            grown = _growth(compared, earlier, later)
            warnings += [{"heading": "Warning", "message": grown}] if grown else []
    except (AlignkitError, OSError, ValueError, KeyError):  # other people's files; the page has the figures without it
        return "", []
    return asks, warnings


def _growth(compared, earlier: str, later: str) -> str:
    """A warning if over-refusal rose between two policies, by its interval; else ""."""
    if any("over_refusal_rate" not in compared.evaluations[name].metrics for name in (earlier, later)):
        return ""
    growth = compared.difference(earlier, later, "over_refusal_rate")
    if growth.low is None or growth.low <= 0:
        return ""
    return (f"Over-refusal rose from {earlier} to {later}, by {growth:.1%}: it refuses more harmless prompts. Part of "
            "its gain in safety may be that.")


# --- the parts of the page -------------------------------------------------------------------------------------------
def _chain(seen: _Run) -> list[dict]:
    """The stages as cards in a row; each links to its section if it has one."""
    notebooks = {stage: name for name, stage in CHAIN.items() if stage}
    cards = []
    for position, (stage, (name, does)) in enumerate(STAGES.items(), 1):
        notebook = notebooks[stage]
        state = _state(seen, stage, notebook)
        cards.append({
            "number": position, "folder": stage, "name": name, "does": does, "state": state,
            "seconds": seen.seconds.get(notebook) if state == "done" else None, "headline": _headline(seen, stage),
            "notebook": notebook, "link": any(path.stem == notebook for path in seen.notebooks),
        })
    return cards


def _state(seen: _Run, stage: str, notebook: str) -> str:
    status = str(seen.job(notebook).get("status") or "")
    words = {"finished": "done", "running": "not finished", "timeout": "out of time", "": "not run"}
    return "done" if not status and stage in seen.stages else words.get(status, status)


def _headline(seen: _Run, stage: str) -> list[str]:
    results = seen.stages.get(stage, {})
    wanted = ("gold_mean" if "gold_mean" in results else "proxy_mean", "kl_to_sft", "risky_failure_rate")
    if stage == "reward":
        wanted = ("accuracy_labels", "bayes_accuracy", "ece")
    return [f"{_label(name)}: {METRICS[name].format(results[name])}" for name in wanted if is_number(results.get(name))]


def _failures(seen: _Run) -> list[dict]:
    """The errors shown in red at the top of the page."""
    warning = chance_warning(seen.stages.get("reward", {}))
    failures = [{"heading": "Warning", "message": warning}] if warning else []
    for name in seen.jobs:
        status, error = seen.job(name).get("status"), seen.job(name).get("error")
        if status not in (None, "finished"):
            message = error or "The process that ran it has ended, or is still at work."
            failures.append({"heading": f"{name}: {status}", "message": message})
    return failures


def _figures(names: Sequence[str], columns: Sequence[Mapping]) -> list[dict]:
    """A row for each figure that any of the results has: its name, and its formatted value in each column."""
    return [{"label": _label(name), "about": METRICS[name].about or METRICS[name].unit, "better": METRICS[name].better,
             "cells": [_with_interval(results, name) for results in columns]}
            for name in names if any(is_number(results.get(name)) for results in columns)]


def _with_interval(results: Mapping, name: str) -> dict:
    write, value = METRICS[name].format, results.get(name)
    interval = results.get(f"{name.removesuffix('_mean').removesuffix('_rate')}_ci95")
    if not is_number(value):
        return {"value": "–", "between": ""}
    between = ""
    if isinstance(interval, Sequence) and len(interval) == 2 and all(map(is_number, interval)):
        between = f"{write(interval[0])} to {write(interval[1])}"
    return {"value": write(value), "between": between}


def _suites(seen: _Run) -> tuple[dict | None, list[dict]]:
    """Suite results of the stages, as a table with remarks, and the records that cannot be read."""
    places = {path.parent.name: path.parent for path in seen.path.glob("*/suites.json")}
    if not places:
        return None, []
    from alignkit.evaluate import suites  # which loads torch
    from alignkit.evaluate.suite_records import suites_of

    measured, notes, torn = {}, [], []
    for stage in in_order(sorted(places)):
        try:
            rows, remark = suites_of(places[stage])
        except (AlignkitError, OSError) as error:
            torn.append({"heading": f"Suites of {_name(stage)}", "message": str(error)})
            continue
        measured |= {_name(stage): rows} if rows else {}
        notes += [f"{_name(stage)}: {remark}"] if remark else []
    columns = {name: suites.lines(rows) for name, rows in measured.items()}
    about = {label: line.about for column in columns.values() for label, line in column.items()}
    figures = [{"label": label, "about": words, "better": "",
                "cells": [_line(column.get(label)) for column in columns.values()]} for label, words in about.items()]
    table = {"stages": list(columns), "figures": figures, "remarks": [*suites.remarks(measured), *notes]}
    return (table if figures or notes else None), torn


def _line(line) -> dict:
    if line is None:
        return {"value": "–", "between": ""}
    low, high = line.score.low, line.score.high
    between = "" if low is None else f"{low:{line.spec}} to {high:{line.spec}}"
    return {"value": f"{line.score.value:{line.spec}}", "between": f"{between}{line.cut}".strip()}


def _notebook(seen: _Run, notebook: Path) -> dict | None:
    """A section about one notebook; None if there is nothing to show."""
    stage = CHAIN.get(notebook.stem)
    results = seen.stages.get(stage, {})
    heading = _name(stage) if stage else _words(notebook.stem)
    charts, readings = _charts(notebook), _readings(notebook)
    figures = _figures(POLICY_FIGURES + REWARD_FIGURES, [results]) if stage == "reward" else []
    rows, grids = _details(heading, results)
    page, shown = write_notebook_page(notebook), 1 if stage or len(seen.notebooks) == 1 else 0
    if not (charts or readings or figures or rows or grids):
        return None
    return {
        "id": notebook.stem, "file": notebook.name, "page": page.name if page else "",
        "more": _more(len(charts) - shown, len(readings)), "first": charts[:shown],
        "heading": heading, "seconds": seen.seconds.get(notebook.stem),
        "charts": charts[shown:], "readings": readings, "figures": figures, "results": rows, "grids": grids,
    }


def _more(charts: int, readings: int) -> str:
    """What a fold holds."""
    counted = ((charts, "chart"), (readings, "reading"))
    return ", ".join(f"{number} {what}{'s' * (number > 1)}" for number, what in counted if number > 0)


def _details(heading: str, results: Mapping) -> tuple[list, list[dict]]:
    """All figures of a stage: (name, value) of the scalars, and the tables (row -> column -> value)."""
    rows, grids = {}, []
    for name, value in results.items():
        if isinstance(value, Mapping) and value and all(isinstance(row, Mapping) and row for row in value.values()):
            write = share if name.endswith("shares") else number
            grids.append(_grid(f"{heading}: {name.replace('_', ' ')}", value, write))
        elif isinstance(value, Mapping):
            rows |= {f"{name}.{key}": item for key, item in value.items() if not isinstance(item, list | Mapping)}
        elif not isinstance(value, list):
            rows[name] = value
    return [(name, number(value)) for name, value in rows.items()], grids


def _grid(caption: str, grid: Mapping, write) -> dict:
    columns = list(dict.fromkeys(str(column) for row in grid.values() for column in row))
    rows = [[name, *(write(row.get(column)) for column in columns)] for name, row in grid.items()]
    return {"caption": caption, "head": ["", *columns], "rows": rows}


def _samples(seen: _Run) -> tuple[list[dict], list[str]]:
    """Prompts with up to three responses of each stage, and the stages; prompts with responses from most stages come
    first."""
    answers: dict[str, dict[str, list]] = {}  # prompt -> stage -> responses
    kinds: dict[str, object] = {}
    for path in sorted(seen.path.glob("*/samples.json")):
        rows = _json(path)
        for row in map(_mapping, rows if isinstance(rows, list) else []):
            if "prompt" in row and "response" in row:
                prompt, stage = str(row["prompt"]), str(row.get("stage") or path.parent.name)
                answers.setdefault(prompt, {}).setdefault(stage, []).append(row["response"])
                kinds.setdefault(prompt, row.get("kind") or "")
    stages = in_order(sorted({stage for responses in answers.values() for stage in responses}))
    shown = sorted(answers, key=lambda prompt: -len(answers[prompt]))[:PROMPTS]
    return [{"prompt": prompt, "kind": kinds[prompt],
             "responses": [answers[prompt].get(stage, [])[:3] for stage in stages]} for prompt in shown], stages


def _command(seen: _Run) -> list[str]:
    """The command that makes such a run, with all parameters that differ from their defaults."""
    names = [path.stem for path in seen.notebooks]
    alone = names[0] if len(names) == 1 and names[0] not in CHAIN else None  # a notebook that is a run of its own
    command = ["alignkit", *(("run", alone) if alone else ("course",)), "--out", f"runs/{seen.name}"]
    for name, default in (("model", "tiny"), ("data", "desk")):
        if not alone and seen.summary.get(name) not in (None, default):
            command += [f"--{name}", str(seen.summary[name])]
    return command + [word for given in _given(seen, names) for word in ("-p", given)]


def _given(seen: _Run, names: Sequence[str]) -> list[str]:
    """The given parameters as NAME=VALUE, or as STAGE.NAME=VALUE if only some of the notebooks that know NAME
    got it."""
    values = {name: _mapping(_mapping(seen.job(name).get("key")).get("parameters")) for name in names}
    given = {}
    for notebook in names:
        for name, value in _mapping(seen.job(notebook).get("given")).items():
            shared = all(of_one.get(name, value) == value for of_one in values.values())
            given[name if shared else f"{CHAIN.get(notebook) or notebook}.{name}"] = value
    return [f"{name}={value}" for name, value in given.items()]


# --- names -----------------------------------------------------------------------------------------------------------
def _label(name: str) -> str:
    words = METRICS[name].label.format(reference="SFT")
    return words[:1].upper() + words[1:]


def _words(notebook: str) -> str:
    """A notebook's name as a heading, without its number: 03a_ppo_by_hand -> PPO by hand."""
    words = re.sub(r"^\d+[a-z]?_", "", notebook).split("_")
    words = [word.upper() if word in ("sft", "ppo", "dpo", "kl") else word for word in words]
    return " ".join([words[0][:1].upper() + words[0][1:], *words[1:]])


def _name(stage: str) -> str:
    return STAGES[stage][0] if stage in STAGES else stage
