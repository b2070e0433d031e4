"""KL(π ‖ π_ref): three estimators from samples, and the exact value from logits. All in nats per token.

The samples must come from the policy that gave `logprobs`; otherwise all three estimate a different quantity.

An unbiased estimate is not an unbiased loss: differentiating the value of sampled tokens leaves out that the sampling
depends on θ. With tokens v sampled from π at a given state, and ℓ = log π − log π_ref, the expected gradients are

    k1   Σ_v π ∇ log π = 0
    k2   Σ_v π ℓ ∇ log π = ∇ KL(π ‖ π_ref)
    k3   Σ_v (π − π_ref) ∇ log π = ∇ KL(π_ref ‖ π)
"""

import torch
from torch import Tensor

from alignkit.formulas.tokens import entropy


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k1 = log π − log π_ref: unbiased, can be negative, high variance. Same shape as the arguments. (Schulman 2020)"""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k2 = ½ (log π − log π_ref)²: never negative, low variance, biased. Same shape as the arguments. (Schulman
    2020)"""
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3 = (r − 1) − log r with r = π_ref / π: unbiased, never negative. Same shape as the arguments. (Schulman 2020)

    Uses expm1, so the result stays non-negative when π and π_ref are almost equal in float32.
    """
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL of the next-token distributions, Σ_v π_v (log π_v − log π_ref,v): (B, T) for logits (B, T, V)."""
    logprobs = logits.float().log_softmax(-1)
    cross = -torch.where(logprobs > -80, logprobs.exp() * ref_logits.float().log_softmax(-1), 0.0).sum(-1)
    return cross - entropy(logits)
