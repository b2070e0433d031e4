"""Checkpoints of a training run: frequent, atomic, and sufficient to continue the run bit for bit.

A checkpoint is a folder of safetensors and JSON files; a SHA-256 of each file is written last. It holds the state that
training changes (weights, optimisers, counters, the KL controller), and the facts that the run depends on: config,
data, initial models, alignkit's code. A run with different facts cannot continue from it. Random numbers come from the
seed and the step, so no generator is stored; an exception are TRL's trainers, which use torch's own generators.
"""

import contextlib
import math
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignkit.errors import NonFinite, RunError
from alignkit.folders import discard, recover, replacing
from alignkit.killpoints import reached
from alignkit.runs.records import code_hash, versions
from alignkit.storage import file_hash, plain, read_json, settings, write_json

TENSORS, STATE, FILES = "tensors.safetensors", "state.json", "files.json"  # of a checkpoint
ENDED = "ended.json"  # of the run: records that the run stopped itself
KEPT = 2  # number of complete checkpoints to keep
SHORTEST, SHARE = 1.0, 0.02  # minimum seconds between two checkpoints, and their maximum share of the time


class Resumable(Protocol):
    """An object that can be checkpointed: a PPOState, a DPOState, a Trainer's state."""

    step: int  # completed steps; -1 during a step

    def facts(self) -> Mapping:
        """What the run depends on besides its config: hashes of the initial models and of its data."""

    def state_dict(self) -> Mapping:
        """All that training changes: nested mappings and lists of tensors, numbers, text and None."""

    def load_state_dict(self, saved: Mapping) -> None:
        """Continue from the result of `state_dict`."""


class Checkpoints:
    """The two newest checkpoints of one run, in a folder.

    folder: used only for checkpoints; made when the first is written. state: the object to checkpoint, in its state
    before the first step. config: a dataclass or mapping. A run can continue only if the config, the facts of the state
    and alignkit's code are unchanged. every: seconds between two checkpoints; 0 writes one after each step; None limits
    their cost to 2 % of the time, with at most one per second.
    """

    def __init__(self, folder: str | Path, state: Resumable, config, *, every: float | None = None) -> None:
        if every is not None and not every >= 0:
            raise ValueError(f"every is {every}, expected seconds of 0 or more, or None")
        self.folder, self.state, self.every = Path(folder), state, every
        self.facts = plain({**state.facts(), "config": settings(config), "code": code_hash()}, "facts")
        self.seconds = self.cost = 0.0  # spent on checkpoints so far, and on the last one
        self._last, self._step = time.monotonic(), -1

    def latest(self) -> tuple[int, dict] | None:
        """The newest complete checkpoint: its step and its state; None if there is none. A torn checkpoint is skipped
        with a warning that names it. Raises RunError, with the differing facts, if the checkpoint belongs to another
        run."""
        for folder in self._folders():
            try:
                record = _checked(folder)
                self._compare(folder, record)
                saved = _loaded(folder, record)
            except _Torn as problem:
                warnings.warn(f"checkpoint {folder} is not whole ({problem}); the one before it is used", stacklevel=3)
                continue
            return record["step"], saved
        return None

    def resume(self) -> int:
        """Restore the state from the newest complete checkpoint; returns its step, 0 if there is none."""
        newest = self.latest()
        if newest is None:
            return 0
        step, saved = newest
        self.state.load_state_dict(saved)
        self._step = step
        return step

    def due(self) -> bool:
        """Whether it is time for the next checkpoint."""
        wait = max(SHORTEST, self.cost / SHARE) if self.every is None else self.every
        return time.monotonic() - self._last >= wait

    def offer(self, step: int) -> None:
        """Write a checkpoint if one is due; `step`: number of completed and logged steps."""
        if self.due():
            self.save(step)

    def save(self, step: int) -> None:
        """Write a checkpoint of the state after `step` steps, unless it is already the last one written."""
        if step == self._step:
            return
        begun = time.monotonic()
        tensors: dict[str, Tensor] = {}
        tree = packed(self.state.state_dict(), tensors, {})
        with replacing(self.folder / f"{step:08}") as new:
            save_file(tensors, new / TENSORS)
            reached("checkpoint.weights")
            write_json(new / STATE, {"step": step, "facts": self.facts, "threads": torch.get_num_threads(),
                                     "versions": versions(), "saved": tree})
            write_json(new / FILES, {name: file_hash(new / name) for name in (TENSORS, STATE)})
        reached("checkpoint.prune")
        for older in self._folders()[KEPT:]:
            shutil.rmtree(older, ignore_errors=True)
        now = time.monotonic()
        self._step, self._last, self.cost = step, now, now - begun
        self.seconds += self.cost

    def close(self, step: int) -> None:
        """Write a last checkpoint when a run ends or is interrupted, if the state is the one after `step` steps."""
        if step and self.state.step == step:
            self.save(step)

    def keep_batch(self, error: NonFinite) -> None:
        """Write the batch at which a run stopped, if the error contains it, to nonfinite.json beside the folder."""
        if error.batch is not None:
            write_json(self.folder.parent / "nonfinite.json",
                       {"error": str(error), "step": error.step, "batch": error.batch})

    def go_back(self, step: int) -> None:
        """Call this after the state was restored to the one after `step` steps: writes it, then deletes later
        checkpoints."""
        self._step = -1
        if step:
            self.save(step)
        for folder in self._folders():
            if int(folder.name) > step:
                discard(folder)

    def end(self, step: int, why: str) -> None:
        """Record that the run stopped itself after `step` steps, before its last step; it will not continue from
        there."""
        write_json(self.folder / ENDED, {"step": step, "why": why})

    def ended(self, step: int) -> str:
        """Why the run stopped itself after `step` steps; "" if it did not."""
        try:
            note = read_json(self.folder / ENDED)
        except (OSError, RunError):
            return ""
        return str(note.get("why", "")) if note.get("step") == step else ""

    def _folders(self) -> list[Path]:
        """The folders of checkpoints, newest step first."""
        with contextlib.suppress(OSError):
            numbered = [path for path in self.folder.iterdir() if path.name.isdecimal() and path.is_dir()]
            return sorted(numbered, key=lambda path: int(path.name), reverse=True)
        return []

    def _compare(self, folder: Path, record: Mapping) -> None:
        was, now = _flat(record["facts"]), _flat(self.facts)
        differing = [f"{name} was {_short(was.get(name))}, now {_short(now.get(name))}"
                     for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name)]
        if differing:
            raise RunError(f"{self.folder} holds an unfinished run of other settings: {'; '.join(differing)}. Take the "
                           "old ones to go on with it, or begin anew: --restart on the command line, restart=True in "
                           "the notebook's call of stage_folder")
        threads = record.get("threads")
        if threads != torch.get_num_threads():
            warnings.warn(f"{folder} was written with {threads} threads, now there are {torch.get_num_threads()}: the "
                          "run goes on, but its last bits can differ from those of an uninterrupted one", stacklevel=4)


