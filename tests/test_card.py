"""Model cards, and pushes to a Hub that a local server plays: what is in a card, and what leaves the machine."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, metadata_load

from alignkit.errors import ManifestError, RunError
from alignkit.evaluate.suite_records import Measurement, add_suites
from alignkit.jobs.cli import main
from alignkit.models.loading import load_policy, save_model
from alignkit.publish.card import model_card, write_card
from alignkit.publish.hub import PushError, parcel
from alignkit.runs.frozen import freeze, verify
from alignkit.storage import write_json

NASTY = "<script>x</script> | [a](javascript:b) `c` **d**\n# forged"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run directory with a frozen checkpoint, its records, and a stranger's words in every place for text."""
    run = tmp_path_factory.mktemp("made") / "my run"
    (run / "sft").mkdir(parents=True)
    policy, tokenizer = load_policy("tiny", device="cpu")
    noise = torch.Generator().manual_seed(0)  # weights far enough from their start that its replies differ
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=noise)
    save_model(policy, tokenizer, run / "sft")
    freeze(run / "sft", run / "frozen", stage="frozen", parent=run / "sft", seed=5, data_hash="d" * 64,
           evaluation_set_hash="e" * 64, config={"kl_coef": 0.2, "iterations": 7, "note": NASTY})
    write_json(run / "run.json", {"model": "Owner/Base-1B", "data": "owner/pairs", "seed": 5})
    write_json(run / "jobs.json", {"03b_ppo": {"key": {"parameters": {"kind": "pairs", "columns": NASTY}}}})
    write_json(run / "frozen" / "results.json", {
        "gold_mean": 0.831, "gold_ci95": [0.73, 0.914], "eos_rate": 0.9, "eos_ci95": None, "evaluation_set": "e" * 64,
        "risky_failure_rate": 0.0078, "risky_failure_ci95": [0.0, 0.0166]})
    (run / "reward").mkdir()
    write_json(run / "reward" / "results.json", {"accuracy_labels": 0.77, "accuracy_labels_ci95": [0.75, 0.79]})
    return run


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A copy of that run directory."""
    return shutil.copytree(made, tmp_path / made.name)


@pytest.fixture
def suites(run) -> Path:
    """The figures of two suites beside the run's frozen checkpoint, and one of other weights."""
    facts = {"shots": 0, "limit": None, "seed": 0, "chat_template": False, "versions": {}, "date": "2026-11-29"}
    frozen = verify(run / "frozen").hash
    return add_suites(run / "frozen", [
        Measurement("run/frozen", frozen, NASTY, "acc", 0.5, 0.4, 0.6, 0.05, 100, **facts),
        Measurement("run/frozen", frozen, "gsm8k", "exact_match", 0.25, None, None, None, 8, **facts | {"limit": 8}),
        Measurement("run/frozen", "0" * 64, "ifeval", "acc", 0.75, None, None, None, 8, **facts)])


def test_a_card_says_what_the_records_say(run, suites):
    text = str(model_card(run / "frozen", licence="mit"))
    assert verify(run / "frozen").hash in text and "d" * 64 in text and "e" * 64 in text
    assert "| gold reward, SFT-sd | +0.83 | +0.73 to +0.91 |" in text
    assert "| risky failures | 0.8% | 0.0% to 1.7% |" in text and "| ended by itself | 90.0% | none |" in text
    assert "ranks 77.0% as their labels do (95 % interval 75.0% to 79.0%)" in text
    assert "| frozen |" in text and "| sft |" in text and "| kl\\_coef | 0.2 |" in text
    assert "acc<br>0 shots, 100 items | 50.0% | 40.0% to 60.0% |" in text and "75.0% |" not in text
    assert "| gsm8k (cut: limit 8)<br>reasoning, exact\\_match, 0 shots, 8 items | 25.0% | none |" in text
    assert "cannot be told from a coin" not in text and "Read by 03b\\_ppo with: kind pairs" in text
    weights = hashlib.sha256((run / "frozen" / "model.safetensors").read_bytes()).hexdigest()
    assert f"| model.safetensors | {(run / 'frozen' / 'model.safetensors').stat().st_size:,} | {weights} |" in text


def test_a_card_says_that_its_reward_model_ranks_like_a_coin(run):
    write_json(run / "reward" / "results.json", {"accuracy_labels": 0.52, "accuracy_labels_ci95": [0.47, 0.57]})
    assert "**The reward model cannot be told from a coin: it ranks 52.0% of" in str(model_card(run / "frozen"))


