"""The tables of *Unpacking DPO and PPO* (Ivison et al. 2024, arXiv 2406.09279), which notebook `unpacking` redraws.

Nothing here was measured by alignkit. `ivison.json` says where each figure comes from.
"""

from dataclasses import dataclass
from pathlib import Path

from alignkit.storage import read_json

CATEGORIES = ("factuality", "reasoning", "coding", "truthfulness", "safety", "instruction following")


@dataclass(frozen=True)
class Ivison:
    """Published figures, in points of 100.

    source, note: what was transcribed from where. data: Table 1, DPO on data sets: "name", "n" (pairs), "scores"
    (category -> points), "average"; the first is the SFT model, with n None. differences: Table 2, PPO − DPO: "name",
    "differences" (category -> points), "dpo" and "ppo" (averages). reward_models: Table 3: "name", "best_of_16" and
    "rewardbench"; start_best_of_16: the SFT model's. steps: single changes: "name", "before", "after".
    """

    source: str
    note: str
    start_best_of_16: float
    data: tuple[dict, ...]
    differences: tuple[dict, ...]
    reward_models: tuple[dict, ...]
    steps: tuple[dict, ...]

    def row(self, name: str) -> dict:
        """The row of Table 1 of this name. Raises KeyError that lists the names."""
        for row in self.data:
            if row["name"] == name:
                return row
        raise KeyError(f"{name!r} is no row of Table 1; there are {', '.join(row['name'] for row in self.data)}")

    def data_ranges(self) -> dict[str, float]:
        """Category, and "average" -> best data set minus worst data set of Table 1, the SFT model left out."""
        rows = [{**row["scores"], "average": row["average"]} for row in self.data if row["n"]]
        return {name: max(row[name] for row in rows) - min(row[name] for row in rows) for name in rows[0]}

    def algorithm_differences(self, without: tuple[str, ...] = ()) -> dict[str, float]:
        """Category, and "average" -> mean PPO − DPO over the data sets of Table 2, those named left out."""
        rows = [{**row["differences"], "average": row["ppo"] - row["dpo"]} for row in self.differences
                if row["name"] not in without]
        return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def load_ivison() -> Ivison:
    """The published tables, shipped with alignkit."""
    stored = read_json(Path(__file__).with_suffix(".json"))
    return Ivison(**{name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()})
