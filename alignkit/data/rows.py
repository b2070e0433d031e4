"""Read prompts, demonstrations and preference pairs from files and Hub data sets, and validate every row.

A source is a local file (JSON lines, a JSON array, CSV or Parquet, each also gzipped), a folder written by
`datasets.save_to_disk`, or the id of a Hugging Face Hub data set. The result is plain text rows:

    pairs            {"prompt", "chosen", "rejected"}   (and "scores" if the source has several: those of chosen and of
                                                        rejected, by the name of the aspect)
    demonstrations   {"prompt", "completion"}           (the prompt is "" for plain text)
    prompts          {"prompt"}

`data.layouts` knows the columns of well-known data sets. Every record is first converted to a prompt and its replies,
as texts or as messages (`data.fields`); then templates are applied, tokens are counted and the row is checked. A column
that seems to hold an answer, a label, a system prompt or a history but would not be used is an error. Conversations
(lists of {role, content}) are rendered with the tokenizer's chat template and returned as `ChatText`. Checking a
gigabyte needs the memory of one row and of an eight-byte hash per row (`data.files` reads in pieces). Not supported on
purpose: already tokenised data, tool calls, images, and code that comes with a data set.
"""

import collections
import contextlib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from alignkit.data.chat import chat_template_of
from alignkit.data.encoding import ChatText, encode_text
from alignkit.data.fields import (
    NO_PROMPT,
    REPLIES,
    _came,
    _check_special,
    _check_text,
    _is_chat,
    _rendered,
    _special_pattern,
    _split_chat,
    _split_texts,
    as_messages,
    is_untrained,
    left_out_of,
    lost_in,
    messages_before,
    without_prompt,
)
from alignkit.data.files import LINE_LIMIT, Fault, records
from alignkit.data.layouts import (
    LAYOUTS,
    PLAIN,
    SPARE,
    Layout,
    LeftOut,
    carries,
    columns_of,
    described,
    guess,
    is_empty,
    is_prose,
    repeats,
    there,
    value_at,
)
from alignkit.data.problems import PROBLEM_LIMIT, Problem, Report, Rows
from alignkit.errors import DataError

MARK = re.compile("score|rating|reward")  # in the name of a column
FURTHER_TURN = re.compile(r"\n\n(Human|User|Assistant):")
MOST_SKIPPED = 0.1  # largest share of rows that skip_bad may skip; above it, this is probably the wrong file
ROWS_AT_ONCE, CHARACTERS_AT_ONCE = 64, 2**20  # conversations rendered in one batch
ROW_KINDS = ("pairs", "demonstrations", "prompts")
ROWS_AHEAD = 900  # rows inspected for a system prompt before the first one is returned
MOST_TOGETHER = 64  # rows treated as answers to one prompt
_NAMES = {"pairs": ("chosen", "rejected"), "demonstrations": ("completion",), "prompts": ()}
_FIELDS = ("prompt", "messages", "text", *REPLIES)  # in this order: chosen is the first reply
_MARKS = {"pairs": {"chosen", "rejected"}, "demonstrations": {"completion", "messages", "text"}}  # they tell the kind


class _Texts(NamedTuple):
    """Prompt and replies of a record, and the scores of the replies."""

    prompt: str
    replies: list[str]
    scores: dict


class _Chat(NamedTuple):
    """A conversation that has not been rendered yet."""

    prompt: list[dict]
    replies: list[dict]
    scores: dict


