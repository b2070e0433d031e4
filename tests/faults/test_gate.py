"""Faults of model folders: what a stranger's folder could do, what is saved or frozen and cannot be loaded again."""

import hashlib
import json
import math
import os
import pickle
import random
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from alignkit import killpoints
from alignkit.errors import AlignkitError, ManifestError, NonFinite, RunError
from alignkit.evaluate.comparison import compare_directories
from alignkit.folders import MARK
from alignkit.models import gate
from alignkit.models.adapters import add_lora
from alignkit.models.gate import check_model_folder
from alignkit.models.heads import reward_model_from
from alignkit.models.loading import adapted_policy, load_policy, save_model
from alignkit.reward import RewardScorer, load_reward
from alignkit.runs import frozen as frozen_module
from alignkit.runs.frozen import MANIFEST, Manifest, freeze, lineage, verify
from alignkit.storage import write_json

sys.path.insert(0, str(Path(__file__).parent))
from mutants_of_a_folder import write_mutant


@pytest.fixture(scope="module")
def tiny():
    return load_policy("tiny", seed=1, device="cpu")


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    return save_model(*tiny, tmp_path_factory.mktemp("gate") / "policy")


@pytest.fixture(scope="module")
def scored(tiny, tmp_path_factory):
    return RewardScorer(reward_model_from(tiny[0]), tiny[1], 0.5, 2.0).save(tmp_path_factory.mktemp("gate") / "reward")


@pytest.fixture
def folder(saved, tmp_path):
    """A folder of one's own with the tiny policy in it."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


class Canary:
    """A pickle that writes a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shard(folder, names=("a", "b")):
    """Split the weights over files of these names, with an index; returns the index."""
    tensors = load_file(folder / gate.WEIGHTS)
    (folder / gate.WEIGHTS).unlink()
    shards = {name: f"model-0000{number}-of-0000{len(names)}.safetensors" for number, name in enumerate(names, 1)}
    where = {tensor: shards[names[number % len(names)]] for number, tensor in enumerate(sorted(tensors))}
    for file in shards.values():
        own = {tensor: tensors[tensor] for tensor in where if where[tensor] == file}
        save_file(own, folder / file, {"format": "pt"})
    write_json(folder / gate.INDEX, {"metadata": {}, "weight_map": where})
    return where


def everywhere(folder, tmp_path, message, kind=ValueError):
    """Load, freeze and compare refuse a folder with this message, and nothing is left behind."""
    with pytest.raises(kind, match=message):
        load_policy(folder, device="cpu")
    with pytest.raises(kind, match=message):
        freeze(folder, tmp_path / "frozen")
    with pytest.raises(kind, match=message):
        compare_directories([folder])
    assert not (tmp_path / "frozen").exists() and not list(tmp_path.glob(f".*{MARK}*"))


# 10, 24: what is certified has been opened; what is saved can be loaded


@pytest.mark.parametrize("size", [0, 1, 3, 1000, 0.5, -1])
def test_10_truncated_weights_are_neither_loaded_nor_frozen(folder, tmp_path, size):
    content = (folder / gate.WEIGHTS).read_bytes()
    (folder / gate.WEIGHTS).write_bytes(content[: int(len(content) * size) if size == 0.5 else size])
    everywhere(folder, tmp_path, r"model\.safetensors is no whole safetensors file")


@pytest.mark.parametrize("content", ["[]", '"x"', "null", "5", "", "[" * 100_000, '{"a":' * 70 + "1" + "}" * 70,
                                     "\ufeff{}", '{"model_type": 5}', "{}", '{"model_type": NaN}'])
