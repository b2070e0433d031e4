"""report.html: what is in it, and what text of models and files cannot do to it."""

import base64
import json
import re
from html.parser import HTMLParser

import nbformat
import pytest

from alignkit.errors import RunError
from alignkit.evaluate.readings import reading
from alignkit.jobs.notebook_page import write_notebook_page
from alignkit.jobs.report import build_report, overview
from alignkit.pages.render import picture, render
from alignkit.runs.records import record_seconds, start_run, write_results
from alignkit.safe_text import visible

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><button data-commandlinker-command="x">ok</button>',
    "[click](javascript:alert(1))",
    "$$\\href{javascript:alert(1)}{x}$$",
    "</td></table><iframe src=//example.org>",
    "\x1b[31mred\x1b[0m \x1b]8;;http://example.org\x07link\x1b]8;;\x07",
    "\u202egnp.exe\u2066 \u200b \ud800 \x00",
    "A" * 1_000_000,
]


class _Seen(HTMLParser):
    """Collects the tags, attributes and text of a page."""

    def __init__(self, source: str):
        super().__init__()
        self.tags, self.attributes, self.said = [], [], ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.said += data


def policy(gold: float, risky: float) -> dict:
    shares = {kind: {"answer": 0.25, "unsafe": risky} for kind in ("benign", "risky")}
    return {
        "gold_mean": gold,
        "gold_ci95": [gold - 0.1, gold + 0.1],
        "risky_failure_rate": risky,
        "kl_to_sft": 1.5,
        "behaviour_shares": shares,
        "config": {"kl_coef": 0.05},
    }


@pytest.fixture
def run(tmp_path):
    """A run directory as five notebooks leave it, with hostile text wherever text can be."""
    run = start_run(tmp_path / "a <b>run", "tiny", HOSTILE[0], 0)
    for stage, results in {
        "sft": policy(0, 0.31),
        "reward": {"accuracy_labels": 0.712, "bayes_accuracy": 0.744, "ece": 0.03, HOSTILE[1]: HOSTILE[2]},
        "ppo": policy(-0.62, 0.03),
        "dpo": policy(0.66, 0.02),
    }.items():
        write_results(run, stage, results)
    for stage in ("sft", "dpo"):
        rows = [{"prompt": words, "stage": stage, "response": words, "kind": words} for words in HOSTILE]
        (run / stage / "samples.json").write_text(json.dumps(rows))
    record_seconds(run, "01_sft", 12.5)
    nb = nbformat.v4.new_notebook()
    for caption, tags in (("A chart for the report", ["report"]), ("Another chart", [])):
        cell = nbformat.v4.new_code_cell(f"# {caption} {HOSTILE[0]}\nplot()", metadata={"tags": tags})
        bundle = {"image/png": base64.b64encode(PNG).decode(), "text/html": HOSTILE[0]}
        facts = {"image/png": {"alt": f"what it shows {HOSTILE[1]}", "width": 1}}
        cell.outputs = [nbformat.v4.new_output("display_data", bundle, metadata=facts)]
        nb.cells.append(cell)
    cell = nbformat.v4.new_code_cell("x", metadata={"tags": ["report"]})
    cell.outputs = [nbformat.v4.new_output("display_data", {"image/png": "bm90IGEgcG5n"})]
    shown = reading("01.x", HOSTILE[1], 0.25, above=0, holds=f"It rose {HOSTILE[0]}", fails="f", unclear="u")
    bundle, facts = shown._repr_mimebundle_()
    cell.outputs.append(nbformat.v4.new_output("display_data", bundle, metadata=facts))
    nb.cells.append(cell)
    nbformat.write(nb, run / "01_sft.ipynb")
    failed = {"status": "failed", "error": f"03b_ppo failed in cell 3, `x`: ValueError: {HOSTILE[1]}"}
    (run / "jobs.json").write_text(json.dumps({"01_sft": {"status": "finished"}, "03b_ppo": failed}))
    return run


