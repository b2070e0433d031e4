"""The model card of a frozen checkpoint: README.md beside its manifest, in the Hub's format.

The card contains only information from the records; a licence that was not given is "unknown". The manifest does not
list the card, because the card reports an evaluation, which comes after freezing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from alignkit.evaluate import suites
from alignkit.evaluate.adviser import chance_warning
from alignkit.evaluate.suite_records import suites_of
from alignkit.metrics import METRICS, Metric, is_number, share
from alignkit.runs.frozen import Manifest, lineage, verify
from alignkit.runs.records import run_facts
from alignkit.safe_text import markdown_cell, one_line
from alignkit.stages import CARD, CHAIN
from alignkit.storage import file_hash, read_json, write_atomically

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
READING = ("kind", "split", "columns", "skip_bad", "max_length", "max_new_tokens")  # settings for reading a run's data
UNKNOWN_LICENCE = "unknown: nobody gave one. Fill it in before you publish, after reading those of base model and data"
LIMITS = (
    "The evaluation asks held-out prompts of the data that it was trained on, and no others.",
    "A reward model, or the program that stood for it, decided what a good reply is; where it errs, PPO learns the "
    "error.",
    "Nothing was measured here about facts, safety, bias or languages beyond what the tables say.",
)
DESK_LIMIT = ("It lives in a toy world of a dozen sentences, which was made to study alignment. It is of no use "
              "outside of it.")


def model_card(checkpoint: str | Path, *, licence: str | None = None) -> ModelCard:
    """The card of a frozen checkpoint, a `huggingface_hub.ModelCard`: metadata, lineage, data, evaluation, hashes.

    checkpoint: a folder made by `freeze`; in a run directory, the records of the run are read too. licence: an
    identifier such as "mit"; None: "unknown". Raises ManifestError if a byte of the checkpoint has changed since
    freezing, RunError, naming the file, on records that cannot be read.
    """
    from huggingface_hub import ModelCard, ModelCardData

    checkpoint = Path(checkpoint)
    manifest, chain = verify(checkpoint), lineage(checkpoint)
    run = checkpoint.absolute().parent
    facts = run_facts(run)
    results = _read(checkpoint / "results.json")
    rows = _evaluation(results)
    measured = _suites(checkpoint)
    name = f"{run.name}-{checkpoint.name}"
    data = ModelCardData(
        license=licence or "unknown", library_name="transformers", pipeline_tag="text-generation",
        tags=["alignkit", "rlhf", *dict.fromkeys(str(record["stage"]) for record in chain)], model_name=name,
        base_model=_hub_id(facts.get("model")), datasets=_hub_id(facts.get("data")),
        eval_results=[_result(metric, row, facts, results) for metric, row in {**rows, **measured}.items()] or None)
    text = "\n\n".join((
        f"# {markdown_cell(name)}",
        f"A causal language model, frozen by alignkit. Licence: {_cell(licence) if licence else UNKNOWN_LICENCE}.",
        _lineage(chain, manifest), _data(facts, run, chain[-1]), _table("Evaluation", rows, NO_EVALUATION),
        *([_table("Test suites", measured, "")] if measured else ()), *_reward_model(run),
        _limits(facts, bool(measured)), _verification(manifest)))
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def write_card(checkpoint: str | Path, *, licence: str | None = None, out: str | Path | None = None) -> Path:
    """Write the card of a frozen checkpoint; returns its path: `out`, or README.md beside the manifest.

    The checkpoint's own files are not changed, and `verify` still passes. Raises as `model_card` does.
    """
    out = Path(checkpoint) / CARD if out is None else Path(out)
    write_atomically(out, str(model_card(checkpoint, licence=licence)))
    return out


def card_is_of(checkpoint: str | Path, manifest: Manifest) -> bool:
    """Whether the README.md in a checkpoint is the card of this manifest, that is, names the manifest's hash."""
    with (Path(checkpoint) / CARD).open(encoding="utf-8", errors="replace") as file:
        return manifest.hash in file.read(2**20)


NO_EVALUATION = "No evaluation lies beside this checkpoint."


def _read(path: Path) -> dict:
    try:
        return read_json(path)
    except FileNotFoundError:
        return {}


def _cell(value: object) -> str:
    """A value for a Markdown cell: numbers and booleans unchanged, text escaped so that nothing acts as markup."""
    return str(value) if value is None or isinstance(value, bool | int | float) else markdown_cell(value, 200)


def _hub_id(name: object) -> str | None:
    """A name if it can only be a Hub id; paths of this machine are not published."""
    named = isinstance(name, str) and HUB_ID.fullmatch(name) and not os.path.exists(name)
    return name if named else None


def _named(name: object, else_: str) -> str:
    """The public name of a model or data set: for a path its last part."""
    if not isinstance(name, str):
        return f"unknown: {else_} has no record of it"
    return markdown_cell(name if _hub_id(name) or os.sep not in name else f"a local one named {Path(name).name}")


# --- sections --------------------------------------------------------------------------------------------------------
def _evaluation(results: Mapping) -> dict[str, tuple]:
    """Metric -> (title, value as text, interval as text, raw value, raw interval), for the metrics in the results."""
    rows = {}
    for name, metric in METRICS.items():
        if is_number(results.get(name)):
            interval = results.get(f"{name.removesuffix('_mean').removesuffix('_rate')}_ci95")
            rows[name] = _row(metric.title("SFT"), results[name], interval, metric)
    return rows


def _row(title: str, value: float, interval: object, metric: Metric) -> tuple:
    has = isinstance(interval, list) and len(interval) == 2 and all(map(is_number, interval))
    shown = f"{interval[0]:{metric.spec}} to {interval[1]:{metric.spec}}" if has else "none"
    return title, f"{value:{metric.spec}}", shown, value, interval if has else None


