"""The cockpit without a browser: its log, its controls, its ends, and what it says where nobody watches."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import alignkit_widgets.cockpit.feed as feed_module
import alignkit_widgets.cockpit.session as session_module
import nbformat
import pytest
import torch
from alignkit_widgets import TrainingCockpit, replay
from alignkit_widgets.cockpit import snapshots
from alignkit_widgets.cockpit.controls import Control, Controls
from alignkit_widgets.cockpit.log import branches_of, marks_of
from alignkit_widgets.notebook import has_front_end

from alignkit.configs import PPOConfig
from alignkit.desk.world import World
from alignkit.models.loading import load_policy
from alignkit.ppo import PPOState, ppo_iteration
from alignkit.storage import branch_files, branch_metrics, read_metrics

CHARTS = [("KL (nats)", ["kl"])]
CONTROLS = {"kl_coef": (0.0, 1.0, 0.05, "log"), "clip_range": (0.05, 0.5, 0.2)}


class Walk:
    """A little run that its controls change: deterministic, and with a memory, as training has."""

    def __init__(self) -> None:
        self.at, self.seen = 0.0, []

    def __call__(self, controls: dict) -> dict:
        self.seen.append(controls)
        self.at += controls["clip_range"] / (1 + 10 * controls["kl_coef"])
        return {"kl": self.at}

    def state_dict(self) -> dict:
        return {"at": self.at}

    def load_state_dict(self, saved: dict) -> None:
        self.at = saved["at"]


def cockpit(tmp_path, total=6, **options) -> TrainingCockpit:
    options = {"controls": CONTROLS, "log": tmp_path / "ppo" / "metrics.jsonl"} | options
    return TrainingCockpit("PPO", CHARTS, total, **options)


def test_every_row_has_its_step_its_metrics_and_the_controls_it_ran_with(tmp_path):
    rows = cockpit(tmp_path).run_sync(Walk())
    assert rows == read_metrics(tmp_path / "ppo" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[2]["controls"] == {"kl_coef": 0.05, "clip_range": 0.2}


def test_run_and_run_sync_do_the_same(tmp_path):
    assert asyncio.run(cockpit(tmp_path).run(Walk())) == cockpit(tmp_path).run_sync(Walk())


def test_a_step_may_be_awaited(tmp_path):
    walk = Walk()

    async def step(controls):
        await asyncio.sleep(0)
        return walk(controls)

    assert asyncio.run(cockpit(tmp_path).run(step)) == cockpit(tmp_path).run_sync(Walk())


def steered(tmp_path, messages: dict[int, list[dict]], walk=None, **options):
    """A run of ten iterations in which `messages` arrive before the calls of its step that they are listed under."""
    one, walk = cockpit(tmp_path, total=10), walk or Walk()
    opened = one.open

    def open_and_script(*arguments, **options):
        remote = opened(*arguments, **options)
        turn = remote.turn

        async def scripted_turn():
            for message in messages.get(len(walk.seen) + 1, []):
                remote.receive(message)
            return await turn()

        remote.turn = scripted_turn
        return remote

    one.open = open_and_script
    return one, walk, asyncio.run(one.run(walk, **options))


def test_a_change_takes_effect_at_the_next_iteration_and_the_log_replays_the_run(tmp_path):
    changes = {
        4: [{"type": "set", "name": "kl_coef", "value": 0.1}],
        7: [{"type": "set", "name": "kl_coef", "value": 0}],
    }
    one, _, rows = steered(tmp_path, changes)
    assert [row["controls"]["kl_coef"] for row in rows] == [0.05] * 3 + [0.1] * 3 + [0.0] * 4
    assert one.session.marks == marks_of(rows)
    assert [(m["step"], m["old"], m["new"]) for m in one.session.marks] == [(4, 0.05, 0.1), (7, 0.1, 0.0)]
    unsteered = cockpit(tmp_path, total=10, log=None).run_sync(Walk())
    assert unsteered != rows
    again = cockpit(tmp_path, total=10, log=tmp_path / "again.jsonl")
    assert asyncio.run(again.run(Walk(), replay=replay(tmp_path / "ppo" / "metrics.jsonl"))) == rows


class Watched:
    """A panel without a page: what it was sent."""

    def __init__(self, config: dict, on_message) -> None:
        self.sent = []

    def send(self, message: dict) -> None:
        self.sent.append(copy.deepcopy(message))


@pytest.fixture
def watched(monkeypatch):
    """Somebody has the notebook open, so that there is a panel."""
    monkeypatch.setattr(feed_module, "has_front_end", lambda: True)
    monkeypatch.setattr("alignkit_widgets.cockpit.panel.PanelDisplay", Watched)


def rewind(to: object) -> dict:
    return {"type": "rewind", "iteration": to}


def dearer(value: float = 0.1) -> dict:
    return {"type": "set", "name": "kl_coef", "value": value}


def test_a_rewound_run_goes_on_as_a_branch_and_nothing_is_lost(tmp_path, watched):
    walk = Walk()
    one, _, rows = steered(tmp_path, {8: [dearer(), rewind(3)]}, walk, state=walk)
    log = tmp_path / "ppo" / "metrics.jsonl"
    assert rows == read_metrics(log) and [row["step"] for row in rows] == list(range(1, 11))
    assert [row["controls"]["kl_coef"] for row in rows] == [0.05] * 3 + [0.1] * 7, "the slider is not what it was at 3"
    plain = cockpit(tmp_path, total=10, log=None).run_sync(Walk())
    (left,) = [read_metrics(file) for file in branch_files(log)]
    assert branch_files(log) == [tmp_path / "ppo" / "metrics.branch-1.jsonl"]
    assert rows[:3] + left == plain[:7], "what was done before the rewind"
    assert one.session.branches == branches_of(log, rows) == [{"at": 3, "rows": plain[2:7]}]
    changed = {"step": 4, "name": "kl_coef", "old": 0.05, "new": 0.1}
    assert one.session.marks == marks_of(rows, one.session.branches) == [
        {"step": 3, "name": "rewind", "old": 7, "new": 3}, changed]
    again = cockpit(tmp_path, total=10, log=tmp_path / "again.jsonl")
    assert asyncio.run(again.run(Walk(), replay=replay(log))) == rows


class Kept:
    """In place of a run's Checkpoints: what it was told, and where the run goes on."""

    def __init__(self, start: int = 0) -> None:
        self.start, self.told = start, []

    def resume(self) -> int:
        return self.start

    def offer(self, step: int) -> None:
        self.told.append(("offer", step))

    def go_back(self, step: int) -> None:
        self.told.append(("go back", step))

    def end(self, step: int, why: str) -> None:
        self.told.append((why, step))

    def ended(self, step: int) -> str:
        return ""

    def close(self, step: int) -> None:
        self.told.append(("close", step))


