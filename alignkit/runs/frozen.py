"""Frozen checkpoints: freeze one, prove that it did not change, and tell where it came from.

A frozen checkpoint is a folder of safetensors, JSON and tokenizer text with a SHA-256 manifest; nothing here reads or
writes a pickle. It is written under another name, then renamed, so that a killed process leaves a whole one or none.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from alignkit.errors import ManifestError
from alignkit.models.loading import load_policy, save_model
from alignkit.runs.records import versions
from alignkit.stages import RUN_FILES
from alignkit.storage import config_hash, content_hash, flush, locked, settings, write_atomically

MANIFEST = "manifest.json"
LINEAGE = "lineage.json"
PICKLES = (".bin", ".pt", ".pt2", ".pth", ".pkl", ".pickle", ".ckpt")
CHECKPOINT_FILES = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|config\.json|generation_config\.json"
    r"|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|tokenizer\.model|spiece\.model|chat_template\.(jinja|json)"
)


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
    manifest.json. Written under `<out>.tmp-<id>`, flushed to the disk, then renamed: `out` is whole or absent. Freezing
    the same bytes from the same parent again does nothing.

    source: a checkpoint folder, or a folder with a LoRA adapter whose base is a local folder. config: a dataclass or
    mapping, stored whole with its hash. model, tokenizer: freeze these objects instead of the files in `source`. Raises
    FileExistsError if `out` holds anything else, ManifestError if `source` has no weights, or has pickles, model code
    of its own, or links that leave it.
    """
    source, out = Path(source), Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    _sweep(out)
    temporary = out.with_name(f"{out.name}.tmp-{uuid.uuid4().hex[:12]}")
    temporary.mkdir()
    try:
        with locked(temporary):  # until the rename: tells `_sweep` that a living process is at work here
            # the files of the model
            if model is not None or (source / "adapter_config.json").exists():
                _save_merged(source, temporary, model, tokenizer)
            else:
                for path in _checkpoint_files(source):
                    shutil.copyfile(path, temporary / path.name)  # not its mode: a source of mode 0600 is readable here
            # where they come from, then what they are
            record = _lineage_record(source, out, parent, stage=stage, seed=seed, config=config, data_hash=data_hash,
                                     evaluation_set_hash=evaluation_set_hash)
            (temporary / LINEAGE).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            manifest = Manifest({path.name: _fingerprint(path) for path in sorted(temporary.iterdir())})
            if out.exists() and any(out.iterdir()):
                _refuse_unless_same(out, manifest, record)
                return out
            # the whole folder on the disk before it gets its name
            write_atomically(temporary / MANIFEST, manifest.to_bytes())
            for path in [*temporary.iterdir(), temporary]:
                flush(path)
            os.rename(temporary, out)
            flush(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def verify(directory: str | Path) -> Manifest:
    """Check every byte of a frozen checkpoint against its manifest; returns the manifest.

    Raises ManifestError that names each file that is missing, was added, or has another size or hash. Only a run's own
    records (RUN_FILES) may lie beside the files that the manifest lists.
    """
    directory = Path(directory)
    try:
        written = (directory / MANIFEST).read_bytes()
    except OSError:
        raise ManifestError(f"{directory}: {MANIFEST} is missing or cannot be read; this is not a frozen checkpoint, "
                            "or not a whole one (make one with `alignkit freeze`)", [MANIFEST]) from None
    try:
        manifest = Manifest(dict(json.loads(written)["files"]))
        sound = manifest.to_bytes() == written and manifest.files
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise ManifestError(f"{directory}: {MANIFEST} is empty or was changed", [MANIFEST])
    present = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*"))
               if path.is_symlink() or not path.is_dir()}
    problems = {}
    for name, expected in manifest.files.items():
        path = present.get(name)
        if path is None:
            problems[name] = "is missing"
        elif path.is_symlink():
            problems[name] = "is a link, expected a file"
        elif path.stat().st_size != expected["size"]:
            problems[name] = f"has {path.stat().st_size} bytes, expected {expected['size']}"
        elif _sha256(path) != expected["sha256"]:
            problems[name] = "has other bytes than when it was frozen (SHA-256 differs)"
    for name in present.keys() - manifest.files.keys() - {MANIFEST, *RUN_FILES}:
        problems[name] = "was added after freezing"
    if problems:
        listed = "; ".join(f"{name} {reason}" for name, reason in sorted(problems.items()))
        raise ManifestError(f"{directory} is not what was frozen: {listed}", sorted(problems))
    return manifest


