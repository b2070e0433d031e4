"""The dials: runs that differ in one setting, statistics worked by hand, and a record that agrees with its rules."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from alignkit.configs import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from alignkit.dpo import dpo
from alignkit.evaluate import dials
from alignkit.exact import response_space
from alignkit.formulas.intervals import mean_estimate
from alignkit.forward.reading import response_logps
from alignkit.ppo import PPOState, ppo
from alignkit.storage import plain
from experiments.claims import arms
from experiments.claims.lab import DOCS
from experiments.dials import __main__ as command
from experiments.dials import rules, runs
from experiments.dials.page import page
from experiments.sweep import strata, write_compact

TINY = arms.Size(demonstrations=400, labels=256, fresh=64, normalise=64, keys=1, sft=SFTConfig(epochs=1),
                 reward=RewardConfig(epochs=1),
                 ppo=PPOConfig(prompts_per_iteration=32, minibatch_size=16, kl_coef=0.35),
                 dpo=DPOConfig(beta=0.3, batch_size=64, epochs=1))
PLAN = runs.Plan(betas=(0.1, 0.5), prices=(0.35,), trainings=2, blocks=2, epochs=(1, 2), labels=(64, 128),
                 few_betas=(0.1,), relay_blocks=1)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return runs.Bench(arms.Ground(5, tmp_path_factory.mktemp("dials"), TINY), PLAN)


def weights(policy):
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


# ---- one setting at a time
def test_a_recorded_run_of_dpo_is_alignkit_s_dpo_measured_response_by_response(bench):
    record = runs.part_beta(bench)
    row = record["runs"][0]
    assert [run["beta"] for run in record["runs"]] == [0.1, 0.5] and len(record["trainings"]) == 2
    ground, policy = bench.ground, bench.ground.policy()
    config = replace(TINY.dpo, beta=0.1, seed=ground.seed)
    steps = list(dpo(policy, ground.tokenizer, ground.pairs, config))
    assert row["loss"] == pytest.approx(np.mean([step.loss for step in steps]))
    logps, ref_logps = (table.double().numpy() for table in (ground.truth.enumerate(policy), ground.truth.ref_logps))
    gold = ground.truth.gold.double().numpy()
    kl = [sum(math.exp(a) * (a - b) for a, b in zip(*rows, strict=True)) for rows in zip(logps, ref_logps, strict=True)]
    assert row["kl"] == pytest.approx(np.mean(kl), abs=1e-5)
    assert row["gold"] == pytest.approx(np.mean([np.exp(a) @ b for a, b in zip(logps, gold, strict=True)]), abs=1e-5)
    assert row["kl"] > 0.001 and record["runs"][1]["kl"] != row["kl"]


def test_dpo_that_is_followed_passes_through_the_same_pairs_again(bench):
    rows = runs.part_steps(bench)["rows"]
    policy, config = bench.ground.policy(), replace(TINY.dpo, beta=0.5, epochs=2, seed=5)
    losses = [step.loss for step in dpo(policy, bench.ground.tokenizer, bench.ground.pairs, config)]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert [row["loss"] for row in rows] == pytest.approx([np.mean(losses[:4]), np.mean(losses[4:])])


def test_without_its_rejected_term_switched_off_it_is_dpo(bench):
    one, other = bench.ground.policy(), bench.ground.policy()
    config = replace(runs.dpo_config(bench.ground, 0.5, epochs=2), warmup=0.5)
    runs.one_sided(one, bench.pairs, config, rejected="trained")
    list(runs.dpo_run(other, bench.pairs, config))
    assert torch.allclose(weights(one), weights(other), atol=1e-6)


@pytest.mark.parametrize("rejected", ["trained", "weighs", "ignored"])
def test_the_gradient_without_the_rejected_term_is_that_of_a_loop_over_pairs(bench, rejected):
    policy, beta, batch = bench.ground.policy(), 0.7, bench.pairs[torch.arange(6)]
    with torch.no_grad():  # away from SFT, so that the weights of the pairs differ
        for p in policy.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    runs.one_sided_loss(policy, batch, beta, rejected).backward()
    found = torch.cat([p.grad.flatten() for p in policy.parameters()])

    def gradient(side, row):
        policy.zero_grad()
        logp = response_logps(policy, side[[row]]).sum()
        logp.backward()
        return float(logp.detach()), torch.cat([p.grad.flatten() for p in policy.parameters()])

    total, tokens = torch.zeros_like(found), int(batch.chosen.response_mask.sum())
    for row in range(len(batch)):
        (chosen, up), (other, down) = gradient(batch.chosen, row), gradient(batch.rejected, row)
        margin = beta * (chosen - float(batch.ref_chosen_logps[row]) - other + float(batch.ref_rejected_logps[row]))
        weight = beta / (1 + math.exp(margin)) / len(batch)
        total -= up / tokens if rejected == "ignored" else weight * (up - down * (rejected == "trained"))
    assert torch.allclose(found, total, atol=1e-5) and total.norm() > 0.01


def test_the_promised_distance_is_that_of_the_tilted_policy_with_raw_scores(bench):
    ground, beta = bench.ground, 0.05  # small, because the reward model has hardly been trained
    truth = copy.copy(ground.truth)
    truth.ref_logps, truth.proxy, truth.gold = (table[:1] for table in (truth.ref_logps, truth.proxy, truth.gold))
    row, = runs.promised(SimpleNamespace(truth=truth, judges=ground.judges), [beta])
    texts = response_space().texts()
    raw = ground.judges["all"].raw([truth.prompts[0].text] * len(texts), texts).double().numpy()
    reference = truth.ref_logps[0].double().numpy()
    tilted = reference + raw / beta
    tilted -= np.log(np.exp(tilted - tilted.max()).sum()) + tilted.max()
    assert row["kl"] == pytest.approx(float(np.exp(tilted) @ (tilted - reference)), rel=1e-3) and row["kl"] > 0.01
    assert row["gold"] == pytest.approx(float(np.exp(tilted) @ truth.gold[0].double().numpy()), abs=1e-3)


# ---- PPO's reference
@pytest.mark.parametrize(("anchor", "expected"), [("fixed", 1.0), ("average", 2.0), ("moving", 3.0)])
def test_a_reference_stays_follows_or_goes_halfway(anchor, expected):
    reference, policy = (torch.nn.Linear(2, 2) for _ in range(2))
    for model, value in ((reference, 1.0), (policy, 3.0)):
        for p in model.parameters():
            torch.nn.init.constant_(p, value)
    runs.move_reference(reference, policy, anchor)
    assert weights(reference).tolist() == [expected] * 6 and weights(policy).tolist() == [3.0] * 6


def test_ppo_with_a_fixed_reference_is_alignkit_s_and_its_figures_are_late_means(bench):
    ground, policy = bench.ground, bench.ground.policy()
    run = runs.ppo_run(bench, 0.35, policy=policy)
    plain, config = ground.policy(), replace(TINY.ppo, seed=5, iterations=4, kl_coef=0.35)
    state = PPOState.start(plain, ground.tokenizer, ground.judges["all"], strata(ground.task), config)
    list(ppo(state, config))
    assert torch.equal(weights(policy), weights(plain))
    assert [point["block"] for point in run["path"]] == [1, 2]
    assert run["end"]["gold"] == pytest.approx(np.mean([point["gold"] for point in run["path"]]))
    assert run["path"][-1]["kl"] == pytest.approx(bench.read_policy(plain)[0]["kl"])


def test_the_reference_matters_only_through_the_price(bench):
    found = {}
    for price in (0.0, 5.0):
        for anchor in ("fixed", "moving", "average"):
            policy = bench.ground.policy()
            runs.ppo_run(bench, price, anchor=anchor, policy=policy)
            found[price, anchor] = weights(policy)
    assert torch.equal(found[0.0, "fixed"], found[0.0, "moving"])
    ways = [found[5.0, anchor] for anchor in ("fixed", "average", "moving")]
    assert not torch.equal(ways[0], ways[1]) and not torch.equal(ways[1], ways[2])


# ---- the number of labels
def test_fewer_labels_get_more_passes():
    size, plan = arms.Size(), runs.Plan()
    assert [runs.passes(plan, size, labels, 2) for labels in (375, 1500, 6000)] == [8, 4, 2]


def test_few_labels_are_the_first_ones_and_the_relay_s_reference_is_its_first_stage(bench):
    record = runs.part_fewest(bench)
    ground = bench.ground
    assert record["labels"] == 64 and record["first"]["kl"] > 0
    policy = ground.policy()
    config = replace(TINY.dpo, beta=0.1, seed=5, epochs=runs.passes(PLAN, TINY, 64, 1))
    steps = list(dpo(policy, ground.tokenizer, ground.pairs[:64], config))
    assert record["dpo"][0]["kl"] == pytest.approx(bench.read_policy(policy)[0]["kl"], abs=1e-6)
    assert record["dpo"][0]["loss"] == pytest.approx(steps[-1].loss)
    relay = ground.policy()
    runs.ppo_run(bench, PLAN.relay_price, judge="64", policy=relay, blocks=PLAN.relay_blocks)
    assert record["first"] == pytest.approx(bench.read_policy(relay)[0])
    list(dpo(relay, ground.tokenizer, ground.pairs[:64], replace(config, seed=1005)))
    assert record["relay"][0]["kl"] == pytest.approx(bench.read_policy(relay)[0]["kl"], abs=1e-6)


# ---- figures
def point(kl, gold=0.0):
    return {**dict.fromkeys(runs.METRICS, 0.0), "kl": kl, "gold": gold}


def test_figures_at_a_kl_are_linear_in_its_root_and_never_extrapolated():
    points = [point(1.0, 0.6), point(0.0), point(0.25, 0.4)]
    assert runs.matched(points, 0.0625)["gold"] == pytest.approx(0.2)
    assert runs.matched(points, 0.5625) == pytest.approx(point(0.5625, 0.5))
    assert runs.matched(points, 1.21) is None


def test_the_distance_between_trainings_is_the_mean_over_pairs_and_prompts(bench):
    even = [0.5, 0.5]
    tables = [np.array([[1.0, 0.0], even]), np.array([even, even]), np.array([[0.0, 1.0], [1.0, 0.0]])]
    assert runs.apart(tables) == pytest.approx(((0.5 + 0) / 2 + (1 + 0.5) / 2 + (0.5 + 0.5) / 2) / 3)
    found = runs.spread(SimpleNamespace(sft_table=tables[0]), tables[1:])
    assert found == pytest.approx({"apart": 0.5, "moved": (0.25 + 0.75) / 2})


# ---- rules, each worked by hand
def world():
    """A world's record with round numbers."""
    sft, logged = point(0.0), {"loss": 0.6, "chosen_shift": -1.0, "rejected_shift": -2.0}
    beta = [{**point(kl, gold), **logged, "beta": beta} for beta, kl, gold in
            ((0.05, 4.0, 0.0), (0.15, 2.25, 0.3), (0.5, 1.0, 0.5), (1.5, 0.25, 0.4), (5.0, 0.01, 0.1))]
    path = [{**point(0.25, 0.5), "block": 2}, {**point(4.0, 0.2), "block": 4}]
    arms_of = {"moving": point(4.0, 0.2), "average": point(2.0, 0.9), "none": point(5.0, 0.1)}
    return {
        "beta": {"sft": sft, "runs": beta, "trainings": [point(1, 0.5), point(1, 0.6), point(1, 0.7)], "apart": 0.1,
                 "moved": 0.2, "promised": [{"beta": 0.5, "kl": 0.5, "gold": 0.7, "proxy": 0.9}]},
        "price": {"sft": sft, "runs": [{**point(kl, gold), "price": price} for price, kl, gold in
                                       ((0.1, 4.0, 0.6), (0.35, 1.0, 0.8), (1.2, 0.16, 0.4))],
                  "path": path, "trainings": [point(1, 0.7), point(1, 0.9), point(1, 1.1)], "apart": 0.1, "moved": 0.4},
        "reference": {"sft": sft, "arms": {name: {"path": path, "end": end} for name, end in arms_of.items()}},
        "fewest": {"sft": sft, "labels": 375, "dpo": [point(0.64, 0.4), point(0.04, 0.1)], "ppo": point(0.36, 0.5),
                   "first": point(0.09, 0.9), "relay": [point(0.64, 0.5), point(0.16, 0.3)]},
        "fewer": {"sft": sft, "labels": 1500, "dpo": [point(0.64, 0.8), point(0.04, 0.2)], "ppo": point(0.16, 0.45)},
        "steps": {"sft": sft, "rows": [{**point(kl, gold), **logged, "epoch": epoch} for epoch, kl, gold in
                                       ((1, 0.5, 0.3), (2, 1.0, 0.6), (4, 1.5, 0.5), (6, 2.0, 0.4))],
                  "promised": {"kl": 0.5}},
        "rejected": {"sft": sft, "runs": [{**point(0.25, 0.3), "rejected": "weighs", "beta": 0.5},
                                          {**point(0.01, 0.2), "rejected": "ignored", "beta": 0.5}]},
    }


