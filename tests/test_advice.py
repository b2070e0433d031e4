"""The regret of the adviser: worlds made in small, regret by hand, labels against theory, and a record that agrees."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from alignkit.configs import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from alignkit.evaluate import advice_record
from alignkit.evaluate.advice_record import ADVISERS, AdviceRecord, AdvisedWorld, load_advice
from alignkit.evaluate.decision import DECISIONS
from alignkit.evaluate.evaluation import Evaluation, EvaluationSet
from experiments import advice, advice_worlds
from experiments.sweep import write_compact

TINY = advice_worlds.Size(
    demonstrations=300, every=1, steps=2, judged=1, questions=3, samples=2, normalise=64,
    sft=SFTConfig(epochs=1, batch_size=64), reward=RewardConfig(batch_size=32), dpo=DPOConfig(batch_size=32),
    ppo=PPOConfig(iterations=2, prompts_per_iteration=16, minibatch_size=16, epochs=1))


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """A record of one world in small, written and read again."""
    folder = tmp_path_factory.mktemp("advice")
    write_compact(folder / "advice.json", advice.run([41], folder, TINY))
    return load_advice(folder / "advice.json")


def test_a_world_in_small_has_every_candidate_and_every_rule_takes_one(record):
    world = record.worlds[0]
    assert list(world.candidates) == ["sft", "ppo-1", "ppo-2", "dpo", "dpo-1", "dpo-2"]
    assert set(world.picks) == set(record.rules) == {*ADVISERS, *advice.SIMPLE}
    assert set(world.picks.values()) <= set(world.candidates)
    sft = world.candidates["sft"]
    assert sft["kl"] == 0 and abs(sft["gold"]) < 1e-5 and sft["seconds"] == 0
    assert world.picks["always PPO"] == "ppo-2" and world.picks["the last checkpoint"] == "dpo-2"
    for one in ADVISERS:
        said = world.walks[one]
        assert said and {decision for decision, _ in said} <= set(DECISIONS) and said[-1][1] == world.picks[one]
    low, high = world.accuracy[1:]
    assert low < world.accuracy[0] < high
    text = advice.page(record)
    assert "score fell" in text and all(rule in text for rule in record.rules)


def test_the_trouble_of_a_world_is_drawn_from_its_seed_and_covers_the_design():
    drawn = [advice_worlds.trouble(seed) for seed in advice.SEEDS]
    assert drawn[0] == advice_worlds.trouble(advice.SEEDS[0]) and len(set(drawn)) > 10
    for name, values in (("labels", advice_worlds.LABELS), ("flips", advice_worlds.FLIPS),
                         ("annotator", advice_worlds.WHO), ("price", advice_worlds.PRICES),
                         ("messiness", advice_worlds.MESSY)):
        assert {getattr(each, name) for each in drawn} == set(values)


def test_the_adviser_without_gold_sees_no_gold():
    columns = {"gold": [1.0], "behaviour": ["refuse"], "phrases": [[0]], "proxy": [0.2]}
    full = Evaluation(EvaluationSet(("a",), (0,), ("x",), samples=1), columns, (0.0, 1.0), "a")
    hidden = advice.blind(full)
    assert list(hidden.columns) == ["proxy"] and hidden.gold_scale is None and "gold" in full.columns


# ---- regret
def world(seed, picks, gold=(0.0, 0.5, 0.2), choosing=None):
    return AdvisedWorld(seed, {}, (0.8, 0.7, 0.9), {name: {"gold": value} for name, value in
                                                    zip(("sft", "ppo-1", "dpo"), gold, strict=True)},
                        picks, {one: [] for one in ADVISERS}, choosing or {"the last": 0.3, "64 labels": 0.1})


def test_regret_by_hand_and_differences_paired_by_world():
    rules = {ADVISERS[0]: "", "x": ""}
    made = AdviceRecord("", {}, {}, rules, (world(1, {ADVISERS[0]: "ppo-1", "x": "dpo"}),
                                            world(2, {ADVISERS[0]: "dpo", "x": "sft"})))
    assert made.regrets(ADVISERS[0]) == pytest.approx({1: 0.0, 2: 0.3}) and made.regret("x").value == 0.4
    change = made.difference(ADVISERS[0], "x")
    assert change.value == pytest.approx(-0.25) and change.high == pytest.approx(
        -0.25 + 12.7062 * np.std([-0.3, -0.2], ddof=1) / math.sqrt(2), abs=1e-4)
    assert made.freezing == pytest.approx({1: 0.2, 2: 0.2}) and made.simple == ["x"]
    with pytest.raises(KeyError, match="'y' is no rule"):
        made.regrets("y")


def test_the_verdict_says_what_is_beaten_and_what_to_use_otherwise():
    """Twelve worlds: the adviser takes the best, one rule is 0.5 worse in all, another as good."""
    rules = {ADVISERS[0]: "", "bad": "", "same": ""}
    picks = {ADVISERS[0]: "ppo-1", "bad": "sft", "same": "ppo-1"}
    even = tuple(world(seed, picks, (0.0, 0.5 + 0.01 * seed, 0.2)) for seed in range(12))
    said = advice.verdict_of(AdviceRecord("", {}, {}, rules, even), ADVISERS[0])
    assert "has less regret than bad; cannot be told from same" in said and "same has the least" in said
    worse = tuple(world(seed, {**picks, ADVISERS[0]: "dpo"}, (0.0, 0.5 + 0.01 * seed, 0.2)) for seed in range(12))
    said = advice.verdict_of(AdviceRecord("", {}, {}, rules, worse), ADVISERS[0])
    assert "has more than same" in said and "is the one to use" in said
    alone = AdviceRecord("", {}, {}, {name: "" for name in (ADVISERS[0], "bad")}, even)
    assert "not better than every" not in advice.verdict_of(alone, ADVISERS[0])


def test_the_rule_of_thumb_takes_dpo_as_soon_as_risky_failures_are_low():
    class Known:
        path = ("sft", "ppo-7", "ppo-14")

        def __init__(self, *rates):
            self.rates = dict(zip(self.path, rates, strict=True))

        def seen(self, name, metric):
            assert metric == "risky_failure_rate"
            return self.rates[name]

    assert advice.rule_of_thumb(Known(0.02, 0.0, 0.0)) == "dpo"
    assert advice.rule_of_thumb(Known(0.4, 0.05, 0.0)) == "dpo-7"
    assert advice.rule_of_thumb(Known(0.4, 0.3, 0.2)) == "ppo-14"


def test_the_regret_of_n_labels_agrees_with_theory_for_two_policies():
    """Two policies over eight responses, one prompt: the wrong one wins with probability Φ(−d√n / s) and costs d."""
    gold = torch.tensor([[-1.0, -0.5, 0.0, 0.2, 0.4, 0.8, 1.0, 1.5]])
    tables = [torch.log_softmax(torch.tensor([weights], dtype=torch.float64), 1)
              for weights in ([0.0] * 8, [0, 0, 0, 0, 0, 0, 0.8, 0.8])]
    means = [float((table.exp() * gold).sum()) for table in tables]
    spread = math.sqrt(sum(float((table.exp() * gold**2).sum()) - mean**2
                           for table, mean in zip(tables, means, strict=True)))
    apart, rng = means[1] - means[0], np.random.default_rng(0)
    for n in (16, 64):
        expected = apart * NormalDist().cdf(-apart * math.sqrt(n) / spread)
        assert advice.regret_of_labels(gold, tables, n, rng, 4000) == pytest.approx(expected, abs=0.012)
    assert advice.regret_of_labels(gold, tables[:1], 4, rng, 10) == 0


def test_labels_are_asked_of_the_same_prompts_for_every_policy():
    """Prompts differ by 10 in gold, policies by 0.1 on each: with other prompts for each, one label would be a coin."""
    gold = torch.tensor([[0.0, 0.1], [10.0, 10.1]])
    sure = [torch.tensor([[0.0, -99.0]] * 2), torch.tensor([[-99.0, 0.0]] * 2)]
    assert advice.regret_of_labels(gold, sure, 1, np.random.default_rng(0), 200) == 0


def test_a_missing_record_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m experiments.advice"):
        load_advice(tmp_path / "none.json")
    assert advice_record.FREEZING in {f"{n} labels" for n in advice.BUDGETS}
