"""Faults 40, 42, 43, 48, 50, 51, 52 and those of the dashboard: what a stranger's file, folder or message may not do.

Each test is named by the number of its fault in the list of reliability.md.
"""

from __future__ import annotations

import asyncio
import csv
import gzip
import io
import json
import logging
import os
import re
import resource
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from alignkit_widgets.app import server
from alignkit_widgets.app.playground import open_playground
from alignkit_widgets.cockpit.controls import Controls
from alignkit_widgets.cockpit.log import branches_of, replay
from alignkit_widgets.explorers.clip import ClipExplorer
from tornado.httpclient import AsyncHTTPClient
from tornado.websocket import websocket_connect

from alignkit.configs import PPOConfig
from alignkit.data import chat, rows
from alignkit.data.labels import ChoiceLog, choice_items
from alignkit.data.rows import check, load_rows
from alignkit.desk.tiny import desk_tokenizer
from alignkit.errors import AlignkitError, DataError, ParameterError, RunError
from alignkit.evaluate.comparison import compare
from alignkit.evaluate.evaluation import Evaluation, EvaluationSet
from alignkit.jobs.cli import _shown
from alignkit.jobs.parameters import notebook_parameters
from alignkit.jobs.report import build_report, overview

USER, YES, NO = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes."},
    {"role": "assistant", "content": "No."},
)
CHAT = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
PAIR = {"prompt": "How?", "chosen": " So.", "rejected": " No."}


def lines(path, records):
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def templated(template: str):
    """A tokenizer with that chat template."""
    tokenizer = desk_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


# --- 40 to 43: data --------------------------------------------------------------------------------------------------
def test_40_skip_bad_leaves_out_a_tenth_at_most(tmp_path):
    bad = {**PAIR, "chosen": None}
    path = lines(tmp_path / "a.jsonl", [PAIR] + [{**PAIR, "prompt": str(i)} for i in range(89)] + [bad] * 10)
    assert load_rows(path, skip_bad=True).skipped == 10
    with pytest.raises(DataError, match="11 of 101 rows cannot be used") as error:
        load_rows(lines(path, [PAIR] * 90 + [bad] * 11), skip_bad=True)
    assert "a.jsonl:91: chosen: is null" in str(error.value) and "at most 10% of the rows, here 10" in str(error.value)
    assert load_rows(lines(path, [PAIR, bad]), skip_bad=True).skipped == 1  # in a small file one row always may be
    with pytest.raises(DataError, match="99 of 101"):
        load_rows(lines(path, [PAIR, PAIR] + [bad] * 99), skip_bad=True)


BOMBS = {
    "zeros.jsonl.gz": b"\0" * 2**20,
    "blank.jsonl.gz": b"\n" * 2**20,
    "numbers.jsonl.gz": b"1\n" * 2**19,
    "array.json.gz": b"[" + b"1," * 2**19,
    "cells.csv.gz": b"a\n" * 2**19,
    "zeros.parquet.gz": b"\0" * 2**20,
}


@pytest.mark.parametrize("name, piece", BOMBS.items(), ids=BOMBS)
def test_43_a_packed_bomb_is_refused_before_its_rows_are_read(tmp_path, name, piece):
    with gzip.open(tmp_path / name, "wb", 1) as file:
        for _ in range(160):
            file.write(piece)
    begun = time.monotonic()
    with pytest.raises(DataError, match=r"inflates to more than [\d,]+ MiB, more than 200 times its size"):
        load_rows(tmp_path / name, skip_bad=True)
    assert time.monotonic() - begun < 5


def test_43_a_bomb_behind_good_rows_and_a_small_file_of_equal_rows(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(json.dumps({**PAIR, "prompt": os.urandom(2**16).hex()}).encode() + b"\n")
        for _ in range(160):
            file.write(b"1\n" * 2**19)
    begun = time.monotonic()
    with pytest.raises(DataError, match="is it a bomb"):
        check(tmp_path / "a.jsonl.gz")
    assert time.monotonic() - begun < 5
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(PAIR).encode() * 1 + b"\n" * 200_000))
    assert check(tmp_path / "b.jsonl.gz").rows == 1


def test_43_a_plain_file_has_no_such_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("alignkit.data.files.SMALL", 100)
    assert check(lines(tmp_path / "a.jsonl", [PAIR] * 1000)).rows == 1000


