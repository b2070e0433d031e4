"""The benchmark of steps runs, and both sides of each of its rows compute the same thing. No time is asserted."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.steps import __main__ as steps
from benchmarks.steps import bare, measure, ours, tables
from benchmarks.steps.costs import costs
from benchmarks.steps.work import QUICK, Different, Sizes, Work

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """What `--quick` wrote, and the thread count before and after."""
    file = tmp_path_factory.mktemp("benchmark") / "new" / "steps.json"
    before = torch.get_num_threads()
    steps.main(["--quick", "--growth", "--json", str(file), "--threads", "1", "--rounds", "1"])
    return json.loads(file.read_text()), (before, torch.get_num_threads())


def test_every_row_has_its_sides_with_times_rates_memory_and_ratios(quick):
    results, _ = quick
    assert [row["name"] for row in results["rows"]] == list(tables.ROWS)
    for row in results["rows"]:
        expected = {"alignkit", "bare"} if row["name"] in tables.PPO_PARTS else {"alignkit", "bare", "trl"}
        if row["name"] in tables.PPO_PARTS or (
            row["name"].startswith("dpo") and results["best"]["precision"] == "bf16"
        ):
            expected |= {"best"}
            assert set(row["best_ratios"]) == expected - {"best"}
        assert set(row["sides"]) == expected and set(row["ratios"]) == expected - {"alignkit"}
        assert row["flops"] > 0 and row["bytes"] > 0 and row["limit_seconds"] > 0 and row["tokens"] > 0
        for side in row["sides"].values():
            assert len(side["seconds"]) == results["rounds"]
            assert 0 < side["min"] <= side["median"] <= side["max"]
            assert side["tokens_per_second"] == pytest.approx(row["tokens"] / side["median"])
            assert side["share_of_limit"] == pytest.approx(side["limit_seconds"] / side["median"])
            assert side["peak_mb"] is None or side["peak_mb"] >= 0
        for side, ratio in row["ratios"].items():
            pairs = zip(row["sides"][side]["seconds"], row["sides"]["alignkit"]["seconds"], strict=True)
            assert ratio["min"] == pytest.approx(min(theirs / mine for theirs, mine in pairs))


def test_the_best_settings_are_rows_of_their_own_and_cheaper_by_the_critic(quick):
    results, _ = quick
    rows = {row["name"]: row for row in results["rows"]}
    assert rows["update"]["sides"]["best"]["limit_seconds"] < rows["update"]["limit_seconds"]
    made = tables.table(results)
    assert "| PPO: update, best settings |" in made and "| PPO: whole iteration, best settings |" in made
    for side, ratio in rows["iteration"]["best_ratios"].items():
        pairs = zip(*(rows["iteration"]["sides"][name]["seconds"] for name in (side, "best")), strict=True)
        assert ratio["max"] == pytest.approx(max(theirs / mine for theirs, mine in pairs))


def test_a_shared_trunk_saves_the_critic_s_products_and_nothing_of_the_policy_s():
    work = Work(QUICK)
    apart, shared = costs(work), costs(work, shared_trunk=True)
    for name in ("update", "scoring"):
        assert shared[name].phases[0][0] < apart[name].phases[0][0]
    for name in ("rollout", "dpo", "sft", "reward"):
        assert shared[name] == apart[name]
    ratio = apart["update"].phases[0][0] / shared["update"].phases[0][0]
    assert 1.5 < ratio < 2  # the head, which only the policy has, is not saved


def test_growth_is_measured_one_size_at_a_time(quick):
    results, _ = quick
    assert [(row["changed"], row["value"]) for row in results["growth"]] == [
        (None, None), ("prompts", 2), ("new_tokens", 3)]
    assert all(row["iteration"] > 0 and row["dpo"] > 0 and row["parameters"] > 0 for row in results["growth"])
    assert "| prompts: 2 |" in tables.table(results) and "| new tokens: 3 |" in tables.table(results)
    assert all(hasattr(Sizes(), name) for name in measure.GROWTH)


def test_the_machine_and_what_was_not_measured_are_told(quick):
    results, _ = quick
    assert results["machine"]["threads"] == 1 and results["machine"]["matmul_flops_per_second"] > 0
    assert results["machine"]["bytes_per_second"] > 0 and len(results["machine"]["load_before"]) == 3
    assert {"python", "torch", "transformers", "trl"} <= set(results["versions"])
    assert "TRL PPO" in results["not_measured"]
    assert "Not measured: TRL PPO" in tables.table(results)


@pytest.mark.parametrize(("file", "threads"), [("steps.json", 1), ("steps-2-threads.json", 2)])
def test_the_page_about_speed_has_the_tables_of_the_recorded_results(file, threads):
    page, results = (ROOT / "docs/speed.md").read_text(), json.loads((ROOT / "benchmarks/results" / file).read_text())
    assert f"<!-- {file} -->\n{tables.table(results)}\n<!-- end -->" in page
    assert results["sizes"] == vars(Sizes()) and results["rounds"] >= 8
    assert results["machine"]["threads"] == threads


def test_a_table_is_put_between_the_marks_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    other = "<!-- other.json -->\nanother\n<!-- end -->\n"
    page.write_text(f"# Speed\n{other}<!-- steps.json -->\nold\ntable\n<!-- end -->\nafter\n{other}")
    for made in ("| a | b |", "| c |"):
        tables.write_page(page, "steps.json", made)
        assert page.read_text() == f"# Speed\n{other}<!-- steps.json -->\n{made}\n<!-- end -->\nafter\n{other}"
    page.write_text("# Speed\n")
    with pytest.raises(ValueError, match="expected <!-- steps.json -->"):
        tables.write_page(page, "steps.json", "| a |")


def test_trl_s_ppo_must_do_the_same_work():
    rounds = [(16, 16, 10.0, 10.5), (16, 16, 10.0, 11.5)]
    assert measure._same_ppo(Sizes(), rounds) == pytest.approx({"steps": 16, "kl": 10.0, "kl_trl": 11.0})
    for wrong in ([(16, 4, 10.0, 10.0)], [(16, 16, 10.0, 14.0)]):
        with pytest.raises(Different, match="optimiser steps|KL"):
            measure._same_ppo(Sizes(), wrong)


def test_the_thread_count_is_left_as_it_was(quick):
    _, (before, after) = quick
    assert before == after


def test_both_sides_of_each_row_compute_the_same_thing(quick):
    results, _ = quick
    compared = {(check["job"], side) for check in results["checks"] for side in check["sides"]}
    assert compared >= {
        ("rollout", "bare"),
        ("scoring", "bare"),
        ("update", "bare"),
        *((job, side) for job in ("dpo", "dpo_precomputed", "sft", "reward") for side in ("bare", "trl")),
    }
    for check in results["checks"]:
        assert check["difference"] <= 1e-4, check


def test_sides_that_compute_something_else_are_no_benchmark(monkeypatch):
    """A baseline that scores other rows than it was given is noticed."""
    work = Work(QUICK)
    score = bare.BarePPO.score
    monkeypatch.setattr(bare.BarePPO, "score", lambda self, tokens: score(self, tokens.roll(1, 0)))
    monkeypatch.setattr(measure, "sides", lambda work: {})  # PPO alone, to be quick
    with pytest.raises(Different, match="rollout|scoring|update"):
        measure.compare(work)


def test_the_reference_matters_to_the_dpo_loss_that_is_compared():
    """With the policy itself as reference the loss is ln 2; with the other one it is not."""
    work = Work(QUICK)
    own = copy.copy(work)
    own.ref = work.policy
    for side in (ours.AlignkitDPO, bare.BareDPO):
        assert abs(side(own, True).step() - math.log(2)) < 1e-6
        assert abs(side(work, True).step() - math.log(2)) > 1e-3


def test_every_response_has_full_length_and_no_special_token():
    work = Work(QUICK)
    side = ours.AlignkitPPO(work)
    side()
    rollout = side.state.last_rollout
    assert rollout.response_mask.all() and rollout.response_ids.shape[1] == work.sizes.new_tokens
    assert not torch.isin(rollout.response_ids, torch.tensor(work.tokenizer.all_special_ids)).any()
    assert torch.equal(rollout.prompt_ids, bare.BarePPO(work).ids)  # the same prompts on both sides


def test_the_work_is_as_the_docs_say():
    """The full model has 0.92 M parameters; a decoded token costs 2 FLOPs a weight; DPO's reference adds 2 to 6."""
    sizes = Sizes(prompts=4, pairs=2)
    work = Work(sizes)
    parameters = sum(parameter.numel() for parameter in work.policy.parameters())
    assert parameters == pytest.approx(0.923e6, rel=1e-3)
    cost = costs(work)
    assert (
        len(cost["rollout"].phases) == sizes.new_tokens
        and cost["rollout"].phases[1][0] == 2 * parameters * sizes.prompts
    )
    assert cost["dpo"].phases[0][0] / cost["dpo_precomputed"].phases[0][0] == pytest.approx(8 / 6)
    lengths = [prompt.count(" w") for prompt in work.prompts]
    assert max(lengths) == sizes.prompt_tokens and len(set(lengths)) > 1  # ragged
    whole = sum(lengths) + sizes.prompts * sizes.new_tokens
    assert cost["update"].tokens == sizes.epochs * whole
    assert cost["iteration"].limit(1e12, 1e12) == pytest.approx(
        sum(cost[part].limit(1e12, 1e12) for part in ("rollout", "scoring", "update"))
    )
    assert cost["rollout"].limit(math.inf, 1e12) == pytest.approx(
        sum(moved for _, moved in cost["rollout"].phases) / 1e12
    )


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--threads", "0"]])
def test_senseless_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        steps.main(["--quick", *arguments])
    assert f"{arguments[0]} is 0, expected at least 1" in capsys.readouterr().err
