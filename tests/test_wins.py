"""Win rates: values by hand, a slow fit of the length-controlled model, a judge whose liking for length is known."""

import numpy as np
import pytest

from alignkit.evaluate.wins import RIDGE, length_controlled, win_rates
from alignkit.formulas.intervals import wilson


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def shown(prompts, a, b):
    """A judge that says what the prompt says, if a stands first: "0.75 …"."""
    return [float(prompt.split()[0]) if first == "a" else 1 - float(prompt.split()[0])
            for prompt, first in zip(prompts, a, strict=True)]


def replies(n):
    return ["a"] * n, ["bb"] * n


# ---- the raw rate
def test_the_raw_rate_is_the_mean_preference_ties_one_half():
    prompts = ["1 x", "0 y", "0.5 z", "0.75 v"]
    wins = win_rates(prompts, *replies(4), shown)
    assert wins.raw.value == pytest.approx((1 + 0 + 0.5 + 0.75) / 4)
    assert wins.preferences == pytest.approx((1, 0, 0.5, 0.75)) and wins.position_bias == pytest.approx(0)
    assert wins.metrics == {"win_rate": wins.raw, "win_rate_length_controlled": wins.length_controlled}


def test_a_liking_for_the_second_place_cancels_when_both_orders_are_asked():
    def partial(prompts, a, b):
        return np.array(shown(prompts, a, b)) + 0.2

    prompts = ["0.3 x", "0.6 y", "0.5 z"]
    wins = win_rates(prompts, *replies(3), partial)
    assert wins.preferences == pytest.approx((0.3, 0.6, 0.5)) and wins.position_bias == pytest.approx(0.4)
    one = win_rates(prompts, *replies(3), partial, both_orders=False)
    assert one.preferences == pytest.approx((0.5, 0.8, 0.7)) and one.position_bias is None


def test_a_reward_model_is_a_judge_and_equal_scores_are_ties():
    def longer(prompts, responses):
        return [len(response) + 1e-12 * len(prompt) for prompt, response in zip(prompts, responses, strict=True)]

    wins = win_rates(["p", "q", "r"], ["aa", "a", "a"], ["b", "bb", "b"], reward=longer)
    assert wins.preferences == (0, 1, 0.5) and wins.raw.value == 0.5 and wins.position_bias is None


def test_who_wins_everything_has_wilsons_interval_over_the_keys():
    wins = win_rates(["p", "p", "q", "r"], *replies(4), lambda prompts, a, b: [float(x == "a") for x in a])
    assert wins.raw.value == 1 and (wins.raw.low, wins.raw.high) == pytest.approx(wilson(3, 3))
    assert 0.99 < wins.length_controlled.value < 1  # the ridge keeps it finite


