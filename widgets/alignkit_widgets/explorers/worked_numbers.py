"""Small worked examples in numbers, one concept each, for the explorers of alignkit_widgets.

The formulas are the package's own (`ppo`, `kl`); this module only applies them to a single response.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from alignkit.formulas.kl import k1, k2, k3
from alignkit.formulas.losses import clipped, gae, policy_loss, preference_chance, token_rewards
from alignkit.formulas.randomness import seeded
from alignkit.formulas.tokens import token_logprobs
from alignkit.forward.reading import response_logits, token_values
from alignkit.forward.rollout import encode_prompts, full_ids, rollout_from_ids


@dataclass(frozen=True, eq=False)
class ResponseNumbers:
    """One sampled response, with the models' outputs at each of its T tokens.

    tokens: T texts. ids (T,): which of the V columns each is. logits, ref_logits (T, V): of the policy that sampled it
    and of the reference. values (T,): the critic's, score units. score: of the whole response. source: origin.
    """

    tokens: tuple[str, ...]
    ids: Tensor
    logits: Tensor
    ref_logits: Tensor
    values: Tensor
    score: float
    source: str = ""


def read_response(policy, ref_policy, critic, tokenizer, prompt: str, response: str, score: float, *,
                  max_new_tokens: int = 4) -> ResponseNumbers:
    """The numbers of one response to one prompt. EOS is appended if the response is shorter than `max_new_tokens`.

    Only tokens with a probability above 1e-6 under one of the policies, and the response's own, are kept as columns.
    Raises ValueError if the response has no tokens.
    """
    ids = tokenizer(response, add_special_tokens=False)["input_ids"][:max_new_tokens]
    ids = ids + [tokenizer.eos_token_id] * (len(ids) < max_new_tokens)
    if len(ids) < 1 or not response:
        raise ValueError(f"response is {response!r}, expected at least one token")
    prompt_ids, prompt_mask = encode_prompts(tokenizer, [prompt])
    rollout = rollout_from_ids([prompt_ids[prompt_mask].tolist()], [ids], eos_token_id=tokenizer.eos_token_id,
                               pad_token_id=tokenizer.pad_token_id, device=policy.device)
    with torch.no_grad():
        logits, ref_logits = (response_logits(each, rollout)[0].cpu().double().log_softmax(-1)
                              for each in (policy, ref_policy))
        values = token_values(critic, *full_ids(rollout), len(ids))[0].cpu().double()
    kept = (torch.maximum(logits, ref_logits).exp() > 1e-6).any(0)
    kept[ids] = True
    columns = kept.nonzero()[:, 0].tolist()
    return ResponseNumbers(tuple(tokenizer.convert_ids_to_tokens(i) if i == tokenizer.eos_token_id
                                 else tokenizer.decode([i])
                                 for i in ids), torch.tensor([columns.index(i) for i in ids]), logits[:, kept],
                           ref_logits[:, kept], values, float(score), prompt)


def example_response() -> ResponseNumbers:
    """A response of four tokens with invented figures: a greeting, a correct answer, a costly filler, EOS."""
    tokens = (" Happy to help!", " Open the settings and follow the steps.", " That is a really interesting question.",
              "<eos>")
    chances = torch.tensor([[0.45, 0.30, 0.05, 0.20], [0.10, 0.55, 0.10, 0.25], [0.05, 0.15, 0.10, 0.70],
                            [0.02, 0.08, 0.05, 0.85]], dtype=torch.float64)
    ref_chances = torch.tensor([[0.25, 0.40, 0.05, 0.30], [0.10, 0.60, 0.05, 0.25], [0.05, 0.20, 0.20, 0.55],
                                [0.05, 0.10, 0.05, 0.80]], dtype=torch.float64)
    return ResponseNumbers(tokens, torch.arange(4), chances.log(), ref_chances.log(),
                           torch.tensor([0.1, 0.3, 1.2, 0.6], dtype=torch.float64), 1.0, "made-up figures")


@dataclass(frozen=True, eq=False)
class Update:
    """The values that PPO computes for one response. All (T,), nats or score units, after `steps` optimiser steps.

    old, ref: log-probs at sampling time, and of the reference. kl: k1. rewards: −β · k1, plus the score at the end.
    advantages, returns: GAE. now: log-probs before the next step; ratio: π / π_old at that time; objective: the clipped
    one; still: True where it has no gradient. new: log-probs after that step.
    """

    old: Tensor
    ref: Tensor
    kl: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    now: Tensor
    ratio: Tensor
    objective: Tensor
    still: Tensor
    new: Tensor


def ppo_update(numbers: ResponseNumbers, *, kl_coef: float = 0.2, gamma: float = 1.0, gae_lambda: float = 0.95,
               clip_range: float = 0.2, learning_rate: float = 2.0, steps: int = 0) -> Update:
    """One PPO update of a policy whose parameters are the logits at each position, by plain gradient descent.

    loss = mean_t −min(ρ_t A_t, clip(ρ_t, 1 − ε, 1 + ε) A_t);  logits ← logits − learning_rate · ∇ loss, `steps` + 1
    times on the same response. A network shares its weights between positions, and Adam scales its steps. Otherwise the
    update is as in training, except that training whitens the advantages of a batch.
    """
    mask = torch.ones(1, len(numbers.tokens), dtype=torch.bool)
    ids = numbers.ids[None]
    old, ref = (token_logprobs(logits[None], ids) for logits in (numbers.logits, numbers.ref_logits))
    rewards = token_rewards(torch.tensor([numbers.score], dtype=old.dtype), old, ref, mask, kl_coef)
    advantages, returns = gae(rewards, numbers.values[None], mask, gamma, gae_lambda)
    logits = numbers.logits.clone().requires_grad_(True)
    path = []
    for _ in range(steps + 1):
        logprobs = token_logprobs(logits[None], ids)
        loss = policy_loss(logprobs, old, advantages, clip_range)
        path.append((logprobs.detach(), -loss.detach()))
        (gradient,) = torch.autograd.grad(loss.mean(), logits)
        logits = (logits - learning_rate * gradient).detach().requires_grad_(True)
    now, objective = path[-1]
    new = token_logprobs(logits.detach()[None], ids)
    no_gradient = clipped(now, old, advantages, clip_range)
    rows = (old, ref, k1(old, ref), rewards, advantages, returns, now, (now - old).exp(), objective, no_gradient, new)
    return Update(*(row[0] for row in rows))


def token_advantages(numbers: ResponseNumbers, *, kl_coef: float, gamma: float, gae_lambda: float) -> tuple[Tensor,
                                                                                                            Tensor]:
    """Rewards and advantages of each token, (T,) each: `token_rewards`, then `gae`."""
    update = ppo_update(numbers, kl_coef=kl_coef, gamma=gamma, gae_lambda=gae_lambda)
    return update.rewards, update.advantages


def labels_for_first(difference: float, labels: int, noise: float = 0.0, seed: int = 0) -> int:
    """How many of `labels` annotators prefer the first response: a random draw with a fixed seed."""
    draws = torch.rand(labels, generator=seeded(seed, 1952), dtype=torch.float64)
    return int((draws < preference_chance(difference, noise)).sum())


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def tilted(logps: Tensor, direction: Tensor, distance: float) -> Tensor:
    """log-probs (K,) of π ∝ π_ref exp(distance · direction)."""
    return (logps + distance * direction).log_softmax(-1)


def kl_estimates(logps: Tensor, ref_logps: Tensor, samples: int, seed: int = 0,
                 sampler: Tensor | None = None) -> dict[str, tuple[Tensor, float, float]]:
    """Each estimator of KL(π ‖ π_ref) for K outcomes: its values on the samples (samples,), its exact mean and sd.

    sampler: log-probs (K,) from which the samples are drawn; by default π itself. For any other sampler the estimators'
    mean is not the KL. The mean and the standard deviation of one value are exact, by enumeration.
    """
    q = (logps if sampler is None else sampler).exp()
    drawn = torch.multinomial(q, samples, replacement=True, generator=seeded(seed, samples))
    estimates = {}
    for name, estimator in ESTIMATORS.items():
        of_each = estimator(logps, ref_logps)
        mean = float((q * of_each).sum())
        estimates[name] = (of_each[drawn], mean, float((q * (of_each - mean).square()).sum().sqrt()))
    return estimates
