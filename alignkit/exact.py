"""The exact truth: a policy's probability of every response, and everything that follows from it.

Where responses are sequences of at most T phrases out of K (the desk world: K = 11, T = 4, so 16,105 responses), a
policy can be enumerated: π(y | x) for all y, as a table `logps` (prompts, N). Beside a table of rewards (prompts, N) it
gives the optimum of the KL-regularised objective, its frontier, best-of-n and the policy gradient, without sampling.
Everything is float64. The last part estimates the same from samples, for models whose responses cannot be enumerated.

All tables are ordered as `response_space` says; rewards may have any unit, KL and log-probabilities are in nats.
"""

import copy
import functools
import hashlib
import inspect
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from alignkit.dpo import dpo_loss
from alignkit.models import autocast, body, position_ids
from alignkit.sampling import encode_prompts
from alignkit.world import MAX_PHRASES, SENTENCES, Prompt, World, phrase_ids

VERSION = 1  # of the enumeration's order and arithmetic: part of the key of the disk cache
QUERIES = 2048  # contexts per forward pass; bounds memory and fits the processor's cache
LOGITS = 2**26  # and fewer than this many logits at once, for models with a large vocabulary


# ---- the space of responses


@dataclass(frozen=True, eq=False)
class Responses:
    """All N = Σ_{t ≤ T} K^t responses of at most T phrases out of K, shortest first, then in lexicographic order.

    Response i is also node i of the prefix tree: the responses of length t are its level t, and the children of number
    j in a level are the numbers jK … jK + K − 1 of the next. A response shorter than T ends with EOS, one of T phrases
    ends without.
    """

    phrases: int  # K
    max_phrases: int  # T
    parent: Tensor  # (N,) int64: the response without its last phrase; −1 for the empty one
    last: Tensor  # (N,) int64: its last phrase; −1 for the empty one
    length: Tensor  # (N,) int64: phrases, EOS not counted
    counts: Tensor  # (N, K) int64: how often each phrase occurs
    sequences: Tensor  # (N, T) int64: its phrases, then −1

    def __len__(self) -> int:
        return len(self.length)

    def level(self, length: int) -> slice:
        """Where the responses of this length are."""
        start = sum(self.phrases**t for t in range(length))
        return slice(start, start + self.phrases**length)

    def index(self, sequences: Tensor) -> Tensor:
        """Index (M,) of sequences (M, T) of phrases, padded with −1 at the end. Raises ValueError on other numbers."""
        if sequences.ndim != 2 or sequences.shape[1] != self.max_phrases:
            raise ValueError(f"sequences has shape {tuple(sequences.shape)}, expected (M, {self.max_phrases})")
        present = sequences >= 0
        if (sequences < -1).any() or (sequences >= self.phrases).any() or (present[:, 1:] & ~present[:, :-1]).any():
            raise ValueError(f"sequences has to hold phrases 0 … {self.phrases - 1}, padded with −1 only at the end")
        index = torch.zeros(len(sequences), dtype=torch.int64)
        for position in range(self.max_phrases):  # child k of node i is node iK + 1 + k
            index = torch.where(present[:, position], index * self.phrases + 1 + sequences[:, position], index)
        return index

    def index_of_tokens(self, response_ids: Tensor, response_mask: Tensor, phrase_ids: Sequence[int]) -> Tensor:
        """Index (M,) of responses (M, ≤ T) as `sampling.sample` returns them. Raises ValueError on other tokens."""
        number = torch.full((int(max(max(phrase_ids), response_ids.max())) + 1,), -1)
        number[torch.as_tensor(phrase_ids)] = torch.arange(self.phrases)
        phrases = torch.where(response_mask, number[response_ids], -1)
        padding = torch.full((len(phrases), self.max_phrases - phrases.shape[1]), -1)
        return self.index(torch.cat([phrases, padding], 1))

    def token_ids(self, phrase_ids: Sequence[int], eos_token_id: int, pad_token_id: int) -> tuple[Tensor, Tensor]:
        """response_ids (N, T), right-padded, EOS included, and response_mask (N, T): as sampled with T new tokens."""
        columns = torch.tensor([*phrase_ids, eos_token_id, pad_token_id])
        step = torch.arange(self.max_phrases)
        ids = columns[self.sequences]  # −1 is pad
        ids[step == self.length[:, None]] = eos_token_id
        return ids, step <= self.length[:, None]

    def below(self, values: Tensor) -> Tensor:
        """Sum of values (…, N) over each response and all that continue it: (…, N).

        The entry of response i is Σ_y v(y) over the y that begin with its phrases: below(π) is the probability of every
        prefix, and below(π v) / below(π) is E_π[v | the response begins so].
        """
        if values.shape[-1] != len(self):
            raise ValueError(f"values has shape {tuple(values.shape)}, expected (…, {len(self)}) (all responses)")
        sums = values.clone()
        for length in reversed(range(self.max_phrases)):
            children = sums[..., self.level(length + 1)].unflatten(-1, (-1, self.phrases))
            sums[..., self.level(length)] += children.sum(-1)
        return sums

    def texts(self, sentences: Sequence[str] = tuple(SENTENCES.values())) -> list[str]:
        """The N response texts: the phrases' sentences put together."""
        texts = [""]
        for parent, last in zip(self.parent[1:].tolist(), self.last[1:].tolist(), strict=True):
            texts.append(texts[parent] + sentences[last])
        return texts


