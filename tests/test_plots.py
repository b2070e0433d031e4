"""The pictures: what is drawn is what was given, every axis has a name and a unit, no text breaks or becomes more."""

import inspect
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from IPython.core.formatters import DisplayFormatter
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle, StepPatch

from alignkit import plots
from alignkit.desk.world import BEHAVIOURS
from alignkit.formulas.intervals import Estimate
from alignkit.plots import style

HOSTILE = {"hostile": "_$\\frac{$<b>\u202e\x1b[3\ud800\n%{0}" + "a" * 1_000_000, "empty": ""}
ROWS = [
    {
        "step": i,
        "objective/kl": 0.1 * i,
        "objective/scores": float(i),
        "objective/rlhf_reward": i - 0.5,
        "loss": None if i == 1 else 2.0 - i,
        "val/eos_rate": float("nan"),
    }
    for i in range(4)
]
BINS = [
    {"confidence": 0.6, "accuracy": 0.5, "count": 30, "margin": 0.4, "bayes": 0.7},
    {"confidence": 0.9, "accuracy": 0.8, "count": 10, "margin": 2.2, "bayes": 0.9},
    {"confidence": 0.0, "accuracy": None, "count": 0, "margin": 0.0, "bayes": None},
]
KL, PROXY, GOLD = [0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 1.5, 1.8], [0.0, 0.6, 0.5, 0.2]
CASES = {  # a small picture from each function, with a name of the caller's choosing in it
    "plot_behaviour": lambda name: plots.plot_behaviour(
        {name: {name: {"answer": 3, name: 1}}, "DPO": {"risky": {"unsafe": 1.0}}}
    ),
    "plot_next_token": lambda name: plots.plot_next_token(
        {name: 0.3, "b": 0.7}, {name: 0.9, " b": 0.1}, names=(name, "after")
    ),
    "plot_kl_by_class": lambda name: plots.plot_kl_by_class(
        {name: [0.1, 0.4], "risky": [1.0]}, intervals={name: (0.1, 0.4)}
    ),
    "plot_kl_by_position": lambda name: plots.plot_kl_by_position({name: [0.5, 0.2]}),
    "plot_histogram": lambda name: plots.plot_histogram({name: [0.1, 0.5, 0.2], "PPO": [0.4]}, name + ", nats"),
    "plot_metrics": lambda name: plots.plot_metrics(
        [{"step": 0, name: 1.0}], {name: (name, "loss")}, marks=[(0, name)], title=name
    ),
    "plot_ppo_panels": lambda name: plots.plot_ppo_panels(ROWS, marks=[(1, name)], title=name),
    "plot_dpo_logps": lambda name: plots.plot_dpo_logps([0, 1], [-5.0, -6.0], [-5.0, -9.0], title=name),
    "plot_margins": lambda name: plots.plot_margins([0, 1], [[0.0, 0.0], [1.0, -1.0]], title=name),
    "plot_reliability": lambda name: plots.plot_reliability(BINS, title=name),
    "plot_margin_accuracy": lambda name: plots.plot_margin_accuracy(BINS, title=name),
    "plot_gold_vs_proxy": lambda name: plots.plot_gold_vs_proxy(KL, GOLD, PROXY, xlabel=name + " nats", unit=name),
    "plot_greetings": lambda name: plots.plot_greetings({"proxy": [0, 1], name: [1, 0]}, title=name),
    "plot_kl_panels": lambda name: plots.plot_kl_panels({name: [0, 1]}, [1, 2], [name, "risky"], {name: 0.5}),
    "plot_tradeoff": lambda name: plots.plot_tradeoff(
        [{"name": name, "over_refusal_rate": 0.1, "risky_failure_rate": 0.4}]
    ),
    "plot_refusals": lambda name: plots.plot_refusals(
        {name: {"over_refusal": Estimate(0.1, 0.05, 0.2), "unsafe_compliance": Estimate(0.4, None, None)}}
    ),
    "plot_intervals": lambda name: plots.plot_intervals({name: (0.5, 0.4, 0.6), "PPO": (0.7,)}, name + " sd"),
    "plot_intervals_panels": lambda name: plots.plot_intervals_panels(
        {name + " sd": {name: (1, 0, 2)}, "KL, nats": {"PPO": (1,)}}, title=name
    ),
    "plot_reward_kl_plane": lambda name: plots.plot_reward_kl_plane(
        (KL, PROXY), points=[{"name": name, "label": name, "kl": 1, "gold": 1}]
    ),
    "plot_relay": lambda name: plots.plot_relay({"sft": name, "dpo": name}, here="ppo", title=name),
    "plot_advantage_tokens": lambda name: plots.plot_advantage_tokens([name, "b"], [0.3, -0.5], rows={name: [1, 2]}),
    "plot_clip": lambda name: plots.plot_clip(title=name),
    "plot_distance_to_optimum": lambda name: plots.plot_distance_to_optimum([10, 100], {name: [[1, 2], [3, 4]]}, 0.5),
    "plot_beside_frontier": lambda name: plots.plot_beside_frontier(
        [{"name": name, "label": name, "kl": 1, "reward": 0.5}], (KL, PROXY)
    ),
    "plot_price_of_kl": lambda name: plots.plot_price_of_kl({name: ([0.1, 1.0], [2.0, 0.2])}, title=name),
    "plot_sampled_frontier": lambda name: plots.plot_sampled_frontier({8: ([0, 1], [0, 1])}, (KL, PROXY), title=name),
    "plot_estimates": lambda name: plots.plot_estimates({name: ([0], [Estimate(0.1, 0.0, 0.2)])}, name + ", share"),
    "plot_loss_gold_panels": lambda name: plots.plot_loss_gold_panels([0], [0.7], [Estimate(0.1, 0, 1)], title=name),
    "plot_fit_panels": lambda name: plots.plot_fit_panels({name: (KL, GOLD)}, {name: {name: (KL, PROXY)}}),
    "plot_gold_panels": lambda name: plots.plot_gold_panels({name: {name: (KL, GOLD)}}),
    "plot_stopping_panels": lambda name: plots.plot_stopping_panels(
        {name: {"kl": KL, "proxy": PROXY, "gold": GOLD}}, {name: {"kl": [1], "proxy": [1], "gold": [0.5]}}),
    "plot_gold_by_sentence": lambda name: plots.plot_gold_by_sentence({name: [1, -2]}, ["REFUSE", name]),
    "plot_annotators": lambda name: plots.plot_annotators([-1, 0, 1], {name: [0.2, 0.5, 0.8]}),
    "plot_sampling_error": lambda name: plots.plot_sampling_error([2, 4], {name: [0.2, 0.1]}, [0.2, 0.14]),
    "plot_floor": lambda name: plots.plot_floor(1.1, {name: 1.3, "b": 1.8}, {name: 1.3, "b": 1.8}),
}
EMPTY = {
    "plot_behaviour": lambda: plots.plot_behaviour({}),
    "plot_next_token": lambda: plots.plot_next_token({}, {}),
    "plot_kl_by_class": lambda: plots.plot_kl_by_class({"risky": []}),
    "plot_kl_by_position": lambda: plots.plot_kl_by_position({}),
    "plot_histogram": lambda: plots.plot_histogram({"SFT": []}, "reward"),
    "plot_metrics": lambda: plots.plot_metrics([], ["loss"]),
    "plot_ppo_panels": lambda: plots.plot_ppo_panels([]),
    "plot_dpo_logps": lambda: plots.plot_dpo_logps([], [], []),
    "plot_margins": lambda: plots.plot_margins([], []),
    "plot_reliability": lambda: plots.plot_reliability(BINS[2:]),
    "plot_margin_accuracy": lambda: plots.plot_margin_accuracy([]),
    "plot_gold_vs_proxy": lambda: plots.plot_gold_vs_proxy([], [], []),
    "plot_greetings": lambda: plots.plot_greetings({}),
    "plot_kl_panels": lambda: plots.plot_kl_panels({}, [], [], {}),
    "plot_tradeoff": lambda: plots.plot_tradeoff([]),
    "plot_refusals": lambda: plots.plot_refusals({}),
    "plot_intervals": lambda: plots.plot_intervals({}, "gold"),
    "plot_intervals_panels": lambda: plots.plot_intervals_panels({}),
    "plot_reward_kl_plane": lambda: plots.plot_reward_kl_plane(),
    "plot_relay": lambda: plots.plot_relay({"pretraining": "1"}),
    "plot_advantage_tokens": lambda: plots.plot_advantage_tokens([], []),
    "plot_clip": lambda: plots.plot_clip(0.0),
    "plot_distance_to_optimum": lambda: plots.plot_distance_to_optimum([10], {}, 0.5),
    "plot_beside_frontier": lambda: plots.plot_beside_frontier([], (KL, PROXY)),
    "plot_price_of_kl": lambda: plots.plot_price_of_kl({}),
    "plot_sampled_frontier": lambda: plots.plot_sampled_frontier({}, (KL, PROXY)),
    "plot_estimates": lambda: plots.plot_estimates({}, "risky failures, share"),
    "plot_loss_gold_panels": lambda: plots.plot_loss_gold_panels([], [], []),
    "plot_fit_panels": lambda: plots.plot_fit_panels({}, {}),
    "plot_gold_panels": lambda: plots.plot_gold_panels({}),
    "plot_stopping_panels": lambda: plots.plot_stopping_panels({}, {}),
    "plot_gold_by_sentence": lambda: plots.plot_gold_by_sentence({}, []),
    "plot_annotators": lambda: plots.plot_annotators([], {}),
    "plot_sampling_error": lambda: plots.plot_sampling_error([], {}, []),
    "plot_floor": lambda: plots.plot_floor(1.0, {}, {}),
}


