"""The adviser: each rule on figures made by hand, what it says beside its decision, and what it cannot know."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from alignkit.evaluate import decision
from alignkit.evaluate.decision import DECISION_RULES, DECISIONS, Seen, decide, stability, warnings_of
from alignkit.evaluate.failures import load_failures
from alignkit.formulas.intervals import Estimate

FINE = {"accuracy_labels": 0.8, "accuracy_labels_ci95": [0.75, 0.84]}
TURNED = {"accuracy_labels": 0.4, "accuracy_labels_ci95": [0.37, 0.43]}
COIN = {"accuracy_labels": 0.52, "accuracy_labels_ci95": [0.42, 0.62]}


def checkpoints(half=0.02, **rows):
    """A comparison made by hand: name -> metrics; every change has an interval of ± `half`."""
    base = {"kl_to_sft": 0.0, "length": 2.0, "eos_rate": 0.9, "entropy": 1.0}
    found = {name: SimpleNamespace(name=name, metrics={
        metric: Estimate(value, value - 0.01, value + 0.01) for metric, value in {**base, **metrics}.items()
        if value is not None}) for name, metrics in rows.items()}

    def difference(a, b, metric):
        change = found[b].metrics[metric].value - found[a].metrics[metric].value
        return Estimate(change, change - half, change + half)

    return SimpleNamespace(evaluations=found, difference=difference)


def path(golds, proxies=None, kls=None, names=("sft", "ppo10", "ppo20", "ppo30"), **more):
    proxies, kls = proxies or [0.5 * n for n in range(len(golds))], kls or [0.2 * n for n in range(len(golds))]
    return checkpoints(**more, **{name: {"gold_mean": gold, "proxy_mean": proxy, "kl_to_sft": kl}
                                  for name, gold, proxy, kl in zip(names, golds, proxies, kls, strict=False)})


# ---- a test for each rule
@pytest.mark.parametrize(("seen", "given", "decision_", "step", "rule"), [
    (path([None]), {"reward": COIN}, "neither: repair first", "sft", "reward_at_chance"),
    (path([None] * 2, [0.0, 1.0]), {"reward": COIN}, "neither: repair first", "sft", "reward_at_chance"),
    (path([0.0]), {"reward": TURNED}, "neither: repair first", "sft", "reward_at_chance"),
    (path([0.0]), {"reward": COIN}, "stay in PPO", "sft", "still_gaining"),  # few pairs: gold will tell
    (path([0.0, 0.3]), {"reward": COIN}, "stay in PPO", "ppo10", "still_gaining"),  # gold rose
    (path([0.0, 0.3]), {"reward": TURNED}, "stay in PPO", "ppo10", "still_gaining"),
    (path([0.0, 0.3]), {"reward": FINE}, "stay in PPO", "ppo10", "still_gaining"),
    (path([0.0, -0.2, -0.4]), {}, "neither: repair first", "sft", "made_worse"),
    (path([None, None], [0.0, -0.8]), {}, "neither: repair first", "sft", "made_worse"),  # the proxy itself falls
    (path([0.0, 0.3], half=0.5), {}, "neither: repair first", "ppo10", "too_few_prompts"),
    (path([0.0, 0.6], half=0.5), {}, "stay in PPO", "ppo10", "still_gaining"),  # wide, and excludes 0 all the same
    (path([0.0, 0.5, 0.4]), {}, "roll back", "ppo10", "score_fell"),
    (path([0.0, 0.5, 0.44], half=0.1), {}, "roll back", "ppo10", "score_fell"),  # a difference that matters, if real
    (path([0.0, 0.5, 0.47], half=0.1), {}, "switch to DPO", "ppo20", "flat_with_gold"),  # one that does not
    (path([None] * 3, [0.0, 0.9, 0.6]), {}, "roll back", "ppo10", "score_fell"),
    (path([None] * 3, [0.0, 1.0, 1.5], [0, 1.2, 4.5]), {}, "roll back", "ppo10", "too_far_without_gold"),
    (path([None] * 2, [0.0, 1.0], [0, 1.8]), {}, "freeze now", "ppo10", "too_far_without_gold"),
    (path([0.0, 0.5, 0.7], None, [0, 1.2, 4.5]), {}, "stay in PPO", "ppo20", "still_gaining"),  # gold shows it is well
    (path([None]), {"reward": FINE}, "stay in PPO", "sft", "still_gaining"),
    (path([None] * 2, [0.0, 1.0], [0, 0.3]), {}, "stay in PPO", "ppo10", "still_gaining"),
    (path([None] * 2, [0.0, 1.0], [0, 1.0]), {}, "freeze now", "ppo10", "otherwise"),  # the next step would go too far
    (path([None] * 2, [0.0, 0.01], [0, 0.1]), {}, "freeze now", "ppo10", "otherwise"),  # the proxy does not rise
    (path([0.0, 0.5, 0.52]), {}, "switch to DPO", "ppo20", "flat_with_gold"),
    (path([0.0, 0.5, 0.6], names=("sft", "ppo", "dpo")), {}, "freeze now", "dpo", "otherwise"),
    (path([0.0, 0.5, 0.3], names=("sft", "ppo", "dpo")), {}, "roll back", "ppo", "score_fell"),
    (path([0.0, 0.5, 0.6], names=("a", "b", "c")), {"stages": {"c": "dpo"}}, "freeze now", "c", "otherwise"),
])
def test_each_rule_decides_where_it_should(seen, given, decision_, step, rule):
    answer = decide(seen, **given)
    assert (answer.decision, answer.step) == (decision_, step)
    facts = Seen(seen, given.get("stages"), given.get("reward"))
    assert next(each.__name__ for each in DECISION_RULES if each(facts)) == rule
    assert answer.reasons and str(answer).count("\n") == len(answer.reasons) + len(answer.unknown)


def test_every_decision_is_reached_and_every_rule_says_what_it_does():
    rules = {rule.__name__ for rule in DECISION_RULES}
    assert len(rules) == len(DECISION_RULES) and all(rule.__doc__ for rule in DECISION_RULES)
    cases = next(mark for mark in test_each_rule_decides_where_it_should.pytestmark).args[1]
    assert {case[2] for case in cases} == set(DECISIONS) and {case[4] for case in cases} == rules


def test_without_gold_another_reward_model_judges_and_sees_what_the_proxy_does_not():
    seen = path([None] * 3, [0.0, 0.8, 1.4], [0, 0.3, 0.6])
    assert decide(seen).decision == "stay in PPO"
    falls = path([None] * 3, [0.0, 0.5, 0.2], [0, 0.3, 0.6])
    answer = decide(seen, held_out=falls)
    assert (answer.decision, answer.step) == ("roll back", "ppo10")
    assert "-0.30" in answer.reasons[0] and "the proxy changed by +0.60" in answer.reasons[0]
    assert "may share the proxy's errors" in answer.unknown[0]
    with pytest.raises(ValueError, match="held_out has the checkpoints sft, expected sft, ppo10, ppo20"):
        decide(seen, held_out=path([None]))


def test_an_evaluation_that_is_too_small_says_how_many_questions_it_needs():
    reason = decide(path([0.0, 0.3], half=0.5)).reasons[0]  # an interval five times as narrow: 25 times as many
    assert "+0.30 [-0.20, +0.80]" in reason and "to see a change of 0.1 it needs about 25 times as many" in reason


# ---- what is said beside the decision
def test_the_gain_is_said_for_a_nat_and_for_a_minute():
    seen = path([0.0, 0.3], [0.0, 1.0], [0.0, 0.6])
    answer = decide(seen, reward=FINE, seconds={"sft": 0, "ppo10": 30})
    assert "+0.50 [+0.47, +0.53] for a nat of KL" in answer.reasons[0]  # (0.3 ± 0.02) / 0.6
    said = " ".join(answer.reasons)
    assert "80.0% [75.0%, 84.0%] of held-out pairs" in said
    assert "took 30 s: +0.60 [+0.56, +0.64] gold a minute" in said
    assert "the proxy changed by +1.00 [+0.98, +1.02], gold by +0.30 [+0.28, +0.32]" in said


def test_over_refusal_is_set_against_risky_failures_since_the_last_stage():
    rows = {"sft": (0.4, 0.02), "ppo": (0.1, 0.3), "dpo": (0.08, 0.4)}
    seen = checkpoints(**{name: {"gold_mean": 0.1 * place, "proxy_mean": 0.0, "risky_failure_rate": risky,
                                 "over_refusal_rate": refused}
                          for place, (name, (risky, refused)) in enumerate(rows.items())})
    said = " ".join(decide(seen).reasons)
    assert "Since ppo: risky failures -2.0%" in said and "over-refusal +10.0%" in said and "Obedient rather" in said
    assert "Risky failures of dpo are 8.0%" in said  # its interval begins above 6 %
    for before, after in (((0.4, 0.02), (0.02, 0.02)), ((0.4, 0.02), (0.02, 0.1)), ((0.02, 0.02), (0.04, 0.02))):
        rows = {name: {"gold_mean": 0.1 * place, "proxy_mean": 0.0, "risky_failure_rate": risky,
                       "over_refusal_rate": refused}
                for place, (name, (risky, refused)) in enumerate((("sft", before), ("ppo", after)))}
        said = " ".join(decide(checkpoints(**rows)).reasons)
        assert "over-refusal" in said and "Obedient" not in said and "above 6%" not in said


def test_stability_counts_which_checkpoint_each_draw_chooses():
    rng = np.random.default_rng(0)
    columns = {name: rng.normal(mean, 1, (20, 5)) for name, mean in (("a", 0.0), ("b", 0.4))}
    seen = {name: SimpleNamespace(columns={"gold": values.reshape(-1).tolist()}, set=SimpleNamespace(samples=5))
            for name, values in columns.items()}
    wins = sum(columns["b"][:, draw].mean() > columns["a"][:, draw].mean() for draw in range(5))
    expected = ("b", wins, 5) if wins >= 3 else ("a", 5 - wins, 5)
    assert stability(seen, "gold") == expected
    assert stability(seen, "proxy") is None


def test_one_checkpoint_without_gold_says_what_it_cannot_know():
    alone = next(iter(path([None]).evaluations.values()))
    answer = decide(alone)
    assert (answer.decision, answer.step) == ("stay in PPO", "sft")
    said = " ".join(answer.unknown)
    for words in ("there is no gold reward, and the proxy alone judges", "no report on held-out pairs",
                  "no behaviour classes", "there is one checkpoint"):
        assert words in said
    far = decide(path([None] * 2, [0.0, 1.0], [0, 6.0]))
    assert "still means anything at 6.0 nats" in " ".join(far.unknown)
    assert "no behaviour" not in " ".join(decide(checkpoints(sft={"risky_failure_rate": 0.1})).unknown)


# ---- what the logs give away: on the stored runs of the failure museum
@pytest.mark.parametrize(("letter", "says"), [
    ("A", "the learning rate is too high"), ("H", "less than a constant"), ("R", "beta is so small")])
def test_the_logs_of_a_broken_run_give_it_away(letter, says):
    run = load_failures()[letter]
    assert any(says in sentence for sentence in warnings_of({run.method: run.rows}))


def test_the_logs_of_the_healthy_runs_give_no_alarm():
    museum = load_failures()
    for run in (*museum.healthy(), *museum.healthy("dpo")):
        said = warnings_of({run.method: run.rows})
        assert all("In the last quarter" in each and "falls" not in each for each in said), said
    assert warnings_of({}) == [] and warnings_of({"ppo": [], "dpo": []}) == []


def test_a_score_that_falls_in_the_last_quarter_is_said():
    rows = [{"objective/scores": score} for score in (0, 1, 2, 3, 3.1, 2.9, 2.1, 1.9)]
    assert warnings_of({"ppo": rows}) == ["In the last quarter of PPO's iterations the score changed by -1.00 [-1.00, "
                                          "-1.00]: it falls."]
    assert "falls" not in warnings_of({"ppo": rows[:4] + rows[:4]})[0]


def test_the_limits_are_named_with_their_reasons():
    names = ("MATTERS", "HOPEFUL", "WIDE", "TRUSTED", "STEP_KL", "USELESS")
    text = Path(decision.__file__).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith(names)]
    assert len(lines) == 6 and all("#" in line for line in lines)
