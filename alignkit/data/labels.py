"""Human labels: items to label, a log that never loses a label, preference pairs, and how labels change a reward model.

A choice is between two or more named responses to one prompt. Each choice is appended to FILE.log.jsonl and flushed to
disk before anything else happens. FILE.jsonl holds the resulting preference pairs in the format of `alignkit.load_rows`
and is rewritten atomically from the log. Ties, skips and choices that involve an empty response cannot be stored as
preference pairs; they are only in the log.
"""

import json
import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from alignkit.data.encoding import ChatText
from alignkit.data.rows import load_rows
from alignkit.errors import RunError
from alignkit.storage import append_metrics, content_hash, read_metrics, trim_metrics, write_atomically

UNDECIDED = ("tie", "skip")  # choices that make no preference pair


@dataclass(frozen=True)
class Item:
    """One choice to make. responses: name -> text; order: the names in display order; id: hash of prompt and texts.

    notes: name -> text shown beside the response, such as its behaviour in the desk world.
    """

    id: str
    prompt: str
    responses: dict[str, str]
    order: tuple[str, ...]
    notes: dict[str, str]


def choice_items(rows: Sequence[Mapping], seed: int = 0) -> list[Item]:
    """Make items from rows {"prompt", "responses": {name: text}}, optionally with "notes": {name: text}; shuffles the
    order.

    The order depends on seed, prompt and responses, but not on the row number, so it is the same when labelling
    continues. Raises ValueError, which names the row, if a field is missing or a text cannot be stored in a preference
    file.
    """
    items, seen = [], {}
    for number, row in enumerate(rows):
        where = f"rows[{number}]"
        if not isinstance(row, Mapping) or not {"prompt", "responses"} <= row.keys() or len(row["responses"]) < 2:
            raise ValueError(f"{where} is {str(row)[:80]!r}, expected a prompt and at least two responses")
        prompt, responses = row["prompt"], dict(row["responses"])
        _check_texts(where, {"prompt": prompt, **responses})
        if taken := [name for name in responses if name in UNDECIDED]:
            raise ValueError(f"{where} has a response named {taken[0]!r}, which stands for another choice")
        name = content_hash([prompt, responses])[:16]
        seen[name] = seen.get(name, 0) + 1
        name += f"-{seen[name]}" if seen[name] > 1 else ""
        order = sorted(responses)
        random.Random(f"{seed} {name}").shuffle(order)
        items.append(Item(name, prompt, responses, tuple(order), dict(row.get("notes") or {})))
    if not items:
        raise ValueError("rows is empty, expected at least one prompt with responses to choose from")
    return items


class ChoiceLog:
    """The choices made on `items`, in FILE.log.jsonl, and the resulting preference pairs, in FILE.jsonl.

    An existing file is continued: earlier choices are loaded, and choices on other items are kept. Raises ValueError if
    `path` does not end in .jsonl, FileExistsError if the file holds rows but has no log beside it.
    """

    def __init__(self, path: str | Path, items: Sequence[Item]):
        self.path = Path(path)
        if self.path.suffix != ".jsonl" or self.path.name.endswith(".log.jsonl"):
            raise ValueError(f"path is {str(path)!r}, expected a name that ends in .jsonl (and not in .log.jsonl)")
        self.log = _log_of(self.path)
        self.items = {item.id: item for item in items}
        if not self.log.exists() and self.path.exists() and self.path.stat().st_size:
            raise FileExistsError(f"{self.path} exists, but not by alignkit (there is no {self.log.name} beside "
                                  "it); choose another name for your labels")
        self._history = _fold(trim_metrics(self.log), self.log)
        if self.log.exists():
            self._write_pairs()

    def choose(self, item: Item, choice: str, **facts) -> None:
        """Record `choice`: the name of a response, "tie" or "skip". The record is on disk when this returns.

        facts: additional data to store, such as the seconds it took. A later choice on the same item replaces this one.
        """
        if choice not in (*item.order, *UNDECIDED):
            raise ValueError(f"choice is {choice!r}, expected one of {', '.join((*item.order, *UNDECIDED))}")
        self._append({"item": item.id, "choice": choice, "order": list(item.order), "prompt": item.prompt,
                      "responses": item.responses, **facts})

    def undo(self) -> str | None:
        """Undo the last choice on these items by appending a record; returns the id of its item, None if there is no
        choice."""
        last = next((row["item"] for row in reversed(self._history) if row["item"] in self.items), None)
        if last is not None:
            self._append({"undo": last})
        return last

    @property
    def choices(self) -> dict[str, dict]:
        """The current choices on these items, by item id, oldest first."""
        return {name: row for name, row in _latest(self._history).items() if name in self.items}

    def pairs(self) -> list[dict]:
        """All preference pairs of the file: prompt, chosen, rejected, and `label` with their origin."""
        return [
            {"prompt": row["prompt"], "chosen": row["responses"][row["choice"]], "rejected": text,
             "label": {"chosen": row["choice"], "rejected": name, "order": row["order"], "item": row["item"]}}
            for row in _latest(self._history).values() if row["choice"] not in UNDECIDED
            for name, text in row["responses"].items()
            if name != row["choice"] and "" != text.strip() != row["responses"][row["choice"]].strip() != ""
        ]

    def replay(self, source: str | Path) -> int:
        """Repeat the choices of a stored file on these items (matched by prompt and texts); returns how many there
        were.

        source: a label file, whose log is used if it exists, or any preference pairs that `load_rows` reads.
        """
        stored = {_texts(row["prompt"], row["responses"]): row["responses"].get(row["choice"], row["choice"])
                  for row in _stored(source)}
        done, added = self.choices, 0
        for item in self.items.values():
            answer = stored.get(_texts(item.prompt, item.responses))
            if answer is not None and item.id not in done:
                name = answer if answer in UNDECIDED else next(
                    n for n, text in item.responses.items() if text == answer)
                self.choose(item, name, replayed=str(source))
                added += 1
        return added

    def _append(self, record: dict) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        append_metrics(self.log, {**record, "time": datetime.now(UTC).isoformat(timespec="milliseconds")})
        with self.log.open("rb") as file:
            os.fsync(file.fileno())
        self._history = _fold(read_metrics(self.log), self.log)  # another kernel may have added labels
        self._write_pairs()

    def _write_pairs(self) -> None:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.pairs())
        if not self.path.exists() or self.path.read_bytes() != lines.encode():
            write_atomically(self.path, lines)


