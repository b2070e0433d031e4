"""Exact computations: all responses of the desk world enumerated, and the quantities that follow."""

from alignkit.exact.cache import cached
from alignkit.exact.causes import Turn, turn
from alignkit.exact.enumeration import gold_table, proxy_table, response_logps, trie_logps
from alignkit.exact.gradient import exact_gradient, score_gradient
from alignkit.exact.responses import Responses, response_space
from alignkit.exact.sampled import SampledOptimum, sampled_best_of_n, sampled_optimum
from alignkit.exact.truth import (
    Frontier,
    Gap,
    Pruned,
    best_of_n,
    best_of_n_kl_bound,
    expectation,
    frontier,
    gap,
    optimum,
    prune,
    response_entropy,
    response_kl,
    tabular_dpo,
    variance,
)
from alignkit.models.identity import weights_hash

__all__ = [
    "Frontier", "Gap", "Pruned", "Responses", "SampledOptimum", "Turn", "best_of_n", "best_of_n_kl_bound", "cached",
    "exact_gradient", "expectation", "frontier", "gap", "gold_table", "optimum", "proxy_table", "prune",
    "response_entropy", "response_kl", "response_logps", "response_space", "sampled_best_of_n", "sampled_optimum",
    "score_gradient", "tabular_dpo", "trie_logps", "turn", "variance", "weights_hash",
]
