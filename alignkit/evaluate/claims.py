"""The recorded claims of the articles: what each says, what was measured in worlds nobody tuned to, and the verdict.

`python -m experiments.claims` makes `claims.json`; `docs/claims.md` and notebook `relay_or_sum` show it. A rule is
fixed before the run: a claim is a statement that a statistic is above (or below) 0 by more than a margin, the smallest
difference that matters, or that it is within that margin of 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from alignkit.formulas.intervals import Estimate, mean_estimate
from alignkit.storage import read_json

FILE = Path(__file__).with_suffix(".json")
VERDICTS = ("confirmed", "refuted", "undecided")
SIDES = ("above", "below", "within")


def verdict(estimate: Estimate, side: str, margin: float) -> str:
    """What a 95 % interval says about the claim that a statistic is on `side` of 0 by more than `margin`.

    side "above" or "below": "refuted" if the interval lies inside ±margin, or wholly on the other side of 0;
    "confirmed" if it lies wholly on the claimed side of 0 and the value is beyond the margin. side "within":
    "confirmed" if the interval lies inside ±margin, "refuted" if wholly outside. Otherwise "undecided". Raises
    ValueError on an unknown side, a negative margin, or "within" without a margin.
    """
    if side not in SIDES or not margin >= 0:
        raise ValueError(f"side is {side!r} and margin {margin}, expected one of {', '.join(SIDES)}, and 0 or more")
    if side == "within" and not margin:
        raise ValueError("margin is 0, expected more than 0 with side 'within'")
    if estimate.low is None or np.isnan(estimate.value):
        return "undecided"
    if side == "within":
        inside = -margin < estimate.low and estimate.high < margin
        outside = estimate.low > margin or estimate.high < -margin
        return "confirmed" if inside else "refuted" if outside else "undecided"
    sign = 1 if side == "above" else -1
    low, high = sorted((sign * estimate.low, sign * estimate.high))
    if high < 0 or (low > -margin and high < margin):
        return "refuted"
    return "confirmed" if low > 0 and sign * estimate.value > margin else "undecided"


@dataclass(frozen=True)
class Claim:
    """One claim of the articles, and what was measured.

    name: as in the table of `docs/claims.md`, such as "C37". source: the article, S0 to S4. original: the sentence as
    it was written. english: what it claims. quantity: the statistic, with its unit. side, margin: the rule, see
    `verdict`. experiment: what measured it. worlds: world seed -> the statistic, None where it could not be measured.
    """

    name: str
    source: str
    original: str
    english: str
    quantity: str
    side: str
    margin: float
    experiment: str
    worlds: dict[int, float | None]

    @property
    def values(self) -> list[float]:
        """The statistic in each world in which it could be measured."""
        return [value for value in self.worlds.values() if value is not None]

    @property
    def estimate(self) -> Estimate:
        """The mean over worlds with Student's 95 % interval; worlds are the independent repeats."""
        return mean_estimate(self.values) if self.values else Estimate(float("nan"), None, None)

    @property
    def verdict(self) -> str:
        """See `verdict`."""
        return verdict(self.estimate, self.side, self.margin)


@dataclass(frozen=True)
class Claims:
    """All measured claims, and the arms of the experiment on order.

    command, versions, settings: how the record was made. arms: arm -> world seed -> its record: "at" (metric -> value
    at the common KL to SFT; None if the arm did not reach it), "start" (the same of SFT), "path" ("kl", "gold" and
    "proxy" after each block), "detour", "cosine".
    unmeasured: name of a claim -> why it is not measured. longer: claims that compare DPO or the relay with something,
    measured again with more epochs of DPO, under the same names.
    """

    command: str
    versions: dict[str, str]
    settings: dict
    claims: tuple[Claim, ...]
    arms: dict[str, dict[int, dict]]
    unmeasured: dict[str, str]
    longer: tuple[Claim, ...] = ()

    def __getitem__(self, name: str) -> Claim:
        """The claim of this name. Raises KeyError that lists the names."""
        for claim in self.claims:
            if claim.name == name:
                return claim
        raise KeyError(f"{name!r} is no measured claim; there are {', '.join(claim.name for claim in self.claims)}")

    @property
    def both(self) -> list[tuple[Claim, Claim]]:
        """The claims of `longer`, each as measured in the same worlds with fewer epochs of DPO, and with more."""
        def within(claim: Claim, other: Claim) -> Claim:
            return replace(claim, worlds={seed: value for seed, value in claim.worlds.items()
                                          if other.worlds.get(seed) is not None})

        return [(within(self[claim.name], claim), claim) for claim in self.longer]

    def values(self, arm: str, metric: str) -> dict[int, float]:
        """World seed -> a metric of an arm at the common KL, in the worlds in which the arm reached it."""
        return {world: row["at"][metric] for world, row in self.arms[arm].items() if row["at"]}

    def difference(self, arm: str, other: str, metric: str) -> Estimate:
        """`arm` minus `other` at the common KL, paired by world: the mean with its 95 % interval over worlds."""
        first, second = self.values(arm, metric), self.values(other, metric)
        both = [first[world] - second[world] for world in first if world in second]
        return mean_estimate(both) if both else Estimate(float("nan"), None, None)


def load_claims(path: str | Path | None = None) -> Claims:
    """The record shipped with alignkit, or the one in `path`. Raises FileNotFoundError that says how to make one."""
    path = FILE if path is None else Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; make it with: python -m experiments.claims --json {path}")
    stored = read_json(path)
    claims, longer = (tuple(Claim(**{**row, "worlds": by_seed(row["worlds"])}) for row in stored.get(name, ()))
                      for name in ("claims", "longer"))
    return Claims(stored["command"], stored["versions"], stored["settings"], claims,
                  {arm: by_seed(worlds) for arm, worlds in stored["arms"].items()}, stored["unmeasured"], longer)


def by_seed(worlds: Mapping[str, object]) -> dict[int, object]:
    """JSON's text keys as world seeds."""
    return {int(seed): value for seed, value in worlds.items()}
