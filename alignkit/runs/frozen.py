"""Frozen checkpoints: freeze a checkpoint, verify that it has not changed, and show its lineage.

A frozen checkpoint is a folder of safetensors, JSON and tokenizer text files with a SHA-256 manifest; pickles are never
read or written. Every checkpoint is loaded once before it is frozen. It is written under a temporary name and then
renamed, so a killed process leaves a complete checkpoint or none.
"""

import json
import os
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from alignkit.errors import ManifestError, NonFinite
from alignkit.folders import recover, replacing
from alignkit.killpoints import reached
from alignkit.models import gate
from alignkit.models.loading import adapted_policy, load_policy, save_model
from alignkit.runs.records import versions
from alignkit.stages import RUN_FILES
from alignkit.storage import config_hash, content_hash, file_hash, parse_json, read_json, settings

MANIFEST = "manifest.json"
LINEAGE = "lineage.json"


@dataclass(frozen=True)
class Manifest:
    """The files of a frozen checkpoint: name -> {"sha256", "size" in bytes}; `hash` identifies the whole."""

    files: dict[str, dict]

    @property
    def hash(self) -> str:
        return content_hash(self.files)

    def to_bytes(self) -> bytes:
        """The only form of manifest.json that `verify` accepts, so no byte of it can change unnoticed."""
        return json.dumps({"hash": self.hash, "files": self.files}, indent=1, sort_keys=True).encode() + b"\n"


def freeze(source: str | Path, out: str | Path, *, stage: str = "ppo", parent: str | Path | None = None,
           seed: int | None = None, config=None, data_hash: str | None = None, evaluation_set_hash: str | None = None,
           model=None, tokenizer=None) -> Path:
    """Make a frozen checkpoint `out` of the policy in `source`; returns its path.

    `out` gets the weights (LoRA adapters merged), the tokenizer, lineage.json (its origin) and, last, manifest.json.
    The copy is loaded once, written under a temporary name, flushed to the disk, and then renamed, so `out` is complete
    or absent. Freezing the same bytes from the same parent again has no effect.

    source: a checkpoint folder, or a folder with a LoRA adapter whose base is a local folder. config: a dataclass or
    mapping, stored completely with its hash. model, tokenizer: freeze these objects instead of the files in `source`.
    Raises FileExistsError if `out` holds anything else, NonFinite on weights with NaN or infinity, ManifestError if
    `source` has no complete weights, or contains pickles, model code, or links that leave it.
    """
    source, out = Path(source), Path(out)
    recover(source)
    try:
        with replacing(out, overwrite=False) as new:
            # The files of the model.
            if model is not None or (source / gate.ADAPTER).exists():
                _save_merged(source, new, model, tokenizer)
            else:
                for path in _checkpoint_files(source):
                    shutil.copyfile(path, new / path.name)  # not its mode: a source of mode 0600 is readable here
            _open(new, source)
            reached("freeze.copied")
            # Their origin, then their hashes.
            record = _lineage_record(source, out, parent, stage=stage, seed=seed, config=config, data_hash=data_hash,
                                     evaluation_set_hash=evaluation_set_hash)
            (new / LINEAGE).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            manifest = Manifest({path.name: _fingerprint(path) for path in sorted(new.iterdir())})
            if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
                _refuse_unless_same(out, manifest, record)
                raise _FrozenAlready
            (new / MANIFEST).write_bytes(manifest.to_bytes())
            reached("freeze.manifest")
    except _FrozenAlready:
        pass
    return out


class _FrozenAlready(Exception):
    """The folder already holds exactly these bytes."""