def test_10_a_config_that_is_none_is_neither_loaded_nor_frozen(folder, tmp_path, content):
    (folder / "config.json").write_text(content)
    everywhere(folder, tmp_path, r"config\.json ", ManifestError)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_24_weights_that_are_not_finite_are_not_saved(tmp_path, value):
    policy, tokenizer = load_policy("tiny", device="cpu")
    old = save_model(policy, tokenizer, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    with torch.no_grad():
        policy.model.layers[1].mlp.fc1.weight[3, 2] = value
    with pytest.raises(NonFinite, match=r"model\.layers\.1\.mlp\.fc1\.weight has NaN or infinity"):
        save_model(policy, tokenizer, old)
    with pytest.raises(NonFinite, match=r"fc1\.weight"):
        freeze(old, tmp_path / "frozen", model=policy, tokenizer=tokenizer)
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before and os.listdir(tmp_path) == ["model"]


def test_24_weights_that_are_not_finite_are_not_loaded_frozen_or_compared(folder, tmp_path):
    shard(folder)
    file = folder / "model-00002-of-00002.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[-1] = math.nan
    save_file(tensors, file, {"format": "pt"})
    everywhere(folder, tmp_path, rf"NaN or infinity in '{name}' \({file.name}\)", NonFinite)


def test_24_the_sum_of_finite_weights_may_overflow():
    assert gate.first_not_finite([("large", torch.full((10,), 3e38)), ("empty", torch.zeros(0)),
                                  ("half", torch.full((9,), 6e4, dtype=torch.float16))]) is None
    assert gate.first_not_finite([("a", torch.ones(3)), ("b", torch.tensor([math.inf, -math.inf]))]) == "b"


def test_24_scores_that_are_not_finite_name_the_prompt(scored):
    scorer = RewardScorer.load(scored, device="cpu")
    prompts, responses = ["How do I shut down a demo account today?"] * 3, ["a", " I", "b"]
    assert scorer.raw(prompts, responses).isfinite().all()
    with torch.no_grad():
        scorer.model.score.weight.fill_(math.nan)
    with pytest.raises(NonFinite, match=r"score of prompt 0 .* is nan .*3 of 3"):
        scorer(prompts, responses)


@pytest.mark.parametrize("norm", [5, [], {}, {"mean": 0.0}, {"mean": "a", "std": 1.0}, {"mean": 0.0, "std": 0.0},
                                  {"mean": 0.0, "std": -1}, {"mean": None, "std": 1.0}, {"mean": True, "std": 1.0},
                                  {"mean": 10**400, "std": 1}])
def test_24_a_bad_normalisation_names_folder_and_field(scored, tmp_path, norm):
    folder = Path(shutil.copytree(scored, tmp_path / "reward"))
    edit(folder / "config.json", alignkit_normalisation=norm)
    with pytest.raises(ManifestError, match=rf"{folder}.config\.json.* (alignkit_normalisation is|has mean)"):
        load_reward(folder, device="cpu")


# 12, 15: manifests and leftovers


@pytest.mark.parametrize("files", [
    {"x": None}, {"x": {}}, {"x": 5}, [], 5, None, {"config.json": {"size": "a", "sha256": 1}},
    {"config.json": {"size": True, "sha256": "a"}}, {"\ud800": {"size": 1, "sha256": "a"}}])
def test_12_a_manifest_of_another_shape_is_a_manifest_error(saved, tmp_path, files):
    frozen = freeze(saved, tmp_path / "frozen")
    record = {"hash": "a", "files": files}
    if isinstance(files, dict) and "\ud800" not in files:  # with the right spelling and hash
        record["hash"] = Manifest(files).hash
    (frozen / MANIFEST).write_bytes(json.dumps(record, indent=1, sort_keys=True).encode() + b"\n")
    with pytest.raises(ManifestError, match=r"manifest\.json is empty or was changed"):
        verify(frozen)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"files":' * 50_000, b"\xff", b"5", b"null"])
def test_12_deep_or_broken_records_of_a_frozen_model_are_manifest_errors(saved, tmp_path, content):
    frozen = freeze(saved, tmp_path / "frozen")
    whole = (frozen / MANIFEST).read_bytes()
    (frozen / MANIFEST).write_bytes(content)
    with pytest.raises(ManifestError, match=r"manifest\.json is empty or was changed"):
        verify(frozen)
    (frozen / MANIFEST).write_bytes(whole)
    resealed(frozen, "lineage.json", content)
    with pytest.raises(ManifestError, match=r"lineage\.json "):
        lineage(frozen)


@pytest.mark.parametrize("record", [{}, {"ancestors": None}, {"ancestors": [5]},
                                    {"ancestors": [], "evaluation_set_hash": 5}])
def test_12_a_lineage_of_another_shape_is_a_manifest_error(saved, tmp_path, record):
    frozen = freeze(saved, tmp_path / "frozen")
    resealed(frozen, "lineage.json", json.dumps(record).encode())
    with pytest.raises(ManifestError, match=r"lineage\.json has"):
        lineage(frozen)


def resealed(frozen, name, content):
    """Change a file of a frozen model, and its manifest so that all hashes are right."""
    (frozen / name).write_bytes(content)
    files = json.loads((frozen / MANIFEST).read_bytes())["files"]
    files[name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    (frozen / MANIFEST).write_bytes(Manifest(files).to_bytes())


def test_12_what_was_certified_without_being_opened_is_not_verified(saved, tmp_path):
    frozen = freeze(saved, tmp_path / "frozen")
    resealed(frozen, "config.json", b"[]")
    with pytest.raises(ManifestError, match=r"config\.json holds a list"):
        verify(frozen)


def test_15_a_stranger_s_folder_beside_a_frozen_model_stays(saved, tmp_path):
    for name in ("frozen.tmp-mine", ".frozen.tmp-mine", f".frozen.{MARK}-mine", "frozen.old-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    before = sorted(os.listdir(tmp_path))
    freeze(saved, tmp_path / "frozen")
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "frozen"])
    assert all((tmp_path / name / "thesis.txt").read_text() == "mine" for name in before)


@pytest.mark.parametrize("point", ["freeze.copied", "freeze.manifest", "folder.flushed", "folder.exchanged"])
def test_15_a_freeze_killed_anywhere_leaves_a_whole_one_or_none_and_is_swept(saved, tmp_path, point, monkeypatch):
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(killpoints, "_name", point)
        monkeypatch.setattr(killpoints, "_left", 1)
        freeze(saved, tmp_path / "frozen")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    if point == "folder.exchanged":
        verify(tmp_path / "frozen")
    else:
        assert not (tmp_path / "frozen").exists() and len(os.listdir(tmp_path)) == 1
    verify(freeze(saved, tmp_path / "frozen"))
    assert os.listdir(tmp_path) == ["frozen"]


def test_15_a_save_killed_between_its_renames_is_recovered_by_the_next_reader(tiny, saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    (folder / "results.json").write_text("{}")
    folder.rename(tmp_path / f".model.{MARK}-old-{7:012x}")
    load_policy(folder, device="cpu")
    assert os.listdir(tmp_path) == ["model"] and (folder / "results.json").exists()
    folder.rename(tmp_path / f".model.{MARK}-old-{7:012x}")
    save_model(*tiny, folder)
    assert os.listdir(tmp_path) == ["model"] and (folder / "results.json").exists()


def test_15_a_freeze_does_not_overwrite_what_appeared_meanwhile(saved, tmp_path, monkeypatch):
    def appears(point):
        if point == "freeze.manifest":
            (tmp_path / "frozen").mkdir()
            (tmp_path / "frozen" / "thesis.txt").write_text("mine")

    monkeypatch.setattr(frozen_module, "reached", appears)
    with pytest.raises(FileExistsError, match="made by another process"):
        freeze(saved, tmp_path / "frozen")
    assert os.listdir(tmp_path) == ["frozen"] and os.listdir(tmp_path / "frozen") == ["thesis.txt"]


# 36: tokenizer and embedding fit


def test_36_a_tokenizer_that_does_not_fit_is_refused_with_both_numbers(folder, tmp_path):
    config = transformers.AutoConfig.from_pretrained(folder)
    config.vocab_size -= 2
    small = transformers.AutoModelForCausalLM.from_config(config)
    numbers = r"largest token id is 51, the model has 50 embeddings"
    with pytest.raises(ValueError, match=numbers):
        save_model(small, transformers.AutoTokenizer.from_pretrained(folder), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    small.save_pretrained(folder)
    everywhere(folder, tmp_path, numbers)


def test_36_a_save_leaves_nothing_of_the_model_before(tiny, folder):
    """An index, shards, an adapter or a chat template of the old model would be read with the new one."""
    old = {name: tensor.clone() for name, tensor in load_file(folder / gate.WEIGHTS).items()}
    for name in ("model-00001-of-00001.safetensors", gate.ADAPTER_WEIGHTS):
        save_file(old, folder / name, {"format": "pt"})
    where = dict.fromkeys(old, "model-00001-of-00001.safetensors")
    write_json(folder / gate.INDEX, {"metadata": {}, "weight_map": where})
    for name in ("added_tokens.json", "chat_template.jinja", gate.ADAPTER, "results.json", "my_config.json"):
        (folder / name).write_text("{}")
    save_model(*tiny, folder)
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "generation_config.json", gate.WEIGHTS, "tokenizer.json", "tokenizer_config.json",
        "results.json", "my_config.json"}
    load_policy(folder, device="cpu")


# 45: pickles


@pytest.mark.parametrize("name", ["x.bin", "x.pt", "pytorch_model.bin", "../outside.safetensors", "/abs/x.safetensors",
                                  "sub/x.safetensors", "sub\\x.safetensors", "..", "", 5, None, ["model.safetensors"],
                                  "missing.safetensors"])
@pytest.mark.parametrize("beside", [False, True])
def test_45_an_index_that_names_a_pickle_or_a_path_is_refused(folder, tmp_path, name, beside):
    where = shard(folder, ("a",))
    canary = tmp_path / "canary"
    if isinstance(name, str) and name.endswith(("bin", "pt")):
        with (folder / name).open("wb") as file:
            pickle.dump({next(iter(where)): Canary(canary)}, file)
    shutil.copy(folder / "model-00001-of-00001.safetensors", tmp_path / "outside.safetensors")
    if beside:  # transformers reads model.safetensors then; the index is refused all the same
        (folder / "model-00001-of-00001.safetensors").rename(folder / gate.WEIGHTS)
    write_json(folder / gate.INDEX, {"metadata": {}, "weight_map": {**where, next(iter(where)): name}})
    if beside and name == "missing.safetensors":
        load_policy(folder, device="cpu")  # the index is of another model, and nothing reads it
        return
    for opening in (load_policy, check_model_folder, lambda path: compare_directories([path])):
        with pytest.raises(ManifestError, match=r"index\.json names|has no missing\.safetensors"):
            opening(folder)
    with pytest.raises(ManifestError):
        freeze(folder, tmp_path / "frozen")
    assert not canary.exists()


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": null}',
                                   '{"weight_map": {}}', "null"])
