"""The time to quality: when a course reaches a level, what is tried together, the page, and a run of the tiny size."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from alignkit.desk.tiny import desk_tokenizer, tiny_reward_model
from alignkit.desk.world import World as DeskWorld
from alignkit.reward import RewardScorer
from benchmarks.quality import __main__ as quality
from benchmarks.quality import page, race, rules, trl_ppo
from benchmarks.quality.reached import Reached, ratio, reached, soonest
from benchmarks.steps.work import Different

ROOT = Path(__file__).resolve().parents[1]


def course(share, kl=None, seconds=2.0):
    """Points of a run that was measured every two seconds of CPU time, three of wall time and 100 samples."""
    at = np.arange(len(share), dtype=float)
    return {"cpu": (seconds * at).tolist(), "wall": (1.5 * seconds * at).tolist(), "samples": (100 * at).tolist(),
            "kl": [1.0] * len(share) if kl is None else kl, "share": list(share), "gold": list(share)}


# ---- when a level is reached
@pytest.mark.parametrize("rate, level", [(0.2, 0.95), (0.5, 0.9), (1.3, 0.5), (0.05, 0.2)])
def test_a_course_that_is_known_everywhere_is_reached_where_its_formula_says(rate, level):
    """1 − e^{−rate t}, measured finely: the level is passed at t = −ln(1 − level) / rate."""
    times = np.linspace(0, -2 * math.log(1 - level) / rate, 4001)
    points = course(1 - np.exp(-rate * times), seconds=times[1])
    found = reached(points, "share", level)
    expected = -math.log(1 - level) / rate
    assert not found.censored and found.cpu == pytest.approx(expected, rel=1e-5)
    assert found.wall == pytest.approx(1.5 * expected, rel=1e-5)
    assert found.samples == pytest.approx(100 * expected / times[1], rel=1e-5)


def test_between_two_measurements_everything_is_linear_and_the_first_crossing_counts():
    assert reached(course([0.0, 0.4, 0.9, 0.3, 0.9]), "share", 0.5) == Reached(2.4, pytest.approx(3.6), 120.0, False)
    assert reached(course([0.0, 0.5, 0.9]), "share", 0.5).cpu == 2.0, "at the level is reached"
    assert reached(course([0.7, 0.8]), "share", 0.5).cpu == 0.0, "it was there before training"


def test_a_kl_that_is_too_large_does_not_count_and_the_return_below_it_does():
    share = [0.0, 0.96, 0.97, 0.98]
    found = reached(course(share, kl=[0.0, 2.1, 2.5, 1.9]), "share", 0.95, most_kl=2.0)
    assert found.cpu == 6.0 and not found.censored
    assert reached(course(share, kl=[0.0, 2.1, 2.5, 2.01]), "share", 0.95, most_kl=2.0).censored
    assert reached(course(share, kl=[0.0, 2.0, 2.5, 1.9]), "share", 0.95, most_kl=2.0).cpu < 2.0


def test_a_run_that_ended_first_is_censored_at_all_it_took():
    assert reached(course([0.0, 0.4, 0.949]), "share", 0.95) == Reached(4.0, 6.0, 200.0, True)
    with pytest.raises(ValueError, match="expected one length"):
        reached(course([0.0, 1.0]) | {"kl": [0.0]}, "share", 0.5)


# ---- comparing
def run(cpu, censored=False):
    return Reached(cpu, 2 * cpu, 10 * cpu, censored)


def test_the_ratio_is_the_geometric_mean_with_student_s_interval_of_the_log():
    found = ratio([run(2.0), run(8.0), run(4.0)], [run(1.0), run(1.0), run(1.0)])
    assert found.value == pytest.approx(4.0) and found.each == (2.0, 8.0, 4.0) and found.bound == ""
    half = 4.30265 * math.log(2) / math.sqrt(3)  # t for 2 degrees of freedom; the logs' sd is ln 2
    assert (found.low, found.high) == (pytest.approx(4 * math.exp(-half)), pytest.approx(4 * math.exp(half)))
    assert ratio([run(3.0)] * 2, [run(2.0), run(4.0)], "samples").each == (1.5, 0.75)
    with pytest.raises(ValueError, match="expected one number of runs"):
        ratio([run(1.0)], [])


@pytest.mark.parametrize("theirs, ours, bound", [(False, False, ""), (True, False, "at least"),
                                                 (False, True, "at most"), (True, True, "unknown")])
def test_runs_that_ended_first_make_the_ratio_a_bound(theirs, ours, bound):
    found = ratio([run(2.0), run(4.0, theirs)], [run(1.0, ours), run(2.0)])
    assert found.bound == bound and page.shown(found).startswith(bound or "2.00")


@pytest.mark.parametrize("each, censored, expected", [
    ((3.2, 3.3, 3.25), False, "reached"), ((1.5, 1.6, 1.55), False, "missed"), ((2.0, 5.0, 3.0), False, "open"),
    ((1.5, 1.6, 1.55), True, "open"), ((3.2, 3.3, 3.25), True, "reached")])
def test_the_verdict_reads_the_interval_and_a_lower_bound_is_not_a_miss(each, censored, expected):
    found = ratio([run(value, censored) for value in each], [run(1.0)] * len(each))
    assert page.verdict(found).startswith(f"**{expected}**")


def test_the_soonest_reached_the_level_on_most_seeds_first():
    assert soonest({"fast once": [run(1.0), run(1.0, True)], "slow": [run(9.0), run(9.0)]}) == "slow"
    assert soonest({"uneven": [run(1.0), run(9.0)], "even": [run(4.0), run(4.0)]}) == "uneven"


# ---- rules
def test_every_change_is_a_setting_that_ppo_takes_and_differs():
    for setting in rules.TRIES.values():
        config = setting.config(7)
        assert config.seed == 7 and config.kl_coef == rules.PRICE
        assert config.critic_learning_rate == 2 * config.learning_rate
        for name, fields in [row for group in rules.changes(setting).values() for row in group.items()]:
            made = asdict(setting.config(0, **fields))
            assert all(made[field] != asdict(setting.config(0))[field] for field in fields), name
            if {"prompts_per_iteration", "iterations"} <= fields.keys():
                samples = made["prompts_per_iteration"] * made["iterations"]
                assert samples == setting.prompts * setting.iterations, "a batch of another size, as many samples"


def test_of_each_group_the_best_is_joined_most_first_and_factors_of_one_field_multiply():
    setting = rules.Setting(iterations=20)
    ratios = {"twice the rate": 1.2, "half the iterations": 1.4, "shared trunk": 1.5, "half the epochs": 1.04,
              "half the prompts, twice the iterations": 1.1}
    joined = rules.together(setting, rules.changes(setting), ratios)
    assert list(joined) == ["shared trunk; half the iterations",
                            "shared trunk; half the iterations; half the prompts, twice the iterations"]
    assert list(joined.values()) == [
        {"shared_trunk": True, "iterations": 10},
        {"shared_trunk": True, "iterations": 20, "prompts_per_iteration": 256}]
    assert rules.together(setting, rules.changes(setting), {"shared trunk": 1.5}) == {}


# ---- races
class Pretended:
    """A run whose policy is its number of iterations, and a second of CPU time an iteration."""

    def __init__(self, iterations, order):
        self.iterations, self.made, self.order, self.closed = iterations, 0, order, False
        self.samples, self.said = 10, {"steps": 3}

    def __call__(self):
        self.made += 1
        self.order.append(self)
        return {"cpu": 1.0, "wall": 2.0}

    def weights(self):
        return self.made

    def close(self):
        self.closed = True


class World:
    seed, gold_best = 0, 1.0

    def measure(self, policy):
        return {"kl": 1.0, "share": 0.2 * policy, "gold": 0.16 * policy}


def test_runs_alternate_and_stop_once_both_levels_are_reached_or_at_their_end():
    order = []
    runs = {"long": Pretended(20, order), "short": Pretended(3, order)}
    points = race.race(World(), runs, every=2)
    assert order[:6] == [runs["long"], runs["short"]] * 3 and all(one.closed for one in runs.values())
    assert points["short"]["cpu"] == [0, 2, 3] and points["short"]["wall"] == [0, 4, 6], "its end is measured"
    assert points["long"]["samples"] == [0, 20, 40, 60] and runs["long"].made == 6, "gold is above 0.9"
    found = race.both(points["long"], 1.0)
    assert found["proxy"].cpu == pytest.approx(4.75) and found["gold"].cpu == pytest.approx(5.625)


def test_proxy_counts_up_to_two_nats_only_and_gold_at_any_kl():
    points = course([0.0, 0.96, 0.97], kl=[0.0, 2.1, 2.2])
    assert race.both(points, 1.0)["proxy"].censored and not race.both(points, 1.0)["gold"].censored


def test_a_run_that_is_late_is_ended_and_censored_at_what_it_took():
    order = []
    runs = {"no change": Pretended(4, order), "slow": Pretended(20, order)}
    runs["slow"].weights = lambda: 0
    points = race.race(World(), runs, every=2, late=1.5)
    assert points["slow"]["cpu"] == [0, 2, 4, 6] and runs["slow"].closed
    assert race.both(points["slow"], 1.0)["gold"] == Reached(6.0, 12.0, 60.0, True)


# ---- TRL's side
def read_row_by_row(model, ids, pad_token_id, context_length):
    """What TRL's `get_reward` gives: the score at the last token, each row read by itself, without padding."""
    rows = [row[row != pad_token_id] for row in ids]
    final = [model.score(model.base_model(input_ids=row[None]).last_hidden_state)[0, -1, 0] for row in rows]
    return None, torch.stack(final), [len(row) - 1 for row in rows]


