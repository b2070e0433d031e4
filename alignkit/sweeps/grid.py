"""The grid of a sweep: the values of each parameter, their cross product, random draws, and the ID of each job.

Pure: text and numbers in, plain values out. Nothing here knows notebooks or files.
"""

import ast
import itertools
import math
import random
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from alignkit.errors import ParameterError
from alignkit.storage import content_hash

MOST_JOBS = 100_000
ID_HASH, ID_WORDS = 10, 60  # characters of an ID's hash, and of the readable part before it
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_INTEGERS = re.compile(r"([-+]?\d+)\.\.([-+]?\d+)")
_RANGE = re.compile(rf"(log:)?({_NUMBER})\.\.({_NUMBER})")
_CLOSES = {"[": "]", "{": "}", "(": ")"}


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included, to draw from: uniformly, or uniformly in their logarithm."""

    low: float
    high: float
    log: bool = False
    integer: bool = False

    def __str__(self) -> str:
        return f"{'log:' if self.log else ''}{self.low:g}..{self.high:g}"


def axis(name: str, text: str, *, drawn: bool = False, integer: bool = False) -> list[str] | Range:
    """The values that `text` gives to a parameter: `0.05,0.1`, `0..4` (whole numbers, both ends included), or a mix.

    Text in quotes, and a list or a mapping in brackets, is one value, whatever commas it has. drawn: a single range
    LOW..HIGH or log:LOW..HIGH is a Range, to draw from; integer: of whole numbers. Raises ParameterError with the name
    and the faulty part.
    """
    parts = _parts(name, text)
    if drawn and len(parts) == 1 and not parts[0][1] and (found := _RANGE.fullmatch(parts[0][0])):
        return _range(name, found, integer)
    values: list[str] = []
    for part, quoted in parts:
        if quoted:
            values.append(part)
        elif found := _INTEGERS.fullmatch(part):
            values += _integers(name, part, int(found[1]), int(found[2]))
        elif _RANGE.fullmatch(part):
            raise ParameterError(f"{name} is {text!r}: {part!r} is a range to draw from: "
                                 + ("give it alone, without a list" if drawn else "add --random N, or give whole "
                                    "numbers, or a list"))
        elif not part:
            raise ParameterError(f"{name} is {text!r}: a value is empty; an empty text is written ''")
        else:
            values.append(part)
    return list(dict.fromkeys(values))


def grid(axes: Mapping[str, Sequence[str] | Range], *, draws: int | None = None, seed: int = 0) -> list[dict]:
    """The jobs: name -> value of each, the last parameter changing fastest.

    Lists are crossed. Ranges are drawn together, `draws` times, and each draw is crossed with the lists. The values of
    a parameter depend on `seed`, on its name and on the number of the draw only, so more draws keep the first ones.
    Raises ParameterError if draws are given without a range, or if there are more than MOST_JOBS jobs.
    """
    ranges = {name: values for name, values in axes.items() if isinstance(values, Range)}
    if draws is not None and not ranges:
        raise ParameterError("--random draws from ranges, and no parameter has one: write NAME=LOW..HIGH, or "
                             "NAME=log:LOW..HIGH")
    lists = {name: values for name, values in axes.items() if name not in ranges}
    count = math.prod(map(len, lists.values())) * (draws or 1)
    if count > MOST_JOBS:
        raise ParameterError(f"the grid has {count:,} jobs, expected {MOST_JOBS:,} at most")
    drawn = {name: draw(name, among, draws or 0, seed) for name, among in ranges.items()}
    rows = [{name: values[at] for name, values in drawn.items()} for at in range(draws or 0)] if ranges else [{}]
    crossed = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    return [{name: (row | values)[name] for name in axes} for row in rows for values in crossed]


def draw(name: str, among: Range, count: int, seed: int) -> list[float | int]:
    """`count` numbers from a range, the same ones for the same name and seed on every machine."""
    source, drawn = random.Random(f"{seed}:{name}"), []
    for _ in range(count):
        share = source.random()
        if among.integer and not among.log:
            drawn.append(int(among.low) + int(share * (int(among.high) - int(among.low) + 1)))
            continue
        low, high = (math.log(among.low), math.log(among.high)) if among.log else (among.low, among.high)
        value = low + share * (high - low)
        value = float(f"{math.exp(value) if among.log else value:.6g}")  # short enough to type again
        value = min(max(value, among.low), among.high)
        drawn.append(round(value) if among.integer else value)
    return drawn


def job_id(what: str, shown: Mapping[str, object], settings: object, first: Collection[str] = ()) -> str:
    """The ID of a job, a folder's name: its parameters as words, and a hash of `what` (the notebook) and `settings`.

    Parameters are sorted by name, those in `first` before the others, so that their order does not change the ID. The
    hash alone tells jobs apart; words are cut off.
    """
    words = "_".join(f"{_word(name)}={_word(shown[name])}" for name in sorted(shown, key=lambda n: (n not in first, n)))
    if len(words) > ID_WORDS:
        words = f"{words[:ID_WORDS - 1]}+"
    return f"{words or 'job'}_{content_hash([what, settings])[:ID_HASH]}"


def is_id(name: str) -> bool:
    """Whether `name` can be an ID: a plain name of a folder, so that a record cannot lead out of the sweep's own."""
    return re.fullmatch(r"[A-Za-z0-9_+-][A-Za-z0-9.=_+-]*", name) is not None