@pytest.mark.parametrize("values, width", [(3000, 2**20), (300_000, 1), (200, 12 * 2**20)])
def test_43_a_parquet_file_that_says_one_value_a_million_times(tmp_path, values, width):
    import pyarrow
    from pyarrow import parquet

    column = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * values, pyarrow.int32()), pyarrow.array(["a" * width])
    )
    table = pyarrow.table({"prompt": column, "chosen": column, "rejected": column})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd", store_schema=False)
    assert (tmp_path / "a.parquet").stat().st_size < 20_000
    code = (
        f"import resource, sys; from alignkit.data.rows import check\n"
        f"from pyarrow import parquet; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"try: check({str(tmp_path / 'a.parquet')!r})\nexcept ValueError as error: print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "is it a bomb?" in done.stdout, done
    assert time.monotonic() - begun < 10 and int(done.stdout.split()[-1]) < 500


def test_42_an_exception_without_a_message(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda name: (_ for _ in ()).throw(KeyError()))
    with pytest.raises(DataError, match="no such file or folder here, and alignkit cannot load this as a Hub data set"):
        load_rows("some/name")


# --- 48: chat templates ----------------------------------------------------------------------------------------------
HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
    "{% endfor %}",
    "macro": "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n else 'x' }}{% endmacro %}{{ f(60) }}",
    "text": "{{ 'x' * (3 * 10**9) }}",
    "number": "{{ (2 ** (10 ** 9))|length }}",
    "number in a loop": "{% set n = namespace(v=7) %}{% for a in range(60) %}{% set n.v = n.v * n.v %}{% endfor %}{{ n.v }}",  # noqa: E501
    "range": "{% for a in range(10**9) %}{% endfor %}",
    "doubled": "{% set n = namespace(v='xxxxxxxx') %}{% for a in range(60) %}{% set n.v = n.v ~ n.v %}{% endfor %}{{ n.v }}",  # noqa: E501
    "list in a list": "{% set n = namespace(v=[1]) %}{% for a in range(60) %}{% set n.v = [n.v, n.v] %}{% endfor %}{{ n.v }}",  # noqa: E501
    "json": "{% set n = namespace(v=[1]) %}{% for a in range(60) %}{% set n.v = [n.v, n.v] %}{% endfor %}{{ n.v|tojson }}",  # noqa: E501
    "padding": "{{ '%2000000000d' % 1 }}",
    "center": "{{ 'x'|center(3 * 10**9) }}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "error": "{{ raise_exception('x' * 10**8) }}",
    "output": "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "escape": "{{ ''.__class__.__mro__ }}",
    "method": "{{ '{:>3000000000}'.format(1) }}",
}


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE)
def test_48_a_hostile_template_ends_in_an_error(tmp_path, template, monkeypatch):
    monkeypatch.setattr(chat, "FIRST", 1.5)
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(DataError, match="the chat template|renders the chat template") as error:
        load_rows(lines(tmp_path / "a.jsonl", [CHAT] * 3), tokenizer=templated(template))
    assert time.monotonic() - begun < 8 and len(str(error.value)) < 3000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024


def test_48_the_limit_of_time_is_its_own_and_the_next_template_is_rendered(tmp_path):
    assert chat.FIRST + chat.PER_ROW * rows.ROWS_AT_ONCE < 10
    with pytest.raises(DataError, match="takes too long"):
        load_rows(lines(tmp_path / "a.jsonl", [CHAT]), tokenizer=templated(HOSTILE["loops"]))
    assert load_rows(tmp_path / "a.jsonl", tokenizer=templated(HONEST[0]))[0]["chosen"] == "Yes.<x>"


HONEST = [
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<x>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",  # noqa: E501
    "{{ bos_token }}{%- for m in messages %}{% set n = namespace(a=m['content']) %}\n{{ n.a | trim }}|{% if loop.first %}"  # noqa: E501
    "{% continue %}{% endif %}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}{{ dict(a=1) | tojson(indent=2) }}\n{% endfor %}",  # noqa: E501
    "{{ tools is none }}{{ documents is none }}{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{{ m.x }}\n"  # noqa: E501
    "{% endfor %}",
]


