"""The pictures of the claims lab: what is drawn is what was given."""

import numpy as np
import pytest

from alignkit import plots
from alignkit.evaluate.claims import Claim


def claim(name, values, side="above", margin=0.1):
    return Claim(name, "S0", "原文", f"Claim {name}", "x", side, margin, "arms", dict(enumerate(values)))


def test_a_claim_is_drawn_in_units_of_its_margin_turned_to_the_claimed_side():
    ax = plots.plot_claims([claim("C1", [0.2, 0.3, 0.4]), claim("C2", [0.2, 0.3, 0.4], "below"),
                            claim("C3", [9.0, 9.1, 9.2])])
    worlds = [line for line in ax.lines if line.get_marker() == "|"]
    assert worlds[0].get_xdata() == pytest.approx([2, 3, 4]) and worlds[1].get_xdata() == pytest.approx([-2, -3, -4])
    assert worlds[2].get_xdata() == pytest.approx([6, 6, 6]), "too far to the right to be drawn in place"
    means = [line.get_xdata()[0] for line in ax.lines if line.get_marker() in ("o", "X", "s")]
    assert means == pytest.approx([3, -3, 6])
    assert [text.get_text() for text in ax.texts] == ["0.3, confirmed", "0.3, refuted", "9.1, confirmed"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["C1 Claim C1", "C2 Claim C2", "C3 Claim C3"]


def test_a_claim_that_was_measured_in_no_world_is_undecided_and_drawn_at_0():
    ax = plots.plot_claims([claim("C1", [None, None])])
    assert ax.texts[0].get_text() == "nan, undecided"


def test_paths_share_their_scale_and_end_in_a_dot():
    figure = plots.plot_paths_panels({"PPO": [([0, 1], [0, 0.5]), ([0, 2], [0, 0.9])], "DPO": [([0, 1], [0, -1])]})
    first, second = figure.axes
    assert len(first.lines) == 4 and len(second.lines) == 2 and first.get_ylim() == second.get_ylim()
    assert np.allclose(first.lines[3].get_xdata(), 2) and first.lines[3].get_marker() == "o"


@pytest.mark.parametrize("draw", [lambda: plots.plot_claims([]), lambda: plots.plot_paths_panels({}),
                                  lambda: plots.plot_paths_panels({"PPO": [([0, 1], [0])]})])
def test_nothing_to_draw_and_lengths_that_differ_are_refused(draw):
    with pytest.raises(ValueError):
        draw()
