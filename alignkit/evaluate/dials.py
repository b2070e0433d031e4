"""The recorded dials: what DPO's β, PPO's price and reference, the number of labels and of steps, and DPO's rejected
term change, in several worlds.

`python -m experiments.dials` makes `dials.json`; `docs/dials.md` and notebook `dials` show it. All figures are exact on
held-out prompts: KL to SFT in nats per response, gold and proxy in SFT-sd.
"""

from dataclasses import dataclass
from pathlib import Path

from alignkit.evaluate.claims import Claim, by_seed
from alignkit.formulas.intervals import Estimate, mean_estimate
from alignkit.storage import read_json

FILE = Path(__file__).with_suffix(".json")
CURVES = {  # curve -> part of a world's record, its rows, and the field along which they are
    "beta": ("beta", "runs", "beta"), "optimum": ("beta", "promised", "beta"), "price": ("price", "runs", "price"),
    "epoch": ("steps", "rows", "epoch"), "labels": ("labels", "rows", "labels")}
REFERENCES = {"SFT": ("price", "path"), "moving average": ("reference", "average"),
              "one block before": ("reference", "moving"), "no price": ("reference", "none")}


@dataclass(frozen=True)
class Dials:
    """The record of the dials.

    command, versions, settings: how it was made. claims: the articles' sentences that it decides. worlds: world seed ->
    part -> its record, as `experiments.dials.runs` describes them.
    """

    command: str
    versions: dict[str, str]
    settings: dict
    claims: tuple[Claim, ...]
    worlds: dict[int, dict[str, dict]]

    def __getitem__(self, name: str) -> Claim:
        """The claim of this name. Raises KeyError that lists the names."""
        for claim in self.claims:
            if claim.name == name:
                return claim
        raise KeyError(f"{name!r} is no claim of this record; it has {', '.join(claim.name for claim in self.claims)}")

    def values(self, curve: str, metric: str) -> dict[float, dict[int, float]]:
        """Setting -> world seed -> a metric, without the worlds that have none.

        curve: "beta", DPO over β; "optimum", the KL-regularised optimum of the reward model over β; "price", PPO over
        its price; "epoch", DPO over epochs; "labels", over the number of labels, with metrics "kl", "dpo" and "ppo",
        gold of both at that KL. Raises KeyError on an unknown curve or metric.
        """
        part, rows, along = CURVES[curve]
        found: dict[float, dict[int, float]] = {}
        for seed, world in self.worlds.items():
            for row in world[part][rows]:
                if row[metric] is not None:
                    found.setdefault(row[along], {})[seed] = row[metric]
        return dict(sorted(found.items()))

    def curve(self, curve: str, metric: str) -> dict[float, Estimate]:
        """Setting -> mean of a metric over worlds with Student's 95 % interval; see `values`."""
        return {setting: mean_estimate(list(worlds.values())) for setting, worlds in self.values(curve, metric).items()}

    def paths(self, reference: str) -> dict[int, tuple[list[float], list[float]]]:
        """World seed -> KL to SFT and gold along PPO with a reference, SFT first. Raises KeyError on an unknown name:
        "SFT", "moving average", "one block before" or "no price"."""
        part, name = REFERENCES[reference]
        found = {}
        for seed, world in self.worlds.items():
            path = world[part][name] if part == "price" else world[part]["arms"][name]["path"]
            points = [world[part]["sft"], *path]
            found[seed] = ([point["kl"] for point in points], [point["gold"] for point in points])
        return found


def load_dials(path: str | Path | None = None) -> Dials:
    """The record shipped with alignkit, or the one in `path`. Raises FileNotFoundError that says how to make one."""
    path = FILE if path is None else Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; make it with: python -m experiments.dials --json {path}")
    stored = read_json(path)
    claims = tuple(Claim(**{**row, "worlds": by_seed(row["worlds"])}) for row in stored["claims"])
    worlds = {row["seed"]: {name: part for name, part in row.items() if name != "seed"} for row in stored["worlds"]}
    return Dials(stored["command"], stored["versions"], stored["settings"], claims, worlds)