def test_a_rewind_makes_the_checkpoints_of_what_was_left_be_forgotten(tmp_path, watched):
    walk, kept = Walk(), Kept()
    steered(tmp_path, {8: [rewind(3)]}, walk, state=walk, checkpoints=kept)
    assert kept.told == [*[("offer", step) for step in range(1, 8)], ("go back", 3),
                         *[("offer", step) for step in range(4, 11)], ("close", 10)]


def test_a_run_that_goes_on_is_one_curve_with_a_mark(tmp_path, watched):
    whole = cockpit(tmp_path, total=10, log=tmp_path / "ppo" / "metrics.jsonl").run_sync(Walk())
    walk = Walk()
    for _ in range(6):
        walk({"kl_coef": 0.05, "clip_range": 0.2})
    one = cockpit(tmp_path, total=10)
    rows = asyncio.run(one.run(walk, checkpoints=Kept(6)))
    assert rows == whole == read_metrics(tmp_path / "ppo" / "metrics.jsonl")
    assert one.session.marks == [{"step": 6, "name": "resumed", "old": None, "new": None}]
    assert one.picture()[0].startswith(b"\x89PNG")


@pytest.mark.parametrize("end, state", [(KeyboardInterrupt, "interrupted"), (RuntimeError, "failed")])
def test_a_run_that_is_interrupted_or_fails_writes_a_last_checkpoint_of_what_is_logged(tmp_path, end, state):
    walk, kept = Walk(), Kept()

    def step(controls):
        if len(walk.seen) == 4:
            raise end
        return walk(controls)

    one = cockpit(tmp_path, total=10)
    with pytest.raises(end):
        asyncio.run(one.run(step, checkpoints=kept))
    assert kept.told[-1] == ("close", 4) and one.session.state == state


