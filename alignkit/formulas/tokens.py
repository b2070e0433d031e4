"""Per-token tensors (B, T), aligned with the response tokens and exactly 0 where `response_mask` is False."""

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each token: (B, T), nats.

    log π(y_t | x, y_<t) for logits (B, T, V) whose row t predicts tokens (B, T)[:, t]. Computed in at least float32.
    Raises ValueError if the shapes do not fit.
    """
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)}, expected {tuple(logits.shape[:-1])} (logits without the "
            "vocabulary)"
        )
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def sequence_logps(logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """Log-probability of each response: (B,), nats; the sum of its token log-probs (B, T) over response_mask (B, T)."""
    return torch.where(response_mask, logprobs, 0.0).sum(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the next-token distribution, H = −Σ_v p_v log p_v: (B, T), nats, for logits (B, T, V)."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logprobs = logits.log_softmax(-1)
    return -torch.where(logprobs > -80, logprobs.exp() * logprobs, 0.0).sum(
        -1
    )  # below e^-80 the term is 0, also at −inf


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of values where mask is True; 0 if the mask is empty. Over everything, or over `dim`."""
    kept = torch.where(mask, values, 0.0)
    if dim is None:
        return kept.sum() / mask.sum().clamp(min=1)
    return kept.sum(dim) / mask.sum(dim).clamp(min=1)


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Values scaled to variance 1 over the mask, and shifted to mean 0 unless shift_mean is False; 0 outside the mask.

    (x − μ) / √(σ² + 1e-8), with σ² the mean squared deviation. Equal values, or a single value, become 0 instead of
    NaN.
    """
    mean = masked_mean(values, mask)
    centred = torch.where(mask, values - mean, 0.0)
    scaled = centred * torch.rsqrt(masked_mean(centred.square(), mask) + 1e-8)
    return scaled if shift_mean else torch.where(mask, scaled + mean, 0.0)
