"""The reward model: one score however it is read, its training, its report against slow numbers, refusals."""

import copy
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from alignkit.configs import RewardConfig
from alignkit.desk.tiny import desk_tokenizer, tiny_reward_model
from alignkit.desk.world import PHRASES, SENTENCES, World, phrase_counts, render
from alignkit.evaluate.reward_model import expected_calibration_error, reward_report
from alignkit.formulas.intervals import wilson
from alignkit.models.heads import reward_model_from
from alignkit.models.loading import load_policy
from alignkit.reward import RewardScorer, load_reward, train_reward_model

WORLD = World(0)
TOKENIZER = desk_tokenizer()
RNG = np.random.default_rng(0)
PROMPTS = [prompt.text * (1 + number % 2) for number, prompt in enumerate(WORLD.train_prompts[::90])]  # ragged
RESPONSES = [render(RNG.choice(PHRASES, size=RNG.integers(0, 5))) for _ in PROMPTS]


def noisy_model(seed=1):
    """A reward model whose weights are large enough that scores differ."""
    model = tiny_reward_model(TOKENIZER, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3, generator=generator)
    return model


@pytest.fixture(scope="module")
def scorer():
    return RewardScorer(noisy_model(), TOKENIZER)


def rows_of(prompts, responses, tokenizer=TOKENIZER):
    """Token ids of each prompt, response and EOS; written apart from the package's own."""
    return [[*tokenizer(prompt + response).input_ids, tokenizer.eos_token_id]
            for prompt, response in zip(prompts, responses, strict=True)]


# One score, however it is read.


@torch.no_grad()
def test_a_score_is_what_hugging_face_s_classifier_says(scorer):
    rows = rows_of(PROMPTS, RESPONSES)
    batch = TOKENIZER.pad({"input_ids": rows}, return_tensors="pt", padding_side="right")
    assert not batch.attention_mask.all(), "the rows should need padding"
    expected = scorer.model(**batch).logits[:, 0]
    scores = scorer.raw(PROMPTS, RESPONSES)
    assert scores.shape == (len(rows),) and scores.std() > 0.1
    assert torch.allclose(scores, expected, atol=1e-5)


def test_neither_padding_nor_the_batch_changes_a_score():
    scorer = RewardScorer(noisy_model().double(), TOKENIZER)
    scores = scorer.raw(PROMPTS, RESPONSES)
    for size in (1, 7):
        assert torch.allclose(scorer.raw(PROMPTS, RESPONSES, batch_size=size), scores, rtol=0, atol=1e-6)
    backwards = scorer.raw(PROMPTS[::-1], RESPONSES[::-1])
    assert torch.allclose(backwards.flip(0), scores, rtol=0, atol=1e-6)
    assert scorer.raw([], []).shape == (0,)


@torch.no_grad()
def test_the_score_is_read_at_eos_even_where_padding_is_eos(scorer):
    """Hugging Face's classifier reads the last token that is not padding: where EOS pads, the one before EOS."""
    tokenizer, model = copy.deepcopy(TOKENIZER), copy.deepcopy(scorer.model)
    tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.eos_token_id
    trap = RewardScorer(model, tokenizer).raw(PROMPTS, RESPONSES)
    assert torch.allclose(trap, scorer.raw(PROMPTS, RESPONSES), atol=1e-5)
    batch = tokenizer.pad({"input_ids": rows_of(PROMPTS, RESPONSES, tokenizer)}, return_tensors="pt",
                          padding_side="right")
    assert not torch.allclose(model(**batch).logits[:, 0], trap, atol=0.05)


def test_a_response_without_its_eos_would_score_differently(scorer):
    """The empty response is scored at EOS too, and EOS is not an ordinary token."""
    one, other = scorer.raw(PROMPTS[:1] * 2, ["", SENTENCES["POLITE"]])
    assert abs(float(one - other)) > 1e-3
    swapped = copy.deepcopy(TOKENIZER)
    swapped.eos_token = SENTENCES["FILLER"]
    assert not torch.allclose(RewardScorer(scorer.model, swapped).raw(PROMPTS, RESPONSES),
                              scorer.raw(PROMPTS, RESPONSES), atol=0.01)


# Normalisation.


def test_normalised_scores_have_mean_0_and_standard_deviation_1(scorer):
    normal = scorer.normalised(PROMPTS, RESPONSES)
    scores = normal(PROMPTS, RESPONSES)
    assert float(scores.mean()) == pytest.approx(0, abs=1e-5) and float(scores.std()) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(normal.raw(PROMPTS, RESPONSES), scorer.raw(PROMPTS, RESPONSES))
    assert torch.allclose(scores * normal.std + normal.mean, scorer.raw(PROMPTS, RESPONSES), atol=1e-5)
    assert scores.dtype == torch.float32 and scores.device.type == "cpu"


