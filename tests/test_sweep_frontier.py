"""The exact frontier of a sweep of the desk world: right, never stale, and where there is none, the reason."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from alignkit_widgets import FrontierExplorer
from alignkit_widgets.app.playground import make_desk_start

from alignkit import exact, plots
from alignkit.configs import RewardConfig, SFTConfig
from alignkit.desk.tiny import phrase_ids
from alignkit.desk.world import World
from alignkit.evaluate.evaluation import EvaluationSet
from alignkit.forward.rollout import encode_prompts
from alignkit.jobs import cli
from alignkit.models.loading import load_policy
from alignkit.reward import load_reward
from alignkit.runs.records import start_run
from alignkit.sweeps import exact as sweeps_exact
from alignkit.sweeps.curves import sweep_curves
from alignkit.sweeps.exact import BETAS, DRAWS, FILE, known_curves, write_curves
from alignkit.sweeps.page import plane_of
from alignkit.sweeps.results import load_results
from alignkit.sweeps.sweep import sweep

SCALE = (0.3, 1.7)  # mean and sd of raw gold: the units of the jobs


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A run directory with a hastily trained SFT policy and reward model."""
    run = start_run(tmp_path_factory.mktemp("desk") / "run", "tiny", "desk", 0)
    make_desk_start(run, pairs=64, sft=SFTConfig(epochs=0.2), reward=RewardConfig(epochs=1))
    return run


