"""What people choose: responses to choose from, a log that loses no choice, preference pairs, and what they moved.

A choice is between two or more named responses to one prompt. Each is appended to FILE.log.jsonl and flushed to the
disk before anything else happens; FILE.jsonl holds the preference pairs that follow, rewritten in one step from the
log, as `alignkit.data.load_rows` reads them. Ties, skips and choices against or for an empty response, which preference
files cannot hold, are in the log alone.
"""

import copy
import difflib
import json
import os
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from alignkit.data import ChatText, load_rows
from alignkit.intervals import Estimate, wilson
from alignkit.models import load_policy
from alignkit.records import append_metrics, content_hash, read_metrics, trim_metrics, write_atomically
from alignkit.reward import RewardConfig, RewardScorer, train_reward_model
from alignkit.sampling import generate_texts

UNDECIDED = ("tie", "skip")  # choices that make no preference pair


@dataclass(frozen=True)
class Item:
    """One choice to make. responses: name -> text; order: the names as they are shown; id: hash of prompt and texts.

    notes: name -> what is written beside the response, such as its behaviour in the desk world.
    """

    id: str
    prompt: str
    responses: dict[str, str]
    order: tuple[str, ...]
    notes: dict[str, str]


def choice_items(rows: Sequence[Mapping], seed: int = 0) -> list[Item]:
    """Items from rows {"prompt", "responses": {name: text}}, optionally "notes": {name: text}; order is shuffled.

    The order depends on seed, prompt and responses, not on the row's place, so that it is the same when one goes on.
    Raises ValueError, naming the row, if it lacks something or holds text that a preference file cannot.
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


def sample_pairs(policy, tokenizer, prompts: Sequence[str], *, max_new_tokens: int, seed: int = 0,
                 temperature: float = 1.0, tries: int = 8) -> list[dict]:
    """Rows {"prompt", "a", "b"}: two different responses of a policy to each prompt.

    Equal and empty responses are drawn again, `tries` times at most; a prompt that gets no two others is left out.
    """
    found: dict[int, dict] = {}
    for attempt in range(tries):
        left = [place for place in range(len(prompts)) if place not in found]
        drawn = generate_texts(policy, tokenizer, [prompts[place] for place in left], max_new_tokens=max_new_tokens,
                               samples=2, seed=seed + 7919 * attempt, temperature=temperature) if left else []
        for place, (a, b) in zip(left, drawn, strict=True):
            if a.strip() != b.strip() and a.strip() and b.strip():
                found[place] = {"prompt": prompts[place], "a": a, "b": b}
    return [found[place] for place in sorted(found)]


def sample_side_by_side(checkpoints: Mapping[str, object], prompts: Sequence[str], *, max_new_tokens: int,
                        seed: int = 0, temperature: float = 1.0, world=None) -> list[dict]:
    """Rows {"prompt", "responses": {checkpoint: text}, "notes": {checkpoint: behaviour}} on the same prompts and seed.

    checkpoints: name -> a folder, a Hub id, or (policy, tokenizer); folders are loaded one at a time. world: the desk
    world, which names the behaviour of each response; without it there are no notes.
    """
    said, notes = {}, {}
    for name, checkpoint in checkpoints.items():
        policy, tokenizer = checkpoint if isinstance(checkpoint, tuple) else load_policy(checkpoint)
        drawn = generate_texts(policy, tokenizer, list(prompts), max_new_tokens=max_new_tokens, seed=seed,
                               temperature=temperature)
        said[name] = [texts[0] for texts in drawn]
        notes[name] = world.behaviours(list(prompts), said[name]) if world is not None else None
    return [{"prompt": prompt, "responses": {name: said[name][place] for name in said},
             "notes": {name: notes[name][place] for name in said if notes[name]}}
            for place, prompt in enumerate(prompts)]


def word_differences(texts: Sequence[str]) -> list[list[tuple[str, bool]]]:
    """Each text as pieces (piece, differs) that add up to it; a word differs if some other text lacks it at its place.

    Words carry the space before them, which is not compared. The places are those of Python's `difflib`, text by text.
    """
    words = [re.findall(r"\s*\S+|\s+$", text) for text in texts]
    pieces = []
    for mine in words:
        common = [True] * len(mine)
        for other in words:
            same = [False] * len(mine)
            bare = [[word.strip() for word in line] for line in (mine, other)]
            for start, _, size in difflib.SequenceMatcher(None, *bare, autojunk=False).get_matching_blocks():
                same[start : start + size] = [True] * size
            common = [a and b for a, b in zip(common, same, strict=True)]
        joined: list[tuple[str, bool]] = []
        for word, kept in zip(mine, common, strict=True):
            if joined and joined[-1][1] is not kept:
                joined[-1] = (joined[-1][0] + word, not kept)
            else:
                joined.append((word, not kept))
        pieces.append(joined)
    return pieces


class ChoiceLog:
    """The choices made on `items`, in FILE.log.jsonl, and their preference pairs, in FILE.jsonl.

    A file that is there already is gone on with: what was chosen before is known again, choices on other items stay.
    Raises ValueError if `path` does not end in .jsonl, FileExistsError if it holds rows that no log beside it explains.
    """

    def __init__(self, path: str | Path, items: Sequence[Item]):
        self.path = Path(path)
        if self.path.suffix != ".jsonl" or self.path.name.endswith(".log.jsonl"):
            raise ValueError(f"path is {str(path)!r}, expected a name that ends in .jsonl (and not in .log.jsonl)")
        self.log = _log_of(self.path)
        self.items = {item.id: item for item in items}
        if not self.log.exists() and self.path.exists() and self.path.stat().st_size:
            raise FileExistsError(f"{self.path} is there, and was not made here (there is no {self.log.name} beside "
                                  "it); choose another name for your labels")
        self._history = _fold(trim_metrics(self.log), self.log)
        if self.log.exists():
            self._write_pairs()

    def choose(self, item: Item, choice: str, **facts) -> None:
        """Note that `choice`, a name of a response, "tie" or "skip", was made; on the disk when this returns.

        facts: more to write down, such as the seconds it took. A later choice on the same item takes its place.
        """
        if choice not in (*item.order, *UNDECIDED):
            raise ValueError(f"choice is {choice!r}, expected one of {', '.join((*item.order, *UNDECIDED))}")
        self._append({"item": item.id, "choice": choice, "order": list(item.order), "prompt": item.prompt,
                      "responses": item.responses, **facts})

    def undo(self) -> str | None:
        """Take back the last choice on these items, by a record of its own; its item's id, None if there is none."""
        last = next((row["item"] for row in reversed(self._history) if row["item"] in self.items), None)
        if last is not None:
            self._append({"undo": last})
        return last

    @property
    def choices(self) -> dict[str, dict]:
        """The records in force on these items, by item id, the oldest choice first."""
        return {name: row for name, row in _latest(self._history).items() if name in self.items}

    def pairs(self) -> list[dict]:
        """All preference pairs of the file: prompt, chosen, rejected, and `label` with where they came from."""
        return [
            {"prompt": row["prompt"], "chosen": row["responses"][row["choice"]], "rejected": text,
             "label": {"chosen": row["choice"], "rejected": name, "order": row["order"], "item": row["item"]}}
            for row in _latest(self._history).values() if row["choice"] not in UNDECIDED
            for name, text in row["responses"].items()
            if name != row["choice"] and "" != text.strip() != row["responses"][row["choice"]].strip() != ""
        ]

    def replay(self, source: str | Path) -> int:
        """Make the choices that a stored file holds on these items (by prompt and texts); how many there were.

        source: a label file, whose log is read if it lies beside it, or any preference pairs that `load_rows` reads.
        """
        stored = {_texts(row["prompt"], row["responses"]): row["responses"].get(row["choice"], row["choice"])
                  for row in _stored(source)}
        done, made = self.choices, 0
        for item in self.items.values():
            said = stored.get(_texts(item.prompt, item.responses))
            if said is not None and item.id not in done:
                name = said if said in UNDECIDED else next(n for n, text in item.responses.items() if text == said)
                self.choose(item, name, replayed=str(source))
                made += 1
        return made

    def _append(self, record: dict) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        append_metrics(self.log, {**record, "time": datetime.now(UTC).isoformat(timespec="milliseconds")})
        with self.log.open("rb") as file:
            os.fsync(file.fileno())
        self._history = _fold(read_metrics(self.log), self.log)  # another kernel may have labelled meanwhile
        self._write_pairs()

    def _write_pairs(self) -> None:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.pairs())
        if not self.path.exists() or self.path.read_text(encoding="utf-8") != lines:
            write_atomically(self.path, lines)


