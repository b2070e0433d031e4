"""The fields of one row: detect the form, find errors, and convert chat messages to text."""

import ast
import contextlib
import itertools
import json
import os
import re

from alignkit.data.chat import REASONING, template_text
from alignkit.data.encoding import ChatText
from alignkit.data.ends import without_end
from alignkit.data.files import LINE_LIMIT, Fault
from alignkit.data.layouts import is_empty

REPLIES = ("chosen", "rejected", "completion")
LONGEST_PYTHON = 2**20  # characters of a list of messages in Python's notation
NO_PROMPT = "chosen and rejected do not begin with the same prompt; give the prompt in a column of its own"
OPENING = 200  # characters at the end of a rendered prompt that may contain the start of a reply
_ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "chatbot": "assistant",
          "model": "assistant", "developer": "system", "user": "user", "assistant": "assistant", "system": "system"}
_TOOL_ROLES = ("function_call", "observation", "function_response")  # of LLaMA-Factory, and of Hermes
_KEY = re.compile(r"""["'](role|from|messages|conversations)["']\s*:""")
_MESSAGES = re.compile(r"""[\[{]\s*\{?\s*["'](role|from|content|value|messages|conversations)["']\s*:""")

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
        role = _check_text(message["role"], f"{field}: role of message {number}")
        if role in _TOOL_ROLES:
            raise Fault(f"is {role!r}: calls of tools are not read (left out on purpose)",
                        f"{field}: role of message {number}")
        if kinds := _other_parts(message["content"]):
            raise Fault(f"is a list with {kinds}, expected text alone: nothing else is read",
                        f"{field}: content of message {number}")
        _check_text(message["content"], f"{field}: content of message {number}")
    return value


def _other_parts(content: object) -> str:
    """The types of the non-text parts of a message, such as "image_url"; "" if there are none."""
    parts = content if isinstance(content, list) else []
    return ", ".join(dict.fromkeys(repr(part["type"])[:40] for part in parts
                                   if isinstance(part, dict) and part.get("type", "text") != "text"))


def as_messages(value: object, field: str, tags: dict[str, str] | None = None) -> object:
    """A list of {role, content}, if a value is one in any notation; other values are returned unchanged.

    Notations: with from and value, with human and gpt, as one message, as {"messages": …}, as the JSON or Python text
    of any of these, or with other keys and roles that `tags` maps to role, content, user, assistant, system. Empty
    system messages are dropped. Raises Fault for text that looks like messages but cannot be read.
    """
    if isinstance(value, str):
        written = _written(value, field)
        return value if written is None else as_messages(written, field, tags)
    if isinstance(value, dict):
        inner = next((value[name] for name in ("messages", "conversations") if isinstance(value.get(name), list)), None)
        if inner is not None:
            return as_messages(inner, field, tags)
        alone = _keys({(tags or {}).get(name, name): None for name in value})
        return as_messages([value], field, tags) if alone else value
    if not _is_chat(value):
        return value
    messages = [_message(message, tags or {}) for message in value]
    return [message for message in messages
            if message.get("role") != "system" or not _says_nothing(message.get("content"))]


def _says_nothing(content: object) -> bool:
    return content is None or (isinstance(content, str) and not content.strip())


def _keys(message: dict) -> tuple[str, str] | None:
    """The keys of a message's role and content."""
    return next((pair for pair in (("role", "content"), ("from", "value")) if set(pair) <= message.keys()), None)


def _message(message: dict, tags: dict[str, str]) -> dict:
    message = {tags.get(name, name): value for name, value in message.items()}
    keys = _keys(message)
    if not keys:
        return message
    role, content = message[keys[0]], message[keys[1]]
    if isinstance(role, str):
        role = tags.get(role) or _ROLES.get(role.lower(), role)
    if isinstance(content, list) and content and all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in content):
        content = "".join(part["text"] for part in content)
    rest = {name: value for name, value in message.items() if name not in keys and value is not None}
    return {"role": role, "content": content, **rest}


def _written(text: str, field: str) -> list | dict | None:
    """The messages in a text, read as JSON or as Python; None if it is ordinary text."""
    start = text.lstrip()[:200]
    if start[:2] in ('"[', '"{'):  # JSON in JSON
        with contextlib.suppress(ValueError, RecursionError):
            inner = json.loads(text)
            return _written(inner, field) if isinstance(inner, str) else None
    if start[:1] not in ("[", "{") or not _KEY.search(text):
        return None
    value: object = None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            value = ast.literal_eval(text.strip()) if len(text) < LONGEST_PYTHON else None
    if value is None and _MESSAGES.match(start) and (start[0] == "[" or text.rstrip().endswith("}")):
        raise Fault("looks like messages that were saved as text, and is neither JSON nor Python; save them as a list "
                    "of {role, content}", field)
    items = value if isinstance(value, list) else [value]
    if items and all(isinstance(item, dict) and (_keys(item) or {"messages", "conversations"} & item.keys())
                     for item in items):
        return value
    return None


