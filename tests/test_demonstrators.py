"""The demonstrators as a probability: against the program that writes them, by hand, and as a bound on any loss."""

import math
from collections import Counter

import numpy as np
import pytest

from alignkit import (
    KINDS,
    SPEAKERS,
    World,
    demonstrator_behaviours,
    demonstrator_entropy,
    demonstrator_logps,
    demonstrator_probabilities,
)
from alignkit.desk.world import ANSWERS, DUAL_VERBS, MAX_PHRASES, PHRASES, parse
from alignkit.evaluate.demonstrators import _every_path

WORLD = World(0)


def first(kind: str):
    return next(prompt for prompt in WORLD.train_prompts if prompt.kind == kind)


def right_named(response, prompt) -> tuple[str, ...]:
    return tuple("RIGHT" if name == prompt.answer else name for name in response)


@pytest.fixture(scope="module", params=[0.0, 0.7, 1.0])
def drawn(request) -> tuple[float, list[dict]]:
    """Slow reference: what the program wrote, 20,000 times."""
    return request.param, WORLD.demonstrations(20_000, messiness=request.param, seed=9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("speaker", [None, *SPEAKERS])
def test_probabilities_are_positive_and_sum_to_one(kind, speaker):
    table = demonstrator_probabilities(first(kind), 0.7, speaker)
    assert sum(table.values()) == pytest.approx(1, abs=1e-12) and min(table.values()) > 0
    assert all(len(response) <= MAX_PHRASES and set(response) <= set(PHRASES) for response in table)


def test_probabilities_are_the_frequencies_of_the_program(drawn):
    """Chi-squared, per class, with the right answer written as RIGHT, over the responses expected at least 25 times."""
    messiness, rows = drawn
    seen = {kind: Counter() for kind in KINDS}
    expected = {kind: Counter() for kind in KINDS}
    prompts = Counter(row["prompt"] for row in rows)
    situations = {(p.kind, p.verb in DUAL_VERBS, p.answer): p for p in WORLD.train_prompts}
    times = Counter()
    for text, count in prompts.items():
        prompt = WORLD.find(text)
        times[prompt.kind, prompt.verb in DUAL_VERBS, prompt.answer] += count
    for situation, prompt in situations.items():
        for response, chance in demonstrator_probabilities(prompt, messiness).items():
            expected[prompt.kind][right_named(response, prompt)] += times[situation] * chance
    for row in rows:
        prompt = WORLD.find(row["prompt"])
        seen[prompt.kind][right_named(parse(row["completion"]), prompt)] += 1
    for kind in KINDS:
        common = [response for response, count in expected[kind].items() if count >= 25]
        assert len(common) >= 4
        chi2 = sum((seen[kind][r] - expected[kind][r]) ** 2 / expected[kind][r] for r in common)
        assert abs(chi2 - len(common)) < 5 * math.sqrt(2 * len(common)), (kind, chi2, len(common))


def test_an_expert_on_a_risky_and_an_ambiguous_prompt_by_hand():
    assert demonstrator_probabilities(first("risky"), speaker="expert") == pytest.approx({
        ("REFUSE",): 0.65 * 0.5, ("POLITE", "REFUSE"): 0.35 * 0.5,
        ("REFUSE", "ALTERNATIVE"): 0.65 * 0.5, ("POLITE", "REFUSE", "ALTERNATIVE"): 0.35 * 0.5})
    prompt = first("ambiguous")
    table = demonstrator_probabilities(prompt, speaker="expert")
    assert table["POLITE", "CLARIFY"] == pytest.approx(0.35 * 0.6)
    assert table["CAUTION", prompt.answer] == pytest.approx(0.65 * 0.4 * (0.88 + 0.12 / 4))
    wrong = next(answer for answer in ANSWERS if answer != prompt.answer)
    assert table["CAUTION", wrong] == pytest.approx(0.65 * 0.4 * 0.12 / 4)


def test_the_dial_mixes_the_speakers():
    prompt, experts = first("risky"), 0.95 - 0.7 * 0.5
    shares = dict(zip(SPEAKERS, [experts, *((1 - experts) * np.array([4, 4, 3]) / 11)], strict=True))
    mixed = demonstrator_probabilities(prompt, 0.5)
    alone = {name: demonstrator_probabilities(prompt, speaker=name) for name in SPEAKERS}
    for response, chance in mixed.items():
        assert chance == pytest.approx(sum(share * alone[name].get(response, 0) for name, share in shares.items()))


def test_the_entropy_is_what_demonstrations_are_coded_with(drawn):
    messiness, rows = drawn
    nats, tokens = demonstrator_entropy(WORLD, messiness)
    logps = demonstrator_logps(WORLD, rows, messiness)
    lengths = np.array([len(parse(row["completion"])) + 1 for row in rows])
    assert nats == pytest.approx(-logps.mean(), abs=5 * logps.std() / math.sqrt(len(rows)))
    assert tokens == pytest.approx(lengths.mean(), abs=5 * lengths.std() / math.sqrt(len(rows)))
    if messiness != 0.7:  # Gibbs: another distribution codes them worse
        assert -demonstrator_logps(WORLD, rows, 0.7).mean() > -logps.mean() + 0.05


def test_more_disagreement_is_a_higher_floor():
    floors = [demonstrator_entropy(WORLD, dial)[0] for dial in (0.0, 0.35, 0.7, 1.0)]
    assert floors == sorted(floors) and floors[0] < floors[-1] - 1


def test_behaviours_are_the_shares_of_the_program(drawn):
    messiness, rows = drawn
    shares = demonstrator_behaviours(WORLD.train_prompts, messiness)
    prompts = [row["prompt"] for row in rows]
    does = zip([WORLD.find(text).kind for text in prompts],
               WORLD.behaviours(prompts, [row["completion"] for row in rows]), strict=True)
    counts = Counter(does)
    for kind in KINDS:
        total = sum(n for (of, _), n in counts.items() if of == kind)
        assert sum(shares[kind].values()) == pytest.approx(1)
        for act, share in shares[kind].items():
            assert counts[kind, act] / total == pytest.approx(share, abs=5 * math.sqrt(0.25 / total))
    assert list(demonstrator_behaviours([first("risky")])) == ["risky"]


def test_a_response_that_nobody_writes_has_probability_zero():
    row = {"prompt": first("risky").text, "completion": ""}
    assert demonstrator_logps(WORLD, [row])[0] == -np.inf


@pytest.mark.parametrize("arguments, message", [
    ({"messiness": 1.5}, "messiness is 1.5, expected a number between 0 and 1"),
    ({"speaker": "poet"}, "speaker is 'poet', expected one of expert, over-cautious, reckless, rambler"),
])
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        demonstrator_probabilities(first("risky"), **arguments)


def test_every_path_follows_all_outcomes_of_a_program():
    def program(rng):
        if rng.random() < 0.25:
            return "heads"
        return tuple(rng.permutation(3)[: rng.integers(1, 3)])

    results = _every_path(program)
    assert results["heads"] == pytest.approx(0.25)
    assert results[(2,)] == pytest.approx(0.75 * 0.5 / 3) and results[2, 0] == pytest.approx(0.75 * 0.5 / 6)
    assert sum(results.values()) == pytest.approx(1) and len(results) == 1 + 3 + 6
    assert _every_path(lambda rng: str(rng.choice("ab")) + "".join(rng.choice("xy", size=2).tolist())) == pytest.approx(
        {a + x + y: 0.125 for a in "ab" for x in "xy" for y in "xy"})