@functools.lru_cache(maxsize=4)
def response_space(phrases: int = len(SENTENCES), max_phrases: int = MAX_PHRASES) -> Responses:
    """All responses of at most `max_phrases` (T) phrases out of `phrases` (K): made once, then kept.

    >>> [len(response_space(11, T)) for T in (1, 2, 3, 4)]
    [12, 133, 1464, 16105]
    """
    if phrases < 1 or max_phrases < 1:
        raise ValueError(f"phrases is {phrases} and max_phrases {max_phrases}, expected at least 1")
    sizes = [phrases**t for t in range(max_phrases + 1)]
    total = sum(sizes)
    length = torch.repeat_interleave(torch.arange(max_phrases + 1), torch.tensor(sizes))
    node = torch.arange(total)
    parent = torch.where(node > 0, (node - 1).div(phrases, rounding_mode="floor"), -1)
    last = torch.where(node > 0, (node - 1) % phrases, -1)
    sequences = torch.full((total, max_phrases), -1)
    counts = torch.zeros(total, phrases, dtype=torch.int64)
    start = 1
    for t in range(1, max_phrases + 1):
        here = slice(start, start + sizes[t])
        sequences[here] = sequences[parent[here]]
        sequences[here, t - 1] = last[here]
        counts[here] = counts[parent[here]] + torch.nn.functional.one_hot(last[here], phrases)
        start += sizes[t]
    return Responses(phrases, max_phrases, parent, last, length, counts, sequences)


# ---- enumerating a policy


def trie_logps(policy, prompt_ids: Tensor, prompt_mask: Tensor, *, phrase_ids: Sequence[int], eos_token_id: int,
               max_phrases: int = MAX_PHRASES, tolerance: float = 1e-4) -> Tensor:
    """log π(y | x) of every response: (prompts, N) float64 on the CPU, in the order of `response_space(K, T)`.

    Level by level down the prefix tree. A prefix is computed once: its keys and values are kept, and the K phrases that
    may follow are K queries of one row that see the prefix and themselves (a 4-D attention mask). Works for any Hugging
    Face causal LM: where the attention does not take such a mask, or keeps another kind of cache, each context is a row
    of its own. One path per prompt is compared with an ordinary forward pass on every call.

    policy: a causal LM. prompt_ids, prompt_mask: (prompts, P), left-padded. phrase_ids: the K tokens that are phrases.
    Raises ValueError if the policy puts more than `tolerance` of its probability on other responses, RuntimeError if
    the enumeration does not agree with the ordinary forward pass.
    """
    reader = _policy_reader(policy, phrase_ids, eos_token_id)
    with torch.no_grad(), _evaluating(policy):
        levels = _levels(reader, prompt_ids, prompt_mask, max_phrases, _shares_rows(reader, prompt_ids, prompt_mask))
        error = _path_error(reader, prompt_ids, prompt_mask, levels)
    if error > reader.tolerance:
        raise RuntimeError(f"{type(policy).__name__}: log-probs with a KV cache and without differ by {error:.3g} nats")
    logps = _assemble(levels)
    missing = 1 - logps.exp().sum(1)
    if missing.abs().max() > tolerance:
        row = int(missing.abs().argmax())
        raise ValueError(f"phrase_ids: {float(missing[row]):.3g} of the policy's probability is on tokens other than "
                         f"the {len(phrase_ids)} phrases and EOS (prompt {row}); expected at most {tolerance:g}")
    return logps


def response_logps(policy, tokenizer, prompts: Sequence[str | Prompt], *, max_phrases: int = MAX_PHRASES,
                   directory: str | Path | None = None) -> Tensor:
    """log π(y | x) of every response to desk-world prompts: (prompts, N) float64. `trie_logps` for texts.

    directory: keep the table there, under a hash of the weights and the prompts, and read it back the next time.
    Raises ValueError if `tokenizer` is not the desk world's, and as `trie_logps`.
    """
    ids, mask = encode_prompts(tokenizer, [prompt if isinstance(prompt, str) else prompt.text for prompt in prompts])
    where = {"phrase_ids": phrase_ids(tokenizer), "eos_token_id": tokenizer.eos_token_id, "max_phrases": max_phrases}

    def enumerate_policy() -> Tensor:
        return trie_logps(policy, ids, mask, **where)

    if directory is None:
        return enumerate_policy()
    key = ["logps", weights_hash(policy), ids.tolist(), mask.long().tolist(), where]
    return cached(directory, key, enumerate_policy)


def _levels(reader: "_Reader", prompt_ids: Tensor, prompt_mask: Tensor, depth: int, shared: bool) -> list[Tensor]:
    """Next-token log-probs after all prefixes of fewer than `depth` phrases: entry t is (prompts, K^t, K + 1)."""
    k = reader.branches
    levels = [torch.empty(len(prompt_ids), k**t, k + 1, dtype=torch.float64) for t in range(depth)]
    for t, prompt, node, values in _walk(reader, prompt_ids, prompt_mask, depth - 1, shared):
        levels[t][prompt[:, None], _child_numbers(node, values)] = values.cpu()
    return levels


def _child_numbers(node: Tensor, values: Tensor) -> Tensor:
    """Number within its level of each child (R, children) of the nodes (R,); 0 for a prompt itself."""
    return node[:, None] * values.shape[1] + torch.arange(values.shape[1])


def _assemble(levels: Sequence[Tensor]) -> Tensor:
    """log π(y) (B, N) from next-token log-probs: levels[t] is (B, K^t, K + 1), EOS last."""
    prefix = levels[0].new_zeros(len(levels[0]), 1)
    parts = []
    for level in levels:
        parts.append(prefix + level[:, :, -1])
        prefix = (prefix[:, :, None] + level[:, :, :-1]).flatten(1)
    return torch.cat([*parts, prefix], 1)


