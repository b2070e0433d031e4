"""Truncate prompts and replies to the model's context, at token boundaries."""

from alignkit.data.encoding import ChatText, encode_pair, encode_pairs, encode_text, encode_texts
from alignkit.data.fields import REPLIES
from alignkit.data.problems import Rows
from alignkit.errors import DataError


def fit_rows(rows: Rows, tokenizer, limit: int, max_new_tokens: int) -> tuple[list[dict], tuple[str, ...]]:
    """The rows, truncated so that prompt, response and EOS fit in `limit` tokens, and notes on the truncations."""
    shortened, tokens, unknown, room_for_prompt = {}, 0, 0, prompt_room(limit, max_new_tokens)
    unique = list(dict.fromkeys(row["prompt"] for row in rows))
    for prompt, ids in zip(unique, encode_texts(tokenizer, unique), strict=True):
        tokens, unknown = tokens + len(ids), unknown + ids.count(tokenizer.unk_token_id)
        fits = len(ids) <= room_for_prompt
        shortened[prompt] = prompt if fits else _end_of(tokenizer, prompt, room_for_prompt)
    prompts = [shortened[row["prompt"]] for row in rows]
    columns = {"prompt": prompts}
    replies = [name for name in rows[0] if name in REPLIES]
    for name in replies:
        columns[name] = [row[name] for row in rows]
        pairs, _ = encode_pairs(tokenizer, prompts, columns[name])
        for index, (head, ids) in enumerate(pairs):
            if len(head) + len(ids) >= limit:
                room = limit - len(head) - 1
                columns[name][index] = _start_of(tokenizer, prompts[index], columns[name][index], room)
    fitted = [{**row, **dict(zip(columns, texts, strict=True))}
              for row, texts in zip(rows, zip(*columns.values(), strict=True), strict=True)]
    cut_prompts = sum(new["prompt"] != row["prompt"] for new, row in zip(fitted, rows, strict=True))
    cut_responses = sum(any(new[name] != row[name] for name in replies)
                        for new, row in zip(fitted, rows, strict=True))
    if rows.kind == "pairs":
        fitted = [row for row in fitted if row["chosen"].strip() != row["rejected"].strip()]
    dropped = len(rows) - len(fitted)
    notes = [*([f"{rows.skipped:,} bad rows left out"] if rows.skipped else []), *rows.warnings]
    notes += [f"{count:,} of {len(rows):,} rows: {what}" for count, what in (
        (cut_prompts, f"the prompt was longer than {room_for_prompt:,} tokens and lost its beginning"),
        (cut_responses, f"prompt and response were longer than {limit:,} tokens and the response lost its end"),
        (dropped, "left out, chosen and rejected are equal in what is left of them")) if count]
    if unknown > 0.1 * tokens:
        notes.append(f"the tokenizer does not know {unknown / tokens:.0%} of the prompts' tokens: is the model right?")
    return fitted, tuple(notes)


def prompt_room(limit: int, max_new_tokens: int) -> int:
    """The tokens of a prompt that leave room for a response of max_new_tokens and for its end, which is scored with
    it."""
    return limit - max_new_tokens - 1


def fit_prompt(tokenizer, prompt: str, limit: int) -> str:
    """A prompt truncated as in `fit_rows`: its last `limit` tokens, if it has more."""
    return prompt if len(encode_text(tokenizer, prompt)) <= limit else _end_of(tokenizer, prompt, limit)


def _offsets(tokenizer, text: str) -> list[tuple[int, int]]:
    if not tokenizer.is_fast:
        raise DataError("a text is too long, and only a fast tokenizer can cut it; raise max_length or cut the data")
    return tokenizer(str(text), add_special_tokens=False, split_special_tokens=not isinstance(text, ChatText),
                     return_offsets_mapping=True, verbose=False)["offset_mapping"]


def _end_of(tokenizer, prompt: str, limit: int) -> str:
    """The last tokens of a prompt, at most `limit` including BOS. A rendered conversation keeps its BOS."""
    offsets = _offsets(tokenizer, prompt)
    bos = tokenizer.bos_token or ""
    front = bos if isinstance(prompt, ChatText) and prompt.startswith(bos) else ""
    chat = (prompt.messages, prompt.template) if isinstance(prompt, ChatText) else ()
    for kept in range(min(limit, len(offsets)), 0, -1):
        piece = type(prompt)(front + prompt[offsets[-kept][0]:], *chat)
        if len(encode_text(tokenizer, piece)) <= limit:
            return piece
    raise DataError(f"no end of the prompt {prompt[:40]!r} fits in {limit} tokens")


def _start_of(tokenizer, prompt: str, response: str, limit: int) -> str:
    """The first tokens of a response, at most `limit` after its prompt."""
    offsets = _offsets(tokenizer, response)
    for kept in range(min(limit, len(offsets)), 0, -1):
        piece = type(response)(response[: offsets[kept - 1][1]])
        if len(encode_pair(tokenizer, prompt, piece)[1]) <= limit:
            return piece
    return type(response)("")