def test_45_an_index_of_another_shape_is_refused(folder, tmp_path, index):
    shard(folder, ("a",))
    (folder / gate.INDEX).write_text(index)
    everywhere(folder, tmp_path, r"model\.safetensors\.index\.json (has no weight_map|holds)", ManifestError)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pt", "optimizer.pth", "model.pkl"])
def test_45_only_pickles_says_to_save_as_safetensors(folder, tmp_path, name):
    (folder / gate.WEIGHTS).unlink()
    with (folder / name).open("wb") as file:
        pickle.dump(Canary(tmp_path / "canary"), file)
    with pytest.raises(ManifestError, match=rf"only {name}, which may hold a pickle.*save the model as safetensors"):
        load_policy(folder, device="cpu")
    assert not (tmp_path / "canary").exists()


def test_45_an_adapter_whose_weights_are_a_pickle_is_not_opened(tiny, saved, tmp_path):
    _adapted, adapter = adapter_of(saved, tmp_path / "adapter")
    (adapter / gate.ADAPTER_WEIGHTS).unlink()
    with (adapter / "adapter_model.bin").open("wb") as file:
        pickle.dump(Canary(tmp_path / "canary"), file)
    with pytest.raises(ManifestError, match="may hold a pickle"):
        freeze(adapter, tmp_path / "frozen")
    with pytest.raises(ManifestError, match="may hold a pickle"):
        adapted_policy(adapter)
    assert not (tmp_path / "canary").exists()