class _Scan:
    """One pass over a source: iterate over (row or None, problems); `warnings()` and the counts are available
    afterwards."""

    def __init__(self, source, kind: str | None, tokenizer, max_length: int | None, render: bool,
                 split: str | None = None, columns: str | Mapping[str, str] | None = None, messages: bool = False):
        if kind is not None and kind not in ROW_KINDS:
            raise ValueError(f"kind is {kind!r}, expected one of {', '.join(ROW_KINDS)}")
        if max_length is not None and tokenizer is None:
            raise ValueError(f"max_length is {max_length}, which is counted in tokens; give the tokenizer too")
        self.name, self.kind, self.tokenizer, self.max_length = str(source), kind, tokenizer, max_length
        self._render, self._told, self._messages = render, kind is not None, messages
        self.rows = self.bad_rows = self.left_out = 0
        self._special = _special_pattern(tokenizer) if tokenizer is not None else None
        self._given = columns_of(columns)
        described_columns, self._tags = described(source)
        self._score = self._given.pop("score", None)  # a mark of several answers, no column
        self._columns = {**described_columns, **self._given}
        self._unit, self._records = records(source, split)
        self._records = ((line, self._renamed(record)) for line, record in self._records)
        self._met: set[str] = set()  # fields for which a column was there
        self._layout: Layout | None = None
        self._prompt_twice = False  # whether the replies of the first rows begin with their prompts
        self._conversational = False  # whether the first rows have a system prompt or a history
        self._common: set[str] = set()  # columns that most of the first rows have
        self._seen: set[bytes] = set()
        self._noted: dict[str, list] = {}  # note -> [count, first lines]

    def __iter__(self) -> Iterator[tuple[dict | None, list[Problem]]]:
        try:
            head = list(self._head())
            self._detect([record for _, record in head if isinstance(record, dict)])
            if self._may_converse(head):  # most rows of a set may have no system prompt, and all are read alike
                head += self._head(ROWS_AHEAD)
                self._conversational = any(self._begins(record) for _, record in head)
            waiting, characters = [], 0
            for line, record in self._together(itertools.chain(head, self._records)):
                parts, faults = self._split(line, record)
                waiting.append((line, parts, faults))
                if isinstance(parts, _Chat):
                    characters += sum(len(message["content"]) for message in parts.prompt + parts.replies)
                if not characters or len(waiting) == ROWS_AT_ONCE or characters > CHARACTERS_AT_ONCE:
                    yield from self._finished(waiting)
                    waiting, characters = [], 0
            yield from self._finished(waiting)
        except Fault as fault:  # of the whole source
            raise DataError(f"{self.name}: {fault.reason}") from fault.__cause__
        except OSError as error:
            raise DataError(f"{self.name}: cannot be read: {error}") from error
        if self.rows == 0:
            yield None, [Problem(self.name, 1, "", "there are no rows in it; the file is empty")]
        elif self.left_out == self.rows:
            yield None, [Problem(self.name, 1, "", "every row was left out: " + "; ".join(self.warnings()))]

    def warnings(self) -> tuple[str, ...]:
        """Sentences about valid but suspicious data, with counts and the first line numbers."""
        return tuple(f"{note}: {count:,} time{'s' * (count > 1)}, first at {self._unit} {', '.join(map(str, lines))}"
                     for note, (count, lines) in self._noted.items())

    def _note(self, note: str, line: int) -> None:
        if note not in self._noted and len(self._noted) >= 50:
            note = "there is more to say, which is not listed"
        entry = self._noted.setdefault(note, [0, []])
        entry[0] += 1
        if len(entry[1]) < 5:
            entry[1].append(line)

    def _begins(self, record: object) -> bool:
        """Whether a record has a system prompt or a history in a separate column."""
        fields = self._fields(record) if isinstance(record, dict) else {}
        return any(not is_empty(fields.get(name)) for name in ("system", "history"))

    def _may_converse(self, head: list[tuple[int, object]]) -> bool:
        return bool(self._layout and not self._conversational and any(
            {"system", "history"} & self._fields(record).keys() for _, record in head if isinstance(record, dict)))

    def _head(self, most: int = 20) -> Iterator[tuple[int, object]]:
        objects, characters = 0, 0
        for line, record in itertools.islice(self._records, 1000):
            yield line, record
            if isinstance(record, dict):
                objects += 1
                characters += sum(len(value) for value in record.values() if isinstance(value, str))
            if objects == most or characters > LINE_LIMIT:
                return

    def _renamed(self, record: object) -> object:
        """A record with its columns renamed as the user or a dataset_info.json asks, without the excluded columns."""
        if not isinstance(record, dict) or not (self._columns or self._tags):
            return record
        moved = {field: column for field, column in self._columns.items() if column and there(record, column)}
        self._met |= moved.keys()
        gone = {field for field, column in self._columns.items() if not column}
        gone |= {column if column in record else column.split(".")[0] for column in moved.values()}
        kept = {name: value for name, value in record.items() if name not in gone}
        kept |= {field: value_at(record, column) for field, column in moved.items()}
        return {name: as_messages(value, name, self._tags) if self._tags and not isinstance(value, str) else value
                for name, value in kept.items()}

    def _detect(self, head: list[dict]) -> None:
        """Decide kind and layout by the majority of the first rows."""
        if not head:
            return
        filled = {name for record in head for name, value in record.items() if value is not None}
        names = ", ".join(sorted(map(repr, set().union(*head))))[:1000]
        for field, column in self._given.items():
            if column and field not in self._met:
                raise Fault(f"there is no column {column!r} (--columns {field}={column}); the columns are {names}")
        # a table has every column in every row, so there a column of nulls is no column
        heads = [{name: record[name] for name in record if self._unit == "line" or name in filled} for record in head]
        full = [{name: record[name] for name in record if name in filled} for record in head]
        self._layout = self._fitting(full) or self._nearest(heads, names)
        if self._score and "answers" not in self._layout.names:
            raise Fault(f"--columns score={self._score} says which mark of several answers counts, and this data has "
                        f"no answers with marks; the columns are {names}")
        self.kind = self.kind or self._layout.kind
        self._prompt_twice = self._repeats_prompt(head)
        self._conversational = any(map(self._begins, head))
        self._common = {name for name in filled
                        if 2 * sum(not is_empty(record.get(name)) for record in head) >= len(head)}

    def _repeats_prompt(self, head: list[dict]) -> bool:
        """Whether nearly all replies of the first rows begin with their prompts; in a single row it may be an echo such
        as "Hi" and "Hi there"."""
        twice = []
        for record in (record for record in head if self._layout.fits(record, self._given)):
            with contextlib.suppress(Fault, LeftOut, _Faults):
                prompt, replies = self._normal(self._layout.row(self._fields(record)))
                if isinstance(prompt, str) and replies:
                    twice.append(bool(without_prompt(prompt, replies)))
        return bool(twice) and sum(twice) >= 0.9 * len(twice)

    def _fitting(self, head: list[dict]) -> Layout | None:
        """The layout that most of the first rows match, with the most columns, of the requested kind or a richer
        one."""
        kinds = ROW_KINDS[: ROW_KINDS.index(self.kind) + 1] if self.kind else ("pairs", "demonstrations")

        def rank(layout: Layout) -> tuple[int, bool, int, int]:
            fitting = sum(layout.fits(record, self._given) for record in head)
            renamed = sum(field in self._given and column != field for field, column, _, _ in layout.places)
            return fitting, layout.kind == self.kind, layout.needs, -renamed

        best = max((layout for layout in LAYOUTS if layout.kind in kinds), key=rank)
        return best if 2 * rank(best)[0] >= len(head) else None

    def _nearest(self, head: list[dict], names: str) -> Layout:
        """If no layout fits: the plain layout closest to the first rows, judged by the columns that identify a kind."""
        kind = self.kind
        if kind is None:
            votes = collections.Counter(filter(None, map(_marked_kinds, head))).most_common(1)
            if not votes:
                raise Fault(f"the columns are {names}; expected prompt, chosen, rejected (preference pairs); prompt, "
                            "completion, or messages, or text (demonstrations); or prompt alone. Say which is which, "
                            f"such as --columns {guess(set().union(*head))}")
            (kinds, _), = votes
            if len(kinds) > 1:
                raise _mixed(names)
            kind = kinds[0]
        layouts = [Layout("", kind, columns) for columns in PLAIN[kind]]
        return max(layouts, key=lambda layout: sum(
            column in record for record in head for _, column, needed, _ in layout.places if needed) / layout.needs)

    def _fields(self, record: dict) -> dict:
        fields = self._layout.fields(record)
        fields |= {name: record[name] for name in self._given if name in record and name in self._layout.names}
        return {name: value for name, value in fields.items() if self._given.get(name) != ""}

    def _together(self, numbered: Iterable[tuple[int, object]]) -> Iterator[tuple[int, object]]:
        """The records; those that are answers to the same prompt are combined if the layout says so."""
        column = self._layout.together if self._layout else ""
        if not column:
            yield from numbered
            return
        line, group = 0, []
        for number, record in numbered:
            whole = isinstance(record, dict) and isinstance(record.get(column), str)
            if group and (not whole or record[column] != group[0][column] or len(group) == MOST_TOGETHER):
                yield line, {**group[0], "answers": group}
                group = []
            if whole:
                line, group = line if group else number, [*group, record]
            else:
                yield number, record
        if group:
            yield line, {**group[0], "answers": group}

    def _finished(self, waiting: list[tuple]) -> Iterator[tuple[dict | None, list[Problem]]]:
        """The finished rows of split records: (row, problems). Conversations are rendered in one batch."""
        chats = [parts for _, parts, _ in waiting if isinstance(parts, _Chat)]
        texts = iter(chat_template_of(self.tokenizer).render([chat[:2] for chat in chats])
                     if chats and not self._messages else ())
        for line, parts, faults in waiting:
            row, chat = None, parts if isinstance(parts, _Chat) else None
            try:
                if chat and self._messages:
                    parts = _as_text(chat)
                elif chat:
                    texts_of = _rendered(self.tokenizer, chat.prompt, next(texts))
                    self._check_kept(line, chat, *texts_of)
                    parts = _Texts(*texts_of, chat.scores)
                row = self._finish(line, *parts) if parts else None
                if chat and self._messages:
                    row = {"prompt": chat.prompt, **dict(zip(_NAMES[self.kind], chat.replies, strict=True))}
            except Fault as fault:
                faults = [fault]
            self.rows, self.bad_rows = self.rows + 1, self.bad_rows + bool(faults)
            yield row, [Problem(self.name, line, self._column(fault.field), fault.reason, self._unit)
                        for fault in faults]

    def _column(self, field: str) -> str:
        """The file's column name of the field that a fault is about."""
        name, colon, more = field.partition(":")
        column = self._layout.column(name) if self._layout else name
        return (self._columns.get(column) or column) + colon + more

    def _check_kept(self, line: int, chat: _Chat, head: str, replies: list[str]) -> None:
        """Raise Fault if the chat template drops a message; add a note if it strips spaces."""
        if role := left_out_of(chat.prompt, head):
            raise Fault(f"the chat template leaves out the {role} message; use a template that writes it "
                        "(tokenizer.chat_template)", "prompt")
        for name, message, text in zip(_NAMES[self.kind], chat.replies, replies, strict=True):
            try:
                change = lost_in(message, head, text)
            except Fault as fault:
                raise Fault(fault.reason, name) from None
            if change:
                where = "at the ends of" if change == "ends" else "inside"
                self._note(f"the chat template changes the spaces {where} replies", line)

    def _split(self, line: int, record: object) -> tuple[_Texts | _Chat | None, list[Fault]]:
        """Prompt and responses of a record, as texts or as the messages of a `_Chat`, or the reason why there are
        none."""
        if isinstance(record, Fault):
            return None, [record]
        if isinstance(record, dict) and self._layout is None:
            self._detect([record])
        columns = [column for column, _ in self._layout.needed(record if isinstance(record, dict) else {}, self._given)
                   ] if self._layout else []
        if not isinstance(record, dict):
            expected = f"an object with {', '.join(columns)}" if columns else "an object"
            return None, [Fault(f"is {_came(record)}, expected {expected}")]
        used = {column if column in record else column.split(".")[0] for _, column, _, _ in self._layout.places}
        unused = sorted(record.keys() - used - (self._given.keys() & self._layout.names))
        if "prompt" in unused and self._layout.columns.startswith("chosen") and not is_empty(record["prompt"]):
            return None, [Fault("this row has a prompt, others have none", "prompt")]
        fields = self._fields(record)
        faults = [Fault("is missing", column) for column in columns if not there(record, column)]
        faults += [Fault("is null, expected text", column) for column in columns
                   if there(record, column) and value_at(record, column) is None]
        if faults:
            return None, faults + _text_faults({name: value for name, value in fields.items()
                                                if value is not None and not isinstance(value, (list, dict))})
        try:
            fields = self._layout.row({**fields, "score": self._score} if self._score else fields)
            prompt, replies = self._normal(fields)
            if self.kind == "demonstrations" and any(map(is_untrained, replies)):
                raise LeftOut("its reply is marked as not to be trained on")
            if self._prompt_twice and (rest := without_prompt(prompt, replies)):
                replies = rest
                self._note("the replies repeat the prompt, which is cut off them", line)
            self._check_unused(line, record, unused, prompt, replies)
            replies = replies[:len(_NAMES[self.kind])]
            scores = fields.get("scores", {}) if self.kind == "pairs" else {}
            return (self._chat if isinstance(prompt, list) else _Texts)(prompt, replies, scores), []
        except LeftOut as reason:
            self.left_out += 1
            self._note(f"left out, {reason}", line)
            return None, []
        except _Faults as several:
            return None, several.faults
        except Fault as fault:
            asked = [name for name in unused if carries(name, record[name]) == "part of the prompt"]
            if fault.reason == NO_PROMPT and asked:
                fault = Fault(f"{fault.reason}: is it {asked[0]!r}? --columns prompt={asked[0]}")
            return None, [fault]

    def _normal(self, fields: dict) -> tuple["str | list[dict]", list]:
        """The normal form of a record's fields: prompt and replies, all as texts or all as messages."""
        if not is_empty(fields.get("tools")):
            raise Fault("tools are not read (left out on purpose); --columns tools= trains without them", "tools")
        before = messages_before(fields.get("system"), fields.get("history"))
        values = {name: as_messages(fields[name], name, self._tags) for name in _FIELDS if name in fields}
        if not is_empty(more := fields.get("input")):
            if not isinstance(values.get("prompt"), str):
                raise Fault("stands beside messages; --columns input= leaves it out", "input")
            _check_text(more, "input")
            values["prompt"] = f"{values['prompt']}\n{more}" if values["prompt"].strip() else more
        if any(map(_is_chat, values.values())) or (self._conversational and "text" not in values):
            return _split_chat(values, before)
        if before:
            raise Fault("a system prompt or a history: the first rows have none and were read as text; put a row that "
                        "has one first, or leave it out (--columns system=,history=)")
        if faults := _text_faults(values):
            raise _Faults(faults)
        return _split_texts(values)

    def _check_unused(self, line: int, record: dict, unused: list[str], prompt, replies: list) -> None:
        """Raise Fault if a column that seems to matter is not used and does not repeat the prompt or the replies."""
        for name in unused:
            other = name.replace("chosen", "rejected")
            if other != name and MARK.search(name) and _is_lower(record[name], record.get(other)):
                self._note(f"{name!r} is below {other!r}, which contradicts the pair (the pair counts)", line)
            what = carries(name, record[name])
            if not what and self._layout.kind == "prompts" and not self._told and is_prose(name, record[name]):
                what = "answers"
            if what in ("answers", "labels") and (self._told or (self._layout.kind == "pairs" and name in SPARE)):
                what = ""
            if self._layout.kind == "pairs" and (what == "marks" or (what == "part of the prompt" and name in SPARE)):
                what = ""
            if not what and not (self._layout.together and name == "answers"):
                self._note(f"the column {name!r} is not used", line)
            elif what and repeats(as_messages(record[name], name, self._tags), prompt, replies):
                self._note(f"the column {name!r} is not used: it repeats what is read", line)
            elif what:
                fault = Fault(_unused(name, what), name)
                if name not in self._common:
                    raise fault
                names = ", ".join(sorted(map(repr, record)))[:1000]
                mixed = {*_MARKS["pairs"], *_MARKS["demonstrations"]}
                raise DataError(f"{self.name}: {(_mixed(names) if name in mixed else fault).reason}")

    def _chat(self, prompt: list[dict], replies: list[dict], scores: dict) -> _Texts | _Chat:
        if self._messages:
            return _Chat(prompt, replies, scores)
        if self.tokenizer is None and self._render:
            raise DataError(f"{self.name}: the rows are conversations; give tokenizer=, whose template renders them")
        if self.tokenizer is None:
            return _as_text(_Chat(prompt, replies, scores))
        if not self.tokenizer.chat_template:
            raise DataError(f"{self.name}: the rows are conversations, and the tokenizer has no chat template; set "
                            "tokenizer.chat_template, use a chat model, or give prompt, chosen and rejected as text")
        _check_special(self._special, prompt + replies)
        return _Chat(prompt, replies, scores)

    def _finish(self, line: int, prompt: str, responses: list[str], scores: dict) -> dict:
        """The finished row, after the checks that need prompt and responses separately."""
        names = _NAMES[self.kind]
        blank = [name for name, response in zip(names, responses, strict=True) if not response.strip()]
        if self.kind == "pairs" and responses[0].strip() == responses[1].strip():
            raise Fault("is identical to chosen" + " but for spaces" * (responses[0] != responses[1]), "rejected")
        if blank and self.kind == "demonstrations":
            raise Fault("the reply is blank", "completion")
        if blank:
            self._note(f"{blank[0]} is a blank reply (kept: it stands for saying nothing)", line)
        elif self.kind == "pairs" and responses[1].startswith(responses[0]):
            self._note("chosen is the beginning of rejected", line)
        if any(map(FURTHER_TURN.search, responses)):
            self._note("a reply holds further turns of a transcript, which are read as part of it", line)
        if self._special is not None and not isinstance(prompt, ChatText):
            special = next(filter(None, map(self._special.search, (prompt, *responses))), None)
            if special:
                self._note(f"the text contains {special[0]!r}, a special token of the tokenizer (it stays text)", line)
        if self.max_length is not None:
            length = len(encode_text(self.tokenizer, prompt))
            if length > self.max_length:
                raise Fault(f"the prompt has {length:,} tokens, the context is {self.max_length:,}", "prompt")
        key = hashlib.blake2b("\0".join((prompt, *responses)).encode(), digest_size=8).digest()
        if key in self._seen:
            self._note("the row repeats an earlier one", line)
        self._seen.add(key)
        return {"prompt": prompt, **dict(zip(names, responses, strict=True)), **({"scores": scores} if scores else {})}