def verify(directory: str | Path) -> Manifest:
    """Check every byte of a frozen checkpoint against its manifest; returns the manifest.

    Raises ManifestError that names each missing, added or changed file, and if the checkpoint does not pass the checks
    for model folders. Besides the listed files, only a run's own records (RUN_FILES) may be in the folder.
    """
    directory = Path(directory)
    recover(directory)
    manifest = _manifest(directory)
    try:
        present = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*"))
                   if path.is_symlink() or not path.is_dir()}
        problems = {name: problem for name, expected in manifest.files.items()
                    if (problem := _difference(present.get(name), expected))}
    except OSError as error:
        raise ManifestError(f"{directory} cannot be read: {gate.reason(error)}") from error
    for name in present.keys() - manifest.files.keys() - {MANIFEST, *RUN_FILES}:
        problems[name] = "was added after freezing"
    if problems:
        listed = "; ".join(f"{name} {reason}" for name, reason in sorted(problems.items()))
        raise ManifestError(f"{directory} is not what was frozen: {listed}", sorted(problems))
    gate.check_model_folder(directory)
    return manifest


def _manifest(directory: Path) -> Manifest:
    """The manifest of a frozen checkpoint; only its canonical form is accepted."""
    try:
        written = (directory / MANIFEST).read_bytes()
    except (OSError, ValueError):
        raise ManifestError(f"{directory}: {MANIFEST} is missing or cannot be read; this is not a frozen checkpoint, "
                            "or not a whole one (make one with `alignkit freeze`)", [MANIFEST]) from None
    try:
        files = parse_json(written, where=MANIFEST, error=ManifestError).get("files")
        sound = (isinstance(files, dict) and files != {}
                 and all(isinstance(entry, dict) and entry.keys() == {"sha256", "size"} and type(entry["size"]) is int
                         and isinstance(entry["sha256"], str) for entry in files.values())
                 and Manifest(files).to_bytes() == written)
    except ValueError:  # ManifestError, or text that cannot be written (a lone surrogate)
        sound = False
    if not sound:
        raise ManifestError(f"{directory}: {MANIFEST} is empty or was changed", [MANIFEST])
    return Manifest(files)


def _difference(path: Path | None, expected: dict) -> str | None:
    """A description of what is wrong with a file of a frozen checkpoint; None if it is correct."""
    if path is None:
        return "is missing"
    if path.is_symlink():
        return "is a link, expected a file"
    if not path.is_file():
        return "is no ordinary file"
    if path.stat().st_size != expected["size"]:
        return f"has {path.stat().st_size} bytes, expected {expected['size']}"
    if file_hash(path) != expected["sha256"]:
        return "has other bytes than when it was frozen (SHA-256 differs)"
    return None


def lineage(directory: str | Path) -> list[dict]:
    """The origin of a frozen checkpoint: a record for each checkpoint, oldest ancestor first, `directory` last.

    The ancestors' records are stored in the checkpoint, so the chain stays readable when the ancestors are moved or
    deleted. Verifies the checkpoint first.
    """
    manifest = verify(directory)
    record = read_lineage(directory)
    return [*record.pop("ancestors"), {"path": str(directory), "hash": manifest.hash, **record}]


def read_lineage(directory: str | Path) -> dict:
    """The lineage.json of a checkpoint, without verification. Raises ManifestError, naming the file, if it is
    invalid."""
    path = Path(directory) / LINEAGE
    try:
        record = read_json(path, error=ManifestError)
    except FileNotFoundError:
        raise ManifestError(f"{path} is missing; make the frozen checkpoint again with `alignkit freeze`",
                            [LINEAGE]) from None
    ancestors, frozen_with = record.get("ancestors"), record.get("evaluation_set_hash")
    if not isinstance(ancestors, list) or not all(isinstance(each, dict) for each in ancestors):
        raise ManifestError(f"{path} has no list of ancestors; make the frozen checkpoint again with `alignkit freeze`",
                            [LINEAGE])
    if not isinstance(frozen_with, str | None):
        raise ManifestError(f"{path} has evaluation_set_hash {frozen_with!r}, expected text", [LINEAGE])
    return record