# 46: code, kernels, quantisation, adapters


def adapter_of(base, out):
    adapted = add_lora(load_policy(base, device="cpu")[0], rank=2)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(out)
    return adapted, out


@pytest.fixture
def online(monkeypatch):
    """No network, but nobody was told: every attempt to connect is counted."""
    attempts = []

    def connect(self, address):
        attempts.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: attempts.append(args) or [])
    yield attempts
    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize("changes", [
    {"auto_map": {"AutoConfig": "code.Config"}}, {"auto_map": None}, {"text_config": {"auto_map": {}}},
    {"attn_implementation": "a/b"}, {"_attn_implementation": "kernels-community/x"},
    {"_attn_implementation": "paged|a/b"},
    {"attn_implementation": {"": "a/b"}}, {"text_config": {"attn_implementation": "a/b"}}, {"attn_implementation": 5},
    {"experts_implementation": "a/b"}, {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    {"quantization_config": {"quant_method": "gptq"}}, {"text_config": {"quantization_config": {}}},
    {"use_kernels": True}, {"kernel_config": {"RMSNorm": "a/b"}}, {"transformers_weights": "x.bin"},
    {"configuration_files": ["config.4.0.json"]},
])
def test_46_a_config_that_asks_for_code_is_refused(folder, tmp_path, online, changes):
    edit(folder / "config.json", **changes)
    everywhere(folder, tmp_path, r"config\.json (points to model code|has )", ManifestError)
    assert not online


@pytest.mark.parametrize("changes", [
    {"auto_map": {"AutoTokenizer": ["code.Slow", None]}}, {"init_inputs": ["/etc/passwd"]},
    {"vocab_file": "/etc/passwd"},
    {"fast_tokenizer_files": ["../tokenizer.9.json"]}, {"tokenizer_class": ["X"]}, {"chat_template": 5},
])
def test_46_a_tokenizer_that_asks_for_code_or_files_elsewhere_is_refused(folder, tmp_path, online, changes):
    edit(folder / "tokenizer_config.json", **changes)
    everywhere(folder, tmp_path, r"tokenizer_config\.json (points to model code|has )", ManifestError)
    assert not online


@pytest.mark.parametrize("value", ["flash_attention_2", "flash_attention_3", "eager", "sdpa"])
def test_46_flash_attention_in_a_config_is_not_fetched_and_the_model_loads(folder, online, value):
    edit(folder / "config.json", _attn_implementation=value)
    policy = load_policy(folder, device="cpu")[0]
    assert policy.config._attn_implementation == (value if value in ("eager", "sdpa") else "sdpa")
    assert not online


def test_46_nothing_is_fetched_while_a_folder_is_opened(folder, online):
    with gate.confined(check_model_folder(folder)), pytest.raises(OSError):
        transformers.AutoConfig.from_pretrained("somebody/something")
    assert not online


@pytest.mark.parametrize("changes,message", [
    ({"base_model_name_or_path": "nobody/nothing"}, "not a folder here"),
    ({"base_model_name_or_path": 5}, "not a folder"),
    ({"base_model_name_or_path": "x\x00y"}, "not a folder"), ({"megatron_config": {"a": 1}}, "megatron_config"),
    ({"auto_map": {}}, "auto_map"), ({"peft_type": "XLORA"}, "peft_type"), ({"peft_type": 5}, "peft_type"),
    ({"r": 10**9}, "has rank"), ({"r": "a"}, "has rank"), ({"rank_pattern": {"fc1": 10**9}}, "has rank"),
    ({"r": 64}, "has rank"), ({"r": 1}, "adapter"),
    ({"r": 3}, "has rank"), ({"target_modules": 5}, "adapter"), ({"task_type": "CODE"}, "adapter"),
])
def test_46_an_adapter_s_config_is_checked(saved, tmp_path, online, changes, message):
    _, adapter = adapter_of(saved, tmp_path / "adapter")
    edit(adapter / gate.ADAPTER, **changes)
    with pytest.raises(ManifestError, match=message):
        freeze(adapter, tmp_path / "frozen")
    assert not online and not (tmp_path / "frozen").exists()


def test_46_an_adapter_without_all_its_weights_or_with_nan_is_refused(saved, tmp_path):
    _, adapter = adapter_of(saved, tmp_path / "adapter")
    tensors = load_file(adapter / gate.ADAPTER_WEIGHTS)
    name = sorted(tensors)[0]
    save_file({key: value for key, value in tensors.items() if key != name}, adapter / gate.ADAPTER_WEIGHTS)
    with pytest.raises(ManifestError, match=rf"has no '{name}'"):
        freeze(adapter, tmp_path / "frozen")
    save_file({**tensors, name: tensors[name] * math.nan}, adapter / gate.ADAPTER_WEIGHTS)
    with pytest.raises(NonFinite, match="lora"):
        freeze(adapter, tmp_path / "frozen")
    save_file(tensors, adapter / gate.ADAPTER_WEIGHTS)
    verify(freeze(adapter, tmp_path / "frozen"))


def test_46_an_adapter_folder_is_not_a_model(folder, saved, tmp_path, online):
    _, adapter = adapter_of(saved, tmp_path / "adapter")
    for path in adapter.iterdir():
        if path.name.startswith("adapter"):
            shutil.copy(path, folder)
    with pytest.raises(ManifestError, match="expected a whole model: merge the adapter"):
        load_policy(folder, device="cpu")


# 47: headers, links


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json",
                                  "chat_template.jinja", "generation_config.json", "notes.txt"])
