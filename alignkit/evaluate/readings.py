"""Readings: a statistic, a range fixed in advance, and a sentence for each outcome; the computed result picks the
sentence.

A notebook shows a reading instead of stating an observation from one seed. `experiments.readings` runs the notebooks in
many worlds and counts how often each reading held.
"""

import functools
import html
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from alignkit.formulas.intervals import Bootstrap, Estimate
from alignkit.storage import read_json

VERDICTS = {"holds": "Holds", "fails": "Not here", "unclear": "Cannot be told"}
RECORD = Path(__file__).with_suffix(".json")  # written by `experiments.readings`
METADATA = "alignkit_reading"  # the key in an output's metadata under which a reading is stored


@dataclass(frozen=True)
class Reading:
    """One sentence of a notebook and the statistic that supports it; a cell that ends with a reading shows both.

    name: unique in the series, such as "05.dpo_gold". what: the statistic in words, with its unit. value, low, high:
    the statistic and its 95 % interval, None if there are too few prompts. exact: computed without sampling.
    above, below: the range, None for no bound. holds, fails, unclear: the sentence for each verdict.
    """

    name: str
    what: str
    value: float
    low: float | None
    high: float | None
    exact: bool
    above: float | None
    below: float | None
    holds: str
    fails: str
    unclear: str

    @property
    def verdict(self) -> str:
        """"holds": the whole interval is inside the range; "fails": all of it is outside; "unclear": anything else."""
        lower = -math.inf if self.above is None else self.above
        upper = math.inf if self.below is None else self.below
        if self.low is None or self.high is None or math.isnan(self.value):
            return "unclear"
        if lower < self.low and self.high < upper:
            return "holds"
        if self.exact:
            return "fails"
        return "fails" if self.high < lower or self.low > upper else "unclear"

    @property
    def sentence(self) -> str:
        """The sentence of the verdict."""
        return getattr(self, self.verdict)

    @property
    def numbers(self) -> str:
        """The statistic, its interval and the range, in words."""
        ends = {"above": self.above, "below": self.below}
        bounds = " and ".join(f"{side} {end:g}" for side, end in ends.items() if end is not None)
        if self.low is None:
            interval = "too few prompts for an interval"
        elif self.exact:
            interval = "exact"
        else:
            interval = f"95 % interval {self.low:.3g} to {self.high:.3g}"
        return f"{self.what}: {self.value:.3g} ({interval}); expected {bounds}{_elsewhere(self.name)}"

    def __str__(self) -> str:
        return f"{VERDICTS[self.verdict]}: {self.sentence}\n    {self.numbers}"

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        text = (f"<p><strong>{VERDICTS[self.verdict]}:</strong> {html.escape(self.sentence)}<br>"
                f"<small>{html.escape(self.numbers)}</small></p>")
        return {"text/plain": str(self), "text/html": text}, {METADATA: {**asdict(self), "verdict": self.verdict}}


def reading(name: str, what: str, statistic: Estimate | float, *, above: float | None = None,
            below: float | None = None, holds: str, fails: str, unclear: str) -> Reading:
    """Make a Reading: `holds` if the interval lies inside (above, below), `fails` if outside, otherwise `unclear`.

    statistic: an Estimate (a value with its 95 % interval, as `difference` and `mean_estimate` return), or a plain
    number for a quantity computed without sampling. Fix the range before you look at the result. An interval that
    contains a bound is always unclear, so "no difference was found" is never read as "there is no difference". To claim
    that a difference is small, give both bounds.

    >>> print(reading("x.gold", "change of gold, SFT-sd", Estimate(0.2, 0.1, 0.3), above=0, holds="Gold rose.",
    ...               fails="Gold did not rise.", unclear="Whether gold rose cannot be told."))
    Holds: Gold rose.
        change of gold, SFT-sd: 0.2 (95 % interval 0.1 to 0.3); expected above 0

    Raises ValueError without a bound, or with above ≥ below.
    """
    if above is None and below is None:
        raise ValueError(f"reading {name!r} has no range: give above, below or both")
    if above is not None and below is not None and above >= below:
        raise ValueError(f"reading {name!r} has above={above:g} and below={below:g}, expected above < below")
    exact = not isinstance(statistic, Estimate)
    if exact:
        statistic = Estimate(float(statistic), float(statistic), float(statistic))
    return Reading(name, what, float(statistic.value), *(None if end is None else float(end) for end in (
        statistic.low, statistic.high)), exact, above, below, holds, fails, unclear)


def clustered_mean(values: Sequence[float], clusters: Sequence) -> Estimate:
    """The mean of values (N,) with the 95 % interval of a bootstrap that resamples whole clusters.

    clusters: the cluster of each value (N,), such as its question. Values of one cluster are correlated, and an
    interval that assumes independence would be too narrow. Raises ValueError if the lengths differ.
    (`alignkit.formulas.intervals`)
    """
    if len(values) != len(clusters):
        raise ValueError(f"clusters has length {len(clusters)}, expected {len(values)} (the length of values)")
    _, number = np.unique(clusters, return_inverse=True)
    sums, sizes = np.bincount(number, np.asarray(values, dtype=float)), np.bincount(number)
    return Bootstrap(np.zeros(len(sizes))).estimates(sums[None], sizes[None].astype(float))[0]


def readings_of(notebook: str | Path) -> list[dict]:
    """The readings in an executed notebook, in order: the fields of Reading and `verdict`. Does not run the
    notebook."""
    cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return [output["metadata"][METADATA] for output in outputs if METADATA in output.get("metadata", {})]


@functools.cache
def _record() -> dict[str, dict]:
    return read_json(RECORD)["readings"] if RECORD.exists() else {}


def _elsewhere(name: str) -> str:
    """How often a reading held in the recorded worlds; "" if it was not recorded."""
    if name not in _record():
        return ""
    verdicts = [figures[3] for figures in _record()[name]["seeds"].values()]
    return f"; desk worlds recorded with default settings: holds in {verdicts.count('holds')} of {len(verdicts)}"