def stored_rows(source: str | Path) -> list[dict]:
    """Rows {"prompt", "responses"} from the choices in a label file, or from any preference pairs."""
    return [{"prompt": row["prompt"], "responses": row["responses"]} for row in _stored(source)]


def _texts(prompt: str, responses: Mapping[str, str]) -> tuple:
    return prompt, frozenset(responses.values())


def _check_texts(where: str, texts: Mapping[str, object]) -> None:
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{where}: {name} is {type(text).__name__}, expected text")
        if isinstance(text, ChatText):
            raise ValueError(f"{where}: {name} is a conversation that a chat template rendered; its special tokens "
                             "would be plain text in the label file; label plain prompts")
        if _UNFIT.search(text):
            raise ValueError(f"{where}: {name} holds a NUL or half of a surrogate pair, which data files may not")
    if not texts["prompt"].strip():
        raise ValueError(f"{where}: prompt is blank")


def _log_of(path: Path) -> Path:
    return path if path.name.endswith(".log.jsonl") else path.with_name(f"{path.stem}.log.jsonl")


def _stored(source: str | Path) -> list[dict]:
    log = _log_of(Path(source))
    if log.exists():
        return list(_latest(_fold(read_metrics(log), log)).values())
    return [{"prompt": row["prompt"], "responses": {"a": row["chosen"], "b": row["rejected"]}, "choice": "a"}
            for row in load_rows(source, "pairs")]


def _fold(rows: Sequence[Mapping], log: Path) -> list[Mapping]:
    """The current choices, oldest first: an undo removes the last choice on its item."""
    history: list[Mapping] = []
    for number, row in enumerate(rows, 1):
        if "undo" in row:
            places = [place for place, choice in enumerate(history) if choice["item"] == row["undo"]]
            if places:
                del history[places[-1]]
        elif _is_choice(row):
            history.append(row)
        else:
            raise RunError(f"{log}:{number}: is not the record of a choice; choose another name for your labels")
    return history


def _is_choice(row: Mapping) -> bool:
    """Whether a record names the chosen text out of at least two, all of which a preference file can store."""
    item, choice, order, prompt, responses = map(row.get, ("item", "choice", "order", "prompt", "responses"))
    if not (isinstance(order, list) and isinstance(responses, dict) and isinstance(prompt, str) and prompt.strip()):
        return False
    texts = [item, choice, prompt, *order, *responses, *responses.values()]
    return (all(isinstance(text, str) and not _UNFIT.search(text) for text in texts) and len(responses) >= 2
            and sorted(order) == sorted(responses) and choice in (*responses, *UNDECIDED))


_UNFIT = re.compile("[\0\ud800-\udfff]")  # NUL and halves of surrogate pairs


def _latest(history: Sequence[Mapping]) -> dict[str, Mapping]:
    latest: dict[str, Mapping] = {}
    for row in history:
        latest.pop(row["item"], None)
        latest[row["item"]] = row
    return latest
