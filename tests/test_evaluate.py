"""The evaluation's figures against slow hand computations, and its intervals against known truths."""

import itertools
import json
import shutil
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from alignkit.data.encoding import ChatText
from alignkit.desk.world import BEHAVIOURS, KINDS, phrase_counts
from alignkit.errors import DataError, ManifestError, RunError
from alignkit.evaluate.comparison import Comparison, _write, compare, compare_directories
from alignkit.evaluate.evaluation import Evaluation, EvaluationSet, difference, evaluate, evaluation_set, win_rate
from alignkit.formulas.intervals import Bootstrap, Estimate, wilson
from alignkit.forward.rollout import left_pad
from alignkit.forward.sampling import generate_texts
from alignkit.models.loading import load_policy, save_model
from alignkit.runs.frozen import freeze
from alignkit.runs.records import start_run
from alignkit.storage import write_json
from alignkit.task import desk_task


def length_reward(prompts, responses):
    return torch.tensor([len(response) / 50 for response in responses])


@pytest.fixture(scope="module")
def task():
    return desk_task(seed=0)


@pytest.fixture(scope="module")
def policies():
    """Two policies of which the second is the first with other logits: (first, second, tokenizer)."""
    first, tokenizer = load_policy("tiny", seed=0, device="cpu")
    second, _ = load_policy("tiny", seed=0, device="cpu")
    with torch.no_grad():
        second.lm_head.bias[4:15] += torch.linspace(-0.8, 0.8, 11)
    return first, second, tokenizer


@pytest.fixture(scope="module")
def evalset(task):
    return evaluation_set(task, prompts=64, samples=6, seed=3)


@pytest.fixture(scope="module")
def pair(policies, evalset, task):
    first, second, tokenizer = policies
    a = evaluate(first, tokenizer, evalset, ref_policy=first, reward=length_reward, world=task.world, name="sft")
    b = evaluate(second, tokenizer, evalset, ref_policy=first, reward=length_reward, world=task.world, name="ppo",
                 gold_scale=a.gold_scale)
    return a, b


# --- the set


def test_the_set_has_whole_heldout_keys_and_equally_many_of_each_kind(task):
    evalset = evaluation_set(task)
    assert len(evalset.prompts) == 192 and len(set(evalset.keys)) == 48
    assert Counter(evalset.kinds) == {kind: 48 for kind in KINDS}
    assert all(task.world.find(prompt).held_out for prompt in evalset.prompts)
    assert set(Counter(evalset.keys).values()) == {4}
    assert evaluation_set(task) == evalset != evaluation_set(task, seed=1)
    few = SimpleNamespace(heldout_prompts=["a", "b", "c"], heldout_keys=[0, 1, 2], heldout_kinds=["all"] * 3,
                          max_new_tokens=8)
    assert sorted(evaluation_set(few, prompts=192).prompts) == ["a", "b", "c"]
    assert len(evaluation_set(few, prompts=2).prompts) == 2


def test_the_set_survives_a_file_and_a_changed_file_is_refused(evalset, tmp_path):
    path = tmp_path / "evaluation_set.json"
    evalset.save(path)
    assert EvaluationSet.load(path) == evalset and EvaluationSet.load(path).hash == evalset.hash
    stored = json.loads(path.read_text())
    for name, value in {"seed": 4, "samples": 7, "prompts": evalset.prompts[::-1], "keys": [0] * 64}.items():
        path.write_text(json.dumps({**stored, name: value}))
        with pytest.raises(ValueError, match="changed after it was frozen"):
            EvaluationSet.load(path)
    chat = EvaluationSet((ChatText("<bos>hello"),), (0,), ("all",))
    chat.save(path)
    assert isinstance(EvaluationSet.load(path).prompts[0], ChatText)
    assert chat.hash != EvaluationSet(("<bos>hello",), (0,), ("all",)).hash


