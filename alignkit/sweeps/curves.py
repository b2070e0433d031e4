"""Which curves a sweep's plane has: the exact ones of one seed's world, or an estimate from stored responses, or none.

The page, the explorer, the app and the notebook all ask here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from alignkit.sweeps.results import SweepResults
from alignkit.sweeps.sampled import sampled_frontier


@dataclass(frozen=True)
class Curves:
    """The curves of a plane and what can be said about them.

    world: the seed of the world to which exact curves belong. exact: "beta", "kl", "proxy", "gold" of the optimum;
    gold_frontier, best_of_n: as in `SweepResults`. sampled: an estimate instead (`sampled_frontier`). words: what the
    curves are and where points may lie above them, and which seeds have no exact curve, and why.
    """

    words: str
    world: int | None = None
    exact: Mapping | None = None
    gold_frontier: Mapping | None = None
    best_of_n: Mapping | None = None
    sampled: Mapping | None = None

    @property
    def drawn(self) -> dict[str, object]:
        """The curves as `plots.plot_sweep_plane` takes them."""
        if self.exact is None:
            return {"sampled": self.sampled}
        gold = self.gold_frontier
        return {"proxy": (self.exact["kl"], self.exact["proxy"]), "gold_along": (self.exact["kl"], self.exact["gold"]),
                "gold_frontier": (gold["kl"], gold["gold"]) if gold else None, "best_of_n": self.best_of_n}


def sweep_curves(results: SweepResults, seed: int | None = None) -> Curves:
    """The curves to draw beside a sweep's points: exact ones, otherwise the estimate from SFT's stored responses.

    seed: the one whose curves are asked for, which are none of another world; None: the first seed that has any.
    """
    missing = _missing_words(results.no_curve)
    if results.frontiers and (seed is None or seed in results.frontiers):
        world = min(results.frontiers) if seed is None else seed
        return Curves(_exact_words(results, world) + missing, world, results.frontiers[world],
                      results.gold_frontiers.get(world), results.best_of_n.get(world))
    seeds = (results.seeds or [None]) if seed is None else [seed]
    sampled = next(filter(None, (sampled_frontier(results, each) for each in seeds)), None)
    return Curves(((_sampled_words(sampled) if sampled else "") + missing).strip(), sampled=sampled)


def _exact_words(results: SweepResults, world: int) -> str:
    prompts = results.curve_prompts.get(world)
    others = len(results.seeds) > 1
    if results.exact:
        words = f"The curves are exact for world {world}, on {prompts} prompts: no policy has more proxy at that KL."
        return words + " Points of other worlds may lie a little above them." * others
    return (f"The curves are exact for world {world}, that of seed {world}: on the {prompts} held-out prompts on which "
            "its jobs were evaluated no policy has more proxy at that KL. The points were sampled on these prompts, so "
            f"one may lie above a curve by chance{'; those of other seeds belong to other worlds' * others}.")


def _missing_words(no_curve: Mapping[int, str]) -> str:
    seeds: dict[str, list[str]] = {}
    for seed, why in no_curve.items():
        seeds.setdefault(why, []).append(str(seed))
    return "".join(f" No exact curve of seed{'s' * (len(own) > 1)} {', '.join(own)}: {why}."
                   for why, own in seeds.items())


def _sampled_words(sampled: Mapping) -> str:
    return (f"The grey curve is an estimate from {sampled['samples']} stored responses of SFT to each prompt. It falls "
            f"short before its ceiling, log {sampled['samples']} nats, so a point may lie above it.")
