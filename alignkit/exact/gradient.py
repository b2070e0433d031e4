"""The exact policy gradient, summed over all responses."""

from collections.abc import Sequence

import torch
from torch import Tensor

from alignkit.desk.world import MAX_PHRASES
from alignkit.exact.enumeration import _child_numbers, _evaluating, _policy_reader, _shares_rows, _walk, trie_logps
from alignkit.exact.responses import response_space
from alignkit.exact.truth import expectation
from alignkit.formulas.losses import same_shape


# ---- the exact gradient
def score_gradient(policy, prompt_ids: Tensor, prompt_mask: Tensor, weights: Tensor, *, phrase_ids: Sequence[int],
                   eos_token_id: int, max_phrases: int = MAX_PHRASES) -> dict[str, Tensor]:
    """Σ_x Σ_y w(x, y) ∇_θ log π_θ(y | x), by parameter name, for every parameter that requires a gradient.

    It uses one backward pass through the prefix tree; each token's log-prob is weighted by the sum of the weights of
    all responses below it. weights: (prompts, N), held constant. The exact gradient of any objective has this form;
    `exact_gradient` is one case.
    """
    space = response_space(len(phrase_ids), max_phrases)
    if weights.shape != (len(prompt_ids), len(space)):
        raise ValueError(f"weights has shape {tuple(weights.shape)}, expected {(len(prompt_ids), len(space))} "
                         "(prompts, responses)")
    # Weights: sum the weights of all responses below each token, from the longest prefixes to the shortest.
    below = weights[:, space.level(max_phrases)]  # for each prefix: the weights of all responses that begin with it
    levels: list[Tensor] = []
    for t in reversed(range(max_phrases)):
        ends, children = weights[:, space.level(t)], below.unflatten(1, (-1, space.phrases))
        levels.insert(0, torch.cat([children, ends[:, :, None]], 2))
        below = ends + children.sum(2)
    # Differentiate: Σ weight · log-prob over all tokens of the tree, a few prompts at a time.
    reader = _policy_reader(policy, phrase_ids, eos_token_id)
    named = [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]
    total = [torch.zeros_like(parameter) for _, parameter in named]
    size = max(1, 16384 // sum(space.phrases**t for t in range(max_phrases)))  # prompts whose graph is held at once
    with _evaluating(policy):
        with torch.no_grad():
            shared = _shares_rows(reader, prompt_ids, prompt_mask)
        for start in range(0, len(prompt_ids), size):
            rows = slice(start, start + size)
            surrogate = torch.zeros((), dtype=torch.float64, device=policy.device)
            for t, prompt, node, values in _walk(reader, prompt_ids[rows], prompt_mask[rows], max_phrases - 1, shared):
                weight = levels[t][rows][prompt[:, None], _child_numbers(node, values)].to(values)
                surrogate = surrogate + torch.where(weight != 0, weight * values, 0.0).sum()
            gradients = torch.autograd.grad(surrogate, [parameter for _, parameter in named], allow_unused=True)
            total = [so_far if new is None else so_far + new for so_far, new in zip(total, gradients, strict=True)]
    return {name: gradient for (name, _), gradient in zip(named, total, strict=True)}


def exact_gradient(policy, prompt_ids: Tensor, prompt_mask: Tensor, rewards: Tensor, ref_logps: Tensor, beta: float, *,
                   phrase_ids: Sequence[int], eos_token_id: int, max_phrases: int = MAX_PHRASES) -> dict[str, Tensor]:
    """Exact gradient of J = mean over prompts of E_π[r] − β KL(π ‖ π_ref), by parameter name, without sampling.

    ∇J = Σ_y π(y) (r(y) − β log π(y)/π_ref(y) − b) ∇ log π(y), for any b; here b is the mean, which keeps the sum small.
    rewards, ref_logps: (prompts, N). REINFORCE, RLOO and PPO's first step estimate this gradient.
    """
    same_shape("ref_logps", ref_logps, rewards=rewards)
    where = dict(phrase_ids=phrase_ids, eos_token_id=eos_token_id, max_phrases=max_phrases)
    logps = trie_logps(policy, prompt_ids, prompt_mask, **where)
    gain = rewards - beta * (logps - ref_logps)
    weights = logps.exp() * (gain - expectation(logps, gain)[:, None]) / len(prompt_ids)
    return score_gradient(policy, prompt_ids, prompt_mask, weights, **where)
