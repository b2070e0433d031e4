"""Prompts, demonstrations and preference pairs from files and Hub data sets: read row by row, every row validated.

A source is a local file (JSON lines, a JSON array, CSV or Parquet, each also gzipped), a folder written by
`datasets.save_to_disk`, or the id of a Hugging Face Hub data set. What comes out is plain text rows:

    pairs            {"prompt", "chosen", "rejected"}   from these, or from chosen and rejected that begin alike
    demonstrations   {"prompt", "completion"}           from these, or from messages, or from text (prompt is "" then)
    prompts          {"prompt"}

Conversations (lists of {role, content}) are rendered with the tokenizer's chat template and come out as `ChatText`.
A check of a gigabyte needs the memory of one row and of an eight-byte hash of each (`alignkit.files` reads in pieces).
Left out on purpose: already tokenised data, tool calls, images, and any code that comes with a data set.
"""

import collections
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from alignkit.files import LINE_LIMIT, DataError, Fault, records

PROBLEM_LIMIT = 100_000  # problems that are kept; the rest is counted
ROW_KINDS = ("pairs", "demonstrations", "prompts")

_MARKS = {"pairs": {"chosen", "rejected"}, "demonstrations": {"completion", "messages", "text"}}  # they tell the kind
_FORMS = {  # kind -> the sets of columns that it can be read from
    "pairs": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "demonstrations": (("prompt", "completion"), ("messages",), ("text",)),
    "prompts": (("prompt",),),
}
_TURN = "\n\nAssistant:"  # where a reply begins in the dialogues of HH-RLHF (Bai et al. 2022)


class ChatText(str):
    """Text that a chat template rendered: the special tokens in it are real, and BOS is the template's business.

    `encode_text` is the reader of the difference: in any other text a string like "</s>" stays text.
    """

    __slots__ = ()


@dataclass(frozen=True)
class Problem:
    """One reason why one row cannot be used. `line` counts from 1; it is a row's number where unit is "row"."""

    file: str
    line: int
    field: str
    reason: str
    unit: str = "line"

    def __str__(self) -> str:
        row = f"row {self.line}: " if self.unit == "row" else ""
        return f"{self.file}:{self.line}: {row}{self.field + ': ' if self.field else ''}{self.reason}"


class Rows(list):
    """A list of rows (dicts of text) with what was seen on the way.

    kind: "pairs", "demonstrations" or "prompts"; source: str; skipped: bad rows left out; problems: the reasons;
    warnings: sentences about good rows that deserve a look.
    """

    def __init__(self, rows: Iterable[dict], kind: str, source: str, skipped=0, problems=(), warnings=()):
        super().__init__(rows)
        self.kind, self.source, self.skipped = kind, source, skipped
        self.problems, self.warnings = tuple(problems), tuple(warnings)


@dataclass(frozen=True)
class Report:
    """What `check` found in a source.

    kind: "pairs" | "demonstrations" | "prompts", None when no row could be read; rows: rows seen; bad_rows: rows with
    a problem; problems: the reasons in file order (at most PROBLEM_LIMIT); warnings: sentences.
    """

    source: str
    kind: str | None
    rows: int
    bad_rows: int
    problems: tuple[Problem, ...]
    warnings: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """True when every row can be used and there is at least one."""
        return self.rows > 0 and self.bad_rows == 0

    def __str__(self) -> str:
        what = {"pairs": "preference pairs", None: "no readable rows"}.get(self.kind, self.kind)
        counts = f"{self.rows:,} row{'s' * (self.rows != 1)}, {self.rows - self.bad_rows:,} good, {self.bad_rows:,} bad"
        more = [f"... and more: only the first {PROBLEM_LIMIT:,} problems are listed"]
        return "\n".join([*map(str, self.problems), *(more if len(self.problems) >= PROBLEM_LIMIT else []),
                          *(f"{self.source}: warning: {warning}" for warning in self.warnings),
                          f"{self.source}: {what}: {counts}: {'ok' if self.ok else 'not ok'}"])


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


def _render(tokenizer, special: re.Pattern, prompt: list[dict], replies: list[dict]) -> tuple[ChatText, list[ChatText]]:
    """Prompt and replies as the tokenizer's chat template writes them, the replies without EOS."""
    for number, message in enumerate(prompt + replies, 1):
        found = special.search(message["content"])
        if found:
            raise Fault(f"message {number} contains {found[0]!r}, which the chat template would make a real token")
    try:
        head = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        texts = [tokenizer.apply_chat_template([*prompt, reply], tokenize=False) for reply in replies]
    except Exception as error:  # a template may raise anything
        raise Fault(f"the chat template refuses it: {type(error).__name__}: {error}") from None
    if not all(text.startswith(head) for text in texts):
        raise Fault("the chat template writes the prompt in another way when the reply follows: it cannot be cut off")
    endings = [text[len(head):].rstrip() for text in texts]
    eos = tokenizer.eos_token
    return ChatText(head), [ChatText(ending.removesuffix(eos) if eos else ending) for ending in endings]


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


