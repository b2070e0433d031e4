"""Frozen checkpoints: freeze one, prove that it did not change, and tell where it came from.

A frozen checkpoint is a folder of safetensors, JSON and tokenizer text with a SHA-256 manifest; nothing here reads or
writes a pickle. What is frozen has been opened. It is written under another name, then renamed, so that a killed
process leaves a whole one or none.
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
        """The only spelling of manifest.json that `verify` accepts, so that no byte of it can change unseen."""
        return json.dumps({"hash": self.hash, "files": self.files}, indent=1, sort_keys=True).encode() + b"\n"


def freeze(source: str | Path, out: str | Path, *, stage: str = "ppo", parent: str | Path | None = None,
           seed: int | None = None, config=None, data_hash: str | None = None, evaluation_set_hash: str | None = None,
           model=None, tokenizer=None) -> Path:
    """Make a frozen checkpoint `out` of the policy in `source`; returns its path.

    `out` gets the weights (LoRA adapters merged), the tokenizer, lineage.json (where it came from) and, last,
    manifest.json. The copy is loaded before it is certified, written under a temporary name, flushed to the disk, then
    renamed: `out` is whole or absent. Freezing the same bytes from the same parent again does nothing.

    source: a checkpoint folder, or a folder with a LoRA adapter whose base is a local folder. config: a dataclass or
    mapping, stored whole with its hash. model, tokenizer: freeze these objects instead of the files in `source`. Raises
    FileExistsError if `out` holds anything else, NonFinite on weights with NaN or infinity, ManifestError if `source`
    has no weights, or ones that are not whole, or has pickles, model code of its own, or links that leave it.
    """
    source, out = Path(source), Path(out)
    recover(source)
    try:
        with replacing(out, overwrite=False) as new:
            # the files of the model
            if model is not None or (source / gate.ADAPTER).exists():
                _save_merged(source, new, model, tokenizer)
            else:
                for path in _checkpoint_files(source):
                    shutil.copyfile(path, new / path.name)  # not its mode: a source of mode 0600 is readable here
            _open(new, source)
            reached("freeze.copied")
            # where they come from, then what they are
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
    """The folder holds these very bytes already."""


def verify(directory: str | Path) -> Manifest:
    """Check every byte of a frozen checkpoint against its manifest; returns the manifest.

    Raises ManifestError that names each file that is missing, was added, or has another size or hash, and if what was
    frozen does not pass the gate before every model folder. Only a run's own records (RUN_FILES) may lie beside the
    files that the manifest lists.
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
    """The manifest of a frozen checkpoint, in its only spelling."""
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
    """What is wrong with a file of a frozen checkpoint, in words; None if nothing is."""
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
    """Where a frozen checkpoint came from: a record for each checkpoint, oldest ancestor first, `directory` last.

    The ancestors are stored in the checkpoint, so the chain stays readable when they have been moved or deleted.
    Verifies first.
    """
    manifest = verify(directory)
    record = read_lineage(directory)
    return [*record.pop("ancestors"), {"path": str(directory), "hash": manifest.hash, **record}]


def read_lineage(directory: str | Path) -> dict:
    """The lineage.json of a checkpoint, unverified. Raises ManifestError, naming it, if it is not such a record."""
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
    """What identifies a checkpoint: its manifest's hash if it is frozen (verified first), else one of all its files."""
    directory = Path(directory)
    if (directory / MANIFEST).exists():
        return verify(directory).hash
    return content_hash({path.name: _fingerprint(path) for path in _checkpoint_files(directory)})


def _checkpoint_files(source: Path) -> list[Path]:
    """The files of `source` that make a model, after refusing what must not be trusted."""
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
    """Load what is about to be certified; errors name `source`."""
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
    """What lineage.json says: where the checkpoint comes from, and under which settings and versions it was made."""
    config = None if config is None else settings(config)
    return {
        "stage": stage, "source": os.path.relpath(source, out.parent),
        "ancestors": [] if parent is None else _ancestors(Path(parent), out), "seed": seed, "config": config,
        "config_hash": None if config is None else config_hash(config), "data_hash": data_hash,
        "evaluation_set_hash": evaluation_set_hash, "versions": versions(), "threads": torch.get_num_threads(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _ancestors(parent: Path, out: Path) -> list[dict]:
    """The parent's own chain, ending with the parent; its path is relative to the folder that `out` is in."""
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
