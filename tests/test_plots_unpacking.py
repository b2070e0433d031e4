"""The pictures of unpacking: what is drawn is what was given."""

import pytest

from alignkit import plots


def test_a_dot_plot_has_a_mark_for_every_value_in_the_order_of_the_rows():
    ax = plots.plot_dots({"safety": [1.0, 12.0], "coding": [3.0, -2.0]}, ["first", "second"], "points", zero=True)
    drawn = {tuple(line.get_xdata()) for line in ax.lines}
    assert {(1.0, 12.0), (3.0, -2.0)} <= drawn and (0, 0) in drawn
    assert [text.get_text() for text in ax.get_yticklabels()] == ["first", "second"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["safety", "coding"]
    low, high = ax.get_ylim()
    assert low > high, "the first row is on top"


def test_shares_of_variance_lie_one_after_the_other_and_large_ones_have_their_figure():
    ax = plots.plot_variance_shares({"gold": {"data": 0.7, "algorithm": 0.25, "both": 0.05},
                                     "safe": {"data": 0.1, "algorithm": 0.2, "both": 0.7}})
    begun = [[bar.get_x() for bar in container] for container in ax.containers]
    widths = [[bar.get_width() for bar in container] for container in ax.containers]
    assert begun[0] == [0, 0] and begun[1] == pytest.approx([0.7, 0.1]) and begun[2] == pytest.approx([0.95, 0.3])
    assert widths[1] == pytest.approx([0.25, 0.2])
    assert [text.get_text() for text in ax.texts] == ["70%", "10%", "25%", "20%", "70%"]


@pytest.mark.parametrize(("draw", "said"), [
    (lambda: plots.plot_dots({}, ["a"], "x"), "columns is empty"),
    (lambda: plots.plot_dots({"a": [1.0, 2.0]}, ["a"], "x"), "has length 2"),
    (lambda: plots.plot_variance_shares({}), "shares is empty"),
    (lambda: plots.plot_variance_shares({"gold": {"data": 0.5}}), "add up to 0.5")])
def test_what_cannot_be_drawn_is_refused(draw, said):
    with pytest.raises(ValueError, match=said):
        draw()
