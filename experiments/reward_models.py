"""Does a better reward model pick better responses, and train a better policy? (the question of Ivison 2024, Table 3)

    python -m experiments.reward_models --seeds 0 1 2

For each world seed one SFT policy, and reward models from few to many pairs, and from annotators who like politeness:
accuracy on held-out labels, the desk bench in RewardBench's schema, exact gold of best-of-16, and gold of a short PPO
run. Prints the table, means over seeds with lowest and highest, and how often two columns rank models alike.

A seed that finished is not run again.
"""

import argparse
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from alignkit import exact
from alignkit.configs import PPOConfig, RewardConfig, SFTConfig
from alignkit.evaluate.reward_table import COLUMNS, reward_model_table
from alignkit.evaluate.rewardbench import desk_bench
from alignkit.formulas.intervals import Estimate
from alignkit.forward.sampling import generate_texts
from alignkit.models.adapters import frozen_copy
from alignkit.models.heads import reward_model_from
from alignkit.models.loading import load_policy
from alignkit.ppo import PPOState, ppo
from alignkit.reward import RewardScorer, train_reward_model
from alignkit.runs.records import versions
from alignkit.sft import train_sft
from alignkit.storage import plain, read_json, write_json
from alignkit.task import DeskTask, desk_task
from experiments.sweep import some_prompts, strata

MODELS = {  # name -> (pairs, annotator)
    "50 pairs": (50, "default"),
    "200 pairs": (200, "default"),
    "1,000 pairs": (1000, "default"),
    "1,000 pairs, polite-lover": (1000, "polite-lover"),
}
TITLES = {"accuracy": "accuracy on labels", "rewardbench": "desk bench", "best_of_n_gold": "gold of best-of-16",
          "downstream": "gold of PPO"}


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    demonstrations: int = 4000
    steps: int = 96  # of each reward model's optimiser, however few its pairs
    batch: int = 32
    heldout: int = 1000
    each: int = 64  # pairs in each subset of the bench
    n: int = 16
    keys: int = 2  # questions of each class, with all their paraphrases
    iterations: int = 10  # of PPO; 0 leaves the column out
    epochs: float = SFTConfig.epochs


def reward_model(task: DeskTask, policy, tokenizer, pairs: int, annotator: str, seed: int, size: Size) -> RewardScorer:
    """A reward model trained on so many pairs, its scores normalised on the policy's responses."""
    rows = task.preference_pairs(policy, tokenizer, pairs, seed=seed, annotator=annotator)
    model = reward_model_from(policy, seed=seed)
    config = RewardConfig(epochs=size.steps * size.batch / len(rows), batch_size=size.batch, seed=seed)
    train_reward_model(model, tokenizer, rows, config)
    rng = np.random.default_rng([seed, 1])
    asked = [prompts[i] for prompts in strata(task) for i in rng.integers(len(prompts), size=128)]
    responses = generate_texts(policy, tokenizer, asked, max_new_tokens=task.max_new_tokens, seed=seed + 2)
    return RewardScorer(model, tokenizer).normalised(asked, [texts[0] for texts in responses])


def gold_after_ppo(task: DeskTask, policy, tokenizer, scorer: RewardScorer, prompts: list, seed: int, size: Size
                   ) -> float:
    """Exact gold of a short PPO run, in standard deviations of SFT's above its mean."""
    space, trained = exact.response_space(), frozen_copy(policy).requires_grad_(True)
    config = replace(PPOConfig(), iterations=size.iterations, seed=seed)
    for _ in ppo(PPOState.start(trained, tokenizer, scorer, strata(task), config), config):
        pass
    truth, before = exact.gold_table(task.world, prompts, space), exact.response_logps(policy, tokenizer, prompts)
    mean = exact.expectation(before, truth).mean()
    spread = exact.expectation(before, (truth - mean).square()).mean().sqrt()
    after = exact.expectation(exact.response_logps(trained, tokenizer, prompts), truth).mean()
    return float((after - mean) / spread)


