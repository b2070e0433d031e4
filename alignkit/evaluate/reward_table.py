"""Compare reward models: accuracy, bench, best-of-n, and the gold of a policy trained on each.

The form is that of Ivison et al. 2024, Table 3. A reward model that ranks more pairs correctly does not necessarily
pick better responses, and one that picks better responses does not necessarily train a better policy.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from alignkit import exact
from alignkit.desk.world import World
from alignkit.evaluate.rewardbench import rewardbench
from alignkit.formulas.intervals import Bootstrap, Estimate, wilson
from alignkit.forward.sampling import generate_texts

COLUMNS = ("accuracy", "rewardbench", "best_of_n_gold", "downstream")


def reward_model_table(scorers: Mapping[str, Callable], pairs: Sequence[dict], bench: Sequence[dict], policy, tokenizer,
                       prompts: Sequence[str], gold: World | Callable, *, n: int = 16,
                       downstream: Mapping[str, float | Estimate] | None = None, max_new_tokens: int = 32,
                       seed: int = 0) -> dict[str, dict[str, Estimate]]:
    """For each reward model, by name: accuracy, rewardbench, best_of_n_gold and, if given, downstream.

    scorers: name -> prompts, responses -> scores. accuracy: share of held-out `pairs` (prompt, chosen, rejected) ranked
    as labelled, ties ½, Wilson's interval. rewardbench: overall figure on the rows `bench`. best_of_n_gold: as
    `best_of_n_gold`. downstream: name -> result of a policy trained on it, which is not computed here; a name without
    one has no such column. Raises ValueError if there are no scorers or pairs, or if downstream names an unknown model;
    also as the functions that it calls.
    """
    if not scorers or not pairs:
        raise ValueError(f"{'scorers' if not scorers else 'pairs'} is empty, expected at least one")
    downstream = dict(downstream or {})
    if unknown := sorted(downstream.keys() - scorers.keys()):
        raise ValueError(f"downstream names {unknown[0]!r}, expected one of {', '.join(scorers)}")
    gains = best_of_n_gold(scorers, policy, tokenizer, prompts, gold, n=n, max_new_tokens=max_new_tokens, seed=seed)
    table = {}
    for name, scorer in scorers.items():
        figures = {"accuracy": accuracy(scorer, pairs), "rewardbench": rewardbench(scorer, bench).overall,
                   "best_of_n_gold": gains[name]}
        if name in downstream:
            value = downstream[name]
            figures["downstream"] = value if isinstance(value, Estimate) else Estimate(float(value), None, None)
        table[name] = figures
    return table


def accuracy(scorer: Callable, pairs: Sequence[dict]) -> Estimate:
    """Share of pairs (prompt, chosen, rejected) in which chosen scores higher, ties ½, with Wilson's interval."""
    prompts = [row["prompt"] for row in pairs]
    chosen, rejected = (np.asarray(scorer(prompts, [row[side] for row in pairs]), dtype=float)
                        for side in ("chosen", "rejected"))
    right = float((chosen > rejected).sum() + 0.5 * (chosen == rejected).sum())
    return Estimate(right / len(pairs), *wilson(right, len(pairs)))


def best_of_n_gold(scorers: Mapping[str, Callable], policy, tokenizer, prompts: Sequence[str], gold: World | Callable,
                   *, n: int = 16, max_new_tokens: int = 32, seed: int = 0) -> dict[str, Estimate]:
    """Mean gold of a policy's best-of-n responses by each reward model, in standard deviations of the policy's own gold
    above its own mean.

    gold: the desk world, where best-of-n is exact over all responses and a question with its paraphrases is a cluster;
    or any function prompts, responses -> scores, where best-of-n is estimated without bias from 4·n samples per prompt
    (at most max_new_tokens tokens, the same samples for all reward models) and a prompt is a cluster. 95 % intervals:
    cluster bootstrap. Raises ValueError if n < 1, if a prompt is not the desk world's, or if gold is the same for all
    responses.
    """
    if n < 1:
        raise ValueError(f"n is {n}, expected at least 1")
    if isinstance(gold, World):
        space = exact.response_space()
        logps, truth = exact.response_logps(policy, tokenizer, prompts), exact.gold_table(gold, prompts, space)
        tables = {name: exact.proxy_table(scorer, prompts, space) for name, scorer in scorers.items()}
        mean, square = (float(exact.expectation(logps, value).mean()) for value in (truth, truth.square()))
        best = {name: exact.expectation(exact.best_of_n(logps, table, n), truth) for name, table in tables.items()}
        keys = [gold.find(prompt).key for prompt in prompts]
    else:
        responses = generate_texts(policy, tokenizer, list(prompts), max_new_tokens=max_new_tokens, seed=seed,
                                   samples=4 * n)
        truth, *scores = (_sampled(score, prompts, responses) for score in (gold, *scorers.values()))
        mean, square = float(truth.mean()), float(truth.square().mean())
        best = {name: exact.sampled_best_of_n(table, n, truth) for name, table in zip(scorers, scores, strict=True)}
        keys = list(range(len(prompts)))
    spread = max(square - mean**2, 0.0) ** 0.5
    if spread <= 1e-9 * max(1.0, abs(mean)):
        raise ValueError("gold is the same for all responses, expected some spread")
    _, number = np.unique(keys, return_inverse=True)
    bootstrap, counts = Bootstrap(np.zeros(number.max() + 1)), np.bincount(number)[None].astype(float)
    return {name: bootstrap.estimates(np.bincount(number, ((values - mean) / spread).numpy())[None], counts)[0]
            for name, values in best.items()}


def _sampled(score: Callable, prompts: Sequence[str], responses: list[list[str]]) -> Tensor:
    """Scores (prompts, samples), float64."""
    repeated = [prompt for prompt, texts in zip(prompts, responses, strict=True) for _ in texts]
    values = score(repeated, [text for texts in responses for text in texts])
    return torch.as_tensor(np.asarray(values, dtype=float)).reshape(len(prompts), -1)
