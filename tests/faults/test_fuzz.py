"""More than 2,000 mutated records of strangers, read as the command and the dashboard read them.

A case is a seed: `python -m pytest tests/faults/test_fuzz.py -k NAME` repeats all of a kind, and a failure names the
seed of its case. What may happen: it is read, or one error says what is wrong. Never a traceback, more
than 10 seconds, or 500 MB.
"""

from __future__ import annotations

import copy
import gzip
import hashlib
import io
import json
import random
import resource
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from alignkit_widgets.app import server
from alignkit_widgets.boards.board import Board, button
from alignkit_widgets.cockpit.controls import Controls
from alignkit_widgets.cockpit.log import branches_of, checked, marks_of, replay
from alignkit_widgets.cockpit.remote import Remote
from alignkit_widgets.explorers.clip import ClipExplorer

from alignkit.data.labels import ChoiceLog, choice_items, stored_rows
from alignkit.data.rows import check, load_rows
from alignkit.desk.tiny import desk_tokenizer
from alignkit.errors import AlignkitError
from alignkit.evaluate.evaluation import Evaluation, EvaluationSet
from alignkit.evaluate.suite_records import read_suites
from alignkit.evaluate.suites import table
from alignkit.jobs.job import why_run
from alignkit.jobs.notebooks import read_jobs
from alignkit.jobs.parameters import notebook_parameters
from alignkit.jobs.report import build_report, overview
from alignkit.runs.frozen import Manifest, lineage, verify
from alignkit.runs.records import record_seconds, run_facts, write_results
from alignkit.storage import read_json, read_metrics, trim_metrics

SEED, CASES, SECONDS, MEGABYTES = 20261129, 150, 10, 500
VALUES = (
    None,
    True,
    0,
    -1,
    5,
    2.5,
    10**30,
    10**400,
    1e999,
    -1e999,
    float("nan"),
    "",
    "x",
    "\ud800",
    "\0",
    "=1",
    "../../x",
    "\u202e\x1b[31m",
    [],
    {},
    [[]],
    [5],
    {"a": None},
    "x" * 70_000,
    [1] * 1000,
)
BYTES = (
    b"",
    b"\0",
    b"\xff\xfe",
    b"{",
    b"[",
    b"]",
    b"}",
    b'"',
    b",",
    b":",
    b"\n",
    b"1e999",
    b"NaN",
    b"[" * 5000,
    b"\xef\xbb\xbf",
    b"-",
    b"1" * 6000,
    b"null",
    b'{"a":' * 3000,
)


def places(value: object) -> list[tuple]:
    """All (container, key) of a JSON value."""
    found, level = [], [value]
    while level:
        each = level.pop()
        items = each.items() if isinstance(each, dict) else enumerate(each) if isinstance(each, list) else ()
        for key, item in items:
            found.append((each, key))
            level.append(item)
    return found


def mutated_value(value: object, rng: random.Random) -> object:
    """A copy of a JSON value in which one to three places hold something else, or are gone."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        spots = places(value)
        if not spots or rng.random() < 0.04:
            return copy.deepcopy(rng.choice(VALUES))
        container, key = rng.choice(spots)
        kind = rng.random()
        if kind < 0.15:
            del container[key]
        elif kind < 0.2:
            deep: object = 1
            for _ in range(rng.choice((60, 70, 200))):
                deep = [deep]
            container[key] = deep
        elif kind < 0.25 and isinstance(container, dict):
            container[rng.choice(("x", "", "\ud800", "__class__", str(key) * 50))] = container.pop(key)
        else:
            container[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """Content with one to four changes of its bytes."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.choice((0, 1, 1, 8, 200)))
        kind = rng.randrange(4)
        middle = (rng.choice(BYTES), bytes([rng.randrange(256)]), content[start:end] * 3, b"")[kind]
        content = (
            content[:start]
            + (middle if kind != 3 else b"")
            + (content[end:] if kind != 3 or rng.random() < 0.7 else b"")
        )
    return content


def mutated(record: object, rng: random.Random) -> bytes:
    """A record, which is a JSON value or a list of lines in a tuple, with something wrong in it, as bytes."""
    if isinstance(record, bytes):
        return mutated_bytes(record, rng)
    rows = list(record) if isinstance(record, tuple) else [record]
    if rng.random() < 0.7:
        place = rng.randrange(len(rows))
        rows[place] = mutated_value(rows[place], rng)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return mutated_bytes(content, rng) if rng.random() < 0.4 else content