EXPECTED = {
    "C6": math.log(4), "C6b": math.log(4 / 5), "C6c": 0.2 - 0.8, "C6d": (0.5 + (0.2 - 0.5) / 3) - 0.8, "C6e": 0.1,
    "C18": math.log(0.5 / 0.25), "C18b": math.log(0.1 / 0.2),
    "C22": np.std([0.0, 0.3, 0.5, 0.4, 0.1], ddof=1) - 0.1, "C23": 0.5 - 0.4, "C23b": 0.1 - 0.2,
    "C28": 0.3 - 0.5,
    "C28b": (0.4 + 0.1 * 0.2 - 0.3) - (0.4 + 0.4 / 3 - 0.5),  # √0.36 lies between 0.5 and 1, and between 0.4 and 1
    "C40": 0.4 - 0.5, "C40b": 0.4 - 0.3,
    "C31": math.log(2), "C31b": math.log(4), "C31c": 0.4 - 0.6,
    "C51": 0.4 - 0.3, "C51b": 0.5 - 0.3, "C51c": 0.1 - 0.2,
}


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.name)
def test_a_statistic_worked_by_hand(rule):
    assert rule.statistic(world()) == pytest.approx(EXPECTED[rule.name], abs=1e-9)
    assert rules.values(rule, {31: world()}) == {"31": rule.statistic(world())}


