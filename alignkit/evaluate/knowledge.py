"""The recorded experiment on what preferences can teach, what they cost elsewhere, and how training is undone.

`python -m experiments.knowledge` makes `knowledge.json`; `docs/knowledge.md` and notebook `what_it_cannot_learn` show
it. Every figure of a world is exact: policies are enumerated on held-out prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alignkit.evaluate.claims import Claim, by_seed
from alignkit.formulas.intervals import Estimate, mean_estimate
from alignkit.storage import read_json

FILE = Path(__file__).with_suffix(".json")
FACT_GROUPS = ("known", "guessed", "silent")


def pass_at_k(chances: Sequence[float], k: int) -> float:
    """The chance that at least one of `k` independent responses is right, averaged over questions: mean 1 − (1 − p)^k.

    chances (Q,): p of each question, exact, so that nothing has to be estimated from samples (Chen 2021, §2.1, has the
    estimator for samples). Raises ValueError on a chance outside 0 … 1, no question, or k below 1.
    """
    chances = np.asarray(chances, dtype=float)
    if not len(chances) or not ((chances >= 0) & (chances <= 1 + 1e-9)).all() or k < 1:
        raise ValueError(f"chances has {len(chances)} values and k is {k}, expected chances between 0 and 1, and k of "
                         "at least 1")
    return float((1 - (1 - chances.clip(max=1)) ** k).mean())


def share_of_right(marks: Mapping[str, Mapping[str, Sequence[float]]], group: str) -> float:
    """Share of right ones among the answers to a group's questions: mean P(right) / mean P(any answer)."""
    return float(np.mean(marks["right"][group]) / np.mean(marks["tried"][group]))


@dataclass(frozen=True)
class Knowledge:
    """The record. command, versions, settings: how it was made. claims: with the rules fixed before the run.

    worlds: world seed -> its record. "parts": the parts that were made. "facts": arm -> marks: "right" and "tried"
    (group -> chance of each question), "kl" (group or "side" -> nats to SFT), "side" (chance of the right response to
    each prompt of the second task).
    "levels": messiness -> "SFT", "PPO", "DPO": figures at the same KL, None if a method missed it. "path": rows along
    one long run of DPO. "wrong": start of a repair -> rows along it. "undo": policy -> risky failures after 0, 1 …
    steps on contrary demonstrations. unmeasured: name of a claim -> which part it still needs.
    """

    command: str
    versions: dict[str, str]
    settings: dict
    claims: tuple[Claim, ...]
    worlds: dict[int, dict]
    unmeasured: dict[str, str]

    def __getitem__(self, name: str) -> Claim:
        """The claim of this name. Raises KeyError that lists the names."""
        for claim in self.claims:
            if claim.name == name:
                return claim
        raise KeyError(f"{name!r}, expected one of {', '.join(claim.name for claim in self.claims)}")

    def has(self, part: str) -> bool:
        """Whether a part, such as "wrong-0.5", was made in every world."""
        return all(part in world["parts"] for world in self.worlds.values())

    @property
    def arms(self) -> list[str]:
        """The arms that were examined on facts, SFT first."""
        return list(next(iter(self.worlds.values()))["facts"])

    def pass_at(self, arm: str, group: str, k: int) -> Estimate:
        """pass@k of an arm on questions about a group of facts: the mean with its 95 % interval over worlds."""
        return mean_estimate([pass_at_k(world["facts"][arm]["right"][group], k) for world in self.worlds.values()])

    def side(self, arm: str) -> Estimate:
        """Chance of the right response in the second task, over worlds."""
        return mean_estimate([float(np.mean(world["facts"][arm]["side"])) for world in self.worlds.values()])

    def advantage(self, level: str) -> Estimate:
        """Gold of PPO − gold of DPO at the same KL, paired by world; NaN without a world in which both reached it."""
        rows = [world["levels"][level] for world in self.worlds.values()]
        values = [row["PPO"]["gold"] - row["DPO"]["gold"] for row in rows if row["PPO"] and row["DPO"]]
        return mean_estimate(values) if values else Estimate(float("nan"), None, None)


def load_knowledge(path: str | Path | None = None) -> Knowledge:
    """The record shipped with alignkit, or the one in `path`. Raises FileNotFoundError that says how to make one."""
    path = FILE if path is None else Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; make it with: python -m experiments.knowledge --json {path}")
    stored = read_json(path)
    claims = tuple(Claim(**{**row, "worlds": by_seed(row["worlds"])}) for row in stored["claims"])
    return Knowledge(stored["command"], stored["versions"], stored["settings"], claims, by_seed(stored["worlds"]),
                     stored["unmeasured"])
