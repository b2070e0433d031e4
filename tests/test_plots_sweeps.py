"""The pictures of a sweep: what is drawn is what was given."""

import numpy as np
import pytest

from alignkit import plots

POINTS = [{"name": "PPO", "label": "kl_coef 0.1", "kl": [2.0, 3.0], "proxy": [1.0, 1.4], "gold": [0.5, 0.3]},
          {"name": "PPO", "label": "kl_coef 0.5", "kl": [1.0], "proxy": [0.8], "gold": [0.6], "kl_ci95": (0.9, 1.2),
           "proxy_ci95": (0.7, 0.9), "gold_ci95": (0.4, 0.8)}]


def small(ax, size=3.5):
    return [line for line in ax.lines if line.get_markersize() == size and line.get_linestyle() in ("None", "")]


def test_the_plane_has_every_job_its_band_its_mean_and_curves_up_to_where_runs_went():
    curve = (np.arange(0, 21.0), np.sqrt(np.arange(0, 21.0)))
    ax = plots.plot_sweep_plane(POINTS, proxy=curve)
    jobs = small(ax)
    assert [line.get_xdata().tolist() for line in jobs] == [[2, 3], [2, 3]]
    assert [line.get_ydata().tolist() for line in jobs] == [[1.0, 1.4], [0.5, 0.3]]
    bands = [(patch.get_x(), patch.get_y(), patch.get_width(), patch.get_height()) for patch in ax.patches]
    assert bands == [pytest.approx((2, 1, 1, 0.4)), pytest.approx((2, 0.3, 1, 0.2))]
    drawn = next(line for line in ax.lines if len(line.get_xdata()) > 4)
    assert drawn.get_xdata()[-1] == 4.5 and drawn.get_ydata()[-1] == pytest.approx((2 + np.sqrt(5)) / 2)
    crosses = [line.get_xdata() for line in ax.lines if tuple(line.get_xdata()) == (0.9, 1.2)]
    assert len(crosses) == 2, "one seed has the interval of its evaluation, for proxy and gold"


def test_an_estimated_frontier_is_drawn_with_its_ceiling():
    sampled = {"samples": 8, "ceiling": np.log(8), "kl": [0.0, 1.0, 2.0], "proxy": [0.0, 1.0, 1.2]}
    ax = plots.plot_sweep_plane(POINTS, sampled=sampled)
    assert any(line.get_xdata()[0] == np.log(8) for line in ax.lines)
    assert any("from 8 responses" in text.get_text() for text in ax.texts)
    assert any("log 8: its ceiling" in text.get_text() for text in ax.texts)
    far = plots.plot_sweep_plane(POINTS[1:], sampled={**sampled, "samples": 1000, "ceiling": np.log(1000)})
    assert not any("its ceiling" in text.get_text() for text in far.texts), "it lies outside the picture"


def test_gold_against_proxy_joins_settings_in_order_of_kl():
    ax = plots.plot_proxy_against_gold(POINTS)
    means = [line for line in ax.lines if len(line.get_xdata()) == 2 and line.get_label() == "PPO"]
    assert means[0].get_xdata() == pytest.approx([0.8, 1.2]) and means[0].get_ydata() == pytest.approx([0.6, 0.4])
    with pytest.raises(ValueError, match="points with proxy and gold is empty"):
        plots.plot_proxy_against_gold([{"name": "PPO", "kl": [1], "proxy": [1]}])


def test_a_panel_averages_the_other_parameters_and_its_band_spans_the_seeds():
    rows = [{"a": a, "b": b, "seed": seed, "gold": 10 * a + (5 if b == "y" else 1) + seed}
            for a in (1, 2) for b in ("x", "y") for seed in (0, 1)]
    figure = plots.plot_parameter_panels(rows, ["a", "b"], {"gold": "gold, SFT-sd"})
    first, second = figure.axes
    line = next(line for line in first.lines if line.get_linestyle() == "-")
    assert line.get_xdata().tolist() == [1, 2] and line.get_ydata().tolist() == [13.5, 23.5]
    band = first.collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == (13, 24)
    assert [label.get_text() for label in second.get_xticklabels()] == ["x", "y"]
    line = next(line for line in second.lines if line.get_linestyle() == "-")
    assert line.get_ydata() == pytest.approx([16.5, 20.5])
    many = plots.plot_parameter_panels([{"a": i / 7, "gold": i} for i in range(40)], ["a"], {"gold": "gold"})
    assert not any(line.get_linestyle() == "-" for line in many.axes[0].lines), "draws are points alone"


def test_the_ranking_says_what_cannot_be_told_from_the_best():
    place = {"values": [1.0, 2.0], "mean": 1.5, "low": 0.5, "high": 2.5}
    ax = plots.plot_ranking({"one": {**place, "told": False}, "two": {**place, "told": False},
                             "three": {**place, "low": None, "high": None, "told": True}}, "gold, SFT-sd")
    assert [text.get_text() for text in ax.texts] == ["best", "not told from the best", "below the best"]
    bars = [line for line in ax.lines if list(line.get_xdata()) == [0.5, 2.5]]
    assert [line.get_ydata()[0] for line in bars] == [0, 1]


@pytest.mark.parametrize("draw", [
    lambda: plots.plot_sweep_plane([]), lambda: plots.plot_proxy_against_gold([]),
    lambda: plots.plot_parameter_panels([], ["a"], {"gold": "gold"}), lambda: plots.plot_ranking({}, "gold"),
    lambda: plots.plot_parameter_panels([{"a": 1, "gold": 1}], [], {"gold": "gold"}),
    lambda: plots.plot_sweep_plane([{"name": "PPO", "kl": [1, 2], "proxy": [1]}])])
def test_nothing_to_draw_and_lengths_that_differ_are_refused(draw):
    with pytest.raises(ValueError, match="expected"):
        draw()


def test_words_of_others_are_drawn_as_text():
    hostile = "$\\frac{$<b>\u202e" + "x" * 500
    for drawn in (plots.plot_sweep_plane([{**POINTS[0], "label": hostile, "name": hostile}]),
                  plots.plot_proxy_against_gold([{**POINTS[0], "label": hostile, "name": hostile}]),
                  plots.plot_ranking({hostile: {"values": [1], "mean": 1, "low": 0, "high": 2, "told": False}}, "x"),
                  plots.plot_parameter_panels([{"a": hostile, hostile: 1}], ["a"], {hostile: hostile})):
        assert drawn._repr_png_()[0].startswith(b"\x89PNG")