def test_trl_reads_the_reward_that_alignkit_reads_also_of_a_response_without_room_for_eos():
    tokenizer = desk_tokenizer()
    prompts = [prompt.text for prompt in DeskWorld(0).train_prompts]
    scorer = RewardScorer(tiny_reward_model(tokenizer), tokenizer, mean=0.3, std=0.5)
    assert trl_ppo.check_rewards(trl_ppo.scores(read_row_by_row, scorer), scorer, prompts) < 1e-5
    plain = RewardScorer(scorer.model, tokenizer)  # mean 0, sd 1: the two differ by the missing EOS alone
    with pytest.raises(Different, match="differ by"):
        trl_ppo.check_rewards(read_row_by_row, plain, prompts)
    ids = torch.tensor([tokenizer(prompts[0])["input_ids"] + [tokenizer.eos_token_id]])
    other = tiny_reward_model(tokenizer, seed=1)
    theirs = trl_ppo.scores(read_row_by_row, scorer)(other, ids, tokenizer.pad_token_id, 6)[1]
    assert torch.equal(theirs, read_row_by_row(other, ids, tokenizer.pad_token_id, 6)[1]), "TRL reads other models"


# ---- the record and the page
def test_the_page_says_what_the_record_says():
    record = page.load(ROOT / quality.RECORD)
    assert (ROOT / quality.PAGE).read_text() == page.text(record)
    assert len(record["evaluation"]) >= 5 and not {row["seed"] for row in record["evaluation"]} & {
        row["seed"] for row in record["tuning"] + record["varied"]}
    assert (ROOT / quality.PICTURE).exists()
    assert record["rules"]["share"] == rules.SHARE and record["rules"]["most_kl"] == rules.MOST_KL
    assert record["tries"] == {name: asdict(setting) for name, setting in rules.TRIES.items()}


def test_the_quick_setting_runs_alignkit_end_to_end(tmp_path, capsys):
    record = quality.main(["--quick", "--runs", str(tmp_path)])
    assert "| alignkit, changed |" in capsys.readouterr().out
    assert record["chosen"] == {"alignkit": "tiny"} and [row["seed"] for row in record["evaluation"]] == [0]
    for row in record["evaluation"]:
        points = row["runs"]["alignkit"]
        assert len(points["cpu"]) == 3 and 0 < points["cpu"][1] < points["cpu"][2] and points["steps"] == 4
        assert points["samples"] == [0, 32, 64] and points["kl"][-1] > 0
    json.dumps(record)
    with pytest.raises(SystemExit):
        quality.main(["--quick", "--record"])
