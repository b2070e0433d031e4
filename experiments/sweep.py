"""The recorded sweep: PPO over kl_coef and DPO over beta, for several world seeds, each policy measured by enumeration.

    python -m experiments.sweep --seeds 0 1 2                 # makes alignkit/exact/sweep.json and docs/closeness.md
    python -m experiments.sweep --confirm                     # after a change that should not matter: see below

The runs are made by `alignkit sweep experiments/closeness.ipynb`, once over PPO's values and once over DPO's, in
runs/sweep/. Each begins with the SFT policy and the reward model of notebooks 01 and 02 and with the tables of
closeness_world.ipynb, which the runs of a seed share. What is finished is not run again.

The file is part of alignkit's code, so once it has been written, every run counts as made by other code. `--confirm`
repeats a small probe (SFT, reward model, PPO and DPO in seconds): if all its figures come out the same, it records the
hashes of the present code; if not, it says which figure changed and leaves the file alone.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from alignkit import exact
from alignkit.configs import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from alignkit.desk.world import BEHAVIOURS, KINDS, Prompt
from alignkit.dpo import dpo
from alignkit.evaluate.reward_model import reward_report
from alignkit.exact.sweep import FILE, load_sweep, source_hashes
from alignkit.forward.sampling import generate_texts
from alignkit.models.heads import reward_model_from
from alignkit.models.loading import load_policy, save_model
from alignkit.ppo import PPOState, ppo
from alignkit.reward import RewardScorer, train_reward_model
from alignkit.runs.records import versions
from alignkit.sft import train_sft
from alignkit.storage import config_hash, read_json, settings, write_atomically, write_json
from alignkit.sweeps.exact import BETAS, curves
from alignkit.sweeps.results import load_results
from alignkit.sweeps.sweep import sweep
from alignkit.task import DeskTask, desk_task

NOTEBOOK = Path(__file__).with_name("closeness.ipynb")
VALUES = {"dpo": (0.1, 0.3, 0.5, 1.0, 2.0, 4.0), "ppo": (0.1, 0.15, 0.2, 0.35, 0.7, 1.5)}
EVERY = {"ppo": 5, "dpo": 24}  # iterations, steps between two points of a trajectory
KEYS = 2  # questions of each class, with all their paraphrases: 32 prompts


# ---- the sizes of a cell
@dataclass(frozen=True)
class Size:
    """How much of everything: the course's own numbers, and far less for the probe."""

    demonstrations: int = 8000
    pairs: int = 6000
    normalise: int = 1024  # SFT responses that set the proxy's scale
    keys: int = KEYS
    sft: SFTConfig = field(default_factory=SFTConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)

    def config(self, method: str, value: float, seed: int) -> PPOConfig | DPOConfig:
        name, start = {"ppo": ("kl_coef", self.ppo), "dpo": ("beta", self.dpo)}[method]
        return replace(start, seed=seed, **{name: value})


COURSE = Size()
PROBE = Size(demonstrations=1600, pairs=384, normalise=128, keys=1, sft=SFTConfig(epochs=2),
             reward=RewardConfig(epochs=2), dpo=DPOConfig(epochs=1, batch_size=64),
             ppo=PPOConfig(iterations=3, prompts_per_iteration=64, minibatch_size=32, epochs=2))


# ---- the two models that every run of a seed starts from
def make_world(seed: int, folder: Path, size: Size = COURSE) -> None:
    """Train SFT and reward model as notebooks 01 and 02 do, and save them in `folder`."""
    task = desk_task(seed)
    policy, tokenizer = train_sft_policy(task, size.demonstrations, size.sft, seed)
    model = reward_model_from(policy, seed=seed)
    train_reward_model(model, tokenizer, task.preference_pairs(policy, tokenizer, size.pairs, seed=seed),
                       replace(size.reward, seed=seed))
    scorer_in_sft_sd(model, policy, tokenizer, task, size.normalise, seed).save(folder / "reward")
    save_model(policy, tokenizer, folder / "sft")


