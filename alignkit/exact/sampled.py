"""Estimates of the optimum and of best-of-n from samples, for models whose responses cannot be enumerated."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from alignkit.exact.truth import _reward_groups


# ---- from samples, for real models
@dataclass(frozen=True, eq=False)
class SampledOptimum:
    """Estimates of the optimum π* from samples. All fields are (prompts,)."""

    log_z: Tensor  # log Ẑ
    reward: Tensor  # Ê[r] under π*
    other: Tensor | None  # the same for another score
    kl: Tensor  # KL(π* ‖ π_ref) estimated, nats
    ceiling: Tensor  # upper bound on the estimated KL: log N if the samples come from π_ref
    effective: Tensor  # effective sample size (Σw)² / Σw²: near 1, the estimate depends on one response


def sampled_optimum(rewards: Tensor, beta: float, *, other: Tensor | None = None, logps: Tensor | None = None,
                    ref_logps: Tensor | None = None) -> SampledOptimum:
    """The optimum π* ∝ π_ref e^{r/β} estimated from N samples per prompt, by importance weights.

    w_i = (π_ref/q)(y_i) e^{r_i/β};  log Ẑ = log mean w;  Ê[v] = Σ w v / Σ w;  KL̂ = Ê[r]/β − log Ẑ ≤ log N + Ê[log
    q/π_ref].
    rewards, other: (prompts, N). logps, ref_logps: (prompts, N) log-probs of the samples under the sampling policy q
    and under π_ref; omit both if π_ref drew the samples. log Ẑ is biased downwards by about 1/(2 · effective). Raises
    ValueError if only one of them is given.
    """
    if (logps is None) != (ref_logps is None):
        raise ValueError("logps and ref_logps go together: give both, or neither if the reference drew the samples")
    if not beta > 0:
        raise ValueError(f"beta is {beta}, expected a positive number")
    rewards = rewards.double()
    excess = torch.zeros_like(rewards) if logps is None else logps.double() - ref_logps.double()  # log q/π_ref
    log_weights = rewards / beta - excess
    log_z = log_weights.logsumexp(1) - math.log(rewards.shape[1])
    shares = log_weights.softmax(1)
    reward = (shares * rewards).sum(1)
    along = None if other is None else (shares * other.double()).sum(1)
    ceiling = math.log(rewards.shape[1]) + (shares * excess).sum(1)
    return SampledOptimum(log_z, reward, along, reward / beta - log_z, ceiling, 1 / shares.square().sum(1))


def sampled_best_of_n(rewards: Tensor, n: int, other: Tensor | None = None) -> Tensor:
    """Mean score of best-of-n, estimated without bias from N ≥ n samples per prompt: (prompts,).

    Σ_i C(i − 1, n − 1) / C(N, n) · v_(i) over the samples in order of reward: the mean over all subsets of size n.
    Equal rewards share their weight. other: the score v to average, (prompts, N); by default the reward itself. Raises
    ValueError unless 1 ≤ n ≤ N. (Nakano et al. 2021, appendix I)
    """
    count = rewards.shape[1]
    if not 1 <= n <= count:
        raise ValueError(f"n is {n}, expected 1 … {count} (the number of samples per prompt)")
    values = (rewards if other is None else other).double()
    rank = torch.arange(1, count + 1, dtype=torch.float64)
    log_choose = torch.lgamma(rank) - torch.lgamma((rank - n + 1).clamp(min=1)) - math.lgamma(n)
    log_all = math.lgamma(count + 1) - math.lgamma(n + 1) - math.lgamma(count - n + 1)
    weight = torch.where(rank >= n, (log_choose - log_all).exp(), 0.0).expand(rewards.shape)
    order, group = _reward_groups(rewards)
    of_group = torch.zeros_like(values).scatter_add_(1, group, weight)
    size = torch.zeros_like(values).scatter_add_(1, group, torch.ones_like(weight))
    return ((of_group / size.clamp(min=1)).gather(1, group) * values.gather(1, order)).sum(1)
