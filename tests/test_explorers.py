"""The explorers without a browser: states, controls, pictures, and the formulas behind them against slow references."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from alignkit_widgets import (
    BetaExplorer,
    BradleyTerryExplorer,
    ClipExplorer,
    FrontierExplorer,
    GAEExplorer,
    KLEstimatorsExplorer,
    ShiftViewer,
    StepThroughExplorer,
)
from alignkit_widgets.explorers import explorer as explorer_module
from alignkit_widgets.explorers import explorer_picture, frontier, worked_numbers
from alignkit_widgets.explorers.blocks import LOOKS, Axis, Bars, Chart, Copy, Fold, Series, Table, Text, Tokens, plain
from alignkit_widgets.explorers.clip import objective_and_slope
from alignkit_widgets.explorers.dpo_beta import loss_and_pull
from alignkit_widgets.explorers.explorer import Button, Choice, Explorer, Slider, Toggle
from small_sweep import BETAS, small_sweep, small_truth, write_sweep

from alignkit import exact
from alignkit.configs import PPOConfig
from alignkit.desk.tiny import tiny_reward_model
from alignkit.desk.world import World
from alignkit.evaluate.shift import Shift, measure_shift
from alignkit.exact.prompts import at_price, enumerate_world
from alignkit.exact.sweep import load_sweep
from alignkit.formulas.losses import bradley_terry_loss, preference_chance
from alignkit.metrics import GLOSSARY
from alignkit.models.heads import value_model_from
from alignkit.models.loading import load_policy

HOSTILE = ["<script>window.hacked = 1</script>", "\x1b[31mred", "abc\u202egnp", r"$\frac{$", "x" * 1_000_000]
SHIFT = Shift(
    ("SFT", "PPO"),
    ("How?", "Why?"),
    (("a", "b"), ("c", "d")),
    [[[0.9, 0.1], [0.2, 0.8]], [[0.5, 0.5], [0.4, 0.6]]],
    [[[0.0, 0.0], [0.7, math.nan]], [[0.0, 0.0], [0.1, 0.2]]],
    [[["yes"] * 3, ["no", "no", "yes"]], [["so"] * 3, ["so"] * 3]],
)
EXPLORERS = {
    "bradley_terry": BradleyTerryExplorer,
    "clip": ClipExplorer,
    "dpo_beta": BetaExplorer,
    "gae": GAEExplorer,
    "kl_estimators": KLEstimatorsExplorer,
    "shift": lambda **options: ShiftViewer(SHIFT, **options),
    "step_through": StepThroughExplorer,
    "frontier": lambda **options: FrontierExplorer(small_sweep(), truth=small_truth(), **options),
}


@pytest.fixture(scope="module", params=EXPLORERS)
def explorer(request):
    return EXPLORERS[request.param]()


@pytest.fixture
def view(monkeypatch):
    """What an explorer sends to a page that is not there."""

    class View(list):
        model_id = "0"
        send = list.append

    return View()


def line(**options) -> Explorer:
    controls = [
        Slider("a", (0, 1, 2), 1),
        Slider("seed", range(9), 3, kept=True, between=False),
        Choice("way", {"up": "upwards", "down": "downwards"}, "up"),
        Toggle("grid"),
        Button("double", "double it", lambda state: {"a": 2}),
        Button("fail", "fail", lambda state: 1 / 0),
        Button("say", "say", lambda state: f"a is {state['a']:g}"),
    ]
    return Explorer(
        "A line", controls, lambda state: [[Text(f"a is {state['a']:g}", lead=True)], [Copy("copy", "it")]], **options
    )


# ---- states and controls


def test_a_state_restores_every_explorer(explorer, request):
    make = EXPLORERS[request.node.callspec.params["explorer"]]
    start = explorer.state
    for name, control in explorer.controls.items():
        other = {
            Slider: lambda c: c.stops[-1 if c.start != c.stops[-1] else 0],
            Choice: lambda c: list(c.options)[-1],
            Toggle: lambda c: not c.start,
        }[type(control)](control)
        explorer.set(**{name: other})
    again = make(state=explorer.state)
    assert again.state == explorer.state != start
    assert again.rows() == explorer.rows()
    explorer.state = start
    assert explorer.state == start


def test_every_knob_changes_the_picture(explorer):
    start = json.dumps(explorer.rows(), allow_nan=False)
    if isinstance(explorer, StepThroughExplorer):  # what a knob does shows once its stage is reached
        explorer.state = "stage=7&steps=3"
        start = json.dumps(explorer.rows(), allow_nan=False)
    values = explorer.values
    for name, control in explorer.controls.items():
        if isinstance(control, Slider):
            others = [control.stops[0], control.stops[-1]]
        else:
            others = list(control.options) if isinstance(control, Choice) else [False, True]
        drawn = set()
        for other in others:
            explorer.set(**{name: other})
            drawn.add(json.dumps(explorer.rows(), allow_nan=False))
            explorer.set(**values)
        assert len(drawn) > 1 or len(others) == 1, f"{name} does nothing"
    assert json.dumps(explorer.rows(), allow_nan=False) == start, "the picture depends on more than the state"


@pytest.mark.parametrize(
    "state, says",
    [
        ("a=x", "a is 'x', expected a number from 0 to 2"),
        ("a=3", "a is '3', expected a number from 0 to 2"),
        ("a=nan", "a is 'nan'"),
        ("seed=1.5", "seed is '1.5', expected one of 0, 1, 2"),
        ("way=left", "way is 'left', expected one of up, down"),
        ("grid=yes", "grid is 'yes', expected 0 or 1"),
        ("b=1", "b is unknown, expected NAME=VALUE with the names a, seed, way, grid"),
        ("a=1&a=2", "a is there twice"),
        ("a", "a is without a value"),
        ("&", "unknown"),
        ("double=1", "double is unknown"),
    ],
)
def test_a_bad_state_is_refused_and_the_field_named(state, says):
    with pytest.raises(ValueError, match="state is") as error:
        line(state=state)
    assert says in str(error.value)
    one = line()
    with pytest.raises(ValueError):
        one.state = state
    assert one.state == "a=1&seed=3&way=up&grid=1"


def test_a_state_may_leave_things_out_and_name_numbers_between_stops():
    assert line(state="a=0.25&grid=0").state == "a=0.25&seed=3&way=up&grid=0"
    assert line(state="").state == "a=1&seed=3&way=up&grid=1"


def test_reset_goes_back_to_the_state_it_began_with_and_keeps_the_seed():
    one = line(state="a=2&seed=5")
    one.state = "a=0&seed=7&way=down"
    one.reset()
    assert one.state == "a=2&seed=7&way=up&grid=1"


def test_hide_leaves_controls_out_and_refuses_unknown_names():
    names = lambda one: [control["name"] for control in one.config()["controls"]]  # noqa: E731
    assert names(line()) == ["a", "seed", "way", "grid", "double", "fail", "say"]
    hidden = line(hide=["seed", "double", "reset", "state", "copy"], state="seed=4")
    assert names(hidden) == ["a", "way", "grid", "fail", "say"] and "seed=4" in hidden.state
    assert not hidden.config()["reset"] and not hidden.config()["state"] and len(hidden.rows()) == 1
    for wrong in (["beta"], "seed"):
        with pytest.raises(ValueError, match="hide is .*expected a list of names out of a, seed, way"):
            line(hide=wrong)


def test_messages_of_a_page_are_answered_and_nonsense_changes_nothing(view):
    one = line()
    one.view = view
    one.receive({"type": "hello", "n": 1})
    one.receive({"type": "set", "n": 2, "values": {"a": 2, "no such": 1}})
    one.receive({"type": "press", "n": 3, "name": "say"})
    assert [(m["n"], m["values"]["a"], m["note"]) for m in view] == [(1, 1, ""), (2, 2, ""), (3, 2, "a is 2")]
    assert view[1]["rows"][0][0]["text"] == "a is 2" and view[1]["state"] == one.state and view[1]["ms"] >= 0
    for nonsense in (
        {"type": "set", "values": {"a": "<b>"}},
        {"type": "set", "values": 3},
        {"type": "press", "name": "x"},
        {"n": 1},
    ):
        one.receive(nonsense)
        assert one.state == "a=2&seed=3&way=up&grid=1"
    assert "expected a number from 0 to 2" in view[3]["note"]
    one.receive({"type": "press", "name": "fail"})
    assert view[-1]["note"] == "ZeroDivisionError: division by zero"
    one.receive({"type": "reset", "n": 9})
    assert (view[-1]["n"], view[-1]["values"]["a"], view[-1]["note"]) == (9, 1, "")


def test_a_button_may_start_something_that_takes_time(view):
    async def later():
        await asyncio.sleep(0)
        return "trained"

    async def press():
        one = FrontierExplorer(small_sweep(), train=lambda parameters: asked.append(parameters) or later())
        one.view = view
        one.press("train")
        await one._task
        await asyncio.sleep(0)
        return one

    asked = []
    asyncio.run(press())
    assert asked == [{"kl_coef": 0.35, "seed": 0}] and view[-1]["note"] == "trained"


# ---- pictures


def test_every_explorer_has_a_picture_and_words_without_a_front_end(explorer):
    png, metadata = explorer.picture()
    assert (
        png.startswith(b"\x89PNG")
        and metadata["width"] > 800
        and metadata["height"] > 200
        and explorer.title in metadata["alt"]
    )
    assert len(png) < 300_000
    data, _ = explorer._repr_mimebundle_()  # no kernel here: words only
    assert list(data) == ["text/plain"] and explorer.state in data["text/plain"]
    json.dumps([explorer.config(), explorer.rows()], allow_nan=False)
    for block in (part for row in explorer.rows() for one in row for part in one.get("blocks", [one])):
        for axis in (block["x"], block["y"]) if block["kind"] == "chart" else ():
            assert axis["label"] and axis["low"] < axis["high"]


def test_in_a_kernel_without_a_front_end_the_picture_is_shown(monkeypatch):
    monkeypatch.setattr(explorer_module, "in_kernel", lambda: True)
    monkeypatch.setenv("ALIGNKIT_HEADLESS", "1")
    data, metadata = ClipExplorer()._repr_mimebundle_()
    assert set(data) == {"image/png", "text/plain"} and metadata["image/png"]["width"] > 800


def test_hostile_text_is_spelled_out_in_every_block():
    rows = [
        [Text(HOSTILE[0]), Tokens(HOSTILE[1], HOSTILE, [1.0, -1.0, 0.0, 0.5, 0.2], {HOSTILE[2]: [1.0] * 5})],
        [Table(HOSTILE[2], HOSTILE, [HOSTILE] * 2)],
        [Fold(HOSTILE[1], [Bars(HOSTILE[3], {HOSTILE[0]: "blue", HOSTILE[3]: "sft"},
                                [(t, 0.1, 0.2) for t in HOSTILE], HOSTILE[4])])],
        [
            Chart(
                HOSTILE[3],
                Axis(HOSTILE[3], 0, 1),
                Axis(HOSTILE[1], 0.1, 1, log=True),
                [Series(t, [(0.5, 0.5)], labels=[t]) for t in HOSTILE[:4]],
                [("x", 0.5, HOSTILE[3]), ("y", 0.5, HOSTILE[2])],
                [(0, 0.2, HOSTILE[3])],
            )
        ],
        [Copy(HOSTILE[0], HOSTILE[4])],
    ]
    one = Explorer(HOSTILE[3], [Choice("c", {"0": HOSTILE[4], "1": HOSTILE[3]}, "1", HOSTILE[2])], lambda state: rows)
    text = json.dumps([one.rows(), one.config()], ensure_ascii=False)
    assert "\x1b" not in text and "\\u001b" not in text and "\u202e" not in text and len(text) < 30_000
    assert HOSTILE[0] in text and "␛[31mred" in text and "⟨U+202E⟩" in text and "1,000,000 characters" in text
    assert one.picture()[0].startswith(b"\x89PNG")


def test_plain_data_holds_what_json_can_hold():
    found = plain(
        [
            math.nan,
            math.inf,
            np.float64(1 / 3),
            np.array([1, 2]),
            torch.tensor(2.0),
            True,
            None,
            {"a": (1,)},
            np.int64(3),
        ]
    )
    assert found == [None, None, 0.333333, [1, 2], 2.0, True, None, {"a": [1]}, 3]


def test_importing_the_widgets_is_cheap():
    heavy = "('torch', 'anywidget', 'matplotlib', 'numpy')"
    code = f"import sys, alignkit_widgets; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- the frontier


@pytest.fixture(scope="module")
def truth():
    return small_truth()


def test_a_price_between_two_recorded_ones_is_what_the_exact_optimum_says(truth):
    curve = truth.frontier(BETAS)
    for beta in (0.021, 0.2, 1.03, 33.0):
        best, _ = exact.optimum(truth.ref_logps, truth.proxy, beta)
        slow = {
            "kl": exact.response_kl(best, truth.ref_logps),
            "proxy": exact.expectation(best, truth.proxy),
            "gold": exact.expectation(best, truth.gold),
        }
        for name, value in at_price(curve, beta).items():
            assert value == pytest.approx(float(slow[name].mean()), rel=2e-3, abs=2e-3), (beta, name)
    assert at_price(curve, BETAS[7])["kl"] == pytest.approx(curve["kl"][7], abs=1e-9)
    for outside in (0.01, 100, 0, -1):
        with pytest.raises(ValueError, match="beta is .*expected 0.02 to 40"):
            at_price(curve, outside)


def test_the_slider_moves_the_optimum_along_the_curve(truth, tmp_path):
    write_sweep(tmp_path / "sweep.json")
    one = FrontierExplorer(load_sweep(tmp_path / "sweep.json"))
    seen = []
    for beta in (4.0, 1.0, 0.2, 0.05):
        one.state = f"beta={beta}"
        plane = next(block for row in one.rows() for block in row if block["kind"] == "chart")
        curve, here = np.array(plane["series"][0]["points"]), plane["series"][-2]["points"][0]
        assert np.interp(here[0], *curve.T) == pytest.approx(here[1], abs=0.02)
        seen.append(here)
        assert one.parameters() == {"kl_coef": beta, "seed": 0}
        copied = [block["text"] for row in one.rows() for block in row if block["kind"] == "copy"]
        assert copied == [f"-p kl_coef={beta:g} -p seed=0"]
        assert set(one.parameters()) <= {*PPOConfig.__dataclass_fields__}
    assert (np.diff(seen, axis=0) > 0).all(), "a lower price buys more KL and more proxy"


def test_without_a_truth_there_are_no_responses_and_without_a_sweep_no_runs(truth):
    kinds = lambda one: [p["kind"] for row in one.rows() for b in row for p in b.get("blocks", [b])]  # noqa: E731
    bare, alone = FrontierExplorer(small_sweep(), state="seed=1"), FrontierExplorer(truth=truth)
    assert (
        set(bare.controls) == {"beta", "seed", "runs"}
        and not bare.buttons
        and kinds(bare) == ["text", "chart", "table", "copy"]
    )
    assert set(alone.controls) == {"beta", "seed", "prompt"} and kinds(alone) == [
        "text",
        "chart",
        "table",
        "bars",
        "table",
        "copy",
    ]
    both = FrontierExplorer(small_sweep(), truth=truth, state="seed=1")
    assert kinds(both) == kinds(bare), "the truth is of world 0: in world 1 nothing is known of responses"
    with pytest.raises(ValueError, match="sweep and truth are None"):
        FrontierExplorer()


def test_runs_are_the_seeds_own_and_crosses_span_the_seeds():
    sweep = small_sweep()
    plane = next(b for row in FrontierExplorer(sweep, state="seed=1").rows() for b in row if b["kind"] == "chart")
    ppo = next(s for s in plane["series"] if s["name"] == "PPO, gold")
    mine = sweep.select("ppo", seed=1)
    assert np.allclose(ppo["points"], [(run.kl, run.gold) for run in mine], rtol=1e-5)
    for span, run in zip(ppo["spans"], mine, strict=True):
        every = sweep.select("ppo", run.value)
        assert np.allclose(span[:2], [min(r.kl for r in every), max(r.kl for r in every)], rtol=1e-5)


def test_the_best_policy_is_in_the_legend_and_prices_are_written_where_there_is_room():
    sweep = small_sweep()
    plane = next(b for row in FrontierExplorer(sweep, state="seed=1").rows() for b in row if b["kind"] == "chart")
    best = next(s for s in plane["series"] if s["name"] == "best at this price, proxy")
    assert best["big"] and LOOKS[best["look"]][:2] not in [LOOKS[name][:2] for name in ("ppo", "dpo", "proxy", "gold")]
    runs = [replace(sweep.runs[0], value=value, kl=kl) for value, kl in ((4, 0.0), (1.5, 0.1), (1, 0.3), (0.5, 0.45))]
    assert frontier._labels(runs, 0.25) == ["4", "", "1", ""]
    assert frontier._labels(runs[::-1], 0.05) == ["0.5", "1", "1.5", "4"]


def test_the_likeliest_responses_and_behaviours_are_those_of_the_tilted_policy(truth):
    beta, prompt = 0.35, 2
    weights = truth.ref_logps[prompt].exp().numpy() * np.exp(truth.proxy[prompt].numpy() / beta)
    slow = weights / weights.sum()
    best = truth.optimum(prompt, beta)
    assert np.allclose(best.exp(), slow)
    texts = exact.response_space().texts()
    assert truth.likeliest(best, 3) == [(int(i), texts[i]) for i in np.argsort(-slow)[:3]]
    shares = truth.shares(prompt, best)
    for number, share in enumerate(shares.values()):
        assert share == pytest.approx(slow[truth.behaviour[prompt].numpy() == number].sum())
    one = FrontierExplorer(truth=truth, state=f"beta={beta}&prompt={prompt}")
    table = one.rows()[-2][0]["blocks"][1]
    assert (
        table["rows"][0][0] == texts[int(np.argmax(slow))].strip()
        and table["rows"][0][2] == f"{100 * slow.max():.1f} %"
    )


def test_enumerating_a_world_gives_tables_in_units_of_the_reference():
    world, (policy, tokenizer) = World(0), load_policy("tiny", seed=0)
    prompts = [world.heldout_prompts[0], world.heldout_prompts[-1]]
    found = enumerate_world(policy, tokenizer, lambda asked, said: [float(len(text)) for text in said], world, prompts)
    assert torch.allclose(
        exact.expectation(found.ref_logps, found.gold).mean(), torch.zeros((), dtype=torch.float64), atol=1e-9
    )
    assert float(exact.expectation(found.ref_logps, found.gold.square()).mean()) == pytest.approx(1)
    texts = exact.response_space().texts()
    some = [0, 7, 500, 16_000]
    for row, prompt in enumerate(prompts):
        named = world.behaviours([prompt.text] * 4, [texts[i] for i in some])
        assert [list(found.shares(row, torch.eye(len(texts))[i].log()).values()).index(1.0) for i in some] == [
            list(found.shares(row, found.ref_logps[row])).index(name) for name in named
        ]
    with pytest.raises(ValueError, match="prompts is empty"):
        enumerate_world(policy, tokenizer, None, world, [])


# ---- one idea each


@pytest.mark.parametrize("advantage", [1.5, -0.7])
def test_the_clip_explorer_draws_ppos_objective(advantage):
    ratio = torch.tensor([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 1.7], dtype=torch.float64)
    value, slope, still = objective_and_slope(ratio, advantage, 0.2)
    slow = [min(r * advantage, min(max(r, 0.8), 1.2) * advantage) for r in ratio.tolist()]
    assert np.allclose(value, slow)
    gone = ratio > 1.2 if advantage > 0 else ratio < 0.8
    assert np.allclose(slope, torch.where(gone, 0.0, advantage)) and (still == gone).all()
    says = lambda state: ClipExplorer(state=state).rows()[0][0]["text"]  # noqa: E731
    assert "No gradient" in says("ratio=1.3&sign=up") and "wrong way" in says("ratio=1.3&sign=down")
    assert "wrong way" in says("ratio=0.5&sign=up") and "No gradient" in says("ratio=0.5&sign=down")
    assert "Inside the clip" in says("ratio=1.1&sign=up")


def slow_update(numbers, kl_coef, gamma, lam, clip, rate, steps):
    """ppo_update with loops and the derivative written out."""
    logits, ids, n = numbers.logits.numpy().copy(), numbers.ids.tolist(), len(numbers.tokens)
    log_p = lambda table: [float(table[t, ids[t]] - np.log(np.exp(table[t]).sum())) for t in range(n)]  # noqa: E731
    old, ref = log_p(logits), log_p(numbers.ref_logits.numpy())
    rewards = [-kl_coef * (old[t] - ref[t]) + (numbers.score if t == n - 1 else 0) for t in range(n)]
    values = [*numbers.values.tolist(), 0.0]
    deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(n)]
    advantages = [sum((gamma * lam) ** (later - t) * deltas[later] for later in range(t, n)) for t in range(n)]
    for _ in range(steps + 1):
        now = log_p(logits)
        ratio = [math.exp(a - b) for a, b in zip(now, old, strict=True)]
        still = [(r > 1 + clip and a > 0) or (r < 1 - clip and a < 0) for r, a in zip(ratio, advantages, strict=True)]
        for t in range(n):
            chances = np.exp(logits[t]) / np.exp(logits[t]).sum()
            if not still[t]:
                logits[t] += rate / n * advantages[t] * ratio[t] * (np.eye(len(chances))[ids[t]] - chances)
    return {
        "old": old,
        "ref": ref,
        "rewards": rewards,
        "advantages": advantages,
        "now": now,
        "ratio": ratio,
        "still": still,
        "new": log_p(logits),
    }


@pytest.mark.parametrize("steps", [0, 3])
def test_an_update_is_what_loops_by_hand_give(steps):
    numbers = worked_numbers.example_response()
    settings = {"kl_coef": 0.3, "gamma": 0.9, "gae_lambda": 0.8, "clip_range": 0.1, "learning_rate": 2.0}
    found = worked_numbers.ppo_update(numbers, **settings, steps=steps)
    for name, slow in slow_update(numbers, *settings.values(), steps).items():
        assert np.allclose(getattr(found, name), slow, atol=1e-12), name
    assert steps or torch.equal(found.ratio, torch.ones(4, dtype=torch.float64))
    assert not steps or found.still.any(), "the example should reach the clip"
    _, advantages = worked_numbers.token_advantages(numbers, kl_coef=0.3, gamma=0.9, gae_lambda=0.8)
    assert torch.equal(advantages, found.advantages)


def test_a_real_response_is_read_as_ppo_reads_it():
    policy, tokenizer = load_policy("tiny", seed=0)
    reference, critic = load_policy("tiny", seed=1)[0], value_model_from(tiny_reward_model(tokenizer, seed=0))
    prompt, response = World(0).heldout_prompts[0].text, " Happy to help! Fill in the online form."
    numbers = worked_numbers.read_response(policy, reference, critic, tokenizer, prompt, response, 0.7)
    assert numbers.tokens == (" Happy to help!", " Fill in the online form.", "<eos>") and numbers.score == 0.7
    found = worked_numbers.ppo_update(numbers)
    space = exact.response_space()
    for logprobs, model in ((found.old, policy), (found.ref, reference)):
        slow = exact.response_logps(model, tokenizer, [prompt])[0, space.texts().index(response)]
        assert float(logprobs.sum()) == pytest.approx(float(slow), abs=1e-4)
    ids = torch.tensor([tokenizer(prompt + response)["input_ids"]])
    with torch.no_grad():
        hidden = critic.base_model(input_ids=ids).last_hidden_state
        slow = critic.score(hidden)[0, -3:, 0]  # before each token: at the prompt's end, and after each but the last
    assert torch.allclose(numbers.values.float(), slow, atol=1e-5)
    assert "Happy to help!" in GAEExplorer(numbers).text() and "Happy to help!" in StepThroughExplorer(numbers).text()
    with pytest.raises(ValueError, match="response is ''"):
        worked_numbers.read_response(policy, reference, critic, tokenizer, prompt, "", 0.0)


def test_gae_explorer_says_what_lambda_does():
    one_step = GAEExplorer(state="lambda=0&kl_coef=0").rows()
    tokens = one_step[1][0]
    values = [*worked_numbers.example_response().values.tolist(), 0.0]
    slow = [(1.0 if t == 3 else 0.0) + values[t + 1] - values[t] for t in range(4)]
    assert np.allclose(tokens["values"], slow) and "one step" in one_step[0][0]["text"]
    assert "baseline only" in GAEExplorer(state="lambda=1").rows()[0][0]["text"]


def test_the_worked_dpo_example_is_notebook_05s():
    for beta, margin in ((0.1, 0.15), (0.5, 0.75)):
        text = BetaExplorer(state=f"beta={beta}").text()
        loss = math.log(1 + math.exp(-margin))
        assert f"Margin +{margin:.3f}, loss {loss:.4f}" in text and f"= {1 / (1 + math.exp(margin)):.2f}, pull" in text
        assert "The pair is ranked correctly, yet the rejected response is the likelier one" in text


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge"])
def test_the_pull_is_the_slope_of_the_loss(kind):
    beta, h = 0.4, 1e-6
    margins = torch.tensor([-2.0, 0.3, 1.7], dtype=torch.float64)
    _, pull = loss_and_pull(margins, beta, kind)
    up, down = (loss_and_pull(margins + beta * step, beta, kind)[0] for step in (h, -h))
    assert np.allclose(pull, -(up - down) / (2 * h), atol=1e-6)
    if kind == "sigmoid":
        assert np.allclose(pull, beta / (1 + margins.exp()))


def test_bradley_terry_labels_and_loss():
    assert float(preference_chance(1.0, 0.1)) == pytest.approx(0.9 / (1 + math.exp(-1)) + 0.1 / (1 + math.e))
    wins = worked_numbers.labels_for_first(1.0, 40_000, 0.1, seed=2)
    assert wins / 40_000 == pytest.approx(float(preference_chance(1.0, 0.1)), abs=0.01)
    assert wins == worked_numbers.labels_for_first(1.0, 40_000, 0.1, seed=2)
    assert wins != worked_numbers.labels_for_first(1.0, 40_000, 0.1, seed=3)
    places = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    losses = bradley_terry_loss(places, 33, 50)
    assert float(places[losses.argmin()]) == pytest.approx(math.log(33 / 17), abs=1e-3)
    assert float(losses[3000]) == pytest.approx(math.log(2))
    one = BradleyTerryExplorer(state="labels=1")
    assert "no minimum" in one.text()
    before = one.state
    one.press("again")
    assert one.state != before and one.values["seed"] == 1


def test_kl_estimates_have_the_exact_mean_and_spread():
    ref = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    policy = worked_numbers.tilted(ref, torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64), 0.7)
    p, q = policy.exp().numpy(), ref.exp().numpy()
    assert np.allclose(p, q * np.exp([0.7, 0, -0.7]) / (q * np.exp([0.7, 0, -0.7])).sum())
    exactly = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    found = worked_numbers.kl_estimates(policy, ref, 200_000, seed=1)
    assert found["k1"][1] == pytest.approx(exactly) == found["k3"][1] and found["k2"][1] != pytest.approx(
        exactly, abs=1e-3
    )
    for values, mean, sd in found.values():
        assert float(values.mean()) == pytest.approx(mean, abs=5 * sd / 200_000**0.5)
        assert float(values.std()) == pytest.approx(sd, rel=0.02)
    wrong = worked_numbers.kl_estimates(policy, ref, 8, sampler=ref)
    assert wrong["k1"][1] == pytest.approx(-sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)))


def test_the_kl_explorer_finds_a_negative_estimate_and_calls_it_harmless():
    one = KLEstimatorsExplorer(state="samples=8&distance=0.1")
    for seed in range(50):
        one.set(seed=seed)
        if "k1 is negative" in one.text():
            break
    assert "which is no error" in one.text()
    assert "no estimator estimates" in KLEstimatorsExplorer(state="sampler=reference").text()


# ---- what moved


def test_shift_measures_what_enumeration_says():
    first, tokenizer = load_policy("tiny", seed=0)
    second, prompts = (
        load_policy("tiny", seed=1)[0],
        [World(0).heldout_prompts[0].text, World(0).heldout_prompts[-1].text],
    )
    found = measure_shift([("first", first), ("second", second)], tokenizer, prompts, samples=64, seed=3)
    space = exact.response_space()
    for name, policy in enumerate((first, second)):
        logps = exact.response_logps(policy, tokenizer, prompts)
        begins = space.below(logps.exp())
        for p in range(2):
            for token, chance in zip(found.tokens[p], found.chances[p][name], strict=True):
                slow = begins[p, space.texts().index(token)] if token != "<eos>" else logps[p, 0].exp()
                assert chance == pytest.approx(float(slow), abs=1e-5)
            assert set(found.responses[p][name]) <= set(space.texts()) and len(found.responses[p][name]) == 64
    assert np.nanmax(np.abs([found.kl[p][0] for p in range(2)])) < 1e-6 and min(found.kl[0][1][:2]) > 0
    exactly = exact.response_kl(*(exact.response_logps(policy, tokenizer, prompts) for policy in (second, first)))
    lengths = [
        np.mean(
            [
                min(4, 1 + len(space.sequences[space.texts().index(t)][space.sequences[space.texts().index(t)] >= 0]))
                for t in row[1]
            ]
        )
        for row in found.responses
    ]
    for p in range(2):  # mean KL a token × tokens, about: positions are averaged over the responses that reach them
        assert np.nanmean(found.kl[p][1]) * lengths[p] == pytest.approx(float(exactly[p]), rel=0.5)
    with pytest.raises(ValueError, match="at least two with names of their own"):
        measure_shift([("a", first), ("a", second)], tokenizer, prompts)
    with pytest.raises(ValueError, match="prompts is empty"):
        measure_shift([("a", first), ("b", second)], tokenizer, [])


def test_the_viewer_shows_the_chosen_checkpoint():
    text = ShiftViewer(SHIFT).text()
    assert (
        "PPO: 0.70 nats from SFT" in text
        and "Up most: “b”, +70 points. Down most: “a”, −70" in text
        and "no  2 of 3" in text
    )
    assert "yes  3 of 3" in ShiftViewer(SHIFT, state="checkpoint=0").text()


class FakeView:
    """Keeps what is sent to a page."""

    def __init__(self):
        self.sent = []

    def send(self, message):
        self.sent.append(json.loads(json.dumps(message, allow_nan=False)))


def test_a_page_may_type_a_state_and_a_bad_one_is_answered_with_a_sentence():
    one = ClipExplorer()
    one.view = FakeView()
    one.receive({"type": "state", "text": "ratio=0.7&clip=0.1", "n": 1})
    assert one.values["ratio"] == 0.7 and one.values["clip"] == 0.1 and one.view.sent[-1]["note"] == ""
    one.receive({"type": "state", "text": "rat=0.5", "n": 2})
    assert one.values["ratio"] == 0.7 and "rat is unknown" in one.view.sent[-1]["note"]


def test_a_page_gets_the_picture_to_save():
    one = ClipExplorer()
    one.receive({"type": "picture"})  # nobody looks
    one.view = FakeView()
    one.receive({"type": "picture"})
    assert base64.b64decode(one.view.sent[0]["picture"]) == one.picture()[0]


def test_the_price_slider_runs_as_the_plane_does_and_a_dragged_point_is_on_the_frontier():
    one = FrontierExplorer(small_sweep())
    slider = one.controls["beta"]
    assert list(slider.stops) == sorted(slider.stops, reverse=True) and slider.ends == ("KL expensive", "KL cheap")
    control, stops = next(b for row in one.rows() for b in row if b["kind"] == "chart")["drag"]
    assert control == "beta" and [beta for _, beta in stops] == pytest.approx(list(slider.stops), rel=1e-5)
    assert (np.diff([kl for kl, _ in stops]) > 0).all(), "to the right: cheaper, and farther from SFT"
    for kl, beta in stops[::10]:
        one.set(beta=beta)
        plane = next(b for row in one.rows() for b in row if b["kind"] == "chart")
        assert plane["series"][-1]["points"][0][0] == pytest.approx(kl, rel=1e-3)


@pytest.mark.parametrize("make, control, where", [
    (ClipExplorer, "ratio", lambda v: v["ratio"]), (BradleyTerryExplorer, "first", lambda v: v["first"] - v["second"])])
def test_dragging_puts_the_point_where_the_pointer_is(make, control, where):
    one = make()
    name, stops = next(b for row in one.rows() for b in row if b["kind"] == "chart")["drag"]
    assert name == control
    for x, value in stops[::9]:
        one.set(**{control: value})
        chart = next(b for row in one.rows() for b in row if b["kind"] == "chart")
        assert where(one.values) == pytest.approx(x) and chart["series"][-1]["points"][0][0] == pytest.approx(x)


def test_a_line_that_leaves_the_axis_is_marked_where_it_does():
    line = np.array([[0.0, 0.5], [1.0, 1.5], [2.0, 0.5], [3.0, -1.5]])
    assert explorer_picture._leaving(line, 0.0, 1.0) == [(0.5, 1.0, 1), (1.5, 1.0, 1), (2.25, 0.0, -1)]


def test_every_term_that_an_explorer_explains_is_in_the_glossary_and_says_something_else():
    for term, meaning in GLOSSARY.items():
        assert meaning[0].isupper() and meaning.endswith(".") and meaning.lower().strip(".") != term.lower() and len(
            meaning) < 140
