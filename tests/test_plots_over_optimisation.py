"""The pictures of notebook 07: what is drawn is what was given."""

import numpy as np
import pytest

from alignkit import plots

KL = [0.0, 1.0, 2.0]


def test_fitted_forms_are_lines_over_the_points_that_were_measured():
    figure = plots.plot_fit_panels({"PPO": ([0.5, 1.0], [0.2, 0.4]), "best of n": ([1.0], [0.3])},
                                   {"PPO": {"straight": (KL, [0, 1, 2])}, "best of n": {}})
    first, second = figure.axes
    assert [line.get_ydata().tolist() for line in first.lines] == [[0.2, 0.4], [0, 1, 2]]
    assert first.lines[0].get_linestyle() == "None" and first.lines[1].get_linestyle() != "None"
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["straight"] and len(second.lines) == 1


def test_repeats_are_a_mean_with_a_band_and_panels_share_their_scale():
    figure = plots.plot_gold_panels({"one": {"a": (KL, [[0, 1, 0], [0, 3, -8]])}, "two": {"b": (KL, [0, 5, 1])}},
                                    bottom=-2)
    first, second = figure.axes
    assert first.lines[0].get_ydata().tolist() == [0, 2, -4]
    corners = first.collections[0].get_paths()[0].vertices
    assert corners[:, 1].min() == -8 and corners[:, 1].max() == 3 and not second.collections
    assert first.get_ylim() == second.get_ylim() and first.get_ylim()[0] == -2 and first.get_ylim()[1] > 5


def test_ends_of_runs_are_markers_in_the_colour_of_their_path():
    path = {"kl": KL, "proxy": [0, 1, 2], "gold": [0, 1, 0]}
    figure = plots.plot_stopping_panels({"world 0": path}, {"world 0": {"kl": [1], "proxy": [1.5], "gold": [0.9]}})
    for ax, value in zip(figure.axes, (1.5, 0.9), strict=True):
        line, end = ax.lines
        assert end.get_ydata().tolist() == [value] and end.get_color() == line.get_color()
    assert np.allclose(figure.axes[1].lines[0].get_ydata(), path["gold"])


@pytest.mark.parametrize("draw", [
    lambda: plots.plot_fit_panels({"a": (KL, [1])}, {"a": {}}),
    lambda: plots.plot_gold_panels({"a": {"b": (KL, [1.0])}}),
    lambda: plots.plot_stopping_panels({"a": {"kl": KL, "proxy": [1], "gold": [1]}},
                                       {"a": {"kl": [], "proxy": [], "gold": []}})])
def test_lengths_that_differ_are_refused(draw):
    with pytest.raises(ValueError, match="length"):
        draw()