# --- the records, and who reads them ---------------------------------------------------------------------------------
METRICS = tuple(
    {"step": n, "loss": 1.5, "controls": {"lr": 0.1 * n}, "shares": {"risky": {"answer": 0.5}}} for n in (1, 2, 3)
)
EVALSET = EvaluationSet(("a", "b"), (0, 1), ("risky", "benign"), samples=2)
STORED = {
    "name": "sft",
    "gold_scale": [0.0, 1.0],
    "set": {"hash": EVALSET.hash, **EVALSET._fields()},
    "columns": {
        "response": ["a b", "b", "c", "d"],
        "length": [1] * 4,
        "tokens": [2] * 4,
        "finished": [True] * 4,
        "logp": [-1.0] * 4,
        "entropy": [1.0] * 4,
        "ref_logp": [-1.1] * 4,
        "k3": [0.1] * 4,
        "token_kl": [[0.1, 0.2]] * 4,
        "gold": [0.5] * 4,
        "behaviour": ["answer"] * 4,
        "phrases": [[1, 0]] * 4,
    },
}
KEY = {"notebook": "a", "parameters": {"seed": 0, "model": "tiny"}, "files": {}, "alignkit": "b", "earlier": "c"}
JOBS = {
    "01_sft": {
        "status": "finished",
        "key": KEY,
        "given": {"steps": 3},
        "made": {"sft/config.json": "00"},
        "seconds": 3.5,
        "cell": 3,
        "cells": 9,
        "pid": 1,
        "started": "now",
    },
    "03b_ppo": {"status": "failed", "key": KEY, "error": "x"},
}
RESULTS = {
    "gold_mean": 0.5,
    "gold_ci95": [0.1, 0.9],
    "kl_to_sft": 1.5,
    "behaviour_shares": {"risky": {"answer": 0.5}},
    "accuracy_labels": 0.7,
    "table": {"a": {"b": 1}},
    "other": {"c": 1},
}
NOTEBOOK = {
    "nbformat": 4,
    "nbformat_minor": 5,
    "metadata": {},
    "cells": [
        {
            "cell_type": "code",
            "id": "a",
            "metadata": {"tags": ["parameters"]},
            "outputs": [],
            "execution_count": 1,
            "source": ["seed: int = 0  # of all\n", "steps: list[int] = [1, 2]\n", "rate = 0.5\n"],
        },
        {
            "cell_type": "code",
            "id": "b",
            "metadata": {"tags": ["report"], "caption": "x"},
            "source": "# a\n1",
            "execution_count": 1,
            "outputs": [
                {
                    "output_type": "display_data",
                    "data": {"image/png": "iVBORw0KGgo=", "text/plain": "x"},
                    "metadata": {"image/png": {"alt": "x", "width": 3}},
                }
            ],
        },
    ],
}
PAIRS = tuple({"prompt": f"p{n}", "chosen": " yes", "rejected": " no"} for n in range(4))
CHATS = tuple(
    {
        "prompt": [{"role": "user", "content": f"p{n}", "name": "x"}],
        "chosen": [{"role": "assistant", "content": "y"}],
        "rejected": [{"role": "assistant", "content": "n"}],
    }
    for n in range(3)
)
ITEMS = choice_items([{"prompt": f"p{n}", "responses": {"a": "x", "b": "y"}} for n in range(3)])
LABELS = (
    *(
        {
            "item": item.id,
            "choice": item.order[0],
            "order": list(item.order),
            "prompt": item.prompt,
            "responses": item.responses,
            "time": "now",
        }
        for item in ITEMS
    ),
    {"undo": ITEMS[0].id},
)
MANIFEST = {"hash": "0" * 64, "files": {"config.json": {"sha256": "0" * 64, "size": 2}}}
LINEAGE = {
    "evaluation_set_hash": "0" * 64,
    "versions": {"torch": "2"},
    "seed": 0,
    "ancestors": [{"path": "a", "hash": "b"}],
}
CSV = b'prompt,chosen,rejected\np,yes,no\nq,"a\nb",c\n'


def read_log(path: Path) -> None:
    """As the cockpit reads it when a run goes on."""
    marks_of(checked(trim_metrics(path), path), branches_of(path, read_metrics(path)))
    replay(path)


def read_run(path: Path) -> None:
    """As `alignkit report` and a course read it."""
    build_report(path.parent)
    overview(path.parent)
    before = read_jobs(path.parent).get("01_sft", {})
    job = SimpleNamespace(executed=path, folder=None)
    why_run(job, before, KEY)


def read_results(path: Path) -> None:
    """As a stage's results go into summary.json, and that to the page."""
    (path.parent / "sft").mkdir(exist_ok=True)
    path.replace(path.parent / "sft" / "results.json")
    write_results(path.parent, "reward", {"ece": 0.1})
    build_report(path.parent)
    overview(path.parent)


def read_notebook(path: Path) -> None:
    """As a job reads it, and the page."""
    build_report(path.parent)
    notebook_parameters(path)


