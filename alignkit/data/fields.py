"""The fields of one row: which form it has, what is wrong with it, and its chat messages as text."""

import itertools
import os
import re

from alignkit.data.encoding import ChatText
from alignkit.data.ends import without_end
from alignkit.data.files import LINE_LIMIT, Fault

_MARKS = {"pairs": {"chosen", "rejected"}, "demonstrations": {"completion", "messages", "text"}}  # they tell the kind
_FORMS = {  # kind -> the sets of columns that it can be read from
    "pairs": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "demonstrations": (("prompt", "completion"), ("messages",), ("text",)),
    "prompts": (("prompt",),),
}
_TURN = "\n\nAssistant:"  # where a reply begins in the dialogues of HH-RLHF (Bai et al. 2022)


# --- from a record to a row ------------------------------------------------------------------------------------------
def _came(value: object) -> str:
    names = {bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object", str: "text"}
    return "null" if value is None else names.get(type(value), f"of type {type(value).__name__}")


def _check_text(value: object, field: str, expected: str = "text") -> str:
    if not isinstance(value, str):
        raise Fault(f"is {_came(value)}, expected {expected}", field)
    if not value.strip():
        raise Fault("is empty" if not value else "is blank (only spaces)", field)
    if len(value) > LINE_LIMIT:
        raise Fault(f"is longer than {LINE_LIMIT:,} characters", field)
    if "\0" in value:
        raise Fault("contains a NUL character", field)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"{value[error.start]!a} at character {error.start + 1}"
        raise Fault(f"contains half of a surrogate pair, {half}", field) from None
    return value


def _check_messages(value: list, field: str) -> list[dict]:
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise Fault(f"message {number} is {_came(message)}, expected an object with role and content", field)
        _check_text(message["role"], f"{field}: role of message {number}")
        _check_text(message["content"], f"{field}: content of message {number}")
    return value


def _is_chat(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def _split_texts(texts: dict[str, str]) -> tuple[str, list[str]]:
    """Prompt and responses of a row of text fields; the prompt of whole dialogues is what they share."""
    if "text" in texts:  # one text: a dialogue is cut before its last reply
        cut = texts["text"].rfind(_TURN) + len(_TURN)
        return (texts["text"][:cut], [texts["text"][cut:]]) if cut >= len(_TURN) else ("", [texts["text"]])
    if "prompt" in texts:
        return texts["prompt"], [text for name, text in texts.items() if name != "prompt"]
    chosen, rejected = texts["chosen"], texts["rejected"]
    if chosen == rejected:
        raise Fault("is identical to chosen", "rejected")
    shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 - characters are what is meant
    if _TURN in chosen or _TURN in rejected:
        cut = shared.rfind(_TURN) + len(_TURN)
        cut = cut if cut >= len(_TURN) else 0
    else:
        cut = max((space.start() for space in re.finditer(r"\s+", shared)), default=0)
    if not shared[:cut].strip():
        raise Fault("chosen and rejected do not begin with the same prompt; give the prompt in a column of its own")
    return chosen[:cut], [chosen[cut:], rejected[cut:]]


def _split_chat(values: dict[str, object]) -> tuple[list[dict], list[dict]]:
    """Prompt messages and one reply message for each response field of a conversational row."""
    chats = {}
    for name, value in values.items():
        if not _is_chat(value) and name == "prompt":
            value = [{"role": "user", "content": _check_text(value, name)}]
        elif not _is_chat(value):
            raise Fault(f"is {_came(value)}, expected a list of messages as in the other columns", name)
        chats[name] = _check_messages(value, name)
    prompt = chats.pop("prompt", None)
    if prompt is None and "messages" in chats:
        prompt = chats["messages"][:-1]
    elif prompt is None:
        pairs = zip(chats["chosen"], chats["rejected"], strict=False)
        prompt = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
        if len(prompt) == len(chats["chosen"]) == len(chats["rejected"]):
            raise Fault("is identical to chosen", "rejected")
    if not prompt or prompt[-1]["role"] == "assistant":
        raise Fault("the prompt, the messages before the reply, is empty or ends with an assistant message")
    replies = []
    for name, chat in chats.items():
        rest = chat[len(prompt):] if chat[:len(prompt)] == prompt else chat
        if len(rest) != 1 or rest[0]["role"] != "assistant":
            roles = ", ".join(str(message["role"]) for message in rest) or "nothing"
            raise Fault(f"expected one assistant message after the prompt, came {roles}", name)
        replies.append(rest[0])
    return prompt, replies


def _check_special(special: re.Pattern, messages: list[dict]) -> None:
    for number, message in enumerate(messages, 1):
        token = special.search(message["content"])
        if token:
            raise Fault(f"message {number} contains {token[0]!r}, which the chat template would make a real token")


def _rendered(tokenizer, texts: list[str] | Fault) -> tuple[ChatText, list[ChatText]]:
    """Prompt and replies as a chat template wrote them, the replies without what ends them."""
    if isinstance(texts, Fault):
        raise texts
    head, *endings = map(_check_rendered, texts)
    return ChatText(head), [ChatText(without_end(tokenizer, ending)) for ending in endings]


def _check_rendered(text: str) -> str:
    """A template can write what its messages may not hold: parts of them that were not checked, and characters of its
    own."""
    if "\0" in text or re.search("[\ud800-\udfff]", text):
        raise Fault("the chat template writes a NUL character or half of a surrogate pair")
    return text


def _special_pattern(tokenizer) -> re.Pattern:
    tokens = {str(token) for token in tokenizer.all_special_tokens}
    tokens |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def _kinds(record: dict) -> tuple[str, ...]:
    """The kinds whose columns a record has; null columns count only where that leaves one kind."""
    for names in (record.keys(), {name for name, value in record.items() if value is not None}):
        kinds = tuple(kind for kind, marks in _MARKS.items() if names & marks)
        if len(kinds) <= 1:
            break
    return kinds or (("prompts",) if "prompt" in record else ())
