"""Conditions that must hold when a policy samples and trains; PPO checks them while it runs."""

import torch
from torch import Tensor

from alignkit.errors import InvariantError
from alignkit.formulas.kl import k1
from alignkit.formulas.tokens import masked_mean
from alignkit.forward.rollout import Rollout


def check_sampler(rollout: Rollout, logprobs: Tensor, *, iteration: int = 1, bf16: bool = False) -> None:
    """Check that the trainer's log-probs of the sampled tokens equal the sampler's, so that the ratio is 1.

    logprobs: (B, T), the trainer's. They must agree to 1e-4 nats at every token (1e-3 after the first iteration,
    because trained weights are larger), or in bf16, where differences of 0.3 nats occur at single tokens, to a root
    mean square of 0.1. Raises InvariantError with the usual causes.
    """
    tolerance, where = (0.1, "root mean square") if bf16 else (1e-4 if iteration == 1 else 1e-3, "at most")
    worst = _apart(logprobs, rollout.logprobs, rollout.response_mask, bf16)
    if not worst <= tolerance:
        raise InvariantError(
            f"step {'0' if iteration == 1 else f'0 of iteration {iteration}'}: the ratio π / π_old is off before any "
            f"step, by {worst:.2g} nats ({where}), expected 0 ± {tolerance:g}. Sampler and trainer do not score alike: "
            "check temperature, padding side, position ids, dropout, a top-k in the sampler"
        )


def check_first_rollout(
    rollout: Rollout,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    rewards: Tensor | None,
    scores: Tensor,
    kl_coef: float,
    bf16: bool = False,
) -> None:
    """Check the conditions before the first step. Raises InvariantError that names the violated condition and its usual
    causes.

    `check_sampler` passes. Policy and reference agree, within the same tolerance. The KL in the reward is the logged
    KL.
    """
    check_sampler(rollout, logprobs, bf16=bf16)
    mask = rollout.response_mask
    tolerance, where = (0.1, "root mean square") if bf16 else (1e-4, "at most")

    # The policy equals the reference: KL is 0.
    gap = _apart(logprobs, ref_logprobs, mask, bf16)
    if not gap <= tolerance:
        raise InvariantError(
            f"step 0: |log π − log π_ref| is {gap:.2g} nats ({where}), expected 0 ± {tolerance:g}. The "
            "reference is not the policy that training starts from: check which checkpoint, and whether an adapter is "
            "switched off"
        )
    # The score minus the sum of the rewards is kl_coef times the logged KL.
    if rewards is not None:
        charged = (scores - rewards.sum(1))[mask.any(1)]
        logged = kl_coef * torch.where(mask, k1(logprobs, ref_logprobs), 0.0).sum(1)[mask.any(1)]
        if not torch.allclose(charged, logged, atol=1e-3 * (1 + float(scores.abs().max()))):
            raise InvariantError("step 0: the KL in the reward is not the KL that is logged")


def _apart(one: Tensor, other: Tensor, mask: Tensor, mean: bool) -> float:
    """Difference between two log-probs (B, T) on the masked tokens: root mean square, or the largest gap."""
    squares = torch.where(mask, k1(one, other), 0.0).square()
    return float((masked_mean(squares, mask) if mean else squares.max()).sqrt())
