"""The response space: every response of at most T phrases, and its prefix tree."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignkit.desk.world import MAX_PHRASES, SENTENCES


# ---- the space of responses
@dataclass(frozen=True, eq=False)
class Responses:
    """All N = Σ_{t ≤ T} K^t responses of at most T phrases out of K, shortest first, then in lexicographic order.

    Response i is also node i of the prefix tree. The responses of length t are level t, and the children of number j in
    a level are numbers jK … jK + K − 1 of the next. A response shorter than T ends with EOS; one of T phrases has no
    EOS.
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
        """The slice of the responses of this length."""
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
        """Sum of values (…, N) over each response and all its continuations: (…, N).

        The entry of response i is Σ_y v(y) over all y that begin with its phrases: below(π) is the probability of every
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
        """The N response texts: the concatenated sentences of the phrases."""
        texts = [""]
        for parent, last in zip(self.parent[1:].tolist(), self.last[1:].tolist(), strict=True):
            texts.append(texts[parent] + sentences[last])
        return texts


@functools.lru_cache(maxsize=4)
def response_space(phrases: int = len(SENTENCES), max_phrases: int = MAX_PHRASES) -> Responses:
    """All responses of at most `max_phrases` (T) phrases out of `phrases` (K): computed once and cached.

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
        rows = slice(start, start + sizes[t])
        sequences[rows] = sequences[parent[rows]]
        sequences[rows, t - 1] = last[rows]
        counts[rows] = counts[parent[rows]] + torch.nn.functional.one_hot(last[rows], phrases)
        start += sizes[t]
    return Responses(phrases, max_phrases, parent, last, length, counts, sequences)
