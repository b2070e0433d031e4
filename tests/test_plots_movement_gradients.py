"""The pictures of notebooks 09 and 10: what is drawn is what was given, and names and shapes are checked."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from alignkit import plots

NOISE = {"REINFORCE": [4.0, 8.0], "RLOO, k = 4": [1.0, 3.0]}
COSINES = {"REINFORCE": [0.1, 0.3], "RLOO, k = 4": [0.5, 0.7]}
AGED = {(1, "ratio"): [[2.0, 1.0, 0.5], [4.0, 0.0, 0.7]], (16, "ratio"): [[9.0, 2.0, 0.1], [11.0, 0.0, 0.3]],
        (1, "ratio and clip"): [[1.0, 0.5, 0.6], [1.0, 0.5, 0.6]]}
HOSTILE = "_$\\frac{$<b>\u202e\x1b[3\n%{0}" + "a" * 10_000


def text_of(figure: Figure) -> list[str]:
    return [artist.get_text() for artist in figure.findobj(match=lambda artist: hasattr(artist, "get_text"))]


def test_gradient_noise_shows_means_and_every_cosine():
    figure = plots.plot_gradient_noise_panels(NOISE, COSINES, title="64 responses")
    left, right = figure.axes
    assert [bar.get_width() for bar in left.patches] == [6.0, 2.0]
    errors = [line.get_xdata() for line in left.lines]  # standard error of the mean of two values: half their distance
    assert [list(ends) for ends in errors] == [[4.0, 8.0], [1.0, 3.0]]
    dots = [line.get_xdata().tolist() for line in right.lines if line.get_marker() == "o"]
    assert dots == list(COSINES.values())
    assert [float(line.get_xdata()[0]) for line in right.lines if line.get_marker() == "D"] == pytest.approx([0.2, 0.6])
    assert [label.get_text() for label in left.get_yticklabels()] == list(NOISE)
    assert left.get_ylim()[0] > left.get_ylim()[1], "the first estimator is on top"
    assert left.get_title("left") == "64 responses" and plots.describe(figure)


def test_clip_panels_join_the_means_of_each_estimator_by_epochs():
    figure = plots.plot_clip_gradient_panels(AGED)
    for column, ax in enumerate(figure.axes):
        drawn = [container[0].get_ydata().tolist() for container in ax.containers]
        assert drawn == [[np.mean(AGED[1, "ratio"], 0)[column], np.mean(AGED[16, "ratio"], 0)[column]],
                         [np.mean(AGED[1, "ratio and clip"], 0)[column]]]
        assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "16"]
        assert ax.get_xlabel() and ax.get_ylabel()
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["ratio", "ratio and clip"]


def test_the_variance_law_is_a_straight_line_through_the_origin():
    figure = plots.plot_variance_law_panels([1.0, 2.0, 4.0], {4.0: [0.03, 0.06, 0.12], 0.5: [1.0, 1.5, 2.0]},
                                            ["benign", "risky", "benign"])
    for ax, beta in zip(figure.axes, (4.0, 0.5), strict=True):
        benign, risky, law = (line.get_xydata().tolist() for line in ax.lines)
        assert [x for x, _ in benign] == [1.0, 4.0] and [x for x, _ in risky] == [2.0]
        assert law == [[0.0, 0.0], [4.0, 4.0 / (2 * beta**2)]]
        assert f"{beta:g}" in ax.get_title("left") and ax.get_xlabel() and ax.get_ylabel()
    assert benign == [[1.0, 1.0], [4.0, 2.0]]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["benign", "risky", "Var / 2β²"]


def test_rank_correlations_have_a_line_and_a_band_for_each_predictor():
    ax = plots.plot_rank_correlations([4.0, 0.2], {"entropy": [(0.1, -0.2, 0.4), (-0.5, -0.7, -0.3)]}, mark=0.35)
    line, zero, mark = ax.lines
    assert line.get_xydata().tolist() == [[4.0, 0.1], [0.2, -0.5]]
    assert list(zero.get_ydata()) == [0, 0] and list(mark.get_xdata()) == [0.35, 0.35]
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert {band.min(), band.max()} == {-0.7, 0.4}
    assert plots.plot_rank_correlations([1.0], {"a": [(0, 0, 0)]}, ax) is ax
    assert len(plots.plot_rank_correlations([1.0], {"a": [(0, 0, 0)]}).lines) == 2, "no mark unless it is asked for"


@pytest.mark.filterwarnings("error")
def test_hostile_names_are_drawn_as_text():
    for figure in (plots.plot_gradient_noise_panels({HOSTILE: [1.0, 2.0]}, {HOSTILE: [0.0, 0.1]}, title=HOSTILE),
                   plots.plot_clip_gradient_panels({(1, HOSTILE): AGED[1, "ratio"]}),
                   plots.plot_variance_law_panels([1.0, 2.0], {1.0: [0.1, 0.2]}, [HOSTILE, "b"]),
                   plots.plot_rank_correlations([1.0], {HOSTILE: [(0, 0, 0)]}, title=HOSTILE).get_figure(root=True)):
        figure.dpi = 30
        figure.draw_without_rendering()
        assert all(len(text) < 200 for text in text_of(figure))


@pytest.mark.parametrize("draw, message", [
    (lambda: plots.plot_gradient_noise_panels({}, {}), "distances is empty"),
    (lambda: plots.plot_gradient_noise_panels(NOISE, {"RLOO": [1.0]}), r"cosines has the names \['RLOO'\]"),
    (lambda: plots.plot_clip_gradient_panels({}), "estimates is empty"),
    (lambda: plots.plot_clip_gradient_panels({(1, "ratio"): [[1.0, 2.0]]}), r"expected \(repeats, 3\)"),
    (lambda: plots.plot_variance_law_panels([1.0], {}, ["risky"]), "kl is empty"),
    (lambda: plots.plot_variance_law_panels([1.0], {2.0: [1.0, 2.0]}, ["risky"]), "has length 2, expected 1"),
    (lambda: plots.plot_variance_law_panels([1.0], {2.0: [1.0]}, ["risky", "benign"]), "kinds has length 2"),
    (lambda: plots.plot_rank_correlations([1.0], {}), "correlations is empty"),
    (lambda: plots.plot_rank_correlations([1.0, 2.0], {"a": [(0, 0, 0)]}), "has length 1, expected 2"),
])
def test_what_cannot_be_drawn_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