@pytest.mark.parametrize("kl", [0.81, 0.02])
def test_a_statistic_outside_the_runs_is_none_though_it_is_between_sft_and_a_run(kl):
    one = world()
    one["fewest"]["ppo"] = point(kl, 0.6)
    by_name = {rule.name: rule for rule in rules.RULES}
    assert [by_name[name].statistic(one) for name in ("C28", "C28b", "C40", "C40b")] == [None] * 4


def test_gold_by_labels_is_read_at_the_kl_of_ppo():
    assert rules.by_labels(world()) == [
        {"labels": 375, "kl": 0.36, "dpo": pytest.approx(0.3), "ppo": 0.5},
        {"labels": 1500, "kl": 0.16, "dpo": pytest.approx(0.4), "ppo": 0.45},
        {"labels": 6000, "kl": 0.36, "dpo": pytest.approx(0.42), "ppo": pytest.approx(0.4 + 0.4 / 3)}]


# ---- the record
@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """The record of two worlds with round numbers, of which the second has half as much gold at the smallest β."""
    worlds = {31: world(), 32: world()}
    worlds[32]["beta"]["runs"][0]["gold"] = 0.2
    path = tmp_path_factory.mktemp("record") / "dials.json"
    made = command.recorded(worlds, arms.Size(), runs.Plan())
    write_compact(path, plain({"command": "python -m experiments.dials", "versions": {}, **made}))
    return dials.load_dials(path)


