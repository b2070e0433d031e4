"""Pictures and intervals of notebooks 02 and 04; what 04 says of `advice` is what `advice` does."""

import json
from pathlib import Path

import numpy as np
import pytest

from alignkit import clustered_mean, plots
from alignkit.evaluate import adviser

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def text_of(notebook: str, cell: str) -> str:
    cells = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    return "".join(next(each["source"] for each in cells if each["id"] == cell))


def test_greetings_are_drawn_from_none_upwards_with_the_colours_of_proxy_and_gold():
    ax = plots.plot_greetings({"proxy": [0.1, 0.5, 0.9], "gold": [0.3, 0.2, 0.0]})
    proxy, gold = ax.lines
    assert proxy.get_xydata().tolist() == [[0, 0.1], [1, 0.5], [2, 0.9]]
    assert gold.get_ydata().tolist() == [0.3, 0.2, 0.0]
    assert [line.get_color() for line in (proxy, gold)] == [plots.KNOWN[name][0] for name in ("proxy", "gold")]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["proxy", "gold"]
    with pytest.raises(ValueError, match="gold has length 1, expected 2"):
        plots.plot_greetings({"proxy": [0, 1], "gold": [0]})


def test_each_predictor_of_kl_has_a_panel_in_which_every_prompt_is_drawn_once():
    kinds = ["benign", "risky", "benign"]
    figure = plots.plot_kl_panels({"a, nats": [1, 2, 3], "b": [3, 2, 1]}, [0.5, 0.6, 0.7], kinds,
                                  {"a, nats": 1.0, "b": -1.0})
    first, second = figure.axes
    assert [line.get_xydata().tolist() for line in first.lines] == [[[1, 0.5], [3, 0.7]], [[2, 0.6]]]
    assert [line.get_xdata().tolist() for line in second.lines] == [[3, 1], [2]]
    assert first.get_xlabel() == "a, nats" and "+1" in first.get_title("left") and "−1" in second.get_title("left")
    with pytest.raises(ValueError, match="b has length 2, expected 3"):
        plots.plot_kl_panels({"b": [1, 2]}, [1, 2, 3], kinds, {"b": 0.0})


def test_a_clustered_mean_is_a_bootstrap_of_whole_clusters():
    """Slow reference: clusters are drawn one by one, their values put in a row. It ignores the small-sample
    correction, which forty clusters hardly need."""
    rng = np.random.default_rng(0)
    clusters = rng.integers(40, size=400)
    values = rng.normal(size=40)[clusters] + rng.normal(size=400)
    estimate, names = clustered_mean(values, clusters), np.unique(clusters)
    means = [np.concatenate([values[clusters == name] for name in rng.choice(names, len(names))]).mean()
             for _ in range(4000)]
    assert estimate.value == pytest.approx(values.mean())
    low, high = np.quantile(means, [0.025, 0.975])
    assert estimate.low == pytest.approx(low, abs=0.05) and estimate.high == pytest.approx(high, abs=0.05)
    alone = clustered_mean(values, np.arange(400))
    assert estimate.high - estimate.low > 1.3 * (alone.high - alone.low)  # taken for independent: too narrow
    with pytest.raises(ValueError, match="clusters has length 3, expected 2"):
        clustered_mean([1, 2], [1, 2, 3])


def test_notebook_04_prints_the_limits_that_advice_uses():
    text = text_of("04_freeze_and_evaluate", "advice-text")
    for limit in (f"{adviser.RISKY_FAILURES:.0%}", f"{adviser.AGREEMENT:.0%}", f"{adviser.FAR:g} nats"):
        assert limit.replace("%", " %") in text, limit
    rules = [line for line in (adviser.advice.__doc__ or "").splitlines() if line.strip()[:2] in
             [f"{number}." for number in range(1, 10)]]
    assert len(rules) == sum(line.startswith(tuple(f"| {number} |" for number in range(1, 10)))
                             for line in text.splitlines())