def _is_lower(value: object, other: object) -> bool:
    """Whether both are numbers and the first is lower."""
    return all(type(each) in (int, float) for each in (value, other)) and value < other


def _as_text(chat: _Chat) -> _Texts:
    """The text that represents a conversation in comparisons."""
    return _Texts(json.dumps(chat.prompt, default=str), [reply["content"] for reply in chat.replies], chat.scores)


class _Faults(Exception):
    """Several faults of one record."""

    def __init__(self, faults: list[Fault]):
        super().__init__(str(faults))
        self.faults = faults


def _text_faults(values: dict) -> list[Fault]:
    faults = []
    for name, value in values.items():
        try:
            _check_text(value, name, "text, or a list of {role, content} messages")
        except Fault as fault:
            faults.append(fault)
    return faults


def _marked_kinds(record: dict) -> tuple[str, ...]:
    """The kinds whose columns a record has; null columns count only if that leaves one kind."""
    for names in (record.keys(), {name for name, value in record.items() if value is not None}):
        kinds = tuple(kind for kind, marks in _MARKS.items() if names & marks)
        if len(kinds) <= 1:
            break
    return kinds or (("prompts",) if "prompt" in record else ())


def _mixed(names: str) -> Fault:
    return Fault(f"the columns are {names}, which is mixed: preference pairs (chosen, rejected) and demonstrations "
                 "(completion, messages, text); say which, --kind pairs or --kind demonstrations (in Python "
                 "kind='pairs' or 'demonstrations')")