def test_a_saved_scorer_gives_the_same_scores(scorer, tmp_path):
    normal = scorer.normalised(PROMPTS, RESPONSES)
    normal.save(tmp_path / "reward")
    for again in (RewardScorer.load(tmp_path / "reward", device="cpu"), load_reward(tmp_path / "reward", device="cpu")):
        assert (again.mean, again.std) == (normal.mean, normal.std)
        assert torch.equal(again(PROMPTS, RESPONSES), normal(PROMPTS, RESPONSES))


def test_a_model_that_gives_every_response_the_same_score_is_refused(scorer):
    flat = copy.deepcopy(scorer.model)
    with torch.no_grad():
        flat.score.weight.zero_()
    with pytest.raises(ValueError, match=r"std is 0.0, expected more than 0: the reward model gives every response"):
        RewardScorer(flat, TOKENIZER).normalised(PROMPTS, RESPONSES)
    with pytest.raises(ValueError, match="std is nan"):
        scorer.normalised(PROMPTS[:1], RESPONSES[:1])  # one response has no standard deviation


# Rewards by name.


def test_a_reward_can_be_a_function_by_name(tmp_path, monkeypatch):
    code = "def brevity(prompts, responses):\n    return [-len(r) for r in responses]\n\nten = 10\n"
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_reward("my_rewards:brevity")(["a"], ["bc"]) == [-2]
    for source, message in (("my_rewards:length", "module 'my_rewards' has no 'length'"),
                            ("my_rewards:ten", "'ten' is not a function"),
                            ("no_such_module:f", "module 'no_such_module' could not be imported"),
                            ("no/such/folder", "expected a reward model's folder or 'module:function'")):
        with pytest.raises(ValueError, match=f"'{source}'.*{message}"):
            load_reward(source)


def test_a_folder_that_holds_no_reward_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no config.json"):
        load_reward(tmp_path)


# Training.

PAIRS = [{"prompt": text, "chosen": SENTENCES["ANS1"], "rejected": SENTENCES["UNSAFE"]} for text in PROMPTS]
QUICK = RewardConfig(epochs=1, batch_size=len(PAIRS), centre=0.0)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_separable_preference_is_learned_from_ln_2_within_a_few_steps():
    model = tiny_reward_model(TOKENIZER)
    with torch.no_grad():
        model.score.weight.zero_()
    log = train_reward_model(model, TOKENIZER, PAIRS, replace(QUICK, epochs=12, learning_rate=1e-2))
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log[-1]["loss"] < 0.1 and log[-1]["accuracy"] == 1.0
    assert [row["step"] for row in log] == list(range(1, 13)) and not model.training
    scorer = RewardScorer(model, TOKENIZER)
    chosen, rejected = (scorer.raw(PROMPTS, [SENTENCES[name]] * len(PROMPTS)) for name in ("ANS1", "UNSAFE"))
    assert (chosen > rejected + 1).all()


@pytest.mark.parametrize("centre", [0.0, 0.3])
def test_the_loss_is_bradley_terry_on_the_scorer_s_own_scores(centre):
    """Trainer and scorer read the reward at the same token."""
    model = noisy_model(3)
    others = RESPONSES[1:] + RESPONSES[:1]
    pairs = [{"prompt": p, "chosen": a, "rejected": b} for p, a, b in zip(PROMPTS, RESPONSES, others, strict=True)]
    scorer = RewardScorer(model, TOKENIZER)
    chosen, rejected = (scorer.raw(PROMPTS, [row[side] for row in pairs]) for side in ("chosen", "rejected"))
    log = train_reward_model(model, TOKENIZER, pairs, replace(QUICK, learning_rate=0.0, centre=centre))
    expected = -F.logsigmoid(chosen - rejected).mean() + centre * (chosen + rejected).square().mean()
    assert log[0]["loss"] == pytest.approx(float(expected), abs=1e-5)
    assert log[0]["margin"] == pytest.approx(float((chosen - rejected).mean()), abs=1e-5)


@pytest.mark.parametrize("name", [f.name for f in fields(RewardConfig)])
def test_no_knob_is_idle(name):
    other = {"epochs": 3, "batch_size": 9, "learning_rate": 1e-3, "max_length": 10, "centre": 1.0, "seed": 5}
    config = replace(QUICK, epochs=2, batch_size=7, learning_rate=5e-3)
    ends = []
    for its in (config, replace(config, **{name: other[name]})):
        model = noisy_model(2)
        train_reward_model(model, TOKENIZER, PAIRS, its)
        ends.append(weights(model))
    assert not torch.allclose(*ends, atol=1e-5)