def test_a_step_that_says_stop_ends_the_run_after_its_row(tmp_path, capsys):
    walk = Walk()
    one = cockpit(tmp_path, total=10)
    rows = asyncio.run(one.run(lambda now: {**walk(now), "stop": "it ran away" if len(walk.seen) == 3 else ""}))
    assert len(rows) == 3 and one.session.state == "stopped" and one.session.note == "it ran away"
    assert "stopped: it ran away" in capsys.readouterr().out and "stop" not in rows[-1]


def test_the_panel_hears_of_snapshots_and_of_branches(tmp_path, watched):
    walk = Walk()
    one, _, _ = steered(tmp_path, {8: [rewind(3)], 10: [{"type": "sync"}]}, walk, state=walk)
    sent = one.session.feed.panel.sent
    states = [message["state"] for message in sent]
    assert next(s["snapshots"] for s in states if s["done"] == 7) == list(range(7)), "every iteration of so short a run"
    went_back = next(message for message in sent if message["branches"])
    assert went_back["whole"] and went_back["from"] == 0 and went_back["to"] == 3
    assert went_back["state"]["done"] == 3 and went_back["state"]["snapshots"] == [0, 1, 2]
    past = [[row["step"], row["kl"]] for row in one.session.branches[0]["rows"]]
    assert [branch["points"]["kl"] for branch in went_back["branches"]] == [past] and len(past) == 5
    for message in sent[sent.index(went_back) + 1 :]:
        assert bool(message["branches"]) == message["whole"], "a page that was loaded again needs them too"
    assert states[-1]["snapshots"] is None and one.session.snapshots is None, "the run is over, their memory is free"


def test_a_paused_run_is_rewound_at_rest_and_can_be_rewound_again(tmp_path, watched):
    one, walk, states = cockpit(tmp_path, total=10), Walk(), []

    async def press(remote):
        for message in (rewind(2), {"type": "step"}, {"type": "step"}, rewind(2), rewind(0), {"type": "play"}):
            for _ in range(50):
                await asyncio.sleep(0)
            states.append((remote.session.done, remote.session.state, [row["step"] for row in one.rows]))
            remote.receive(message)

    async def run():
        def step(controls):
            if len(walk.seen) == 4:
                remote.receive({"type": "pause"})
                tasks.append(asyncio.get_running_loop().create_task(press(remote)))
            return walk(controls)

        tasks, remote = [], one.open("control")
        one.open = lambda *a, **o: remote
        return await one.run(step, state=walk)

    rows = asyncio.run(run())
    steps = [5, 2, 3, 4, 2, 0]
    assert states == [(n, "paused", list(range(1, n + 1))) for n in steps]
    assert len(rows) == 10 and len(branch_files(one.log)) == 3
    assert [(b["at"], [row["step"] for row in b["rows"]]) for b in one.session.branches] == [
        (2, [2, 3, 4, 5]), (2, [2, 3, 4]), (0, [1, 2])]
    assert branches_of(one.log, rows) == one.session.branches, "from the files, each with the row that it left at"
    assert rows == cockpit(tmp_path, total=10, log=None).run_sync(Walk()), "the same process, seen again"
    assert cockpit(tmp_path).picture()[0].startswith(b"\x89PNG")


def test_rewinding_to_the_start_and_stopping_there_keeps_what_was_done(tmp_path, watched):
    walk = Walk()
    one, _, rows = steered(tmp_path, {5: [rewind(0), {"type": "stop"}]}, walk, state=walk)
    assert rows == [] == read_metrics(one.log) and walk.at == 0
    assert [row["step"] for row in read_metrics(branch_files(one.log)[0])] == [1, 2, 3, 4]
    assert one.picture()[0].startswith(b"\x89PNG"), "the dashed lines are there"
    cockpit(tmp_path).run_sync(Walk())
    assert branch_files(one.log) == [], "a new run begins without the branches of the one before"


