"""When a run reached a level, and how many times sooner one side did than another."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alignkit.formulas.intervals import Estimate, mean_estimate

UNITS = ("cpu", "wall", "samples")


@dataclass(frozen=True)
class Reached:
    """What a run had spent when it reached a level. If `censored` it never did: then it is what the whole run took.

    cpu, wall: seconds of training. samples: responses sampled.
    """

    cpu: float
    wall: float
    samples: float
    censored: bool


def reached(points: Mapping[str, Sequence[float]], name: str, level: float, most_kl: float = math.inf) -> Reached:
    """When the column `name` first is at least `level` with a KL of at most `most_kl`.

    points: columns cpu, wall, samples, kl and `name`, a value each measurement, in order; the first is before training.
    Between that measurement and the one before, everything is taken to change linearly; if the one before has the level
    too (at too large a KL), it is the later one's. Raises ValueError if the columns differ in length or there are none.
    """
    columns = [points[column] for column in (*UNITS, "kl", name)]
    if len({len(column) for column in columns}) != 1 or not len(columns[0]):
        raise ValueError(f"points has columns of {[len(column) for column in columns]} values, expected one length, "
                         "1 or more")
    values = points[name]
    for i, value in enumerate(values):
        if value >= level and points["kl"][i] <= most_kl:
            before = values[i - 1] if i else math.nan
            part = (level - before) / (value - before) if before < level else 1.0
            first = max(i - 1, 0)
            spent = {unit: points[unit][first] + part * (points[unit][i] - points[unit][first]) for unit in UNITS}
            return Reached(**spent, censored=False)
    return Reached(**{unit: points[unit][-1] for unit in UNITS}, censored=True)


@dataclass(frozen=True)
class Ratio:
    """How many times sooner: the geometric mean over the seeds with Student's 95 % interval of the log ratio.

    each: the seeds' ratios. bound: "" if all runs reached the level; "at least" if some of theirs ended before it, "at
    most" if some of ours did: then value and interval are those of bounds, and hold in that direction only; "unknown"
    if both happened.
    """

    value: float
    low: float | None
    high: float | None
    each: tuple[float, ...]
    bound: str = ""


def ratio(theirs: Sequence[Reached], ours: Sequence[Reached], unit: str = "cpu") -> Ratio:
    """theirs / ours, paired by seed, in a unit of `UNITS`. Raises ValueError if the lengths differ or are 0.

    A run that ended before the level has taken at least what it took, so its ratio is a bound.
    """
    if len(theirs) != len(ours) or not theirs:
        raise ValueError(f"theirs has {len(theirs)} runs, ours {len(ours)}, expected one number of runs, 1 or more")
    each = tuple(getattr(one, unit) / getattr(other, unit) for one, other in zip(theirs, ours, strict=True))
    log: Estimate = mean_estimate([math.log(value) for value in each])
    least, most = any(run.censored for run in theirs), any(run.censored for run in ours)
    ends = [None if end is None else math.exp(end) for end in (log.low, log.high)]
    bound = "unknown" if least and most else "at least" if least else "at most" if most else ""
    return Ratio(math.exp(log.value), *ends, each, bound)


def soonest(runs: Mapping[str, Sequence[Reached]]) -> str:
    """The name whose runs reached the level on most seeds; among those, in the least CPU time (geometric mean)."""
    def order(name: str) -> tuple[int, float]:
        return (sum(run.censored for run in runs[name]), sum(math.log(run.cpu) for run in runs[name]))

    return min(runs, key=order)
