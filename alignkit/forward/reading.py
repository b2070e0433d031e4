"""All forward passes over given responses: log-probs, entropy, hidden states and values."""

import inspect
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alignkit.formulas.tokens import entropy, sequence_logps, token_logprobs
from alignkit.forward import cpu
from alignkit.forward.known import GATED, PARALLEL, spread
from alignkit.forward.precision import autocast
from alignkit.forward.rollout import Rollout, full_ids, position_ids
from alignkit.models.fitness import judged
from alignkit.models.heads import SharedCritic, body, score_head


def response_logps(policy: nn.Module, responses: Rollout) -> Tensor:
    """log π(response | prompt) (B,), nats per response. Differentiable."""
    return sequence_logps(response_logprobs(policy, responses), responses.response_mask)


def token_values(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, keep: int) -> Tensor:
    """Output of a sequence classifier's head at each of the last `keep` positions: (B, keep), float32.

    Values at padding positions are meaningless.
    """
    head, reader = score_head(model), cpu.reader(model.policy if isinstance(model, SharedCritic) else model)
    if reader is not None:
        wanted = attention_mask.bool().clone()
        wanted[:, :-keep] = False
        hidden = reader(input_ids, attention_mask, wanted)
        with torch.autocast("cpu", enabled=False):
            return spread(head(hidden), wanted[:, -keep:]).squeeze(-1).float()
    hidden = body(model)(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids(attention_mask),
                         use_cache=False).last_hidden_state
    return head(hidden[:, -keep:]).squeeze(-1).float()


MOST_LOGITS = 2**28  # elements, 1 GiB in float32; more logits are computed in parts, and again in backward
_linear: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def response_logits(policy: nn.Module, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """Logits (B, T, V), divided by `temperature`, that predict each response token. Differentiable.

    Values outside the response are meaningless.
    """
    return _response(policy, rollout, temperature, False)[0]


def response_logprobs(policy: nn.Module, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """Log-prob (B, T), nats, of each response token at `temperature`; 0 outside the response. Differentiable.

    The same as `token_logprobs` of `response_logits`, but if there are more than MOST_LOGITS logits, they are not
    stored all at once.
    """
    return read_responses(policy, rollout, temperature)[0]


def read_responses(policy: nn.Module, rollout: Rollout, temperature: float = 1.0, *, with_entropy: bool = False,
                   with_states: bool = False) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`response_logprobs` and, from the same forward pass and on request, the entropies (B, T) of the next-token
    distributions, nats, 0 outside the response, and the last hidden states (B, T, H), which are meaningless there."""
    mask, tokens, packed = rollout.response_mask, rollout.response_ids, None
    if mask.numel() * getattr(policy.config, "vocab_size", 0) > MOST_LOGITS:
        packed = _packed(policy, rollout)
    if packed is None:
        logits, hidden = _response(policy, rollout, temperature, with_states)
        read = token_logprobs(logits, tokens), entropy(logits) if with_entropy else None
    else:
        head, states = packed
        with autocast(mask.device):
            size = max(1, MOST_LOGITS // policy.config.vocab_size)
            read = _in_parts(head, states, tokens[mask], size, temperature, with_entropy)
        read = tuple(None if part is None else spread(part, mask) for part in read)
        hidden = spread(states, mask) if with_states else None
    return *(None if part is None else torch.where(mask, part, 0.0) for part in read), hidden


def _in_parts(head: Callable, states: Tensor, tokens: Tensor, size: int, temperature: float, with_entropy: bool
              ) -> tuple[Tensor, Tensor | None]:
    """Log-probs (n,) of tokens (n,), and entropies, from hidden states (n, H): `size` logits at a time, not stored."""
    def read(states: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        logits = head(states)
        logits = logits if temperature == 1.0 else logits / temperature
        return (token_logprobs(logits, tokens), entropy(logits)) if with_entropy else (token_logprobs(logits, tokens),)

    parts = [checkpoint(read, *part, use_reentrant=False, preserve_rng_state=False)
             for part in zip(states.split(size), tokens.split(size), strict=True)]
    logprobs, *rest = (torch.cat(part) for part in zip(*parts, strict=True))
    return logprobs, rest[0] if rest else None


def _packed(policy: nn.Module, rollout: Rollout) -> tuple[Callable, Tensor] | None:
    """The head, and the last hidden states (n, H) that it reads for the response tokens, row by row.

    None if the policy's logits are not known to be a linear head's output; this is tested once per model.
    """
    ids, mask = full_ids(rollout)
    reader = cpu.reader(policy)
    if reader is not None:
        return reader.logits, reader(ids, mask, F.pad(rollout.response_mask, (rollout.prompt_ids.shape[1] - 1, 0)))
    head = _base(policy).get_output_embeddings()
    if type(head) is not nn.Linear or not last_logits(policy, 1):
        return None
    if policy not in _linear:
        sample = ids[:1, :8]
        logits, states = _read(policy, sample, torch.ones_like(sample), 0)
        with torch.no_grad(), autocast(ids.device):
            _linear[policy] = states is not None and bool(
                (head(states) - logits).abs().max() <= 1e-6 * logits.abs().max()
            )
    if not _linear[policy]:
        return None
    states = _read(policy, ids, mask, 1)[1][:, -rollout.response_ids.shape[1] :]
    return head, states[rollout.response_mask]


def _read(policy: nn.Module, ids: Tensor, mask: Tensor, keep: int) -> tuple[Tensor, Tensor | None]:
    """Logits at the last `keep` positions (0: all positions), and the last hidden states (B, L, H), by one forward
    pass.

    The states are None if the model computes its logits without calling its own body, as OPT does.
    """
    if type(_base(policy)) not in GATED + PARALLEL:  # known for these models
        judged(policy, cache=False)
    states = []
    hook = body(_base(policy)).register_forward_hook(lambda module, inputs, output: states.append(output[0]))
    try:
        with autocast(ids.device):
            output = policy(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False,
                            **last_logits(policy, keep))
    finally:
        hook.remove()
    return output.logits[:, -keep:], states[0] if states else None


def _response(policy: nn.Module, rollout: Rollout, temperature: float, states: bool) -> tuple[Tensor, Tensor | None]:
    """`response_logits`, and on request the last hidden states (B, T, H) from which they were computed."""
    ids, mask = full_ids(rollout)
    length = rollout.response_ids.shape[1]
    reader = cpu.reader(policy)
    if reader is not None:
        wanted = F.pad(rollout.response_mask, (rollout.prompt_ids.shape[1] - 1, 0))  # one before the token
        packed = reader(ids, mask, wanted)
        logits = spread(reader.logits(packed), rollout.response_mask)
        hidden = spread(packed, rollout.response_mask) if states else None
    else:
        logits, read = _read(policy, ids, mask, length)
        if states and read is None:
            with autocast(ids.device):
                read = body(_base(policy))(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask),
                                           use_cache=False).last_hidden_state
        hidden = read[:, -length:] if states else None
    return logits if temperature == 1.0 else logits / temperature, hidden


def last_logits(policy: nn.Module, keep: int) -> dict[str, int]:
    """`logits_to_keep`, for models that can skip the head at the other positions."""
    return {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(_base(policy).forward).parameters else {}


def _base(policy: nn.Module) -> nn.Module:
    """The model inside an adapter, or the model itself."""
    return policy.get_base_model() if hasattr(policy, "get_base_model") else policy
