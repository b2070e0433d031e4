"""Between a policy and its reward: what a reward can read, the ids that it reads, and what it may return."""

import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from alignkit.data.encoding import ChatText, decode_reply, encode_texts, special_ids
from alignkit.data.ends import end_after
from alignkit.errors import InvariantError
from alignkit.forward.rollout import Rollout
from alignkit.models.fitness import context_length
from alignkit.models.loading import same_vocabulary


def as_scores(returned, number: int) -> Tensor:
    """What a reward returned as scores (number,), float32. Raises ValueError, saying what came, on anything else."""
    expected = f"expected {number} numbers, one score a response"
    values = returned
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Tensor | Iterable | int | float):
        raise ValueError(f"reward returned {_named(returned)}, {expected}")
    try:
        if not isinstance(values, Tensor | Sequence | int | float) and getattr(values, "dtype", object) == object:
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
    """Check that a reward model understands conversations that the policy's chat template wrote (`ChatText`).

    Raises ValueError if its tokenizer does not know a special token in them, which it would read letter by letter.
    Warns if it knows them all and yet has a template of its own that differs.
    """
    other = getattr(reward, "tokenizer", None)
    chats = [prompt for prompt in prompts if isinstance(prompt, ChatText)]
    if other is None or other is tokenizer or not chats:
        return
    known = {other.convert_ids_to_tokens(number) for number in special_ids(other)}
    tokens = [tokenizer.convert_ids_to_tokens(number) for number in sorted(special_ids(tokenizer))]
    strange = [token for token in tokens if token not in known and any(token in prompt for prompt in chats[:100])]
    if strange:
        raise ValueError(f"the reward model's tokenizer does not know {strange[0]!r}, which the policy's chat template "
                         "writes, and would read it as plain text; train a reward model with the policy's tokenizer, or "
                         "give a function as the reward that renders the messages with the reward model's own template")
    if getattr(other, "chat_template", None) not in (None, tokenizer.chat_template):
        warnings.warn("the reward model has another chat template than the policy, whose conversations it will read as "
                      "the policy's template writes them", stacklevel=3)


def check_reward_ids(rollout: Rollout, tokenizer, reward, prompts: Sequence[str], responses: Sequence[str]) -> None:
    """Check that a reward model reads what the policy wrote: the same prompt, the same words, and one end behind them.

    Nothing is checked of a reward that has no tokenizer or one of another vocabulary. What a policy writes in unusual
    pieces may be read in the usual ones, as in training. Raises InvariantError that shows both.
    """
    if not hasattr(reward, "ids") or not same_vocabulary(tokenizer, reward.tokenizer):
        return
    special, own = special_ids(tokenizer), reward.tokenizer is tokenizer
    columns = (rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.response_mask, rollout.finished)
    rows = zip(*(column.tolist() for column in columns), reward.ids(prompts, responses), prompts, strict=True)
    for number, (prompt_ids, prompt_mask, ids, mask, finished, read, prompt) in enumerate(rows):
        head = [token for token, there in zip(prompt_ids, prompt_mask, strict=True) if there]
        said = [token for token, there in zip(ids, mask, strict=True) if there][: -1 if finished else None]
        if not special.isdisjoint(said):
            continue  # it can be read as text alone
        asked = len(head) if own else len(read) - len(said) - 1
        answer = read[asked:-1]
        text, seen = (decode_reply(tokenizer, head[-1], part) for part in (said, answer))
        if (own and read[:asked] != head) or read[-1] != end_after(reward.tokenizer, prompt) or (
                answer != said and text != seen and "\ufffd" not in text):
            raise InvariantError(f"step 0: the reward model reads other tokens than the policy wrote in response "
                                 f"{number}: {tokenizer.decode(read)!r}, expected "
                                 f"{tokenizer.decode([*head, *said])!r} and one end of a reply")


def check_room(policy, tokenizer, prompts: Sequence[str], max_new_tokens: int) -> None:
    """Raise ValueError if a prompt (text) and a response of max_new_tokens do not fit the policy's context."""
    if context_length(policy) is not None:
        lengths = torch.tensor(list(map(len, encode_texts(tokenizer, list(dict.fromkeys(prompts))))))
        check_lengths(policy, lengths + max_new_tokens)


def check_lengths(policy, lengths: Tensor) -> None:
    """Raise ValueError if one of these numbers of tokens (N,), of prompt and response, is more than the context."""
    limit, longest = context_length(policy), int(lengths.max())
    if limit is not None and longest > limit:
        raise ValueError(f"{int((lengths > limit).sum())} of {len(lengths)} prompts do not fit with their response in "
                         f"the model's context of {limit} tokens (the longest needs {longest}); shorten them (file_task "
                         f"does, with max_length={limit})")


def _a_number(value) -> bool:
    try:
        float(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return not isinstance(value, str | bytes)


def _named(value) -> str:
    return "None" if value is None else f"{str(value)[:40]!r} ({type(value).__name__})"