def _word(value: object) -> str:
    text = re.sub(r"[^A-Za-z0-9.+_-]+", "-", str(value))
    return text.rstrip("-.").lstrip(".") or ("-" if not isinstance(value, str) or value else "")


def _integers(name: str, part: str, first: int, last: int) -> list[str]:
    if last < first:
        raise ParameterError(f"{name} is {part}: the range goes down; write {last}..{first}")
    if last - first >= MOST_JOBS:
        raise ParameterError(f"{name} is {part}: {last - first + 1:,} values, expected {MOST_JOBS:,} at most")
    return [str(value) for value in range(first, last + 1)]


def _range(name: str, found: re.Match, integer: bool) -> Range:
    log, low, high = bool(found[1]), float(found[2]), float(found[3])
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ParameterError(f"{name} is {found[0]!r}, expected LOW..HIGH with LOW below HIGH")
    if log and low <= 0:
        raise ParameterError(f"{name} is {found[0]!r}: a logarithm needs numbers above 0")
    if integer and not (low.is_integer() and high.is_integer()):
        raise ParameterError(f"{name} is {found[0]!r}: the parameter is a whole number, and so must the ends be")
    return Range(low, high, log, integer)


def _parts(name: str, text: str) -> list[tuple[str, bool]]:
    """`text` split at its commas: each part, and whether it was in quotes or brackets, where commas do not split."""
    parts, at = [], 0
    while True:
        start = at + len(text[at:]) - len(text[at:].lstrip())
        if text[start:start + 1] in ("'", '"'):
            end = _end_of_quotes(name, text, start)
            try:
                part = (ast.literal_eval(text[start:end]), True)
            except (SyntaxError, ValueError):
                part = (text[start + 1:end - 1], True)
        elif text[start:start + 1] in _CLOSES:
            end = _end_of_brackets(name, text, start)
            part = (text[start:end], True)
        else:
            end = text.find(",", start)
            end = len(text) if end < 0 else end
            part = (text[start:end].strip(), False)
        parts.append(part)
        rest = text[end:].lstrip()
        if not rest:
            return parts
        if not rest.startswith(","):
            raise ParameterError(f"{name} is {text!r}: {rest!r} follows a value in quotes or brackets, expected a "
                                 "comma")
        at = len(text) - len(rest) + 1


def _end_of_quotes(name: str, text: str, start: int) -> int:
    at = start + 1
    while at < len(text) and text[at] != text[start]:
        at += 1 + (text[at] == "\\")
    if at >= len(text):
        raise ParameterError(f"{name} is {text!r}: the quote {text[start]} is not closed")
    return at + 1


def _end_of_brackets(name: str, text: str, start: int) -> int:
    at, open_ = start, []
    while at < len(text):
        if text[at] in ("'", '"'):
            at = _end_of_quotes(name, text, at)
            continue
        if text[at] in _CLOSES:
            open_.append(_CLOSES[text[at]])
        elif open_ and text[at] == open_[-1]:
            open_.pop()
            if not open_:
                return at + 1
        at += 1
    raise ParameterError(f"{name} is {text!r}: the bracket {text[start]} is not closed")
