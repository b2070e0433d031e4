"""The recorded experiment on the causes of over-optimisation: reward models from biased or unbiased, noisy or clean
labels. Notebook 07 reads it; `python -m experiments.causes` makes `causes.json`.

The factors are *bias* (whether the annotator prefers politeness and length) and *noise* (the default annotator's soft
decisions and flipped labels, or almost none). The exact optimum of each reward model's own score is evaluated, so no
figure depends on the training of a policy.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alignkit.formulas.intervals import Estimate, student_t

FILE = Path(__file__).with_name("causes.json")
FAR = 6.0  # nats: the KL at which "far" is measured
AT = (1.0, 2.0)  # nats: the KLs at which gold is compared with the maximum over all policies
FACTORS = ("bias", "noise", "interaction")


@dataclass(frozen=True)
class Turn:
    """The turning point of gold along a curve. peak, far and fall are in units of gold, peak_kl is in nats."""

    peak: float  # the highest gold
    peak_kl: float  # its KL
    far: float  # gold at FAR nats, or at the end of a shorter curve
    fall: float  # highest gold up to FAR nats − `far`: 0 if gold has not fallen by then


def turn(kl: Sequence[float], gold: Sequence[float]) -> Turn:
    """The turning point of gold (N,) along a curve of increasing KL (N,), nats, interpolated linearly.

    Raises ValueError if KL does not increase from point to point.
    """
    kl, gold = np.asarray(kl, dtype=float), np.asarray(gold, dtype=float)
    if kl.shape != gold.shape or kl.ndim != 1 or not (np.diff(kl) >= 0).all():
        raise ValueError(f"kl has shape {kl.shape} and gold {gold.shape}, expected twice (N,), with kl increasing")
    peak, far = int(gold.argmax()), float(np.interp(FAR, kl, gold))
    near = gold[kl <= FAR]
    return Turn(float(gold[peak]), float(kl[peak]), far, max(0.0, float(near.max()) - far) if len(near) else 0.0)


@dataclass(frozen=True)
class Judge:
    """One reward model and the exact optimum of its score. Gold and proxy are in SFT-sd, relative to SFT.

    arm: its labels and their number. world: world seed. training: number of the response, label and training seed.
    figures: "peak", "peak_kl", "far", "fall" (see `Turn`), "lost at 1" and "lost at 2" (maximum gold of any policy at
    that KL − gold), "proxy at 2". labels: "turned" (share of labels that contradict the annotator's likelier choice),
    "against gold" (share that prefer the response with less gold, where gold differs). gold, proxy: along the record's
    `kl`.
    """

    arm: str
    world: int
    training: int
    figures: dict[str, float]
    labels: dict[str, float]
    gold: list[float]
    proxy: list[float]


@dataclass(frozen=True)
class Causes:
    """All recorded reward models. arms: name -> {"biased", "noisy", "pairs"}; kl: the grid of the curves, nats.

    best: world -> the maximum gold of any policy at each KL of the grid. command, settings, versions: how it was made.
    """

    command: str
    settings: dict
    versions: dict[str, str]
    arms: dict[str, dict]
    kl: list[float]
    best: dict[int, list[float]]
    judges: tuple[Judge, ...]

    @property
    def worlds(self) -> list[int]:
        """The world seeds, in order."""
        return sorted(self.best)

    def select(self, arm: str) -> list[Judge]:
        """The reward models of an arm by world, then training. Raises ValueError on an unknown arm."""
        if arm not in self.arms:
            raise ValueError(f"arm is {arm!r}, expected one of {', '.join(map(repr, self.arms))}")
        return sorted((each for each in self.judges if each.arm == arm), key=lambda each: (each.world, each.training))

    def values(self, arm: str, figure: str) -> np.ndarray:
        """A figure of an arm's reward models, (worlds × trainings,), in the same order in every arm, so that arms can
        be paired."""
        return np.array([each.figures[figure] for each in self.select(arm)])

    def contrast(self, factor: str, figure: str) -> np.ndarray:
        """Effect of a factor on a figure in each world and training, (worlds × trainings,).

        "bias", "noise": with the factor − without it, mean over the levels of the other factor. "interaction": effect
        of bias with noisy labels − effect of bias with clean labels. Raises ValueError on an unknown factor.
        """
        if factor not in FACTORS:
            raise ValueError(f"factor is {factor!r}, expected one of {', '.join(FACTORS)}")
        both, noise, bias, neither = (self.values(arm, figure) for arm in list(self.arms)[:4])
        return {"bias": (both - noise + bias - neither) / 2, "noise": (both - bias + noise - neither) / 2,
                "interaction": (both - noise) - (bias - neither)}[factor]

    def effect(self, factor: str, figure: str) -> Estimate:
        """The mean of `contrast`, as `mean`."""
        return self.mean(self.contrast(factor, figure))

    def mean(self, values: Sequence[float]) -> Estimate:
        """The mean of one value a reward model (worlds × trainings,), with a 95 % interval for the recorded worlds.

        Trainings are the repeats: variances are taken within each world, with worlds × (trainings − 1) degrees of
        freedom. So the interval says nothing about other worlds, of which there are too few here.
        """
        by_world = np.asarray(values, dtype=float).reshape(len(self.worlds), -1)
        worlds, trainings = by_world.shape
        mean = float(by_world.mean())
        if trainings < 2:
            return Estimate(mean, None, None)
        half = student_t(worlds * (trainings - 1)) * float((by_world.var(1, ddof=1).sum() / trainings) ** 0.5) / worlds
        return Estimate(mean, mean - half, mean + half)


def load_causes(path: str | Path | None = None) -> Causes:
    """The record shipped with alignkit, or the one in `path`. Raises FileNotFoundError that says how to make one."""
    path = FILE if path is None else Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; make it with: python -m experiments.causes --json {path}")
    stored = json.loads(path.read_text(encoding="utf-8"))
    best = {int(world): curve for world, curve in stored["best"].items()}
    return Causes(stored["command"], stored["settings"], stored["versions"], stored["arms"], stored["kl"], best,
                  tuple(Judge(**judge) for judge in stored["judges"]))
