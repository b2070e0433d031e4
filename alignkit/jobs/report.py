"""report.html: a run on one page.

The charts are the PNG outputs of the executed notebooks' cells tagged `report` (of all cells where a notebook has no
such tag); a chart's caption is the cell's metadata `caption`, or the comment on its first line. Sample responses come
from RUN/STAGE/samples.json: [{"prompt", "response", "stage", "kind"}, …].
"""

import base64
import binascii
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from alignkit.errors import ParameterError, RunError
from alignkit.jobs.parameters import notebook_parameters
from alignkit.metrics import METRICS, Metric, is_number, number
from alignkit.pages.render import figure, page, section, table, text
from alignkit.runs.stages import CHAIN
from alignkit.storage import write_atomically

PROMPTS = 24  # prompts whose responses are shown
STAGES = {  # folder -> name, what it does
    "sft": ("SFT", "imitate demonstrations"),
    "reward": ("Reward model", "learn what annotators prefer"),
    "ppo": ("PPO", "optimise that, stay near SFT"),
    "frozen": ("Freeze & evaluate", "lock the weights, measure"),
    "dpo": ("DPO", "sharpen on preference pairs"),
}


def build_report(run: str | Path) -> Path:
    """Write RUN/report.html from what is in the run directory, as far as that goes; returns its path.

    Raises RunError if `run` is not a run directory.
    """
    run = Path(run)
    seen = _Run(run)
    parts = [
        f"<header><p class=kicker>alignkit</p><h1>{text(seen.name)}</h1><p class=facts>{_facts(seen)}</p></header>",
        _chain(seen),
        _failures(seen),
        _comparison(seen),
        *(_notebook(seen, notebook) for notebook in seen.notebooks),
        _samples(seen),
        _reproduce(seen),
    ]
    write_atomically(run / "report.html", page(f"{seen.name}: an alignkit run", parts))
    return run / "report.html"


def overview(run: str | Path) -> str:
    """What a terminal shows after a run: the main figures of each stage, and where to look."""
    run = Path(run)
    seen = _Run(run)
    lines = [f"{_name(stage):<20}{words}" for stage in seen.stages if (words := ", ".join(_headline(seen, stage)))]
    shown = run.relative_to(Path.cwd()) if run.is_relative_to(Path.cwd()) else run
    places = {"report": "report.html", "figures": "summary.json"}
    if seen.notebooks:
        names = dict.fromkeys((seen.notebooks[0].name, seen.notebooks[-1].name))
        places["executed notebooks"] = " … ".join(names)
    return "\n".join([*lines, "", f"in {shown}", *(f"  {what + ':':<20}{name}" for what, name in places.items())])


# --- what is in a run directory --------------------------------------------------------------------------------------
class _Run:
    """The records of a run, each as far as it can be read."""

    def __init__(self, run: Path):
        if not run.is_dir():
            raise RunError(f"{run} is not a run directory: there is no such folder")
        self.path, self.name = run, run.absolute().name
        self.jobs = _mapping(_json(run / "jobs.json"))
        self.summary = _mapping(_json(run / "summary.json"))
        self.notebooks = sorted(run.glob("[0-9]*.ipynb"))
        if not self.jobs and not self.summary and not self.notebooks:
            raise RunError(f"{run} is not a run directory: no jobs.json, summary.json or executed notebook in it")
        found = _mapping(self.summary.get("stages"))
        order = [stage for stage in STAGES if stage in found] + [stage for stage in found if stage not in STAGES]
        self.stages = {stage: _mapping(found[stage]) for stage in order}
        seconds = _mapping(self.summary.get("seconds"))
        self.seconds = {name: value for name, value in seconds.items() if is_number(value)}

    def job(self, name: str) -> Mapping:
        return _mapping(self.jobs.get(name))


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _mapping(value: object) -> Mapping:
    return value if isinstance(value, Mapping) else {}


def _charts(notebook: Path) -> list[str]:
    cells = [cell for cell in _mapping(_json(notebook)).get("cells", []) if _mapping(cell).get("outputs")]
    tagged = [cell for cell in cells if "report" in _mapping(cell.get("metadata")).get("tags", [])]
    return [chart for cell in tagged or cells for chart in _cell_charts(cell)]


def _cell_charts(cell: Mapping) -> list[str]:
    first = "".join(cell.get("source", "")).strip().partition("\n")[0]
    comment = first.lstrip("# ") if first.startswith("#") else ""
    caption = _mapping(cell.get("metadata")).get("caption") or comment
    found = []
    for output in cell["outputs"]:
        data, facts = _mapping(output.get("data")), _mapping(_mapping(output.get("metadata")).get("image/png"))
        try:
            png = base64.b64decode("".join(data.get("image/png", "")))
        except (binascii.Error, ValueError, TypeError):
            continue
        found.append(figure(png, facts.get("alt") or "", caption, facts.get("width")))
    return [chart for chart in found if chart]


