"""The regret of the adviser: worlds made in small, regret by hand, labels against theory, and a record that agrees."""

import json
import math
from dataclasses import asdict
from statistics import NormalDist

import numpy as np
import pytest
import torch

from alignkit.configs import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from alignkit.errors import RunError
from alignkit.evaluate import advice_record
from alignkit.evaluate.advice_record import ADVISERS, AdviceRecord, AdvisedWorld, load_advice
from alignkit.evaluate.advised_run import advise_run, rows_of
from alignkit.evaluate.decision import DECISIONS
from alignkit.evaluate.evaluation import Evaluation, EvaluationSet
from alignkit.jobs import cli
from alignkit.storage import write_json
from experiments import advice, advice_worlds
from experiments.claims.lab import DOCS
from experiments.sweep import write_compact

TINY = advice_worlds.Size(
    demonstrations=300, every=1, steps=2, judged=1, questions=3, samples=2, normalise=64,
    sft=SFTConfig(epochs=1, batch_size=64), reward=RewardConfig(batch_size=32), dpo=DPOConfig(batch_size=32),
    ppo=PPOConfig(iterations=2, prompts_per_iteration=16, minibatch_size=16, epochs=1))


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """A record of one world in small, written and read again."""
    folder = tmp_path_factory.mktemp("advice")
    made = advice.run([41], folder, TINY)
    write_compact(folder / "advice.json", {"command": "python -m experiments.advice", "versions": {}, **made})
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
    assert "has less regret than bad; cannot be told from same" in said and "*same* has the least" in said
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


# ---- alignkit advise RUN
def evaluation(name: str, proxy: float, kl: float, gold: float | None = None, prompts: int = 12) -> Evaluation:
    """A stored evaluation made by hand: two responses to each prompt, scores around `proxy`."""
    evalset = EvaluationSet([f"prompt {n}" for n in range(prompts)], range(prompts), ["all"] * prompts, samples=2)
    n, rng = 2 * prompts, np.random.default_rng(0)
    noise = rng.normal(0, 0.1, n)
    columns = {"response": [" yes"] * n, "length": [2] * n, "tokens": [3] * n, "finished": [True] * n,
               "logp": [-2.0] * n, "entropy": [3.0] * n, "ref_logp": [-2.0 - kl] * n, "k3": [kl] * n,
               "token_kl": [[kl]] * n, "proxy": (proxy + noise).tolist()}
    if gold is not None:
        columns |= {"gold": (gold + noise).tolist(), "behaviour": ["answer"] * n, "phrases": [[0] * 11] * n}
    return Evaluation(evalset, columns, None if gold is None else (0.0, 1.0), name)


def stored(run, **evaluations):
    """A run directory with these evaluations."""
    run.mkdir(exist_ok=True)
    write_json(run / "run.json", {"model": "tiny", "data": "pairs.jsonl", "seed": 0})
    for stage, each in evaluations.items():
        (run / stage).mkdir(exist_ok=True)
        each.save(run / stage / "evaluation.json")
    return run


def test_a_real_run_without_gold_is_advised_and_told_what_is_not_known(tmp_path, capsys):
    run = stored(tmp_path / "run", sft=evaluation("SFT", 0.0, 0.0), ppo=evaluation("PPO", 1.0, 0.3))
    (run / "reward").mkdir()
    write_json(run / "reward" / "results.json", {"accuracy_labels": 0.7, "accuracy_labels_ci95": [0.66, 0.74]})
    for stage, seconds in (("sft", 10.0), ("ppo", 60.0)):
        write_json(run / stage / "results.json", {"training_seconds": seconds})
    answer = advise_run(run)
    assert (answer.decision, answer.step) == ("stay in PPO", "ppo")
    assert cli.main(["advise", str(run)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("stay in PPO, from ppo\n") and "70.0% [66.0%, 74.0%]" in said and "took 60 s" in said
    assert "not known: whether people would agree" in said and "\nnot known: whether risky prompts" in said
    write_json(run / "reward" / "results.json", {"accuracy_labels": 0.52, "accuracy_labels_ci95": [0.48, 0.56]})
    assert advise_run(run).decision == "neither: repair first"


def test_an_unfinished_run_is_advised_by_what_it_has(tmp_path):
    run = stored(tmp_path / "run", sft=evaluation("SFT", 0.0, 0.0, 0.0))
    (run / "ppo").mkdir()
    row = {"objective/scores": 1.0, "policy/approxkl_avg": 0.9, "val/explained_variance": -0.5}
    text = "\n".join(json.dumps(row) for _ in range(8)) + '\n{"objective/sco'  # killed while it wrote a row
    (run / "ppo" / "metrics.jsonl").write_text(text, encoding="utf-8")
    answer = advise_run(run)
    assert (answer.decision, answer.step) == ("stay in PPO", "sft")
    assert any("learning rate is too high" in reason for reason in answer.reasons)
    assert answer.unknown[-1] == "what PPO has become: 8 steps are logged, and it is not evaluated yet."
    (run / "ppo.new").mkdir()  # made again: its log counts, not that of the stage it replaces
    (run / "ppo.new" / "metrics.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert len(rows_of(run, "ppo")) == 1


def test_what_cannot_be_advised_is_an_error_that_says_what_to_do(tmp_path, capsys):
    with pytest.raises(RunError, match="is no run directory"):
        advise_run(tmp_path / "nowhere")
    run = stored(tmp_path / "run")
    with pytest.raises(RunError, match="nothing was evaluated yet: run notebook 01"):
        advise_run(run)
    assert cli.main(["advise", str(run)]) == 1 and "Traceback" not in capsys.readouterr().err
    stored(run, sft=evaluation("SFT", 0.0, 0.0), ppo=evaluation("PPO", 1.0, 0.3, prompts=13))
    with pytest.raises(RunError, match=r"not asked the same evaluation set.*--restart"):
        advise_run(run)
    (run / "sft" / "evaluation.json").write_text("{}", encoding="utf-8")
    with pytest.raises(RunError, match="no evaluation"):
        advise_run(run)


# ---- the shipped record
def test_the_shipped_record_and_its_page_agree():
    shipped = load_advice()
    assert (DOCS / "advice.md").read_text(encoding="utf-8") == advice.page(shipped)
    assert shipped.rules == advice.SHOWN and len({world.seed for world in shipped.worlds}) == len(shipped.worlds)
    for each in shipped.worlds:
        assert each.seed in advice.SEEDS and each.trouble == asdict(advice_worlds.trouble(each.seed))
        assert set(each.picks) == set(shipped.rules) and set(each.picks.values()) <= set(each.candidates)
        assert all(each.walks[one][-1][1] == each.picks[one] for one in ADVISERS)
    assert set(shipped.freezing) == {each.seed for each in shipped.worlds}
    assert str(shipped.settings) == str(advice_worlds.Size().key())