@pytest.mark.parametrize("to", [7, 8, -1, 99, "3", 3.0, True, None, [3], {"a": 1}, math.nan])
def test_a_rewind_to_where_there_is_nothing_is_ignored(tmp_path, watched, to):
    walk = Walk()
    one, _, rows = steered(tmp_path, {8: [rewind(to)]}, walk, state=walk)
    assert rows == cockpit(tmp_path, total=10, log=None).run_sync(Walk()) and branch_files(one.log) == []


class Untouchable(Walk):
    def state_dict(self):
        raise AssertionError("a snapshot was taken")


@pytest.mark.parametrize("options", [{}, {"replay": {}}])
def test_where_nobody_can_rewind_no_snapshot_is_taken(tmp_path, request, options):
    if options:
        request.getfixturevalue("watched")
    walk = Untouchable()
    _, _, rows = steered(tmp_path, {4: [rewind(2)]}, walk, state=walk, **options)
    assert rows == cockpit(tmp_path, total=10).run_sync(Walk())


def test_without_a_state_there_is_no_rewind(tmp_path, watched):
    one, _, rows = steered(tmp_path, {4: [rewind(2)]})
    assert len(rows) == 10 and {m["state"]["snapshots"] for m in one.session.feed.panel.sent} == {None}
    with pytest.raises(TypeError, match="state is a function, expected one with state_dict"):
        asyncio.run(cockpit(tmp_path).run(Walk(), state=rewind))


def test_snapshots_are_few_and_small(monkeypatch):
    class Weights:
        size = 1000

        def state_dict(self):
            return {"model": {"w": torch.zeros(self.size)}, "steps": [torch.zeros(2), 3]}

    weights = Weights()
    kept = snapshots.Snapshots(weights, 1000)
    for iteration in range(1000):
        kept.take(iteration)
    assert list(kept.kept) == list(range(0, 1000, 50))
    monkeypatch.setattr(snapshots, "LIMIT", 5 * 4008 + 100)
    fewer = snapshots.Snapshots(weights, 1000)
    for iteration in range(1000):
        fewer.take(iteration)
    assert list(fewer.kept) == [0, 200, 400, 600, 800], "as many as fit into the limit"
    weights.size = 10_000
    for iteration in range(3):
        fewer.take(iteration)
    assert 1 not in fewer.kept, "one that does not fit is not taken"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
def test_a_rewind_that_fails_in_the_middle_leaves_every_row(tmp_path, watched, monkeypatch, error):
    walk, before = Walk(), cockpit(tmp_path, total=10, log=None).run_sync(Walk())

    def fail(*arguments):
        raise error("in the middle")

    if error is OSError:  # the disk is full after the branch's file was written, before the log is cut
        monkeypatch.setattr("alignkit_widgets.cockpit.session.trim_metrics", fail)
    else:
        monkeypatch.setattr(walk, "load_state_dict", fail)
    with pytest.raises(error):
        steered(tmp_path, {8: [rewind(3)]}, walk, state=walk)
    log = tmp_path / "ppo" / "metrics.jsonl"
    assert [row["step"] for row in read_metrics(log)] == list(range(1, 8))
    assert read_metrics(log)[:3] + read_metrics(branch_files(log)[0]) == before[:7]


def test_branches_of_a_log_are_numbered_and_a_torn_line_is_in_none(tmp_path):
    log = tmp_path / "m.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    with pytest.warns(UserWarning, match="torn"):
        assert branch_metrics(log, 1) == tmp_path / "m.branch-1.jsonl"
    assert branch_metrics(log, 1) is None and log.read_text() == '{"step": 1}\n'
    assert branch_metrics(log, 0) == tmp_path / "m.branch-2.jsonl" and log.read_text() == ""
    assert [file.read_text() for file in branch_files(log)] == ['{"step": 2}\n{"step": 3}\n', '{"step": 1}\n']