class _Torn(Exception):
    """The reason why a checkpoint cannot be used."""


def _checked(folder: Path) -> dict:
    """The record of a checkpoint, after checking every byte of it. Raises _Torn."""
    recover(folder)
    try:
        written = read_json(folder / FILES, error=_Torn)
        for name in (TENSORS, STATE):
            if written.get(name) != file_hash(folder / name):
                raise _Torn(f"{name} has other bytes than were written")
        record = read_json(folder / STATE, error=_Torn)
    except OSError as problem:
        raise _Torn(f"{Path(problem.filename or folder).name}: {problem.strerror}") from None
    if type(record.get("step")) is not int or record["step"] != int(folder.name) or "saved" not in record:
        raise _Torn(f"{STATE} is of another checkpoint")
    if not isinstance(record.get("facts"), dict):
        raise _Torn(f"{STATE} has no facts")
    return record


def _loaded(folder: Path, record: dict) -> dict:
    """The saved state. Raises _Torn."""
    try:
        saved = unpacked(record["saved"], load_file(folder / TENSORS))
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, OverflowError) as problem:
        raise _Torn(f"its parts do not fit each other: {problem}") from None
    if not isinstance(saved, dict):
        raise _Torn(f"{STATE} holds no state")
    return saved


def packed(value: object, tensors: dict[str, Tensor], known: dict) -> object:
    """`value` as JSON, with its tensors moved to `tensors`; a tensor that occurs twice is stored once."""
    if isinstance(value, Tensor):
        tensor = value.detach()
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if place not in known or tensor.numel() == 0:
            known[place] = str(len(tensors))
            tensors[known[place]] = tensor.cpu().contiguous()
        return {"tensor": known[place]}
    if isinstance(value, Mapping):
        return {"items": [[key, packed(item, tensors, known)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [packed(item, tensors, known) for item in value]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return plain(value)


def unpacked(tree: object, tensors: Mapping[str, Tensor]) -> object:
    """The value that was given to `packed`."""
    if not isinstance(tree, dict):
        return tree
    (kind, content), = tree.items()
    if kind == "tensor":
        return tensors[content].clone()
    if kind == "items":
        return {key: unpacked(item, tensors) for key, item in content}
    if kind == "float":
        return float(content)
    return {"list": list, "tuple": tuple}[kind](unpacked(item, tensors) for item in content)


def _flat(facts: Mapping, before: str = "") -> dict[str, object]:
    """Nested facts as one level: {"config": {"seed": 0}} -> {"config.seed": 0}."""
    flat = {}
    for name, value in facts.items():
        flat |= _flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {f"{before}{name}": value}
    return flat


def _short(value: object) -> str:
    text = "absent" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
