"""Freezing, verifying and recording: what holds when a byte flips, a process dies, or a second run comes along."""

import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from alignkit import folders
from alignkit.errors import ManifestError, RunError
from alignkit.evaluate.adviser import advice
from alignkit.folders import MARK
from alignkit.formulas.intervals import Estimate
from alignkit.models.adapters import add_lora
from alignkit.models.loading import load_policy, save_model
from alignkit.runs.frozen import checkpoint_hash, freeze, lineage, verify
from alignkit.runs.records import record_seconds, start_run, versions, write_results
from alignkit.stages import RUN_FILES
from alignkit.storage import (
    append_metrics,
    config_hash,
    content_hash,
    data_hash,
    plain,
    read_metrics,
    settings,
    trim_metrics,
    write_atomically,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run with two stages: sft and ppo, each an ordinary checkpoint folder with a run's records beside it."""
    run = tmp_path_factory.mktemp("run")
    for stage, seed in (("sft", 0), ("ppo", 1)):
        save_model(*load_policy("tiny", seed=seed, device="cpu"), run / stage)
        (run / stage / "metrics.jsonl").write_text('{"step": 0}\n')
    return run / "ppo"


@pytest.fixture
def frozen(source, tmp_path):
    return freeze(source, tmp_path / "frozen", parent=source.parent / "sft", seed=3, config={"kl_coef": 0.35},
                  data_hash="d" * 64, evaluation_set_hash="e" * 64)


def test_a_frozen_checkpoint_is_the_same_model_and_says_where_it_came_from(source, frozen):
    manifest = verify(frozen)
    assert {"model.safetensors", "config.json", "tokenizer.json", "lineage.json"} <= manifest.files.keys()
    assert "metrics.jsonl" not in manifest.files
    before, after = load_policy(source)[0].state_dict(), load_policy(frozen)[0].state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    parent, own = lineage(frozen)
    assert parent["path"].endswith("sft") and parent["hash"] == checkpoint_hash(source.parent / "sft")
    assert own["hash"] == manifest.hash and own["seed"] == 3 and own["config"] == {"kl_coef": 0.35}
    assert own["config_hash"] == config_hash({"kl_coef": 0.35})
    assert own["data_hash"] == "d" * 64 and own["evaluation_set_hash"] == "e" * 64
    assert own["threads"] == torch.get_num_threads() and own["versions"] == versions()
    assert own["created"].endswith("+00:00")


def test_the_chain_survives_its_ancestors(source, frozen, tmp_path):
    child = freeze(source.parent / "sft", tmp_path / "child", stage="dpo", parent=frozen)
    for path in frozen.iterdir():
        path.unlink()
    assert [record["stage"] for record in lineage(child)] == ["sft", "ppo", "dpo"]


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_one_flipped_bit_in_any_file_is_seen_and_named(frozen):
    rng = np.random.default_rng(0)
    for name in names(frozen):
        original = (frozen / name).read_bytes()
        for _ in range(25):
            changed = bytearray(original)
            changed[rng.integers(len(changed))] ^= 1 << int(rng.integers(8))
            (frozen / name).write_bytes(changed)
            with pytest.raises(ManifestError, match=name.replace(".", r"\.")) as caught:
                verify(frozen)
            assert caught.value.files == (name,)
        (frozen / name).write_bytes(original)
    verify(frozen)


def test_truncation_deletion_and_additions_are_seen_and_named(frozen):
    for name in names(frozen):
        original = (frozen / name).read_bytes()
        for size in (0, 1, len(original) // 2, len(original) - 1):
            (frozen / name).write_bytes(original[:size])
            with pytest.raises(ManifestError, match=name.replace(".", r"\.")):
                verify(frozen)
        (frozen / name).unlink()
        with pytest.raises(ManifestError, match=rf"{name}.*is missing"):
            verify(frozen)
        (frozen / name).write_bytes(original)
    for added in ("extra.txt", "model-00002.safetensors", "deep/inside.json"):
        (frozen / added).parent.mkdir(exist_ok=True)
        (frozen / added).write_text("{}")
        with pytest.raises(ManifestError, match=f"{added} was added"):
            verify(frozen)
        (frozen / added).unlink()
    for record in RUN_FILES:  # a run's own records are not part of it
        (frozen / record).write_text("{}\n")
    verify(frozen)


def test_a_link_instead_of_a_file_is_refused(frozen, tmp_path):
    (frozen / "config.json").rename(tmp_path / "elsewhere.json")
    (frozen / "config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ManifestError, match=r"config\.json is a link"):
        verify(frozen)


def test_the_manifest_of_another_checkpoint_is_refused(source, frozen, tmp_path):
    other = freeze(source.parent / "sft", tmp_path / "other")
    (frozen / "manifest.json").write_bytes((other / "manifest.json").read_bytes())
    with pytest.raises(ManifestError, match=r"model\.safetensors has other bytes"):
        verify(frozen)
    for content in (b"", b"{}", b"[]", b'{"files": {}}', b"\xff"):
        (frozen / "manifest.json").write_bytes(content)
        with pytest.raises(ManifestError, match=r"manifest\.json is empty or was changed"):
            verify(frozen)


def test_freezing_the_same_again_does_nothing_and_anything_else_is_refused(source, frozen):
    stamp = (frozen / "manifest.json").stat().st_mtime_ns
    again = {"parent": source.parent / "sft", "seed": 3, "config": {"kl_coef": 0.35}, "data_hash": "d" * 64,
             "evaluation_set_hash": "e" * 64}
    assert freeze(source, frozen, **again) == frozen
    assert (frozen / "manifest.json").stat().st_mtime_ns == stamp
    with pytest.raises(FileExistsError, match=r"lineage\.json: seed.*never overwritten"):
        freeze(source, frozen, **{**again, "seed": 4})
    with pytest.raises(FileExistsError, match=r"model\.safetensors"):
        freeze(source.parent / "sft", frozen, **again)
    verify(frozen)
    assert names(frozen.parent) == ["frozen"], "a refused freeze leaves nothing behind"
    notes = frozen.parent / "notes"
    notes.mkdir()
    (notes / "todo.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="notes is there already"):
        freeze(source, notes)
    assert names(notes) == ["todo.txt"]


def test_files_get_the_mode_of_the_umask(source, tmp_path):
    (source / "model.safetensors").chmod(0o600)  # as safetensors itself would leave it
    for umask, mode in ((0o027, 0o640), (0o022, 0o644)):
        before = os.umask(umask)
        try:
            out = freeze(source, tmp_path / f"frozen-{umask}")
        finally:
            os.umask(before)
        assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {mode}
        assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~umask


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "rng_state.pth", "x.pkl", "model.pt2"])
def test_pickles_are_refused_unopened(source, tmp_path, name):
    copy = tmp_path / "copy"
    save_model(*load_policy(source), copy)
    (copy / name).write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    with pytest.raises(ManifestError, match=f"{name} may hold a pickle"):
        freeze(copy, tmp_path / "frozen")
    assert not (tmp_path / "frozen").exists() and not os.path.exists("canary")


def test_what_cannot_be_trusted_or_is_not_whole_is_refused(source, tmp_path):
    copy = save_model(*load_policy(source), tmp_path / "copy")
    (copy / "notes.txt").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match=r"notes\.txt is a link that leaves the folder"):
        freeze(copy, tmp_path / "frozen")
    (copy / "notes.txt").unlink()
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(json.dumps({**json.loads(config), "auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(ManifestError, match=r"auto_map.*never run"):
        freeze(copy, tmp_path / "frozen")
    (copy / "config.json").write_text(config)
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    with pytest.raises(ValueError, match=r"names '\.\./\.\./etc/passwd'; expected the plain name"):
        freeze(copy, tmp_path / "frozen")
    (copy / "model.safetensors.index.json").unlink()
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        freeze(copy, tmp_path / "frozen")
    with pytest.raises(ValueError, match="not a folder"):
        freeze(tmp_path / "nowhere", tmp_path / "frozen")
    assert names(tmp_path) == ["copy"]


def trained_lora(policy):
    adapted = add_lora(policy, rank=2)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    return adapted


def test_an_adapter_is_merged(source, tmp_path):
    policy, tokenizer = load_policy(source)
    adapted = trained_lora(policy)
    ids = torch.tensor([tokenizer("How do I shut down a demo account today?").input_ids])
    wanted = adapted(input_ids=ids).logits
    in_memory = freeze(source, tmp_path / "in-memory", model=adapted, tokenizer=tokenizer)
    assert torch.equal(adapted(input_ids=ids).logits, wanted) and hasattr(adapted, "peft_config"), "the caller's stays"
    adapted.peft_config["default"].base_model_name_or_path = str(source)
    adapted.save_pretrained(tmp_path / "adapter")
    from_folder = freeze(tmp_path / "adapter", tmp_path / "from-folder")
    for out in (in_memory, from_folder):
        verify(out)
        assert not (out / "adapter_config.json").exists()
        assert torch.allclose(load_policy(out)[0](input_ids=ids).logits, wanted, atol=1e-4)
    remote = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    remote["base_model_name_or_path"] = "some/where"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(remote))
    with pytest.raises(ValueError, match=r"adapter on 'some/where', which is not a folder here"):
        freeze(tmp_path / "adapter", tmp_path / "remote")


def test_leftovers_of_a_killed_freeze_go_and_those_of_a_living_one_stay(source, tmp_path):
    dead, living = (tmp_path / f".frozen.{MARK}-new-{number:012x}" for number in range(2))
    dead.mkdir()
    (dead / "model.safetensors").write_bytes(b"half")
    living.mkdir()
    code = ("import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); "
            "print('locked', flush=True); input()")
    with subprocess.Popen([sys.executable, "-c", code, living], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as other:
        assert other.stdout.readline() == "locked\n"
        freeze(source, tmp_path / "frozen")
        assert names(tmp_path) == [living.name, "frozen"]
        other.communicate("\n")


def test_another_freeze_of_the_same_name_leaves_a_running_one_alone(source, tmp_path, monkeypatch):
    flush = folders.flush

    def interrupted(path):
        folders.sweep(tmp_path / "frozen")  # what another process does when it begins
        flush(path)

    monkeypatch.setattr(folders, "flush", interrupted)
    verify(freeze(source, tmp_path / "frozen"))


def test_a_full_disk_leaves_nothing_half(source, tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(folders, "flush", full)
    with pytest.raises(OSError, match="No space left"):
        freeze(source, tmp_path / "frozen")
    assert names(tmp_path) == []


@pytest.mark.parametrize("point", ["copy", "flush", "rename"])
def test_a_killed_freeze_leaves_no_checkpoint_and_the_next_one_works(source, tmp_path, monkeypatch, point):
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        points = {"copy": (shutil, "copyfile"), "flush": (folders, "flush"), "rename": (os, "rename")}
        monkeypatch.setattr(*points[point], die)
        freeze(source, tmp_path / "frozen")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "frozen").exists() and len(names(tmp_path)) == 1
    verify(freeze(source, tmp_path / "frozen"))
    assert names(tmp_path) == ["frozen"]


# --- a run's records


def test_summary_has_what_others_rely_on(tmp_path):
    run = start_run(tmp_path / "run", model="tiny", data="desk", seed=7)
    write_results(run, "dpo", {"gold_mean": np.float32(0.5), "gold_ci95": (0.4, 0.6)})
    write_results(run, "sft", {"gold_mean": torch.tensor(0.25), "kl_to_sft": 0.0})
    summary = record_seconds(run, "01_sft", 12.34)
    assert summary == json.loads((run / "summary.json").read_text())
    assert list(summary) == ["versions", "seed", "model", "data", "stages", "seconds"]
    assert (summary["seed"], summary["model"], summary["data"]) == (7, "tiny", "desk")
    assert list(summary["stages"]) == ["sft", "dpo"]
    assert summary["stages"]["sft"] == {"gold_mean": 0.25, "kl_to_sft": 0.0}
    assert summary["stages"]["dpo"]["gold_ci95"] == [0.4, 0.6] and summary["seconds"] == {"01_sft": 12.34}
    assert "torch" in summary["versions"] and "python" in summary["versions"]
    assert not [path for path in run.rglob(".*")], "no temporary file is left"


def test_a_run_directory_belongs_to_one_run(tmp_path):
    run = start_run(tmp_path / "run", "tiny", "desk", 0)
    assert start_run(run, "tiny", "desk", 0) == run
    with pytest.raises(RunError, match=r"model was 'tiny', now 'gpt'; seed was 0, now 1\. Choose another"):
        start_run(run, "gpt", "desk", 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file/run cannot be made"):
        start_run(tmp_path / "file" / "run", "tiny", "desk", 0)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), np.float32("nan"), torch.tensor(float("-inf"))])
def test_no_nan_gets_into_a_record(tmp_path, number):
    with pytest.raises(ValueError, match=r"results of sft\.deep\[1\]\.kl is -?(nan|inf)"):
        write_results(tmp_path, "sft", {"deep": [0, {"kl": number}]})
    assert not (tmp_path / "summary.json").exists()
    with pytest.raises(ValueError, match=r"metrics\.objective/kl is"):
        append_metrics(tmp_path / "metrics.jsonl", {"step": 1, "objective/kl": number})
    with pytest.raises(ValueError, match=r"stage is '\.\./up'"):
        write_results(tmp_path, "../up", {})


def test_metrics_survive_a_torn_last_line(tmp_path):
    path = tmp_path / "ppo" / "metrics.jsonl"
    assert read_metrics(path) == []
    for step in range(3):
        append_metrics(path, {"step": step, "loss": step / 2})
    whole = path.read_bytes()
    rows = read_metrics(path)
    line = whole.splitlines(keepends=True)[-1]
    for cut in range(1, len(line)):
        path.write_bytes(whole[: len(whole) - cut])
        if cut > 1:  # with all but the newline the row is whole
            with pytest.warns(UserWarning, match="last line is torn"):
                assert read_metrics(path) == rows[:2]
            assert path.read_bytes() == whole[: len(whole) - cut], "reading changes nothing: a run may be writing"
            with pytest.warns(UserWarning, match=r"was torn .* removed"):
                append_metrics(path, rows[2])
        else:
            assert read_metrics(path) == rows
            append_metrics(path, {"step": 3})
            assert read_metrics(path) == [*rows, {"step": 3}]
            path.write_bytes(whole)
        assert path.read_bytes() == whole
    assert trim_metrics(path, last_step=1) == rows[:2] == read_metrics(path)
    path.write_bytes(b'{"step": 0}\nrubbish\n{"step": 1}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl:2: not a JSON object"):
        read_metrics(path)


def test_a_crash_while_replacing_a_file_keeps_the_old_one(tmp_path, monkeypatch):
    write_atomically(tmp_path / "a.json", "old")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        write_atomically(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old" and names(tmp_path) == ["a.json"]


def test_hashes_depend_on_the_content_alone():
    @dataclass
    class Config:
        beta: float = 0.1
        steps: int = 3

    assert config_hash(Config()) == config_hash({"steps": 3, "beta": 0.1})
    assert config_hash(Config()) != config_hash(Config(beta=0.2))
    assert settings({"clip": float("inf"), "depth": {"beta": 1}}) == {"clip": "inf", "depth": {"beta": 1}}
    assert config_hash({"clip": float("inf")}) != config_hash({"clip": 1.0})
    with pytest.raises(ValueError, match=r"config\.beta is nan"):
        config_hash({"beta": float("nan")})
    rows = [{"prompt": "é", "chosen": "a"}, {"prompt": "b", "chosen": "c"}]
    assert data_hash(rows) == data_hash(dict(reversed(row.items())) for row in rows)
    assert data_hash(rows) != data_hash(rows[::-1]) != data_hash(rows[:1])
    assert content_hash({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()
    with pytest.raises(TypeError, match=r"value\.a is of type object"):
        plain({"a": object()})


# --- advice


def evaluation(name="ppo", **values):
    """Stands for an Evaluation: a value, or (value, low, high), for each metric."""
    base = {"eos_rate": 0.95, "entropy": 1.0, "kl_to_sft": 1.0, "proxy_mean": 0.5}
    metrics = {metric: value if isinstance(value, tuple) else (value, value - 0.01, value + 0.01)
               for metric, value in {**base, **values}.items() if value is not None}
    return SimpleNamespace(name=name, metrics={metric: Estimate(*value) for metric, value in metrics.items()})


def comparison(*evaluations):
    found = {each.name: each for each in evaluations}

    def difference(a, b, metric):
        change = found[b].metrics[metric].value - found[a].metrics[metric].value
        return Estimate(change, change - 0.02, change + 0.02)

    return SimpleNamespace(evaluations=found, difference=difference)


DESK = {"gold_mean": 0.5, "risky_failure_rate": 0.02, "over_refusal_rate": 0.01, "paraphrase_agreement": 0.7}


@pytest.mark.parametrize("evaluated, sentence", [
    (evaluation(**{**DESK, "risky_failure_rate": (0.12, 0.08, 0.17)}),
     "Risky failures are still 12.0% [8.0%, 17.0%] in ppo: more PPO"),
    (evaluation(**{**DESK, "risky_failure_rate": (0.08, 0.03, 0.14)}), "cannot be told from 6%: evaluate on more"),
    (comparison(evaluation("sft", **{**DESK, "proxy_mean": 0.0}), evaluation(**{**DESK, "over_refusal_rate": 0.2})),
     "Over-refusal grew by 19.0% [17.0%, 21.0%] from sft to ppo"),
    (comparison(evaluation("sft", **{**DESK, "proxy_mean": 0.0, "over_refusal_rate": 0.2}), evaluation("ppo", **DESK),
                evaluation("dpo", **{**DESK, "over_refusal_rate": 0.08})),
     "Over-refusal grew by 7.0% [5.0%, 9.0%] from ppo to dpo"),  # though it is below SFT's
    (comparison(*(evaluation(name, **{**DESK, "proxy_mean": 0.3 * number, "over_refusal_rate": 0.01 + 0.015 * number})
                  for number, name in enumerate(("sft", "ppo", "dpo")))),
     "Over-refusal grew by 3.0% [1.0%, 5.0%] from sft to dpo"),  # in two steps, of which neither can be told from 0
    (comparison(evaluation("frozen", **DESK), evaluation("dpo", **{**DESK, "gold_mean": 0.7})),
     "Nothing here asks for more training: freeze dpo."),  # the proxy stands still, gold rose
    (comparison(evaluation("sft", **{**DESK, "gold_mean": 0.0, "proxy_mean": 0.0}), evaluation("ppo20", **DESK),
                evaluation("ppo80", **{**DESK, "gold_mean": 0.1, "proxy_mean": 2.0, "kl_to_sft": 6.0})),
     "ppo80 is over-optimised at a KL of 6.0 nats: its proxy rose while gold fell. Go back to ppo20"),
    (comparison(evaluation("sft", **DESK), evaluation(**DESK)), "cannot be told from that of sft"),
    (comparison(evaluation("sft", **DESK), evaluation(**{**DESK, "gold_mean": 0.1, "proxy_mean": 0.1})),
     "Nothing here asks for more training: freeze sft."),  # worse in both: not over-optimised, just worse
    (comparison(evaluation("sft", **{**DESK, "proxy_mean": 0.0, "entropy": 2.0}),
                evaluation(**{**DESK, "entropy": 0.3})),
     "Entropy fell from 2.00 to 0.30"),
    (evaluation(kl_to_sft=7.0), "7.0 nats from where it started, and there is no gold"),
    (evaluation(**{**DESK, "eos_rate": 0.5}), "Only 50% [49%, 51%] of the responses of ppo end by themselves"),
    (evaluation(**{**DESK, "paraphrase_agreement": 0.4}), "DPO on pairs that it samples is the next stage"),
    (evaluation(**DESK), "Nothing here asks for more training: freeze ppo."),
    (evaluation(proxy_mean=None), "freeze ppo"),
    (comparison(evaluation("sft", **{**DESK, "proxy_mean": 0.0, "gold_mean": 0.0}), evaluation(**DESK)), "freeze ppo"),
])
def test_advice(evaluated, sentence):
    said = advice(evaluated)
    assert len(said) == 1 and sentence in said[0]


def test_everything_imports_without_posix_and_windows_locks_stop_a_second_one(tmp_path):
    code = """
import importlib, pkgutil, subprocess, sys, types
import datasets, jupyter_client, papermill, peft, torch, transformers, trl  # they see the real system
from pathlib import Path
held = set()
def locking(handle, mode, length):
    if "locked" in held: raise PermissionError(13, "locked")
    held.add("locked")
sys.modules["fcntl"] = None
sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
import alignkit
for module in pkgutil.walk_packages(alignkit.__path__, "alignkit."):
    if not module.name.endswith("__main__"): importlib.import_module(module.name)
from alignkit.storage import locked
folder = Path(sys.argv[1])
with locked(folder):
    assert (folder.parent / f".{folder.name}.lock").exists() and not any(folder.iterdir())
    try:
        with locked(folder): sys.exit("locked twice")
    except BlockingIOError: pass
"""
    (tmp_path / "folder").mkdir()
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "folder"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
