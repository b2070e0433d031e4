"""Convert texts and preference pairs to token ids and back. A response's ids do not depend on how its prompt ends."""

import weakref
from collections.abc import Sequence


class ChatText(str):
    """Text rendered by a chat template: its special tokens are real, and the template decides about BOS.

    `encode_text` treats any other text as plain: a string like "</s>" stays text.
    messages: the rendered messages, if known; template: the chat template that rendered them. A model of another family
    renders the messages with its own template (`data.own_template`).
    """

    __slots__ = ("messages", "template")

    def __new__(cls, text: str, messages: list[dict] | None = None, template: str | None = None):
        made = super().__new__(cls, text)
        made.messages, made.template = messages, template
        return made


def encode_text(tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a text written by people or models: strings like "</s>" stay text, BOS is added once, EOS never.

    In a `ChatText` the special tokens are real and nothing is added, because the template writes BOS if the model needs
    it.
    """
    return encode_texts(tokenizer, [text], add_special_tokens)[0]


def encode_texts(tokenizer, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
    """The same as `encode_text` of each text, but faster."""
    rows: list[list[int]] = [[] for _ in texts]
    for chat in (False, True):
        places = [place for place, text in enumerate(texts) if isinstance(text, ChatText) == chat]
        if places:
            once = list(dict.fromkeys(str(texts[place]) for place in places))  # prompts come many times
            encoded = tokenizer(once, split_special_tokens=not chat, return_attention_mask=False, verbose=False,
                              add_special_tokens=add_special_tokens and not chat)["input_ids"]
            end = tokenizer.eos_token_id if add_special_tokens and not chat else None  # slow to ask for
            ids_of = {text: ids[:-1] if len(ids) > 1 and ids[-1] == end else ids
                     for text, ids in zip(once, encoded, strict=True)}
            for place in places:
                rows[place] = ids_of[str(texts[place])][:]
    return rows


def encode_pair(tokenizer, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """Token ids (prompt_ids, response_ids) of a prompt and its response: BOS as the tokenizer adds it, no EOS.

    The pair is tokenised as one text if that text's ids begin with the prompt's ids. Otherwise (a token would span the
    border) the response is tokenised separately, because a policy continues from the prompt's ids. The prompt's ids do
    not depend on the response.
    """
    return encode_pairs(tokenizer, [prompt], [response])[0][0]


def encode_pairs(tokenizer, prompts: list[str], responses: list[str]) -> tuple[list[tuple[list[int], list[int]]], int]:
    """Apply `encode_pair` to each prompt and response; also return how many responses were tokenised separately."""
    heads = encode_texts(tokenizer, prompts)
    joints = encode_texts(tokenizer, [type(prompt)(prompt + response)
                                      for prompt, response in zip(prompts, responses, strict=True)])
    chats = [isinstance(prompt, ChatText) for prompt in prompts]
    special = special_ids(tokenizer) if any(chats) else set()
    pairs, apart = [], 0
    for head, joint, response, chat in zip(heads, joints, responses, chats, strict=True):
        whole = joint[:len(head)] == head
        if chat != isinstance(response, ChatText):  # special tokens are text in a response, real in a template
            whole = whole and chat and special.isdisjoint(joint[len(head):])
        apart += not whole
        pairs.append((head, joint[len(head):] if whole else _encode_alone(tokenizer, response)))
    return pairs, apart


def _encode_alone(tokenizer, response: str) -> list[int]:
    """Ids of a response as it reads after other text: some tokenizers put a space before the first word of a text."""
    for anchor in (".", "\n", "x"):
        front = encode_text(tokenizer, anchor, add_special_tokens=False)
        both = encode_text(tokenizer, type(response)(anchor + response), add_special_tokens=False)
        if front and both[:len(front)] == front:
            return both[len(front):]
    return encode_text(tokenizer, response, add_special_tokens=False)


def decode_reply(tokenizer, before: int, ids: Sequence[int]) -> str:
    """Decode a reply's ids without special tokens, so that the text, appended to the prompt's text, encodes to these
    ids.

    before: the last id of the prompt. Some tokenizers drop the space before the first decoded token, which would join
    the reply to its prompt. The reply is therefore decoded after `before` and keeps the space, unless the tokenizer
    adds one itself.
    """
    ids = list(ids)
    alone = _decoded(tokenizer, ids)
    if before not in special_ids(tokenizer):
        front, both = _decoded(tokenizer, [before]), _decoded(tokenizer, [before, *ids])
        return both[len(front):] if both.startswith(front) else alone
    if before == tokenizer.bos_token_id:
        return alone
    anchor = encode_text(tokenizer, "x", add_special_tokens=False)[-1:]
    front, both = _decoded(tokenizer, anchor), _decoded(tokenizer, [*anchor, *ids])
    spaced = both[len(front):] if both.startswith(front) else alone
    return alone if spaced == alone or _puts_space(tokenizer, before, anchor) else spaced


def special_ids(tokenizer) -> set[int]:
    """The ids of all special tokens, including those without a named role such as EOS."""
    key = len(tokenizer), tuple(tokenizer.all_special_ids)
    if tokenizer not in _special or _special[tokenizer][0] != key:
        added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        _special[tokenizer] = key, added | set(tokenizer.all_special_ids)
    return _special[tokenizer][1]


_special: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _decoded(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _puts_space(tokenizer, before: int, anchor: list[int]) -> bool:
    """Whether the tokenizer adds a space before text that follows this special token."""
    text = ChatText(tokenizer.convert_ids_to_tokens(before) + "x")
    behind = encode_text(tokenizer, text, add_special_tokens=False)[1:]
    return _decoded(tokenizer, [*anchor, *behind])[len(_decoded(tokenizer, anchor)):].startswith(" ")
