"""The failure museum: faults that change a run in one way, checks that are asked, and a record that agrees."""

import functools
import json
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from alignkit import ppo as training
from alignkit.configs import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from alignkit.evaluate.failures import FAILURE_CHECKS, FILE, GOLD, METHODS, SIDES, Check, StoredRun, load_failures
from alignkit.forward import sampling
from alignkit.plots import PPO_PANELS
from experiments import failures as maker
from experiments.sweep import Size as WorldSize
from experiments.sweep import write_compact

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "failures.ipynb"
TINY = maker.Size(
    world=WorldSize(demonstrations=1600, pairs=96, normalise=64, keys=1, sft=SFTConfig(epochs=2),
                    reward=RewardConfig(epochs=1, batch_size=32)),
    few=16, heldout=64, prompts=16, looks=(1.0,),
    ppo=PPOConfig(iterations=2, prompts_per_iteration=32, minibatch_size=16, kl_coef=0.35),
    dpo=DPOConfig(epochs=1, batch_size=32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("failures")


@pytest.fixture(scope="module")
def ground(folder):
    return maker.Ground(folder, TINY)


@pytest.fixture(scope="module")
def made(ground):
    """The record of a run by its name; each is made once."""
    fault, healthy = maker.run_fault, maker.run_healthy
    return functools.cache(lambda name: (fault if name in maker.FAULTS else healthy)(name, ground))


def said(run: dict) -> dict[str, str]:
    return {check["name"]: check["says"] for check in run["checks"]}


# ---- the experiment, in small
def test_a_wrong_reference_is_seen_before_the_first_step_and_goes_on_all_the_same(made):
    healthy, broken = made("healthy"), made("an untrained reference")
    assert not any(said(healthy)[name] for name in ("step 0", "each iteration", "reward ids", "max_kl", "not finite"))
    assert "log π − log π_ref" in said(broken)["step 0"]
    assert healthy["logs"]["objective/kl"][0] == 0 and broken["logs"]["objective/kl"][0] > 0.1
    assert healthy["logs"]["step"] == broken["logs"]["step"] == [1, 2]
    assert broken["exact"]["step"] == [0, 2]
    assert healthy["exact"]["kl"][0] == broken["exact"]["kl"][0] == 0  # exact KL is to SFT, whatever the reference


def test_dropout_and_a_top_k_sampler_are_seen_by_the_ratio(made):
    for name in ("dropout left on", "a top-k sampler"):
        assert "the ratio π / π_old is off" in said(made(name))["step 0"], name
    assert made("dropout left on")["logs"]["val/ratio_first"][0] != pytest.approx(1, abs=1e-4)


def test_dpo_does_not_ask_about_a_reference_that_was_given_and_asking_by_hand_tells(made):
    checks = made("a DPO reference that is not the start")["checks"]
    check = next(check for check in checks if check["name"] == "step 0")
    assert not check["made"] and check["iteration"] == 1 and "margin" in check["says"]
    healthy = made("healthy DPO")
    assert healthy["logs"]["loss"][0] == pytest.approx(np.log(2), abs=1e-3) and not said(healthy)["step 0"]


@pytest.mark.parametrize("name", maker.FAULTS)
def test_a_fault_changes_a_plan_in_one_way(ground, name):
    fault = maker.FAULTS[name]
    plan = {"ppo": maker.healthy_ppo, "dpo": maker.healthy_dpo}[fault.method](ground)
    broken = fault.breaks(plan, ground)
    changed = [each.name for each in fields(plan) if getattr(plan, each.name) != getattr(broken, each.name)]
    assert len(changed) == 1, changed
    if changed == ["config"]:
        assert sum(getattr(plan.config, each.name) != getattr(broken.config, each.name)
                   for each in fields(plan.config)) == 1
    assert fault.breaks.__doc__.endswith(".") and "\n" not in fault.breaks.__doc__


def test_what_a_fault_replaces_in_the_code_is_put_back(ground):
    before = training.policy_loss, sampling._inverse_cdf, training.check_sampler
    for breaks in (maker.wrong_sign, maker.top_k):
        plan = breaks(maker.healthy_ppo(ground), ground)
        with plan.around():
            assert (training.policy_loss, sampling._inverse_cdf, training.check_sampler) != before
        assert (training.policy_loss, sampling._inverse_cdf, training.check_sampler) == before


def test_an_alarm_is_what_is_not_also_said_of_the_healthy_run():
    def advised_of(*sentences):
        return {"checks": [{"name": "advice", "iteration": 20, "says": "\n".join(sentences), "made": True},
                           {"name": "step 0", "iteration": 1, "says": "step 0: off", "made": True}]}

    risky, collapsed = "Risky failures are still 13% in x.", "Entropy fell from 2.00 to 0.10 nats per token."
    healthy = advised_of("Risky failures are still 40% in y.")
    advised, invariant = maker.alarms(advised_of(risky, collapsed), healthy)["checks"]
    assert advised["says"] == collapsed and advised["iteration"] == 20
    assert invariant["says"] == "step 0: off" and invariant["iteration"] == 1  # an invariant is an alarm in any case
    silent, _ = maker.alarms(advised_of(risky), advised_of(risky))["checks"]
    assert silent["says"] == "" and silent["iteration"] is None


def test_the_experiment_writes_a_record_that_loads_and_makes_nothing_twice(folder, made, tmp_path, monkeypatch):
    names = ["a top-k sampler", "a DPO reference that is not the start"]
    monkeypatch.setattr(maker, "run_fault", lambda name, ground: made(name))
    monkeypatch.setattr(maker, "run_healthy", lambda name, ground: made(name.partition(",")[0]))  # one seed is enough
    record = maker.run(folder, TINY, names)
    write_compact(tmp_path / "failures.json", record)
    museum = load_failures(tmp_path / "failures.json")
    assert [run.name for run in museum.broken] == names and len(museum.refusals) == len(maker.REFUSED)
    assert museum["K"].rows[0].keys() == museum.healthy()[0].rows[0].keys() >= {"step", "objective/kl"}
    for start in ("run_fault", "run_healthy"):
        monkeypatch.setattr(maker, start, lambda *arguments: pytest.fail("made again"))
    assert maker.run(folder, TINY, names)["runs"] == record["runs"]


def test_what_is_refused_now_is_what_the_record_says(ground):
    stored = {each.fault: each for each in load_failures().refusals}
    for start in maker.REFUSED:
        now = maker.refuse(start, ground)
        was = stored[now["fault"]]
        assert now["error"] == was.error
        assert re.sub(r"\d+|'.*'", "", now["says"]) == re.sub(r"\d+|'.*'", "", was.says)
    with pytest.raises(AssertionError, match="not refused"):
        maker.refuse(maker.healthy_ppo, ground)


# ---- the loader
def test_the_loader_says_what_is_missing_and_what_is_unknown(tmp_path):
    with pytest.raises(FileNotFoundError, match="experiments.failures"):
        load_failures(tmp_path / "none.json")
    museum = load_failures()
    with pytest.raises(KeyError, match="'Z'.*A, B"):
        museum["Z"]
    with pytest.raises(KeyError):
        museum[""]
    with pytest.raises(ValueError, match="method is 'sft'"):
        museum.healthy("sft")
    with pytest.raises(ValueError, match="statistic is 'luck'.*objective/kl.*gold"):
        museum["A"].late("luck")
    assert museum["A"] is museum[museum["A"].name]


def test_what_caught_a_run_is_in_order_and_leaves_out_gold_and_what_is_not_made():
    checks = (Check("advice", 20, "b"), Check("step 0", 1, "a", made=False), Check("max_kl", 3, "c"),
              Check("not finite", None, ""), Check(GOLD, 20, "d"))
    logs, exact = {"step": [1, 2], "loss": [3, 4]}, {"step": [0], "kl": [0]}
    run = StoredRun("x", "X", "Broken.", "ppo", "", "", logs, exact, checks)
    assert [check.name for check in run.caught] == ["max_kl", "advice"]
    assert run.rows == [{"step": 1, "loss": 3}, {"step": 2, "loss": 4}] and run.exact_rows == [{"step": 0, "kl": 0}]
    assert run.check("step 0").says == "a" and run.check("advice").made and run.check("reward ids") is None
    assert run.late("kl") == 0 and run.late("loss") == 3.5 and run.late("loss", last=1) == 4


# ---- the record
@pytest.fixture(scope="module")
def museum():
    return load_failures()


def test_the_record_is_whole_and_small(museum):
    assert FILE.stat().st_size < 150_000 and museum.cpu_seconds < 360
    assert {run.name: (run.letter, run.fault, run.method, run.statistic, run.side) for run in museum.broken} == {
        name: (fault.letter, fault.breaks.__doc__, fault.method, fault.statistic, fault.side)
        for name, fault in maker.FAULTS.items()}
    assert [run.name for method in METHODS for run in museum.healthy(method)] == list(maker.HEALTHY)
    letters = [run.letter for run in museum.broken]
    assert letters == [chr(ord("A") + place) for place in range(len(letters))] and len(letters) >= 10
    assert museum.settings == maker.Size().key()
    assert [each.fault for each in museum.refusals] == [start.__doc__ for start in maker.REFUSED]
    for run in museum.runs:
        assert {check.name for check in run.checks} <= FAILURE_CHECKS.keys()
        assert set(METHODS) >= {run.method} and {len(values) for values in run.logs.values()} == {len(run.rows)}
        assert run.exact["kl"][0] == 0 and run.exact["gold"][0] == pytest.approx(0, abs=1e-3)
        if run.method == "ppo":
            assert set(run.logs) > {name for names in PPO_PANELS.values() for name in np.atleast_1d(names)}


def test_the_checks_are_silent_in_every_healthy_run(museum):
    for method in METHODS:
        for run in museum.healthy(method):
            assert not [check for check in run.checks if check.says and check.name != GOLD], run.name


def test_every_broken_run_differs_from_all_healthy_ones_in_the_statistic_that_its_room_names(museum):
    for run in museum.broken:
        assert run.side in SIDES
        healthy = [each.late(run.statistic) for each in museum.healthy(run.method)]
        spread, late = max(healthy) - min(healthy), run.late(run.statistic)
        beyond = late - max(healthy) if run.side == "above" else min(healthy) - late
        assert beyond > spread, (run.letter, run.statistic, late, healthy)


def test_some_faults_are_caught_at_once_and_some_by_nothing(museum):
    assert museum["an untrained reference"].caught[0].name == "step 0"
    assert museum["labels of a coin"].caught[0].iteration == 0
    assert any(not run.caught for run in museum.broken)
    assert len({run.caught[0].name for run in museum.broken if run.caught}) >= 3


# ---- the notebook
def test_the_notebook_has_a_room_for_each_stored_run_and_the_answer_is_the_stored_fault(museum):
    cells = {cell["id"]: "".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]}
    rooms = [name for name in cells if name.startswith("room-")]
    assert rooms == [f"room-{run.letter.lower()}" for run in museum.broken]
    for run in museum.broken:
        room, answer = cells[f"room-{run.letter.lower()}"], cells[f"answer-{run.letter.lower()}"]
        options = re.findall(r"^(\d)\. (.+)$", room, re.MULTILINE)
        assert len(options) >= 3 and "Diagnose it" in room and run.name not in room
        assert answer.startswith("<details><summary>Answer</summary>") and answer.endswith("</details>")
        assert f"**{run.fault}**" in answer and re.search(r"^([1-4])\. ", answer, re.MULTILINE)[1] in dict(options)
        assert f'charts("{run.letter}")' in cells[f"charts-{run.letter.lower()}"]
        assert f'caught("{run.letter}")' in cells[f"caught-{run.letter.lower()}"]


def test_the_dashed_lines_of_a_chart_say_what_they_are(museum):
    from alignkit.plots import plot_metrics

    figure = plot_metrics(museum["A"].rows, ["objective/kl"], branches=[museum.healthy()[0].rows],
                          branch="the healthy run")
    assert any("the healthy run" in text.get_text() for text in figure.texts)
