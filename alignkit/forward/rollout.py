"""B prompts with one response each, as padded tensors; made from texts or ids, split into parts, decoded."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import compress

import torch
from torch import Tensor

from alignkit.data.encoding import decode_reply, encode_pairs, encode_texts
from alignkit.data.ends import end_after


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions (B, L) that count only real tokens, so left padding does not change the result."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def distinct_prompts(prompt_ids: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and mask (N, P) of the distinct prompts, and for each row (B,) the number of its prompt."""
    both, which = torch.unique(torch.cat([prompt_ids, prompt_mask.long()], 1), dim=0, return_inverse=True)
    ids, mask = both.chunk(2, 1)
    return ids, mask.bool(), which


@dataclass(frozen=True)
class Rollout:
    """B prompts with one response each.

    prompt_ids (B, P): left-padded. prompt_mask (B, P): True at real tokens. response_ids (B, T): right-padded, EOS
    included. response_mask (B, T): True at response tokens. logprobs (B, T): the sampler's, nats, 0 outside the mask.
    finished (B,): True if the response ended with EOS or another end token, False if it reached the limit.
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
    """Token ids (B, P), left-padded, and mask (B, P) of prompt texts. Special tokens written in a prompt stay text (in
    a `ChatText`, which a chat template rendered, they are real).

    Raises ValueError, naming the row, if a prompt has no tokens.
    """
    rows = encode_texts(tokenizer, list(prompts))
    for number, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompt {number} is empty: it has no tokens")
    return left_pad(rows, tokenizer.pad_token_id)


def full_ids(rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Prompt and response concatenated, without the last token, which predicts nothing: ids and mask (B, P + T − 1)."""
    return (torch.cat([rollout.prompt_ids, rollout.response_ids[:, :-1]], 1),
            torch.cat([rollout.prompt_mask, rollout.response_mask[:, :-1]], 1))


def rollout_from_ids(prompts: list[list[int]], responses: list[list[int]], *, eos_token_id: int | Collection[int],
                     pad_token_id: int, device="cpu") -> Rollout:
    """A Rollout of given token ids, with logprobs 0, for scoring text that was not sampled. The ids may contain EOS.

    eos_token_id: the id that ends a response, or several (`end_ids`).
    """
    ends = each_end(eos_token_id)
    prompt_ids, prompt_mask = left_pad(prompts, pad_token_id)
    response_ids, response_mask = right_pad(responses, pad_token_id)
    finished = torch.tensor([bool(row) and row[-1] in ends for row in responses])
    rollout = Rollout(prompt_ids, prompt_mask, response_ids, response_mask, torch.zeros(response_ids.shape), finished)
    return to_device(rollout, device)


def encode_rows(tokenizer, rows: list[dict], column: str, max_new_tokens: int) -> Rollout:
    """A Rollout of rows with `prompt` and `column` (texts); the end token (`end_after`) is appended to a response that
    is shorter than max_new_tokens."""
    pairs = encode_pairs(tokenizer, [row["prompt"] for row in rows], [row[column] for row in rows])[0]
    ends = [end_after(tokenizer, row["prompt"]) for row in rows]
    prompts = [prompt for prompt, _ in pairs]
    responses = [[*ids, end][:max_new_tokens] for (_, ids), end in zip(pairs, ends, strict=True)]
    return rollout_from_ids(prompts, responses, eos_token_id=set(ends), pad_token_id=tokenizer.pad_token_id)


def each_end(eos_token_id: int | Collection[int] | None) -> tuple[int, ...]:
    """The ids that end a response, given one, several or none."""
    if eos_token_id is None:
        return ()
    return (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)


def passes(rollout: Rollout, most: int | None, rows: int) -> list[tuple[slice | Tensor, Rollout]]:
    """Split a rollout into parts that fit one forward pass; each part comes with its row numbers in the rollout.

    most: maximum number of tokens of a part, padding included. Rows of similar length form a part, without columns that
    are padding in all of its rows. None makes parts of `rows` rows, in their order.
    """
    if most is None:
        slices = [slice(start, start + rows) for start in range(0, len(rollout), rows)]
        return [(part, rollout[part]) for part in slices]
    alike = groups(rollout.prompt_mask.sum(1), rollout.response_mask.sum(1), most)
    return [(part, trimmed(rollout[part])) for part in alike]


def groups(prompt_tokens: Tensor, response_tokens: Tensor, most: int) -> list[Tensor]:
    """Groups of rows of similar length; a forward pass over one group reads at most `most` tokens, padding included.

    prompt_tokens, response_tokens: (B,), the numbers of tokens. A row with more than `most` tokens is a group of its
    own.
    """
    lengths = torch.stack([prompt_tokens, response_tokens], 1).tolist()
    parts, widest = [], (0, 0)
    for row in sorted(range(len(lengths)), key=lambda row: sum(lengths[row])):
        wider = tuple(map(max, widest, lengths[row]))
        if parts and (len(parts[-1]) + 1) * (sum(wider) - 1) <= most:  # the last token is not read
            parts[-1].append(row)
            widest = wider
        else:
            parts.append([row])
            widest = tuple(lengths[row])
    return [torch.tensor(rows, device=prompt_tokens.device) for rows in parts]


def trimmed(rollout: Rollout) -> Rollout:
    """The same rows without columns that are padding in all of them; at least one column of the response is kept."""
    prompt, response = rollout.prompt_mask.any(0), rollout.response_mask.any(0)
    response[0] = True
    return Rollout(rollout.prompt_ids[:, prompt], rollout.prompt_mask[:, prompt], rollout.response_ids[:, response],
                   rollout.response_mask[:, response], rollout.logprobs[:, response], rollout.finished)


def to_device(rollout: Rollout, device) -> Rollout:
    """The same rollout on another device."""
    return replace(rollout, **{name: value.to(device) for name, value in vars(rollout).items()})


def token_ids(rollout: Rollout) -> dict[str, list[list[int]]]:
    """The token ids of prompts and responses, without padding, as plain lists: for a record of a training step's
    data."""
    sides = {"prompts": (rollout.prompt_ids, rollout.prompt_mask),
             "responses": (rollout.response_ids, rollout.response_mask)}
    return {name: [row[kept].tolist() for row, kept in zip(ids, mask.bool(), strict=True)]
            for name, (ids, mask) in sides.items()}


def decode_responses(tokenizer, rollout: Rollout) -> list[str]:
    """The response texts, without end tokens and padding: `encode_pair` of prompt and text gives the same ids, if the
    tokenizer itself produces them for that text."""
    columns = (rollout.prompt_ids[:, -1], rollout.response_ids, rollout.response_mask, rollout.finished)
    rows = []
    for before, ids, mask, finished in zip(*(column.tolist() for column in columns), strict=True):
        kept = tuple(compress(ids, mask))
        rows.append((before, kept[:-1] if finished else kept))
    texts = {row: decode_reply(tokenizer, *row) for row in set(rows)}
    return [texts[row] for row in rows]