@pytest.mark.parametrize("template", HONEST)
def test_48_an_honest_template_is_rendered_as_transformers_does(template):
    tokenizer = templated(template)
    replies = [YES | {"reasoning": "because", "x": None}, NO | {"content": "ünï 🙂\n"}]
    (texts,) = chat.chat_template_of(tokenizer).render([([USER], replies)])
    head = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert texts == [
        head,
        *(tokenizer.apply_chat_template([USER, reply], tokenize=False)[len(head) :] for reply in replies),
    ]


def test_48_rows_keep_their_order_and_a_refused_one_its_line(tmp_path):
    template = (
        "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('no') }}{% endif %}{{ m.content }}|"
        "{% endfor %}"
    )
    some = [{**CHAT, "prompt": [{**USER, "content": "bad" if n == 70 else f"n{n}"}]} for n in range(150)]
    loaded = load_rows(lines(tmp_path / "a.jsonl", some), tokenizer=templated(template), skip_bad=True)
    assert [row["prompt"] for row in loaded] == [f"n{n}|" for n in range(150) if n != 70]
    assert [problem.line for problem in loaded.problems] == [71]


@pytest.mark.skipif(not os.path.exists("/proc/self/limits"), reason="the system's limits are read from /proc")
def test_48_the_system_keeps_the_memory_of_the_process():
    made = chat.ChatTemplate("{{ messages[0].content }}", {})
    made.render([([USER], [])])
    with open(f"/proc/{made.process.pid}/limits", encoding="ascii") as file:
        (line,) = [line for line in file if line.startswith("Max address space")]
    assert int(line.split()[3]) < 450 * 2**20
    made.close()


def test_48_the_process_that_renders_knows_no_secret(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "secret")
    made = chat.ChatTemplate("{{ messages[0].content }}", {})
    made.render([([USER], [])])
    if os.path.exists("/proc"):
        with open(f"/proc/{made.process.pid}/environ", "rb") as file:
            assert b"secret" not in file.read()
    made.close()
    assert made.process.poll() is not None


# --- 50 and 51: what is printed and written --------------------------------------------------------------------------
NAMES = [
    '=HYPERLINK("http://x")',
    "+1",
    "-rf",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    " =1",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "a|b",
    "`x`",
    "\x1b[31mred\x1b[0m",
    "\u202egnp.exe",
    "a\nb",
    "# head",
    "https://x.y",
]


def evaluation(name: str, shift: float = 0.0) -> Evaluation:
    """A small evaluation of two prompts."""
    evalset = EvaluationSet(("a", "b"), (0, 1), ("all", "all"), samples=2)
    return Evaluation(
        evalset,
        {
            "response": ["a", "b", "c", "d"],
            "length": [1] * 4,
            "tokens": [2] * 4,
            "finished": [True] * 4,
            "logp": [-1.0 - shift] * 4,
            "entropy": [1.0] * 4,
        },
        None,
        name,
    )


@pytest.mark.parametrize("name", NAMES)
def test_51_a_name_is_no_formula_no_markup_and_no_line(name):
    compared = compare({"sft": evaluation("sft"), name: evaluation(name, 1.0)})
    cells = list(csv.reader(io.StringIO(compared.to_csv())))
    named = {line[0] for line in cells[1:]} - {"sft"}
    assert len(named) == 1 and not re.match(r"\s*[=+\-@]|[\t\r\n]", named.pop())
    figures = [float(line[2]) for line in cells[1:]]
    assert any(value < 0 for value in figures) or len(figures) > 3  # numbers stay numbers
    markdown, shown = compared.markdown(), str(compared)
    assert "<img" not in markdown and "](" not in markdown and "https://" not in markdown and "`x`" not in markdown
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    for text in (markdown, shown, compared.to_csv()):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", text)
    assert sum(line.startswith("length") for line in shown.splitlines()) <= 1


def test_50_a_path_is_printed_without_what_acts(tmp_path, capsys):
    path = tmp_path / "a\nb\x1b[31m\u202e"
    assert not re.search("[\n\x1b\u202e]", _shown(path))
    path.mkdir()
    (path / "summary.json").write_text('{"stages": {"x\\u001b\\ny": {}}}')
    assert "\x1b" not in overview(path) and "\u202e" not in overview(path) and "a\nb" not in overview(path)
    build_report(path)