def test_hostile_text_is_only_ever_text(run):
    source = build_report(run).read_text()
    seen = _Seen(source)
    assert not {"script", "iframe", "button", "object", "embed", "form", "base"} & set(seen.tags)
    assert all(value.startswith("data:image/png;base64,") for _, name, value in seen.attributes if name == "src")
    assert all(re.fullmatch(r"#?[\w.]+", value) for _, name, value in seen.attributes if name == "href")
    assert not [name for _, name, _ in seen.attributes if name.startswith("on") or name == "style"]
    assert "<script>alert(1)</script>" in seen.said  # it is there, to be read
    assert "Holds: It rose" in seen.said and "0.25 (exact); expected above 0" in seen.said  # what its readings say
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\u200b]", source)
    assert "⟨U+202E⟩" in seen.said and "␛[31m" in seen.said
    assert "[1,000,000 characters, the first 400 are shown]" in seen.said and len(source) < 100_000
    assert "default-src 'none'" in source and "http" not in source.replace("http-equiv", "").replace(
        "http://example", ""
    )


def test_the_page_shows_the_chain_the_figures_the_tagged_charts_and_how_to_repeat_it(run):
    said = _Seen(build_report(run).read_text()).said
    for words in (
        "SFT",
        "Reward model",
        "PPO",
        "Freeze & evaluate",
        "DPO",
        "not run",
        "31.0%",
        "−0.620",
        "−0.720 to −0.520",
    ):
        assert words in said, words
    assert "03b_ppo: failed" in said and "ValueError: <img" in said
    assert "A chart for the report" in said and "Another chart" not in said
    assert "alignkit course --out 'runs/a <b>run' --data '<script>" in said
    assert "Accuracy: 71.2%" in overview(run) and "report.html" in overview(run)


@pytest.mark.parametrize("interval, warned", [([0.45, 0.59], True), ([0.5, 0.62], True), ([0.501, 0.62], False),
                                              ("x", False), (None, False), ([None, 0.6], False)])
def test_a_reward_model_that_ranks_like_a_coin_is_told_in_red(run, monkeypatch, interval, warned):
    write_results(run, "reward", {"accuracy_labels": 0.52, "accuracy_labels_ci95": interval})
    page = build_report(run).read_text(encoding="utf-8")
    begins = "The reward model cannot be told from a coin: it ranks 52.0% of the held-out pairs"
    assert (begins in page) == warned and page.count('class="alert"') == 1 + warned
    assert (f"\n{begins}" in overview(run)) == warned and "\x1b" not in overview(run)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert (f"\x1b[31m{begins}" in overview(run)) == warned
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in overview(run)


def test_the_command_repeats_the_run_parameter_by_parameter(run):
    def job(given, **parameters):
        return {"status": "finished", "given": given, "key": {"parameters": parameters | given}}

    source = (run / "01_sft.ipynb").read_bytes()
    (run / "03b_ppo.ipynb").write_bytes(source)
    (run / "jobs.json").write_text(json.dumps({
        "01_sft": job({"pairs": 5, "epochs": 2}, learning_rate=None),
        "03b_ppo": job({"learning_rate": 0.1, "pairs": 5})}))
    assert "-p pairs=5 -p epochs=2 -p ppo.learning_rate=0.1" in "".join(_Seen(build_report(run).read_text()).said)
    for name in ("01_sft", "03b_ppo"):
        (run / f"{name}.ipynb").unlink()
    (run / "your_model.ipynb").write_bytes(source)
    (run / "your_model.new.ipynb").write_bytes(source)  # at work
    (run / "jobs.json").write_text(json.dumps({"your_model": job({"model": "org/name", "seed": 3})}))
    page = _Seen(build_report(run).read_text())
    assert "alignkit run your_model --out 'runs/a <b>run' -p model=org/name -p seed=3" in page.said
    assert "Your model" in page.said and ".new.ipynb" not in page.said
    (run / "03a_ppo_by_hand.ipynb").write_bytes(source)
    assert "PPO by hand" in _Seen(build_report(run).read_text()).said


