"""Checks between a policy and its reward: what a reward can read, the ids that it reads, and its return values."""

import warnings
from collections.abc import Iterable, Mapping, Sequence, Set

import numpy as np
import torch
from torch import Tensor

from alignkit.data.encoding import ChatText, encode_pairs, encode_texts, special_ids
from alignkit.data.ends import end_after, end_ids
from alignkit.data.own_template import in_own_template, written_by_another
from alignkit.errors import InvariantError
from alignkit.forward.rollout import Rollout
from alignkit.models.fitness import context_length
from alignkit.models.loading import same_vocabulary


def as_scores(returned, number: int) -> Tensor:
    """The reward's return value as scores (number,), float32. Raises ValueError, naming the actual value, on anything
    else."""
    expected = f"expected {number} numbers, one score a response"
    values = returned
    if isinstance(values, str | bytes | Mapping | Set) or not isinstance(values, Tensor | Iterable | int | float):
        raise ValueError(f"reward returned {_named(returned)}, {expected}")
    try:
        if not isinstance(values, Tensor | Sequence | int | float) and (
                not isinstance(values, np.ndarray) or values.dtype == object):
            values = list(values)  # a generator, a column of a table
        scores = torch.as_tensor(values, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(values, Sequence):
            place = next((place for place, value in enumerate(values) if not _a_number(value)), None)
            if place is not None:
                raise ValueError(f"reward returned {_named(values[place])} for response {place}, {expected}") from error
        raise ValueError(f"reward returned {_named(returned)}, {expected} ({error})") from error
    if scores.shape != (number,):
        raise ValueError(f"reward returned shape {tuple(scores.shape)}, expected ({number},): one score a response")
    return scores


def check_reward_reads(reward, tokenizer, prompts: Sequence[str]) -> None:
    """Check that a reward model can read conversations rendered by the policy's chat template (`ChatText`).

    A reward model with its own chat template renders the messages with that (`in_own_template`); this is tested on the
    first hundred prompts. If the messages are unknown, it reads the text of the policy's template. Raises ValueError if
    its template refuses them, or if its tokenizer lacks a special token in the text, which it would split into letters.
    Warns if the tokenizer has all of them but a different template.
    """
    other = getattr(reward, "tokenizer", None)
    chats = [prompt for prompt in prompts if isinstance(prompt, ChatText)]
    if other is not None and hasattr(reward, "ids"):
        others = [prompt for prompt in chats if written_by_another(other, prompt)]
        in_own_template(other, others[:100], ["Yes."] * len(others[:100]))
        chats = [prompt for prompt in chats if not written_by_another(other, prompt)] if others else chats
    if other is None or other is tokenizer or not chats:
        return
    known = {other.convert_ids_to_tokens(number) for number in special_ids(other)}
    tokens = [tokenizer.convert_ids_to_tokens(number) for number in sorted(special_ids(tokenizer))]
    strange = [token for token in tokens if token not in known and any(token in prompt for prompt in chats[:100])]
    if strange:
        raise ValueError(f"the reward model's tokenizer does not know {strange[0]!r}, which the policy's chat template "
                         "writes, and would read it as plain text; train a reward model with the policy's tokenizer, "
                         "or give a function as the reward that renders the messages with that model's own template")
    if getattr(other, "chat_template", None) not in (None, tokenizer.chat_template):
        warnings.warn("the reward model has another chat template than the policy, whose conversations it will read as "
                      "the policy's template writes them", stacklevel=3)


def check_reward_ids(rollout: Rollout, tokenizer, reward, prompts: Sequence[str], responses: Sequence[str]) -> None:
    """Check that, for each response, a reward model reads the same ids as the policy sampled, plus one end token.

    Nothing is checked for a reward without a tokenizer or with another vocabulary. If a policy samples an unusual
    tokenisation, the reward model reads the tokenisation of the text, as in training; a conversation that it renders
    with its own template is read as that template writes it. Raises InvariantError that shows both.
    """
    if not hasattr(reward, "ids") or not same_vocabulary(tokenizer, reward.tokenizer):
        return
    mask, finished = rollout.response_mask.bool(), rollout.finished.tolist()
    written = [row[kept].tolist() for row, kept in zip(rollout.response_ids, mask, strict=True)]
    written = [tuple(row[:-1] if ended else row) for row, ended in zip(written, finished, strict=True)]
    plain = [tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False) for row in written]
    encoded = [encode_pairs(tokenizer, prompts, texts)[0] for texts in (plain, [f" {text}" for text in plain])]
    usual = [{tuple(ids) for _, ids in pair} for pair in zip(*encoded, strict=True)]
    heads, ends = encode_texts(reward.tokenizer, list(prompts)), end_ids(reward.tokenizer)
    for number, (head, row, read) in enumerate(zip(heads, written, reward.ids(prompts, responses), strict=True)):
        if written_by_another(reward.tokenizer, prompts[number]):
            continue
        end = end_after(reward.tokenizer, prompts[number])
        answer = tuple(read[len(head) : -1])
        if (read[: len(head)] != head or read[-1] != end or not set(ends).isdisjoint(answer)
                or (row in usual[number] and answer != row)):
            raise InvariantError(f"step 0: the reward model reads other tokens than the policy wrote in response "
                                 f"{number}: {tokenizer.decode(read)!r}, expected "
                                 f"{tokenizer.decode([*head, *row, end])!r}")


def check_room(policy, tokenizer, prompts: Sequence[str], max_new_tokens: int) -> None:
    """Raise ValueError if a prompt (text) and a response of max_new_tokens do not fit the policy's context."""
    if context_length(policy) is not None:
        lengths = torch.tensor(list(map(len, encode_texts(tokenizer, list(dict.fromkeys(prompts))))))
        check_lengths(policy, lengths + max_new_tokens)


def check_lengths(policy, lengths: Tensor) -> None:
    """Raise ValueError if one of these numbers of tokens (N,), prompt plus response, exceeds the context."""
    limit, longest = context_length(policy), int(lengths.max())
    if limit is not None and longest > limit:
        raise ValueError(f"{int((lengths > limit).sum())} of {len(lengths)} prompts do not fit with their response in "
                         f"the model's context of {limit} tokens (the longest needs {longest}); shorten them "
                         f"(file_task does, with max_length={limit})")


def _a_number(value) -> bool:
    try:
        float(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return not isinstance(value, str | bytes)


def _named(value) -> str:
    return "None" if value is None else f"{str(value)[:40]!r} ({type(value).__name__})"
