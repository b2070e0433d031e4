"""The recorded regret of the adviser and of simple rules, in worlds that no rule was tuned on.

`python -m experiments.advice` makes `advice.json`; `docs/advice.md` and notebook `advice` show it. Regret is the gold
of the best candidate in hindsight minus that of the one taken, both exact by enumeration, in SFT-sd.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignkit.formulas.intervals import Estimate, mean_estimate
from alignkit.storage import read_json

FILE = Path(__file__).with_name("advice.json")
ADVISERS = ("the adviser, with gold", "the adviser, without gold")
FREEZING = "64 labels"  # the way to choose a checkpoint that claim C38 is about


@dataclass(frozen=True)
class AdvisedWorld:
    """One world: what could be taken in it, what each rule took, and how a checkpoint is best chosen.

    trouble: what was wrong with it. accuracy: of the reward model on held-out labels, with Wilson's interval.
    candidates: name -> exact "kl", "gold", "risky_failures", "over_refusal", "seconds" of training, and "seen_gold" and
    "seen_proxy", the evaluation. picks: rule -> candidate. walks: adviser -> its decisions, each (decision, step).
    choosing: a way to choose among SFT and PPO's checkpoints -> its expected regret, SFT-sd.
    """

    seed: int
    trouble: dict
    accuracy: tuple[float, float, float]
    candidates: dict[str, dict[str, float]]
    picks: dict[str, str]
    walks: dict[str, list]
    choosing: dict[str, float]

    def regret(self, rule: str) -> float:
        """Gold of the best candidate minus that of the one that a rule took, SFT-sd."""
        gold = {name: figures["gold"] for name, figures in self.candidates.items()}
        return max(gold.values()) - gold[self.picks[rule]]


@dataclass(frozen=True)
class AdviceRecord:
    """The regret of every rule in every world. command, versions, settings: how it was made. rules: rule -> what it
    takes, in words."""

    command: str
    versions: dict[str, str]
    settings: dict
    rules: dict[str, str]
    worlds: tuple[AdvisedWorld, ...]

    def regrets(self, rule: str) -> dict[int, float]:
        """World seed -> regret of a rule. Raises KeyError that lists the rules."""
        if rule not in self.rules:
            raise KeyError(f"{rule!r} is no rule; there are {', '.join(self.rules)}")
        return {world.seed: world.regret(rule) for world in self.worlds}

    def regret(self, rule: str) -> Estimate:
        """Mean regret with Student's 95 % interval over worlds."""
        return mean_estimate(list(self.regrets(rule).values()))

    def difference(self, rule: str, other: str) -> Estimate:
        """Regret of `rule` minus that of `other`, paired by world, with its 95 % interval: below 0 `rule` is better."""
        first, second = self.regrets(rule), self.regrets(other)
        return mean_estimate([first[seed] - second[seed] for seed in first])

    def choosing(self, way: str) -> Estimate:
        """Mean expected regret of a way to choose a checkpoint, with its 95 % interval over worlds."""
        return mean_estimate([world.choosing[way] for world in self.worlds])

    @property
    def freezing(self) -> dict[int, float]:
        """World seed -> regret of PPO's last checkpoint − expected regret of the one that 64 labels each choose: what
        it is worth to freeze and evaluate (claim C38)."""
        return {world.seed: world.choosing["the last"] - world.choosing[FREEZING] for world in self.worlds}

    @property
    def simple(self) -> Sequence[str]:
        """The rules that are not the adviser."""
        return [rule for rule in self.rules if rule not in ADVISERS]


def load_advice(path: str | Path | None = None) -> AdviceRecord:
    """The record shipped with alignkit, or the one in `path`. Raises FileNotFoundError that says how to make one."""
    path = FILE if path is None else Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; make it with: python -m experiments.advice --json {path}")
    stored = read_json(path)
    worlds = tuple(AdvisedWorld(**{**row, "accuracy": tuple(row["accuracy"])}) for row in stored["worlds"])
    return AdviceRecord(stored["command"], stored["versions"], stored["settings"], stored["rules"], worlds)
