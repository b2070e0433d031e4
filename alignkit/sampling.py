"""Rollouts: sample responses with a KV cache, and read the logits of responses that are there already.

This is the one door for randomness: what is sampled comes from the generator that the caller passes, and from the full
softmax at `temperature`. There is no top-k or top-p, so that what is sampled is what is scored.
"""

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import compress

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicCache, DynamicLayer

from alignkit import fast, graphs
from alignkit.data import encode_texts
from alignkit.models import autocast, body, distinct_prompts, position_ids
from alignkit.tokens import entropy, inverse_cdf, token_logprobs

DIVERGED = "the policy's logits are NaN or infinite; its weights have diverged (lower the learning rate)"
MOST_LOGITS = 2**28  # elements, 1 GiB in float32: what would be more is computed in parts, and again in backward

_linear: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Rollout:
    """B prompts with a response each.

    prompt_ids (B, P): left-padded. prompt_mask (B, P): True at real tokens. response_ids (B, T): right-padded, EOS
    included. response_mask (B, T): True at response tokens. logprobs (B, T): the sampler's, nats, 0 outside the mask.
    finished (B,): True where the response ended with EOS rather than at the limit.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    logprobs: Tensor
    finished: Tensor

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def __getitem__(self, rows) -> "Rollout":
        return Rollout(**{name: value[rows] for name, value in vars(self).items()})


class NonFinite(ValueError):
    """A model produced NaN or infinite numbers."""


def left_pad(sequences: list[list[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Token ids (B, P) and mask (B, P) bool of sequences of different lengths, padded on the left."""
    width = max(map(len, sequences))
    ids = torch.tensor([[pad_token_id] * (width - len(row)) + list(row) for row in sequences])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in sequences])
    return ids, mask


