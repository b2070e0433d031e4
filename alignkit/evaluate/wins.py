"""Win rates: how often a judge prefers one policy's reply to another's, raw and length-controlled.

A judge is a function prompts, a, b -> preferences for b in [0, 1]; a reward model can serve as one. Judges prefer long
replies, so a second figure estimates the win rate if both replies had the same length (Dubois et al. 2024,
"Length-Controlled AlpacaEval").
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from alignkit.formulas.intervals import Bootstrap, Estimate, wilson

RIDGE = 1e-3  # on the whole log-likelihood: keeps the coefficients finite if one side wins every pair
RESAMPLES = 1000
AT_ONCE = 2**20  # resamples × rows fitted together; limits the memory
_STEPS, _HALVINGS, _CLOSE = 100, 30, 1e-10


@dataclass(frozen=True)
class Wins:
    """How often replies b beat replies a. `metrics` has both rates by name.

    raw: mean preference. length_controlled: the fitted model's rate at equal lengths. length_effect: φ, which tanh(Δ
    length / σ) adds to the log-odds; above 0 the judge prefers long replies. position_bias: mean of j(a, b) + j(b, a) −
    1, above 0 if the judge prefers the second position; None if only one order was judged. preferences: for b, (N,).
    """

    raw: Estimate
    length_controlled: Estimate
    length_effect: float
    position_bias: float | None
    preferences: tuple[float, ...]

    @property
    def metrics(self) -> dict[str, Estimate]:
        """win_rate and win_rate_length_controlled."""
        return {"win_rate": self.raw, "win_rate_length_controlled": self.length_controlled}


def win_rates(prompts: Sequence[str], a: Sequence[str], b: Sequence[str], judge: Callable | None = None, *,
              reward: Callable | None = None, keys: Sequence[Hashable] | None = None, both_orders: bool = True,
              difficulty: Sequence[float] | None = None, seed: int = 0) -> Wins:
    """Win rates of replies b over replies a to the same prompts, ties ½, with 95 % intervals.

    judge: prompts, a, b -> preference for b in [0, 1], for each prompt; it is called with both orders, (j(a, b) + 1 −
    j(b, a)) / 2, so that a position bias cancels (both_orders=False: only the given order). reward: alternatively a
    reward, prompts, responses -> scores (a `RewardScorer`, or any such function): b wins if it scores higher; scores
    equal to nine digits are a tie. keys: the cluster of each prompt, such as the question that it paraphrases; by
    default the prompt's text, so that several samples of a prompt stay together. difficulty: γ of each prompt for the
    length-controlled rate, as in `length_controlled`; omitted if no baseline with known γ exists. Intervals: cluster
    bootstrap over keys; Wilson's, with keys as trials, for a raw rate of 0 or 1.
    Raises ValueError if columns are empty or differ in length, unless exactly one of judge and reward is given, and if
    preferences are not N numbers in [0, 1].
    """
    columns = {"prompts": prompts, "a": a, "b": b, "keys": prompts if keys is None else keys}
    if difficulty is not None:
        columns["difficulty"] = difficulty
    for name, column in columns.items():
        if len(column) != len(prompts) or not len(prompts):
            raise ValueError(f"{name} has {len(column)} entries, prompts {len(prompts)}; expected as many, and one at "
                             "least")
    if (judge is None) == (reward is None):
        raise ValueError("give judge or reward, one of them")
    prompts, a, b = list(prompts), list(a), list(b)
    bias = None
    if reward is not None:
        preferences = _by_reward(reward, prompts, a, b)
    else:
        preferences = _checked(judge(prompts, a, b), len(prompts))
        if both_orders:
            turned = _checked(judge(prompts, b, a), len(prompts))
            bias = float((preferences + turned - 1).mean())
            preferences = (preferences + 1 - turned) / 2
    _, number = np.unique(np.array(list(map(str, columns["keys"])), dtype=object), return_inverse=True)
    lengths = [np.array([len(text) for text in texts]) for texts in (a, b)]
    raw, controlled, effect = _rates(preferences, lengths[1] - lengths[0], number, difficulty, seed)
    return Wins(raw, controlled, effect, bias, tuple(preferences.tolist()))


def length_controlled(preferences, length_differences, difficulty=None, weights=None) -> tuple[np.ndarray, np.ndarray]:
    """Length-controlled win rates (R,) and coefficients (R, C), C = θ, φ and, with a difficulty, ψ.

    P(b ≻ a) = σ(θ + ψ·γ + φ·tanh(Δ / s)), fitted to the preferences by Newton's method (cross-entropy plus RIDGE / 2
    times the squared coefficients). The rate is the mean of σ(θ + ψ·γ), as if all Δ were 0.
    preferences: for b (N,), in [0, 1]. length_differences: Δ = length of b − length of a (N,), characters; s is their
    standard deviation (N − 1), and the term is absent if all are equal. difficulty: γ (N,) of each prompt, known from
    the baseline. weights: (R, N), how often each row counts in each of R fits; by default one fit of all rows.
    (Dubois et al. 2024, eq. 2: θ and ψ are differences to the baseline's. AlpacaEval regularises by an L1 penalty
    chosen by cross-validation and by rows of baselines that were prompted to be verbose or concise, and estimates γ
    from all models of its leaderboard. Here one policy is compared with another, so none of these is used, except a
    given γ.)
    """
    preferences, lengths = np.asarray(preferences, float), np.asarray(length_differences, float)
    weights = np.ones((1, len(preferences))) if weights is None else np.asarray(weights, float)
    spread = lengths.std(ddof=1) if len(lengths) > 1 else 0.0
    ones = np.ones(len(lengths))
    length = np.tanh(lengths / spread) if spread > 0 else 0 * ones
    design = np.stack([ones, length, *([] if difficulty is None else [np.asarray(difficulty, float)])], 1)
    coefficients = _fit(design, preferences, weights)
    level = design.copy()
    level[:, 1] = 0
    chances = _sigmoid(coefficients @ level.T)
    return (chances * weights).sum(1) / weights.sum(1), coefficients


def _rates(preferences: np.ndarray, differences: np.ndarray, number: np.ndarray, difficulty,
           seed: int) -> tuple[Estimate, Estimate, float]:
    """Raw rate, length-controlled rate and length effect; number: of each row's key (N,)."""
    keys = int(number.max()) + 1
    bootstrap = Bootstrap(np.zeros(keys), resamples=RESAMPLES, seed=seed)
    sums, counts = np.bincount(number, preferences, keys), np.bincount(number, minlength=keys)
    raw = bootstrap.estimates(sums[None], counts[None])[0]
    if raw.value in (0.0, 1.0):
        raw = Estimate(raw.value, *wilson(raw.value * keys, keys))
    (value,), coefficients = length_controlled(preferences, differences, difficulty)
    parts = np.array_split(bootstrap.weights, -(-RESAMPLES * len(number) // AT_ONCE))
    draws = [length_controlled(preferences, differences, difficulty, part[:, number])[0] for part in parts]
    return raw, bootstrap.estimate(float(value), np.concatenate(draws)), float(coefficients[0, 1])


def _fit(design: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Coefficients (R, C) that maximise Σ w [y log p + (1 − y) log(1 − p)] − RIDGE/2 |c|², p = σ(X c), by Newton's
    method with halved steps, all R fits together. design (N, C), labels (N,), weights (R, N)."""
    count = design.shape[1]
    coefficients, outer = np.zeros((len(weights), count)), design[:, :, None] * design[:, None, :]

    def losses(at: np.ndarray) -> np.ndarray:
        logits = at @ design.T
        return ((np.logaddexp(0, logits) - labels * logits) * weights).sum(1) + RIDGE / 2 * (at**2).sum(1)

    loss = losses(coefficients)
    for _ in range(_STEPS):
        chances = _sigmoid(coefficients @ design.T)
        gradient = ((chances - labels) * weights) @ design + RIDGE * coefficients
        curvature = np.tensordot(weights * chances * (1 - chances), outer, 1) + RIDGE * np.eye(count)
        step = np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]
        for _ in range(_HALVINGS):
            there = losses(coefficients - step)
            worse = there > loss + 1e-12 * np.abs(loss)
            if not worse.any():
                break
            step[worse] /= 2
        coefficients, loss = coefficients - step, there
        if np.abs(step).max() < _CLOSE:
            break
    return coefficients


def _by_reward(reward: Callable, prompts: list[str], a: list[str], b: list[str]) -> np.ndarray:
    """1 if b scores higher than a, ½ if equal, as in `win_rate` of evaluations: (N,)."""
    scores = [np.asarray(reward(prompts, side), dtype=float) for side in (a, b)]
    for side in scores:
        if side.shape != (len(prompts),) or not np.isfinite(side).all():
            raise ValueError(f"the reward gave scores of shape {side.shape}, expected ({len(prompts)},) finite numbers")
    of_a, of_b = (np.round(side, 9) for side in scores)
    return np.where(of_b == of_a, 0.5, of_b > of_a)


def _checked(preferences, count: int) -> np.ndarray:
    values = np.asarray(preferences, dtype=float)
    if values.shape != (count,):
        raise ValueError(f"the judge gave preferences of shape {values.shape}, expected ({count},)")
    if (bad := ~((values >= 0) & (values <= 1))).any():
        row = int(bad.argmax())
        raise ValueError(f"the judge's preference of row {row} is {values[row]}, expected a number from 0 (a) to 1 (b)")
    return values


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))