class _Scan:
    """One pass over a source: iterate (row or None, problems); afterwards `warnings()` and the counts are there."""

    def __init__(self, source, kind: str | None, tokenizer, max_length: int | None, render: bool):
        if kind is not None and kind not in ROW_KINDS:
            raise ValueError(f"kind is {kind!r}, expected one of {', '.join(ROW_KINDS)}")
        if max_length is not None and tokenizer is None:
            raise ValueError(f"max_length is {max_length}, which is counted in tokens; give the tokenizer too")
        self.name, self.kind, self.tokenizer, self.max_length = str(source), kind, tokenizer, max_length
        self._render = render
        self.fields: tuple[str, ...] = ()
        self.rows = self.bad_rows = 0
        self._special = _special_pattern(tokenizer) if tokenizer is not None else None
        self._unit, self._records = records(source)
        self._seen: set[bytes] = set()
        self._noted: dict[str, list] = {}  # note -> [count, first lines]

    def __iter__(self) -> Iterator[tuple[dict | None, list[Problem]]]:
        try:
            head = list(self._head())
            self._detect([record for _, record in head if isinstance(record, dict)])
            for line, record in itertools.chain(head, self._records):
                self.rows += 1
                row, faults = self._convert(line, record)
                self.bad_rows += bool(faults)
                yield row, [Problem(self.name, line, fault.field, fault.reason, self._unit) for fault in faults]
        except Fault as fault:  # of the whole source
            raise DataError(f"{self.name}: {fault.reason}") from fault.__cause__
        except OSError as error:
            raise DataError(f"{self.name}: cannot be read: {error}") from error
        if self.rows == 0:
            yield None, [Problem(self.name, 1, "", "there are no rows in it; the file is empty")]

    def warnings(self) -> tuple[str, ...]:
        """Sentences about what is allowed and yet deserves a look, with counts and the first places."""
        return tuple(f"{note}: {count:,} time{'s' * (count > 1)}, first at {self._unit} {', '.join(map(str, lines))}"
                     for note, (count, lines) in self._noted.items())

    def _note(self, note: str, line: int) -> None:
        if note not in self._noted and len(self._noted) >= 50:
            note = "there is more to say, which is not listed"
        entry = self._noted.setdefault(note, [0, []])
        entry[0] += 1
        if len(entry[1]) < 5:
            entry[1].append(line)

    def _head(self) -> Iterator[tuple[int, object]]:
        objects = 0
        for line, record in itertools.islice(self._records, 1000):
            yield line, record
            objects += isinstance(record, dict)
            if objects == 20:
                return

    def _detect(self, head: list[dict]) -> None:
        """Decide kind and columns by the majority of the first rows."""
        if not head:
            return
        filled = {name for record in head for name, value in record.items() if value is not None}
        if self.kind is None:
            votes = collections.Counter(filter(None, map(_kinds, head))).most_common(1)
            names = ", ".join(sorted(map(repr, set().union(*head))))[:1000]
            if not votes:
                raise Fault(f"the columns are {names}; expected prompt, chosen, rejected (preference pairs); prompt, "
                            "completion, or messages, or text (demonstrations); or prompt alone")
            (kinds, _), = votes
            if len(kinds) > 1:
                raise Fault(f"the columns are {names}, which is mixed: preference pairs (chosen, rejected) and "
                            "demonstrations (completion, messages, text); say which, kind='pairs' or 'demonstrations'")
            self.kind = kinds[0]
        # a table has every column in every row, so there a column of nulls is no column
        there = [record.keys() & filled if self._unit == "row" else record.keys() for record in head]
        share = {form: sum(len(names & set(form)) for names in there) / len(form) for form in _FORMS[self.kind]}
        self.fields = max(share, key=share.get)

    def _convert(self, line: int, record: object) -> tuple[dict | None, list[Fault]]:
        """The row that a record gives, or the reasons why it gives none."""
        if isinstance(record, Fault):
            return None, [record]
        if not isinstance(record, dict):
            expected = f"an object with {', '.join(self.fields)}" if self.fields else "an object"
            return None, [Fault(f"is {_came(record)}, expected {expected}")]
        for name in sorted(record.keys() - set(self.fields)):
            if name == "prompt" and self.kind == "pairs" and record[name] is not None:
                return None, [Fault("this row has a prompt, others have none", name)]
            self._note(f"the column {name!r} is not used", line)
        values = {name: record[name] for name in self.fields if name in record}
        faults = [Fault("is missing", name) for name in self.fields if name not in record]
        faults += [Fault("is null, expected text", name) for name, value in values.items() if value is None]
        chat = any(_is_chat(value) for value in values.values())
        if not chat:
            for name, value in values.items():
                try:
                    if value is not None:
                        _check_text(value, name, "text, or a list of {role, content} messages")
                except Fault as fault:
                    faults.append(fault)
        if faults:
            return None, faults
        try:
            return self._finish(line, *(self._chat(values) if chat else _split_texts(values))), []
        except Fault as fault:
            return None, [fault]

    def _chat(self, values: dict) -> tuple[str, list[str]]:
        prompt, replies = _split_chat(values)
        if self.tokenizer is None and self._render:
            raise DataError(f"{self.name}: the rows are conversations; give tokenizer=, whose template renders them")
        if self.tokenizer is None:
            return json.dumps(prompt, default=str), [reply["content"] for reply in replies]
        if not self.tokenizer.chat_template:
            raise DataError(f"{self.name}: the rows are conversations, and the tokenizer has no chat template; set "
                            "tokenizer.chat_template, use a chat model, or give prompt, chosen and rejected as text")
        return _render(self.tokenizer, self._special, prompt, replies)

    def _finish(self, line: int, prompt: str, responses: list[str]) -> dict:
        """The row, after the checks that need prompt and responses apart."""
        names = {"pairs": ("chosen", "rejected"), "demonstrations": ("completion",), "prompts": ()}[self.kind]
        blank = [name for name, response in zip(names, responses, strict=True) if not response.strip()]
        if self.kind == "pairs" and responses[0].strip() == responses[1].strip():
            raise Fault("is identical to chosen" + " but for spaces" * (responses[0] != responses[1]), "rejected")
        if blank and self.kind == "demonstrations":
            raise Fault("the reply is blank", self.fields[-1])
        if blank:
            self._note(f"{blank[0]} is a blank reply (kept: it stands for saying nothing)", line)
        elif self.kind == "pairs" and responses[1].startswith(responses[0]):
            self._note("chosen is the beginning of rejected", line)
        if self._special is not None and not isinstance(prompt, ChatText):
            found = next(filter(None, map(self._special.search, (prompt, *responses))), None)
            if found:
                self._note(f"the text contains {found[0]!r}, a special token of the tokenizer (it stays text)", line)
        if self.max_length is not None:
            length = len(encode_text(self.tokenizer, prompt))
            if length > self.max_length:
                raise Fault(f"the prompt has {length:,} tokens, the context is {self.max_length:,}", "prompt")
        key = hashlib.blake2b("\0".join((prompt, *responses)).encode(), digest_size=8).digest()
        if key in self._seen:
            self._note("the row repeats an earlier one", line)
        self._seen.add(key)
        return {"prompt": prompt, **dict(zip(names, responses, strict=True))}