@pytest.mark.parametrize("broken", [{"keys": (1,)}, {"kinds": ()}, {"samples": 0}, {"max_new_tokens": 0}])
def test_a_set_that_does_not_fit_together_is_refused(broken):
    with pytest.raises(ValueError, match=f"{next(iter(broken))}.*expected"):
        EvaluationSet(**{"prompts": ("a", "b"), "keys": (0, 1), "kinds": ("all", "all"), **broken})


# --- the metrics, against loops


def test_metrics_equal_slow_hand_computations(pair, evalset, task):
    _, b = pair
    rows, mean = b.rows(), lambda values: sum(values) / len(values)
    gold = [(row["gold"] - b.gold_scale[0]) / b.gold_scale[1] for row in rows]
    risky = [row["behaviour"] in ("unsafe", "answer", "wrong answer") for row in rows if row["kind"] == "risky"]
    safe = [row["behaviour"] == "refuse" for row in rows if row["kind"] in ("benign", "look-alike")]
    by_prompt, by_key = {}, {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row)
        by_key.setdefault(row["key"], {}).setdefault(row["prompt"], []).append(row["behaviour"])
    alike = [mean([x["behaviour"] == y["behaviour"] for x, y in itertools.permutations(group, 2)])
             for group in by_prompt.values()]
    paraphrases = [mean([x == y for x in one for y in other])
                   for prompts in by_key.values() for one, other in itertools.combinations(prompts.values(), 2)]
    words = {prompt: [row["response"].split() for row in group] for prompt, group in by_prompt.items()}
    pairs_of_words = [[pair for response in group for pair in itertools.pairwise(response)] for group in words.values()]
    expected = {
        "gold_mean": mean(gold), "proxy_mean": mean([len(row["response"]) / 50 for row in rows]),
        "kl_to_sft": mean([row["logp"] - row["ref_logp"] for row in rows]),
        "risky_failure_rate": mean(risky), "over_refusal_rate": mean(safe),
        "paraphrase_agreement": mean(paraphrases), "self_agreement": mean(alike),
        "answered_gold": mean([value for value, row in zip(gold, rows, strict=True)
                               if row["behaviour"] != "refuse" and row["kind"] != "risky"]),
        "entropy": sum(row["entropy"] for row in rows) / sum(row["tokens"] for row in rows),
        "sequence_entropy": -mean([row["logp"] for row in rows]),
        "length": mean([sum(row["phrases"]) for row in rows]), "eos_rate": mean([row["finished"] for row in rows]),
        "distinct_2": sum(len(set(group)) for group in pairs_of_words) / sum(map(len, pairs_of_words)),
    }
    for name, value in expected.items():
        assert b.metrics[name].value == pytest.approx(value, abs=1e-6), name
        assert b.metrics[name].low < value < b.metrics[name].high, name
    for kind in KINDS:
        counts = Counter(row["behaviour"] for row in rows if row["kind"] == kind)
        for behaviour in BEHAVIOURS:
            assert b.behaviour_shares[kind][behaviour].value == pytest.approx(counts[behaviour] / counts.total())


def test_responses_come_from_the_policy_that_is_asked(policies, evalset, task):
    """The same rates as `generate_texts` gives, which has no order of its own, within sampling noise."""
    first, _, tokenizer = policies
    many = EvaluationSet(**{**vars(evalset), "samples": 30})
    found = evaluate(first, tokenizer, many, world=task.world, batch_size=100)
    texts = generate_texts(first, tokenizer, list(many.prompts), max_new_tokens=4, seed=1, samples=30)
    prompts = [prompt for prompt in many.prompts for _ in range(30)]
    behaviours = np.array(task.world.behaviours(prompts, [text for group in texts for text in group]))
    for kind in KINDS:
        of_kind = behaviours[np.repeat(many.kinds, 30) == kind]
        for behaviour in BEHAVIOURS:
            share = found.behaviour_shares[kind][behaviour].value
            assert share == pytest.approx((of_kind == behaviour).mean(), abs=4.5 * np.sqrt(2 * 0.25 / len(of_kind)))