def read_data(path: Path) -> None:
    """As `alignkit check` and training read it."""
    tokenizer = desk_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ m.name }}|{% endfor %}"
    str(check(path))
    load_rows(path, tokenizer=tokenizer, skip_bad=True)


def read_labels(path: Path) -> None:
    """As a board reads what was labelled before."""
    log = ChoiceLog(path.with_name("labels.jsonl"), ITEMS)
    log.pairs()
    stored_rows(path)


def read_seconds(path: Path) -> None:
    record_seconds(path.parent, "01_sft", 3.0)
    build_report(path.parent)


def read_manifest(path: Path) -> None:
    """As `alignkit verify` reads it, spelled as it must be where that is possible."""
    try:
        written = json.dumps(json.loads(path.read_bytes()), indent=1, sort_keys=True)
        path.write_bytes(written.encode() + b"\n")
    except (ValueError, TypeError, RecursionError):
        pass
    (path.parent / "config.json").write_text("{}")
    verify(path.parent)


def read_lineage(path: Path) -> None:
    """As the lineage of a frozen checkpoint is read whose manifest is in order."""
    content = path.read_bytes()
    files = {path.name: {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}}
    (path.parent / "manifest.json").write_bytes(Manifest(files).to_bytes())
    lineage(path.parent)


SUITES = {"measured": [
    {"checkpoint": "run/ppo", "hash": "h", "suite": suite, "metric": "acc", "value": 0.5, "low": 0.4, "high": 0.6,
     "stderr": 0.05, "n": 100, "shots": 0, "limit": limit, "seed": 0, "chat_template": False, "versions": {},
     "date": "2026-01-01"}
    for suite, limit in (("mmlu", None), ("mine", 9))]}
READERS = {  # kind -> the name of the file, a good one, and who reads it
    "metrics": ("metrics.jsonl", METRICS, read_log),
    "evaluation": ("evaluation.json", STORED, lambda path: Evaluation.load(path).summary()),
    "evaluation set": ("evaluation_set.json", STORED["set"], EvaluationSet.load),
    "suites": ("suites.json", SUITES, lambda path: table({"ppo": read_suites(path.parent)})),
    "jobs": ("jobs.json", JOBS, read_run),
    "summary": (
        "summary.json",
        {
            "stages": {"sft": RESULTS, "reward": RESULTS},
            "seconds": {"01_sft": 3},
            "model": "tiny",
            "data": "desk",
            "seed": 0,
            "versions": {"torch": "2"},
        },
        read_run,
    ),
    "results": ("results.json", RESULTS, read_results),
    "seconds": ("seconds.json", {"01_sft": 3.5}, read_seconds),
    "run": ("run.json", {"model": "tiny", "data": "desk", "seed": 0}, lambda path: run_facts(path.parent)),
    "samples": ("samples.json", [{"prompt": "p", "response": "r", "stage": "sft", "kind": "risky"}] * 2, read_run),
    "notebook": ("01_sft.ipynb", NOTEBOOK, read_notebook),
    "pairs": ("a.jsonl", PAIRS, read_data),
    "conversations": ("b.jsonl", CHATS, read_data),
    "array": ("a.json", list(PAIRS), read_data),
    "cells": ("a.csv", CSV, read_data),
    "packed": (
        "a.jsonl.gz",
        gzip.compress("".join(json.dumps(row) + "\n" for row in PAIRS).encode(), mtime=0),
        read_data,
    ),
    "labels": ("labels.log.jsonl", LABELS, read_labels),
    "index": ("model.safetensors.index.json", {"weight_map": {"a": "model.safetensors"}}, read_json),
    "config": ("config.json", {"model_type": "llama", "hidden_size": 8}, read_json),
}


def parquet() -> bytes:
    """A small Parquet file."""
    import pyarrow
    from pyarrow import parquet as files

    sink = io.BytesIO()
    files.write_table(pyarrow.Table.from_pylist(list(PAIRS)), sink)
    return sink.getvalue()


def outcome(act) -> str:
    """What came of a case: "" if it was read or refused as it should be, else what went wrong."""
    begun = time.monotonic()
    try:
        act()
    except (AlignkitError, OSError) as error:
        if not str(error).strip():
            return f"an empty {type(error).__name__}"
    except ValueError as error:
        if type(error) is not ValueError or not str(error).strip():
            return f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if time.monotonic() - begun < SECONDS else "too slow"