# --- the parts of the page -------------------------------------------------------------------------------------------
def _facts(seen: _Run) -> str:
    known = {name: seen.summary.get(name) for name in ("model", "data", "seed")}
    words = [f"{name} <b>{text(value)}</b>" for name, value in known.items() if value is not None]
    if seen.seconds:
        words.append(f"{len(seen.seconds)} notebooks in <b>{_duration(sum(seen.seconds.values()))}</b>")
    return " · ".join(words)


def _chain(seen: _Run) -> str:
    """The stages as cards in a row, each a link to its section."""
    notebooks = {stage: name for name, stage in CHAIN.items() if stage}
    cards = []
    for number, (stage, (name, what)) in enumerate(STAGES.items(), 1):
        state, seconds = _state(seen, stage, notebooks[stage]), seen.seconds.get(notebooks[stage])
        took = f" in {_duration(seconds)}" if seconds is not None and state == "done" else ""
        figures = "".join(f"<li>{text(words)}</li>" for words in _headline(seen, stage))
        inside = (
            f"<p class=number>{number}</p><h3>{text(name)}</h3><p>{text(what)}</p><ul>{figures}</ul>"
            f"<p class=state>{text(state)}{took}</p>"
        )
        linked = any(path.stem == notebooks[stage] for path in seen.notebooks)
        card = f'<a href="#{notebooks[stage]}">{inside}</a>' if linked else f"<div>{inside}</div>"
        cards.append(f'<li class="{stage} {"done" if state == "done" else "open"}">{card}</li>')
    return f'<section aria-label="The chain of stages"><ol class=chain>{"".join(cards)}</ol></section>'


def _state(seen: _Run, stage: str, notebook: str) -> str:
    status = str(seen.job(notebook).get("status") or "")
    words = {"finished": "done", "running": "not finished", "timeout": "out of time", "": "not run"}
    return "done" if not status and stage in seen.stages else words.get(status, status)


def _headline(seen: _Run, stage: str) -> list[str]:
    results = seen.stages.get(stage, {})
    wanted = ("gold_mean" if "gold_mean" in results else "proxy_mean", "kl_to_sft", "risky_failure_rate")
    if stage == "reward":
        wanted = ("accuracy_labels", "bayes_accuracy", "ece")
    there = [(METRICS[name], results[name]) for name in wanted if is_number(results.get(name))]
    return [f"{metric.label}: {metric.format(value)}" for metric, value in there]


def _failures(seen: _Run) -> str:
    boxes = []
    for name in seen.jobs:
        status, error = seen.job(name).get("status"), seen.job(name).get("error")
        if status not in (None, "finished"):
            said = text(error or "The process that ran it has ended, or is still at work.", 2000)
            boxes.append(section(f"{name}: {status}", f"<p class=said>{said}</p>", css="alert"))
    return "".join(boxes)


def _comparison(seen: _Run) -> str:
    policies = {stage: results for stage, results in seen.stages.items() if stage != "reward"}
    names = [name for name in METRICS if any(is_number(results.get(name)) for results in policies.values())]
    rows = [
        [_heading(METRICS[name]), *(_with_interval(results, name) for results in policies.values())] for name in names
    ]
    head = ["Held-out prompts", *("Frozen" if stage == "frozen" else text(_name(stage)) for stage in policies)]
    caption = "Each policy on the held-out prompts, with 95 % intervals"
    return section("What each stage changed", table(caption, head, rows, "wide"))


def _with_interval(results: Mapping, name: str) -> str:
    metric, value = METRICS[name], results.get(name)
    interval = results.get(f"{name.removesuffix('_mean').removesuffix('_rate')}_ci95")
    if not is_number(value):
        return "–"
    between = ""
    if isinstance(interval, Sequence) and len(interval) == 2 and all(map(is_number, interval)):
        between = f"<small>{text(metric.format(interval[0]))} to {text(metric.format(interval[1]))}</small>"
    return f"{text(metric.format(value))}{between}"


def _notebook(seen: _Run, notebook: Path) -> str:
    stage = CHAIN.get(notebook.stem)
    results = seen.stages.get(stage, {})
    heading = _name(stage) if stage else notebook.stem.partition("_")[2].replace("_", " ").capitalize()
    main = {name: METRICS[name] for name in METRICS if stage == "reward" and is_number(results.get(name))}
    rows = [[_heading(metric), _with_interval(results, name)] for name, metric in main.items()]
    charts = "".join(_charts(notebook))
    parts = [f"<div class=charts>{charts}</div>" if charts else "", table("On held-out pairs", ["", "Value"], rows)]
    parts.append(_details(heading, results))
    if not any(parts):
        return ""
    took = f"{_duration(seen.seconds[notebook.stem])} · " if notebook.stem in seen.seconds else ""
    source = f'<p class=facts>{took}<a href="{text(notebook.name)}">{text(notebook.name)}</a></p>'
    return section(heading, source, *parts, name=notebook.stem)