class _Reader:
    """Calls a model and reads values from its output after each token of a prefix tree.

    model: what is called (a causal LM, or a classifier's backbone). read: output → (rows, tokens, …) float64. children:
    the tokens that may follow a prefix; the first `branches` of them have children of their own. closing: a token to
    put after each branch of the last level. vocabulary: logits per context.
    """

    def __init__(self, model, read: Callable, children: Sequence[int], branches: int, closing: int | None = None,
                 vocabulary: int = 1):
        self.model, self.read, self.branches, self.closing = model, read, branches, closing
        self.children = torch.tensor(children, device=model.device)
        self.queries = max(1, min(QUERIES, LOGITS // vocabulary))
        single = model.device.type == "cpu" and model.config.dtype not in (torch.bfloat16, torch.float16)
        self.tolerance = 1e-3 if single else 0.1  # nats, between two ways to compute the same
        accepted = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in accepted or "args" in accepted  # a peft model takes anything

    def __call__(self, ids: Tensor, mask: Tensor, positions: Tensor, cache=None) -> tuple[Tensor, object]:
        """Values (rows, tokens, …) and the cache."""
        extra = {"position_ids": positions} if self.takes_positions else {}
        with autocast(ids.device):
            output = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra)
            if getattr(output, "past_key_values", None) is None:
                raise ValueError(f"{type(self.model).__name__} returns no past_key_values, expected a KV cache")
            return self.read(output), output.past_key_values


def _policy_reader(policy, phrase_ids: Sequence[int], eos_token_id: int) -> _Reader:
    """Reads log π of the K phrases and EOS: (rows, tokens, K + 1)."""
    if len({*phrase_ids, eos_token_id}) != len(phrase_ids) + 1:
        raise ValueError(f"phrase_ids {list(phrase_ids)} and eos_token_id {eos_token_id} have to be different tokens")
    columns = torch.tensor([*phrase_ids, eos_token_id], device=policy.device)

    def read(output) -> Tensor:
        logits = output.logits.double()
        return logits[..., columns] - logits.logsumexp(-1, keepdim=True)

    return _Reader(policy, read, phrase_ids, len(phrase_ids), vocabulary=policy.config.get_text_config().vocab_size)


def _reward_reader(model, phrase_ids: Sequence[int], eos_token_id: int) -> _Reader:
    """Reads a classifier's score: (rows, tokens). EOS is a child without children, and follows the last phrases too."""

    def read(output) -> Tensor:
        return model.score(output.last_hidden_state)[..., 0].double()

    return _Reader(body(model), read, [*phrase_ids, eos_token_id], len(phrase_ids), eos_token_id)


@dataclass
class _Rows:
    """Prefixes about to be continued: one row each."""

    cache: object
    past: Tensor  # (rows, L) bool: which keys in the cache are real tokens
    position: Tensor  # (rows,) of the next token
    prompt: Tensor  # (rows,) which prompt
    node: Tensor  # (rows,) which prefix within its level


def _walk(reader: _Reader, prompt_ids: Tensor, prompt_mask: Tensor, depths: int,
          shared: bool) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Yield (depth, prompt (R,), node (R,), values (R, children, …)): what `reader` reads after each child.

    Depth 0 comes first, with one value per prompt; the children of node j of depth − 1 follow. Depth first in chunks of
    at most reader.queries contexts, so memory does not grow with the number of prompts, and with K·T instead of K^T.
    """
    device = reader.model.device
    prompt_mask = prompt_mask.to(device).bool()
    if prompt_ids.shape != prompt_mask.shape or not prompt_mask[:, -1].all():
        raise ValueError(f"prompt_ids {tuple(prompt_ids.shape)} and prompt_mask {tuple(prompt_mask.shape)} must have "
                         "one shape (prompts, P), padded on the left")
    unused = int(prompt_mask.any(0).long().argmax())  # columns that are padding in every prompt
    prompt_ids, prompt_mask = prompt_ids.to(device)[:, unused:], prompt_mask[:, unused:]
    positions = position_ids(prompt_mask)

    def descend(rows: _Rows, depth: int):
        size = max(1, reader.queries // len(reader.children))
        for start in range(0, len(rows.node), size):
            part = _take(rows, slice(start, start + size)) if len(rows.node) > size else rows
            yield from (continue_shared if shared_here(part.cache) else continue_apart)(part, depth)

    def shared_here(cache) -> bool:
        return shared and _plain(cache) and reader.model.config._attn_implementation in ("sdpa", "eager")

    def continue_shared(rows: _Rows, depth: int):
        """The children of a prefix are queries of its row, each of which sees the prefix and itself."""
        count, k = len(rows.node), reader.branches
        tokens, steps = reader.children, torch.zeros_like(reader.children)
        related = torch.eye(len(tokens), dtype=torch.bool, device=device)  # (queries, queries): who sees whom
        if depth == depths and reader.closing is not None:  # and after each branch comes a closing token, which sees it
            tokens = torch.cat([tokens, tokens.new_full((k,), reader.closing)])
            steps = torch.cat([steps, steps.new_ones(k)])
            related = torch.eye(len(tokens), dtype=torch.bool, device=device)
            related[-k:, :k] = torch.eye(k, dtype=torch.bool, device=device)
        width, seen = len(tokens), rows.past.shape[1]
        sees = torch.cat([rows.past[:, None].expand(count, width, seen), related.expand(count, width, width)], 2)
        dtype = rows.cache.layers[0].keys.dtype
        mask = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees, torch.finfo(dtype).min)
        values, cache = reader(tokens.expand(count, width), mask[:, None], rows.position[:, None] + steps, rows.cache)
        yield depth, rows.prompt, rows.node, values
        if depth < depths:
            for layer in cache.layers:
                layer.keys, layer.values = (_one_child_each(states, seen, k) for states in (layer.keys, layer.values))
            yield from descend(next_rows(rows, cache, k), depth + 1)

    def continue_apart(rows: _Rows, depth: int):
        """Each child is a row of its own: for any attention and any cache."""
        count, width = len(rows.node), len(reader.children)
        cache = _select(rows.cache, torch.arange(count, device=device).repeat_interleave(width))
        past = torch.cat([rows.past, rows.past.new_ones(count, 1)], 1).repeat_interleave(width, 0)
        values, cache = reader(reader.children.repeat(count)[:, None], past.long(),
                             rows.position.repeat_interleave(width)[:, None], cache)
        yield depth, rows.prompt, rows.node, values.unflatten(0, (count, width)).squeeze(2)
        if depth < depths:
            kept = torch.arange(count * width, device=device).view(count, width)[:, : reader.branches].flatten()
            yield from descend(next_rows(rows, _select(cache, kept), reader.branches), depth + 1)

    def next_rows(rows: _Rows, cache, k: int) -> _Rows:
        past = torch.cat([rows.past, rows.past.new_ones(len(rows.past), 1)], 1)
        node = (rows.node[:, None] * k + torch.arange(k)).flatten()
        return _Rows(cache, past.repeat_interleave(k, 0), (rows.position + 1).repeat_interleave(k),
                     rows.prompt.repeat_interleave(k), node)

    size = max(1, reader.queries // prompt_ids.shape[1])
    for start in range(0, len(prompt_ids), size):
        some = slice(start, start + size)
        values, cache = reader(prompt_ids[some], prompt_mask[some].long(), positions[some])
        prompt = torch.arange(start, start + len(values))
        node = torch.zeros_like(prompt)
        yield 0, prompt, node, values[:, -1:]
        if depths:
            yield from descend(_Rows(cache, prompt_mask[some], positions[some, -1] + 1, prompt, node), 1)


def _one_child_each(states: Tensor, seen: int, k: int) -> Tensor:
    """Keys or values (R, heads, seen + children, d) → (R·k, heads, seen + 1, d): the prefix with each of k children."""
    rows, heads, _, width = states.shape
    prefix = states[:, None, :, :seen].expand(rows, k, heads, seen, width)
    child = states[:, :, seen : seen + k].transpose(1, 2)[:, :, :, None]
    return torch.cat([prefix, child], 3).flatten(0, 1)


def _plain(cache) -> bool:
    return all(type(layer) is DynamicLayer for layer in getattr(cache, "layers", [None]))


def _select(cache, rows: Tensor | slice):
    """A cache that holds these rows only; the one given stays as it is."""
    if not _plain(cache):
        selected = copy.deepcopy(cache)
        selected.reorder_cache(rows)
        return selected
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in selected.layers:
        layer.keys, layer.values = layer.keys[rows], layer.values[rows]
    return selected


def _take(rows: _Rows, some: slice) -> _Rows:
    which = some if _plain(rows.cache) else torch.arange(len(rows.node), device=rows.past.device)[some]
    return _Rows(_select(rows.cache, which), rows.past[some], rows.position[some], rows.prompt[some], rows.node[some])


def _shares_rows(reader: _Reader, prompt_ids: Tensor, prompt_mask: Tensor) -> bool:
    """Whether this model takes children as queries of their prefix's row: tried on the first prompt's first levels."""
    try:
        levels = _levels(reader, prompt_ids[:1], prompt_mask[:1], 3, True)
    except (ValueError, RuntimeError, IndexError):  # its attention takes no 4-D mask
        return False
    return _path_error(reader, prompt_ids[:1], prompt_mask[:1], levels) < reader.tolerance


def _path_error(reader: _Reader, prompt_ids: Tensor, prompt_mask: Tensor, levels: Sequence[Tensor]) -> float:
    """Largest difference between `levels` and an ordinary forward pass, on one path per prompt: |a − b| / (1 + |b|)."""
    steps, k, worst = len(levels), reader.branches, 0.0
    size = max(1, reader.queries // (prompt_ids.shape[1] + steps))
    for start in range(0, len(prompt_ids), size):
        prompt = torch.arange(start, min(start + size, len(prompt_ids)))
        path = (prompt[:, None] + 3 * torch.arange(steps - 1)) % k  # (prompts, T − 1): another one for each prompt
        ids = torch.cat([prompt_ids[prompt].to(reader.children), reader.children[path]], 1)
        mask = torch.nn.functional.pad(prompt_mask[prompt].bool(), (0, steps - 1), value=True).to(ids.device)
        values = reader(ids, mask.long(), position_ids(mask))[0][:, -steps:].cpu()
        node = torch.zeros_like(prompt)
        for t in range(steps):
            difference = (levels[t][prompt, node] - values[:, t]).abs() / (1 + values[:, t].abs())
            worst = max(worst, float(difference.max()))
            if t < steps - 1:
                node = node * k + path[:, t]
    return worst


@contextmanager
def _evaluating(model):
    """Dropout off inside, every module's mode as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


# ---- rewards of every response


def gold_table(world: World, prompts: Sequence[str | Prompt], responses: Responses) -> Tensor:
    """Gold reward of every response to every prompt: (prompts, N) float64, raw units. Only the counts matter."""
    counts, place = np.unique(responses.counts.numpy(), axis=0, return_inverse=True)
    prompts = [world.find(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    return torch.from_numpy(np.stack([world.gold(prompt, counts)[place.reshape(-1)] for prompt in prompts])).double()


def proxy_table(reward: Callable, prompts: Sequence[str | Prompt], responses: Responses, *,
                directory: str | Path | None = None) -> Tensor:
    """The reward's score of every response to every desk-world prompt: (prompts, N) float64, in the reward's own units.

    reward: any callable prompts, responses -> scores (N,). A `RewardScorer` whose model is causal is read at every node
    of the prefix tree, each prefix once, and compared with its own scores of eight responses per prompt; where they
    differ, and for any other callable, each response is scored by itself. directory: where to keep the table of a
    RewardScorer, as in `response_logps`.
    """
    texts = [prompt if isinstance(prompt, str) else prompt.text for prompt in prompts]

    def score() -> Tensor:
        table = _trie_scores(reward, texts, responses)
        if table is None:
            sentences = responses.texts()
            rows = [torch.as_tensor(reward([text] * len(responses), sentences)) for text in texts]
            table = torch.stack(rows).double().cpu()
        return table

    if directory is None or not isinstance(getattr(reward, "model", None), torch.nn.Module):
        return score()
    tokenizer = reward.tokenizer
    key = ["scores", weights_hash(reward.model), reward.mean, reward.std, encode_prompts(tokenizer, texts)[0].tolist(),
           phrase_ids(tokenizer), tokenizer.eos_token_id, responses.max_phrases]
    return cached(directory, key, score)


@torch.no_grad()
def _trie_scores(reward, texts: Sequence[str], responses: Responses) -> Tensor | None:
    """Scores read at the nodes of the prefix tree; None if `reward` is not such a model."""
    if not isinstance(getattr(reward, "model", None), torch.nn.Module) or not hasattr(reward.model, "score"):
        return None
    try:
        phrases = phrase_ids(reward.tokenizer)
    except ValueError:
        return None
    reader = _reward_reader(reward.model, phrases, reward.tokenizer.eos_token_id)
    ids, mask = encode_prompts(reward.tokenizer, list(texts))
    k, deepest = responses.phrases, responses.max_phrases
    table = torch.full((len(texts), len(responses)), torch.nan, dtype=torch.float64)
    try:
        for t, prompt, node, values in _walk(reader, ids, mask, deepest, True):
            if t:
                values = values.cpu()
                table[prompt, responses.level(t - 1).start + node] = values[:, k]  # EOS right after the prefix
            if t == deepest:
                last = responses.level(t).start + _child_numbers(node, values[:, :k])
                table[prompt[:, None], last] = values[:, k + 1 :]  # EOS after each of the last phrases
    except (ValueError, RuntimeError, IndexError):  # its attention takes no 4-D mask, or its cache is of another kind
        return None
    table = (table - reward.mean) / reward.std
    spot = torch.arange(8 * len(texts)).view(len(texts), 8) * 7919 % len(responses)  # 7919 is prime: all over the table
    spot[:, :4] %= responses.level(deepest).start  # and half of them short responses
    sentences = responses.texts()
    own = reward([text for text in texts for _ in range(8)], [sentences[i] for i in spot.flatten().tolist()])
    error = (table.gather(1, spot).flatten() - own.double()).abs() / (1 + own.double().abs())
    return table if bool((error < 1e-3).all()) else None


# ---- what the tables say


def expectation(logps: Tensor, values: Tensor) -> Tensor:
    """E_π[v] = Σ_y π(y) v(y): (prompts,) for logps and values (prompts, N)."""
    _same_shape(logps=logps, values=values)
    return (logps.exp() * values).sum(1)


def variance(logps: Tensor, values: Tensor) -> Tensor:
    """Var_π[v] = E_π[(v − E_π[v])²]: (prompts,)."""
    return expectation(logps, (values - expectation(logps, values)[:, None]).square())


def response_entropy(logps: Tensor) -> Tensor:
    """H(π) = −Σ_y π(y) log π(y): (prompts,), nats per response."""
    return -torch.where(logps > -torch.inf, logps.exp() * logps, 0.0).sum(1)


def response_kl(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """KL(π ‖ π_ref) = Σ_y π(y) (log π(y) − log π_ref(y)): (prompts,), nats per response; ∞ outside π_ref's support."""
    _same_shape(logps=logps, ref_logps=ref_logps)
    return torch.where(logps > -torch.inf, logps.exp() * (logps - ref_logps), 0.0).sum(1)


def optimum(ref_logps: Tensor, rewards: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The policy that maximises E_π[r] − β KL(π ‖ π_ref): its logps (prompts, N), and log Z (prompts,).

    π*(y) = π_ref(y) e^{r(y)/β} / Z,  Z = Σ_y π_ref(y) e^{r(y)/β}.  The maximum itself is J* = β log Z.
    beta: β > 0, in units of reward per nat. Raises ValueError if it is not positive. (Rafailov et al. 2023, eq. 4)
    """
    _same_shape(ref_logps=ref_logps, rewards=rewards)
    if not beta > 0:
        raise ValueError(f"beta is {beta}, expected a positive number (the price of one nat of KL)")
    tilted = ref_logps + rewards / beta
    log_z = tilted.logsumexp(1)
    return tilted - log_z[:, None], log_z


def tabular_dpo(ref_logps: Tensor, first: Tensor, second: Tensor, wins: Tensor, beta: float, *,
                start: Tensor | None = None, loss_type: str = "sigmoid", steps: int = 500) -> Tensor:
    """DPO where the policy is a table: log-probs (N,) that minimise the loss of M pairs of responses to one prompt.

    Σ_m [w_m L(first ≻ second) + (1 − w_m) L(second ≻ first)] / M, with L = `dpo.dpo_loss`, by L-BFGS in float64.
    ref_logps: (N,). first, second: (M,) int64, which responses. wins: (M,) in [0, 1], the share of labels that prefer
    the first: with every pair of responses and w = σ(Δr), the minimiser is the optimum π* of r. start: (N,) log-probs
    to begin with, the reference if left out. It matters: the loss says nothing about responses that no pair names, and
    has no minimum where a response wins (or loses) every comparison. There the answer is how far `steps` steps came.
    Raises ValueError on shapes that do not fit. (Rafailov et al. 2023, eq. 7)
    """
    if ref_logps.ndim != 1 or not first.shape == second.shape == wins.shape == (len(wins),):
        raise ValueError(f"ref_logps has shape {tuple(ref_logps.shape)}, first, second and wins {tuple(first.shape)}, "
                         f"{tuple(second.shape)}, {tuple(wins.shape)}; expected (N,) and three times (M,)")
    ref_logps = ref_logps.double()
    which, place, times = torch.stack([first, second]).unique(dim=1, return_inverse=True, return_counts=True)
    wins = torch.zeros(len(times), dtype=torch.float64).index_add(0, place, wins.double()) / times
    first, second = which  # the loss is linear in the labels: a pair that was labelled often is one pair with a weight
    start = ref_logps if start is None else start.double()
    moved = torch.zeros_like(start, requires_grad=True)  # β (log π − log π_start) + a constant: well scaled for any β
    references = ref_logps[first], ref_logps[second]
    optimiser = torch.optim.LBFGS([moved], max_iter=steps, max_eval=4 * steps, tolerance_grad=1e-12,
                                  tolerance_change=1e-16, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        scores = start + moved / beta  # log π up to a constant, which no margin contains
        pair = scores[first], scores[second]
        forth = dpo_loss(*pair, *references, beta=beta, loss_type=loss_type)
        back = dpo_loss(*pair[::-1], *references[::-1], beta=beta, loss_type=loss_type)
        loss = (times * (wins * forth + (1 - wins) * back)).sum() / times.sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return (start + moved.detach() / beta).log_softmax(0)


@dataclass(frozen=True, eq=False)
class Frontier:
    """The best mean reward that any policy can have at each mean KL to the reference: a concave curve, one point per β.

    From the reference itself (β = ∞, first) to the policy that always gives a best response (β = 0, last), KL
    increasing. One β for all prompts is what maximises the mean reward at a given mean KL. The slope d reward / d KL is
    β.
    """

    beta: Tensor  # (B,)
    kl: Tensor  # (B,) nats, mean over prompts
    reward: Tensor  # (B,) mean over prompts
    other: Tensor | None  # (B,) mean of another table under the same policies: gold along the proxy's frontier
    ref_variance: float  # mean over prompts of Var_ref[r]: the curve starts as r_ref + √(2 Var_ref KL)

    def reward_at(self, kl: Tensor | float) -> Tensor:
        """Reward of the frontier at these KLs (any shape): Hermite interpolation in √KL, between chord and tangents.

        Exact at the points and nowhere above the true curve's tangents; beyond the last point the reward stays the last
        one's. Raises ValueError on a negative or NaN KL.
        """
        kl = torch.as_tensor(kl, dtype=torch.float64)
        if not (kl >= 0).all():
            raise ValueError(f"kl is {kl.min():.3g} at its smallest, expected nats ≥ 0")
        root = self.kl.sqrt()
        slope = torch.where(self.beta.isinf(), math.sqrt(2 * self.ref_variance), 2 * root * self.beta)
        right = torch.searchsorted(self.kl, kl.clamp(max=float(self.kl[-1]))).clamp(1, len(self.kl) - 1)
        left = right - 1
        width = (root[right] - root[left]).clamp(min=1e-300)
        s = ((kl.sqrt() - root[left]) / width).clamp(0, 1)
        curve = ((1 + 2 * s) * (1 - s) ** 2 * self.reward[left] + s * (1 - s) ** 2 * width * slope[left]
                 + s**2 * (3 - 2 * s) * self.reward[right] + s**2 * (s - 1) * width * slope[right])
        span = (self.kl[right] - self.kl[left]).clamp(min=1e-300)
        chord = self.reward[left] + (self.reward[right] - self.reward[left]) * ((kl - self.kl[left]) / span).clamp(0, 1)
        rise = torch.where(self.beta[left].isinf(), torch.inf, self.beta[left] * (kl - self.kl[left]))
        tangent = torch.minimum(self.reward[left] + rise, self.reward[right] + self.beta[right] * (kl - self.kl[right]))
        return torch.maximum(chord, torch.minimum(curve, tangent)).clamp(max=float(self.reward[-1]))


def frontier(ref_logps: Tensor, rewards: Tensor, betas: Sequence[float], other: Tensor | None = None) -> Frontier:
    """The reward–KL frontier over these β, with both its ends (β = ∞ and 0) put to them.

    ref_logps, rewards, other: (prompts, N). Raises ValueError if a β is not positive.
    """
    greedy = torch.where(rewards >= rewards.amax(1, keepdim=True) - _rounding(rewards), ref_logps, -torch.inf)
    rows = []
    for beta in [math.inf, *sorted(betas, reverse=True), 0.0]:
        logps = {math.inf: ref_logps, 0.0: greedy - greedy.logsumexp(1, keepdim=True)}.get(beta)
        logps = optimum(ref_logps, rewards, beta)[0] if logps is None else logps
        rows.append([beta, response_kl(logps, ref_logps).mean(), expectation(logps, rewards).mean(),
                     torch.nan if other is None else expectation(logps, other).mean()])
    beta, kl, reward, along = torch.tensor(rows, dtype=torch.float64).T
    return Frontier(beta, kl.clamp(min=0), reward, None if other is None else along,
                    float(variance(ref_logps, rewards).mean()))


@dataclass(frozen=True)
class Gap:
    """How far a policy is from the best that is possible at its own KL. All but `share` and `kl` in units of reward."""

    kl: float  # nats
    reward: float
    optimum: float  # reward of the exact optimum at the same KL
    reference: float  # reward of the reference
    gap: float  # optimum − reward: 0 is perfect, and never below 0 but for sampling error
    share: float  # (reward − reference) / (optimum − reference): 1 is perfect; NaN where the optimum gains nothing


def gap(kl: float, reward: float, frontier: Frontier) -> Gap:
    """Compare a policy's mean KL and mean reward with the frontier of the same prompts and the same reward."""
    best, reference = float(frontier.reward_at(kl)), float(frontier.reward[0])
    gain = best - reference
    share = (float(reward) - reference) / gain if gain > 0 else math.nan
    return Gap(float(kl), float(reward), best, reference, best - float(reward), share)


def best_of_n(ref_logps: Tensor, rewards: Tensor, n: float) -> Tensor:
    """log-probs of best-of-n: draw n responses from π_ref, keep the one with the highest reward. (prompts, N).

    π_n(y) = (F(r)ⁿ − F₋(r)ⁿ) · π_ref(y) / π_ref(reward = r(y)), with F(r) = π_ref(reward ≤ r) and F₋(r) = π_ref(reward
    < r): among equal rewards the winner is drawn as π_ref draws. n ≥ 1 need not be whole. Raises ValueError if n < 1.
   
    """
    _same_shape(ref_logps=ref_logps, rewards=rewards)
    if not n >= 1:
        raise ValueError(f"n is {n}, expected at least 1 draw")
    ref_logps = ref_logps - ref_logps.logsumexp(1, keepdim=True)
    order, group = _reward_groups(rewards)
    ordered = ref_logps.gather(1, order)
    mass = torch.zeros_like(ref_logps).scatter_add_(1, group, ordered.exp())  # of each group, lowest reward first
    at_most = mass.cumsum(1)
    above = mass.flip(1).cumsum(1).flip(1) - mass
    log_at_most = torch.where(at_most < 0.5, at_most.log(), torch.log1p(-above.clamp(0, 0.5)))
    log_share = torch.log1p(-(mass / log_at_most.exp()).clamp(max=1.0))
    log_win = n * log_at_most + torch.log(-torch.expm1(n * log_share))
    log_factor = torch.where(mass > 0, log_win - mass.log(), 0.0).gather(1, group)
    return torch.empty_like(ref_logps).scatter_(1, order, ordered + log_factor)


def best_of_n_kl_bound(n: float) -> float:
    """log n − (n − 1)/n ≥ KL(best-of-n ‖ π_ref), nats: close where no response is likely. (Beirami et al. 2025)"""
    return math.log(n) - (n - 1) / n


def _reward_groups(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Order (prompts, N) by increasing reward, and for each place in it the number of its group of equal rewards.

    Equal up to rounding: 0.1 + 0.2 and 0.3 are one reward.
    """
    ordered, order = rewards.sort(dim=1, stable=True)
    steps = torch.zeros_like(order)
    steps[:, 1:] = (ordered.diff(dim=1) > _rounding(rewards)).long()
    return order, steps.cumsum(1)


def _rounding(rewards: Tensor) -> Tensor:
    return 8 * torch.finfo(rewards.dtype).eps * rewards.abs().amax(1, keepdim=True)


def _same_shape(**tables: Tensor) -> None:
    (first, reference), *others = tables.items()
    for name, table in others:
        if table.shape != reference.shape or table.ndim != 2:
            raise ValueError(f"{name} has shape {tuple(table.shape)}, expected (prompts, responses) "
                             f"{tuple(reference.shape)} (the shape of {first})")


# ---- pruning


@dataclass(frozen=True, eq=False)
class Pruned:
    """The likeliest responses, and exactly how much is missing. `bound` functions turn that into error bounds."""

    keep: Tensor  # (prompts, N) bool
    dropped: Tensor  # (prompts,) δ: probability of what is not kept

    def expectation_bound(self, low: float, high: float) -> Tensor:
        """|E_π[v] − Σ_kept π v / (1 − δ)| ≤ δ (high − low) for any v with values in [low, high]: (prompts,)."""
        return self.dropped * (high - low)

    def log_z_bound(self, log_z: Tensor, beta: float, highest: float) -> Tensor:
        """log Z − log Z_kept ≤ log(1 + δ e^{r_max/β} / Z_kept) ≤ δ e^{r_max/β} / Z_kept: (prompts,), the tighter one.

        log_z: log Z_kept (prompts,), the log-sum-exp over the kept responses. highest: r_max, no reward is above.
        """
        return torch.nn.functional.softplus(self.dropped.log() + highest / beta - log_z)


def prune(logps: Tensor, mass: float = 0.999) -> Pruned:
    """Keep the fewest responses per prompt that hold at least `mass` of the probability.

    Enumerating a policy is cheap; scoring 16,105 responses with a large reward model is not: score the kept ones only.
    Raises ValueError unless 0 < mass ≤ 1.
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass is {mass}, expected a share of the probability in (0, 1]")
    ordered, order = logps.exp().sort(1, descending=True)
    before = ordered.cumsum(1) - ordered
    kept = before < mass * ordered.sum(1, keepdim=True) * (1 - 1e-15)
    keep = torch.zeros_like(kept).scatter_(1, order, kept)
    return Pruned(keep, torch.where(keep, 0.0, logps.exp()).sum(1))


# ---- the exact gradient


def score_gradient(policy, prompt_ids: Tensor, prompt_mask: Tensor, weights: Tensor, *, phrase_ids: Sequence[int],
                   eos_token_id: int, max_phrases: int = MAX_PHRASES) -> dict[str, Tensor]:
    """Σ_x Σ_y w(x, y) ∇_θ log π_θ(y | x), by parameter name, for every parameter that requires a gradient.

    One backward pass through the prefix tree, whose token log-probs get the sum of the weights of all responses below
    them. weights: (prompts, N), held constant. Any objective's exact gradient is of this form: `exact_gradient` is one.
    """
    space = response_space(len(phrase_ids), max_phrases)
    if weights.shape != (len(prompt_ids), len(space)):
        raise ValueError(f"weights has shape {tuple(weights.shape)}, expected {(len(prompt_ids), len(space))} "
                         "(prompts, responses)")
    below = weights[:, space.level(max_phrases)]  # of each prefix: the weights of all responses that start with it
    levels: list[Tensor] = []
    for t in reversed(range(max_phrases)):
        ends, children = weights[:, space.level(t)], below.unflatten(1, (-1, space.phrases))
        levels.insert(0, torch.cat([children, ends[:, :, None]], 2))
        below = ends + children.sum(2)
    reader = _policy_reader(policy, phrase_ids, eos_token_id)
    named = [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]
    total = [torch.zeros_like(parameter) for _, parameter in named]
    some = max(1, 16384 // sum(space.phrases**t for t in range(max_phrases)))  # prompts whose graph is held at once
    with _evaluating(policy):
        with torch.no_grad():
            shared = _shares_rows(reader, prompt_ids, prompt_mask)
        for start in range(0, len(prompt_ids), some):
            here = slice(start, start + some)
            surrogate = torch.zeros((), dtype=torch.float64, device=policy.device)
            for t, prompt, node, values in _walk(reader, prompt_ids[here], prompt_mask[here], max_phrases - 1, shared):
                weight = levels[t][here][prompt[:, None], _child_numbers(node, values)].to(values)
                surrogate = surrogate + torch.where(weight != 0, weight * values, 0.0).sum()
            gradients = torch.autograd.grad(surrogate, [parameter for _, parameter in named], allow_unused=True)
            total = [have if new is None else have + new for have, new in zip(total, gradients, strict=True)]
    return {name: gradient for (name, _), gradient in zip(named, total, strict=True)}


def exact_gradient(policy, prompt_ids: Tensor, prompt_mask: Tensor, rewards: Tensor, ref_logps: Tensor, beta: float, *,
                   phrase_ids: Sequence[int], eos_token_id: int, max_phrases: int = MAX_PHRASES) -> dict[str, Tensor]:
    """Gradient of J = mean over prompts of E_π[r] − β KL(π ‖ π_ref), by parameter name. Nothing is sampled.

    ∇J = Σ_y π(y) (r(y) − β log π(y)/π_ref(y) − b) ∇ log π(y), for any b: here the mean, which keeps the sum small.
    rewards, ref_logps: (prompts, N). What REINFORCE, RLOO and PPO's first step estimate.
    """
    _same_shape(ref_logps=ref_logps, rewards=rewards)
    where = dict(phrase_ids=phrase_ids, eos_token_id=eos_token_id, max_phrases=max_phrases)
    logps = trie_logps(policy, prompt_ids, prompt_mask, **where)
    gain = rewards - beta * (logps - ref_logps)
    weights = logps.exp() * (gain - expectation(logps, gain)[:, None]) / len(prompt_ids)
    return score_gradient(policy, prompt_ids, prompt_mask, weights, **where)


# ---- the cache on disk


def cached(directory: str | Path, key: object, table: Callable[[], Tensor]) -> Tensor:
    """The table kept in `directory` under the hash of `key` (anything JSON can hold); made and kept if there is none.

    Written under a temporary name and then renamed: a reader never sees half a file. A file that cannot be read is made
    again.
    """
    digest = hashlib.sha256(json.dumps([VERSION, key]).encode()).hexdigest()
    path = Path(directory) / f"{digest[:32]}.npy"
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError):
        pass
    made = table()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, made.numpy(), allow_pickle=False)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return made


def weights_hash(model) -> str:
    """SHA-256 of what decides a model's output: its class, configuration, every weight, and which adapters are on."""
    unrelated = ("_name_or_path", "transformers_version")
    config = {name: value for name, value in model.config.to_dict().items() if name not in unrelated}
    adapters = [[name, module.disable_adapters, module.merged, module.active_adapters, getattr(module, "scaling", None)]
                for name, module in model.named_modules() if hasattr(module, "merged_adapters")]  # peft's layers
    digest = hashlib.sha256(json.dumps([type(model).__name__, config, adapters], sort_keys=True, default=str).encode())
    weights = sorted(model.state_dict().items())
    if not weights:
        raise ValueError(f"{type(model).__name__} has no weights of its own to hash; pass the model that holds them")
    for name, tensor in weights:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ---- from samples, for real models


@dataclass(frozen=True, eq=False)
class SampledOptimum:
    """What samples say about the optimum π*. All (prompts,)."""

    log_z: Tensor  # log Ẑ
    reward: Tensor  # Ê[r] under π*
    other: Tensor | None  # the same of another score
    kl: Tensor  # KL(π* ‖ π_ref) estimated, nats
    ceiling: Tensor  # no estimate of the KL from these samples can be above: log N where they come from π_ref
    effective: Tensor  # effective sample size (Σw)² / Σw²: near 1, the estimate rests on one response


def sampled_optimum(rewards: Tensor, beta: float, *, other: Tensor | None = None, logps: Tensor | None = None,
                    ref_logps: Tensor | None = None) -> SampledOptimum:
    """The optimum π* ∝ π_ref e^{r/β} estimated from N samples per prompt, by importance weights.

    w_i = (π_ref/q)(y_i) e^{r_i/β};  log Ẑ = log mean w;  Ê[v] = Σ w v / Σ w;  KL̂ = Ê[r]/β − log Ẑ ≤ log N + Ê[log
    q/π_ref]. rewards, other: (prompts, N). logps, ref_logps: (prompts, N) log-probs of the samples under the policy q
    that drew them and under π_ref; leave both out if π_ref drew them. log Ẑ is biased low, by about 1/(2 · effective).
    Raises ValueError if only one is given.
    """
    if (logps is None) != (ref_logps is None):
        raise ValueError("logps and ref_logps go together: give both, or neither if the reference drew the samples")
    if not beta > 0:
        raise ValueError(f"beta is {beta}, expected a positive number")
    rewards = rewards.double()
    excess = torch.zeros_like(rewards) if logps is None else logps.double() - ref_logps.double()  # log q/π_ref
    log_weights = rewards / beta - excess
    log_z = log_weights.logsumexp(1) - math.log(rewards.shape[1])
    shares = log_weights.softmax(1)
    reward = (shares * rewards).sum(1)
    along = None if other is None else (shares * other.double()).sum(1)
    ceiling = math.log(rewards.shape[1]) + (shares * excess).sum(1)
    return SampledOptimum(log_z, reward, along, reward / beta - log_z, ceiling, 1 / shares.square().sum(1))


def sampled_best_of_n(rewards: Tensor, n: int, other: Tensor | None = None) -> Tensor:
    """Mean score of best-of-n, estimated without bias from N ≥ n samples per prompt: (prompts,).

    Σ_i C(i − 1, n − 1) / C(N, n) · v_(i) over the samples in order of reward: the mean over all subsets of n. Equal
    rewards share their weight. other: the score v to average, (prompts, N); the reward itself if left out. Raises
    ValueError unless 1 ≤ n ≤ N. (Nakano et al. 2021, appendix I)
    """
    count = rewards.shape[1]
    if not 1 <= n <= count:
        raise ValueError(f"n is {n}, expected 1 … {count} (the number of samples per prompt)")
    values = (rewards if other is None else other).double()
    rank = torch.arange(1, count + 1, dtype=torch.float64)
    log_choose = torch.lgamma(rank) - torch.lgamma((rank - n + 1).clamp(min=1)) - math.lgamma(n)
    log_all = math.lgamma(count + 1) - math.lgamma(n + 1) - math.lgamma(count - n + 1)
    weight = torch.where(rank >= n, (log_choose - log_all).exp(), 0.0).expand(rewards.shape)
    order, group = _reward_groups(rewards)
    of_group = torch.zeros_like(values).scatter_add_(1, group, weight)
    size = torch.zeros_like(values).scatter_add_(1, group, torch.ones_like(weight))
    return ((of_group / size.clamp(min=1)).gather(1, group) * values.gather(1, order)).sum(1)