def stored_rows(source: str | Path) -> list[dict]:
    """Rows {"prompt", "responses"} of the choices in a stored label file, or of any preference pairs."""
    return [{"prompt": row["prompt"], "responses": row["responses"]} for row in _stored(source)]


def first_shown(choices: Sequence[Mapping]) -> Estimate | None:
    """How often the left response was chosen, of the choices that were no tie or skip; ½ without position bias."""
    decided = [row for row in choices if row["choice"] not in UNDECIDED]
    left = sum(row["choice"] == row["order"][0] for row in decided)
    return Estimate(left / len(decided), *wilson(left, len(decided))) if decided else None


@dataclass(frozen=True)
class Moved:
    """What new labels changed in a reward model. Each of `labelled` and `heldout` has, before and after:

    accuracy: share of pairs that are ranked as labelled, with Wilson's interval; probability: σ(r_chosen − r_rejected)
    of each pair (N,). length_bias: of each, Spearman's correlation of score and words over the held-out responses.
    """

    labelled: dict[str, dict]
    heldout: dict[str, dict]
    length_bias: dict[str, float]
    seconds: float

    def __str__(self) -> str:
        lines = [f"{'':<38}{'before':<24}after"]
        for name, part in (("the new labels", self.labelled), ("held-out labels", self.heldout)):
            if part:
                cells = [f"{part[when]['accuracy']:.1%}" for when in ("before", "after")]
                lines.append(f"{f'ranked as labelled, {name}':<38}{cells[0]:<24}{cells[1]}")
                means = [f"{sum(p) / len(p):.3f}" for p in (part[w]["probability"] for w in ("before", "after"))]
                lines.append(f"{f'mean P(label), {name}':<38}{means[0]:<24}{means[1]}")
        if self.length_bias:
            lines.append(f"{'correlation of score and length':<38}{self.length_bias['before']:<+24.2f}"
                         f"{self.length_bias['after']:+.2f}")
        return "\n".join([*lines, f"retrained in {self.seconds:.1f} s"])