def test_nothing_of_a_stranger_is_markup_in_a_card(run, suites):
    body = str(model_card(run / "frozen")).split("---\n", 2)[2]
    assert "<script" not in body and "\n# forged" not in body and "](javascript" not in body and "**d**" not in body
    assert all(line.count("|") - line.count("\\|") == 3 for line in body.splitlines() if line.startswith("| note"))


def test_the_hubs_own_reader_takes_the_metadata_back(run, suites):
    path = write_card(run / "frozen", licence="apache-2.0")
    data = metadata_load(path)
    assert data["license"] == "apache-2.0" and data["base_model"] == "Owner/Base-1B"
    assert data["datasets"] == "owner/pairs"
    assert data["pipeline_tag"] == "text-generation" and {"alignkit", "sft", "frozen"} <= set(data["tags"])
    results = {each.metric_type: each for each in ModelCard.load(path).data.eval_results}
    assert results["gold_mean"].metric_value == 0.831 and results["gold_mean"].metric_args == {"ci95": [0.73, 0.914]}
    assert results["eos_rate"].metric_args is None and results["gold_mean"].dataset_args == {"evaluation_set": "e" * 64}


def test_a_licence_is_never_invented_and_a_path_never_published(run):
    here = run / "private pairs.jsonl"
    here.write_text("{}\n")
    write_json(run / "run.json", {"model": str(run / "sft"), "data": str(here), "seed": 5})
    text = str(model_card(run / "frozen"))
    assert "license: unknown" in text and "nobody gave one. Fill it in" in text
    assert str(run) not in text and "a local one named private pairs.jsonl" in text
    assert "base_model" not in text and "datasets:" not in text


def test_a_checkpoint_alone_has_a_card_too(run, tmp_path):
    (tmp_path / "alone").mkdir()
    freeze(run / "sft", tmp_path / "alone" / "x")
    text = str(model_card(tmp_path / "alone" / "x"))
    assert "No evaluation lies beside this checkpoint." in text and "Base model: unknown" in text


def test_the_command_writes_the_card_beside_the_manifest_and_verify_still_passes(run, capsys):
    before = verify(run / "frozen")
    assert main(["card", str(run / "frozen"), "--licence", "mit"]) == 0
    assert (run / "frozen" / "README.md").exists() and verify(run / "frozen") == before
    assert main(["card", str(run / "frozen"), "--out", str(run / "elsewhere.md")]) == 0
    assert "license: unknown" in (run / "elsewhere.md").read_text()
    assert main(["verify", str(run / "frozen")]) == 0


def test_a_changed_checkpoint_gets_no_card(run):
    weights = run / "frozen" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ManifestError, match=r"model\.safetensors has other bytes"):
        write_card(run / "frozen")
    assert not (run / "frozen" / "README.md").exists()


def test_suites_that_are_none_are_named(run, suites):
    write_json(suites, {"measured": [{"low": 0.1}]})
    with pytest.raises(RunError, match=r"suites\.json: measured\[0\]"):
        model_card(run / "frozen")


# --- push ------------------------------------------------------------------------------------------------------------
class FakeHub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as a push needs. `hub` on the server: what it has and what it was sent."""

    def log_message(self, *_):
        pass

    def _reply(self, value: object, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        hub = self.server.hub
        self._reply({"id": "me/model", "private": hub["private"], "siblings": [], "tags": [], "sha": "0" * 40})

    def do_POST(self) -> None:
        hub, body = self.server.hub, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub["asked"].append((self.path, self.headers.get("Authorization")))
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            if hub["private"] is None:
                hub["private"] = wanted.get("private", wanted.get("visibility") == "private")
                self._reply({"url": f"{hub['address']}/me/model", "name": "me/model"})
            else:
                self._reply({"error": "You already created this model repo", "url": f"{hub['address']}/me/model"}, 409)
        elif self.path == "/api/validate-yaml":  # the client has the card checked before it sends anything
            hub["card"] = json.loads(body)["content"]
            self._reply({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]
            self._reply({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    hub["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._reply({"commitUrl": f"{hub['address']}/me/model/commit/1", "commitOid": "1" * 40, "hookOutput": "",
                         "success": True})
        else:
            self._reply({"error": f"unexpected {self.path}"}, 404)


@pytest.fixture
def hub():
    """What a Hub on the loopback device has; private is None while there is no repository."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.hub = {"private": None, "files": {}, "asked": [], "address": f"http://127.0.0.1:{server.server_port}"}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.hub
    server.shutdown()
    server.server_close()