def checkpoint_hash(directory: str | Path) -> str:
    """Hash that identifies a checkpoint: its manifest's if it is frozen (verified first), else one of all its files."""
    directory = Path(directory)
    if (directory / MANIFEST).exists():
        return verify(directory).hash
    return content_hash({path.name: _fingerprint(path) for path in _checkpoint_files(directory)})


def _checkpoint_files(source: Path) -> list[Path]:
    """The files of `source` that make up a model; refuses files that must not be trusted."""
    _refuse_pickles(source)
    shards = gate.check_model_folder(source).files
    return [path for path in sorted(source.iterdir())
            if path in shards or (gate.CHECKPOINT_FILES.fullmatch(path.name) and path.suffix != ".safetensors")]


def _refuse_pickles(source: Path) -> None:
    if not source.is_dir():
        raise ManifestError(f"source is {str(source)!r}, which is not a folder")
    for path in sorted(source.iterdir()):
        if path.suffix in gate.PICKLES:
            raise ManifestError(f"{path} may hold a pickle, which can run code when it is opened; only safetensors are "
                                "accepted (save the model again with save_pretrained)", [path.name])


def _open(new: Path, source: Path) -> None:
    """Load the model that is about to be frozen; errors name `source`."""
    try:
        load_policy(new, device="cpu")
    except ValueError as error:
        kind = type(error) if type(error) is NonFinite else ManifestError
        raise kind(str(error).replace(str(new), str(source))) from error


def _save_merged(source: Path, new: Path, model, tokenizer) -> None:
    if model is None:
        _refuse_pickles(source)
        model, base_tokenizer = adapted_policy(source)
        tokenizer = tokenizer or base_tokenizer
    if tokenizer is None:
        raise ValueError("tokenizer is None, expected the tokenizer of `model`")
    saved = save_model(model, tokenizer, new / "saved")
    for path in list(saved.iterdir()):
        path.rename(new / path.name)
    saved.rmdir()


def _lineage_record(source: Path, out: Path, parent: str | Path | None, *, stage: str, seed: int | None, config,
                    data_hash: str | None, evaluation_set_hash: str | None) -> dict:
    """The content of lineage.json: the origin of the checkpoint, and its settings and versions."""
    config = None if config is None else settings(config)
    return {
        "stage": stage, "source": os.path.relpath(source, out.parent),
        "ancestors": [] if parent is None else _ancestors(Path(parent), out), "seed": seed, "config": config,
        "config_hash": None if config is None else config_hash(config), "data_hash": data_hash,
        "evaluation_set_hash": evaluation_set_hash, "versions": versions(), "threads": torch.get_num_threads(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _ancestors(parent: Path, out: Path) -> list[dict]:
    """The parent's own chain, ending with the parent; its path is relative to the parent folder of `out`."""
    if (parent / MANIFEST).exists():
        chain = lineage(parent)
    else:
        chain = [{"stage": parent.name, "hash": checkpoint_hash(parent)}]
    return [*chain[:-1], {**chain[-1], "path": os.path.relpath(parent, out.parent)}]


def _refuse_unless_same(out: Path, manifest: Manifest, record: dict) -> None:
    old = verify(out) if (out / MANIFEST).exists() else Manifest({})
    differing = {name for name in (old.files.keys() | manifest.files.keys()) - {LINEAGE}
                 if old.files.get(name) != manifest.files.get(name)}
    was = read_lineage(out) if old.files else {}
    facts = record.keys() - {"created", "threads", "versions"}
    differing |= {f"{LINEAGE}: {key}" for key in facts if was.get(key) != record[key]}
    if differing:
        raise FileExistsError(f"{out} is there already and would change ({', '.join(sorted(differing))}); a frozen "
                              "checkpoint is never overwritten: freeze to another folder, or delete this one first")


def _fingerprint(path: Path) -> dict:
    return {"sha256": file_hash(path), "size": path.stat().st_size}
