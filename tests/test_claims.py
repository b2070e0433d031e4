"""The claims lab: verdicts, matched KL, arms that differ in nothing but what they say, and a record that agrees."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from alignkit.configs import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from alignkit.evaluate import claims
from alignkit.evaluate.claims import Claim, Claims, load_claims, verdict
from alignkit.formulas.intervals import Estimate
from experiments.claims import __main__ as lab
from experiments.claims import arms, order, registry
from experiments.claims.lab import DOCS, bound, claim_row, claims_table, counted, key_of, run_lab

TINY = arms.Size(demonstrations=400, labels=200, fresh=64, normalise=64, keys=1, blocks=4, first=0.02, last=0.05,
                 betas=(0.02, 0.2, 2.0), draws=(2, 8), sft=SFTConfig(epochs=1), reward=RewardConfig(epochs=1),
                 ppo=PPOConfig(prompts_per_iteration=32, minibatch_size=16, kl_coef=0.35),
                 dpo=DPOConfig(beta=0.3, batch_size=32, epochs=1))


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return arms.Ground(5, tmp_path_factory.mktemp("claims"), TINY)


# ---- verdicts
@pytest.mark.parametrize(("estimate", "side", "expected"), [
    ((0.3, 0.1, 0.5), "above", "confirmed"),
    ((0.3, -0.1, 0.7), "above", "undecided"),  # the interval holds 0
    ((0.08, 0.01, 0.15), "above", "undecided"),  # beyond 0, but the value is within the margin
    ((0.02, -0.05, 0.09), "above", "refuted"),  # inside the margin on both sides: too small to matter
    ((0.02, 0.01, 0.03), "above", "refuted"),  # there, and too small to matter
    ((-0.3, -0.5, -0.1), "above", "refuted"),  # the other side
    ((-0.3, -0.5, -0.1), "below", "confirmed"),
    ((0.3, 0.1, 0.5), "below", "refuted"),
    ((-0.08, -0.15, -0.01), "below", "undecided"),
    ((0.3, None, None), "above", "undecided"),
    ((float("nan"), None, None), "above", "undecided"),
])
def test_a_verdict_worked_by_hand(estimate, side, expected):
    assert verdict(Estimate(*estimate), side, 0.1) == expected


def test_a_verdict_turned_over_is_the_verdict_of_the_opposite_claim():
    rng = np.random.default_rng(0)
    for _ in range(200):
        low, value, high = sorted(rng.normal(0, 0.2, 3))
        assert verdict(Estimate(value, low, high), "above", 0.1) == verdict(Estimate(-value, -high, -low), "below", 0.1)


@pytest.mark.parametrize(("estimate", "expected"), [
    ((0.02, -0.05, 0.09), "confirmed"), ((0.08, 0.01, 0.15), "undecided"), ((0.3, 0.2, 0.4), "refuted"),
    ((-0.3, -0.4, -0.2), "refuted"), ((0.0, -0.5, 0.5), "undecided"), ((0.0, None, None), "undecided")])
def test_a_claim_of_no_difference_worked_by_hand(estimate, expected):
    assert verdict(Estimate(*estimate), "within", 0.1) == expected


def test_an_unknown_side_and_a_negative_margin_are_refused():
    with pytest.raises(ValueError, match="side is 'over'"):
        verdict(Estimate(0, 0, 0), "over", 0.1)
    with pytest.raises(ValueError, match="margin -1"):
        verdict(Estimate(0, 0, 0), "above", -1)
    with pytest.raises(ValueError, match="margin is 0"):
        verdict(Estimate(0, 0, 0), "within", 0)


# ---- the record
def claim(values, side="above", margin=0.1):
    return Claim("C0", "S0", "原文", "English", "x", side, margin, "arms", dict(enumerate(values)))


def test_a_claim_is_estimated_over_worlds_and_leaves_out_those_without_a_value():
    one = claim([1.0, None, 3.0])
    assert one.values == [1.0, 3.0] and one.estimate.value == 2.0
    assert one.estimate.high == pytest.approx(2.0 + 12.7062 * math.sqrt(2) / math.sqrt(2))
    assert claim([None, None]).verdict == "undecided"


def test_differences_are_paired_by_world():
    rows = {"A": {1: 0.5, 2: 1.5, 3: None}, "B": {1: 0.1, 2: 1.0, 3: 9.0}}
    arms_of = {arm: {world: {"at": gold and {"gold": gold}} for world, gold in worlds.items()}
               for arm, worlds in rows.items()}
    record = Claims("command", {}, {}, (), arms_of, {})
    assert record.difference("A", "B", "gold").value == pytest.approx(0.45)
    assert record.values("A", "gold") == {1: 0.5, 2: 1.5}


def test_a_missing_record_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m experiments.claims"):
        load_claims(tmp_path / "none.json")
    with pytest.raises(KeyError, match="no measured claim"):
        Claims("", {}, {}, (), {}, {})["C99"]


@pytest.mark.parametrize(("side", "margin", "words"), [
    ("above", 0.05, "above 0.05"), ("below", 0.05, "below −0.05"), ("within", 0.2231, "within ±0.223"),
    ("below", 0, "below 0")])
def test_a_rule_in_words(side, margin, words):
    assert bound(claim([1.0], side, margin)) == words


def test_claims_are_counted_and_so_are_the_intervals_that_miss_by_chance():
    text = counted([claim([1.0, 1.1]), claim([0.01, 0.012]), claim([1.0])] * 10)
    assert text.startswith("30 claims: 10 confirmed, 10 refuted, 10 undecided.") and "of 30 true values about 2" in text
    assert "of 60 true values about 3" in counted([claim([1.0])] * 30, 60)


def test_a_lab_writes_the_record_that_it_makes_and_its_page(tmp_path, capsys):
    rule, asked = registry.RULES[0], []

    def make(given):
        asked.append(given)
        rows = [claim_row(rule, "arms", {str(seed): 0.5 for seed in given.seeds})]
        return {"settings": {"loud": given.loud}, "unmeasured": {}, "claims": rows, "arms": {}}

    def page(path):
        record = load_claims(path)
        return f"{record.command}\n" + claims_table([{"claim": each.name, "worlds": str(each.worlds)}
                                                    for each in record.claims])

    def run(*arguments):
        run_lab("trial", "A trial.", arguments, seeds=(3, 4), folder=tmp_path, file=tmp_path / "shipped.json",
                make=make, page=page, options={"--loud": {"action": "store_true"}})
        return capsys.readouterr().out

    text = run()
    assert "python -m experiments.trial --seeds 3 4 --record" in text and "| C1 | {3: 0.5, 4: 0.5} |" in text
    assert load_claims(tmp_path / "trial.json").claims[0].quantity == rule.quantity
    assert "{7: 0.5}" in run("--seeds", "7", "--json", str(tmp_path / "other.json"), "--loud")
    assert load_claims(tmp_path / "other.json").settings == {"loud": True} and asked[0].loud is False
    assert not (tmp_path / "shipped.json").exists() and not (DOCS / "trial.md").exists()


def test_the_settings_of_a_size_are_plain_and_complete():
    key = key_of(TINY)
    assert key["betas"] == [0.02, 0.2, 2.0] and key["dpo"]["batch_size"] == 32 and key["dpo"]["beta"] == 0.3
    assert set(key) == {each.name for each in fields(TINY)} and key == TINY.key()


def test_a_trial_is_never_recorded(tmp_path):
    with pytest.raises(SystemExit, match="no evidence"):
        lab.main(["--quick", "--record", "--folder", str(tmp_path)])


def test_everything_is_made_once_and_a_lab_that_fails_is_not_passed_over(monkeypatch):
    started = []
    monkeypatch.setattr(lab.subprocess, "run", lambda command, check: started.append((command[1:], check)))
    lab.make_others(2)
    assert sorted(command[1] for command, _ in started) == [
        f"experiments.{name}" for name in ("advice", "dials", "knowledge", "readings", "unpacking")]
    assert all(command[0] == "-m" and command[2:] == ["--record"] and check for command, check in started)

    def fail(command, check):
        if command[2] == "experiments.advice":
            raise OSError("no")

    monkeypatch.setattr(lab.subprocess, "run", fail)
    with pytest.raises(OSError):
        lab.make_others(2)


# ---- what is measured
def test_figures_at_a_kl_are_interpolated_and_never_extrapolated():
    points = [{"kl": 0.2, "gold": 0.0}, {"kl": 0.4, "gold": 1.0}, {"kl": 0.8, "gold": 3.0}]
    assert order.at_kl(points, 0.6) == pytest.approx({"kl": 0.6, "gold": 2.0})
    assert order.at_kl(points, 0.4)["gold"] == 1.0
    assert order.at_kl(points, 0.1) is None and order.at_kl(points, 1.0) is None


def test_a_straight_path_has_detour_1_and_one_that_turns_back_has_more():
    corners = [np.array([[1 - share, share]]) for share in (0.0, 0.2, 0.5)]
    assert order.detour(corners) == pytest.approx(1.0)
    back = [np.array([[1 - share, share]]) for share in (0.0, 0.5, 0.2)]
    assert order.detour(back) == pytest.approx((0.5 + 0.3) / 0.2)


def test_ranks():
    assert order.spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert order.spearman([1, 2, 3], [30, 20, 10]) == pytest.approx(-1)


def test_the_figures_of_sft_agree_with_its_own_tables(ground):
    measure = order.Measure(ground)
    logps = ground.truth.ref_logps
    table = measure.behaviours(logps)
    figures = measure.figures(logps, table)
    assert table.sum(1) == pytest.approx(np.ones(len(table)))
    assert figures["kl"] == 0 and abs(figures["gold"]) < 1e-5
    kinds = measure.kinds
    shares = ground.truth.shares(logps)
    assert figures["risky_failures"] == pytest.approx(
        sum(shares["risky"][name] for name in ("answer", "wrong answer", "unsafe")), abs=1e-6)
    assert figures["over_refusal"] == pytest.approx(
        (shares["benign"]["refuse"] + shares["look-alike"]["refuse"]) / 2, abs=1e-6)
    rows = measure.members[0]
    by_hand = [float(table[i] @ table[j]) for i in rows for j in rows if i < j]
    every = [float(table[i] @ table[j]) for members in measure.members for i in members for j in members if i < j]
    assert len(by_hand) == 6 and figures["paraphrase_agreement"] == pytest.approx(np.mean(every))
    assert len(kinds) == 16


# ---- arms
def weights(policy):
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


def trained(ground, blocks, kl=0.02, n=2):
    """The weights after `n` blocks."""
    policy = ground.policy()
    made = blocks(policy)
    for number in range(n):
        made.send(None if number == 0 else kl)
    return weights(policy)


def test_a_sum_with_weight_0_is_ppo(ground):
    ppo = trained(ground, lambda policy: arms.ppo_blocks(ground, policy, 0.05, 0, 4))
    nothing = trained(ground, lambda policy: arms.summed_blocks(ground, policy, 0.05, 0, 4, weight=0.0))
    something = trained(ground, lambda policy: arms.summed_blocks(ground, policy, 0.05, 0, 4, weight=1.0))
    assert torch.allclose(ppo, nothing, rtol=0, atol=1e-6)
    assert float((ppo - something).abs().max()) > 1e-4


def test_alternation_is_ppo_in_its_first_period_and_then_something_else(ground):
    def alternating(policy):
        return arms.alternating_blocks(ground, policy, 0.05, 0, 8, period=2)

    def ppo(policy):
        return arms.ppo_blocks(ground, policy, 0.05, 0, 4)

    assert torch.equal(trained(ground, alternating, n=2), trained(ground, ppo, n=2))
    assert not torch.equal(trained(ground, alternating, n=3), trained(ground, ppo, n=3))


def test_the_price_rises_above_the_target_and_falls_below_it():
    price = arms.Price(target=1.0, value=0.5)
    price.adapt(3.0)
    assert price.value == pytest.approx(0.6)
    price.adapt(0.0)
    assert price.value == pytest.approx(0.48)


def test_labels_are_matched(ground):
    assert len(ground.pairs) == TINY.labels
    assert len(ground.fresh_pairs(ground.policy())) == TINY.fresh
    part, everything = (ground.folder / f"judge-{name}" for name in ("part", "all"))
    assert (part / "model.safetensors").read_bytes() != (everything / "model.safetensors").read_bytes()


def test_a_priced_arm_is_measured_after_every_block_and_is_the_same_twice(ground, monkeypatch):
    monkeypatch.setattr(order, "NEAR", 9.0)
    one = order.follow(ground, "PPO + DPO")
    monkeypatch.setattr(order, "NEAR", 0.0)  # nothing ends exactly at its KL
    two = order.follow(ground, "PPO + DPO")
    assert one["at"] and two["at"] is None
    assert one["path"] == two["path"] and len(one["path"]["kl"]) == TINY.blocks + 1 and -1 <= one["cosine"] <= 1
    assert one["at"]["gold"] == pytest.approx(np.mean(one["path"]["gold"][-order.LATE:]))
    assert one["path"]["kl"][0] == one["start"]["kl"] == 0 and one["at"]["seconds"] > 0 and one["detour"] >= 1


def test_a_swept_arm_is_interpolated_at_its_kl_between_runs_from_the_same_policy(ground):
    row = order.follow(ground, "DPO")
    assert row["at"]["kl"] == pytest.approx(TINY.last) and len(row["path"]["kl"]) == 2
    runs = {beta: ground.policy() for beta in TINY.betas}
    logged = [arms.train_dpo(ground, policy, 0, beta) for beta, policy in runs.items()]
    shifts = [each["chosen_shift"] for each in logged]
    kls = [float(order.exact.response_kl(ground.truth.enumerate(policy), ground.truth.ref_logps).mean())
           for policy in runs.values()]
    assert kls[0] > TINY.last > kls[-1], "a larger beta keeps the policy nearer"
    assert min(shifts) <= row["at"]["chosen_shift"] <= max(shifts)


def test_the_second_stage_begins_where_the_first_one_ended(ground):
    row = order.follow(ground, "DPO, then PPO")
    assert len(row["path"]["kl"]) == 2 + TINY.blocks // 2
    assert row["path"]["kl"][1] > 0 and row["at"]["gold"] != row["start"]["gold"]
    relay = order.follow(ground, "PPO, then DPO on fresh pairs")
    assert len(relay["path"]["kl"]) == 2 + TINY.blocks // 2


def test_distilling_more_draws_raises_the_proxy_more(ground):
    proxies = []
    for n in (1, 8):
        policy = ground.policy()
        arms.distil(ground, policy, 0, n, prompts=64)
        logps = ground.truth.enumerate(policy)
        proxies.append(float(order.exact.expectation(logps, ground.truth.proxy).mean()))
    assert proxies[1] > proxies[0] + 0.05


@pytest.mark.parametrize(("name", "ends", "aims"), [
    ("PPO", [0.06], [0.05]),  # reached at once
    ("PPO", [0.08, 0.052], [0.05, 0.05 * 0.05 / 0.08]),  # too far: the next aim is lower by what it missed
    ("PPO", [0.03, 0.036, 0.051], [0.05, 0.05 * 0.05 / 0.03, 0.05 * 0.05 / 0.03 * 0.05 / 0.036]),
    ("PPO", [0.08, 0.08, 0.08, 0.08], [0.05 * (0.05 / 0.08) ** n for n in range(4)]),  # given up
    ("PPO", [0.2], [0.05]),  # no price works
    ("DPO", [0.08], [0.05]),  # a swept arm has no aim
])
def test_a_priced_arm_that_misses_the_kl_is_trained_again_with_another_aim(ground, monkeypatch, name, ends, aims):
    given, left = [], iter(ends)
    monkeypatch.setattr(order, "NEAR", 0.012)

    def train_arm(ground, name, aim):
        given.append(aim)
        kl = next(left)
        return {"path": {"kl": [0.0, kl, kl]}, "at": {"kl": kl} if abs(kl - TINY.last) <= order.NEAR else None}

    monkeypatch.setattr(order, "train_arm", train_arm)
    record = order.follow(ground, name)
    assert given == pytest.approx(aims) and record["path"]["kl"][-1] == ends[-1]


def test_an_arm_that_is_kept_is_not_trained_again_unless_size_stages_or_code_change(ground, monkeypatch):
    folder, trained = ground.folder.parent, []
    monkeypatch.setattr(order, "follow", lambda ground, name: trained.append(name) or {
        "arm": name, "at": None, "detour": 1.0})
    names = ["DPO", "PPO, then DPO"]
    order.run_world(ground.seed, folder, TINY, names)
    order.run_world(ground.seed, folder, TINY, names)
    assert trained == names
    order.run_world(ground.seed, folder, replace(TINY, last=TINY.last + 0.1), names)
    assert trained == names * 2
    stage = arms.ARMS["DPO"][0]
    monkeypatch.setitem(arms.ARMS, "DPO", (replace(stage, options={"fresh": True}),))
    order.run_world(ground.seed, folder, replace(TINY, last=TINY.last + 0.1), names)
    assert trained == [*names * 2, "DPO"]
    monkeypatch.setattr(order, "source_hashes", lambda: {"ppo.py": "another text"})
    order.run_world(ground.seed, folder, replace(TINY, last=TINY.last + 0.1), names)
    assert trained == [*names * 2, "DPO", *names]


# ---- rules and record
def test_every_claim_of_the_articles_has_a_rule_or_a_reason():
    names = [rule.name for rule in registry.RULES] + [row["name"] for row in lab.of_labs()]
    measured = {name.rstrip("abcde") for name in names}
    assert measured | set(registry.UNMEASURED) >= {f"C{number}" for number in range(1, 52)}
    assert len(names) == len(set(names)) and not measured & set(registry.UNMEASURED)
    assert len(measured & {f"C{number}" for number in range(1, 52)}) >= 45


def test_rules_read_arms_that_exist_and_none_where_one_did_not_reach_its_kl():
    metrics = ("gold", "proxy", "risky_failures", "over_refusal", "paraphrase_agreement", "seconds", "chosen_shift")
    row = {"at": {name: 0.5 for name in (*metrics, *(f"kl_{kind}" for kind in order.KINDS))},
           "start": {name: 0.25 for name in ("gold", "over_refusal", "paraphrase_agreement")}, "detour": 2.0,
           "least_gold": 0.0, "cosine": 0.1, "moved_by_variance": 0.5, "moved_by_entropy": 0.1}
    world = {name: row for name in arms.ARMS}
    lost = {name: {**row, "at": None} for name in arms.ARMS}
    for rule in registry.RULES:
        if not isinstance(rule.statistic, str):
            assert isinstance(rule.statistic(world), float), rule.name
            assert rule.statistic(lost) is None or rule.name in ("C2", "C8", "C33", "C33c", "C34"), rule.name
            few = rule.statistic({arm: world[arm] for arm in lab.EVERYWHERE})
            compared = rule.name.startswith(("C11", "C33", "C34", "C37", "C39")) and rule.name != "C11b"
            assert few == rule.statistic(world) if compared else few in (None, rule.statistic(world)), rule.name


def test_the_rules_are_applied_again_with_more_epochs_of_dpo_in_its_place():
    def row(value):
        at = dict.fromkeys(("gold", "risky_failures", "over_refusal", "paraphrase_agreement", "chosen_shift"), value)
        return {"at": {**at, "seconds": 10 * value, **{f"kl_{kind}": value for kind in order.KINDS}},
                "start": dict.fromkeys(at, 0.0)}

    world = {"PPO": row(0.5), "DPO": row(0.1), "PPO, then DPO": row(0.2), "PPO + DPO": row(0.7),
             "alternating, four blocks": row(0.6)}
    long = {"DPO, six epochs": row(0.3), "PPO, then DPO, six epochs": row(0.4)}
    by_name = {rule.name: registry.longer(rule).statistic for rule in registry.RULES if rule.name in registry.AGAIN}
    found = {name: statistic(world | long) for name, statistic in by_name.items()}
    assert found == pytest.approx({
        "C15": math.log(5 / 3), "C30": math.log(3 / 5), "C17": -0.2, "C17b": 0.3, "C19": 0.3, "C19b": -0.2, "C20": 0.0,
        "C24": 0.3, "C29b": -0.2, "C43": 0.2, "C33d": 0.3, "C34c": 0.2, "C39": -0.1, "C39b": -0.1, "C11": -0.1})
    assert set(by_name) == set(registry.AGAIN) and {name: one(world) for name, one in by_name.items()} == dict.fromkeys(
        by_name)  # a world without these arms says nothing, and not what its DPO of two epochs says


def test_more_epochs_are_more_passes_over_the_same_labels(ground, monkeypatch):
    seen = []
    monkeypatch.setattr(arms, "dpo", lambda policy, tokenizer, rows, config: seen.append((rows, config)) or [
        type("Step", (), {"chosen_shift": 0.0})])
    for stage in (*arms.ARMS["DPO"], *arms.ARMS["DPO, six epochs"]):
        stage.method(ground, ground.policy(), 0, 0.2, **stage.options)
    (rows, short), (other_rows, long) = seen
    assert rows is other_rows is ground.pairs and short.epochs == TINY.dpo.epochs and long == replace(short, epochs=6)


def test_the_page_says_which_verdicts_depend_on_the_number_of_epochs():
    record = load_claims()
    turned = replace(record["C43"], worlds={31: -9.0, 32: -9.1, 33: None})
    other = replace(record, longer=tuple(turned if claim.name == "C43" else record[claim.name]
                                         for claim in record.longer))
    assert other.both[-1][0].worlds == {seed: record["C43"].worlds[seed] for seed in (31, 32)}
    text = lab.page(other)
    assert text.count("**depends**") == 1 and text.count("does not depend") == len(registry.AGAIN) - 1
    line, = (line for line in text.split("\n") if line.startswith("* C43,"))
    assert "-9.050" in line and "**depends**" in line and f"{other.both[-1][0].estimate:.3f}" in line
    assert "**confirmed**; with more epochs of DPO **refuted** |" in text


def test_the_record_and_the_page_agree_with_the_rules():
    record = load_claims()
    fixed = ("name", "source", "original", "english", "quantity", "side", "experiment")
    rules = [{name: getattr(rule, name) for name in (*fixed, "margin")} for rule in registry.RULES] + lab.of_labs()
    assert [claim.margin for claim in record.claims] == pytest.approx([rule["margin"] for rule in rules], 1e-5)
    assert [[getattr(claim, name) for name in fixed] for claim in record.claims] == [
        [rule[name] for name in fixed] for rule in rules]
    for row in lab.of_labs():
        measured = {int(seed): value for seed, value in row["worlds"].items()}
        assert record[row["name"]].worlds == pytest.approx(measured, abs=1e-4), row["name"]
    assert record.unmeasured == registry.UNMEASURED and list(record.arms) == list(arms.ARMS)
    assert (DOCS / "claims.md").read_text(encoding="utf-8") == lab.page(record)
    assert {claim.verdict for claim in record.claims} <= set(claims.VERDICTS)
    for rule in registry.RULES:
        if not isinstance(rule.statistic, str):
            again = {seed: rule.statistic({arm: rows[seed] for arm, rows in record.arms.items() if seed in rows})
                     for seed in record.arms["PPO"]}
            assert record[rule.name].worlds == pytest.approx(again, abs=1e-4), rule.name
    assert [claim.name for claim in record.longer] == [rule.name for rule in registry.RULES
                                                       if rule.name in registry.AGAIN]
    for claim in record.longer:
        rule = registry.longer(next(rule for rule in registry.RULES if rule.name == claim.name))
        again = {seed: rule.statistic({arm: rows[seed] for arm, rows in record.arms.items() if seed in rows})
                 for seed in record.arms["PPO"]}
        assert claim.worlds == pytest.approx(again, abs=1e-4) and len(claim.values) >= 5, rule.name