def test_samples_of_one_prompt_are_one_cluster_and_keys_join_paraphrases():
    rng = np.random.default_rng(0)
    wins_of = {f"{i}": float(rng.random()) for i in range(40)}
    prompts = [prompt for prompt in wins_of for _ in range(8)]

    def judge(prompts, a, b):
        return [wins_of[prompt] for prompt in prompts]

    def width(estimate):
        return estimate.high - estimate.low

    def wins(keys):
        return win_rates(prompts, *replies(320), judge, both_orders=False, keys=keys)

    apart, clustered, joined = wins(list(range(320))), wins(None), wins([int(p) // 4 for p in prompts])
    assert apart.raw.value == pytest.approx(clustered.raw.value) == pytest.approx(joined.raw.value)
    se = np.std(list(wins_of.values())) / np.sqrt(40)
    assert width(clustered.raw) == pytest.approx(2 * 1.96 * se, rel=0.15)
    assert width(apart.raw) == pytest.approx(2 * 1.96 * se / np.sqrt(8), rel=0.15)
    for kind in ("raw", "length_controlled"):
        assert width(getattr(clustered, kind)) > 2 * width(getattr(apart, kind))
    assert width(joined.raw) != width(clustered.raw)


def test_the_same_seed_gives_the_same_interval():
    rng = np.random.default_rng(0)
    prompts = [f"{rng.random():.3f} {i}" for i in range(30)]
    one, same, other = (win_rates(prompts, *replies(30), shown, seed=seed) for seed in (0, 0, 1))
    assert one == same and one.raw.low != other.raw.low


# ---- length taken out
def test_the_fit_is_that_of_slow_gradient_descent():
    rng = np.random.default_rng(1)
    labels, lengths, hard = rng.random(60), rng.normal(5, 30, 60), rng.normal(size=60)
    (rate,), (fitted,) = length_controlled(labels, lengths, hard)
    design = np.stack([np.ones(60), np.tanh(lengths / lengths.std(ddof=1)), hard], 1)
    slow = np.zeros(3)
    for _ in range(20_000):
        slow -= 0.02 * (design.T @ (sigmoid(design @ slow) - labels) + RIDGE * slow)
    assert fitted == pytest.approx(slow, abs=1e-8)
    assert rate == pytest.approx(sigmoid(slow[0] + slow[2] * hard).mean(), abs=1e-8)


def test_without_noise_the_controlled_rate_is_the_truth_and_the_raw_one_is_not():
    rng = np.random.default_rng(2)
    lengths, theta, phi = rng.normal(80, 60, 2000), -0.4, 1.5
    chances = sigmoid(theta + phi * np.tanh(lengths / lengths.std(ddof=1)))
    (rate,), (fitted,) = length_controlled(chances, lengths)
    assert fitted == pytest.approx((theta, phi), abs=1e-4)
    assert rate == pytest.approx(sigmoid(theta), abs=1e-4)
    assert chances.mean() > 0.6 > 0.5 > rate  # longer replies win, and would lose at equal length


def test_a_judge_that_likes_length_is_seen_through_from_single_votes():
    rng = np.random.default_rng(3)
    a, b = ["x" * 50] * 1500, ["y" * int(n) for n in rng.integers(40, 140, 1500)]
    delta = np.array([len(text) - 50 for text in b])
    chances = sigmoid(0.3 + 1.2 * np.tanh(delta / delta.std(ddof=1)))
    votes = dict(zip(map(str, range(1500)), (rng.random(1500) < chances).astype(float), strict=True))

    def judge(prompts, first, second):
        return [votes[prompt] if one[0] == "x" else 1 - votes[prompt]
                for prompt, one in zip(prompts, first, strict=True)]

    wins = win_rates(list(votes), a, b, judge)
    truth = sigmoid(0.3)
    assert wins.length_controlled.low < truth < wins.length_controlled.high < wins.raw.low
    assert wins.length_effect == pytest.approx(1.2, abs=0.3)


def test_difficulty_enters_and_is_averaged_over():
    rng = np.random.default_rng(4)
    hard, lengths = rng.normal(1, 1, 1000), rng.integers(-30, 31, 1000)
    chances = sigmoid(0.2 - 0.8 * hard + 0.5 * np.tanh(lengths / lengths.std(ddof=1)))
    (rate,), (fitted,) = length_controlled(chances, lengths, hard)
    assert fitted == pytest.approx((0.2, 0.5, -0.8), abs=1e-3)
    assert rate == pytest.approx(sigmoid(0.2 - 0.8 * hard).mean(), abs=1e-4)
    votes = dict(zip(map(str, range(1000)), chances, strict=True))
    a, b = ["x" * 100] * 1000, ["y" * (100 + d) for d in lengths]
    with_it, without = (win_rates(list(votes), a, b, lambda prompts, _, __: [votes[p] for p in prompts],
                                  both_orders=False, difficulty=given) for given in (hard, None))
    assert with_it.length_controlled.value == pytest.approx(rate)
    assert with_it.length_controlled.value != without.length_controlled.value


def test_equal_lengths_leave_the_rate_as_it_is():
    (rate,), (fitted,) = length_controlled([1, 1, 0, 0.5] * 50, [7] * 200)
    assert rate == pytest.approx(0.625, abs=1e-4) and fitted[1] == 0


def test_the_fit_ends_where_length_decides_everything():
    lengths = np.array([-30, -20, -10, 10, 20, 40.0])
    (rate,), (fitted,) = length_controlled(lengths > 0, lengths)
    assert np.isfinite(fitted).all() and fitted[1] > 5 and 0 < rate < 1


def test_a_resample_counts_a_row_as_often_as_its_weight():
    rng = np.random.default_rng(5)
    labels, lengths = rng.random(30), rng.normal(0, 5, 30)
    weights = rng.integers(0, 3, (4, 30))
    rates, fitted = length_controlled(labels, lengths, weights=weights)
    tilt = np.tanh(lengths / lengths.std(ddof=1))
    for row, rate, (theta, phi) in zip(weights, rates, fitted, strict=True):
        chances = sigmoid(theta + phi * tilt)
        for column in (np.ones(30), tilt):  # the gradient of Σ w log-likelihood is the ridge's
            coefficient = theta if column[0] == 1 else phi
            assert (row * (labels - chances) * column).sum() == pytest.approx(RIDGE * coefficient, abs=1e-6)
        assert rate == pytest.approx(sigmoid(theta))


# ---- what is refused
@pytest.mark.parametrize("options, message", [
    ({"prompts": []}, "prompts has 0 entries"),
    ({"b": ["x"]}, "b has 1 entries, prompts 2"),
    ({"keys": [1]}, "keys has 1 entries"),
    ({"difficulty": [1.0]}, "difficulty has 1 entries"),
    ({"judge": None}, "give judge or reward"),
    ({"reward": lambda prompts, responses: [0.0, 1.0]}, "give judge or reward"),
    ({"judge": lambda prompts, a, b: [0.5]}, r"shape \(1,\), expected \(2,\)"),
    ({"judge": lambda prompts, a, b: [0.5, 1.5]}, "preference of row 1 is 1.5, expected a number from 0"),
    ({"judge": lambda prompts, a, b: [float("nan"), 0]}, "preference of row 0 is nan"),
    ({"judge": None, "reward": lambda prompts, responses: [0.0, float("nan")]}, "finite numbers"),
])
def test_bad_input_is_named(options, message):
    given = {"prompts": ["p", "q"], "a": ["x", "y"], "b": ["x", "z"], "judge": lambda prompts, a, b: [0.5, 1]}
    with pytest.raises(ValueError, match=message):
        win_rates(**{**given, **options})
