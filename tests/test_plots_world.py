"""The desk world's pictures draw what they are given."""

import numpy as np
import pytest

from alignkit import plots


def test_gold_by_sentence_writes_every_number_and_colours_by_sign():
    ax = plots.plot_gold_by_sentence({"benign": [2.0, -1.5], "risky": [-1.0, 1.6]}, ["right answer", "REFUSE"])
    assert [text.get_text() for text in ax.texts] == ["+2.00", "−1.50", "−1.00", "+1.60"]
    assert ax.images[0].get_array().tolist() == [[2.0, -1.5], [-1.0, 1.6]]
    low, high = ax.images[0].get_clim()
    assert low == -high
    assert [label.get_text() for label in ax.get_yticklabels()] == ["benign", "risky"]


def test_annotators_draws_each_line_and_names_it():
    ax = plots.plot_annotators([-1, 0, 1], {"expert": [0.1, 0.5, 0.9], "default": [0.3, 0.5, 0.7]})
    assert [line.get_ydata().tolist() for line in ax.lines[:2]] == [[0.1, 0.5, 0.9], [0.3, 0.5, 0.7]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["expert", "default"]


def test_sampling_error_is_logarithmic_and_theory_is_in_it():
    ax = plots.plot_sampling_error([2, 8], {"benign": [0.4, 0.2]}, [0.5, 0.25])
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert [line.get_ydata().tolist() for line in ax.lines] == [[0.4, 0.2], [0.5, 0.25]]


def test_floor_splits_each_loss_in_entropy_and_kl():
    ax = plots.plot_floor(1.1, {"untrained": 2.5, "SFT": 1.3}, {"untrained": 2.4, "SFT": 1.35})
    widths = [bar.get_width() for bar in ax.patches]
    assert widths == pytest.approx([1.1, 1.1, 1.4, 0.2])
    assert [bar.get_x() for bar in ax.patches[2:]] == pytest.approx([1.1, 1.1])
    assert np.asarray(ax.collections[0].get_offsets())[:, 0] == pytest.approx([2.4, 1.35])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "entropy of the demonstrators", "KL(demonstrators ‖ model)", "the model's own entropy"]
    ax.get_figure().draw_without_rendering()
    frame, figure = ax.get_legend().get_window_extent(), ax.get_figure().bbox
    assert figure.x0 <= frame.x0 and frame.x1 <= figure.x1 and figure.y0 <= frame.y0


@pytest.mark.parametrize("draw", [
    lambda: plots.plot_gold_by_sentence({"benign": [1.0]}, ["a", "b"]),
    lambda: plots.plot_annotators([0, 1], {"expert": [0.5]}),
    lambda: plots.plot_sampling_error([2, 4], {"benign": [0.1]}, [0.2, 0.1]),
    lambda: plots.plot_sampling_error([2, 4], {"benign": [0.1, 0.1]}, [0.2]),
    lambda: plots.plot_floor(1.0, {"SFT": 1.2}, {}),
])
def test_lengths_that_differ_are_refused(draw):
    with pytest.raises(ValueError, match=r"has length \d, expected \d"):
        draw()
