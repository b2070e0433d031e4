"""95 % intervals by paired cluster bootstrap: whole prompt keys are resampled, with all their paraphrases and samples.

Samples of one prompt, and paraphrases of one question, are correlated, so the bootstrap draws whole questions (*keys*).
Every figure here is a ratio of sums over keys, Σ_k w_k a_k / Σ_k w_k b_k, so 2,000 resamples of all figures are two
matrix products. All checkpoints share the same weights, so differences between checkpoints are paired.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
_Z = 1.959963984540054
_T = (12.70620, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216, 2.22814)  # 1 to 10 degrees


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; f"{estimate:.1%}" prints all three. low, high: None if there are too few keys."""

    value: float
    low: float | None
    high: float | None

    def __format__(self, spec: str) -> str:
        value = format(self.value, spec or ".3f")
        if self.low is None:
            return value
        return f"{value} [{format(self.low, spec or '.3f')}, {format(self.high, spec or '.3f')}]"

    def __str__(self) -> str:
        return format(self, "")

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and (self.low > 0 or self.high < 0)


class Bootstrap:
    """Resampling weights (R, K): how often each of K keys is drawn in each of R resamples, within its stratum.

    strata: the stratum of each key (K,), such as its class. Each resample has the same number of keys per class as the
    set. The weights depend only on strata, resamples and seed.
    """

    def __init__(self, strata, resamples: int = 2000, seed: int = 0):
        strata = np.asarray(strata)
        rng = np.random.default_rng(seed)
        self.strata = strata
        self.weights = np.zeros((resamples, len(strata)))
        for stratum in sorted(set(strata.tolist())):
            members = np.flatnonzero(strata == stratum)
            even = np.full(len(members), 1 / len(members))
            self.weights[:, members] = rng.multinomial(len(members), even, size=resamples)

    def estimates(self, numerators: np.ndarray, denominators: np.ndarray) -> list[Estimate]:
        """Estimates of M ratios Σ_k a_k / Σ_k b_k with a, b (M, K). A key with b = 0 does not count for that ratio."""
        draws = self._ratios(numerators, denominators)
        return [self._estimate(a.sum() / b.sum(), draw, [b])
                for a, b, draw in zip(numerators, denominators, draws, strict=True)]

    def differences(self, first: tuple[np.ndarray, np.ndarray],
                    second: tuple[np.ndarray, np.ndarray]) -> list[Estimate]:
        """Estimates of M differences, second − first, of ratios given as (a, b), each (M, K), on the same resamples."""
        draws = self._ratios(*second) - self._ratios(*first)
        values = second[0].sum(1) / second[1].sum(1) - first[0].sum(1) / first[1].sum(1)
        return [self._estimate(value, draw, [b1, b2])
                for value, draw, b1, b2 in zip(values, draws, first[1], second[1], strict=True)]

    def estimate(self, value: float, draws: np.ndarray) -> Estimate:
        """The interval of any figure of all keys: `value`, and its values in the resamples, draws (R,), in order."""
        return self._estimate(value, np.asarray(draws), [np.ones(len(self.strata))])

    def _ratios(self, numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
        """(M, R)."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return (numerators @ self.weights.T) / (denominators @ self.weights.T)

    def _estimate(self, value: float, draws: np.ndarray, denominators: list[np.ndarray]) -> Estimate:
        used = np.any([b > 0 for b in denominators], axis=0)
        keys, strata = int(used.sum()), len(set(self.strata[used].tolist()))
        if keys - strata < 2:
            return Estimate(float(value), None, None)
        tail = _tail(keys, strata)
        low, high = np.nanquantile(draws, [tail, 1 - tail])
        return Estimate(float(value), float(min(low, value)), float(max(high, value)))


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval (low, high) of a share, for `successes` in `n` independent trials. (Wilson 1927)"""
    share, z2 = successes / n, _Z**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    return max(0.0, centre - half) if successes else 0.0, min(1.0, centre + half) if successes < n else 1.0


def share_estimate(successes: float, n: int) -> Estimate:
    """The share successes / n of `n` independent trials, with Wilson's 95 % interval."""
    return Estimate(successes / n, *wilson(successes, n))


def mean_estimate(values: Sequence[float]) -> Estimate:
    """The mean of N independent repeats (N,) with Student's 95 % interval; low and high are None for fewer than two."""
    values = np.asarray(values, dtype=float)
    mean, freedom = float(values.mean()), len(values) - 1
    if freedom < 1:
        return Estimate(mean, None, None)
    half = student_t(freedom) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def student_t(freedom: int) -> float:
    """The 97.5 % point of Student's t: a table up to 10 degrees of freedom, Cornish and Fisher's expansion above."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    return _Z + (_Z**3 + _Z) / (4 * freedom) + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * freedom**2)


def vote_shares(votes: Sequence[str], names: Sequence[str]) -> dict[str, Estimate]:
    """Share of the votes for each name, with Wilson's 95 % interval; a "tie" is divided evenly among all names.

    The shares sum to 1; with no preference each is 1 / len(names). Ties make the interval slightly too wide, because a
    divided vote varies less than a whole one. Votes are treated as independent: with many votes on few prompts the
    interval is too narrow. Low and high are None without votes. Raises ValueError on a vote for another name.
    """
    if unknown := sorted(set(votes) - {*names, "tie"}):
        raise ValueError(f"votes name {unknown[0]!r}, expected one of {', '.join(names)}, or 'tie'")
    if not votes:
        return {name: Estimate(1 / len(names), None, None) for name in names}
    won = {name: votes.count(name) + votes.count("tie") / len(names) for name in names}
    return {name: Estimate(won[name] / len(votes), *wilson(won[name], len(votes))) for name in names}


def _tail(keys: int, strata: int) -> float:
    """Probability to cut off at each end of the bootstrap distribution: the expanded percentile interval.

    Resampling K keys in H strata gives a variance smaller by (K − H) / K, and normal tails instead of Student's t;
    Φ(−√(K / (K − H)) · t_{K−H}) corrects for both. (Hesterberg 2015, §5.3; t by Cornish and Fisher's expansion)
    """
    freedom = keys - strata
    z = _Z
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return 0.5 * math.erfc(math.sqrt(keys / freedom) * t / math.sqrt(2))