def _same(one: list[dict], other: list[dict]) -> bool:
    """Whether messages are equal in role, content and tool data; other keys are ignored."""
    return list(map(_said_by, one)) == list(map(_said_by, other))


def _said_by(message: dict) -> tuple:
    more = ((name, message.get(name)) for name in ("tool_calls", "tool_call_id", "name", *REASONING))
    return (message["role"], message["content"].strip() if isinstance(message["content"], str) else None,
            *((name, str(value)) for name, value in more if value))


def _is_chat(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def without_prompt(prompt: str | list, replies: list) -> list[str]:
    """Replies that all begin with the whole prompt, with the prompt removed; [] if they do not, or are messages."""
    texts = isinstance(prompt, str) and bool(prompt.strip()) and bool(replies)
    return [reply[len(prompt):] for reply in replies] if texts and all(
        reply.startswith(prompt) for reply in replies) else []


def is_untrained(reply: str | dict) -> bool:
    """Whether a message is marked as not to be trained on: OpenAI's weight of 0, axolotl's train or training."""
    return isinstance(reply, dict) and (reply.get("weight") == 0 or reply.get("train", True) is False
                                        or reply.get("training", True) is False)


def _split_texts(texts: dict[str, str]) -> tuple[str, list[str]]:
    """Prompt and responses of a row of text fields; the prompt of whole dialogues is their common beginning."""
    if "text" in texts:  # one text: a dialogue is split before its last reply
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
        raise Fault(NO_PROMPT)
    return chosen[:cut], [chosen[cut:], rejected[cut:]]


def messages_before(system: object, history: object) -> list[dict]:
    """The messages of a system prompt and of a history (pairs of question and answer, or messages)."""
    before = []
    if not is_empty(system):
        system = as_messages(system, "system")
        if isinstance(system, list) and _is_chat(system):
            before += _check_messages(system, "system")
        else:
            before.append({"role": "system", "content": _check_text(system, "system")})
    if not is_empty(history):
        history = as_messages(history, "history")
        if not isinstance(history, list):
            raise Fault(f"is {_came(history)}, expected a list of [question, answer] or of messages", "history")
        if _is_chat(history):
            return before + _check_messages(history, "history")
        for turn in history:
            if not isinstance(turn, (list, tuple)) or len(turn) != 2:
                raise Fault("expected a list of [question, answer] or of messages", "history")
            before += [{"role": role, "content": _check_text(text, "history")}
                       for role, text in zip(("user", "assistant"), turn, strict=True)]
    return before


def _split_chat(values: dict[str, object], before: list[dict]) -> tuple[list[dict], list[dict]]:
    """Prompt messages and one reply message for each response field of a conversational row.

    values: texts or messages; before: a system prompt and a history from separate columns.
    """
    chats = {name: _as_chat(name, value, values) for name, value in values.items()}
    prompt, messages = chats.pop("prompt", None), chats.pop("messages", None)
    if messages is not None and not chats:
        chats["messages"] = messages
    elif messages is not None and prompt is None:  # they are the prompt, or prompt and chosen reply
        chosen = chats["chosen"]
        if not _same(messages, chosen):
            prompt = messages[:-1] if len(chosen) == 1 and _same(messages[-1:], chosen) else messages
    shared = _shared(list(chats.values()))
    if prompt is None:
        prompt = shared
        if len(chats) == 2 and all(len(prompt) == len(chat) for chat in chats.values()):
            raise Fault("is identical to chosen", "rejected")
    rests = [chat[len(prompt):] if _same(chat[:len(prompt)], prompt) else chat for chat in chats.values()]
    if not all(map(_is_reply, rests)) and _is_part(prompt, shared):  # it repeats some of what they share
        prompt, rests = shared, [chat[len(shared):] for chat in chats.values()]
    elif not all(map(_is_reply, rests)) and shared and _same(prompt[-len(shared):], shared):  # they repeat its end
        rests = [chat[len(shared):] for chat in chats.values()]
    prompt = _with(before, prompt)
    if [message["role"] for rest in rests for message in rest] == ["user"] and "messages" in chats:
        raise Fault("ends with a user's message, expected the assistant's reply after it", "messages")
    if not prompt or prompt[-1]["role"] == "assistant":
        raise Fault("the prompt, the messages before the reply, is empty or ends with an assistant message")
    for name, rest in zip(chats, rests, strict=True):
        if not _is_reply(rest):
            roles = ", ".join(str(message["role"]) for message in rest) or "nothing"
            hint = ("; if the conversation holds its prompt, leave that column out: --columns prompt="
                    if "prompt" in values else "")
            raise Fault(f"expected one assistant message after the prompt, came {roles}{hint}", name)
    return prompt, [rest[0] for rest in rests]


def _as_chat(name: str, value: object, values: dict[str, object]) -> list[dict]:
    if _is_chat(value):
        return _check_messages(value, name)
    alone = name in ("prompt", "messages") or not any(_is_chat(values.get(other)) for other in REPLIES)
    if alone and isinstance(value, str) and (name == "prompt" or "prompt" in values or "messages" in values):
        return [{"role": "user" if name == "prompt" else "assistant", "content": _check_text(value, name)}]
    if name not in ("prompt", "messages") and alone:
        raise Fault("a system prompt or a history needs the prompt in a column of its own (--columns prompt=…)", name)
    raise Fault(f"is {_came(value)}, expected a list of messages as in the other columns", name)


def _shared(chats: list[list[dict]]) -> list[dict]:
    """The messages at the start of all conversations; for a single conversation all but the last."""
    if not chats:
        return []
    if len(chats) == 1:
        return chats[0][:-1]
    pairs = zip(*chats, strict=False)
    return [one for one, _ in itertools.takewhile(lambda pair: _same(pair[:1], pair[1:]), pairs)]


def _is_reply(messages: list[dict]) -> bool:
    return len(messages) == 1 and messages[0]["role"] == "assistant"


def _is_part(part: list[dict], messages: list[dict]) -> bool:
    """Whether the messages of `part` occur among the messages, in this order."""
    rest = iter(map(_said_by, messages))
    return bool(part) and all(message in rest for message in map(_said_by, part))


def _with(before: list[dict], prompt: list[dict]) -> list[dict]:
    """The prompt after a system prompt and a history, unless it already contains them."""
    if not before or _is_part(before, prompt):
        return prompt
    if before[0]["role"] == "system" and prompt and prompt[0]["role"] == "system":
        if not _same(before[:1], prompt[:1]):
            raise Fault("is not what the system message of the conversation says; --columns system= leaves the column "
                        "out", "system")
        before = before[1:]
    if prompt and prompt[0]["role"] == "system":
        return [*prompt[:1], *before, *prompt[1:]]
    return [*before, *prompt]


def lost_in(message: dict, head: str, rendered: str) -> str:
    """What a chat template changed in a reply: "" nothing, or "ends" or "spaces"; Fault if a part of the reply is
    missing.

    head: the text of the prompt, whose end may contain the start of the reply, such as <think>; rendered: its text.
    """
    change = ""
    for name in ("content", *REASONING):
        part = message.get(name)
        if not isinstance(part, str) or not part.strip() or part in rendered:
            continue
        written = _squeezed(head[-OPENING:] + rendered)
        place = written.rfind(_squeezed(part))
        if place < 0 or place + len(_squeezed(part)) <= len(_squeezed(head[-OPENING:])):
            where = "" if name == "content" else f", its {name}"
            raise Fault(f"the chat template leaves out part of the reply{where}: {part.strip()[:60]!r} is not in what "
                        "it writes; use a template that keeps it (tokenizer.chat_template), or give the data as text")
        change = "ends" if part.strip() in rendered and change != "spaces" else "spaces"
    names = [str((call.get("function") or call).get("name")) for call in message.get("tool_calls") or ()
             if isinstance(call, dict)]
    if any(name not in rendered for name in names):
        raise Fault("the chat template leaves out the reply's tool_calls; use a template that writes them")
    return change


def left_out_of(prompt: list[dict], head: str) -> str:
    """The role of the system message or last message that a chat template drops (the first of them), "" if none."""
    return next((message["role"] for message in (*prompt[:1], *prompt[-1:])
                 if message["role"] in ("system", "user") and message["content"] not in head
                 and _squeezed(message["content"]) not in _squeezed(head)), "")


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _check_special(special: re.Pattern, messages: list[dict]) -> None:
    for number, message in enumerate(messages, 1):
        token = special.search(message["content"])
        if token:
            raise Fault(f"message {number} contains {token[0]!r}, which the chat template would make a real token")


def _rendered(tokenizer, prompt: list[dict], texts: list[str] | Fault) -> tuple[ChatText, list[ChatText]]:
    """Prompt and replies as a chat template wrote them, the replies without their ends."""
    if isinstance(texts, Fault):
        raise texts
    head, *endings = map(_check_rendered, texts)
    return (ChatText(head, prompt, template_text(tokenizer)),
            [ChatText(without_end(tokenizer, ending)) for ending in endings])


def _check_rendered(text: str) -> str:
    """A template can write text that messages may not contain: unchecked parts of the messages, and characters of its
    own."""
    if "\0" in text or re.search("[\ud800-\udfff]", text):
        raise Fault("the chat template writes a NUL character or half of a surrogate pair")
    return text


def _special_pattern(tokenizer) -> re.Pattern:
    tokens = {str(token) for token in tokenizer.all_special_tokens}
    tokens |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")