def right_pad(sequences: list[list[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Token ids (B, T) and mask (B, T) bool of sequences of different lengths, padded on the right."""
    width = max(map(len, sequences))
    ids = torch.tensor([list(row) + [pad_token_id] * (width - len(row)) for row in sequences])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in sequences])
    return ids, mask


def encode_prompts(tokenizer, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids (B, P), left-padded, and mask (B, P) of prompt texts. Special tokens written in a prompt stay text
    (in a `ChatText`, which a chat template wrote, they are real).

    Raises ValueError, naming the row, if a prompt has no tokens.
    """
    rows = encode_texts(tokenizer, list(prompts))
    for number, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompt {number} is empty: it has no tokens")
    return left_pad(rows, tokenizer.pad_token_id)


@torch.no_grad()
def sample(policy: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, *, max_new_tokens: int, eos_token_id: int,
           pad_token_id: int, generator: torch.Generator, temperature: float = 1.0) -> Rollout:
    """One response for each prompt row, sampled by inverse CDF from softmax(logits / temperature).

    generator: on the CPU; one uniform number a row and a position is drawn from it, so results do not depend on the
    device. On a GPU longer responses are drawn by `alignkit.graphs`, where it reads the policy.
    Raises ValueError if prompt and response do not fit the model's context, NonFinite on NaN logits.
    """
    limit = getattr(policy.config, "max_position_embeddings", None)
    if limit is not None and prompt_ids.shape[1] + max_new_tokens > limit:
        raise ValueError(
            f"prompts of {prompt_ids.shape[1]} tokens and max_new_tokens={max_new_tokens} do not fit the model's "
            f"context of {limit} tokens"
        )
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, expected a positive number")
    device = policy.device
    prompt_ids, prompt_mask = prompt_ids.to(device), prompt_mask.to(device)
    if graphs.usable(policy, max_new_tokens):
        return _sample_by_graph(policy, prompt_ids, prompt_mask, max_new_tokens, generator, eos_token_id=eos_token_id,
                                pad_token_id=pad_token_id, temperature=temperature)
    decoder, logits = _prompts_read(policy, prompt_ids, prompt_mask, max_new_tokens - 1)
    alive = torch.ones(len(prompt_ids), dtype=torch.bool, device=device)
    rows = torch.arange(len(prompt_ids), device=device)  # those that the model still reads
    padding, nothing = torch.full_like(rows, pad_token_id), torch.zeros(len(prompt_ids), device=device)
    tokens, masks, logprobs = [], [], []
    while True:
        scaled = logits.float() / temperature
        uniform = torch.rand(len(prompt_ids), 1, generator=generator, dtype=torch.float64).to(device)
        token, logprob = _inverse_cdf(scaled, uniform[rows])
        tokens.append(torch.where(alive, padding.scatter(0, rows, token), pad_token_id))
        logprobs.append(torch.where(alive, nothing.scatter(0, rows, logprob), 0.0))
        masks.append(alive)
        alive = alive & (tokens[-1] != eos_token_id)
        if len(tokens) == max_new_tokens or not alive.any():
            break
        going = alive[rows]
        if 2 * going.sum() <= len(rows) and decoder.selectable:  # half of the rows have ended: they are read no longer
            rows = rows[going]
            decoder.select(going.nonzero().squeeze(1))
        logits = decoder.step(tokens[-1][rows], masks[-1][rows])
    return Rollout(
        prompt_ids, prompt_mask, torch.stack(tokens, 1), torch.stack(masks, 1), torch.stack(logprobs, 1), ~alive
    )


def _prompts_read(policy: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, room: int) -> tuple:
    """A decoder that has read the prompts, and the logits (B, V) of the next token.

    Where each prompt is there twice or more on average, it is read once.
    """
    reader = fast.reader(policy)

    def read(ids: Tensor, mask: Tensor):
        return _Decoder(policy, ids, mask) if reader is None else fast.Decoder(reader, ids, mask, room)

    ids, mask, which = distinct_prompts(prompt_ids, prompt_mask)
    if 2 * len(ids) <= len(prompt_ids):
        decoder = read(ids, mask)
        if decoder.selectable:
            decoder.select(which)
            return decoder, decoder.logits[which]
    decoder = read(prompt_ids, prompt_mask)
    return decoder, decoder.logits


def _sample_by_graph(policy: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int,
                     generator: torch.Generator, **options) -> Rollout:
    state, rows = generator.get_state(), len(prompt_ids)
    uniform = torch.rand(max_new_tokens, rows, generator=generator, dtype=torch.float64)
    decoder = graphs.Decoder(policy, *prompt_ids.shape, max_new_tokens, **options)
    decoder.start(prompt_ids, prompt_mask, uniform)
    tokens, mask, logprobs = decoder.run()
    if not decoder.finite:
        raise NonFinite(DIVERGED)
    generator.set_state(state)  # it has then given as many numbers as when they are drawn one position at a time
    torch.rand(tokens.shape[1], rows, generator=generator, dtype=torch.float64)
    return Rollout(prompt_ids, prompt_mask, tokens, mask, logprobs, ~decoder.alive)


class _Decoder:
    """Any Hugging Face causal LM, a token at a time, with its own cache. logits: (B, V), of the next token."""

    def __init__(self, policy: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor):
        self.policy, self.mask, self.positions, self.cache = policy, prompt_mask, position_ids(prompt_mask), None
        self.logits = self._read(prompt_ids)

    def _read(self, ids: Tensor) -> Tensor:
        with autocast(ids.device):
            output = self.policy(input_ids=ids, attention_mask=self.mask, position_ids=self.positions,
                                 past_key_values=self.cache, use_cache=True, **_last_logits(self.policy, 1))
        self.cache = output.past_key_values
        return output.logits[:, -1]

    def step(self, tokens: Tensor, real: Tensor) -> Tensor:
        """Logits (B, V) after one more token (B,) a row; real (B,): False where it is padding."""
        self.mask = torch.cat([self.mask, real[:, None]], 1)
        self.positions = self.positions[:, -1:] + 1
        return self._read(tokens[:, None])

    @property
    def selectable(self) -> bool:
        return _selectable(self.cache)

    def select(self, rows: Tensor) -> None:
        """Read on with these rows (R,) alone."""
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        self.cache.batch_select_indices(rows)


def response_logits(policy: nn.Module, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """Logits (B, T, V), divided by `temperature`, that predict each response token. Differentiable.

    Outside the response they mean nothing.
    """
    return _response(policy, rollout, temperature, False)[0]


def response_logprobs(policy: nn.Module, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """Log-prob (B, T), nats, of each response token at `temperature`; 0 outside the response. Differentiable.

    `token_logprobs` of `response_logits`, which are not held all at once if they are more than MOST_LOGITS.
    """
    return read_responses(policy, rollout, temperature)[0]


def read_responses(policy: nn.Module, rollout: Rollout, temperature: float = 1.0, *, with_entropy: bool = False,
                   with_states: bool = False) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`response_logprobs`, and from the same forward pass, where asked for, the entropies (B, T) of the next-token
    distributions, nats, 0 outside the response, and the last hidden states (B, T, H), which mean nothing there.
    """
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
        read = tuple(None if part is None else fast.spread(part, mask) for part in read)
        hidden = fast.spread(states, mask) if with_states else None
    return *(None if part is None else torch.where(mask, part, 0.0) for part in read), hidden


def _in_parts(head: Callable, states: Tensor, tokens: Tensor, size: int, temperature: float, with_entropy: bool
              ) -> tuple[Tensor, Tensor | None]:
    """Log-probs (n,) of tokens (n,), and entropies, from hidden states (n, H): logits of `size` at a time, not kept."""
    def read(states: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        logits = head(states)
        logits = logits if temperature == 1.0 else logits / temperature
        return (token_logprobs(logits, tokens), entropy(logits)) if with_entropy else (token_logprobs(logits, tokens),)

    parts = [checkpoint(read, *part, use_reentrant=False, preserve_rng_state=False)
             for part in zip(states.split(size), tokens.split(size), strict=True)]
    logprobs, *rest = (torch.cat(part) for part in zip(*parts, strict=True))
    return logprobs, rest[0] if rest else None


def _packed(policy: nn.Module, rollout: Rollout) -> tuple[Callable, Tensor] | None:
    """The head, and the last hidden states (n, H) that it reads for the response's tokens, row by row.

    None if the policy's logits are not known to be what a linear head says of them, which is tried once a model.
    """
    ids, mask = full_ids(rollout)
    reader = fast.reader(policy)
    if reader is not None:
        return reader.logits, reader(ids, mask, F.pad(rollout.response_mask, (rollout.prompt_ids.shape[1] - 1, 0)))
    head = _base(policy).get_output_embeddings()
    if type(head) is not nn.Linear or not _last_logits(policy, 1):
        return None
    if policy not in _linear:
        few = ids[:1, :8]
        logits, states = _read(policy, few, torch.ones_like(few), 0)
        with torch.no_grad(), autocast(ids.device):
            _linear[policy] = bool((head(states) - logits).abs().max() <= 1e-6 * logits.abs().max())
    if not _linear[policy]:
        return None
    states = _read(policy, ids, mask, 1)[1][:, -rollout.response_ids.shape[1] :]
    return head, states[rollout.response_mask]


def _read(policy: nn.Module, ids: Tensor, mask: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Logits at the last `keep` positions (0: at all), and the last hidden states (B, L, H), by one forward pass."""
    states = []
    hook = body(_base(policy)).register_forward_hook(lambda module, inputs, output: states.append(output[0]))
    try:
        with autocast(ids.device):
            output = policy(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False,
                            **_last_logits(policy, keep))
    finally:
        hook.remove()
    return output.logits[:, -keep:], states[0]


def _response(policy: nn.Module, rollout: Rollout, temperature: float, states: bool) -> tuple[Tensor, Tensor | None]:
    """`response_logits`, and, if asked for, the last hidden states (B, T, H) that they were read from."""
    ids, mask = full_ids(rollout)
    length = rollout.response_ids.shape[1]
    reader = fast.reader(policy)
    if reader is not None:
        wanted = F.pad(rollout.response_mask, (rollout.prompt_ids.shape[1] - 1, 0))  # one before the token
        packed = reader(ids, mask, wanted)
        logits = fast.spread(reader.logits(packed), rollout.response_mask)
        hidden = fast.spread(packed, rollout.response_mask) if states else None
    else:
        logits, read = _read(policy, ids, mask, length)
        hidden = read[:, -length:] if states else None
    return logits if temperature == 1.0 else logits / temperature, hidden


def full_ids(rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Prompt and response in a row, without the last token, which predicts nothing: ids and mask (B, P + T − 1)."""
    return (torch.cat([rollout.prompt_ids, rollout.response_ids[:, :-1]], 1),
            torch.cat([rollout.prompt_mask, rollout.response_mask[:, :-1]], 1))


def rollout_from_ids(prompts: list[list[int]], responses: list[list[int]], *, eos_token_id: int, pad_token_id: int,
                     device="cpu") -> Rollout:
    """A Rollout of given token ids (EOS is theirs to contain), with logprobs 0: to score text that was not sampled."""
    prompt_ids, prompt_mask = left_pad(prompts, pad_token_id)
    response_ids, response_mask = right_pad(responses, pad_token_id)
    finished = torch.tensor([bool(row) and row[-1] == eos_token_id for row in responses])
    made = Rollout(prompt_ids, prompt_mask, response_ids, response_mask, torch.zeros(response_ids.shape), finished)
    return to_device(made, device)


def passes(rollout: Rollout, most: int | None, rows: int) -> list[tuple[slice | Tensor, Rollout]]:
    """What one forward pass each reads of a rollout, and which rows that are: `rows` at a time, in their order, or, if
    `most` is not None, `groups` of rows, without columns in which all of them are padding.
    """
    if most is None:
        some = [slice(start, start + rows) for start in range(0, len(rollout), rows)]
        return [(part, rollout[part]) for part in some]
    some = groups(rollout.prompt_mask.sum(1), rollout.response_mask.sum(1), most)
    return [(part, trimmed(rollout[part])) for part in some]


def groups(prompt_tokens: Tensor, response_tokens: Tensor, most: int) -> list[Tensor]:
    """Rows of like length, of which a forward pass reads at most `most` tokens, padding included.

    prompt_tokens, response_tokens: (B,), how many there are. A row that has more is a group of its own.
    """
    lengths = torch.stack([prompt_tokens, response_tokens], 1).tolist()
    found, widest = [], (0, 0)
    for row in sorted(range(len(lengths)), key=lambda row: sum(lengths[row])):
        wider = tuple(map(max, widest, lengths[row]))
        if found and (len(found[-1]) + 1) * (sum(wider) - 1) <= most:  # the last token is not read
            found[-1].append(row)
            widest = wider
        else:
            found.append([row])
            widest = tuple(lengths[row])
    return [torch.tensor(rows, device=prompt_tokens.device) for rows in found]


def trimmed(rollout: Rollout) -> Rollout:
    """The same rows without columns that are padding in all of them; one column of the response is left at least."""
    prompt, response = rollout.prompt_mask.any(0), rollout.response_mask.any(0)
    response[0] = True
    return Rollout(rollout.prompt_ids[:, prompt], rollout.prompt_mask[:, prompt], rollout.response_ids[:, response],
                   rollout.response_mask[:, response], rollout.logprobs[:, response], rollout.finished)


def to_device(rollout: Rollout, device) -> Rollout:
    """The same rollout on another device."""
    return replace(rollout, **{name: value.to(device) for name, value in vars(rollout).items()})


def decode_responses(tokenizer, rollout: Rollout) -> list[str]:
    """The response texts, without EOS and padding."""
    both = zip(rollout.response_ids.tolist(), rollout.response_mask.tolist(), strict=True)  # read from the device once
    rows = [tuple(compress(ids, mask)) for ids, mask in both]
    texts = {row: tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
             for row in set(rows)}
    return [texts[row] for row in rows]


def generate_texts(
    policy: nn.Module,
    tokenizer,
    prompts: list[str],
    *,
    max_new_tokens: int,
    seed: int,
    samples: int = 1,
    temperature: float = 1.0,
    batch_size: int = 256,
) -> list[list[str]]:
    """`samples` response texts for each prompt text. The same seed gives the same responses for the same batch size."""
    texts = []
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    for start in range(0, len(repeated), batch_size):
        ids, mask = encode_prompts(tokenizer, repeated[start : start + batch_size])
        rollout = sample(policy, ids, mask, max_new_tokens=max_new_tokens, eos_token_id=tokenizer.eos_token_id,
                         pad_token_id=tokenizer.pad_token_id, temperature=temperature, generator=seeded(seed, start))
        texts += decode_responses(tokenizer, rollout)
    return [texts[start : start + samples] for start in range(0, len(texts), samples)]


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator whose stream is fixed by the numbers, such as (seed, iteration); other numbers, other stream."""
    state = 0
    for number in numbers:
        state = (state * 6364136223846793005 + int(number) + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(state)


def _inverse_cdf(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    token, logprob = inverse_cdf(logits, uniform)
    if not torch.isfinite(logprob).all():
        raise NonFinite(DIVERGED)
    return token, logprob


def _selectable(cache) -> bool:
    """Whether rows can be taken out of the cache: all that the model remembers is keys and values, a row a response."""
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


def _last_logits(policy: nn.Module, keep: int) -> dict[str, int]:
    """`logits_to_keep`, for models that can leave out the head at the other positions."""
    return {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(_base(policy).forward).parameters else {}


def _base(policy: nn.Module) -> nn.Module:
    """The model in which an adapter is, or the model."""
    return policy.get_base_model() if hasattr(policy, "get_base_model") else policy