def tiny_ppo(target_kl: float | None = None):
    """A tiny PPO run: (its state, its step for a cockpit)."""
    policy, tokenizer = load_policy("tiny", seed=0, device="cpu")
    config = PPOConfig(iterations=10, prompts_per_iteration=16, minibatch_size=8, target_kl=target_kl, kl_horizon=50)
    prompts = [prompt.text for prompt in World(0).train_prompts[::40]]
    state = PPOState.start(policy, tokenizer, lambda _, texts: [len(text) / 50 for text in texts], prompts, config)

    def step(controls: dict) -> dict:
        step.seen.append(controls)
        measured = ppo_iteration(state, replace(config, **controls)).log()
        return {"kl": measured["objective/kl"]} | {name: value for name, value in measured.items() if name != "step"}

    step.seen = []
    return state, step


@pytest.mark.parametrize("target_kl", [None, 0.05])
def test_a_ppo_run_that_was_rewound_twice_is_replayed_from_its_log_digit_for_digit(tmp_path, watched, target_kl):
    state, step = tiny_ppo(target_kl)
    messages = {6: [dearer(0.4), rewind(2)], 8: [dearer(0.8), rewind(2)]}
    one, _, rows = steered(tmp_path, messages, step, state=state)
    assert [row["controls"]["kl_coef"] for row in rows] == [0.05] * 2 + [0.8] * 8
    assert [[row["step"] for row in read_metrics(file)] for file in branch_files(one.log)] == [[3, 4, 5], [3, 4]]
    fresh, again = tiny_ppo(target_kl)
    log = tmp_path / "again.jsonl"
    assert asyncio.run(cockpit(tmp_path, total=10, log=log).run(again, replay=replay(one.log))) == rows
    assert log.read_bytes() == one.log.read_bytes()
    for name in ("policy", "critic"):
        theirs = dict(getattr(fresh, name).named_parameters())
        assert all(torch.equal(w, theirs[key]) for key, w in getattr(state, name).named_parameters())
    assert state.kl_coef == fresh.kl_coef and state.iteration == fresh.iteration == 10
    if target_kl is None:
        assert read_metrics(branch_files(one.log)[0])[0]["objective/kl"] == rows[2]["objective/kl"], "sampled alike"
        assert read_metrics(branch_files(one.log)[0])[1]["objective/kl"] != rows[3]["objective/kl"], "trained otherwise"


def test_stop_ends_the_run_and_keeps_it(tmp_path):
    one, walk, rows = steered(tmp_path, {4: [{"type": "stop"}]})
    assert len(walk.seen) == len(rows) == 3 and one.session.state == "stopped"


def test_pause_step_and_play(tmp_path):
    async def press(remote):
        for message in ({"type": "step"}, {"type": "alive"}, {"type": "step"}, {"type": "play"}):
            for _ in range(50):
                await asyncio.sleep(0)
            states.append((len(walk.seen), remote.session.state))
            remote.receive(message)

    one, walk, states = cockpit(tmp_path), Walk(), []

    async def run():
        opened = one.open
        one.open = lambda *a, **o: opened(*a, **o)

        def first(controls):
            if not walk.seen:
                remote.receive({"type": "pause"})
                tasks.append(asyncio.get_running_loop().create_task(press(remote)))
            return walk(controls)

        tasks = []
        remote = one.open("control")
        one.open = lambda *a, **o: remote
        return await one.run(first)

    rows = asyncio.run(run())
    assert states == [(1, "paused"), (2, "paused"), (2, "paused"), (3, "paused")]
    assert len(rows) == 6 and one.session.state == "finished"


def test_a_paused_run_whose_page_is_gone_goes_on(tmp_path):
    one = cockpit(tmp_path, patience=0.1)
    remote = one.open("control")
    one.open = lambda *a, **o: remote
    remote.receive({"type": "pause"})
    assert len(asyncio.run(one.run(Walk()))) == 6
    assert "was closed" in remote.session.note


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"type": 3},
        {"type": "set"},
        {"type": "set", "name": "kl_coef", "value": "0.1"},
        {"type": "set", "name": "kl_coef", "value": math.nan},
        {"type": "set", "name": "kl_coef", "value": True},
        {"type": "set", "name": "sampler", "value": 1},
        {"type": "set", "name": ["kl_coef"], "value": 1},
    ],
)
def test_a_message_that_makes_no_sense_changes_nothing(tmp_path, message):
    _, _, rows = steered(tmp_path, {4: [message]})
    assert rows == cockpit(tmp_path, total=10).run_sync(Walk())