def test_every_table_has_a_caption_and_headings_and_every_picture_alt_text(run):
    source = build_report(run).read_text()
    seen = _Seen(source)
    assert seen.tags.count("table") == seen.tags.count("caption") > 5
    assert seen.tags.count("table") == len(re.findall(r"<thead><tr><th scope=col>", source))
    assert [value for tag, name, value in seen.attributes if (tag, name) == ("img", "alt")] == [
        f"what it shows {HOSTILE[1]}"
    ]


def test_charts_of_a_notebook_without_tags_are_all_shown(run):
    nb = nbformat.read(run / "01_sft.ipynb", 4)
    for cell in nb.cells:
        cell.metadata.pop("tags", None)
    nbformat.write(nb, run / "01_sft.ipynb")
    assert "Another chart" in build_report(run).read_text()


def test_a_report_is_made_of_whatever_is_there(tmp_path):
    (tmp_path / "jobs.json").write_text('{"01_sft": {"status": "running"}, "x": 3}')
    (tmp_path / "summary.json").write_text("{torn")
    (tmp_path / "01_sft.ipynb").write_text("{")
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "samples.json").write_text('[1, {"prompt": "p"}, {"prompt": ["p"], "response": null}]')
    assert "not finished" in build_report(tmp_path).read_text()


@pytest.mark.parametrize("name", [".", "nowhere"])
def test_a_folder_that_is_no_run_is_refused(tmp_path, name):
    with pytest.raises(RunError, match="is not a run directory"):
        build_report(tmp_path / name)


def test_the_pieces_of_a_page():
    assert picture(b"GIF89a", "alt") is None
    samples = [{"prompt": "a <b>", "kind": "", "responses": [["<i>", " \n"], []]}]
    chart = picture(PNG, "a <b>")
    page = render("compare.html", names=["<b>", "x"], cells=[["", "x"]], remarks=['<a href="x">'], pictures=[chart],
                  samples=samples, warning="")
    assert 'alt="a &lt;b&gt;" width=1 height=1>' in page and "<figcaption>" not in page
    assert "<h1>&lt;b&gt; · x</h1>" in page and "<p>&lt;a href=&#34;x&#34;&gt;</p>" in page
    assert "<td><p>&lt;i&gt;</p><p><i>(empty)</i></p></td><td>–</td>" in page
    assert page.count("<table>") == 1  # none without rows


def test_visible_text_keeps_what_can_be_seen_and_spells_out_the_rest():
    assert visible("é\n\t→ \x1b[1m \u202e \x7f") == "é\n\t→ ␛[1m ⟨U+202E⟩ ␡"
    assert visible("abc", 2) == "ab… [3 characters, the first 2 are shown]"


def job(given, **knows):
    return {"status": "finished", "given": given, "key": {"parameters": knows | given}}


@pytest.mark.parametrize("jobs, command", [
    ({"01_sft": job({"rate": "2", "seed": 1}), "03b_ppo": job({"rate": "2", "seed": 1})},
     "alignkit course --out runs/run --data pairs.jsonl -p rate=2 -p seed=1"),
    ({"01_sft": job({"rate": "2"}), "03b_ppo": job({"rate": "3"})},
     "alignkit course --out runs/run --data pairs.jsonl -p sft.rate=2 -p ppo.rate=3"),
    ({"01_sft": job({}, rate=1), "03b_ppo": job({"rate": "3"})},
     "alignkit course --out runs/run --data pairs.jsonl -p ppo.rate=3"),
    ({"01_sft": job({}), "03b_ppo": job({"clip": "3"})}, "alignkit course --out runs/run --data pairs.jsonl -p clip=3"),
    ({"your_model": job({"data": "pairs.jsonl", "pairs": 9})},
     "alignkit run your_model --out runs/run -p data=pairs.jsonl -p pairs=9"),
])
def test_the_command_that_repeats_a_run_gives_each_parameter_to_those_that_had_it(tmp_path, jobs, command):
    run = start_run(tmp_path / "run", "tiny", "pairs.jsonl", 0)
    write_results(run, "sft", policy(0, 0.31))
    (run / "jobs.json").write_text(json.dumps(jobs))
    for name in jobs:
        nbformat.write(nbformat.v4.new_notebook(), run / f"{name}.ipynb")
    assert f"<code>{command}</code>" in build_report(run).read_text()