# --- 52 and the dashboard --------------------------------------------------------------------------------------------
MESSAGES = [
    "[" * 100_000,
    '{"a":' * 100_000,
    '{"to": "x", "content": {"type": "set", "name": "lr", "value": 1' + "0" * 400 + "}}",
    '{"do": "train", "iterations": NaN}',
    '{"do": []}',
    '{"do": {"a": 1}, "names": 5}',
    '{"content": {}}',
    "null",
    "1",
    '"x"',
    "",
    "\x00",
    '{"to": [], "content": {"type": []}}',
    '{"a": 1' + "0" * 5000 + "}",
]


def test_52_no_message_ends_the_line_and_no_log_line_holds_the_token(caplog):
    """A dashboard with a cockpit's controls and an explorer in it, and every message to each."""
    controls, task = Controls({"lr": (0.0, 1.0, 0.5)}), SimpleNamespace(world="desk")
    playground = SimpleNamespace(run="run", about="", checkpoints=dict, runs=list, unfinished=list, task=task,
                                 config=PPOConfig)

    def receive(content: dict) -> None:
        if content.get("type") == "raise":
            raise RuntimeError("a widget's own fault")
        controls.ask(content.get("name"), content.get("value"))

    async def test() -> list[str]:
        dashboard = server.Dashboard(playground)
        dashboard.listen()
        channel = dashboard.mount("train", "cockpit", {}, receive)
        explorer = ClipExplorer()
        explorer.view = dashboard.mount("frontier", "explorer", {}, explorer.receive)
        page = await websocket_connect(f"ws://127.0.0.1:{dashboard.port}/socket?token={dashboard.token}")
        for message in MESSAGES:
            page.write_message(message)
        await page.write_message(b"\xff\xfe", binary=True)
        for to in (channel.mount["mount"], explorer.view.mount["mount"]):
            for content in (
                {"type": "raise"},
                {"type": "set", "name": "lr", "value": 10**400},
                {"type": "press", "name": {}},
                {"type": "set", "values": {"epsilon": 10**400}},
                {"type": [], "n": {"a": [1]}},
                {"type": "set", "values": 5, "n": 10**400},
                {"type": "set", "values": [[1]]},
            ):
                page.write_message(json.dumps({"to": to, "content": content}))
        page.write_message('{"to": "' + explorer.view.mount["mount"] + '", "content": {"n": 77}}')
        told = []
        while '"n": 77' not in "".join(told[-1:]):
            told.append(await asyncio.wait_for(page.read_message(), 10) or "CLOSED")
            assert told[-1] != "CLOSED"
        for path in ("/nothing", "/file/x.js", "/socket"):
            await AsyncHTTPClient().fetch(
                f"http://127.0.0.1:{dashboard.port}{path}?token={dashboard.token}", raise_error=False
            )
        dashboard.take = lambda message: 1 / 0  # even a fault of the server's own is not told with the token
        page.write_message("{}")
        await asyncio.sleep(0.2)
        await dashboard.close()
        assert dashboard.token not in caplog.text and "Traceback" not in caplog.text
        assert "ZeroDivisionError in /socket" in caplog.text
        return told

    with caplog.at_level(logging.DEBUG):
        told = asyncio.run(test())
    assert any("a message was not understood: RuntimeError" in message for message in told)
    assert controls.waiting == {} and len(told) < 100


def test_a_name_in_a_run_folder_is_not_fetched(tmp_path, monkeypatch):
    run = tmp_path / "run"
    for stage in ("sft", "reward"):
        (run / stage).mkdir(parents=True)
        (run / stage / "config.json").write_text("{}")
    (run / "run.json").write_text('{"model": "tiny", "data": "evil/dataset", "seed": 0}')

    def asked(*_args, **_options):
        raise AssertionError("it asked the network")

    monkeypatch.setattr(socket.socket, "connect", asked)
    monkeypatch.setattr("datasets.load_dataset", asked)
    monkeypatch.setattr("alignkit_widgets.app.playground.load_policy", lambda path: (None, desk_tokenizer()))
    with pytest.raises(RunError, match="'evil/dataset', which is no file or folder here.*--data NAME"):
        open_playground(run)
    for wrong in ('{"data": 5}', '{"seed": "x"}', '{"seed": -1}', '{"model": []}', "[]", "{", '{"data": ""}'):
        (run / "run.json").write_text(wrong)
        with pytest.raises(RunError, match=r"run\.json"):
            open_playground(run)


