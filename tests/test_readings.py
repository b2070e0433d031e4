"""Readings: verdicts against their definition, wordings, and what an executed notebook keeps of them."""

import itertools
import json
import math
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest

from alignkit import Estimate, mean_estimate, reading, readings_of, share_estimate
from alignkit.evaluate.readings import METADATA, RECORD
from alignkit.formulas.intervals import student_t, wilson
from alignkit.jobs.notebooks import run_notebook
from experiments import readings as experiment

ROOT = Path(__file__).parents[1]

WORDS = {"holds": "It rose.", "fails": "It did not rise.", "unclear": "Whether it rose cannot be told."}


def verdict(low, high, above=None, below=None):
    return reading("x", "change", Estimate((low + high) / 2, low, high), above=above, below=below, **WORDS).verdict


@pytest.mark.parametrize("above, below", [(0, None), (None, 0), (-1, 1), (0, 2)])
def test_a_verdict_is_what_every_point_of_the_interval_says(above, below):
    """Slow reference: the range is asked at many points of the interval."""
    for low, high in itertools.combinations_with_replacement(np.arange(-3, 3.25, 0.25), 2):
        points = np.linspace(low, high, 101)
        inside = (points > (-math.inf if above is None else above)) & (points < (math.inf if below is None else below))
        touches = above in (low, high) or below in (low, high)  # "fails" claims more than an end at the bound can
        expected = "holds" if inside.all() else "fails" if not inside.any() and not touches else "unclear"
        if expected == "fails" and low < (math.inf if below is None else below) and high > (
                -math.inf if above is None else above):
            continue  # a grid of points cannot see a range narrower than its step
        assert verdict(low, high, above, below) == expected, (low, high)


def test_an_interval_that_holds_zero_is_never_read_as_no_effect():
    for low, high in ((-0.1, 0.1), (-1e-9, 5.0), (-5.0, 1e-9)):
        assert verdict(low, high, above=0) == verdict(low, high, below=0) == "unclear"
    assert verdict(-0.01, 0.02, above=-0.1, below=0.1) == "holds"  # a small difference is claimed with both bounds


def test_a_plain_number_is_exact_and_too_few_prompts_are_unclear():
    assert reading("x", "c", 0.3, above=0, **WORDS).verdict == "holds"
    assert reading("x", "c", 0, above=0, **WORDS).verdict == "fails"
    assert "(exact)" in str(reading("x", "c", 0.3, above=0, **WORDS))
    same = reading("x", "c", Estimate(0.0, 0.0, 0.0), above=0, **WORDS)  # a sample in which nothing differed
    assert same.verdict == "unclear" and "exact" not in str(same)
    few = reading("x", "c", Estimate(0.3, None, None), above=0, **WORDS)
    assert few.verdict == "unclear" and "too few prompts" in str(few)
    assert reading("x", "c", float("nan"), above=0, **WORDS).verdict == "unclear"


@pytest.mark.parametrize("bounds, message", [({}, "has no range"), ({"above": 1, "below": 1}, "above=1 and below=1")])
def test_a_range_that_cannot_be_is_refused(bounds, message):
    with pytest.raises(ValueError, match=f"reading 'x' .*{message}|reading 'x' has {message}"):
        reading("x", "c", 0.3, **bounds, **WORDS)


def test_an_executed_notebook_keeps_its_readings_and_text_is_escaped(tmp_path):
    shown = reading("00.x", "a < b", Estimate(1.0, 0.5, 1.5), above=0, holds="<script>", fails="f", unclear="u")
    data, metadata = shown._repr_mimebundle_()
    assert "<script>" not in data["text/html"] and "a &lt; b" in data["text/html"]
    assert data["text/plain"].startswith("Holds: <script>\n    a < b: 1 (95 % interval 0.5 to 1.5); expected above 0")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("text"), nbformat.v4.new_code_cell(
        outputs=[nbformat.v4.new_output("stream", text="no"),
                 nbformat.v4.new_output("display_data", data=data, metadata=metadata)])])
    nbformat.write(notebook, tmp_path / "n.ipynb")
    [record] = readings_of(tmp_path / "n.ipynb")
    assert record == json.loads(json.dumps(metadata[METADATA]))
    assert record["name"] == "00.x" and record["verdict"] == "holds" and record["low"] == 0.5


def test_student_s_t_is_scipy_s():
    from scipy import stats

    for freedom in (1, 2, 3, 7, 10, 11, 20, 100):
        assert student_t(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-3)


def test_intervals_of_means_cover_as_often_as_they_say():
    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(4000, 5))
    covered = [estimate.low < 3.0 < estimate.high for estimate in map(mean_estimate, draws)]
    assert 0.938 < np.mean(covered) < 0.962  # 4 standard errors around 95 %
    assert mean_estimate([1.0]) == Estimate(1.0, None, None)
    assert (share_estimate(3, 10).low, share_estimate(3, 10).high) == wilson(3, 10)


