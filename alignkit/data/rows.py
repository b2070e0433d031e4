"""Prompts, demonstrations and preference pairs from files and Hub data sets: read row by row, every row validated.

A source is a local file (JSON lines, a JSON array, CSV or Parquet, each also gzipped), a folder written by
`datasets.save_to_disk`, or the id of a Hugging Face Hub data set. What comes out is plain text rows:

    pairs            {"prompt", "chosen", "rejected"}   from these, or from chosen and rejected that begin alike
    demonstrations   {"prompt", "completion"}           from these, or from messages, or from text (prompt is "" then)
    prompts          {"prompt"}

Conversations (lists of {role, content}) are rendered with the tokenizer's chat template and come out as `ChatText`.
A check of a gigabyte needs the memory of one row and of an eight-byte hash of each (`data.files` reads in pieces).
Left out on purpose: already tokenised data, tool calls, images, and any code that comes with a data set.
"""

import collections
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from alignkit.data.chat import chat_template_of
from alignkit.data.encoding import ChatText, encode_text
from alignkit.data.fields import (
    _FORMS,
    _came,
    _check_special,
    _check_text,
    _is_chat,
    _kinds,
    _rendered,
    _special_pattern,
    _split_chat,
    _split_texts,
)
from alignkit.data.files import LINE_LIMIT, Fault, records
from alignkit.errors import DataError

MOST_SKIPPED = 0.1  # share of the rows that skip_bad may leave out: more, and the file is another than was meant
PROBLEM_LIMIT = 100_000  # problems that are kept; the rest is counted
ROWS_AT_ONCE, CHARACTERS_AT_ONCE = 64, 2**20  # conversations that wait for the chat template together
ROW_KINDS = ("pairs", "demonstrations", "prompts")


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


class _Chat(NamedTuple):
    """A conversation that waits for its chat template."""

    prompt: list[dict]
    replies: list[dict]


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
            waiting, characters = [], 0
            for line, record in itertools.chain(head, self._records):
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
        objects, characters = 0, 0
        for line, record in itertools.islice(self._records, 1000):
            yield line, record
            if isinstance(record, dict):
                objects += 1
                characters += sum(len(value) for value in record.values() if isinstance(value, str))
            if objects == 20 or characters > LINE_LIMIT:
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

    def _finished(self, waiting: list[tuple]) -> Iterator[tuple[dict | None, list[Problem]]]:
        """The rows of records that were split, the conversations among them rendered together: (row, problems)."""
        chats = [parts for _, parts, _ in waiting if isinstance(parts, _Chat)]
        texts = iter(chat_template_of(self.tokenizer).render(chats) if chats else ())
        for line, parts, faults in waiting:
            row = None
            try:
                if isinstance(parts, _Chat):
                    parts = _rendered(self.tokenizer, next(texts))
                row = self._finish(line, *parts) if parts else None
            except Fault as fault:
                faults = [fault]
            self.rows, self.bad_rows = self.rows + 1, self.bad_rows + bool(faults)
            yield row, [Problem(self.name, line, fault.field, fault.reason, self._unit) for fault in faults]

    def _split(self, line: int, record: object) -> tuple["tuple[str, list[str]] | _Chat | None", list[Fault]]:
        """Prompt and responses of a record, as texts or as the messages of a `_Chat`; or why it has none."""
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
            return (self._chat(values) if chat else _split_texts(values)), []
        except Fault as fault:
            return None, [fault]

    def _chat(self, values: dict) -> "tuple[str, list[str]] | _Chat":
        prompt, replies = _split_chat(values)
        if self.tokenizer is None and self._render:
            raise DataError(f"{self.name}: the rows are conversations; give tokenizer=, whose template renders them")
        if self.tokenizer is None:
            return json.dumps(prompt, default=str), [reply["content"] for reply in replies]
        if not self.tokenizer.chat_template:
            raise DataError(f"{self.name}: the rows are conversations, and the tokenizer has no chat template; set "
                            "tokenizer.chat_template, use a chat model, or give prompt, chosen and rejected as text")
        _check_special(self._special, prompt + replies)
        return _Chat(prompt, replies)

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
    with max_length (tokens) refuses longer prompts. skip_bad: leave bad rows out and count them in `.skipped`, but at
    most MOST_SKIPPED of all rows (one bad row always may be left out).
    Raises DataError with the first ten reasons, FILE:LINE each, if more rows are bad than that, or none is good.

    >>> load_rows("pairs.jsonl")[0]                                                          # doctest: +SKIP
    {'prompt': 'How do I …', 'chosen': ' Happy to help!', 'rejected': ' No.'}
    """
    scan, rows, problems = _Scan(source, kind, tokenizer, max_length, render=True), [], []
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