def _details(heading: str, results: Mapping) -> str:
    """All figures of a stage, folded: the plain ones, and tables for those that are tables (row -> column -> value)."""
    plain, tables = {}, []
    for name, value in results.items():
        if isinstance(value, Mapping) and value and all(isinstance(row, Mapping) and row for row in value.values()):
            tables.append(_grid(f"{heading}: {name.replace('_', ' ')}", value, name.endswith("shares")))
        elif isinstance(value, Mapping):
            plain |= {f"{name}.{key}": item for key, item in value.items() if not isinstance(item, list | Mapping)}
        elif not isinstance(value, list):
            plain[name] = value
    rows = [[f"<code>{text(name)}</code>", text(number(value))] for name, value in plain.items()]
    inside = table(f"{heading}: results", ["Figure", "Value"], rows) + "".join(tables)
    return f"<details><summary>All figures of this stage</summary>{inside}</details>" if inside else ""


def _grid(caption: str, grid: Mapping, share: bool) -> str:
    columns = list(dict.fromkeys(str(column) for row in grid.values() for column in row))
    show = Metric("", share=share).format
    rows = [[text(label), *(text(show(row.get(column))) for column in columns)] for label, row in grid.items()]
    return table(caption, ["", *map(text, columns)], rows, "wide")


def _samples(seen: _Run) -> str:
    said: dict[str, dict[str, list]] = {}  # prompt -> stage -> responses
    kinds: dict[str, object] = {}
    for path in sorted(seen.path.glob("*/samples.json")):
        found = _json(path)
        for row in map(_mapping, found if isinstance(found, list) else []):
            if "prompt" in row and "response" in row:
                prompt, stage = str(row["prompt"]), str(row.get("stage") or path.parent.name)
                said.setdefault(prompt, {}).setdefault(stage, []).append(row["response"])
                kinds.setdefault(prompt, row.get("kind") or "")
    there = {stage for responses in said.values() for stage in responses}
    stages = [stage for stage in STAGES if stage in there] + sorted(there - STAGES.keys())
    shown = sorted(said, key=lambda prompt: -len(said[prompt]))[:PROMPTS]  # first the prompts that most stages answered
    rows = [
        [f"{text(prompt)}<small>{text(kinds[prompt])}</small>", *(_said(said[prompt].get(name, [])) for name in stages)]
        for prompt in shown
    ]
    head = ["Prompt", *(text(_name(stage)) for stage in stages)]
    return section("The same prompts, before and after", table("Sampled responses", head, rows, "said wide"))


def _said(responses: Sequence) -> str:
    return "".join(f"<p>{text(response).strip() or '<i>(empty)</i>'}</p>" for response in responses[:3]) or "–"


def _reproduce(seen: _Run) -> str:
    command = ["alignkit", "course", "--out", f"runs/{seen.name}"]
    for name, default in (("model", "tiny"), ("data", "desk")):
        if seen.summary.get(name) not in (None, default):
            command += [f"--{name}", str(seen.summary[name])]
    for name, value in _given(seen).items():
        command += ["-p", f"{name}={value}"]
    versions = [[text(name), text(version)] for name, version in _mapping(seen.summary.get("versions")).items()]
    seconds = [[text(name), _duration(value)] for name, value in seen.seconds.items()]
    tables = table("Versions", ["Package", "Version"], versions) + table("Time", ["Notebook", "Took"], seconds)
    shown = f"<pre><code>{text(shlex.join(command), 4000)}</code></pre>"
    return section("Run it again", shown, f"<div class=pair>{tables}</div>")


def _given(seen: _Run) -> dict[str, object]:
    """The parameters that were not left at the notebooks' defaults."""
    given: dict[str, object] = {}
    for notebook in seen.notebooks:
        used = _mapping(_mapping(seen.job(notebook.stem).get("key")).get("parameters"))
        try:
            known = notebook_parameters(notebook)
        except (ParameterError, OSError):
            continue
        differing = [name for name in known if name in used and used[name] != known[name].default]
        given |= {name: used[name] for name in differing if name not in ("run", "model", "data")}
    return given


# --- names and numbers -----------------------------------------------------------------------------------------------
def _heading(metric: Metric) -> str:
    arrow = {"up": " <abbr title='more is better'>↑</abbr>", "down": " <abbr title='less is better'>↓</abbr>"}
    return f"{text(metric.label)}{arrow.get(metric.better, '')}<small>{text(metric.unit)}</small>"


def _name(stage: str) -> str:
    return STAGES[stage][0] if stage in STAGES else stage


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
