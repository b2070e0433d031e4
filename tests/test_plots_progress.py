"""The picture of how soon runs are good: what is drawn is what was given."""

import pytest

from alignkit import plots


def test_courses_are_drawn_under_their_names_with_the_level():
    ax = plots.plot_progress({"a": [([0, 1], [0, 0.5]), ([0, 2], [0, 0.9])], "b": [([0, 1], [0, 1])]}, 0.9)
    assert [line.get_ydata()[-1] for line in ax.lines] == [0.5, 0.9, 1, 0.9]
    assert ax.lines[0].get_color() == ax.lines[1].get_color() != ax.lines[2].get_color()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    for wrong in ({}, {"a": [([0, 1], [0])]}):
        with pytest.raises(ValueError):
            plots.plot_progress(wrong, 0.9)