def test_a_value_outside_the_range_is_cut_to_it():
    controls = Controls(CONTROLS)
    controls.ask("kl_coef", 7)
    assert controls.take() == {"kl_coef": (0.05, 1.0)} and controls.values["kl_coef"] == 1.0
    controls.ask("kl_coef", 1.0)
    assert controls.take() == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, asyncio.CancelledError])
@pytest.mark.parametrize("way", ["run", "run_sync"])
def test_an_end_by_exception_leaves_a_whole_log(tmp_path, error, way):
    walk, one = Walk(), cockpit(tmp_path)

    def step(controls):
        if len(walk.seen) == 3:
            raise error("in the middle")
        return walk(controls)

    with pytest.raises(error):
        asyncio.run(one.run(step)) if way == "run" else one.run_sync(step)
    assert [row["step"] for row in read_metrics(tmp_path / "ppo" / "metrics.jsonl")] == [1, 2, 3]
    assert one.session.state == ("failed" if error is RuntimeError else "interrupted")


def test_stop_iteration_ends_a_run_early(tmp_path):
    logged = iter([{"kl": 0.1}, {"kl": 0.2}])
    assert len(cockpit(tmp_path).run_sync(lambda controls: next(logged))) == 2
    logged = iter([{"kl": 0.1}, {"kl": 0.2}])
    assert len(asyncio.run(cockpit(tmp_path).run(lambda controls: next(logged)))) == 2


def test_a_run_that_goes_on_keeps_the_rows_and_the_controls_up_to_there(tmp_path):
    whole = steered(tmp_path, {2: [{"type": "set", "name": "kl_coef", "value": 0.3}]})[2]
    walk = Walk()
    for row in whole[:4]:
        walk(row["controls"])
    assert cockpit(tmp_path, total=10).run_sync(walk, start=4) == whole
    assert read_metrics(tmp_path / "ppo" / "metrics.jsonl") == whole
    assert len(cockpit(tmp_path, total=2).run_sync(Walk())) == 2, "a new run begins a new log"
    assert len(read_metrics(tmp_path / "ppo" / "metrics.jsonl")) == 2


def test_what_json_has_no_word_for_is_null_and_said(tmp_path):
    one = cockpit(tmp_path, total=1)
    one.run_sync(lambda controls: {"kl": math.nan})
    text = (tmp_path / "ppo" / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["kl"] is None
    assert one.session.note == "kl is nan at iteration 1"


def test_a_metric_that_is_no_number_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match=r"metric 'kl' is \[1\] \(list\), expected a number"):
        cockpit(tmp_path).run_sync(lambda controls: {"kl": [1]})


def test_a_chart_that_nothing_fills_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match=r"charts name \['kl'\], which the run did not report; it reported \['loss'\]"):
        cockpit(tmp_path).run_sync(lambda controls: {"loss": 1.0})


@pytest.mark.parametrize(
    "spec", [(0.0, 1.0), 0.5, (0.0, 1.0, 2.0), (1.0, 0.0, 0.5), (0, 1, math.nan), (-1, 1, 0, "log")]
)
def test_a_bad_control_is_refused_by_name(tmp_path, spec):
    with pytest.raises(ValueError, match=r"controls\['kl_coef'\]"):
        cockpit(tmp_path, controls={"kl_coef": spec})


@pytest.mark.parametrize("spec", [(0.0, 1.0, 0.05), (0.0, 1.0, 0.05, "log"), (1e-6, 1e-2, 3.3e-4, "log"), (0, 7, 7)])
def test_a_slider_reaches_both_ends_and_the_start(spec):
    control = Control.parse("x", spec)
    stops = control.stops()
    assert stops == sorted(set(stops)) and len(stops) > 60
    assert stops[0] == control.low and stops[-1] == control.high and control.start in stops


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="total is 0"):
        cockpit(tmp_path, total=0)
    with pytest.raises(ValueError, match="total is None"):
        cockpit(tmp_path, total=None).run_sync(Walk())
    with pytest.raises(ValueError, match="chart 'KL' has the metrics 'kl'"):
        TrainingCockpit("PPO", [("KL", "kl")], 3)
    with pytest.raises(ValueError, match="nothing to draw"):
        cockpit(tmp_path).picture()
    with pytest.raises(ValueError, match="no row with 'controls'"):
        cockpit(tmp_path, controls=None).run_sync(lambda controls: {"kl": 1.0})
        replay(tmp_path / "ppo" / "metrics.jsonl")


