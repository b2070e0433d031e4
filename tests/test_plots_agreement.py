"""The pictures of notebook 08: each mark stands where its numbers are, and wrong shapes are refused."""

import numpy as np
import pytest

from alignkit import plots

SIZES = [10, 100, 1000]
DISTANCES = {"one label": [[5.0, 1.0, 3.0], [4.0, 2.0, 3.0], [0.5, 0.2, 0.1]], "probability": [[0.3], [0.2], [0.1]]}
POINTS = [{"name": "PPO", "label": "PPO 0.5", "kl": 1.0, "reward": 0.9},
          {"name": "DPO", "label": "DPO 0.1", "kl": 2.0, "reward": 0.6},
          {"name": "DPO", "label": "DPO 2", "kl": 0.1, "reward": 0.2}]


def test_distances_are_medians_with_a_band_from_least_to_most():
    ax = plots.plot_distance_to_optimum(SIZES, DISTANCES, 0.7)
    single, probability, reference = ax.lines
    assert single.get_xydata().tolist() == [[10, 3.0], [100, 3.0], [1000, 0.2]]
    assert probability.get_ydata().tolist() == [0.3, 0.2, 0.1]
    assert list(reference.get_ydata()) == [0.7, 0.7]
    corners = ax.collections[0].get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == (0.1, 5.0)
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [*DISTANCES, "the reference itself"]


def test_policies_stand_where_their_numbers_are():
    ax = plots.plot_beside_frontier(POINTS, ([0, 1, 3], [0, 1.0, 1.5]))
    curve, ppo, dpo = ax.lines
    assert curve.get_xydata().tolist() == [[0, 0], [1, 1.0], [3, 1.5]]
    assert ppo.get_xydata().tolist() == [[1.0, 0.9]]
    assert dpo.get_xydata().tolist() == [[2.0, 0.6], [0.1, 0.2]]
    assert {"PPO 0.5", "DPO 0.1", "DPO 2"} <= {text.get_text() for text in ax.texts}


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"distances\['a'\] has length 2, expected 3 \(the length of pairs\)"):
        plots.plot_distance_to_optimum(SIZES, {"a": np.ones((2, 3))}, 0.7)
    with pytest.raises(ValueError, match=r"distances\['a'\] has shape \(3,\)"):
        plots.plot_distance_to_optimum(SIZES, {"a": [1.0, 2.0, 3.0]}, 0.7)
    with pytest.raises(ValueError, match="reward of frontier has length 2, expected 3"):
        plots.plot_beside_frontier(POINTS, ([0, 1, 2], [0, 1]))
