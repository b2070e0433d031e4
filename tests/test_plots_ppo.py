"""The pictures of notebook 03a: ratios of tokens."""

import numpy as np
import pytest

from alignkit import plots

RATIOS = {"with clip": np.array([0.5, 0.9, 1.0, 1.1, 9.0]), "without clip": np.array([0.1, 1.0, 1.0, 50.0])}


def test_ratios_are_counted_up_to_the_top_and_the_clip_is_shaded():
    ax = plots.plot_ratios(RATIOS, 0.2, top=3.0)
    shaded = ax.patches[-1].get_extents().transformed(ax.transData.inverted())
    assert (shaded.x0, shaded.x1) == pytest.approx((0.8, 1.2))
    assert ax.dataLim.x1 <= 3.0 + 1e-9, "a ratio of 50 is counted at the top"
    assert "above 3: counted at 3" in ax.get_xlabel() and ax.get_ylabel() == "share of tokens, %"
    assert "clip_range = 0.2" in ax.get_title(loc="left") + ax.get_title()
    names = " ".join(text.get_text() for text in ax.get_legend().get_texts())
    assert "with clip" in names and "without clip" in names


def test_an_infinite_clip_range_shades_everything_that_is_drawn():
    ax = plots.plot_ratios(RATIOS, float("inf"), top=2.0)
    shaded = ax.patches[-1].get_extents().transformed(ax.transData.inverted())
    assert (shaded.x0, shaded.x1) == pytest.approx((0.0, 2.0))


@pytest.mark.parametrize("ratios, says", [
    ({}, "ratios is empty"), ({"a": [1.0, -0.1]}, r"ratios\['a'\] has a value below 0")])
def test_what_are_no_ratios_is_refused(ratios, says):
    with pytest.raises(ValueError, match=says):
        plots.plot_ratios(ratios)