def lineage(directory: str | Path) -> list[dict]:
    """Where a frozen checkpoint came from: a record for each checkpoint, oldest ancestor first, `directory` last.

    The ancestors are stored in the checkpoint, so the chain stays readable when they have been moved or deleted.
    Verifies first.
    """
    manifest = verify(directory)
    record = json.loads((Path(directory) / LINEAGE).read_text(encoding="utf-8"))
    return [*record.pop("ancestors"), {"path": str(directory), "hash": manifest.hash, **record}]


def checkpoint_hash(directory: str | Path) -> str:
    """What identifies a checkpoint: its manifest's hash if it is frozen (verified first), else one of all its files."""
    directory = Path(directory)
    if (directory / MANIFEST).exists():
        return verify(directory).hash
    return content_hash({path.name: _fingerprint(path) for path in _checkpoint_files(directory)})


def _checkpoint_files(source: Path) -> list[Path]:
    """The files of `source` that make a model, after refusing what must not be trusted."""
    _refuse_unsafe(source)
    files = [path for path in sorted(source.iterdir()) if CHECKPOINT_FILES.fullmatch(path.name) and path.is_file()]
    names = {path.name for path in files}
    index = source / "model.safetensors.index.json"
    wanted = set(json.loads(index.read_text())["weight_map"].values()) if index.name in names else {"model.safetensors"}
    for name in sorted(wanted | {"config.json"}):
        if name not in names:
            raise ManifestError(f"{source} has no {name}, so it is not a whole checkpoint (it has "
                                f"{', '.join(sorted(names)) or 'nothing'})", [name])
    return files


def _refuse_unsafe(source: Path) -> None:
    if not source.is_dir():
        raise ManifestError(f"source is {str(source)!r}, which is not a folder")
    for path in sorted(source.iterdir()):
        if path.is_symlink() and not path.resolve().is_relative_to(source.resolve()):
            raise ManifestError(f"{path} is a link that leaves the folder (to {path.resolve()}); copy the files",
                                [path.name])
        if path.suffix in PICKLES:
            raise ManifestError(f"{path} may hold a pickle, which can run code when it is opened; only safetensors are "
                                "accepted (save the model again with save_pretrained)", [path.name])
        if path.name == "config.json" and "auto_map" in json.loads(path.read_text(encoding="utf-8")):
            raise ManifestError(f"{path} points to model code of its own (auto_map), which is never run", [path.name])


def _save_merged(source: Path, temporary: Path, model, tokenizer) -> None:
    if model is None:
        from peft import PeftModel

        _refuse_unsafe(source)
        adapter = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
        base = adapter.get("base_model_name_or_path") or ""
        if not Path(base).is_dir():
            raise ManifestError(f"{source} is an adapter on {base!r}, which is not a folder here; pass the adapted "
                                "model as model=…, or merge it first (peft's merge_and_unload, then save_pretrained)")
        base_model, base_tokenizer = load_policy(base, device="cpu")
        model, tokenizer = PeftModel.from_pretrained(base_model, source), tokenizer or base_tokenizer
    if tokenizer is None:
        raise ValueError("tokenizer is None, expected the tokenizer of `model`")
    saved = save_model(model, tokenizer, temporary / "saved")
    for path in list(saved.iterdir()):
        path.rename(temporary / path.name)
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
    was = json.loads((out / LINEAGE).read_text(encoding="utf-8")) if old.files else {}
    facts = record.keys() - {"created", "threads", "versions"}
    differing |= {f"{LINEAGE}: {key}" for key in facts if was.get(key) != record[key]}
    if differing:
        raise FileExistsError(f"{out} is there already and would change ({', '.join(sorted(differing))}); a frozen "
                              "checkpoint is never overwritten: freeze to another folder, or delete this one first")


def _sweep(out: Path) -> None:
    """Remove what killed freezes of `out` left behind; a folder that a living process has locked stays."""
    for leftover in out.parent.glob(f"{out.name}.tmp-*"):
        with contextlib.suppress(BlockingIOError), locked(leftover):
            shutil.rmtree(leftover, ignore_errors=True)


def _fingerprint(path: Path) -> dict:
    return {"sha256": _sha256(path), "size": path.stat().st_size}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