def test_a_curve_is_the_mean_over_worlds_with_its_interval(record):
    curve = record.curve("beta", "gold")
    assert list(curve) == [0.05, 0.15, 0.5, 1.5, 5.0] and curve[0.5].value == 0.5
    assert curve[0.05] == mean_estimate([0.0, 0.2])
    assert record.values("labels", "dpo")[375] == pytest.approx({31: 0.3, 32: 0.3})
    assert record.curve("optimum", "kl")[0.5].value == 0.5 and record.curve("price", "gold")[1.2].value == 0.4
    assert [each.value for each in record.curve("epoch", "kl").values()] == [0.5, 1.0, 1.5, 2.0]
    with pytest.raises(KeyError, match="temperature"):
        record.curve("temperature", "gold")


def test_a_world_without_a_figure_is_left_out_of_its_curve():
    rows = [{"labels": 375, "kl": 0.3, "dpo": gold, "ppo": 0.5} for gold in (None, 0.4)]
    found = dials.Dials("", {}, {}, (), {seed: {"labels": {"rows": [row]}} for seed, row in enumerate(rows)})
    assert found.values("labels", "dpo") == {375: {1: 0.4}}


def test_the_paths_of_a_reference_begin_at_sft(record):
    kl, gold = record.paths("one block before")[31]
    assert kl == [0.0, 0.25, 4.0] and gold == [0.0, 0.5, 0.2]
    assert set(record.paths("SFT")) == {31, 32}


