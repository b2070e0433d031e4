"""All randomness of alignkit: seeded generators, seeded weights, and sampling by the inverse CDF."""

import contextlib

import torch
from torch import Tensor


def inverse_cdf(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B,) drawn from softmax(logits), and their log-probs (B,), nats: `(token, logprob)`.

    Takes the first token whose cumulative probability exceeds uniform (B, 1), float64 in [0, 1); logits: (B, V). A
    token with probability 0 is never drawn. NaN or infinite logits give a log-prob that is not finite.
    """
    total = logits.logsumexp(-1, keepdim=True)
    cumulative = (logits - total).exp().cumsum(-1, dtype=torch.float64)
    token = torch.searchsorted(cumulative, uniform * cumulative.narrow(1, logits.shape[-1] - 1, 1), right=True)
    token = token.clamp(max=logits.shape[-1] - 1)
    return token.squeeze(1), (logits.gather(1, token) - total).squeeze(1)


@contextlib.contextmanager
def seeded_weights(seed: int):
    """The seed determines all weights initialised inside this block; the caller's random state is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator seeded by several numbers, such as (seed, iteration); different numbers give a different
    stream."""
    state = 0
    for number in numbers:
        state = (state * 6364136223846793005 + int(number) + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(state)