def make_sweep(place: Path, start: Path, prompts: int = 1, coefs=(0.1, 0.4), **parameters) -> Path:
    """A sweep's folder with the jobs of one seed, as `alignkit sweep` leaves it, but for PPO itself."""
    asked = World(0).heldout_prompts[:prompts]
    rows = []
    for coef in coefs:
        job = f"kl_coef={coef}_seed=0_{len(rows):010x}"
        rows.append({"job": job, "kl_coef": coef, "seed": 0, **parameters, "status": "finished", "host": "h",
                     "seconds": 1.0, "attempts": 1, "error": None, "ppo.kl_to_sft": 0.5 / coef,
                     "ppo.proxy_mean": 1.2 - coef, "ppo.gold_mean": coef})
        run = place / "jobs" / job
        shutil.copytree(start, run)
        (run / "sft" / "results.json").write_text(json.dumps({"gold_scale": SCALE}))
        EvaluationSet([p.text for p in asked], [p.key for p in asked], [p.kind for p in asked]).save(
            run / "evaluation_set.json")
    (place / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (place / "sweep.json").write_text(json.dumps({"notebook": "03b_ppo", "grids": [], "jobs": {
        row["job"]: {"kl_coef": row["kl_coef"], "seed": 0, **parameters} for row in rows}}), encoding="utf-8")
    return place


@pytest.fixture
def folder(tmp_path, start) -> Path:
    return make_sweep(tmp_path / "kl", start)


def made_up(number: float = 1.0) -> dict:
    """Curves of the right form."""
    betas, draws = [None, *BETAS, 0.0], list(DRAWS)
    line = np.linspace(0, 3 * number, len(betas)).tolist()
    return {"prompts": 7, "frontier": {"beta": betas, "kl": line, "proxy": line, "gold": line},
            "gold_frontier": {"beta": betas, "kl": line, "gold": line},
            "best_of_n": {"n": draws, "kl": line[:len(draws)], "proxy": line[:len(draws)], "gold": line[:len(draws)]}}


def enumerate_nothing(monkeypatch) -> list:
    """Replace the enumeration by made-up curves; returns the list of the runs for which it is asked."""
    asked = []

    def pretended(run, seed, say):
        asked.append(run)
        return made_up()

    monkeypatch.setattr(sweeps_exact, "_enumerated", pretended)
    return asked


def renew(folder: Path) -> None:
    """What `alignkit report` does before it draws the page."""
    results = load_results(folder)
    write_curves(results.root, results.policy_runs, results.own_reward, lambda words: None)


def slow_tables(run: Path, prompt: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log π, proxy and gold of every response to a prompt: a row a response, no prefix tree, no cache."""
    space = exact.response_space()
    policy, tokenizer = load_policy(run / "sft", device="cpu")
    ids, mask = space.token_ids(phrase_ids(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    asked = encode_prompts(tokenizer, [prompt])[0]
    logps = []
    with torch.no_grad():
        for start in range(0, len(ids), 2048):
            own, kept = ids[start:start + 2048], mask[start:start + 2048]
            logits = policy(input_ids=torch.cat([asked.expand(len(own), -1), own], 1)).logits.double()
            steps = logits[:, asked.shape[1] - 1:-1].log_softmax(-1).gather(2, own[:, :, None])[:, :, 0]
            logps.append(torch.where(kept, steps, 0.0).sum(1))
    texts = space.texts()
    proxy = load_reward(run / "reward", device="cpu")([prompt] * len(texts), texts)
    gold = (np.asarray(World(0).gold_scores([prompt] * len(texts), texts), dtype=float) - SCALE[0]) / SCALE[1]
    return torch.cat(logps).numpy(), proxy.double().numpy(), gold


def test_the_curves_are_what_plain_sums_over_every_response_give(folder, capsys):
    assert cli.main(["report", str(folder)]) == 0
    said = capsys.readouterr()
    assert said.out.strip().endswith("sweep.html") and "enumerating 16,105 responses to 1 prompt …" in said.err
    results = load_results(folder)
    assert not results.exact and results.curve_prompts == {0: 1} and results.no_curve == {}
    curve, gold_curve, draws = results.frontiers[0], results.gold_frontiers[0], results.best_of_n[0]
    run = results.points()[0].run
    logps, proxy, gold = slow_tables(run, World(0).heldout_prompts[0].text)
    chance = np.exp(logps)
    assert chance.sum() == pytest.approx(1, abs=1e-4)
    for at in (1, 17, 30):
        beta = curve["beta"][at]
        for reward, found, names in ((proxy, curve, {"proxy": proxy, "gold": gold}),
                                     (gold, gold_curve, {"gold": gold})):
            weights = chance * np.exp((reward - reward.max()) / beta)
            best = weights / weights.sum()
            kept = best > 0
            assert found["kl"][at] == pytest.approx((best * (np.log(best) - logps))[kept].sum(), abs=1e-4)
            for name, table in names.items():
                assert found[name][at] == pytest.approx((best * table).sum(), abs=1e-4)
    assert (curve["kl"][0], curve["beta"][0], curve["beta"][-1]) == (0, None, 0)
    assert curve["proxy"][-1] == pytest.approx(proxy.max(), abs=1e-3)
    two = draws["n"].index(2.0)
    order = np.argsort(proxy)  # best of two: the chance that both draws are among the responses so far
    below = np.cumsum(chance[order])
    assert draws["proxy"][two] == pytest.approx((np.diff(below**2, prepend=0) * proxy[order]).sum(), abs=1e-3)
    assert draws["kl"][0] == pytest.approx(0, abs=1e-9) and draws["gold"][0] == pytest.approx((chance * gold).sum(),
                                                                                            abs=1e-4)


def test_a_sweep_enumerates_at_its_end_and_only_once(tmp_path, folder, monkeypatch, capsys):
    """A notebook that takes a finished run for its own: nothing is trained."""
    asked, ready = enumerate_nothing(monkeypatch), next((folder / "jobs").iterdir())
    cell = ("import json, shutil\nfrom pathlib import Path\nshutil.copytree(SOURCE, run, dirs_exist_ok=True)\n"
            "Path(run, 'ppo').mkdir(exist_ok=True)\nresults = {'kl_to_sft': 1.0, 'proxy_mean': 0.5}\n"
            "Path(run, 'ppo', 'results.json').write_text(json.dumps(results))").replace("SOURCE", repr(str(ready)))
    nb = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_code_cell("run = ''\nrate: float = 1.0", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(cell)])
    nbformat.write(nb, tmp_path / "toy.ipynb")
    out = tmp_path / "out"
    for _ in range(2):
        assert sweep(tmp_path / "toy.ipynb", out, {"rate": "1,2"}, workers=1) == 0
    assert len(asked) == 1 and capsys.readouterr().out.count("exact frontier of seed 0: enumerated in") == 1
    assert load_results(out).frontiers[0] == made_up()["frontier"], "its jobs have the seed of their run, 0"
    assert "exact for world 0" in (out / "sweep.html").read_text(encoding="utf-8")


def test_prompts_are_enumerated_in_groups_and_weighed_by_their_number(tmp_path, start, monkeypatch):
    asked, said = make_sweep(tmp_path / "kl", start, prompts=3, coefs=(0.1,)), []
    run, = (asked / "jobs").iterdir()
    monkeypatch.setattr(sweeps_exact, "AT_ONCE", 2)
    groups = sweeps_exact._enumerated(run, 0, said.append)
    monkeypatch.setattr(sweeps_exact, "AT_ONCE", 16)
    whole = sweeps_exact._enumerated(run, 0, lambda words: None)
    assert groups["prompts"] == whole["prompts"] == 3 and any("to go" in words for words in said)
    for name in ("kl", "proxy", "gold"):
        assert groups["frontier"][name] == pytest.approx(whole["frontier"][name], abs=1e-9)
        assert groups["best_of_n"][name] == pytest.approx(whole["best_of_n"][name], abs=1e-9)
    assert groups["frontier"]["beta"] == whole["frontier"]["beta"] == [None, *BETAS, 0.0]


def test_whoever_shows_a_sweep_shows_its_exact_curves_and_says_where_they_hold(folder, monkeypatch):
    enumerate_nothing(monkeypatch)
    assert cli.main(["report", str(folder)]) == 0
    page = (folder / "sweep.html").read_text(encoding="utf-8")
    words = "The curves are exact for world 0, that of seed 0: on the 7 held-out prompts on which its jobs were"
    assert words in page and "one may lie above a curve by chance." in page
    results = load_results(folder)
    assert plane_of(results, results.points()).get_title("left").endswith("exact curves of world 0")
    explorer = FrontierExplorer(folder, state="seed=0")
    blocks = [block for row in explorer.rows() for block in row]
    chart, table = (next(block for block in blocks if block["kind"] == kind) for kind in ("chart", "table"))
    assert "most proxy possible, world 0" in [series["name"] for series in chart["series"]]
    assert table["columns"][1] == "with 95 % interval" and "crosses: 95 % intervals" in chart["title"]
    assert any(words in block["text"] for block in blocks if block["kind"] == "text")
    explorer.set(beta=1.0)
    curve = sweep_curves(results, 0)
    assert curve.world == 0 and curve.sampled is None
    assert plots.plot_sweep_plane([{"name": "PPO", "kl": [1.0], "proxy": [0.5]}], **curve.drawn)


@pytest.mark.parametrize("name, change", [
    ("reward/config.json", lambda text: text.replace('"std"', '"std" ')),
    ("sft/model.safetensors", None),
    ("evaluation_set.json", lambda text: text + " "),
    ("sft/results.json", lambda text: json.dumps({"gold_scale": [0.0, 1.0]})),
])
def test_a_curve_of_other_models_is_never_shown_and_is_made_anew(folder, monkeypatch, name, change):
    asked = enumerate_nothing(monkeypatch)
    renew(folder)
    renew(folder)
    assert len(asked) == 1, "what is known is not enumerated again"
    for run in (folder / "jobs").iterdir():
        path = run / name
        if change:
            path.write_text(change(path.read_text()))
        else:
            path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    results = load_results(folder)
    assert results.frontiers == {} and "not enumerated yet" in results.no_curve[0]
    renew(folder)
    assert len(asked) == 2
    assert load_results(folder).frontiers.keys() == {0}


def test_jobs_that_began_with_other_models_have_no_common_frontier_and_the_page_says_so(folder, monkeypatch):
    asked = enumerate_nothing(monkeypatch)
    other = sorted((folder / "jobs").iterdir())[1] / "sft" / "model.safetensors"
    other.write_bytes(other.read_bytes()[:-1] + b"\x01")
    assert cli.main(["report", str(folder)]) == 0 and asked == []
    page = (folder / "sweep.html").read_text(encoding="utf-8")
    why = "No exact curve of seed 0: its jobs began with 2 different sets of SFT policy, reward model and evaluation"
    assert why in page and not (folder / FILE).exists()
    assert "beta" not in FrontierExplorer(folder).controls and why in FrontierExplorer(folder).text()


def test_a_reward_of_ones_own_and_an_enumeration_that_fails_are_named(tmp_path, start, folder, capsys):
    own = make_sweep(tmp_path / "own", start, reward="mine:score")
    renew(own)
    assert not (own / FILE).exists()
    assert "a job was given a reward of its own" in sweep_curves(load_results(own)).words
    for run in (folder / "jobs").iterdir():  # no prompt of the desk world
        EvaluationSet(["<b>What?</b>"], [0], ["benign"]).save(run / "evaluation_set.json")
    capsys.readouterr()
    assert cli.main(["report", str(folder)]) == 0
    assert "there is none: prompt" in capsys.readouterr().err
    page = (folder / "sweep.html").read_text(encoding="utf-8")
    assert "is not one of the desk world" in page and "<b>What" not in page
    assert load_results(folder).frontiers == {}


@pytest.mark.parametrize("content", [
    "{", "[]", '{"worlds": 3}', '{"worlds": {"0": 3}}', '{"worlds": {"0": {"made_from": "KEY"}}}', "NAN", "LONG",
    "HUGE", "TEXT", "NEGATIVE", "BETAS",
])
def test_a_damaged_or_hostile_file_is_not_used_and_is_made_anew(folder, monkeypatch, content):
    asked = enumerate_nothing(monkeypatch)
    renew(folder)
    stored = json.loads((folder / FILE).read_text())
    curve = stored["worlds"]["0"]["frontier"]
    if content.isupper():
        wrong = {"NAN": ("kl", float("nan")), "LONG": ("kl", None), "HUGE": ("gold", 10**400), "TEXT": ("proxy", "1"),
                 "NEGATIVE": ("kl", -1.0), "BETAS": ("beta", 5.0)}[content]
        curve[wrong[0]] = curve[wrong[0]] + [1.0] if content == "LONG" else [*curve[wrong[0]][:-1], wrong[1]]
        content = json.dumps(stored)
    (folder / FILE).write_text(content.replace("KEY", stored["worlds"]["0"]["made_from"]))
    results = load_results(folder)
    assert results.frontiers == {} and "`alignkit report DIR` does it" in results.no_curve[0]
    renew(folder)
    assert len(asked) == 2
    assert load_results(folder).frontiers[0] == made_up()["frontier"]


def test_a_hostile_reason_is_spelled_out(folder, monkeypatch):
    enumerate_nothing(monkeypatch)
    renew(folder)
    stored = json.loads((folder / FILE).read_text())
    stored["worlds"]["0"] = {"made_from": stored["worlds"]["0"]["made_from"], "error": "\x1b[31m\u202e<script>\n"}
    (folder / FILE).write_text(json.dumps(stored))
    words = sweep_curves(load_results(folder)).words
    assert "<script>" in words and not set("\x1b\u202e\n") & set(words)


def test_a_real_models_sweep_keeps_its_estimate(folder, monkeypatch):
    asked = enumerate_nothing(monkeypatch)
    rng = np.random.default_rng(0)
    for run in (folder / "jobs").iterdir():
        (run / "run.json").write_text(json.dumps({"model": "models/real", "data": "pairs.jsonl", "seed": 0}))
        (run / "sft" / "evaluation.json").write_text(json.dumps({
            "set": {"samples": 4}, "columns": {"proxy": np.round(rng.normal(size=8), 3).tolist()}}))
        rng = np.random.default_rng(0)
    renew(folder)
    assert asked == [] and not (folder / FILE).exists()
    results = load_results(folder)
    assert results.no_curve == {} and "an estimate from 4 stored responses" in sweep_curves(results).words
    assert "exact" not in sweep_curves(results).words


def test_one_seed_has_its_own_curve_or_none_and_never_that_of_another_world(folder, monkeypatch):
    known = made_up()["frontier"]
    results = load_results(folder)
    object.__setattr__(results, "frontiers", {3: known, 5: known})
    monkeypatch.setattr("alignkit.sweeps.curves.sampled_frontier",
                        lambda results, seed: {"samples": 8} if seed in (4, 6) else None)
    found = {seed: sweep_curves(results, seed) for seed in (None, 3, 4, 5, 9)}
    object.__setattr__(results, "no_curve", {7: "this", 8: "that", 9: "this"})
    assert sweep_curves(results).words.endswith(" No exact curve of seeds 7, 9: this. No exact curve of seed 8: that.")
    assert {seed: curves.world for seed, curves in found.items()} == {None: 3, 3: 3, 4: None, 5: 5, 9: None}
    assert found[4].sampled == {"samples": 8} and found[9].sampled is None


@pytest.mark.parametrize("what", ["device", "large"])
def test_devices_and_large_files_are_no_models(folder, monkeypatch, what):
    asked, runs = enumerate_nothing(monkeypatch), sorted((folder / "jobs").iterdir())
    for path in (run / "sft" / "model.safetensors" for run in runs):
        if what == "device":
            path.unlink()
            path.symlink_to("/dev/zero")  # has no end
        else:
            os.truncate(path, sweeps_exact.MOST_BYTES + 1)
    assert known_curves(folder, runs, False)["no_curve"] == {}
    write_curves(folder, runs, False, print)
    assert asked == [] and not (folder / FILE).exists()


def test_reading_a_sweep_with_exact_curves_loads_no_torch(folder, monkeypatch):
    enumerate_nothing(monkeypatch)
    renew(folder)
    code = ("import sys; from alignkit.sweeps.results import load_results; from alignkit.sweeps.curves import "
            "sweep_curves; found = sweep_curves(load_results(sys.argv[1])); assert found.exact; "
            "assert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_points_that_were_measured_on_other_prompts_than_sft_have_no_curve(folder, monkeypatch):
    asked, runs = enumerate_nothing(monkeypatch), sorted((folder / "jobs").iterdir())
    for run in runs:
        (run / "sft" / "results.json").write_text(json.dumps({"gold_scale": SCALE, "evaluation_set": "a"}))
        (run / "ppo").mkdir()
        (run / "ppo" / "results.json").write_text(json.dumps({"evaluation_set": "b"}))
    renew(folder)
    assert asked == [] and load_results(folder).frontiers == {}
    for run in runs:
        (run / "ppo" / "results.json").write_text(json.dumps({"evaluation_set": "a"}))
    renew(folder)
    assert len(asked) == 1 and 0 in load_results(folder).frontiers