def _unused(name: str, what: str) -> str:
    use = {"answers": f"completion={name}, or chosen=…,rejected=…, or first=…,second=…,better=…",
           "labels": f"label={name} (of a completion), or first=…,second=…,better={name} (of two replies)",
           "marks": f"label={name} (of a completion)", "a system prompt": f"system={name}",
           "part of the prompt": f"prompt={name}"}.get(what, "")
    how = f"say what it is, --columns {use}, or " if use and not use.startswith(f"{name}=") else ""
    return f"the column {name!r} seems to carry {what} and would go unused: {how}leave it out, --columns {name}="


# --- the public functions --------------------------------------------------------------------------------------------
def load_rows(source: str | os.PathLike, kind: str | None = None, *, tokenizer=None, max_length: int | None = None,
              skip_bad: bool = False, split: str | None = None,
              columns: str | Mapping[str, str] | None = None, messages: bool = False) -> Rows:
    """Rows of text from a file, a saved data set or a Hub id; every returned row is valid.

    kind: "pairs", "demonstrations" or "prompts"; None: detected from the columns. tokenizer: renders conversations, and
    rejects prompts longer than max_length tokens. skip_bad: skip bad rows and count them in `.skipped`, but at most a
    share MOST_SKIPPED of all rows (one bad row may always be skipped). split: the split of a data set that has several.
    columns: the role of each column, as "prompt=question,chosen=good" or a mapping; "system=" ignores the system
    column; "score=honesty" chooses the score by which answers are compared. messages: return conversations unrendered,
    the prompt as a list of {role, content} and each reply as one message.
    Raises DataError with the first ten reasons, FILE:LINE each, if more rows are bad or no row is good.

    >>> load_rows("pairs.jsonl")[0]                                                          # doctest: +SKIP
    {'prompt': 'How do I …', 'chosen': ' Happy to help!', 'rejected': ' No.'}
    """
    scan, rows, problems = _Scan(source, kind, tokenizer, max_length, True, split, columns, messages), [], []
    for row, faults in scan:
        problems += faults[: PROBLEM_LIMIT - len(problems)]
        if row is not None:
            rows.append(row)
    allowed = max(1, int(MOST_SKIPPED * scan.rows)) if skip_bad and rows else 0
    if scan.bad_rows > allowed or (problems and not rows):
        listed = "\n".join(f"  {problem}" for problem in problems[:10])
        more = f"\n  ... and {len(problems) - 10:,} more" if len(problems) > 10 else ""
        advice = f"`alignkit check {scan.name}` lists them all; skip_bad=True leaves such rows out and counts them"
        if skip_bad and rows:
            advice = (f"skip_bad leaves out at most {MOST_SKIPPED:.0%} of the rows, here {allowed:,}: is it the right "
                      "file and kind of data?")
        raise DataError(f"{scan.name}: {scan.bad_rows:,} of {scan.rows:,} rows cannot be used:\n{listed}{more}\n"
                        + (advice if rows else "No good row is left."))
    return Rows(rows, scan.kind, scan.name, scan.bad_rows, problems, scan.warnings(), scan.left_out)


def check(source: str | os.PathLike, kind: str | None = None, *, tokenizer=None,
          max_length: int | None = None, split: str | None = None,
          columns: str | Mapping[str, str] | None = None, most: int | None = None) -> Report:
    """Validate a source without keeping its rows; returns a `Report` that prints as text. Arguments as for `load_rows`.

    most: check only the first `most` rows; None: check all rows.
    Raises DataError if the source as a whole cannot be read: no such file, unknown or contradictory columns.
    """
    scan, problems = _Scan(source, kind, tokenizer, max_length, False, split, columns), []
    for _, faults in itertools.islice(scan, most):
        problems += faults[: PROBLEM_LIMIT - len(problems)]
    return Report(scan.name, scan.kind, scan.rows, scan.bad_rows, tuple(problems), scan.warnings(),
                  scan.left_out)