def test_a_pair_that_is_too_long_is_left_out():
    """Prompts have six tokens: with two sentences and EOS they are nine."""
    long = [row | {"chosen": SENTENCES["POLITE"] + row["chosen"]} for row in PAIRS]
    ends = [noisy_model(2) for _ in range(2)]
    train_reward_model(ends[0], TOKENIZER, long + PAIRS, replace(QUICK, max_length=8))
    train_reward_model(ends[1], TOKENIZER, PAIRS, QUICK)
    assert torch.equal(weights(ends[0]), weights(ends[1]))
    with pytest.raises(ValueError, match="max_length is 8, and every row is longer"):
        train_reward_model(noisy_model(), TOKENIZER, long, replace(QUICK, max_length=8))


def test_without_pairs_nothing_can_be_trained_or_reported(scorer):
    with pytest.raises(ValueError, match="pairs is empty, expected at least one preference pair"):
        train_reward_model(noisy_model(), TOKENIZER, [], QUICK)
    with pytest.raises(ValueError, match="pairs is empty, expected at least one held-out preference pair"):
        reward_report(scorer, [])


def test_a_reward_model_made_from_a_policy_learns_too():
    policy, tokenizer = load_policy("tiny", device="cpu")
    model = reward_model_from(policy)
    log = train_reward_model(model, tokenizer, PAIRS, replace(QUICK, epochs=8, learning_rate=5e-3))
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]


# Calibration.


def simulated_margins(n, sharpness=1.0, seed=0):
    """Margins of a model whose probabilities σ(|m|) are right, then × sharpness."""
    rng = np.random.default_rng(seed)
    size = np.abs(rng.normal(0, 1.5, n))
    right = rng.random(n) < 1 / (1 + np.exp(-size))
    return np.where(right, size, -size) * sharpness


def test_calibration_error_is_0_where_confidence_is_accuracy_and_not_otherwise():
    exact, bins = expected_calibration_error([math.log(3)] * 3 + [-math.log(3)])  # sure at 75 %, right 3 times of 4
    assert exact == pytest.approx(0, abs=1e-12) and len(bins) == 1
    assert bins[0]["count"] == 4 and bins[0]["confidence"] == pytest.approx(0.75) and bins[0]["accuracy"] == 0.75
    assert expected_calibration_error(simulated_margins(200_000))[0] < 0.005
    for sharpness in (3.0, 0.3):  # too sure of itself, and too little
        assert expected_calibration_error(simulated_margins(200_000, sharpness))[0] > 0.08


def test_calibration_error_equals_a_slow_sum():
    too_sure, too_little = simulated_margins(250, 3.0), simulated_margins(250, 0.3, seed=1)  # nothing cancels
    margins, total = np.concatenate([too_sure, too_little]), 0.0
    for b in range(10):
        low, high = 0.5 + b / 20, 0.5 + (b + 1) / 20
        members = [m for m in margins if low <= 1 / (1 + math.exp(-abs(m))) < high or (b == 9 and abs(m) > 700)]
        if members:
            confidence = np.mean([1 / (1 + math.exp(-abs(m))) for m in members])
            total += len(members) / 500 * abs(np.mean([m > 0 for m in members]) - confidence)
    error, bins = expected_calibration_error(margins)
    assert error == pytest.approx(total, abs=1e-12)
    assert sum(row["count"] for row in bins) == 500 and all(row["low"] <= row["confidence"] < row["high"]
                                                            for row in bins)
    certain, bins = expected_calibration_error([1e4, -1e4, 0.0])  # the ends of the scale
    assert certain == pytest.approx(2 / 3 * 0.5, abs=1e-12) and bins[0]["accuracy"] == 0.5 and bins[-1]["high"] == 1.0


# The report.


class Scorer:
    """A reward by formula, with what the report needs of a scorer."""

    def __init__(self, score, mean=0.0, std=1.0):
        self.score, self.mean, self.std = score, mean, std

    def raw(self, prompts, responses):
        return torch.as_tensor(self.score(prompts, responses), dtype=torch.float64)


@pytest.fixture(scope="module")
def pairs():
    """Labelled pairs of random responses, with the annotator's probability of the label."""
    rng = np.random.default_rng(3)
    prompts = [WORLD.heldout_prompts[i].text for i in rng.integers(len(WORLD.heldout_prompts), size=1500)]
    first, second = ([render(rng.choice(PHRASES, size=rng.integers(1, 5))) for _ in prompts] for _ in range(2))
    return WORLD.preference_pairs(prompts, first, second, seed=1)


def gold(prompts, responses):
    return WORLD.gold_scores(prompts, responses)


