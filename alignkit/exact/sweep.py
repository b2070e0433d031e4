"""The recorded sweep: PPO and DPO over β and world seeds, evaluated exactly. Notebooks and sliders read it.

`python -m experiments.sweep` makes `sweep.json`. The file stores hashes of the code that made it. A test compares them
with the present code, so the figures are never older than the code that they describe.
"""

import ast
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
SOURCES = ("configs.py", "data/encoding.py", "data/fitting.py", "desk", "dpo.py", "exact", "formulas", "forward",
           "models", "optim.py", "ppo.py", "ppo_state.py", "reward.py", "sft.py", "task.py", "trainer.py")
UNMEASURED = ("exact/cache.py", "exact/causes.py", "exact/sweep.py")  # these store and read figures but compute none
FILE = Path(__file__).with_name("sweep.json")


@dataclass(frozen=True)
class RecordedRun:
    """One run from SFT, evaluated on the world's held-out prompts by enumeration: no figure has sampling error.

    value: PPO's kl_coef or DPO's beta. kl, entropy: nats per response. proxy, gold: SFT-sd. optimum: proxy of the best
    policy at this KL. share: (proxy − SFT's) / (optimum − SFT's). trained: "kl", "proxy" and "share" on training
    prompts, which separates incomplete optimisation from incomplete generalisation to new questions. shares: prompt
    class -> behaviour -> probability.
    trajectory: "step", "kl", "proxy", "gold", "entropy", lists along training (iterations of PPO, optimiser steps of
    DPO). by_prompt: "kl", "proxy", "gold", lists in the order of the world's prompts.
    """

    method: str
    value: float
    seed: int
    kl: float
    proxy: float
    gold: float
    entropy: float
    optimum: float
    share: float
    trained: dict[str, float]
    shares: dict[str, dict[str, float]]
    trajectory: dict[str, list[float]]
    by_prompt: dict[str, list[float]]
    config: str  # hash of the whole config
    seconds: float


@dataclass(frozen=True)
class RecordedWorld:
    """Exact quantities of one seed's SFT policy and reward model on its held-out prompts.

    frontier: "beta", "kl", "proxy", "gold" (gold along it); gold_frontier: "beta", "kl", "gold"; best_of_n: "n", "kl",
    "proxy", "gold": lists. sft: its "proxy", "gold", "entropy", and "shares". by_prompt: "variance" of the proxy under
    SFT, "entropy". gold_scale: mean and sd of raw gold under SFT; every gold here is (raw − mean) / sd.
    """

    seed: int
    prompts: list[str]
    kinds: list[str]
    keys: list[int]
    frontier: dict[str, list[float]]
    gold_frontier: dict[str, list[float]]
    best_of_n: dict[str, list[float]]
    sft: dict
    by_prompt: dict[str, list[float]]
    gold_scale: tuple[float, float]
    reward: dict[str, float]


@dataclass(frozen=True)
class Sweep:
    """All runs and worlds. command, versions, sources, configs: how they were made."""

    command: str
    versions: dict[str, str]
    sources: dict[str, str]
    configs: dict[str, dict]
    worlds: dict[int, RecordedWorld]
    runs: tuple[RecordedRun, ...]
    probe: dict[str, float]

    @property
    def seeds(self) -> list[int]:
        """The world seeds, in order."""
        return sorted(self.worlds)

    def values(self, method: str) -> list[float]:
        """The recorded kl_coef of "ppo" or beta of "dpo", smallest first. Raises ValueError on an unknown method."""
        values = sorted({run.value for run in self.runs if run.method == method})
        if not values:
            raise ValueError(f"method is {method!r}, expected one of {sorted({run.method for run in self.runs})}")
        return values

    def select(self, method: str, value: float | None = None, seed: int | None = None) -> list[RecordedRun]:
        """Runs of a method, of one value or all, of one seed or all; by value, then seed. Raises ValueError if there is
        none."""
        chosen = [run for run in self.runs if run.method == method and value in (None, run.value)
                  and seed in (None, run.seed)]
        if not chosen:
            raise ValueError(f"no run of {method!r} with value {value} and seed {seed}; recorded are "
                             f"{self.values(method)} for seeds {self.seeds}")
        return sorted(chosen, key=lambda run: (run.value, run.seed))


def load_sweep(path: str | Path | None = None) -> Sweep:
    """The sweep shipped with alignkit, or the one in `path`.

    Raises FileNotFoundError that says how to make one.
    """
    path = FILE if path is None else Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; make it with: python -m experiments.sweep --out {path}")
    stored = json.loads(path.read_text(encoding="utf-8"))
    worlds = {world["seed"]: RecordedWorld(**{**world, "gold_scale": tuple(world["gold_scale"])})
              for world in stored["worlds"]}
    return Sweep(stored["command"], stored["versions"], stored["sources"], stored["configs"], worlds,
                 tuple(RecordedRun(**run) for run in stored["runs"]), stored["probe"])


def source_hashes(sources: Sequence[str] = SOURCES) -> dict[str, str]:
    """Module path in alignkit -> SHA-256 of its syntax tree, which ignores docstrings, comments and line breaks."""
    hashes = {}
    for source in sources:
        path = PACKAGE / source
        for module in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            name = module.relative_to(PACKAGE).as_posix()
            if name in UNMEASURED:
                continue
            hashes[name] = syntax_hash(ast.parse(module.read_text(encoding="utf-8")))
    return hashes


def syntax_hash(tree: ast.Module) -> str:
    """SHA-256 of a module's syntax, which ignores docstrings, comments and line breaks; takes the docstrings out."""
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()