# ---- the record over worlds
def record(name="05.x", value=1.0, low=0.5, high=1.5, verdict="holds"):
    return {"name": name, "what": "w", "above": 0, "below": None, "holds": "It rose.", "fails": "f", "unclear": "u",
            "value": value, "low": low, "high": high, "verdict": verdict}


def test_a_name_that_says_two_things_in_one_run_is_a_contradiction():
    assert experiment.contradictions([record(), record("05.y", verdict="fails")]) == []
    assert experiment.contradictions([record(), record(verdict="fails")]) == ["05.x: fails and holds"]


def test_equal_figures_are_one_world_and_a_sentence_that_holds_too_seldom_varies():
    table = experiment.summarise({0: [record()], 1: [record()], 2: [record(value=2.0)],
                                  3: [record(value=3.0, verdict="unclear")]})
    assert list(table["05.x"]["seeds"]) == ["0", "2", "3"]
    text = experiment.page({"command": "c", "seeds": [0, 1, 2, 3], "readings": table, "figures": [], "changes": {}})
    assert "| 2 | 0 | 1 | 1 · 2 · 3 |" in text.partition("## What varies")[2]
    steady = experiment.summarise({0: [record()], 2: [record(value=2.0)]})
    text = experiment.page({"command": "c", "seeds": [0, 2], "readings": steady, "figures": [], "changes": {}})
    assert "05.x" in text.partition("## What varies")[0]


def test_only_sentences_with_one_set_of_figures_are_read_anew():
    known = experiment.summarise({seed: [record(), record("05.y", value=float(seed))] for seed in (0, 1)})
    now = experiment.read_anew(known, [record(value=0.2, low=-0.1, verdict="unclear"), record("05.y", value=9.0),
                                       record("05.z")])
    assert now.keys() == known.keys() and now["05.y"] == known["05.y"]
    assert now["05.x"]["seeds"] == {"0": [0.2, -0.1, 1.5, "unclear"]}
    made = {"command": "c", "seeds": [0, 1], "readings": now, "figures": [], "changes": {}, "of_records": "again"}
    held, _, varies = experiment.page(made).partition("## What varies")
    assert "05.x" in varies and "05.y" in held and "read anew by `again`" in held
    made.pop("of_records")
    assert "read anew" not in experiment.page(made)


def test_a_run_without_readings_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        experiment.main(["--of-records", str(tmp_path), "--record"])
    assert "holds no executed notebook" in capsys.readouterr().err


def test_the_seed_of_a_commit_is_one_that_nobody_tuned_to():
    assert 1000 <= experiment.seed_of_commit() < 10_000


@pytest.fixture(scope="module")
def recorded():
    return json.loads(RECORD.read_text(encoding="utf-8"))


def test_every_reading_of_the_notebooks_is_recorded_and_no_other(recorded):
    written = set()
    for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"):
        source = "".join("".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
                         if cell["cell_type"] == "code")
        written |= set(re.findall(r"\"(\d\d[ab]?\.[a-z{][\w.{}()]*)\"", source))
    written -= {"04.proxy"}  # on files, where there is no gold
    patterns = [re.sub(r"\\{.*?\\}", r"\\w+", re.escape(name)) for name in written]  # a name may have a field, 10.{key}
    missing = [name for name, pattern in zip(written, patterns, strict=True)
               if not any(re.fullmatch(pattern, known) for known in recorded["readings"])]
    gone = [known for known in recorded["readings"] if not any(re.fullmatch(pattern, known) for pattern in patterns)]
    assert not missing and not gone


@pytest.mark.slow
def test_what_the_notebooks_read_from_the_present_records_is_recorded(recorded, tmp_path):
    """06 and 07 in an empty run directory: all that they say there is about the records that come with alignkit."""
    for name in ("06_reward_vs_kl", "07_over_optimisation"):
        run_notebook(name, tmp_path, {}, progress=False)
    said = experiment.readings_of_run(tmp_path)
    now = experiment.read_anew(recorded["readings"], said)
    checked = [row["name"] for row in said if len(now[row["name"]]["seeds"]) == 1]
    assert len(checked) > 15
    for name in checked:
        (figures,), (before,) = now[name]["seeds"].values(), recorded["readings"][name]["seeds"].values()
        assert figures[:3] == pytest.approx(before[:3], abs=1e-9) and figures[3] == before[3], name


def test_the_pages_and_the_readme_are_made_from_it(recorded):
    assert {0, 1, 2, 3, 4} < set(recorded["seeds"]) and len(recorded["seeds"]) >= 12  # 0-4 and others
    assert (ROOT / "docs" / "readings.md").read_text(encoding="utf-8") == experiment.page(recorded)
    rows = {f"| {row['what']} | {row['median']:.3f} | {row['worst']:.3f} |".replace("−", "-")
            for row in recorded["figures"]}
    measured, readme = ((ROOT / name).read_text(encoding="utf-8").replace("−", "-").splitlines()
                        for name in ("docs/measured.md", "README.md"))
    assert rows <= set(measured)
    shown = [line for line in readme if line.startswith(("| SFT: ", "| PPO: ", "| DPO on frozen PPO: "))]
    assert len(shown) >= 5 and set(shown) <= rows