def retrain(scorer: RewardScorer, labelled: Sequence[Mapping], heldout: Sequence[Mapping] = (), *,
            earlier: Sequence[Mapping] = (), repeat: int = 1, config: RewardConfig | None = None
            ) -> tuple[RewardScorer, Moved]:
    """Train a copy of a reward model on new labels and say what moved: `(scorer, moved)`; the old one stays as it is.

    labelled, heldout, earlier: rows prompt / chosen / rejected. earlier: pairs that it should not forget, mixed in.
    repeat: how often each new label is shown among them. config: by default 40 epochs in batches of 16, in the desk
    world two seconds for 20 labels. Raises ValueError if there are no labels.
    """
    if not labelled:
        raise ValueError("labelled is empty, expected at least one preference pair (ties and skips make none)")
    config = config or RewardConfig(epochs=40, batch_size=16, learning_rate=5e-4)
    begun, model = time.perf_counter(), copy.deepcopy(scorer.model).requires_grad_(True)
    train_reward_model(model, scorer.tokenizer, [*earlier, *(row for row in labelled for _ in range(repeat))], config)
    after, seconds = RewardScorer(model, scorer.tokenizer, scorer.mean, scorer.std), time.perf_counter() - begun
    parts = [{when: _ranked(its, rows) for when, its in (("before", scorer), ("after", after))} if rows else {}
             for rows in (labelled, heldout)]
    bias = {when: _length_bias(its, heldout) for when, its in (("before", scorer), ("after", after))} if heldout else {}
    return after, Moved(*parts, bias, seconds)


def _ranked(scorer: RewardScorer, rows: Sequence[Mapping]) -> dict:
    prompts = [row["prompt"] for row in rows]
    chosen, rejected = (scorer.raw(prompts, [row[side] for row in rows]).double() for side in ("chosen", "rejected"))
    margins = chosen - rejected
    right = float((margins > 0).double().sum() + 0.5 * (margins == 0).double().sum())
    accuracy = Estimate(right / len(rows), *wilson(right, len(rows)))
    return {"accuracy": accuracy, "probability": margins.sigmoid().tolist()}


def _length_bias(scorer: RewardScorer, rows: Sequence[Mapping]) -> float:
    import numpy as np

    responses = [row[side] for side in ("chosen", "rejected") for row in rows]
    scores = scorer.raw([row["prompt"] for row in rows] * 2, responses).numpy()
    ranks = []
    for values in (scores, np.array([len(text.split()) for text in responses])):
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(count) - (count - 1) / 2)[place])  # ties share their mean rank
    return float(np.corrcoef(*ranks)[0, 1]) if min(np.std(r) for r in ranks) > 0 else 0.0


def _texts(prompt: str, responses: Mapping[str, str]) -> tuple:
    return prompt, frozenset(responses.values())


def _check_texts(where: str, texts: Mapping[str, object]) -> None:
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{where}: {name} is {type(text).__name__}, expected text")
        if isinstance(text, ChatText):
            raise ValueError(f"{where}: {name} is a conversation that a chat template rendered; its special tokens "
                             "would be plain text in the label file; label plain prompts")
        if "\0" in text or re.search("[\ud800-\udfff]", text):
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
    """The choices that stand, oldest first: an undo takes the last one on its item away."""
    history: list[Mapping] = []
    for number, row in enumerate(rows, 1):
        if "undo" in row:
            places = [place for place, its in enumerate(history) if its["item"] == row["undo"]]
            history[places[-1] :] = history[places[-1] + 1 :] if places else []
        elif {"item", "choice", "order", "prompt", "responses"} <= row.keys():
            history.append(row)
        else:
            raise ValueError(f"{log}:{number}: is not the record of a choice; choose another name for your labels")
    return history


def _latest(history: Sequence[Mapping]) -> dict[str, Mapping]:
    latest: dict[str, Mapping] = {}
    for row in history:
        latest.pop(row["item"], None)
        latest[row["item"]] = row
    return latest