def figure_of(drawn: Axes | Figure) -> Figure:
    return drawn.get_figure(root=True) if isinstance(drawn, Axes) else drawn


def lines(ax: Axes, marker: str) -> list:
    return [line for line in ax.lines if line.get_marker() == marker]


def words(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


# ---- all of them


def test_every_plot_is_tested_and_documented():
    public = {
        name: f
        for name, f in inspect.getmembers(plots, inspect.isfunction)
        if not name.startswith("_") and f.__module__.startswith(plots.__name__)
    }
    beside = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_plots_*.py"))
    elsewhere = {name for name in public if name.startswith("plot_") and f"plots.{name}(" in beside}
    assert {name for name in public if name.startswith("plot_")} == set(CASES) | elsewhere
    assert set(CASES) == set(EMPTY)
    documented = {
        name for name, f in public.items() if re.search(r"Raises\s+ValueError|see `plot_metrics`", f.__doc__ or "")
    }
    assert set(public) - documented == {"describe"}


@pytest.mark.parametrize("name", CASES)
def test_axes_have_labels_with_units(name):
    drawn = CASES[name]("SFT")
    figure = figure_of(drawn)
    assert isinstance(drawn, Figure) == (name.endswith("_panels") or name == "plot_metrics")
    for ax in figure.axes if name not in ("plot_relay", "plot_advantage_tokens") else ():
        assert ax.get_xlabel()
        assert ax.get_ylabel() or name in ("plot_intervals_panels", "plot_behaviour")  # names stand at the bars
    assert plots.describe(figure)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("name", CASES)
def test_hostile_text_is_drawn_as_text(name, text):
    figure = figure_of(CASES[name](text))
    figure.dpi = 30
    figure.set_layout_engine("none")
    figure.draw_without_rendering()
    assert all(len(artist.get_text()) < 200 for artist in figure.findobj(match=lambda a: hasattr(a, "get_text")))


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_draw_is_refused(name):
    with pytest.raises(ValueError, match=r"expected|at least one"):
        EMPTY[name]()


def test_pyplot_is_never_touched():
    code = "import sys; from alignkit import plots; plots.plot_clip()._repr_png_()"
    code += "; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_given_axes_are_drawn_into_and_returned():
    ax = Figure().add_subplot()
    assert plots.plot_clip(ax=ax) is ax
    assert plots.plot_intervals({"SFT": (1,)}, "gold", ax=ax) is ax


@pytest.mark.parametrize("drawn", [plots.plot_clip(), plots.plot_relay().get_figure()], ids=["Axes", "Figure"])
def test_the_last_line_of_a_cell_shows_a_png_with_alt_text(drawn):
    data, metadata = DisplayFormatter().format(drawn)
    assert data["image/png"][:8] == b"\x89PNG\r\n\x1a\n"
    facts = metadata["image/png"]
    assert 300 < facts["width"] < 1000
    assert "clip" in facts["alt"] or "Reward model" in facts["alt"]


def test_names_differ_by_more_than_colour():
    styles = style._styles(["SFT", "reward model", "PPO", "frozen", "runs/a/dpo", "seven", "eight"]).values()
    assert len({(marker, str(line)) for _, marker, line, _ in styles}) == 7
    assert (
        style._styles(["runs/a/ppo"])["runs/a/ppo"]
        == style._styles(["x", "PPO (β = 1)"])["PPO (β = 1)"]
        == plots.KNOWN["ppo"]
    )


def test_text_is_readable_on_white():
    def luminance(colour):
        return np.dot(
            [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)],
            (0.2126, 0.7152, 0.0722),
        )

    for colour in (plots.INK, plots.MUTED, plots.BLUE, *plots.FOR_TEXT.values()):
        assert 1.05 / (luminance(colour) + 0.05) >= 4.5, colour


