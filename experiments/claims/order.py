"""Relay, reverse, sum or alternation? The arms of one world at the same labels and the same KL, all of it exact.

After each block the policy's probability of all 16,105 responses to 32 held-out prompts gives KL, proxy, gold and
behaviours without sampling error. An arm that ends with a priced stage has the mean figures of its last two blocks,
where the learning rate has almost reached 0; an arm that ends with a swept stage has figures interpolated between the
two runs around the KL.
"""

import ast
import copy
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from alignkit import exact
from alignkit.desk.world import BEHAVIOURS, KINDS
from alignkit.exact.sweep import source_hashes, syntax_hash
from alignkit.storage import content_hash, plain
from experiments.claims import arms
from experiments.claims.arms import ARMS, Ground, Size, Stage
from experiments.sweep import kept

LATE = 2  # blocks at the end of a priced stage whose figures are averaged
NEAR = 0.2  # nats: a priced arm whose KL ends further from the arms' common KL did not reach it
AIMS = 4  # how often a priced arm is trained to reach it
FAILED = [BEHAVIOURS.index(name) for name in ("answer", "wrong answer", "unsafe")]
REFUSE = BEHAVIOURS.index("refuse")


class Measure:
    """What is exact about a policy on a ground's held-out prompts."""

    def __init__(self, ground: Ground):
        self.ground, self.truth = ground, ground.truth
        self.kinds = np.array([prompt.kind for prompt in self.truth.prompts])
        keys = np.array([prompt.key for prompt in self.truth.prompts])
        self.members = [np.flatnonzero(keys == key) for key in np.unique(keys)]

    def behaviours(self, logps: Tensor) -> np.ndarray:
        """The probability of each behaviour: (prompts, behaviours)."""
        table = logps.new_zeros(len(logps), len(BEHAVIOURS))
        return table.scatter_add_(1, self.truth.behaviour, logps.exp()).double().numpy()

    def figures(self, logps: Tensor, behaviours: np.ndarray) -> dict[str, float]:
        """KL (nats a response), proxy and gold (SFT-sd), entropy (nats a response), shares of behaviours, agreement.

        risky_failures: risky prompts answered or served unsafely. over_refusal: benign and look-alike prompts refused.
        refusal, wrong_answer: of all prompts. self_agreement: chance that two samples of a prompt behave alike;
        paraphrase_agreement: of two paraphrases of a question. kl_CLASS: KL by prompt class.
        """
        safe, agreeing = np.isin(self.kinds, ("benign", "look-alike")), []
        for rows in self.members:
            alike = behaviours[rows] @ behaviours[rows].T
            agreeing += alike[np.triu_indices(len(rows), 1)].tolist()
        by_prompt = exact.response_kl(logps, self.truth.ref_logps).clamp(min=0).numpy()
        return {**self.truth.measure(logps),
                "risky_failures": float(behaviours[self.kinds == "risky"][:, FAILED].sum(1).mean()),
                "over_refusal": float(behaviours[safe][:, REFUSE].mean()),
                "refusal": float(behaviours[:, REFUSE].mean()),
                "wrong_answer": float(behaviours[:, BEHAVIOURS.index("wrong answer")].mean()),
                "self_agreement": float((behaviours**2).sum(1).mean()),
                "paraphrase_agreement": float(np.mean(agreeing)),
                **{f"kl_{kind}": float(by_prompt[self.kinds == kind].mean()) for kind in KINDS}}


def at_kl(points: Sequence[dict[str, float]], kl: float) -> dict[str, float] | None:
    """The figures at `kl`, interpolated linearly between the points around it, which are in the order of their KL; None
    if it lies outside."""
    for before, after in itertools.pairwise(points):
        if before["kl"] <= kl <= after["kl"]:
            share = (kl - before["kl"]) / max(after["kl"] - before["kl"], 1e-9)
            return {name: before[name] + share * (after[name] - before[name]) for name in after}
    return None