def evaluated(run, **figures):
    """Add stored figures of SFT and PPO to a run: figure -> (SFT's, PPO's)."""
    summary = json.loads((run / "summary.json").read_text())
    del summary["stages"]["dpo"]
    for place, stage in enumerate(("sft", "ppo")):
        summary["stages"][stage] = {name: values[place] for name, values in figures.items()}
    (run / "summary.json").write_text(json.dumps(summary))


def test_three_sentences_come_first_and_over_refusal_that_rose_is_told_in_red(run, monkeypatch):
    from alignkit.evaluate import adviser, comparison, evaluation
    from alignkit.formulas.intervals import Estimate

    (run / "jobs.json").write_text("{}")
    evaluated(run, gold_mean=(0.0, 0.8), risky_failure_rate=(0.4, 0.01), kl_to_sft=(0.0, 1.9),
              over_refusal_rate=(0.01, 0.2), gold_ci95=([-0.1, 0.1], [0.7, 0.9]))
    for stage in ("sft", "ppo"):
        (run / stage).mkdir(exist_ok=True)
        (run / stage / "evaluation.json").touch()
    grown = Estimate(0.19, 0.1, 0.28)
    fake = type("Compared", (), {"difference": lambda *_: grown, "evaluations": {
        name: type("E", (), {"metrics": {"over_refusal_rate": 0}}) for name in ("SFT", "PPO")}})()
    monkeypatch.setattr(evaluation.Evaluation, "load", lambda _: None)
    monkeypatch.setattr(comparison, "compare", lambda _: fake)
    monkeypatch.setattr(adviser, "advice", lambda _: ["Freeze PPO.", "Later."])
    page = build_report(run).read_text()
    said = _Seen(page).said
    words = "SFT → PPO: gold reward 0 → 0.800 SFT-sd (95 % interval 0.700 to 0.900); risky failures 40.0% → 1.0%."
    assert words in said
    assert "KL to SFT 0 → 1.900 nats; over-refusal 1.0% → 20.0%" in said
    assert "Freeze PPO." in said and "Later." not in said
    assert "Over-refusal rose from SFT to PPO, by 19.0% [10.0%, 28.0%]" in said and 'class="alert"' in page
    assert page.index("class=verdict") < page.index('class="alert"') < page.index("class=chain")
    grown = Estimate(0.19, -0.1, 0.28)
    assert "Over-refusal rose" not in build_report(run).read_text(), "its interval contains 0"


def test_samples_and_all_but_the_first_chart_are_folded(run):
    page = build_report(run).read_text()
    assert page.index("<details", page.index("The same prompts, before and after")) < page.index("Sampled responses")


def test_an_executed_notebook_is_a_page_without_markup_of_its_text(run):
    build_report(run)
    source = (run / "01_sft.html").read_text()
    seen = _Seen(source)
    assert "default-src 'none'" in source and not {"script", "iframe", "object", "button"} & set(seen.tags)
    assert not [name for _, name, _ in seen.attributes if name.startswith("on")]
    assert "# A chart for the report <script>alert(1)</script>" in seen.said and seen.tags.count("img") == 2


@pytest.mark.parametrize("source", ["<script>window.x=1</script>", '<img src=x onerror="x()">', "[a](javascript:x)",
                                    '<a href="javascript:x">a</a>', '<p style="position:fixed">a</p>'])
def test_markdown_of_a_notebook_keeps_only_harmless_tags(tmp_path, source):
    cell = {"cell_type": "markdown", "source": source, "metadata": {}}
    (tmp_path / "one.ipynb").write_text(json.dumps({"cells": [cell, {"cell_type": "markdown", "source": "**bold**"}]}))
    page = write_notebook_page(tmp_path / "one.ipynb").read_text()
    body = page[page.index("<body"):]
    assert "<strong>bold</strong>" in body
    assert not re.search(r"<script|onerror|javascript:|style=|<img", body)
