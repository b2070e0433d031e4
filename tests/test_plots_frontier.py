"""Pictures of the price of KL, sampled frontiers and curves with intervals: what is drawn is what was given."""

import numpy as np
import pytest

from alignkit import Estimate, plots


def test_the_price_of_kl_shows_the_mean_and_the_range_of_repeats_at_each_price():
    price, kl = [0.1, 1.0, 10.0], [[4.0, 2.0, 1.0], [2.0, 1.0, 0.5]]
    ax = plots.plot_price_of_kl({"PPO": (price, kl), "DPO": (price, [3.0, 2.0, 1.0])}, ([0.2, 2.0], [3.0, 0.3]))
    ppo, dpo, optimum = ax.lines[:3]
    assert ppo.get_ydata().tolist() == [3.0, 1.5, 0.75] and dpo.get_ydata().tolist() == [3.0, 2.0, 1.0]
    assert optimum.get_xdata().tolist() == [0.2, 2.0] and optimum.get_ydata().tolist() == [3.0, 0.3]
    corners = ax.collections[0].get_paths()[0].vertices
    assert corners[:, 1].max() == 4.0 and corners[:, 1].min() == 0.5
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["PPO", "DPO", "exact optimum"]


def test_a_sampled_frontier_has_its_ceiling_at_log_n():
    truth = ([0.0, 1.0, 2.0], [0.0, 1.4, 2.0])
    ax = plots.plot_sampled_frontier({16: ([0.5, 2.0], [1.0, 1.7]), 2: ([0.3, 0.6], [0.5, 0.8])}, truth)
    verticals = [line.get_xdata()[0] for line in ax.lines if len(set(line.get_xdata())) == 1]
    assert verticals == pytest.approx([np.log(16), np.log(2)])
    assert {"log 16", "log 2", "truth", "N = 16", "N = 2"} <= {t.get_text() for t in ax.texts}
    with pytest.raises(ValueError, match="N = 1, expected at least 2"):
        plots.plot_sampled_frontier({1: ([0.5], [1.0])}, truth)


def test_estimates_are_drawn_with_their_intervals_where_they_have_one():
    curve = ([0, 4], [Estimate(0.1, 0.0, 0.3), Estimate(0.5, None, None)])
    ax = plots.plot_estimates({"DPO": curve}, "risky failures, share")
    line, bar = ax.lines
    assert line.get_xdata().tolist() == [0, 4] and list(line.get_ydata()) == [0.1, 0.5]
    assert list(bar.get_xdata()) == [0, 0] and list(bar.get_ydata()) == [0.0, 0.3]
    with pytest.raises(ValueError, match="estimates of DPO has length 2, expected 3"):
        plots.plot_estimates({"DPO": ([0, 1, 2], curve[1])}, "risky failures, share")


def test_loss_and_gold_stand_above_each_other_at_the_same_steps():
    figure = plots.plot_loss_gold_panels([0, 8], [0.69, 0.5], [Estimate(0.8, 0.7, 0.9), Estimate(0.6, 0.5, 0.7)])
    upper, lower = figure.axes
    assert list(upper.lines[0].get_ydata()) == [0.69, 0.5] and list(lower.lines[0].get_ydata()) == [0.8, 0.6]
    assert upper.get_ylabel() == "loss, nats per pair" and "SFT-sd" in lower.get_ylabel()
    with pytest.raises(ValueError, match="losses has length 1, expected 2"):
        plots.plot_loss_gold_panels([0, 8], [0.69], [Estimate(0.8, 0.7, 0.9)])