# ---- saving


def test_save_figure_replaces_a_file_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.png"
    assert plots.save_figure(plots.plot_clip(), path) == path
    first = path.read_bytes()
    assert plots.save_figure(plots.plot_clip(), path).read_bytes() == first
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: file.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plots.save_figure(plots.plot_clip(), path)
    assert path.read_bytes() == first and [file.name for file in path.parent.iterdir()] == ["a.png"]
    with pytest.raises(ValueError, match=r"a\.svg"):
        plots.save_figure(plots.plot_clip(), tmp_path / "a.svg")


# ---- what moved


def test_behaviour_bars_are_shares_in_the_order_of_the_world():
    ax = plots.plot_behaviour(
        {"SFT": {"risky": {"refuse": 3, "answer": 1}}, "PPO": {"risky": {"refuse": 1.0}, "benign": {"answer": 0.5}}}
    )
    bars = [(bar.get_x(), bar.get_width()) for bar in ax.patches]
    assert bars == [(0, 25), (25, 75), (0, 0), (0, 100), (0, 100), (100, 0)]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["SFT", "PPO", "PPO"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["answer", "refuse"]
    assert "refuse 75" in words(ax) and "risky" in words(ax)
    assert tuple(plots.BEHAVIOUR_FACES) == BEHAVIOURS
    with pytest.raises(ValueError, match=r"'SFT'.*'risky'.*not all 0"):
        plots.plot_behaviour({"SFT": {"risky": {"refuse": 0.0}}})


def test_next_token_shows_the_top_movers_gains_first():
    ax = plots.plot_next_token({"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 0.1, "c": 0.25, "d": 0.65}, top=3)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["d", "b", "a"]
    assert ax.lines[0].get_xdata().tolist() == [0, 0.3, 0.5]
    assert ax.collections[0].get_offsets()[:, 0].tolist() == [0.65, 0, 0.1]
    assert words(ax)[:-1:2] == ["", "", ""] and words(ax)[1:-1:2] == ["+65.0", "−30.0", "−40.0"]
    same = plots.plot_next_token({" the": 0.5, "the": 0.5}, {" the": 0.5, "the": 0.5})
    assert [label.get_text() for label in same.get_yticklabels()] == ["␣the", "the"]
    with pytest.raises(ValueError, match="probabilities in"):
        plots.plot_next_token({"a": 1.2}, {"a": 1.0})


def test_kl_by_class_marks_mean_and_the_given_interval():
    ax = plots.plot_kl_by_class({"benign": [0.0, 1.0, 2.0], "risky": [-0.5, 0.5]}, intervals={"risky": (-0.4, 0.4)})
    assert [line.get_xdata()[0] for line in lines(ax, "D")] == [1, 0]
    assert sum(list(line.get_xdata()) == [-0.4, 0.4] for line in ax.lines) == 1
    assert [len(line.get_xdata()) for line in lines(ax, "o")] == [3, 2]
    assert ax.get_xlim()[0] < -0.5


def test_kl_by_position_averages_the_responses_that_reach_it():
    ax = plots.plot_kl_by_position({"PPO": [[1.0, 2.0, np.nan], [3.0, np.nan, np.nan]], "DPO": [0.5, 0.25]})
    assert [line.get_ydata().tolist() for line in ax.lines[:2]] == [[2, 2], [0.5, 0.25]]
    assert ax.lines[0].get_xdata().tolist() == [1, 2]


def test_histogram_shares_its_bins():
    ax = plots.plot_histogram({"SFT": [0.0, 0.1, 1.0, np.nan], "PPO": [2.0, 2.0]}, "reward, SFT-sd", bins=4)
    steps = [patch.get_data() for patch in ax.patches if isinstance(patch, StepPatch)]
    assert all(np.array_equal(step.edges, [0, 0.5, 1, 1.5, 2]) for step in steps)
    np.testing.assert_allclose([step.values for step in steps[::2]], [[200 / 3, 0, 100 / 3, 0], [0, 0, 0, 100]])
    whole = plots.plot_histogram({"SFT": [1, 2, 4]}, "length, tokens").patches[0].get_data()
    assert whole.edges.tolist() == [0.5, 1.5, 2.5, 3.5, 4.5]


# ---- training


def test_metrics_draw_what_was_logged():
    figure = plots.plot_metrics(
        ROWS, ["loss", "objective/kl", "val/eos_rate", "never/logged"], marks=[(2, "β 0.1 → 0.2")]
    )
    loss, kl, nan, never = figure.axes
    assert (loss.lines[0].get_xdata().tolist(), loss.lines[0].get_ydata().tolist()) == ([0, 2, 3], [2, 0, -1])
    assert kl.get_title("left") == "KL to SFT" and kl.get_ylabel() == "nats per response"
    assert kl.lines[0].get_linestyle() == "-" and kl.lines[1].get_xdata() == [2, 2]
    assert "not logged" in words(nan) and "not logged" in words(never)
    assert figure.texts[0].get_text() == "a: β 0.1 → 0.2 (step 2)"
    near = plots.plot_metrics(ROWS, ["loss"], marks=[(1, "x"), (1.1, "y"), (2, "z")]).axes[0]
    assert [text.get_text() for text in near.texts] == [" ab", " c"], "letters do not lie on each other"
    both = plots.plot_metrics(ROWS, ["logps/chosen", "rewards/chosen", "loss"])
    assert [ax.get_title("left") for ax in both.axes] == ["logps/chosen", "rewards/chosen", "training loss"]


def test_a_live_chart_redraws_in_place():
    names = {"reward": ("objective/scores", "objective/rlhf_reward"), "loss": "loss"}
    live = plots.plot_metrics(ROWS[:2], names, marks=[(1, "x")], title="live")
    axes = list(live.axes)
    assert plots.plot_metrics(ROWS, names, live) is live and live.axes == axes
    fresh = plots.plot_metrics(ROWS, names)
    assert [line.get_xydata().tolist() for line in live.axes[0].lines] == [
        line.get_xydata().tolist() for line in fresh.axes[0].lines
    ]
    assert style._png(live, 60) == style._png(fresh, 60)
    with pytest.raises(ValueError, match="figure has the panels"):
        plots.plot_metrics(ROWS, ["loss"], live)


def test_what_was_left_by_rewinding_is_drawn_thin_and_dashed_and_goes_when_redrawn():
    left = [{"step": 2, "loss": 0.0}, {"step": 3, "loss": 5.0}, {"step": 9, "loss": None}]
    figure = plots.plot_metrics(ROWS, ["loss", "objective/kl"], branches=[left])
    line, past = figure.axes[0].lines
    assert past.get_xydata().tolist() == [[2, 0], [3, 5]] and figure.axes[0].get_ylim()[1] > 5
    assert past.get_linewidth() < line.get_linewidth() and past.get_linestyle() == "--"
    assert "before a rewind" in figure.texts[0].get_text()
    plots.plot_metrics(ROWS, ["loss", "objective/kl"], figure)
    assert len(figure.axes[0].lines) == 1 and not figure.texts
    assert len(plots.plot_metrics([], ["loss"], branches=[left]).axes[0].lines) == 2


def test_metrics_refuse_rows_that_say_nothing():
    with pytest.raises(ValueError, match=r"rows\[1\].*'step'"):
        plots.plot_metrics([{"step": 0, "loss": 1.0}, {"loss": 1.0}], ["loss"])
    with pytest.raises(ValueError, match=r"\['los'\].*'loss'"):
        plots.plot_metrics(ROWS, ["los"])


def test_ppo_panels_know_the_names_that_ppo_and_dpo_log():
    from alignkit.dpo import DPOStats
    from alignkit.ppo import PPOStats

    logged = {f.metadata["name"] for f in fields(PPOStats)}
    drawn = {name for names in plots.PPO_PANELS.values() for name in ((names,) if isinstance(names, str) else names)}
    assert len(plots.PPO_PANELS) == 8 and drawn <= logged and drawn <= set(plots.METRICS)
    assert {f.metadata["name"] for f in fields(DPOStats)} - {"step"} <= set(plots.METRICS)
    figure = plots.plot_ppo_panels(ROWS)
    assert figure.axes[0].lines[1].get_ydata().tolist() == [-0.5, 0.5, 1.5, 2.5]
    assert {ax.get_xlabel() for ax in figure.axes} == {"iteration"}


def test_dpo_paths_start_at_zero():
    ax = plots.plot_dpo_logps([0, 10], [-5.0, -5.5], [-6.0, -9.0])
    assert [line.get_ydata().tolist() for line in ax.lines[:2]] == [[0, -0.5], [0, -3]]
    assert "both fell" in ax.get_title("left") and "rejected −3.00" in words(ax)
    with pytest.raises(ValueError, match="rejected has length 1, expected 2"):
        plots.plot_dpo_logps([0, 1], [0, 1], [0])


def test_margins_draw_the_median_of_the_pairs():
    ax = plots.plot_margins([0, 1], [[0, 0, 0, 0], [-1.0, 1.0, 2.0, 6.0]])
    assert ax.lines[0].get_ydata().tolist() == [0, 1.5]
    assert "75 %" in ax.get_title("left")
    assert ax.get_ylim()[0] < 0
    assert plots.plot_margins([0, 1], [0.0, 0.4]).lines[0].get_ydata().tolist() == [0, 0.4]


# ---- the reward model


def test_reliability_has_the_error_in_its_title():
    ax = plots.plot_reliability(BINS)  # (30·0.1 + 10·0.1) / 40
    assert "ECE 0.100" in ax.get_title("left")
    assert lines(ax, "s")[0].get_xydata().tolist() == [[0.6, 0.5], [0.9, 0.8]]
    assert {"30", "10"} <= set(words(ax))
    bars = [bar.get_height() for bar in ax.patches]
    assert bars[0] == pytest.approx(3 * bars[1])
    whiskers = ax.collections[0].get_segments()
    assert whiskers[0][0][1] == pytest.approx(0.3315, abs=1e-4) and whiskers[0][1][1] == pytest.approx(0.6685, abs=1e-4)


def test_margin_accuracy_stands_beside_the_promise_and_the_ceiling():
    ax = plots.plot_margin_accuracy(BINS)
    promised = ax.lines[0].get_xydata()
    np.testing.assert_allclose(promised[:, 1], 1 / (1 + np.exp(-promised[:, 0])))
    assert lines(ax, "s")[0].get_ydata().tolist() == [0.5, 0.8] and lines(ax, "v")[0].get_ydata().tolist() == [0.7, 0.9]
    without = plots.plot_margin_accuracy([{**BINS[0], "bayes": None}])
    assert not lines(without, "v")


# ---- better, or merely different?


def test_gold_peak_is_marked():
    ax = plots.plot_gold_vs_proxy(KL, [GOLD, GOLD], [PROXY, PROXY])
    star = lines(ax, "*")[-1]
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (1, 0.6)
    assert any("falls by 0.40" in text for text in words(ax)) and "keeps rising" in ax.get_title("left")
    assert "proxy +1.80" in words(ax) and "gold +0.20" in words(ax)
    [bars] = plots.plot_gold_vs_proxy(KL, GOLD, PROXY, intervals=[(y - 0.1, y + 0.2) for y in GOLD]).collections
    assert [path.vertices.round(6).tolist() for path in bars.get_paths()] == [
        [[x, round(y - 0.1, 6)], [x, round(y + 0.2, 6)]] for x, y in zip(KL, GOLD, strict=True)]
    end = plots.plot_gold_vs_proxy([0, 1, 2], [0.0, 0.557, 0.404], [0.0, 1.0, 2.0])
    assert any("falls by 0.16" in text for text in words(end)) and "gold +0.40" in words(end)
    rising = plots.plot_gold_vs_proxy(KL, PROXY, PROXY)
    assert any("highest at the end" in text for text in words(rising))
    with pytest.raises(ValueError, match="gold has length 3, expected 4"):
        plots.plot_gold_vs_proxy(KL, GOLD[:3], PROXY)
    with pytest.raises(ValueError, match="intervals has length 3, expected 4"):
        plots.plot_gold_vs_proxy(KL, GOLD, PROXY, intervals=[(0, 1)] * 3)


def test_tradeoff_draws_percentages_with_intervals():
    ax = plots.plot_tradeoff(
        [
            {
                "name": "SFT",
                "over_refusal_rate": 0.1,
                "risky_failure_rate": 0.4,
                "over_refusal_ci95": [0.05, 0.15],
                "risky_failure_ci95": None,
            },
            {"name": "PPO", "over_refusal_rate": 0.0, "risky_failure_rate": 0.02},
        ]
    )
    assert lines(ax, "o")[0].get_xydata().tolist() == [[10, 40]] and lines(ax, "s")[0].get_xydata().tolist() == [[0, 2]]
    assert [list(line.get_xdata()) for line in lines(ax, "None")] == [[5, 15]]
    assert {"SFT", "PPO"} <= set(words(ax))


def test_the_plane_of_refusals_draws_percentages_with_their_intervals():
    ax = plots.plot_refusals({
        "SFT": {"over_refusal": Estimate(0.1, 0.05, 0.15), "unsafe_compliance": Estimate(0.4, None, None)},
        "PPO": {"over_refusal": Estimate(0.2, None, None), "unsafe_compliance": Estimate(0.02, 0.01, 0.03)},
    })
    assert lines(ax, "o")[0].get_xydata().tolist() == [[10, 40]]
    assert lines(ax, "s")[0].get_xydata().tolist() == [[20, 2]]
    whiskers = [line.get_xydata().tolist() for line in lines(ax, "None")]
    assert whiskers == [[[0, 100], [100, 0]], [[5, 40], [15, 40]], [[20, 1], [20, 3]]]
    assert [text.get_text() for text in ax.get_legend().get_texts()][:2] == ["SFT", "PPO"]
    assert "safe prompts refused" in ax.get_xlabel()
    with pytest.raises(ValueError, match=r"'SFT'.*no 'unsafe_compliance'"):
        plots.plot_refusals({"SFT": {"over_refusal": Estimate(0.1, None, None)}})


def test_intervals_are_drawn_where_there_are_some():
    for none in ((0.7,), (0.7, None, None)):
        ax = plots.plot_intervals({"SFT": (0.5, 0.4, 0.6), "PPO": none}, "gold, sd")
        assert [list(line.get_xdata()) for line in ax.lines] == [[0.4, 0.6], [0.5], [0.7]]
        assert words(ax) == ["0.50", "0.70"]
    with pytest.raises(ValueError, match=r"'SFT'.*low ≤ high"):
        plots.plot_intervals({"SFT": (0.5, 0.6, 0.4)}, "gold, sd")
    figure = plots.plot_intervals_panels(
        {"a": {"SFT": (0,), "PPO": (1,)}, "b": {"SFT": (0,), "PPO": (2,)}, "c": {"PPO": (3,)}}
    )
    assert [ax.get_xlabel() for ax in figure.axes] == ["a", "b", "c"]
    assert [label.get_text() for label in figure.axes[2].get_yticklabels()] == ["PPO"]


def test_plane_sorts_curves_and_spans_seeds():
    best = {"n": [1, 2, 4, 8], "kl": [0, 0.2, 0.6, 1.2], "proxy": [0, 0.3, 0.6, 0.9], "gold": [0, 0.2, 0.4, 0.5]}
    runs = [
        {"name": "PPO", "label": "β = 1", "kl": [0.9, 1.1], "proxy": [0.8, 1.0], "gold": [0.5, 0.5]},
        {"name": "PPO", "kl": 2.0, "proxy": 1.4, "proxy_ci95": (1.3, 1.5)},
    ]
    ax = plots.plot_reward_kl_plane((KL[::-1], PROXY[::-1]), (KL, GOLD), (KL[:2], [0, 0.9]), best, runs)
    np.testing.assert_allclose(ax.lines[0].get_xydata(), np.transpose([KL, PROXY]))
    assert [line.get_ydata().tolist() for line in lines(ax, "o")] == [best["proxy"], best["gold"]]
    filled = [line for line in lines(ax, "s") if line.get_markerfacecolor() == plots.BLUE]
    hollow = [line for line in lines(ax, "s") if line.get_markerfacecolor() == "white"]
    np.testing.assert_allclose([line.get_xydata()[0] for line in filled], [[1, 0.9], [2, 1.4]])
    np.testing.assert_allclose([line.get_xydata()[0] for line in hollow], [[1, 0.5]])
    spans = [(tuple(line.get_xdata()), tuple(line.get_ydata())) for line in lines(ax, "None")]
    assert ((0.9, 1.1), (0.9, 0.9)) in [(x, tuple(np.round(y, 9))) for x, y in spans]
    assert ((2.0, 2.0), (1.3, 1.5)) in spans
    assert {"β = 1", "best possible gold", "best of 8, proxy"} <= set(words(ax))
    with pytest.raises(ValueError, match="best possible proxy has length 3, expected 4"):
        plots.plot_reward_kl_plane((KL, PROXY[:3]))


# ---- pictures that explain


def test_relay_marks_where_you_are():
    ax = plots.plot_relay({"ppo": "gold +0.53"}, here="frozen")
    boxes = [patch for patch in ax.patches if isinstance(patch, FancyBboxPatch)]
    assert [box.get_linewidth() for box in boxes] == [1.3, 1.3, 1.3, 3, 1.3]
    assert {"SFT", "Reward model", "PPO", "Freeze & evaluate", "DPO", "gold +0.53", "you are here ▼"} <= set(words(ax))
    with pytest.raises(ValueError, match="'rlhf'"):
        plots.plot_relay(here="rlhf")


def test_advantage_tokens_wrap_and_show_their_sign():
    advantages = np.linspace(-1, 1, 30)
    ax = plots.plot_advantage_tokens(["word"] * 29 + ["w" * 500], advantages)
    boxes = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    assert len(boxes) == 30 and len({box.get_y() for box in boxes}) > 1
    assert all(box.get_x() >= 0 and box.get_x() + box.get_width() <= ax.get_xlim()[1] for box in boxes)
    assert [bool(box.get_hatch()) for box in boxes] == [a < 0 for a in advantages]
    assert "A −1.00" in words(ax) and "A +1.00" in words(ax)


@pytest.mark.parametrize("clip_range", [0.1, 0.2, 0.6])
def test_clip_hatches_exactly_where_the_objective_is_flat(clip_range):
    ax = plots.plot_clip(clip_range)
    (up, down), (right, left) = ax.lines[:2], ax.patches
    for line, box in ((up, right), (down, left)):
        ratio, objective = line.get_xydata().T
        flat = np.abs(np.diff(objective)) < 1e-9
        middle = (ratio[1:] + ratio[:-1]) / 2
        assert np.array_equal(flat, (middle > box.get_x()) & (middle < box.get_x() + box.get_width()))
        assert np.interp(1, ratio, objective) == pytest.approx(1 if line is up else -1)
