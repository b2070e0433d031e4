"""The data on which a run trains and is evaluated: one interface for the desk world and for files.

    task = load_task("desk", tokenizer, seed=0)             # or load_task("pairs.jsonl.gz", tokenizer, seed=0)
    task.demonstrations(1000, seed=0)                       # for SFT
    task.preference_pairs(policy, tokenizer, 500, seed=0)   # for the reward model and for DPO
    task.train_prompts, task.heldout_prompts                # for PPO, and for the frozen evaluation set

No prompt is in both parts. The desk world holds out whole keys (four paraphrases each). A file's prompts are divided by
a seeded hash of their normalised text, so equal prompts are in the same part, whatever their file or row.
"""

import hashlib
import os
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from alignkit.data.fitting import fit_rows
from alignkit.data.rows import load_rows
from alignkit.desk.tiny import phrase_ids
from alignkit.desk.world import MAX_PHRASES, World
from alignkit.errors import DataError
from alignkit.forward.sampling import generate_texts

SPLITS = ("train", "heldout")


@dataclass(frozen=True, kw_only=True)
class Task:
    """Prompts, demonstrations and preference pairs of a run, in two parts without common prompts.

    name: "desk" or the file; world: the desk world, None for files (which have no gold, and only their own labels);
    train_kinds, heldout_kinds: the class of each prompt, "all" for files; heldout_keys: paraphrases share a key, so
    that a bootstrap can draw whole clusters; max_new_tokens: maximum tokens of a response; notes: remarks on skipped
    and truncated rows.
    """

    name: str
    seed: int
    world: World | None
    train_prompts: list[str] = field(repr=False)
    train_kinds: list[str] = field(repr=False)
    heldout_prompts: list[str] = field(repr=False)
    heldout_keys: list[int] = field(repr=False)
    heldout_kinds: list[str] = field(repr=False)
    max_new_tokens: int
    notes: tuple[str, ...] = ()

    def strata(self, split: str = "train") -> dict[str, list[str]]:
        """The prompts of `split`, "train" or "heldout", by class, the class of the first prompt first."""
        parts = {"train": (self.train_prompts, self.train_kinds), "heldout": (self.heldout_prompts, self.heldout_kinds)}
        by_class: dict[str, list[str]] = {}
        for prompt, kind in zip(*parts[_known_split(split)], strict=True):
            by_class.setdefault(kind, []).append(prompt)
        return by_class

    def demonstrations(self, n: int | None = None, seed: int = 0) -> list[dict]:
        """`n` rows prompt / completion on training prompts; a file gives at most all of its rows, None: all."""
        raise NotImplementedError

    def preference_pairs(self, policy, tokenizer, n: int | None = None, seed: int = 0, annotator: str = "default",
                         split: str = "train", noise: float | None = None) -> list[dict]:
        """`n` rows prompt / chosen / rejected on the prompts of `split`, "train" or "heldout".

        Desk: two responses of `policy` to each prompt, with prompts drawn evenly over the classes, labelled by
        `annotator` with `noise` (its share of flipped labels; None: the annotator's own). Pairs of equal responses are
        drawn again; a policy that always gives the same response yields fewer than n rows. File: its own pairs, at most
        all of them, None: all; policy may be None.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class DeskTask(Task):
    """The desk world as a task. messiness: of the demonstrators, 0 to 1 (see `World.demonstrations`)."""

    messiness: float = 0.7

    def demonstrations(self, n: int | None = None, seed: int = 0) -> list[dict]:
        n = len(self.train_prompts) if n is None else n
        return self.world.demonstrations(n, messiness=self.messiness, seed=seed)

    def preference_pairs(self, policy, tokenizer, n: int | None = None, seed: int = 0, annotator: str = "default",
                         split: str = "train", noise: float | None = None) -> list[dict]:
        strata = self.strata(split)
        rng, rows = np.random.default_rng([self.seed, seed, SPLITS.index(split)]), []
        n = sum(map(len, strata.values())) if n is None else n
        for _ in range(10):
            if len(rows) >= n:
                break
            drawn = _evenly(strata, n - len(rows), rng)
            responses = generate_texts(policy, tokenizer, drawn, max_new_tokens=self.max_new_tokens, samples=2,
                                       seed=int(rng.integers(2**31)))
            first, second = zip(*responses, strict=True)
            rows += self.world.preference_pairs(drawn, list(first), list(second), annotator=annotator, noise=noise,
                                                seed=int(rng.integers(2**31)))
        return rows


@dataclass(frozen=True, kw_only=True)
class FileTask(Task):
    """A file, saved data set or Hub id as a task. kind: of its rows; train_rows, heldout_rows: its rows by part."""

    kind: str
    train_rows: list[dict] = field(repr=False)
    heldout_rows: list[dict] = field(repr=False)

    def demonstrations(self, n: int | None = None, seed: int = 0) -> list[dict]:
        if self.kind == "prompts":
            raise DataError(f"{self.name}: has prompts only; SFT needs demonstrations (prompt, completion) or pairs")
        name = "chosen" if self.kind == "pairs" else "completion"
        rows = [{"prompt": row["prompt"], "completion": row[name]} for row in self.train_rows if row[name].strip()]
        return _shuffled(rows, n, seed)

    def preference_pairs(self, policy, tokenizer, n: int | None = None, seed: int = 0, annotator: str = "default",
                         split: str = "train", noise: float | None = None) -> list[dict]:
        if self.kind != "pairs":
            raise DataError(f"{self.name}: has {self.kind}; the reward model and DPO need pairs (chosen, rejected)")
        if annotator != "default" or noise is not None:
            raise ValueError(f"annotator is {annotator!r} and noise {noise}, expected 'default' and None: a file has "
                             "its own labels; annotators live in the desk world (data='desk')")
        return _shuffled(self.heldout_rows if _known_split(split) == "heldout" else self.train_rows, n, seed)


def load_task(data: str | os.PathLike, tokenizer, seed: int = 0, *, skip_bad: bool = False,
              max_new_tokens: int | None = None, max_length: int = 512, heldout_share: float = 0.1,
              kind: str | None = None, split: str | None = None,
              columns: str | Mapping[str, str] | None = None) -> Task:
    """The desk world for "desk", otherwise the `file_task` of a file, a saved data set or a Hub id.

    max_new_tokens: None means 4 for the desk, 32 for files. The other options apply only to files; kind, split and
    columns say how to read them, as in `load_rows`. Raises DataError on bad rows, unless skip_bad is set, and if the
    desk world is used with another model's tokenizer.
    """
    if str(data) == "desk":
        for name, value in {"kind": kind, "split": split, "columns": columns}.items():
            if value:
                raise DataError(f"{name} is {value!r}, and data is 'desk': {name} says how to read a file or data set")
        try:
            phrase_ids(tokenizer)
        except ValueError as error:
            raise DataError(
                "data is 'desk', whose sentences this model's tokenizer does not have; expected model='tiny', a "
                "model that began as it, or data=FILE for the model's own data"
            ) from error
        return desk_task(seed, max_new_tokens=max_new_tokens or MAX_PHRASES)
    return file_task(data, tokenizer, seed, skip_bad=skip_bad, max_new_tokens=max_new_tokens or 32,
                     max_length=max_length, heldout_share=heldout_share, kind=kind, split=split, columns=columns)


def desk_task(seed: int = 0, *, messiness: float = 0.7, max_new_tokens: int = MAX_PHRASES) -> DeskTask:
    """The desk world of `seed` as a task."""
    world = World(seed)
    return DeskTask(
        name="desk", seed=seed, world=world, messiness=messiness, max_new_tokens=max_new_tokens,
        train_prompts=[prompt.text for prompt in world.train_prompts],
        train_kinds=[prompt.kind for prompt in world.train_prompts],
        heldout_prompts=[prompt.text for prompt in world.heldout_prompts],
        heldout_keys=[prompt.key for prompt in world.heldout_prompts],
        heldout_kinds=[prompt.kind for prompt in world.heldout_prompts],
    )


def file_task(source: str | os.PathLike, tokenizer, seed: int = 0, *, kind: str | None = None,
              heldout_share: float = 0.1, max_length: int = 512, max_new_tokens: int = 32,
              skip_bad: bool = False, split: str | None = None,
              columns: str | Mapping[str, str] | None = None) -> FileTask:
    """Rows of a source, truncated to the model's context and divided into two parts by prompt.

    max_length: the context in tokens (or the tokenizer's own limit, if lower). A prompt longer than max_length −
    max_new_tokens − 1 loses its beginning; a response that does not fit after its prompt loses its end; both are cut
    between tokens and counted in `notes`. The truncated prompts, as the model sees them, are then divided.
    kind, split, columns: how to read the source, as in `load_rows`. Raises DataError as `load_rows` does, and if there
    are fewer than two different prompts.
    """
    limit = min(max_length, tokenizer.model_max_length)
    if not 0 < max_new_tokens < limit - 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected 1 to {limit - 2} (max_length is {limit})")
    if not 0 < heldout_share < 1:
        raise ValueError(f"heldout_share is {heldout_share}, expected a share between 0 and 1")
    loaded = load_rows(source, kind, tokenizer=tokenizer, skip_bad=skip_bad, split=split, columns=columns)
    rows, notes = fit_rows(loaded, tokenizer, limit, max_new_tokens)
    prompts = {}  # normalised -> as first written
    for row in rows:
        if row["prompt"]:
            prompts.setdefault(_normal(row["prompt"]), row["prompt"])
    if len(prompts) < 2:
        raise DataError(f"{loaded.source}: {len(prompts)} different prompts; expected at least 2, one to hold out "
                        "(rows of plain text have none: give prompt and completion)")
    order = sorted(prompts, key=lambda text: _position(text, seed))
    count = sum(_position(text, seed) < heldout_share for text in order)
    held = set(order[: min(max(count, 1), len(order) - 1)])  # neither part is empty
    train_prompts = [prompt for text, prompt in prompts.items() if text not in held]
    heldout_prompts = [prompt for text, prompt in prompts.items() if text in held]
    return FileTask(
        name=loaded.source, seed=seed, world=None, kind=loaded.kind, max_new_tokens=max_new_tokens, notes=notes,
        train_prompts=train_prompts, train_kinds=["all"] * len(train_prompts),
        heldout_prompts=heldout_prompts, heldout_keys=list(range(len(heldout_prompts))),
        heldout_kinds=["all"] * len(heldout_prompts),
        train_rows=[row for row in rows if _normal(row["prompt"]) not in held],
        heldout_rows=[row for row in rows if _normal(row["prompt"]) in held],
    )


def is_heldout(prompt: str, seed: int = 0, share: float = 0.1) -> bool:
    """Whether the split of `seed` holds a prompt out: the prompt's hash, uniform in [0, 1) over prompts, is below
    `share`.

    The text is normalised first (Unicode NFKC, case, spaces), so copies of a prompt are always in the same part.
    """
    return _position(_normal(prompt), seed) < share


def _normal(prompt: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def _position(normal: str, seed: int) -> float:
    salt = int(seed).to_bytes(8, "big", signed=True)
    digest = hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=8, salt=salt).digest()
    return int.from_bytes(digest, "big") / 2**64


def _known_split(split: str) -> str:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    return split


def _evenly(strata: dict[str, list[str]], n: int, rng) -> list[str]:
    """Draw `n` prompts, equally many of each class; otherwise rare classes (risky prompts) would get few labels."""
    drawn = [np.resize(rng.permutation(len(strata[kind])), n) for kind in sorted(strata)]
    prompts = [strata[kind] for kind in sorted(strata)]
    return [part[place] for places in zip(*drawn, strict=True) for part, place in zip(prompts, places, strict=True)][:n]


def _shuffled(rows: list[dict], n: int | None, seed: int) -> list[dict]:
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:n]]
