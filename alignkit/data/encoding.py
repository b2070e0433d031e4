"""Texts and preference pairs as token ids; a response's ids do not depend on how its prompt ends."""


class ChatText(str):
    """Text that a chat template rendered: the special tokens in it are real, and BOS is the template's business.

    `encode_text` is the reader of the difference: in any other text a string like "</s>" stays text.
    """

    __slots__ = ()


def encode_text(tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a text that people or models wrote: strings like "</s>" in it stay text, BOS comes once, EOS never.

    In `ChatText` the special tokens are real and nothing is added: the template wrote BOS if there is to be one.
    """
    return encode_texts(tokenizer, [text], add_special_tokens)[0]


def encode_texts(tokenizer, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
    """`encode_text` of each text, faster."""
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
    """Token ids (prompt_ids, response_ids) of a prompt and its response: BOS as the tokenizer has it, no EOS.

    The ids are those of the joint text where that begins with the ids of the prompt. Where it does not (a token would
    span the border), the response is tokenised by itself, because a policy that is given the prompt continues from the
    prompt's ids. A prompt's ids do not depend on its response.
    """
    return encode_pairs(tokenizer, [prompt], [response])[0][0]


def encode_pairs(tokenizer, prompts: list[str], responses: list[str]) -> tuple[list[tuple[list[int], list[int]]], int]:
    """`encode_pair` of each prompt and response, and how many of them had to be tokenised apart."""
    heads = encode_texts(tokenizer, prompts)
    alike = [isinstance(prompt, ChatText) == isinstance(response, ChatText)
             for prompt, response in zip(prompts, responses, strict=True)]
    joints = encode_texts(tokenizer, [type(prompt)(prompt + response) if same else ""
                                      for prompt, response, same in zip(prompts, responses, alike, strict=True)])
    pairs, apart = [], 0
    for head, joint, response, same in zip(heads, joints, responses, alike, strict=True):
        whole = same and joint[:len(head)] == head
        apart += not whole
        pairs.append((head, joint[len(head):] if whole else _encode_alone(tokenizer, response)))
    return pairs, apart


def _encode_alone(tokenizer, response: str) -> list[int]:
    """Ids of a response as it reads after other text: some tokenizers put a space in front of whatever comes first."""
    for anchor in (".", "\n", "x"):
        front = encode_text(tokenizer, anchor, add_special_tokens=False)
        both = encode_text(tokenizer, type(response)(anchor + response), add_special_tokens=False)
        if front and both[:len(front)] == front:
            return both[len(front):]
    return encode_text(tokenizer, response, add_special_tokens=False)