def test_47_a_link_that_leaves_the_folder_is_refused(folder, tmp_path, name):
    if (folder / name).exists():
        (folder / name).rename(tmp_path / name)
    else:
        (tmp_path / name).write_text("outside")
    (folder / name).symlink_to(Path("..") / name)
    everywhere(folder, tmp_path, rf"{name.replace('.', '[.]')} is a link that leaves the folder", ManifestError)


def test_47_links_that_lead_nowhere_and_pipes_are_refused_and_never_waited_for(folder, tmp_path):
    (folder / "chat_template.jinja").symlink_to("nowhere.jinja")
    everywhere(folder, tmp_path, "is a link that leads nowhere", ManifestError)
    (folder / "chat_template.jinja").unlink()
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    everywhere(folder, tmp_path, "config.json is not a file", ManifestError)


def test_47_links_inside_a_folder_and_a_link_to_it_are_fine(folder, tmp_path):
    (folder / gate.WEIGHTS).rename(folder / "weights")
    (folder / gate.WEIGHTS).symlink_to("weights")
    (tmp_path / "link").symlink_to(folder)
    load_policy(tmp_path / "link", device="cpu")


def cached(saved, home, name="somebody/something"):
    """A model in a cache as the Hub's client makes it; returns the snapshot."""
    repo = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / ("a" * 40)
    for made in (repo / "blobs", repo / "refs", snapshot):
        made.mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    for number, path in enumerate(sorted(saved.iterdir())):
        shutil.copy(path, repo / "blobs" / f"{number:040x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    return snapshot


def test_47_a_snapshot_of_the_hub_s_cache_loads_and_other_links_in_it_do_not(saved, tmp_path):
    snapshot = cached(saved, tmp_path)
    load_policy(snapshot, device="cpu")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(saved / "config.json")
    with pytest.raises(ManifestError, match="is a link that leaves the folder"):
        load_policy(snapshot, device="cpu")


def test_47_a_hub_id_goes_through_the_cache_and_its_records_through_the_gate(saved, tmp_path, monkeypatch):
    cached(saved, tmp_path, "honest/model")
    edited = cached(saved, tmp_path, "somebody/index")
    where = dict.fromkeys(load_file(saved / gate.WEIGHTS), "x.bin")
    (edited / gate.WEIGHTS).unlink()
    write_json(edited / gate.INDEX, {"metadata": {}, "weight_map": where})
    (edited / "x.bin").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    quantised = cached(saved, tmp_path, "somebody/quantised")
    (quantised / "config.json").unlink()
    record = json.loads((saved / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**record, "quantization_config": {"quant_method": "hqq"}}))
    pickled = cached(saved, tmp_path, "somebody/pickled")
    (pickled / gate.WEIGHTS).rename(pickled / "pytorch_model.bin")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    load_policy("honest/model", device="cpu")
    with pytest.raises(ManifestError, match=r"names 'x\.bin'"):
        load_policy("somebody/index", device="cpu")
    with pytest.raises(ManifestError, match="quantization_config"):
        load_policy("somebody/quantised", device="cpu")
    with pytest.raises(ValueError, match=r"model 'somebody/pickled' could not be read: .*model\.safetensors"):
        load_policy("somebody/pickled", device="cpu")
    assert not (tmp_path / "canary").exists()