def run_seed(seed: int, size: Size) -> dict:
    """The table of one world seed: name -> column -> Estimate."""
    task, (policy, tokenizer) = desk_task(seed), load_policy("tiny", seed=seed)
    train_sft(policy, tokenizer, task.demonstrations(size.demonstrations, seed=seed),
              SFTConfig(seed=seed, epochs=size.epochs))
    scorers = {name: reward_model(task, policy, tokenizer, pairs, annotator, seed, size)
               for name, (pairs, annotator) in MODELS.items()}
    prompts = some_prompts(task.world.heldout_prompts, size.keys, seed)
    downstream = {name: gold_after_ppo(task, policy, tokenizer, scorer, prompts, seed, size)
                  for name, scorer in scorers.items()} if size.iterations else None
    pairs = task.preference_pairs(policy, tokenizer, size.heldout, seed=seed, split="heldout")
    return reward_model_table(scorers, pairs, desk_bench(task.world, size.each), policy, tokenizer,
                              [prompt.text for prompt in prompts], task.world, n=size.n, downstream=downstream)


def table_of(seed: int, size: Size, out: Path) -> dict:
    """The table of one world seed, from the file of an earlier run of the same size or computed and kept there."""
    path = out / f"seed-{seed}.json"
    stored = read_json(path) if path.exists() else {}
    if stored.get("size") != plain(size):
        begun = time.process_time()
        table = run_seed(seed, size)
        stored = plain({"size": size, "table": table, "cpu_seconds": round(time.process_time() - begun, 1)})
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, stored)
    table = {name: {column: Estimate(**value) for column, value in row.items()}
             for name, row in stored["table"].items()}
    return {**stored, "table": table}


def summarise(tables: dict[int, dict]) -> list[dict]:
    """One row a reward model: its name, and for each column the values of the seeds and their mean."""
    rows = []
    for name in MODELS:
        columns = {}
        for column in COLUMNS:
            values = [table[name][column].value for table in tables.values() if column in table[name]]
            if values:
                columns[column] = {"mean": statistics.mean(values), "values": values}
        rows.append({"name": name, **columns})
    return rows


def same_order(tables: dict[int, dict], column: str, other: str) -> tuple[int, int]:
    """Of all pairs of reward models of a seed, how many two columns put in the same order, and how many there are."""
    agreeing = pairs = 0
    for table in tables.values():
        values = [(row[column].value, row[other].value) for row in table.values()]
        for i, (a, b) in enumerate(values):
            for c, d in values[i + 1 :]:
                agreeing, pairs = agreeing + ((a - c) * (b - d) > 0), pairs + 1
    return agreeing, pairs


def main(arguments: list[str] | None = None) -> None:
    """Run the seeds, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m experiments.reward_models", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=Size.iterations, help="of PPO; 0 leaves its column out")
    parser.add_argument("--out", type=Path, default=Path("runs/reward_models"))
    parser.add_argument("--json", type=Path, default=Path("experiments/results/reward_models.json"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    size = Size(iterations=given.iterations)
    stored = {seed: table_of(seed, size, given.out) for seed in given.seeds}
    tables = {seed: each["table"] for seed, each in stored.items()}
    rows = summarise(tables)
    there = [column for column in COLUMNS if column in rows[0]]
    print(f"| reward model | {' | '.join(TITLES[column] for column in there)} |\n|---|{'---|' * len(there)}")
    for row in rows:
        cells = [f"{row[c]['mean']:.3f} ({min(row[c]['values']):.3f} to {max(row[c]['values']):.3f})" for c in there]
        print(f"| {row['name']} | {' | '.join(cells)} |")
    orders = {f"{a} and {b}": same_order(tables, a, b) for i, a in enumerate(there) for b in there[i + 1 :]}
    for names, (agreeing, pairs) in orders.items():
        print(f"\n{names}: the same order in {agreeing} of {pairs} pairs of reward models of one seed.")
    given.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(given.json, {
        "command": f"python -m experiments.reward_models --seeds {' '.join(map(str, given.seeds))} "
                   f"--iterations {given.iterations}",
        "versions": versions(), "size": size, "models": rows, "same_order": orders,
        "cpu_seconds": {seed: each["cpu_seconds"] for seed, each in stored.items()}, "tables": tables})


if __name__ == "__main__":
    main()