# --- records ---------------------------------------------------------------------------------------------------------
def test_an_evaluation_set_that_is_none_is_named_with_its_field(tmp_path):
    path = tmp_path / "evaluation_set.json"
    good = {"hash": evaluation("a").set.hash, **evaluation("a").set._fields()}
    for broken in (
        {},
        good | {"prompts": 5},
        good | {"keys": ["a", "b"]},
        good | {"samples": 10**400},
        good | {"hash": None},
        good | {"kinds": []},
        good | {"seed": 1},
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(RunError, match=re.escape(str(path))):
            EvaluationSet.load(path)
    evaluation("a").save(path)
    assert Evaluation.load(path).metrics
    stored = json.loads(path.read_text())
    for name, value in (("columns", {}), ("set", 5), ("gold_scale", [1]), ("name", 3)):
        path.write_text(json.dumps(stored | {name: value}))
        with pytest.raises(RunError, match="no evaluation"):
            Evaluation.load(path)


@pytest.mark.parametrize(
    "line",
    [
        '{"item": "x", "choice": "a", "order": [], "prompt": "p", "responses": {}}',
        "[" * 100_000,
        '{"item": "x", "choice": "a", "order": 5, "prompt": "p", "responses": 5}',
        "5",
        '{"item": [], "choice": [], "order": ["a"], "prompt": "p", "responses": {"a": 1}}',
        "{}",
    ],
)
def test_a_label_log_that_is_none(tmp_path, line):
    items = choice_items([{"prompt": "p", "responses": {"a": "x", "b": "y"}}])
    (tmp_path / "labels.log.jsonl").write_text(line + "\n" + '{"undo": "x"}\n')
    with pytest.raises(RunError, match="labels.log.jsonl:1"):
        ChoiceLog(tmp_path / "labels.jsonl", items)


def test_a_log_of_a_run_that_is_none(tmp_path):
    log = tmp_path / "metrics.jsonl"
    for line in (
        '{"controls": {"lr": 1}}',
        '{"step": "x", "controls": {}}',
        '{"step": 1, "controls": [1]}',
        '{"step": 1, "controls": {"lr": 1' + "0" * 400 + "}}",
        '{"step": 1, "shares": 5, "controls": {"lr": 1}}',
    ):
        log.write_text(line + "\n")
        with pytest.raises(RunError):
            replay(log)
    log.write_text("")
    (tmp_path / "metrics.branch-1.jsonl").write_text("")
    assert branches_of(log, []) == []


@pytest.mark.parametrize(
    "notebook",
    [
        '{"cells": 5}',
        '{"cells": [5, {"outputs": 5}, {"outputs": [5], "source": 5}]}',
        "5",
        "[",
        '{"cells": [{"metadata": {"tags": 5}, "outputs": [{"data": 5, "metadata": 5}]}]}',
    ],
)
def test_a_notebook_that_is_none_in_report_and_parameters(tmp_path, notebook):
    (tmp_path / "01_sft.ipynb").write_text(notebook)
    (tmp_path / "jobs.json").write_text('{"01_sft": {"status": 5, "error": []}, "x": 5}')
    (tmp_path / "summary.json").write_text(
        '{"seconds": {"01_sft": 1e999}, "stages": {"sft": {"kl_to_sft": 1' + "0" * 400 + "}}}"
    )
    assert build_report(tmp_path).exists() and overview(tmp_path)
    with pytest.raises(ParameterError, match=r"01_sft\.ipynb"):
        notebook_parameters(tmp_path / "01_sft.ipynb")


@pytest.mark.parametrize(
    "source",
    [
        "a = " + "(" * 3000 + "1" + ")" * 3000,
        "a = \x00",
        "a = '",
        "a = " + "-" * 50_000 + "1",
        "a = {[]: 1}",
        "a = 1" + "0" * 5000,
        "a = '\ud800'",
        "a[0] = 1",
        "a = b",
        "  a = 1",
    ],
)
def test_parameters_that_break_the_parser(tmp_path, source):
    cells = [{"metadata": {"tags": ["parameters"]}, "source": [source]}]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}))
    try:
        notebook_parameters(tmp_path / "a.ipynb")
    except AlignkitError as error:
        assert "a.ipynb" in str(error)