def push(hub: dict, home: Path, *arguments: str, token: str | None = "hf_secret", answer: str = "", **more: str):
    env = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    env |= {"HF_ENDPOINT": hub["address"], "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_COLOR": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", **({"HF_TOKEN": token} if token else {}), **more}
    return subprocess.run([sys.executable, "-m", "alignkit", "push", *arguments], env=env, input=answer, text=True,
                          capture_output=True)


@pytest.mark.slow
def test_a_push_sends_the_manifests_files_and_the_card_to_a_private_repository(run, hub, tmp_path):
    done = push(hub, tmp_path, str(run / "frozen"), "me/model", "--yes", "--licence", "mit")
    assert done.returncode == 0, done.stderr
    assert hub["private"] is True and "private" in done.stdout and "commit/1" in done.stdout
    manifest = verify(run / "frozen")
    assert hub["files"].keys() == {*manifest.files, "manifest.json", "README.md"}  # and no results.json
    for name, content in hub["files"].items():
        assert content == (run / "frozen" / name).read_bytes() and f"bytes   {name}" in done.stdout
    assert b"license: mit" in hub["files"]["README.md"] and "license: mit" in hub["card"]
    assert all(authorisation == "Bearer hf_secret" for _, authorisation in hub["asked"])


@pytest.mark.slow
def test_a_push_asks_first_and_goes_nowhere_without_a_yes(run, hub, tmp_path):
    for answer in ("", "n\n"):
        done = push(hub, tmp_path, str(run / "frozen"), "me/model", answer=answer)
        assert done.returncode == 0 and "nothing was pushed" in done.stdout and not hub["asked"]


@pytest.mark.slow
def test_a_push_is_refused_without_a_token_offline_and_to_a_public_repository(run, hub, tmp_path):
    arguments = (str(run / "frozen"), "me/model", "--yes")
    done = push(hub, tmp_path, *arguments, token=None)
    assert done.returncode == 1 and "hf auth login" in done.stderr and "HF_TOKEN" in done.stderr
    done = push(hub, tmp_path, *arguments, HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and "HF_HUB_OFFLINE is set" in done.stderr
    assert not hub["asked"]
    hub["private"] = False  # somebody made it, and everybody can see it
    done = push(hub, tmp_path, *arguments)
    assert done.returncode == 1 and "me/model is there already and public. Say --public" in done.stderr
    assert not hub["files"]
    done = push(hub, tmp_path, *arguments, "--public")
    assert done.returncode == 0 and "PUBLIC: everybody" in done.stdout and hub["files"]


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_one_message(run, hub, tmp_path):
    done = push({**hub, "address": "http://127.0.0.1:9"}, tmp_path, str(run / "frozen"), "me/model", "--yes")
    assert done.returncode == 1 and "could not be reached" in done.stderr and "Traceback" not in done.stderr


def test_a_parcel_is_refused_with_a_bad_name_or_another_checkpoints_card(run):
    with pytest.raises(PushError, match="expected OWNER/NAME"):
        parcel(run / "frozen", "not a name!")
    (run / "frozen" / "README.md").write_text("the card of something else\n")
    with pytest.raises(PushError, match=re.escape("does not name its manifest's hash")):
        parcel(run / "frozen", "me/model")
    assert (run / "frozen" / "README.md").read_text() == "the card of something else\n"  # not overwritten unasked


def test_a_card_that_was_edited_by_hand_is_pushed_as_it_is(run):
    card = write_card(run / "frozen")
    card.write_text(card.read_text().replace("license: unknown", "license: mit"))
    what = parcel(run / "frozen", "me/model")
    assert what.private and "license: mit" in card.read_text()
    assert what.files["README.md"] == card.stat().st_size


def test_no_run_pushes():
    """The only caller of `send` and `push` is the command."""
    root = Path(__file__).resolve().parents[1]
    for path in (*root.glob("alignkit/**/*.py"), *root.glob("widgets/**/*.py"), *root.glob("notebooks/*.ipynb")):
        if path.name not in ("hub.py", "cli.py"):
            text = path.read_text(encoding="utf-8")
            assert "publish.hub" not in text and "upload_folder" not in text and "push_to_hub(" not in text, path


def test_plain_transformers_give_the_greedy_reply_of_alignkits_sampler(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from alignkit.desk.world import World
    from alignkit.forward.sampling import generate_texts

    prompts = [prompt.text for prompt in World(0).heldout_prompts[:8]]
    ours = generate_texts(*load_policy(run / "frozen", device="cpu"), prompts, max_new_tokens=4, seed=0,
                          temperature=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(run / "frozen")
    model = AutoModelForCausalLM.from_pretrained(run / "frozen")
    for prompt, (reply,) in zip(prompts, ours, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")  # with BOS, as alignkit reads plain text
        said = model.generate(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], do_sample=False,
                              max_new_tokens=4)[0, ids["input_ids"].shape[1]:]
        assert tokenizer.decode(said, skip_special_tokens=True) == reply
    assert any(reply.strip() for (reply,) in ours)
