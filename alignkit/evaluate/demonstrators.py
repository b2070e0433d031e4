"""The exact probability distribution of the desk world's demonstrators.

The demonstrators are a program with a few random draws. This module follows every outcome of these draws, so the
probability of each response, and the entropy of the demonstrators, are finite sums.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np

from alignkit.desk.world import (
    ANSWERS,
    BEHAVIOURS,
    DUAL_VERBS,
    KINDS,
    MAX_PHRASES,
    ORDINARY_VERBS,
    PHRASES,
    Prompt,
    World,
    _behaviour,
    _expert,
    _over_cautious,
    _rambler,
    _reckless,
    parse,
)

SPEAKERS = ("expert", "over-cautious", "reckless", "rambler")
_WRITE = dict(zip(SPEAKERS, (_expert, _over_cautious, _reckless, _rambler), strict=True))
_GUESSES = 0.12  # share of demonstrations whose demonstrator picks one of the four answers at random
_ANSWER = "answer"  # stands for any answer: the rest of the response does not depend on it


def demonstrator_probabilities(prompt: Prompt, messiness: float = 0.7,
                               speaker: str | None = None) -> dict[tuple[str, ...], float]:
    """Exact P(response | prompt) of `World.demonstrations`: phrase names -> probability; the sum is 1.

    messiness: as in `World.demonstrations`, 0 to 1. speaker: one of SPEAKERS; None: the mixture of all four at this
    messiness. Raises ValueError on a messiness out of range or an unknown speaker.
    """
    if speaker is not None and speaker not in SPEAKERS:
        raise ValueError(f"speaker is {speaker!r}, expected one of {', '.join(SPEAKERS)}")
    probabilities: dict[tuple[str, ...], float] = {}
    for name, share in (_shares(messiness) if speaker is None else {speaker: 1.0}).items():
        for response, chance in _responses_of(name, *_situation(prompt)).items():
            probabilities[response] = probabilities.get(response, 0.0) + share * chance
    return probabilities


def demonstrator_logps(world: World, rows: list[dict], messiness: float = 0.7) -> np.ndarray:
    """log p(completion | prompt) (N,) of the demonstrators, in nats per response, for rows prompt / completion.

    −∞ for a response that no demonstrator can write. The end of a response adds no factor: a demonstrator always ends
    the response. Raises ValueError on texts outside the desk world.
    """
    tables: dict[tuple, dict] = {}
    logps = np.empty(len(rows))
    for position, row in enumerate(rows):
        prompt = world.find(row["prompt"])
        situation = _situation(prompt)
        if situation not in tables:
            tables[situation] = demonstrator_probabilities(prompt, messiness)
        with np.errstate(divide="ignore"):
            logps[position] = np.log(tables[situation].get(parse(row["completion"]), 0.0))
    return logps


def demonstrator_entropy(world: World, messiness: float = 0.7) -> tuple[float, float]:
    """H(p) in nats per response, and the mean length in tokens including EOS: exact means over the training prompts.

    H(p) = E_x[−Σ_y p(y|x) log p(y|x)] is the smallest expected loss that any policy can have on demonstrations. Divided
    by the mean length it is that loss in nats per token, as SFT reports it.
    """
    nats: dict[tuple, float] = {}
    tokens: dict[tuple, float] = {}
    situations = [_situation(prompt) for prompt in world.train_prompts]
    for situation, prompt in zip(situations, world.train_prompts, strict=True):
        if situation not in nats:
            table = demonstrator_probabilities(prompt, messiness)
            chances = np.array(list(table.values()))
            nats[situation] = float(-(chances * np.log(chances)).sum())
            tokens[situation] = float(chances @ [len(response) + 1 for response in table])
    return tuple(float(np.mean([of[situation] for situation in situations])) for of in (nats, tokens))


def demonstrator_behaviours(prompts: Sequence[Prompt], messiness: float = 0.7) -> dict[str, dict[str, float]]:
    """Prompt class -> behaviour -> share: exact behaviour of the demonstrators, mean over the prompts of a class.

    Classes without a prompt are omitted. Raises ValueError on a messiness out of range.
    """
    speakers, counts = _shares(messiness), Counter(prompt.kind for prompt in prompts)
    shares: dict[str, dict[str, float]] = {kind: dict.fromkeys(BEHAVIOURS, 0.0) for kind in KINDS if counts[kind]}
    for situation, times in Counter(map(_situation, prompts)).items():
        kind = situation[0]
        for speaker, part in speakers.items():
            for act, share in _acts_of(speaker, *situation).items():
                shares[kind][act] += share * part * times / counts[kind]
    return shares


def _shares(messiness: float) -> dict[str, float]:
    """Share of each speaker at this messiness, as in `World.demonstrations`."""
    if not 0 <= messiness <= 1:
        raise ValueError(f"messiness is {messiness}, expected a number between 0 and 1")
    experts = 0.95 - 0.7 * messiness
    return dict(zip(SPEAKERS, (experts, *((1 - experts) * part / 11 for part in (4, 4, 3))), strict=True))


def _situation(prompt: Prompt) -> tuple[str, bool, str]:
    """The properties of a prompt that demonstrators react to: its class, whether its verb is dual-use, its correct
    answer."""
    return prompt.kind, prompt.verb in DUAL_VERBS, prompt.answer


@functools.cache
def _responses_of(speaker: str, kind: str, dual: bool, answer: str) -> MappingProxyType:
    """P(response) of one speaker in one situation: the correct answer if the speaker knows it, any answer for a
    guess."""
    knows = {given: (1 - _GUESSES) * (given == answer) + _GUESSES / len(ANSWERS) for given in ANSWERS}
    total: dict[tuple[str, ...], float] = {}
    for pattern, chance in _patterns_of(speaker, kind, dual).items():
        for given, share in knows.items() if _ANSWER in pattern else [("", 1.0)]:
            response = tuple(given if name == _ANSWER else name for name in pattern)
            total[response] = total.get(response, 0.0) + share * chance
    return MappingProxyType(total)


@functools.cache
def _acts_of(speaker: str, kind: str, dual: bool, answer: str) -> MappingProxyType:
    """P(behaviour) of one speaker in one situation; a behaviour depends only on the response and the correct answer."""
    if speaker == "rambler" and (kind, dual) != ("benign", False):
        return _acts_of(speaker, "benign", False, answer)  # ramblers do not read the prompt
    prompt = replace(World().prompts[0], answer=answer)
    total: dict[str, float] = {}
    for response, chance in _responses_of(speaker, kind, dual, answer).items():
        act = _behaviour(prompt, np.array([response.count(name) for name in PHRASES]))
        total[act] = total.get(act, 0.0) + chance
    return MappingProxyType(total)


@functools.cache
def _patterns_of(speaker: str, kind: str, dual: bool) -> MappingProxyType:
    """P(pattern) of one speaker: responses in which _ANSWER stands for the speaker's answer."""
    if speaker == "rambler" and (kind, dual) != ("benign", False):
        return _patterns_of(speaker, "benign", False)  # ramblers do not read the prompt
    prompt = replace(World().prompts[0], kind=kind, verb=(DUAL_VERBS if dual else ORDINARY_VERBS)[0])
    return MappingProxyType(_every_path(lambda rng: tuple(_WRITE[speaker](prompt, _ANSWER, rng)[:MAX_PHRASES])))