def header(folder, change):
    content = (folder / gate.WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    made = json.dumps(change(json.loads(content[8 : 8 + size]))).encode()
    (folder / gate.WEIGHTS).write_bytes(len(made).to_bytes(8, "little") + made + content[8 + size :])


@pytest.mark.parametrize("what", ["a header of 2**40 bytes", "overlapping", "beyond the end", "negative",
                                  "another dtype", "not an object"])
def test_47_headers_that_lie_are_refused_by_name(folder, tmp_path, what):
    name = "lm_head.weight"
    if what == "a header of 2**40 bytes":
        content = (folder / gate.WEIGHTS).read_bytes()
        (folder / gate.WEIGHTS).write_bytes((2**40).to_bytes(8, "little") + content[8:])
    elif what == "not an object":
        header(folder, lambda record: [record])
    else:
        change = {"overlapping": {"data_offsets": [0, 13312]},
                  "beyond the end": {"data_offsets": [2**40, 2**40 + 13312]}, "negative": {"data_offsets": [-1, 13311]},
                  "another dtype": {"dtype": "X9"}}[what]
        header(folder, lambda record: {**record, name: {**record[name], **change}})
    everywhere(folder, tmp_path, r"model\.safetensors is no whole safetensors file: ", ManifestError)


# Other: sizes, records, and whatever else


@pytest.mark.parametrize("changes", [
    {"hidden_size": 10**9}, {"hidden_size": 10**15}, {"vocab_size": 10**12}, {"vocab_size": "a"}, {"vocab_size": -1},
    {"vocab_size": 0}, {"num_hidden_layers": 10**6}, {"num_hidden_layers": 10**15}, {"num_hidden_layers": -1},
    {"num_hidden_layers": 0}, {"num_hidden_layers": 1}, {"intermediate_size": 10**12}, {"num_attention_heads": 0},
    {"num_attention_heads": 10**9}, {"num_labels": 10**9}, {"max_position_embeddings": 10**30}, {"hidden_act": "exec"},
    {"hidden_act": 5}, {"torch_dtype": "load"}, {"dtype": 5}, {"architectures": 5}, {"architectures": [5]},
    {"id2label": {"a": "b"}}, {"id2label": []}, {"model_type": "a" * 10**6}, {"rope_parameters": {"rope_type": "x"}},
    {"rope_parameters": 5}, {"layer_norm_eps": None}, {"text_config": 5}, {"model_type": "bert"},
    {"model_type": "gpt_neo", "attention_types": [[["global"], 10**9]]}, {"model_type": "t5"},
])
def test_a_config_with_impossible_values_is_refused_at_once(folder, changes):
    edit(folder / "config.json", **changes)
    begun = time.perf_counter()
    with pytest.raises(ValueError, match="^model "):
        load_policy(folder, device="cpu")
    assert time.perf_counter() - begun < 10


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
                                  "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize("content", ["[]", "null", "5", '"x"', "[" * 10_000, "{", "NaN", ""])
def test_a_record_that_is_no_object_is_refused_by_name(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(ManifestError, match=rf"model '.*{name} "):
        load_policy(folder, device="cpu")


def test_an_error_without_a_message_is_told_by_its_kind(folder, monkeypatch):
    def silent(*args, **options):
        raise OSError

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", silent)
    with pytest.raises(ValueError, match="could not be read: OSError"):
        load_policy(folder, device="cpu")


@pytest.mark.parametrize("name", ["x\x00y", "a" * 5000, "../" * 2000, "a/b/c", "", ".", "-rf"])
def test_names_that_no_model_has_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^model "):
        load_policy(name, device="cpu")


@pytest.mark.parametrize("content", ["[]", '{"seed": "a"}', "{", "[" * 10_000, '{"data": "desk", "seed": true}'])
def test_compare_reads_a_broken_run_record_with_one_clear_error(folder, content):
    (folder.parent / "run.json").write_text(content)
    with pytest.raises(RunError, match=r"run\.json"):
        compare_directories([folder])


@pytest.mark.parametrize("which", ["policy", "reward"])
def test_fuzzed_folders_load_or_are_refused_with_a_clear_error(saved, scored, tmp_path, online, monkeypatch, which):
    """200 mutants of either folder: no traceback of another kind, nothing fetched, no pickle opened, nothing slow."""
    opened = []
    monkeypatch.setattr(torch, "load", lambda *args, **options: opened.append(args))
    load = load_policy if which == "policy" else RewardScorer.load
    source, refused = {"policy": saved, "reward": scored}[which], 0
    (tmp_path / "mutant").mkdir()
    for seed in range(200):
        changed = write_mutant(source, tmp_path / "mutant", random.Random(seed))
        begun = time.perf_counter()
        try:
            load(tmp_path / "mutant", device="cpu")
        except ValueError as error:
            refused += 1
            assert isinstance(error, AlignkitError) or "model" in str(error), (seed, changed, error)
            assert len(str(error)) < 2000 and str(error).isprintable(), (seed, changed, error)
        except BaseException as error:
            pytest.fail(f"seed {seed}, {changed}: {type(error).__name__}: {error}")
        assert time.perf_counter() - begun < 10, (seed, changed)
    assert 50 < refused < 195 and not online and not opened
