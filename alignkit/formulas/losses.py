"""The formulas of PPO, DPO and Bradley–Terry: tensors in, tensors out; no model, no config, no state."""

import torch
import torch.nn.functional as F
from torch import Tensor

from alignkit.configs import LOSSES
from alignkit.formulas.kl import k1


def same_shape(name: str, tensor: Tensor, **others: Tensor) -> None:
    """Raise ValueError, naming the argument, if one of `others` has another shape than `tensor`, whose name is
    `name`."""
    for other, value in others.items():
        if value.shape != tensor.shape:
            raise ValueError(
                f"{other} has shape {tuple(value.shape)}, expected {tuple(tensor.shape)} (the shape of {name})"
            )


def gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float = 1.0, gae_lambda: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns: `(advantages, returns)`, each (B, T), 0 outside the response.

    δ_t = r_t + γ V_{t+1} − V_t,  A_t = δ_t + γλ A_{t+1},  returns = A + V;  V = A = 0 after the last response token.
    rewards, values: (B, T), in score units. Raises ValueError if shapes differ. (Schulman 2016, eq. 11–16)
    """
    same_shape("rewards", rewards, values=values, response_mask=response_mask)
    rewards, values = torch.where(response_mask, rewards, 0.0), torch.where(response_mask, values, 0.0)
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(following)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = torch.where(response_mask[:, t], delta + gamma * gae_lambda * following, 0.0)
        advantages[:, t] = following
    return advantages, advantages + values


def rloo_advantages(totals: Tensor, samples: int) -> Tensor:
    """RLOO's advantage of each response, its reward minus the mean of the others to the same prompt: (B,), score units.

    A_i = R_i − Σ_{j ≠ i} R_j / (n − 1) = n / (n − 1) · (R_i − mean R).
    totals: (B,), the total reward R of each response, the n = `samples` responses to a prompt in consecutive rows. The
    baseline does not depend on response i, so A_i ∇ log π(y_i) is an unbiased estimate of the gradient. Raises
    ValueError as `_groups`. (Ahmadian 2024; Kool 2019)
    """
    groups = _groups(totals, samples)
    others = (groups.sum(1, keepdim=True) - groups) / (samples - 1)
    return (groups - others).flatten()


def grpo_advantages(totals: Tensor, samples: int) -> Tensor:
    """GRPO's advantage of each response, its reward standardised among those to the same prompt: (B,), without unit.

    A_i = (R_i − mean R) / √(σ² + 1e-8), with σ² the mean squared deviation in the group, as in `whiten`.
    totals: (B,), the total reward R of each response, the n = `samples` responses to a prompt in consecutive rows.
    Equal rewards in a group give 0. A prompt's scale does not count: with n = 2 the better response has 1 and the other
    −1, however close they are. Raises ValueError as `_groups`. (Shao 2024, §4.1.2)
    """
    groups = _groups(totals, samples)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + 1e-8)).flatten()


def _groups(totals: Tensor, samples: int) -> Tensor:
    """`totals` (B,) with a row for each prompt: (B / samples, samples). Raises ValueError if totals is not (B,), or
    samples is below 2 or does not divide B."""
    if totals.ndim != 1 or samples < 2 or len(totals) % samples:
        raise ValueError(f"totals has shape {tuple(totals.shape)} and samples is {samples}, expected shape (B,) and a "
                         "divisor of B of at least 2")
    return totals.view(-1, samples)


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float = 0.2) -> Tensor:
    """PPO's clipped surrogate loss per token: (B, T).

    −min(ρ A, clip(ρ, 1 − ε, 1 + ε) A), ρ = π / π_old. (Schulman 2017, eq. 7, with the sign changed to minimise)
    """
    same_shape("logprobs", logprobs, old_logprobs=old_logprobs, advantages=advantages)
    ratio = torch.exp(logprobs - old_logprobs)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)


def clipped(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float = 0.2) -> Tensor:
    """Tokens at which `policy_loss` has no gradient: (B, T) bool. ρ > 1 + ε with A > 0, or ρ < 1 − ε with A < 0."""
    ratio = torch.exp(logprobs - old_logprobs)
    return ((ratio > 1 + clip_range) & (advantages > 0)) | ((ratio < 1 - clip_range) & (advantages < 0))


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float = 0.2) -> Tensor:
    """The critic's clipped squared error per token: (B, T).

    ½ max((V − R)², (V_old + clip(V − V_old, ±ε) − R)²). (Huang 2024, detail 22; Engstrom 2020)
    """
    same_shape("values", values, old_values=old_values, returns=returns)
    near = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())


def token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, kl_coef: float
) -> Tensor:
    """Per-token rewards (B, T): −kl_coef · (log π − log π_ref) at each response token, plus the score (B,) at the last.

    The tokens must be sampled from the policy that gave `logprobs`. A row without response tokens gets no reward.
    """
    same_shape("logprobs", logprobs, ref_logprobs=ref_logprobs, response_mask=response_mask)
    rewards = torch.where(response_mask, -kl_coef * k1(logprobs, ref_logprobs), 0.0)
    last = (response_mask.sum(1) - 1).clamp(min=0)
    return rewards.scatter_add(1, last[:, None], torch.where(response_mask.any(1), scores, 0.0)[:, None])


def adapt_kl_coef(kl_coef: float, kl: float, target_kl: float, responses: int, horizon: int) -> float:
    """The adaptive KL controller: β (1 + clip(KL/target − 1, ±0.2) · n/horizon). (Ziegler 2019, §2.2)"""
    return kl_coef * (1 + min(max(kl / target_kl - 1, -0.2), 0.2) * responses / horizon)


def implicit_reward(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """β log(π / π_ref) of each response: (B,). Only differences within a prompt are meaningful. (Rafailov 2023,
    eq. 5)"""
    return beta * (logps - ref_logps)


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Loss of each pair: (B,). With the margin m = β [log π/π_ref (chosen) − log π/π_ref (rejected)]:

    sigmoid  −(1 − ε) log σ(m) − ε log σ(−m)      (Rafailov 2023, eq. 7; ε = label_smoothing: cDPO, Mitchell 2023)
    ipo      (m/β − 1/(2β))²                     (Azar 2023, eq. 17)
    hinge    max(0, 1 − m)                       (SLiC; Zhao 2023)
    robust   [−(1 − ε) log σ(m) + ε log σ(−m)] / (1 − 2ε)   (Chowdhury, Kini and Natarajan 2024)

    robust is unbiased: if a share ε of the labels is flipped, its mean over the flips is the sigmoid loss of the
    correct labels. cDPO is biased, and has its minimum at m = log((1 − ε) / ε). A robust loss can be negative. Raises
    ValueError on shapes that differ or an unknown loss_type.
    """
    same_shape("policy_chosen_logps", policy_chosen_logps, policy_rejected_logps=policy_rejected_logps,
               ref_chosen_logps=ref_chosen_logps, ref_rejected_logps=ref_rejected_logps)
    margin = (implicit_reward(policy_chosen_logps, ref_chosen_logps, beta)
              - implicit_reward(policy_rejected_logps, ref_rejected_logps, beta))
    if loss_type == "sigmoid":
        return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    if loss_type == "robust":
        kept, flipped = -F.logsigmoid(margin), -F.logsigmoid(-margin)
        return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)
    if loss_type == "ipo":
        return (margin / beta - 1 / (2 * beta)).square()
    if loss_type == "hinge":
        return (1 - margin).relu()
    raise ValueError(f"loss_type is {loss_type!r}, expected one of {', '.join(LOSSES)}")


def preference_chance(difference: Tensor | float, noise: float = 0.0) -> Tensor:
    """P(first preferred) = (1 − ε) σ(d) + ε σ(−d), with d the difference of the scores and ε the share of flipped
    labels.

    (Bradley and Terry 1952; with flips as in cDPO, Mitchell 2023)
    """
    difference = torch.as_tensor(difference, dtype=torch.float64)
    return (1 - noise) * torch.sigmoid(difference) + noise * torch.sigmoid(-difference)


def bradley_terry_loss(difference: Tensor, wins: int, labels: int) -> Tensor:
    """Mean loss (nats) of a reward model with score differences `difference` of any shape: −(w log σ(d) + (n − w) log
    σ(−d)) / n."""
    difference = torch.as_tensor(difference, dtype=torch.float64)
    return -(wins * F.logsigmoid(difference) + (labels - wins) * F.logsigmoid(-difference)) / labels
