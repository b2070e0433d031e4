"""The recorded factorial of *Unpacking DPO and PPO*: data × algorithm × reward model × prompts, in the desk world.

`python -m experiments.unpacking` makes `unpacking.json`; `docs/unpacking.md` and notebook `unpacking` show it. DPO has
neither a reward model nor prompts of its own, so there are two balanced parts: "all", every data set with both
algorithms, and "ppo", PPO on overall labels with every reward model and every mix of prompts. All policies of a world
are compared at the same KL to SFT.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alignkit.evaluate.claims import Claim, by_seed
from alignkit.formulas.intervals import Estimate, mean_estimate
from alignkit.storage import read_json

FILE = Path(__file__).with_suffix(".json")
DATA = ("overall", "multi-aspect", "arena", "few, expert")
DPO, PPO = "DPO", "PPO"
REWARDS = ("bag of phrases", "small transformer", "transformer")
MIXES = ("even", "targeted")
USUAL = {"data": DATA[0], "algorithm": PPO, "reward model": REWARDS[-1], "prompts": MIXES[0]}  # where not varied
PARTS = {  # part -> factor -> levels
    "all": {"data": DATA, "algorithm": (DPO, PPO)},
    "ppo": {"reward model": REWARDS, "prompts": MIXES},
}


def decompose(table: np.ndarray, factors: Sequence[str]) -> dict[str, float]:
    """Sum of squares of every main effect and interaction of a balanced table with one value a cell.

    table: an axis for each factor. The effect of factors S is the mean over all others, minus the effects of every
    smaller set within S; the sums of squares add up to Σ (y − ȳ)². Names of interactions are joined by " × ". Raises
    ValueError if factors and axes differ in number. (Fisher's analysis of variance)
    """
    table, axes = np.asarray(table, dtype=float), range(len(factors))
    if table.ndim != len(factors):
        raise ValueError(f"table has {table.ndim} axes, expected {len(factors)}: {', '.join(factors)}")
    effects: dict[tuple[int, ...], np.ndarray] = {}
    for size in range(len(factors) + 1):
        for chosen in itertools.combinations(axes, size):
            others = tuple(axis for axis in axes if axis not in chosen)
            means = table.mean(axis=others, keepdims=True)
            effects[chosen] = means - sum(effects[part] for part in effects if set(part) < set(chosen))
    return {" × ".join(factors[axis] for axis in chosen): float(table.size * (effect**2).mean())
            for chosen, effect in effects.items() if chosen}


def world_table(world: Mapping, part: str, metric: str) -> np.ndarray:
    """A metric of one world's policies: an array with an axis for each factor of `PARTS[part]`."""
    cells = {tuple(cell[factor] for factor in USUAL): cell["at"][metric] for cell in world["cells"]}

    def value(levels: tuple[str, ...]) -> float:
        named = {**USUAL, **dict(zip(PARTS[part], levels, strict=True))}
        if named["algorithm"] == DPO:
            named |= {"reward model": None, "prompts": None}
        return cells[tuple(named.values())]

    values = [value(levels) for levels in itertools.product(*PARTS[part].values())]
    return np.array(values).reshape([len(levels) for levels in PARTS[part].values()])


def place_of(factor: str) -> tuple[str, int]:
    """The part that a factor belongs to, and its axis there. Raises ValueError on an unknown factor."""
    for part, factors in PARTS.items():
        if factor in factors:
            return part, list(factors).index(factor)
    raise ValueError(f"factor is {factor!r}, expected one of {', '.join(USUAL)}")


def level_means(table: np.ndarray, axis: int) -> np.ndarray:
    """The mean of each level of a factor over all others."""
    return table.mean(axis=tuple(other for other in range(table.ndim) if other != axis))


@dataclass(frozen=True)
class Unpacking:
    """The record. command, versions, settings: how it was made. worlds: world seed -> "cells", "start", "rewards".
    claims: what the article says about the four factors, with the statistic of every world and its rule.

    cells: a list of policies: "data", "algorithm", "reward model", "prompts" (None with DPO); "at": metric -> value at
    the common KL; "trained_kl": the KL with which training ended, nats; "power": t of the move to the common KL, see
    `experiments.unpacking.cells.brought_to`; "seconds" of CPU; "share": of the most proxy that any policy has at this
    KL, in one cell. start: metric -> SFT's value. rewards: reward model of the overall labels -> "accuracy" and
    "best_of_n".
    Metrics: gold (SFT-sd), gold_CLASS, gold_domain (the classes that the targeted mix aims at), the aspects of gold
    (helpful, safe, concise, polite; they add up to gold but for a constant), and those of `experiments.claims.order`.
    """

    command: str
    versions: dict[str, str]
    settings: dict
    worlds: dict[int, dict]
    claims: tuple[Claim, ...] = ()

    def tables(self, part: str, metric: str) -> np.ndarray:
        """`world_table` of every world: (worlds, *levels)."""
        return np.stack([world_table(world, part, metric) for world in self.worlds.values()])

    def effects(self, factor: str, metric: str) -> dict[str, Estimate]:
        """Main effects: level -> its mean minus the mean of all levels, with a 95 % t interval over worlds."""
        part, axis = place_of(factor)
        means = np.stack([level_means(table, axis) for table in self.tables(part, metric)])
        means -= means.mean(1, keepdims=True)
        return {level: mean_estimate(means[:, place].tolist())
                for place, level in enumerate(PARTS[part][factor])}

    def ranges(self, factor: str, metric: str) -> Estimate:
        """Best level minus worst level of a factor in each world: the mean, with a 95 % t interval over worlds."""
        part, axis = place_of(factor)
        return mean_estimate([float(np.ptp(level_means(table, axis))) for table in self.tables(part, metric)])

    def shares(self, part: str, metric: str) -> dict[str, Estimate]:
        """Share of a world's variance over its policies due to each main effect and interaction: the mean over worlds,
        with a 95 % t interval. They add up to 1."""
        found = [decompose(table, list(PARTS[part])) for table in self.tables(part, metric)]
        return {effect: mean_estimate([squares[effect] / sum(squares.values()) for squares in found])
                for effect in found[0]}

    def rewards(self, figure: str) -> dict[str, Estimate]:
        """Reward model of the overall labels -> "accuracy" or "best_of_n", with a 95 % t interval over worlds."""
        return {reward: mean_estimate([world["rewards"][reward][figure] for world in self.worlds.values()])
                for reward in REWARDS}


def load_unpacking(path: str | Path | None = None) -> Unpacking:
    """The record shipped with alignkit, or the one in `path`. Raises FileNotFoundError that says how to make one."""
    path = FILE if path is None else Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; make it with: python -m experiments.unpacking --json {path}")
    stored = read_json(path)
    worlds = by_seed({row["world"]: row for row in stored["worlds"]})
    claims = tuple(Claim(**{**row, "worlds": by_seed(row["worlds"])}) for row in stored["claims"])
    return Unpacking(stored["command"], stored["versions"], stored["settings"], worlds, claims)