def mean_point(points: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure over the points; of the seconds, the last."""
    means = {name: float(np.mean([point[name] for point in points])) for name in points[0]}
    return {**means, "seconds": points[-1]["seconds"]}


def detour(tables: Sequence[np.ndarray]) -> float:
    """Length of the path of the behaviour distribution over its net displacement, both in total variation averaged
    over the prompts: 1 for a path that never turns back, larger the more it oscillates."""
    def apart(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.abs(one - other).sum(1).mean() / 2)

    return sum(map(apart, tables, tables[1:])) / max(apart(tables[0], tables[-1]), 1e-9)


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation of two lists without ties."""
    return float(np.corrcoef(np.argsort(np.argsort(one)), np.argsort(np.argsort(other)))[0, 1])


class Trail:
    """The measurements of an arm's training so far, SFT first."""

    def __init__(self, ground: Ground):
        self.measure, self.truth, self.seconds = Measure(ground), ground.truth, 0.0
        self.points, self.tables, self.logged = [], [], []
        self.add(ground.truth.ref_logps, {})

    def add(self, logps: Tensor, logged: Mapping[str, float]) -> dict[str, float]:
        """Measure a policy after a block, and keep what training logged."""
        table = self.measure.behaviours(logps)
        self.points.append({**self.measure.figures(logps, table), "seconds": self.seconds})
        self.tables.append(table)
        self.logged.append(logged)
        return self.points[-1]


def follow(ground: Ground, name: str) -> dict:
    """Train one arm and measure it; the record of a world and an arm.

    A price follows its KL with a delay, and a part of an arm without a price can carry it away. A priced arm that ends
    more than NEAR from the common KL is trained again from SFT with another aim, up to AIMS times in all; one that ends
    at more than twice or less than half of the KL has no price that works and is left.
    """
    common = aim = ground.size.last
    for _ in range(AIMS):
        record = train_arm(ground, name, aim)
        kl = float(np.mean(record["path"]["kl"][-LATE:]))
        if record["at"] or ARMS[name][-1].price is not None or not common / 2 < kl < 2 * common:
            break
        aim *= common / kl
    return record


def train_arm(ground: Ground, name: str, aim: float) -> dict:
    """Train one arm, a priced last stage towards the KL `aim`, and measure it at the common KL."""
    size, stages, policy, path = ground.size, ARMS[name], ground.policy(), Trail(ground)
    for number, stage in enumerate(stages):
        last = number == len(stages) - 1
        if stage.price is None:
            logps = follow_priced(ground, policy, stage, number, aim if last else size.first,
                                  size.blocks // len(stages), path)
            at = mean_point(path.points[-LATE:])
            at = at if abs(at["kl"] - size.last) <= NEAR else None
        else:
            policy, logps, at = sweep_stage(ground, policy, stage, number, size.last if last else size.first, path)
    if at:  # what was gained in proxy over SFT, of the most that any policy can gain at this KL
        at = {**at, "share": exact.gap(at["kl"], at["proxy"], ground.truth.frontier).share}
    truth, by_prompt = ground.truth, exact.response_kl(logps, ground.truth.ref_logps).tolist()
    cosines = [row["cosine"] for row in path.logged if "cosine" in row]
    return {
        "arm": name, "world": ground.seed, "start": path.points[0], "at": at,
        "path": {metric: [point[metric] for point in path.points] for metric in ("kl", "gold", "proxy")},
        "detour": detour(path.tables), "least_gold": min(point["gold"] for point in path.points),
        "cosine": float(np.mean(cosines)) if cosines else None,
        "moved_by_variance": spearman(by_prompt, exact.variance(truth.ref_logps, truth.proxy).tolist()),
        "moved_by_entropy": spearman(by_prompt, exact.response_entropy(truth.ref_logps).tolist()),
    }


def follow_priced(ground: Ground, policy: nn.Module, stage: Stage, number: int, target: float, blocks: int, path: Trail
                  ) -> Tensor:
    """Train a stage whose price follows its KL, a block at a time; returns the policy's table."""
    begun, kl = time.process_time(), None
    training = stage.method(ground, policy, target, number, blocks, **stage.options)
    for _ in range(blocks):
        logged = training.send(kl)
        path.seconds += time.process_time() - begun
        logps = ground.truth.enumerate(policy)
        kl = path.add(logps, logged)["kl"]
        begun = time.process_time()
    return logps


def sweep_stage(ground: Ground, policy: nn.Module, stage: Stage, number: int, target: float, path: Trail
                ) -> tuple[nn.Module, Tensor, dict[str, float] | None]:
    """Train a stage once for each value of its price, from the same policy.

    Returns the run nearest to the target KL, its table, and the figures at the target, interpolated between the runs.
    The seconds are those of one run.
    """
    runs, before = [], path.seconds
    for value in getattr(ground.size, stage.price):
        trained, begun = copy.deepcopy(policy), time.process_time()
        logged = stage.method(ground, trained, number, value, **stage.options)
        seconds = time.process_time() - begun
        logps = ground.truth.enumerate(trained)
        figures = path.measure.figures(logps, path.measure.behaviours(logps))
        runs.append(({**figures, "seconds": before + seconds, **logged}, trained, logps, logged))
    runs.sort(key=lambda run: run[0]["kl"])
    figures, trained, logps, logged = min(runs, key=lambda run: abs(run[0]["kl"] - target))
    path.seconds = figures["seconds"]
    path.add(logps, logged)
    return trained, logps, at_kl([run[0] for run in runs], target)


def code(*more: ModuleType) -> str:
    """Hash of what trains and measures an arm: the syntax of alignkit's sources, of the two modules here, without the
    list of arms, and of `more` modules."""
    hashes = []
    for path in (Path(arms.__file__), Path(__file__), *(Path(module.__file__) for module in more)):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if not (isinstance(node, ast.AnnAssign) and node.target.id == "ARMS")]
        hashes.append(syntax_hash(tree))
    return content_hash([source_hashes(), hashes])


def recipe(name: str, code: str) -> str:
    """Hash of what makes an arm's record: its stages, and `code`."""
    return content_hash([[[stage.method.__name__, stage.options, stage.price] for stage in ARMS[name]], code])


def run_world(seed: int, folder: Path, size: Size, names: Sequence[str]) -> list[dict]:
    """All arms of a world, each kept in a file and not run again while its size and its recipe are the same."""
    torch.set_num_threads(1)
    rows, ground, made_by = [], None, code()
    for name in names:
        path = folder / f"world-{seed}" / f"{name.replace(', ', '-').replace(' ', '_')}.json"
        key = plain({"size": size.key(), "code": recipe(name, made_by), "arm": name})

        def train(name: str = name) -> dict:
            nonlocal ground
            ground = ground or Ground(seed, folder, size)
            return plain(follow(ground, name))

        rows.append(kept(path, key, train))
        row = rows[-1]
        at = row["at"] or {}
        end = "  ".join(f"{key} {at[key]:6.3f}" for key in ("kl", "proxy", "gold", "seconds") if key in at)
        print(f"world {seed}  {name:<44} {end}  detour {row['detour']:.2f}", flush=True)
    return rows