def _suites(checkpoint: Path) -> dict[str, tuple]:
    """Label -> row, as `_evaluation`, of the suite results for the checkpoint in its present state."""
    rows = {}
    for label, line in suites.lines(suites_of(checkpoint)[0]).items():
        low, high = line.score.low, line.score.high
        title = f"{markdown_cell(label, 120)}{line.cut}<br>{markdown_cell(line.about, 200)}"
        rows[label] = _row(title, line.score.value, None if low is None else [low, high], Metric(label, spec=line.spec))
    return rows


def _result(metric: str, row: tuple, facts: Mapping, results: Mapping):
    """One entry of the Hub's model-index."""
    from huggingface_hub import EvalResult

    title, _, _, value, interval = row
    return EvalResult(
        task_type="text-generation", dataset_type="alignkit",
        dataset_name=f"held-out prompts of {one_line(_hub_id(facts.get('data')) or 'its own data', 120)}",
        dataset_args={"evaluation_set": str(results.get("evaluation_set", "unknown"))},
        metric_type=one_line(metric, 120), metric_name=title, metric_value=value,
        metric_args={"ci95": interval} if interval else None)


def _table(heading: str, rows: Mapping[str, tuple], otherwise: str) -> str:
    if not rows:
        return f"## {heading}\n\n{otherwise}"
    lines = ["| metric | value | 95 % interval |", "|---|---|---|",
             *(f"| {title} | {value} | {interval} |" for title, value, interval, *_ in rows.values())]
    return f"## {heading}\n\n" + "\n".join(lines)


def _lineage(chain: list[dict], manifest: Manifest) -> str:
    lines = ["| stage | hash | made | seed |", "|---|---|---|---|"]
    for record in chain:
        cells = (record.get(key) for key in ("stage", "hash", "created", "seed"))
        lines.append(f"| {' | '.join('not recorded' if cell is None else _cell(cell) for cell in cells)} |")
    last = chain[-1]
    versions = last.get("versions") if isinstance(last.get("versions"), dict) else {}
    config = last.get("config") if isinstance(last.get("config"), dict) else {}
    about = ", ".join(markdown_cell(f"{name} {version}") for name, version in versions.items())
    settings = ["| setting | value |", "|---|---|",
                *(f"| {_cell(name)} | {_cell(value)} |" for name, value in config.items())]
    return "\n\n".join(("## Lineage", "Oldest first; the last row is this checkpoint.", "\n".join(lines),
                        f"Made with {about or 'versions that were not recorded'}.",
                        *(["### Settings of the last training", "\n".join(settings)] if config else ())))


def _data(facts: Mapping, run: Path, record: Mapping) -> str:
    lines = [f"* Base model: {_named(facts.get('model'), 'the run')}"]
    lines.append(f"* Data: {_named(facts.get('data'), 'the run')}")
    source = facts.get("data")
    digest = record.get("data_hash")
    if not digest and isinstance(source, str) and os.path.isfile(source):
        digest = f"{file_hash(source)} (SHA-256 of the file as it was when this card was written)"
    lines.append(f"* Hash of the data: {markdown_cell(digest) if digest else 'not recorded'}")
    lines.append(f"* Hash of the evaluation set: {markdown_cell(record.get('evaluation_set_hash') or 'not recorded')}")
    lines += _reading(run) if source != "desk" else ["* Made by a program, the desk world, from the seed alone"]
    return "## Base model and data\n\n" + "\n".join(lines)


def _reading(run: Path) -> list[str]:
    """How the notebooks read the data, one line for each different way."""
    jobs, ways = _read(run / "jobs.json"), {}
    for notebook in CHAIN:
        job = jobs.get(notebook)
        key = job.get("key") if isinstance(job, dict) else None
        given = key.get("parameters") if isinstance(key, dict) else None
        if isinstance(given, dict):
            way = ", ".join(f"{name} {_cell(given[name])}" for name in READING if given.get(name) is not None)
            ways.setdefault(way, []).append(markdown_cell(notebook))
    return [f"* Read by {', '.join(notebooks)} with: {way or 'the defaults'}" for way, notebooks in ways.items()]


def _reward_model(run: Path) -> list[str]:
    results = _read(run / "reward" / "results.json")
    if not is_number(results.get("accuracy_labels")):
        return []
    interval = results.get("accuracy_labels_ci95")
    _, value, shown, *_ = _row("", results["accuracy_labels"], interval, METRICS["accuracy_labels"])
    sentence = f"On held-out pairs the reward model ranks {value} as their labels do (95 % interval {shown})"
    ceiling = results.get("bayes_accuracy")
    sentence += f"; the best possible is {share(ceiling)}." if is_number(ceiling) else "."
    warning = chance_warning(results)
    return ["\n\n".join(["## Reward model", *([f"**{warning}**"] if warning else []), sentence])]


def _limits(facts: Mapping, has_suites: bool) -> str:
    limits = LIMITS[1:] if has_suites else LIMITS  # suites use other prompts
    desk = [DESK_LIMIT] if facts.get("data") == "desk" else []
    return "## Known limits\n\n" + "\n".join(f"* {sentence}" for sentence in (*desk, *limits))


def _verification(manifest: Manifest) -> str:
    lines = ["| file | bytes | SHA-256 |", "|---|---|---|",
             *(f"| {markdown_cell(name)} | {entry['size']:,} | {entry['sha256']} |"
               for name, entry in sorted(manifest.files.items()))]
    return "\n\n".join(("## Hashes", f"Manifest: {manifest.hash}", "\n".join(lines),
                        "`alignkit verify FOLDER` compares every byte of a copy with manifest.json."))