def peak() -> int:
    """The most memory that this process had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def run_cases(kind: str, name: str, record: object, read, folder: Path, cases: int = CASES) -> None:
    """All cases of one kind; AssertionError lists those that went wrong, with their seeds."""
    before, wrong = peak(), []
    for case in range(cases):
        rng = random.Random(f"{SEED} {kind} {case}")
        run = folder / str(case)
        run.mkdir()
        place = run / "sft" if name == "samples.json" else run
        place.mkdir(exist_ok=True)
        (place / name).write_bytes(mutated(record, rng))
        if read is read_run and name != "jobs.json":
            (run / "jobs.json").write_text("{}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            where = (place if name != "samples.json" else run) / name
            problem = outcome(lambda where=where: read(where))
        if problem:
            wrong.append(f"{kind} {case}: {problem[:300]}")
    assert not wrong, f"{len(wrong)} of {cases}:\n" + "\n".join(wrong[:20])
    assert peak() - before < MEGABYTES


@pytest.mark.parametrize("kind", READERS)
def test_a_mutated_record_gives_one_error_or_none(kind, tmp_path):
    run_cases(kind, *READERS[kind], tmp_path)


def test_a_mutated_parquet_file_gives_one_error_or_none(tmp_path):
    run_cases("parquet", "a.parquet", parquet(), read_data, tmp_path, 80)


@pytest.mark.parametrize(
    "name, record, read", [("manifest.json", MANIFEST, read_manifest), ("lineage.json", LINEAGE, read_lineage)]
)
def test_a_mutated_manifest_gives_one_error_or_none(name, record, read, tmp_path):
    run_cases(name, name, record, read, tmp_path)


class Panel(Board):
    """A board with one button."""

    def buttons(self) -> list[dict]:
        return [button("tie", "Tie", "t"), button("undo", "Undo", "u")]

    def press(self, button, item) -> None:
        self.undo() if button == "undo" else self.choose(item, "tie")

    def status(self) -> str:
        return "status"

    def label(self, item, place) -> dict:
        return {"label": "x", "name": "", "tag": ""}


def test_mutated_messages_of_a_page_are_harmless(tmp_path):
    """Through the same door as the page's: the socket's own function, and every kind of widget behind it."""
    dashboard = server.Dashboard(SimpleNamespace(run="run", checkpoints=dict, task=SimpleNamespace(world=None)))
    sent: list[str] = []
    dashboard.tell = lambda message: sent.append(json.dumps(message, allow_nan=False))
    dashboard._begin = lambda tab, work: work.close() if hasattr(work, "close") else None
    board, explorer = Panel("title", ITEMS, tmp_path / "labels.jsonl"), ClipExplorer()
    remote = Remote(Controls({"lr": (0.0, 1.0, 0.5)}), 60)
    mounted = [
        dashboard.mount(tab, "x", {}, each.receive)
        for tab, each in (("train", remote), ("compare", board), ("frontier", explorer))
    ]
    board.listeners, explorer.view = [mounted[1].send], mounted[2]
    passed = []
    for channel in mounted:
        inner = channel.receive
        channel.receive = lambda content, inner=inner: passed.append(outcome(lambda: inner(content)))
    contents = [
        {"type": "set", "name": "lr", "value": 0.5},
        {"type": "rewind", "iteration": 3},
        {"type": "step"},
        {"type": "press", "button": "tie", "item": ITEMS[0].id},
        {"type": "gone"},
        {"type": "press", "button": "undo"},
        {"type": "set", "values": {"epsilon": 0.2}, "n": 5},
        {"type": "press", "name": "x", "n": 5},
        {"type": "sync"},
    ]
    good = [{"to": channel.mount["mount"], "content": content} for channel in mounted for content in contents]
    good += [
        {"do": "train", "iterations": 5},
        {"do": "compare", "names": ["sft", "ppo"]},
        {"do": "frontier", "recorded": True},
    ]
    page, before, wrong = SimpleNamespace(dashboard=dashboard), peak(), []
    for case in range(600):
        rng = random.Random(f"{SEED} message {case}")
        message = mutated(rng.choice(good), rng)
        if rng.random() < 0.5:
            message = message.decode("utf-8", "replace")
        begun = time.monotonic()
        try:
            server.Socket.on_message(page, message)
        except Exception as error:
            wrong.append(f"message {case}: {type(error).__name__}: {error}")
        if time.monotonic() - begun > SECONDS:
            wrong.append(f"message {case}: too slow")
    assert not wrong + list(filter(None, passed)), "\n".join((wrong + list(filter(None, passed)))[:10])
    assert len(passed) > 100 and sent and peak() - before < MEGABYTES
    for text in sent[-20:]:
        json.loads(text, parse_constant=lambda name: pytest.fail(name))


def test_there_are_enough_cases_and_they_differ():
    assert CASES * len(READERS) + 600 + 80 + 2 * CASES >= 2000
    different = len(
        {
            mutated(record, random.Random(f"{SEED} {kind} {case}"))
            for kind, (_, record, _) in READERS.items()
            for case in range(CASES)
        }
    )
    assert different >= 2000