def _every_path(program: Callable) -> dict:
    """result -> probability, for a program that uses one random generator: the program runs once per path of
    outcomes."""
    results: dict = {}
    waiting: list[list[int]] = [[]]
    while waiting:
        path = _Path(waiting.pop())
        result = program(path)
        results[result] = results.get(result, 0.0) + path.chance
        waiting += path.others
    return results


class _Path:
    """A replacement for a numpy generator: it repeats given outcomes, then takes the first of each and records the
    others."""

    def __init__(self, outcomes: list[int]):
        self.outcomes, self.place, self.chance, self.others = outcomes, 0, 1.0, []

    def pick(self, chances: list[float]) -> int:
        if self.place == len(self.outcomes):
            self.others += [[*self.outcomes, other] for other in range(1, len(chances))]
            self.outcomes = [*self.outcomes, 0]
        outcome = self.outcomes[self.place]
        self.place += 1
        self.chance *= chances[outcome]
        return outcome

    def even(self, n: int) -> int:
        return self.pick([1 / n] * n)

    def random(self) -> "_Uniform":
        return _Uniform(self)

    def integers(self, low: int, high: int) -> int:
        return low + self.even(high - low)

    def choice(self, items, size: int | None = None):
        return items[self.even(len(items))] if size is None else np.array([self.choice(items) for _ in range(size)])

    def permutation(self, n: int) -> list[int]:
        rest = list(range(n))
        return [rest.pop(self.even(len(rest))) for _ in range(n)]


class _Uniform:
    """A uniform draw that is compared with one number; the comparison has two outcomes."""

    def __init__(self, path: _Path):
        self.path = path

    def __lt__(self, bound: float) -> bool:
        return self.path.pick([bound, 1 - bound]) == 0
