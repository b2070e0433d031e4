"""Rollouts: sample responses with a KV cache, using the caller's generator.

All sampling happens here. Samples come from the generator that the caller passes, and from the full softmax at
`temperature`. There is no top-k or top-p, so sampling and scoring use the same distribution.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from alignkit.data.ends import end_ids
from alignkit.errors import NonFinite
from alignkit.formulas.randomness import inverse_cdf, seeded
from alignkit.forward import cpu, cuda_graph
from alignkit.forward.precision import autocast
from alignkit.forward.reading import last_logits
from alignkit.forward.rollout import (
    Rollout,
    decode_responses,
    distinct_prompts,
    each_end,
    encode_prompts,
    position_ids,
)
from alignkit.models.fitness import context_length, judged

DIVERGED = "the policy's logits are NaN or infinite; its weights have diverged (lower the learning rate)"


@torch.no_grad()
def sample(policy: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, *, max_new_tokens: int,
           eos_token_id: int | Collection[int], pad_token_id: int, generator: torch.Generator,
           temperature: float = 1.0, own: slice = slice(None)) -> Rollout:
    """One response for each prompt row, sampled by inverse CDF from softmax(logits / temperature).

    eos_token_id: the id that ends a response, or several (`alignkit.data.ends.end_ids`).
    generator: on the CPU; it draws one uniform number per row and position, so results do not depend on the device. On
    a GPU, `alignkit.forward.cuda_graph` samples longer responses if it supports the policy.
    own: sample these rows alone, with the numbers that they have among all.
    Raises ValueError if prompt and response do not fit the model's context, NonFinite on NaN logits.
    """
    limit = context_length(policy)
    if limit is not None and prompt_ids.shape[1] + max_new_tokens > limit:
        raise ValueError(
            f"prompts of {prompt_ids.shape[1]} tokens and max_new_tokens={max_new_tokens} do not fit the model's "
            f"context of {limit} tokens"
        )
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, expected a positive number")
    device, ends, drawn = policy.device, each_end(eos_token_id), len(prompt_ids)
    prompt_ids, prompt_mask = prompt_ids[own].to(device), prompt_mask[own].to(device)
    if cuda_graph.usable(policy, max_new_tokens):
        return _sample_by_graph(policy, prompt_ids, prompt_mask, max_new_tokens, generator, drawn, own,
                                eos_token_id=ends, pad_token_id=pad_token_id, temperature=temperature)
    decoder, logits = decoder_after_prompts(policy, prompt_ids, prompt_mask, max_new_tokens - 1)
    alive = torch.ones(len(prompt_ids), dtype=torch.bool, device=device)
    rows = torch.arange(len(prompt_ids), device=device)  # rows that have not ended yet
    padding, nothing = torch.full_like(rows, pad_token_id), torch.zeros(len(prompt_ids), device=device)
    tokens, masks, logprobs = [], [], []
    while True:
        scaled = logits.float() / temperature
        uniform = torch.rand(drawn, 1, generator=generator, dtype=torch.float64)[own].to(device)
        token, logprob = _inverse_cdf(scaled, uniform[rows])
        tokens.append(torch.where(alive, padding.scatter(0, rows, token), pad_token_id))
        logprobs.append(torch.where(alive, nothing.scatter(0, rows, logprob), 0.0))
        masks.append(alive)
        for end in ends:
            alive = alive & (tokens[-1] != end)
        if len(tokens) == max_new_tokens or not alive.any():
            break
        going = alive[rows]
        if 2 * going.sum() <= len(rows) and decoder.selectable:  # half of the rows have ended: drop them
            rows = rows[going]
            decoder.select(going.nonzero().squeeze(1))
        logits = decoder.step(tokens[-1][rows], masks[-1][rows])
    return Rollout(
        prompt_ids, prompt_mask, torch.stack(tokens, 1), torch.stack(masks, 1), torch.stack(logprobs, 1), ~alive
    )


def decoder_after_prompts(policy: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, room: int) -> tuple:
    """Make a decoder that has read the prompts; returns it with the logits (B, V) of the next token.

    If prompts occur twice or more on average, each distinct prompt is read only once.
    """
    reader = cpu.reader(policy)

    def read(ids: Tensor, mask: Tensor):
        return _Decoder(policy, ids, mask) if reader is None else cpu.Decoder(reader, ids, mask, room)

    ids, mask, which = distinct_prompts(prompt_ids, prompt_mask)
    if 2 * len(ids) <= len(prompt_ids):
        decoder = read(ids, mask)
        if decoder.selectable:
            decoder.select(which)
            return decoder, decoder.logits[which]
    decoder = read(prompt_ids, prompt_mask)
    return decoder, decoder.logits


def _sample_by_graph(policy: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int,
                     generator: torch.Generator, rows: int, own: slice, **options) -> Rollout:
    state = generator.get_state()
    uniform = torch.rand(max_new_tokens, rows, generator=generator, dtype=torch.float64)[:, own]
    decoder = cuda_graph.Decoder(policy, *prompt_ids.shape, max_new_tokens, **options)
    decoder.start(prompt_ids, prompt_mask, uniform)
    tokens, mask, logprobs = decoder.run()
    if not decoder.finite:
        raise NonFinite(DIVERGED)
    generator.set_state(state)  # the generator has then advanced as far as with one draw per position
    torch.rand(tokens.shape[1], rows, generator=generator, dtype=torch.float64)
    return Rollout(prompt_ids, prompt_mask, tokens, mask, logprobs, ~decoder.alive)


class _Decoder:
    """Any Hugging Face causal LM, one token at a time, with its own cache. logits: (B, V), of the next token."""

    def __init__(self, policy: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor):
        judged(policy)
        self.policy, self.mask, self.positions, self.cache = policy, prompt_mask, position_ids(prompt_mask), None
        self.logits = self._read(prompt_ids)

    def _read(self, ids: Tensor) -> Tensor:
        with autocast(ids.device):
            output = self.policy(input_ids=ids, attention_mask=self.mask, position_ids=self.positions,
                                 past_key_values=self.cache, use_cache=True, **last_logits(self.policy, 1))
        self.cache = output.past_key_values
        return output.logits[:, -1]

    def step(self, tokens: Tensor, real: Tensor) -> Tensor:
        """Logits (B, V) after one more token (B,) per row; real (B,): False at padding."""
        self.mask = torch.cat([self.mask, real[:, None]], 1)
        self.positions = self.positions[:, -1:] + 1
        return self._read(tokens[:, None])

    @property
    def selectable(self) -> bool:
        return _selectable(self.cache)

    def select(self, rows: Tensor) -> None:
        """Continue with only these rows (R,)."""
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        self.cache.batch_select_indices(rows)


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
    """`samples` response texts for each prompt text. The same seed and batch size give the same responses."""
    texts = []
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    for start in range(0, len(repeated), batch_size):
        ids, mask = encode_prompts(tokenizer, repeated[start : start + batch_size])
        rollout = sample(policy, ids, mask, max_new_tokens=max_new_tokens, eos_token_id=end_ids(tokenizer, policy),
                         pad_token_id=tokenizer.pad_token_id, temperature=temperature, generator=seeded(seed, start))
        texts += decode_responses(tokenizer, rollout)
    return [texts[start : start + samples] for start in range(0, len(texts), samples)]


def _inverse_cdf(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    token, logprob = inverse_cdf(logits, uniform)
    if not torch.isfinite(logprob).all():
        raise NonFinite(DIVERGED)
    return token, logprob


def _selectable(cache) -> bool:
    """Whether rows can be removed from the cache: its whole state is keys and values, with one row per response."""
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)