def train_sft_policy(task: DeskTask, demonstrations: int, config: SFTConfig, seed: int) -> tuple[nn.Module, object]:
    """The tiny policy and its tokenizer, trained on the task's demonstrations without the part that 01 holds out."""
    policy, tokenizer = load_policy("tiny", seed=seed)
    rows = task.demonstrations(demonstrations, seed=seed)
    train_sft(policy, tokenizer, rows[len(rows) // 16 :], replace(config, seed=seed))
    return policy, tokenizer


def scorer_in_sft_sd(model: nn.Module, policy: nn.Module, tokenizer, task: DeskTask, number: int, seed: int
                     ) -> RewardScorer:
    """A reward model as a scorer: mean 0, sd 1 over `number` responses of the SFT policy to training prompts."""
    rng = np.random.default_rng([seed, 1])
    asked = [prompts[i] for prompts in strata(task) for i in rng.integers(len(prompts), size=number // len(KINDS))]
    responses = generate_texts(policy, tokenizer, asked, max_new_tokens=task.max_new_tokens, seed=seed + 2)
    return RewardScorer(model, tokenizer).normalised(asked, [texts[0] for texts in responses])


def strata(task: DeskTask) -> list[list[str]]:
    """Training prompts by class, in the order in which the classes first appear."""
    by_kind: dict[str, list[str]] = {}
    for prompt, kind in zip(task.train_prompts, task.train_kinds, strict=True):
        by_kind.setdefault(kind, []).append(prompt)
    return list(by_kind.values())


# ---- measuring
class Truth:
    """Everything that is exact about some prompts of a world: tables of SFT, proxy, gold (SFT-sd) and behaviours."""

    def __init__(self, task: DeskTask, prompts: list[Prompt], policy, tokenizer, scorer, cache: Path):
        self.prompts, self.tokenizer, space = prompts, tokenizer, exact.response_space()
        self.ref_logps = exact.response_logps(policy, tokenizer, prompts, directory=cache)
        self.proxy = exact.proxy_table(scorer, prompts, space, directory=cache)
        raw = exact.gold_table(task.world, prompts, space)
        mean = exact.expectation(self.ref_logps, raw).mean()
        sd = exact.expectation(self.ref_logps, (raw - mean).square()).mean().sqrt()
        self.gold, self.gold_scale = (raw - mean) / sd, (float(mean), float(sd))
        _, first, place = np.unique(space.counts.numpy(), axis=0, return_index=True, return_inverse=True)
        texts = space.texts()
        texts = [texts[i] for i in first]
        names = [task.world.behaviours([prompt.text] * len(texts), texts) for prompt in prompts]
        self.behaviour = torch.tensor([[BEHAVIOURS.index(name) for name in row] for row in names])[:, place.reshape(-1)]
        self.frontier = exact.frontier(self.ref_logps, self.proxy, BETAS, self.gold)

    def measure(self, logps: Tensor) -> dict[str, float]:
        """Means over the prompts."""
        return {"kl": max(0.0, float(exact.response_kl(logps, self.ref_logps).mean())),
                "proxy": float(exact.expectation(logps, self.proxy).mean()),
                "gold": float(exact.expectation(logps, self.gold).mean()),
                "entropy": float(exact.response_entropy(logps).mean())}

    def shares(self, logps: Tensor) -> dict[str, dict[str, float]]:
        """Class -> behaviour -> probability."""
        table = logps.new_zeros(len(logps), len(BEHAVIOURS)).scatter_add_(1, self.behaviour, logps.exp())
        kinds = np.array([prompt.kind for prompt in self.prompts])
        return {kind: dict(zip(BEHAVIOURS, table[torch.from_numpy(kinds == kind)].mean(0).tolist(), strict=True))
                for kind in KINDS}

    def enumerate(self, policy) -> Tensor:
        return exact.response_logps(policy, self.tokenizer, self.prompts)


def some_prompts(prompts: tuple[Prompt, ...], keys: int, seed: int) -> list[Prompt]:
    """`keys` questions of each class, drawn by seed, each with its four paraphrases."""
    rng = np.random.default_rng([seed, 6])
    members = [sorted({prompt.key for prompt in prompts if prompt.kind == kind}) for kind in KINDS]
    chosen = [key for its_keys in members for key in rng.permutation(its_keys)[:keys]]
    return [prompt for key in chosen for prompt in prompts if prompt.key == key]


class Cell:
    """One seed's world, ready to run things in. folder: holds the models in sft/ and reward/; the tables of world/ are
    read there, or made."""

    def __init__(self, seed: int, folder: Path, size: Size = COURSE):
        self.seed, self.folder, self.size = seed, folder, size
        self.task = desk_task(seed)
        self.policy, self.tokenizer = load_policy(folder / "sft")
        self.scorer = RewardScorer.load(folder / "reward")
        prompts = some_prompts(self.task.world.heldout_prompts, size.keys, seed)
        known = (self.policy, self.tokenizer, self.scorer, folder / "world")
        self.truth = Truth(self.task, prompts, *known)
        self.trained = Truth(self.task, some_prompts(self.task.world.train_prompts, size.keys, seed), *known)

    def steps(self, policy, config: PPOConfig | DPOConfig) -> Iterator[int]:
        """Ready to train `policy` in place: yields the number of iterations (PPO) or optimiser steps (DPO) made."""
        if isinstance(config, PPOConfig):
            state = PPOState.start(policy, self.tokenizer, self.scorer, strata(self.task), config)
            return (stats.iteration for stats in ppo(state, config))
        pairs = self.task.preference_pairs(self.policy, self.tokenizer, self.size.pairs, seed=self.seed)
        return (stats.step for stats in dpo(policy, self.tokenizer, pairs, config))

    def run(self, method: str, value: float) -> dict:
        """One run from SFT, with its trajectory."""
        config, truth, seconds = self.size.config(method, value, self.seed), self.truth, 0.0
        policy, _ = load_policy(self.folder / "sft")
        training = self.steps(policy, config)
        steps, points, begun = [0], [truth.measure(truth.ref_logps)], time.process_time()
        for step in training:
            if step % EVERY[method] == 0:
                seconds += time.process_time() - begun
                steps.append(step)
                points.append(truth.measure(truth.enumerate(policy)))
                begun = time.process_time()
        seconds += time.process_time() - begun
        logps = truth.enumerate(policy)
        end = truth.measure(logps)
        if steps[-1] != step:
            steps.append(step)
            points.append(end)
        reached = exact.gap(end["kl"], end["proxy"], truth.frontier)
        seen = self.trained.measure(self.trained.enumerate(policy))
        seen = {"kl": seen["kl"], "proxy": seen["proxy"],
                "share": exact.gap(seen["kl"], seen["proxy"], self.trained.frontier).share}
        return {
            "method": method, "value": value, "seed": self.seed, **end, "optimum": reached.optimum,
            "share": reached.share, "trained": seen,
            "shares": truth.shares(logps),
            "trajectory": {"step": steps, **{name: [point[name] for point in points] for name in points[0]}},
            "by_prompt": {"kl": exact.response_kl(logps, truth.ref_logps).tolist(),
                          "proxy": exact.expectation(logps, truth.proxy).tolist(),
                          "gold": exact.expectation(logps, truth.gold).tolist()},
            "config": config_hash(config), "seconds": seconds,
        }

    def known(self) -> dict:
        """What is exact about this world's SFT and reward model: the curves that runs are compared with."""
        truth = self.truth
        pairs = self.task.preference_pairs(self.policy, self.tokenizer, 2000, seed=self.seed, split="heldout")
        report = reward_report(self.scorer, pairs, world=self.task.world)
        judged = ("accuracy_labels", "bayes_accuracy", "accuracy_gold", "politeness_bias", "length_bias")
        return {
            "seed": self.seed, "prompts": [p.text for p in truth.prompts], "kinds": [p.kind for p in truth.prompts],
            "keys": [p.key for p in truth.prompts],
            **curves(truth.ref_logps, truth.proxy, truth.gold),
            "sft": {**truth.measure(truth.ref_logps), "shares": truth.shares(truth.ref_logps)},
            "by_prompt": {"variance": exact.variance(truth.ref_logps, truth.proxy).tolist(),
                          "entropy": exact.response_entropy(truth.ref_logps).tolist()},
            "gold_scale": truth.gold_scale,
            "reward": {name: report[name] for name in judged},
        }


def probe(folder: Path) -> dict[str, float]:
    """The whole of it in small, in seconds: figures that a test and `--confirm` make again."""
    make_world(0, folder, PROBE)
    cell, figures = Cell(0, folder, PROBE), {}
    for method, value in (("ppo", 0.2), ("dpo", 1.0)):
        run = cell.run(method, value)
        figures |= {f"{method} {name}": run[name] for name in ("kl", "proxy", "gold", "entropy", "share")}
    sft = cell.truth.measure(cell.truth.ref_logps)
    return figures | {"sft gold": cell.truth.gold_scale[0], "sft proxy": sft["proxy"], "sft entropy": sft["entropy"]}


# ---- the command
def rounded(value):
    """Numbers to six significant digits: what the file is compacted to."""
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def kept(path: Path, key: dict, make: Callable[[], dict | None]) -> dict:
    """The JSON in `path` if it was made under this key, else made now and written there."""
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["key"] == key:
            return stored["value"]
    value = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"key": key, "value": value})
    return value


def grids(seeds: Sequence[int]) -> list[dict[str, str]]:
    """The parameters of `alignkit sweep`, a mapping for each of its two calls."""
    return [{"method": method, "value": ",".join(f"{value:g}" for value in values), "seed": ",".join(map(str, seeds))}
            for method, values in VALUES.items()]


def record(seeds: Sequence[int], folder: Path, workers: int | None = None) -> dict:
    """Make the runs by `alignkit sweep`, which repeats none that is there; returns what goes into the file. Raises
    SystemExit if one fails."""
    notebook = os.path.relpath(NOTEBOOK)  # so that the folder records the commands as one would type them
    if any([sweep(notebook, folder, grid, workers=workers) for grid in grids(seeds)]):
        raise SystemExit(f"not all runs finished; {folder}/sweep.html names those that failed")
    configs = {name: settings(getattr(COURSE, name)) for name in ("sft", "reward", "ppo", "dpo")}
    return {
        "command": f"python -m experiments.sweep --seeds {' '.join(map(str, seeds))}", "versions": versions(),
        "sources": source_hashes(), "probe": probe(folder / "probe"),
        "configs": {**configs, "data": {"demonstrations": COURSE.demonstrations, "pairs": COURSE.pairs}},
        **collected(seeds, folder),
    }


def collected(seeds: Sequence[int], folder: Path) -> dict[str, list[dict]]:
    """The worlds and runs in the folder of a sweep, in the order of seeds, methods and values."""
    results = load_results(folder)
    places = {(row["method"], row["value"], row["seed"]): results.run_of(row) for row in results.finished}
    of_seed = {seed: place for (_, _, seed), place in places.items()}
    return {"worlds": [read_json(of_seed[seed] / "world" / "curves.json") for seed in seeds],
            "runs": [read_json(places[method, value, seed] / method / "exact.json")
                     for seed in seeds for method, values in VALUES.items() for value in values]}


def closeness_table(path: Path) -> str:
    """docs/closeness.md from the recorded sweep: how close PPO and DPO come to the best that is possible."""
    record = load_sweep(path)
    columns = ("method", "price of KL", "KL, nats", "proxy, SFT-sd", "gold, SFT-sd",
               "share of the optimum, new questions: mean (each seed)", "the same on training questions")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for method, symbol in (("ppo", "kl_coef"), ("dpo", "beta")):
        for value in record.values(method):
            runs = record.select(method, value)
            mean = {name: np.mean([getattr(run, name) for run in runs]) for name in ("kl", "proxy", "gold", "share")}
            lines.append(f"| {method.upper()} | {symbol} {value:g} | {mean['kl']:.2f} | {mean['proxy']:.2f} | "
                         f"{mean['gold']:.2f} | {percents([run.share for run in runs])} | "
                         f"{percents([run.trained['share'] for run in runs])} |")
    near = {"held-out": [run.share for run in record.select("ppo") if run.kl <= 2],
            "training": [run.trained["share"] for run in record.select("ppo") if run.trained["kl"] <= 2]}
    prompts = len(record.worlds[record.seeds[0]].prompts)
    return f"""<!-- made by: {record.command} -->
Every figure is exact: each policy's probability of all 16,105 responses to {prompts} held-out prompts
of the desk world, seeds {", ".join(map(str, record.seeds))}. The *share* is what the run gained in
proxy over SFT, out of the most that any policy can gain at the run's own KL; the last column has it on
{prompts} of the prompts that the run was trained on. The difference is what did not carry over to new
questions; what is missing in the last column was not optimised.

""" + "\n".join(f"PPO with KL ≤ 2 nats, {where} prompts: {len(shares)} runs, mean share {100 * np.mean(shares):.1f} %, "
                  f"worst {100 * min(shares):.1f} %; {sum(share >= 0.95 for share in shares)} at 95 % or more.\n"
                  for where, shares in near.items()) + "\n" + "\n".join(lines) + "\n"


def percents(shares: list[float]) -> str:
    """Their mean, and each of them."""
    return f"{100 * np.mean(shares):.1f} % ({', '.join(f'{100 * share:.1f}' for share in shares)})"


def differing(before: dict[str, float], now: dict[str, float], tolerance: float = 1e-3) -> list[str]:
    """What a probe says differently from another."""
    return [f"{name} was {value:.5f}, now {now[name]:.5f}" for name, value in before.items()
            if not abs(value - now[name]) <= tolerance]


def confirm(path: Path, folder: Path) -> None:
    """Repeat the probe; record the present code's hashes if it gives the same figures. Raises SystemExit if not."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    now = probe(folder / "probe")
    if changed := differing(stored["probe"], now):
        raise SystemExit(f"the code gives other figures: {'; '.join(changed)}. Run again: {stored['command']}")
    write_compact(path, {**stored, "sources": source_hashes()})
    print(f"the probe gives the same {len(now)} figures; {path} now names the present code")


def write_compact(path: Path, record: dict) -> None:
    """One line a run and a world, so that a change can be read in git."""
    parts = []
    for name, value in rounded(record).items():
        text = json.dumps(value, allow_nan=False)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(json.dumps(row, allow_nan=False) for row in value) + "\n]"
        parts.append(f"{json.dumps(name)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "{\n" + ",\n".join(parts) + "\n}\n")


def main(arguments: list[str] | None = None) -> None:
    """Run the sweep, write the file and the table."""
    parser = argparse.ArgumentParser(prog="python -m experiments.sweep", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--folder", type=Path, default=Path("runs/sweep"), help="of the sweep: finished runs are kept")
    parser.add_argument("--table", type=Path, default=Path("docs/closeness.md"))
    parser.add_argument("--workers", type=int, help="runs at a time (default: the cores)")
    parser.add_argument("--confirm", action="store_true", help="repeat the probe only, and record the present code")
    given = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    if given.confirm:
        confirm(given.out, given.folder)
    else:
        write_compact(given.out, record(given.seeds, given.folder, given.workers))
    given.table.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(given.table, closeness_table(given.out))
    print(given.table.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