def test_the_page_has_every_verdict_and_the_command(record):
    text = page(record)
    assert f"Made by `{record.command}`" in text and "Worlds: 31, 32. 20 claims:" in text
    for claim in record.claims:
        assert f"| {claim.name} | {claim.source}: {claim.english}<br>{claim.original} |" in text
        assert f"{claim.estimate:.3f} | 2 | **{claim.verdict}** |" in text
    assert "| 0.05 | 4.00 [4.00, 4.00] | 0.10" in text and record["C31"].estimate.value == pytest.approx(math.log(2))
    with pytest.raises(KeyError, match="no claim of this record"):
        record["C99"]


def test_the_shipped_record_follows_from_its_worlds_by_the_rules_and_the_page_shows_it():
    shipped = dials.load_dials()
    assert len(shipped.worlds) >= 5 and {claim.name for claim in shipped.claims} == {rule.name for rule in rules.RULES}
    for rule in rules.RULES:
        claim = shipped[rule.name]
        fixed = ("source", "original", "english", "quantity", "side")
        assert all(getattr(claim, name) == getattr(rule, name) for name in fixed), rule.name
        assert claim.margin == pytest.approx(rule.margin, rel=1e-5)  # the file has six digits
        for seed, world in shipped.worlds.items():
            assert claim.worlds[seed] == pytest.approx(rule.statistic(world), abs=2e-3), (rule.name, seed)
    assert (DOCS / "dials.md").read_text(encoding="utf-8") == page(shipped)


def test_a_missing_record_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m experiments.dials"):
        dials.load_dials(tmp_path / "none.json")


def test_a_finished_part_is_not_run_again_until_settings_or_code_change(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(runs, "bench_of", lambda *_: made.append(1) or SimpleNamespace())
    monkeypatch.setitem(runs.PARTS, "steps", lambda _: {"rows": []})
    for plan, code in ((PLAN, "a"), (PLAN, "a"), (PLAN, "b"), (replace(PLAN, beta=0.7), "b")):
        assert runs.run_part(5, "steps", tmp_path, TINY, plan, code) == {"rows": []}
    assert len(made) == 3
