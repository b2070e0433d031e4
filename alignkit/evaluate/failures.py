"""The failure museum: stored runs that are broken in exactly one way each, and what every check said about them.

Notebook `failures` reads it; `python -m experiments.failures` makes `failures.json`. All runs start from the same SFT
policy of one desk world and differ from a healthy run in nothing but their fault. Checks that would have stopped a run
were asked, their answer was stored, and the run went on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from alignkit.storage import read_json

FILE = Path(__file__).with_suffix(".json")
METHODS = ("ppo", "dpo")
SIDES = ("above", "below")
GOLD = "advice with gold"  # the one check that needs the true reward
FAILURE_CHECKS = {  # name -> what it is, and when it is made
    "chance warning": "`chance_warning` of the reward model's report on held-out pairs, before PPO",
    "reward ids": "`check_reward_ids` at the first iteration: does the reward model read the tokens that were sampled?",
    "step 0": "`check_first_rollout` (PPO) or `check_first_step` (DPO): ratio 1 and KL or margin 0 before any step",
    "each iteration": "`check_sampler` at every later iteration: sampler and trainer score alike",
    "not finite": "`NonFinite`: a score, loss or gradient is NaN or infinite",
    "max_kl": "`ran_away`: the logged KL is above the limit",
    "advice": "`advice` on evaluations of SFT and of this run, without gold",
    GOLD: "`advice` on the same evaluations with gold and behaviours, which only a world with a true reward has",
}


@dataclass(frozen=True)
class Check:
    """What one check said about a run.

    name: one of FAILURE_CHECKS. iteration: of the first time that it spoke (PPO iterations, DPO steps; 0: before
    training); None if it was silent. says: its words then, or ""; of `advice` only what was not also said of the
    healthy run. made: whether alignkit makes this check itself in such a run; if not, it was asked by hand.
    """

    name: str
    iteration: int | None
    says: str
    made: bool = True


@dataclass(frozen=True)
class StoredRun:
    """One run: what it logged, what is exact about it, and what every check said.

    name: of a fault, or of a healthy run. letter: of its room in the museum; "" for a healthy run. fault: one sentence,
    "" for a healthy run. method: "ppo" or "dpo". statistic, side: the logged number that the fault shows in ("gold"
    where no logged number tells what is wrong), and on which side of the healthy run; "" for a healthy run. logs: the
    statistics of `PPOStats.log()` or `DPOStats.log()`, a list with one number an iteration each. exact: "step", "kl"
    (to SFT, nats per response), "proxy" (score of the healthy run's reward model), "gold" and "entropy" at some
    iterations, by enumeration; gold in SFT-sd.
    """

    name: str
    letter: str
    fault: str
    method: str
    statistic: str
    side: str
    logs: dict[str, list[float]]
    exact: dict[str, list[float]]
    checks: tuple[Check, ...]

    @property
    def rows(self) -> list[dict[str, float]]:
        """What was logged, one dict an iteration, as in metrics.jsonl."""
        return [dict(zip(self.logs, values, strict=True)) for values in zip(*self.logs.values(), strict=True)]

    @property
    def exact_rows(self) -> list[dict[str, float]]:
        """What is exact, one dict for each iteration at which it was measured."""
        return [dict(zip(self.exact, values, strict=True)) for values in zip(*self.exact.values(), strict=True)]

    @property
    def caught(self) -> tuple[Check, ...]:
        """The checks that alignkit makes and that spoke, the earliest first; those that need gold are left out."""
        spoke = [check for check in self.checks if check.says and check.made and check.name != GOLD]
        return tuple(sorted(spoke, key=lambda check: check.iteration))

    def check(self, name: str) -> Check | None:
        """The check of this name; None if it has nothing to do with such a run."""
        return next((check for check in self.checks if check.name == name), None)

    def late(self, statistic: str, last: int = 5) -> float:
        """The mean of a logged statistic over the `last` iterations, or an exact one at the end. Raises ValueError if
        it is neither."""
        if statistic in self.exact and statistic not in self.logs:
            return self.exact[statistic][-1]
        if statistic not in self.logs:
            raise ValueError(f"statistic is {statistic!r}, expected one of {', '.join({**self.logs, **self.exact})}")
        values = self.logs[statistic][-last:]
        return sum(values) / len(values)


@dataclass(frozen=True)
class Refusal:
    """A run that did not start, or ended at once: what was wrong (one sentence), and what alignkit said."""

    fault: str
    error: str
    says: str


@dataclass(frozen=True)
class Failures:
    """The museum. command, settings, versions: how it was made; cpu_seconds: of all runs together."""

    command: str
    settings: dict
    versions: Mapping[str, str]
    cpu_seconds: float
    runs: tuple[StoredRun, ...]
    refusals: tuple[Refusal, ...]

    def __getitem__(self, name: str) -> StoredRun:
        """The run of this letter or name. Raises KeyError."""
        for run in self.runs:
            if name in (run.letter, run.name) and name:
                return run
        healthy = [repr(run.name) for run in self.runs if not run.letter]
        raise KeyError(f"{name!r}, expected one of {', '.join([*healthy, *(run.letter for run in self.broken)])}")

    @property
    def broken(self) -> tuple[StoredRun, ...]:
        """The broken runs in the order of their rooms."""
        return tuple(sorted((run for run in self.runs if run.letter), key=lambda run: run.letter))

    def healthy(self, method: str = "ppo") -> tuple[StoredRun, ...]:
        """The healthy runs of a method, the one that the broken runs are compared with first; the others have another
        seed. Raises ValueError on an unknown method."""
        if method not in METHODS:
            raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
        return tuple(run for run in self.runs if not run.letter and run.method == method)


def load_failures(path: str | Path | None = None) -> Failures:
    """The record shipped with alignkit, or the one in `path`. Raises FileNotFoundError that says how to make one."""
    path = FILE if path is None else Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; make it with: python -m experiments.failures --json {path}")
    stored = read_json(path)
    runs = [StoredRun(**{**run, "checks": tuple(Check(**check) for check in run["checks"])}) for run in stored["runs"]]
    return Failures(stored["command"], stored["settings"], stored["versions"], stored["cpu_seconds"], tuple(runs),
                    tuple(Refusal(**each) for each in stored["refusals"]))