# --- the public functions --------------------------------------------------------------------------------------------


def load_rows(source: str | os.PathLike, kind: str | None = None, *, tokenizer=None, max_length: int | None = None,
              skip_bad: bool = False) -> Rows:
    """Rows of text from a file, a saved data set or a Hub id, every one of them valid.

    kind: "pairs", "demonstrations" or "prompts"; None means what the columns say. tokenizer: renders conversations, and
    with max_length (tokens) refuses longer prompts. skip_bad: leave bad rows out and count them in `.skipped`.
    Raises DataError with the first ten reasons, FILE:LINE each, if rows are bad and skip_bad is False, or none is good.

    >>> load_rows("pairs.jsonl")[0]                                                          # doctest: +SKIP
    {'prompt': 'How do I …', 'chosen': ' Happy to help!', 'rejected': ' No.'}
    """
    scan, rows, problems = _Scan(source, kind, tokenizer, max_length, render=True), [], []
    for row, faults in scan:
        problems += faults[: PROBLEM_LIMIT - len(problems)]
        if row is not None:
            rows.append(row)
    if problems and not (skip_bad and rows):
        listed = "\n".join(f"  {problem}" for problem in problems[:10])
        more = f"\n  ... and {len(problems) - 10:,} more" if len(problems) > 10 else ""
        advice = f"`alignkit check {scan.name}` lists them all; skip_bad=True leaves such rows out and counts them"
        raise DataError(f"{scan.name}: {scan.bad_rows:,} of {scan.rows:,} rows cannot be used:\n{listed}{more}\n"
                        + (advice if rows else "No good row is left."))
    return Rows(rows, scan.kind, scan.name, scan.bad_rows, problems, scan.warnings())


def check(source: str | os.PathLike, kind: str | None = None, *, tokenizer=None,
          max_length: int | None = None) -> Report:
    """Validate a source without keeping its rows: a `Report`, whose str is for people. Arguments as for `load_rows`.

    Raises DataError if the source as a whole cannot be read: no such file, unknown or contradictory columns.
    """
    scan, problems = _Scan(source, kind, tokenizer, max_length, render=False), []
    for _, faults in scan:
        problems += faults[: PROBLEM_LIMIT - len(problems)]
    return Report(scan.name, scan.kind, scan.rows, scan.bad_rows, tuple(problems), scan.warnings())


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
            found = tokenizer(once, split_special_tokens=not chat, return_attention_mask=False, verbose=False,
                              add_special_tokens=add_special_tokens and not chat)["input_ids"]
            end = tokenizer.eos_token_id if add_special_tokens and not chat else None  # slow to ask for
            known = {text: ids[:-1] if len(ids) > 1 and ids[-1] == end else ids
                     for text, ids in zip(once, found, strict=True)}
            for place in places:
                rows[place] = known[str(texts[place])][:]
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