@torch.no_grad()
def test_prompts_of_different_lengths_keep_their_responses(policies, evalset, task, monkeypatch):
    """They are sampled in another order than they are reported in."""
    _, second, tokenizer = policies
    encoded = [[tokenizer.bos_token_id] * (1 + 7 * number % 5) + tokenizer(prompt, add_special_tokens=False).input_ids
               for number, prompt in enumerate(evalset.prompts)]
    monkeypatch.setattr("alignkit.evaluate.evaluation.encode_prompts",
                        lambda tokenizer, prompts: left_pad(encoded, tokenizer.pad_token_id))
    found = evaluate(second, tokenizer, evalset, reward=length_reward, world=task.world, batch_size=50)
    for number, row in enumerate(found.rows()):
        asked, said = [row["prompt"]], [row["response"]]
        assert row["proxy"] == length_reward(asked, said) and row["phrases"] == phrase_counts(said)[0].tolist()
        assert row["gold"] == task.world.gold_scores(asked, said)[0]
        assert [row["behaviour"]] == task.world.behaviours(asked, said)
        if number % 17 == 0:
            response = tokenizer(row["response"], add_special_tokens=False).input_ids
            response += [tokenizer.eos_token_id] * row["finished"]
            ids = torch.tensor([encoded[number // 6] + response])
            logprobs = second(input_ids=ids).logits[0, -len(response) - 1 : -1].log_softmax(-1)
            logp = sum(float(logprobs[place, token]) for place, token in enumerate(response))
            assert row["logp"] == pytest.approx(logp, abs=1e-4)


@torch.no_grad()
def test_log_probs_entropy_and_kl_equal_a_slow_reference(policies, evalset, monkeypatch):
    """Token by token, no batch, no padding, no cache, in float64 at the end; against small batches."""
    monkeypatch.setattr("alignkit.evaluate.evaluation.LOGITS", 2000)
    first, second, tokenizer = policies
    found = evaluate(second, tokenizer, evalset, ref_policy=first, batch_size=50)
    for row, token_kl in list(zip(found.rows(), found.columns["token_kl"], strict=True))[::37]:
        ids = tokenizer(row["prompt"]).input_ids
        response = tokenizer(row["response"], add_special_tokens=False).input_ids
        response += [tokenizer.eos_token_id] * row["finished"]
        logp = ref_logp = entropy = k3 = 0.0
        kls = []
        for token in response:
            p, q = (policy(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
                    for policy in (second, first))
            log_ratio = float(q[token] - p[token])
            logp, ref_logp = logp + float(p[token]), ref_logp + float(q[token])
            k3 += np.exp(log_ratio) - 1 - log_ratio
            supported = p > -100
            entropy -= float((p.exp() * p)[supported].sum())
            kls.append(float((p.exp() * (p - q))[supported].sum()))
            ids = [*ids, token]
        measured = [row["logp"], row["ref_logp"], row["entropy"], row["k3"], row["length"], row["tokens"]]
        length = len(response)
        assert measured == pytest.approx([logp, ref_logp, entropy, k3, length - row["finished"], length], abs=1e-4)
        assert token_kl == pytest.approx(kls, abs=1e-4)


def test_three_estimates_of_one_kl_agree_and_the_reference_is_at_zero(pair):
    a, b = pair
    assert a.metrics["kl_to_sft"] == a.metrics["kl_rao_blackwell"] == Estimate(0.0, 0.0, 0.0)
    k1, k3, exact = (b.metrics[name] for name in ("kl_to_sft", "kl_k3", "kl_rao_blackwell"))
    assert exact.value > 0.3
    for estimate in (k1, k3):
        assert abs(estimate.value - exact.value) < estimate.high - estimate.low
    assert exact.high - exact.low < k1.high - k1.low, "the Rao–Blackwellised estimate has less noise"
    assert b.kl_by_prompt.mean() == pytest.approx(exact.value)
    by_position = b.kl_by_position()
    alive = np.array([[len(row) > t for t in range(4)] for row in b.columns["token_kl"]]).mean(0)
    assert (by_position * alive).sum() == pytest.approx(exact.value)
    assert b.kl_by_position("risky") != pytest.approx(by_position)


def test_every_checkpoint_gets_the_same_random_numbers(pair, policies, evalset, task):
    first, second, tokenizer = policies
    again = evaluate(second, tokenizer, evalset, ref_policy=first, reward=length_reward, world=task.world,
                     gold_scale=pair[0].gold_scale, name="ppo")
    assert again.columns == pair[1].columns
    same = np.mean([x == y for x, y in zip(pair[0].columns["response"], pair[1].columns["response"], strict=True)])
    other = evaluate(first, tokenizer, EvaluationSet(**{**vars(evalset), "seed": 9}), world=task.world)
    chance = np.mean([x == y for x, y in zip(pair[0].columns["response"], other.columns["response"], strict=True)])
    assert same > 3 * chance


def test_without_a_world_nothing_is_invented(policies, evalset):
    first, second, tokenizer = policies
    plain_set = EvaluationSet(evalset.prompts, range(64), ("all",) * 64, samples=4, max_new_tokens=3)
    found = evaluate(second, tokenizer, plain_set, ref_policy=first, reward=length_reward)
    assert found.metrics.keys() == {
        "proxy_mean", "kl_to_sft", "kl_k3", "kl_rao_blackwell", "entropy", "sequence_entropy", "length", "eos_rate",
        "self_agreement", "distinct_1", "distinct_2"}
    groups = [found.columns["response"][i : i + 4] for i in range(0, 256, 4)]
    equal = np.mean([[x == y for x, y in itertools.combinations(group, 2)] for group in groups])
    assert found.metrics["self_agreement"].value == pytest.approx(equal)
    assert found.behaviour_shares == {} and found.gold_scale is None
    bare = evaluate(second, tokenizer, EvaluationSet(("How do I?",), (0,), ("all",), samples=1))
    assert not {"proxy_mean", "kl_to_sft", "self_agreement"} & bare.metrics.keys()
    assert bare.metrics["length"].low is None, "one key cannot tell an interval"
    json.dumps(bare.summary(), allow_nan=False)


def test_a_reward_that_is_nan_is_refused(policies, evalset):
    with pytest.raises(ValueError, match=r"dpo\.proxy\[3\] is nan"):
        evaluate(policies[0], policies[2], evalset, name="dpo",
                 reward=lambda prompts, responses: [float("nan") if i == 3 else 0.0 for i in range(len(responses))])


def test_an_evaluation_survives_a_file(pair, tmp_path):
    pair[1].save(tmp_path / "evaluation.json")
    loaded = Evaluation.load(tmp_path / "evaluation.json")
    assert loaded == pair[1] and loaded.metrics == pair[1].metrics
    text = (tmp_path / "evaluation.json").read_text()
    (tmp_path / "evaluation.json").write_text(text.replace('"samples": 6', '"samples": 7', 1))
    with pytest.raises(ValueError, match="changed after it was frozen"):
        Evaluation.load(tmp_path / "evaluation.json")


def test_summary_has_the_fields_that_others_rely_on(pair):
    summary = pair[1].summary()
    for name in ("gold_mean", "proxy_mean", "kl_to_sft", "risky_failure_rate", "over_refusal_rate",
                 "paraphrase_agreement", "entropy"):
        assert isinstance(summary[name], float), name
    for name in ("gold", "over_refusal", "risky_failure", "paraphrase_agreement"):
        low, high = summary[f"{name}_ci95"]
        assert low <= high
    assert pair[0].summary()["gold_mean"] == pytest.approx(0), "the SFT stage is the zero of its own scale"
    assert summary["evaluation_set"] == pair[1].set.hash
    json.dumps(summary, allow_nan=False)


# --- intervals


def clustered(rng, keys=48, per_key=32, spread=1.0, shift=0.0):
    """Values (keys, per_key) with mean `shift`: what keys have in common, and noise of each response."""
    return shift + spread * rng.normal(size=(keys, 1)) + rng.normal(size=(keys, per_key))


def covers(estimate, truth):
    return estimate.low <= truth <= estimate.high


@pytest.mark.parametrize("keys", [48, 12])
def test_intervals_cover_the_truth_where_naive_ones_do_not(keys):
    rng, bootstrap, weights = np.random.default_rng(0), Bootstrap([0] * keys), np.full((1, keys), 32.0)
    good = naive = 0
    for _ in range(300):
        values = clustered(rng, keys)
        [estimate] = bootstrap.estimates(values.sum(1)[None], weights)
        good += covers(estimate, 0.0)
        half = 1.96 * values.std() / np.sqrt(values.size)
        naive += abs(values.mean()) <= half
    assert good / 300 >= 0.92
    assert naive / 300 < 0.6


def test_intervals_of_a_share_with_unequal_keys_cover():
    """A rate over the keys of one class only, with different numbers of responses in each: a ratio of sums."""
    rng, bootstrap = np.random.default_rng(1), Bootstrap([0] * 40 + [1] * 40)
    good = 0
    for _ in range(300):
        numbers = rng.integers(4, 33, size=80) * (np.arange(80) < 40)
        hits = rng.binomial(numbers, rng.beta(2, 3, size=80))
        [estimate] = bootstrap.estimates(hits[None].astype(float), numbers[None].astype(float))
        good += covers(estimate, 0.4)
    assert good / 300 >= 0.92


def test_strata_that_differ_do_not_widen_the_interval():
    rng, strata = np.random.default_rng(2), np.repeat([0, 1, 2, 3], 12)
    stratified, pooled, weights = Bootstrap(strata), Bootstrap([0] * 48), np.full((1, 48), 32.0)
    good, ratios = 0, []
    for _ in range(300):
        values = clustered(rng, 48, spread=0.5) + 3.0 * strata[:, None]
        [own], [other] = (each.estimates(values.sum(1)[None], weights) for each in (stratified, pooled))
        good += covers(own, 4.5)
        ratios.append((own.high - own.low) / (other.high - other.low))
    assert good / 300 >= 0.92 and np.mean(ratios) < 0.3


def test_paired_differences_cover_and_are_narrower_than_unpaired():
    rng, bootstrap, weights = np.random.default_rng(3), Bootstrap([0] * 48), np.full((1, 48), 32.0)
    good, paired, unpaired = 0, [], []
    for _ in range(300):
        common = clustered(rng, 48, per_key=1)
        a, b = (common + 0.5 * rng.normal(size=(48, 32)) for _ in range(2))
        first, second = ((values.sum(1)[None], weights) for values in (a, b + 0.2))
        [change] = bootstrap.differences(first, second)
        assert change.value == pytest.approx((b + 0.2 - a).mean())
        good += covers(change, 0.2)
        paired.append(change.high - change.low)
        apart = [bootstrap.estimates(*sums)[0] for sums in (first, second)]
        unpaired.append(np.hypot(*(each.high - each.low for each in apart)))
    assert good / 300 >= 0.92 and np.mean(paired) < 0.3 * np.mean(unpaired)


def test_an_evaluation_draws_keys_within_their_kind(pair):
    """With as many keys of each kind in every resample, and the same draws for every checkpoint of the set."""
    evalset, weights = pair[1].set, pair[1].bootstrap.weights
    kind_of = dict(zip(evalset.keys, evalset.kinds, strict=True))
    of_key = np.array([kind_of[key] for key in sorted(kind_of)])
    for kind in KINDS:
        assert (weights[:, of_key == kind].sum(1) == 4).all()
    assert np.array_equal(weights, pair[0].bootstrap.weights)
    gold = (np.array(pair[1].columns["gold"]) - pair[1].gold_scale[0]) / pair[1].gold_scale[1]
    sums = np.array([gold[np.repeat(evalset.keys, 6) == key].sum() for key in sorted(kind_of)])
    [estimate] = Bootstrap(of_key, seed=evalset.seed).estimates(sums[None], np.full((1, 16), 24.0))
    assert vars(estimate) == pytest.approx(vars(pair[1].metrics["gold_mean"]))


def test_two_thousand_resamples_of_every_metric_take_well_under_a_second(pair):
    fresh = Evaluation(pair[1].set, pair[1].columns, pair[1].gold_scale)
    start = time.process_time()  # which other work on the machine hardly changes
    assert fresh.bootstrap.weights.shape == (2000, 16) and len(fresh.metrics) > 14
    assert time.process_time() - start < 0.7


def test_rates_at_the_edge_have_wilson_intervals(pair, evalset):
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)
    assert all(wilson(0, n)[0] == 0 and wilson(n, n)[1] == 1 for n in range(1, 200))  # no 3e-18 in a notebook
    never = Evaluation(evalset, {**pair[1].columns, "behaviour": ["hedge"] * 384}, (0.0, 1.0))
    risky = evalset.kinds.count("risky")
    assert never.metrics["risky_failure_rate"] == Estimate(0.0, *wilson(0, risky))
    assert never.metrics["over_refusal_rate"] == Estimate(0.0, *wilson(0, 2 * risky))
    assert never.metrics["paraphrase_agreement"].value == never.metrics["self_agreement"].value == 1


def test_estimates_print_and_know_zero():
    assert f"{Estimate(0.1234, 0.1, 0.15):.1%}" == "12.3% [10.0%, 15.0%]" and str(Estimate(1.0, None, None)) == "1.000"
    assert Estimate(0.1, 0.05, 0.2).excludes_zero and Estimate(-0.1, -0.2, -0.05).excludes_zero
    assert not Estimate(0.1, -0.1, 0.2).excludes_zero and not Estimate(0.1, None, None).excludes_zero


# --- comparisons


def test_difference_is_second_minus_first_and_narrower_than_either(pair):
    a, b = pair
    for metric in a.metrics:
        change = difference(a, b, metric)
        assert change.value == pytest.approx(b.metrics[metric].value - a.metrics[metric].value, abs=1e-9)
        back = difference(b, a, metric)
        assert (back.value, back.low, back.high) == pytest.approx((-change.value, -change.high, -change.low), abs=1e-9)
    assert difference(a, a, "gold_mean") == Estimate(0.0, 0.0, 0.0)


def test_what_cannot_be_paired_is_refused(pair, policies, evalset, task):
    a, b = pair
    reseeded = EvaluationSet(**{**vars(evalset), "seed": 9})
    other = evaluate(policies[0], policies[2], reseeded, world=task.world, name="other")
    with pytest.raises(ValueError, match="sft and other were not asked the same evaluation set"):
        difference(a, other, "length")
    with pytest.raises(ValueError, match="has no 'golden', expected one of gold_mean"):
        difference(a, b, "golden")
    unscaled = Evaluation(b.set, b.columns, (0.0, 1.0), "unscaled")
    with pytest.raises(ValueError, match="gold is in different units"):
        compare({"sft": a, "unscaled": unscaled})
    with pytest.raises(ValueError, match="evaluations is empty"):
        compare({})


def test_win_rate_counts_all_pairs_of_samples_and_halves_ties(pair):
    a, b = pair
    golds = [np.array(each.columns["gold"]).reshape(-1, 6) for each in pair]
    wins = [1.0 if y > x + 1e-12 else 0.5 if abs(y - x) <= 1e-12 else 0.0
            for first, second in zip(*golds, strict=True) for x in first for y in second]
    found = win_rate(a, b)
    assert found.value == pytest.approx(np.mean(wins)) and found.low < found.value < found.high
    assert win_rate(b, a).value == pytest.approx(1 - found.value) and win_rate(a, a).value == 0.5
    with pytest.raises(ValueError, match="has no 'human' scores"):
        win_rate(a, b, "human")


def test_comparison_as_text_table_csv_and_json(pair):
    comparison = compare(dict(zip(("sft", "ppo"), pair, strict=True)), notes=["One note."])
    assert isinstance(comparison, Comparison) and comparison.reference == "sft"
    text = str(comparison)
    kl = pair[1].metrics["kl_to_sft"]
    assert f"{kl:.2f}*" in text and "KL to sft, nats" in text and "One note." in text
    assert "| gold reward, SFT-sd |" in comparison.markdown()
    rows = comparison.table()
    assert [row["checkpoint"] for row in rows] == ["sft", "ppo"] and rows[1]["win_rate_gold"] == win_rate(*pair)
    lines = comparison.to_csv().splitlines()
    change = difference(*pair, "length")
    [line] = [line for line in lines if line.startswith("ppo,length,")]
    assert [float(cell) for cell in line.split(",")[2:]] == [
        getattr(estimate, end) for estimate in (pair[1].metrics["length"], change) for end in ("value", "low", "high")]
    stored = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert stored["differences"]["ppo"]["length"] == {"value": change.value, "low": change.low, "high": change.high}
    assert stored["checkpoints"]["ppo"]["gold_mean"] == pair[1].metrics["gold_mean"].value
    assert {sample["kind"] for sample in stored["samples"]} == set(KINDS)
    assert stored["samples"][0]["responses"].keys() == {"sft", "ppo"}
    alone = compare({"sft": pair[0]})
    assert alone.differences == {} and "sft" in str(alone)


def test_what_a_model_says_is_text_on_the_page(pair, tmp_path):
    evil = "<script>alert(1)</script><button data-commandlinker-command=x>\x1b[31m\u202egnp.exe"
    said = Evaluation(pair[0].set, {**pair[0].columns, "response": [evil] * 384}, pair[0].gold_scale)
    _write(compare({"<b>sft</b>": said}), tmp_path)
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)" in page and "&lt;b&gt;sft" in page
    assert not [mark for mark in ("<script", "<button", "<b>", "\x1b", "\u202e") if mark in page]


@pytest.fixture(scope="module")
def run(policies, tmp_path_factory):
    """A run with an SFT checkpoint and a frozen one."""
    run = start_run(tmp_path_factory.mktemp("runs") / "run", "tiny", "desk", 5)
    first, second, tokenizer = policies
    save_model(first, tokenizer, run / "sft")
    save_model(second, tokenizer, run / "ppo")
    evaluation_set(desk_task(seed=5), prompts=32, samples=2).save(run / "evaluation_set.json")
    freeze(run / "ppo", run / "frozen", parent=run / "sft", evaluation_set_hash="0" * 64)
    return run


def test_folders_are_compared_on_the_set_of_their_run(run, tmp_path):
    comparison = compare_directories([run / "sft", run / "frozen"], out=tmp_path / "out", reward=length_reward)
    assert list(comparison.evaluations) == ["sft", "frozen"]
    assert comparison.evaluations["frozen"].set == EvaluationSet.load(run / "evaluation_set.json")
    assert comparison.evaluations["frozen"].gold_scale == comparison.evaluations["sft"].gold_scale
    assert any("frozen was frozen with another evaluation set" in note for note in comparison.notes)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"compare.md", "compare.csv", "compare.json", "compare.html", "intervals.png", "behaviour.png",
                       "tradeoff.png"}
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "risky failures" in page and "<script" not in page
    elsewhere = compare_directories([run / "sft", run / "ppo"], seed=1, prompts=16, samples=1)
    assert len(elsewhere.evaluations["sft"].set.prompts) == 16
    assert "proxy_mean" not in elsewhere.evaluations["sft"].metrics


@pytest.mark.parametrize("low", [0.48, 0.52])
def test_a_comparison_warns_of_a_reward_model_that_ranks_like_a_coin(run, tmp_path, capsys, low):
    from alignkit.desk.tiny import tiny_reward_model
    from alignkit.jobs.cli import main
    from alignkit.reward import RewardScorer

    run = shutil.copytree(run, tmp_path / "run")
    tokenizer = load_policy(run / "sft")[1]
    RewardScorer(tiny_reward_model(tokenizer), tokenizer).save(run / "reward")
    write_json(run / "reward" / "results.json", {"accuracy_labels": 0.53, "accuracy_labels_ci95": [low, 0.6]})
    assert main(["compare", str(run / "sft"), str(run / "ppo"), "--out", str(tmp_path / "out")]) == 0
    line = "The reward model cannot be told from a coin: it ranks 53.0%"
    page = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    assert (line in capsys.readouterr().out) == ('class="alert"' in page) == (line in page) == (low < 0.5)
    assert (line in (tmp_path / "out" / "compare.md").read_text(encoding="utf-8")) == (low < 0.5)


def test_a_comparison_takes_the_data_of_the_run_and_fetches_no_name_of_a_file(run, tmp_path):
    copied = shutil.copytree(run, tmp_path / "run")
    write_json(copied / "run.json", {"model": "tiny", "data": "owner/pairs", "seed": 5})
    with pytest.raises(RunError, match="is a run of data 'owner/pairs', .* not fetched: give it, --data owner/pairs"):
        compare_directories([copied / "sft", copied / "ppo"])
    (tmp_path / "none.jsonl").write_text("{}\n")
    write_json(copied / "run.json", {"model": "tiny", "data": str(tmp_path / "none.jsonl"), "seed": 5})
    with pytest.raises(DataError, match=r"none\.jsonl"):  # it is read, and has no rows
        compare_directories([copied / "sft", copied / "ppo"])
    assert compare_directories([copied / "sft", copied / "ppo"], "desk", prompts=8, samples=1).evaluations


def test_the_desk_world_and_another_models_tokenizer_are_one_sentence(tmp_path, capsys):
    from test_ends import bytes_tokenizer, policy_of

    from alignkit.jobs.cli import main

    tokenizer = bytes_tokenizer()
    save_model(policy_of(tokenizer), tokenizer, tmp_path / "other")
    given = ["compare", str(tmp_path / "other"), "--data", "desk", "--out", str(tmp_path / "out")]
    assert main(given) == 1 and "data is 'desk', whose sentences this model's tokenizer does not have" in (
        capsys.readouterr().err)


def test_a_frozen_checkpoint_with_a_changed_byte_is_refused(run, tmp_path):
    changed = freeze(run / "ppo", tmp_path / "changed")
    weights = changed / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 4
    weights.write_bytes(content)
    load_policy(changed)  # it still loads: only the hash tells
    with pytest.raises(ManifestError, match=r"model\.safetensors has other bytes"):
        compare_directories([run / "sft", changed])
    with pytest.raises(ManifestError, match=r"nowhere"):
        compare_directories([run / "sft", tmp_path / "nowhere"])
    with pytest.raises(ManifestError, match="given twice"):
        compare_directories([run / "sft", run / "sft"])


def test_folders_of_one_name_are_told_apart(run, tmp_path):
    save_model(*load_policy(run / "sft"), tmp_path / "other" / "sft")
    comparison = compare_directories([run / "sft", tmp_path / "other" / "sft"], seed=0, prompts=16, samples=1)
    assert list(comparison.evaluations) == ["run/sft", "other/sft"]
