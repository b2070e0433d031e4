"""Readings: verdicts against their definition, wordings, and what an executed notebook keeps of them."""

import itertools
import json
import math

import nbformat
import numpy as np
import pytest

from alignkit import Estimate, mean_estimate, reading, readings_of, share_estimate
from alignkit.evaluate.readings import METADATA
from alignkit.formulas.intervals import student_t, wilson

WORDS = {"holds": "It rose.", "fails": "It did not rise.", "unclear": "Whether it rose cannot be told."}


def verdict(low, high, above=None, below=None):
    return reading("x", "change", Estimate((low + high) / 2, low, high), above=above, below=below, **WORDS).verdict


@pytest.mark.parametrize("above, below", [(0, None), (None, 0), (-1, 1), (0, 2)])
def test_a_verdict_is_what_every_point_of_the_interval_says(above, below):
    """Slow reference: the range is asked at many points of the interval."""
    for low, high in itertools.combinations_with_replacement(np.arange(-3, 3.25, 0.25), 2):
        points = np.linspace(low, high, 101)
        inside = (points > (-math.inf if above is None else above)) & (points < (math.inf if below is None else below))
        expected = "holds" if inside.all() else "fails" if not inside.any() else "unclear"
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