def test_without_a_front_end_the_run_says_a_line_and_shows_no_widget(tmp_path, capsys):
    assert not has_front_end()
    one = cockpit(tmp_path)
    one.run_sync(Walk())
    line = r"PPO: iteration 6 of 6, finished after \d+\.\d s \| kl 0\.8\n"
    assert re.fullmatch(line, capsys.readouterr().out)
    assert one.session.feed.panel is None


@pytest.mark.parametrize(("said", "kernel", "stdin", "there"), [
    ("", True, True, True), ("", True, False, False), ("", False, True, False),
    ("1", True, True, False), ("0", True, False, True), ("0", False, False, True),
])  # fmt: skip
def test_who_is_watching(monkeypatch, said, kernel, stdin, there):
    shell = SimpleNamespace(kernel=SimpleNamespace(_allow_stdin=stdin)) if kernel else None
    monkeypatch.setattr("alignkit_widgets.notebook._shell", lambda: shell)
    monkeypatch.setenv("ALIGNKIT_HEADLESS", said)
    assert has_front_end() == there


def test_the_picture_can_be_drawn_again_from_the_log(tmp_path):
    one, _, _ = steered(tmp_path, {4: [{"type": "set", "name": "kl_coef", "value": 0.1}]})
    for of in (one, cockpit(tmp_path)):
        png, metadata = of.picture()
        assert png.startswith(b"\x89PNG") and len(png) < 200_000
        assert "KL (nats)" in metadata["alt"] and metadata["width"] > 200


def test_a_picture_that_fails_does_not_cost_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(session_module, "in_kernel", lambda: True)
    monkeypatch.setattr("alignkit_widgets.cockpit.picture.draw_run", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="could not be drawn: ZeroDivisionError"):
        assert len(cockpit(tmp_path).run_sync(Walk())) == 6


def test_a_trainers_log_becomes_rows(tmp_path):
    one = cockpit(tmp_path, total=None, controls=None)
    callback, state = one.callback(), SimpleNamespace(max_steps=3, global_step=0)
    callback.on_train_begin(None, state, None)
    for state.global_step in (1, 2, 3):
        callback.on_log(None, state, None, logs={"kl": 1.0 * state.global_step, "text": "no number"})
    callback.on_log(None, state, None, logs={"train_runtime": 1.0})
    callback.on_train_end(None, state, None)
    assert one.rows == [{"step": i, "kl": 1.0 * i} for i in (1, 2, 3)] == read_metrics(one.log)
    assert one.session.status()["place"].startswith("step 3 of 3, finished")


@pytest.mark.slow
def test_a_notebook_without_a_front_end_keeps_a_picture_and_no_widget(tmp_path, monkeypatch):
    """As papermill and nbconvert run it; the environment does not say that nobody is there."""
    from nbclient import NotebookClient

    monkeypatch.delenv("ALIGNKIT_HEADLESS", raising=False)
    source = (
        "from alignkit_widgets import TrainingCockpit\n"
        "one = TrainingCockpit('PPO', [('KL (nats)', ['kl'])], 5, controls={'kl_coef': (0, 1, 0.1)}, log='m.jsonl')\n"
        "rows = await one.run(lambda controls: {'kl': controls['kl_coef'], 'samples': [('a?', '\\x1b[31mb')]})"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "widgets" not in notebook.metadata
    text, picture, samples = notebook.cells[0].outputs
    assert "iteration 5 of 5, finished" in text["text"]
    assert set(picture["data"]) == {"image/png", "text/plain"}
    assert "␛[31mb" in samples["text"]
    assert len(read_metrics(tmp_path / "m.jsonl")) == 5