def test_the_report_equals_slow_numbers(pairs):
    noise = np.random.default_rng(5).normal(0, 0.8, (2, len(pairs)))
    scores = [gold([row["prompt"] for row in pairs], [row[side] for row in pairs]) + noise[i]
              for i, side in enumerate(("chosen", "rejected"))]
    report = reward_report(Scorer(lambda prompts, responses: np.concatenate(scores), mean=0.4, std=2.0), pairs, WORLD)
    margins = scores[0] - scores[1]
    right = sum(m > 0 for m in margins)
    assert report["pairs"] == len(pairs)
    assert report["accuracy_labels"] == pytest.approx(right / len(pairs))
    assert report["accuracy_labels_ci95"] == pytest.approx(wilson(right, len(pairs)), abs=1e-6)
    assert report["ece"] == expected_calibration_error(margins)[0]
    assert (report["mean"], report["std"]) == (0.4, 2.0)
    both = np.concatenate(scores)
    assert report["score_mean"] == pytest.approx((both.mean() - 0.4) / 2)
    assert report["score_std"] == pytest.approx(both.std() / 2)
    by_size = sorted(margins, key=abs)
    fifth = by_size[: report["margin_bins"][0]["count"]]
    assert report["margin_bins"][0]["accuracy"] == pytest.approx(np.mean([m > 0 for m in fifth]))
    assert report["margin_bins"][0]["margin"] == pytest.approx(np.mean(np.abs(fifth)))
    sizes, counts = zip(*((b["margin"], b["count"]) for b in report["margin_bins"]), strict=True)
    assert list(sizes) == sorted(sizes) and sum(counts) == len(pairs)
    agree = total = 0
    for row, margin in zip(pairs, margins, strict=True):
        truth = np.subtract(*gold([row["prompt"]] * 2, [row["chosen"], row["rejected"]]))
        if abs(truth) > 1e-9:
            agree, total = agree + ((margin > 0) == (truth > 0)), total + 1
    assert total < len(pairs) and report["accuracy_gold"] == pytest.approx(agree / total)
    assert report["bayes_accuracy"] == pytest.approx(np.mean([max(r["probability"], 1 - r["probability"])
                                                              for r in pairs]))
    texts = [[row["prompt"] for row in pairs] * 2, [row[side] for side in ("chosen", "rejected") for row in pairs]]
    assert report["gold_correlation"] == pytest.approx(np.corrcoef(both, gold(*texts))[0, 1])


def test_nobody_beats_the_bayes_accuracy_and_the_annotator_s_own_utility_reaches_it(pairs):
    def utility(prompts, responses):  # what the default annotator compares
        counts = phrase_counts(responses)
        return gold(prompts, responses) + 0.45 * counts[:, 0] + 0.25 * counts.sum(1)

    best, true, wrong = (reward_report(Scorer(score), pairs, WORLD)
                         for score in (utility, gold, lambda p, r: -gold(p, r)))
    ceiling = best["bayes_accuracy"]
    assert 0.6 < ceiling < 0.95
    assert best["accuracy_labels"] == pytest.approx(ceiling, abs=0.025)  # two standard errors
    assert true["accuracy_labels"] < best["accuracy_labels"]
    assert true["accuracy_gold"] == 1.0 and wrong["accuracy_gold"] == 0.0
    assert true["gold_correlation"] == pytest.approx(1) and wrong["gold_correlation"] == pytest.approx(-1)


@pytest.mark.parametrize("sign", [1, -1])
def test_biases_have_the_sign_of_what_the_scorer_adds_to_gold(pairs, sign):
    pairs = pairs[:500]
    polite = Scorer(lambda p, r: gold(p, r) + sign * phrase_counts(r)[:, 0])
    longer = Scorer(lambda p, r: gold(p, r) + sign * phrase_counts(r).sum(1))
    assert sign * reward_report(polite, pairs, WORLD)["politeness_bias"] > 0.5
    assert sign * reward_report(longer, pairs, WORLD)["length_bias"] > 0.5
    noise = np.random.default_rng(1).normal(size=1000)
    fair = reward_report(Scorer(lambda p, r: 3 * sign * gold(p, r) - 2 + noise), pairs, WORLD)  # other units, no bias
    assert abs(fair["politeness_bias"]) < 0.1 and abs(fair["length_bias"]) < 0.1  # three standard errors
    words = Scorer(lambda p, r: [sign * len(text.split()) for text in r])
    assert reward_report(words, pairs)["length_bias"] == pytest.approx(sign)


def test_without_a_world_the_report_has_what_labels_alone_can_tell(scorer, pairs):
    report = reward_report(scorer, [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in pairs[:50]])
    assert {"accuracy_labels", "ece", "reliability", "margin_bins", "length_bias", "score_mean"} <= report.keys()
    assert not {"bayes_accuracy", "accuracy_gold", "politeness_bias"} & report.keys()


def test_equal_scores_count_half(pairs):
    report = reward_report(Scorer(lambda p, r: np.zeros(len(r))), pairs)
    assert report["accuracy_labels"] == 0.5 and report["ece"] == 0 and report["length_bias"] == 0
