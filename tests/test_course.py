"""The whole relay as one job: the notebooks themselves, on the desk world and on a real Llama with real preferences."""

import hashlib
import json
import pathlib
import subprocess
import sys

import nbformat
import pytest

STAGES = ("sft", "reward", "ppo", "frozen", "dpo")
NOTEBOOKS = ("00_the_world", "01_sft", "02_reward_model", "03a_ppo_by_hand", "03b_ppo", "04_freeze_and_evaluate",
             "05_dpo")


def alignkit(*arguments) -> subprocess.CompletedProcess:
    result = subprocess.run(
        [sys.executable, "-m", "alignkit", *map(str, arguments)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    out = tmp_path_factory.mktemp("course") / "run"
    alignkit("course", "--out", out)
    return out


def check_run(out):
    """What any finished course has left, whatever the model and the data."""
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) >= {"versions", "seed", "model", "data", "stages", "seconds"}
    assert set(STAGES) <= set(summary["stages"]) and set(NOTEBOOKS) <= set(summary["seconds"])
    assert "<script" not in (out / "report.html").read_text()
    for name in NOTEBOOKS:
        file = out / f"{name}.ipynb"
        assert file.stat().st_size < 2_000_000
        notebook = nbformat.read(file, 4)
        assert "widgets" not in notebook.metadata
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        assert not [output for output in outputs if output.output_type == "error"]
        assert [output for output in outputs if "image/png" in output.get("data", {})], f"{name} shows no picture"
    for stage in ("sft", "reward", "ppo", "frozen", "dpo"):
        assert (out / stage / "model.safetensors").is_file()
        assert not [f for f in (out / stage).rglob("*") if f.suffix in (".bin", ".pt", ".pkl")]
    alignkit("verify", out / "frozen")
    return summary


def test_the_desk_course_leaves_what_the_contract_says_and_it_learned(desk):
    stages = check_run(desk)["stages"]
    for name in ("sft", "ppo", "frozen", "dpo"):
        for figure in ("gold_mean", "gold_ci95", "proxy_mean", "kl_to_sft", "risky_failure_rate", "over_refusal_rate",
                       "paraphrase_agreement", "entropy"):
            assert figure in stages[name], f"{name} lacks {figure}"
    assert set(stages["reward"]) >= {"accuracy_labels", "accuracy_gold", "bayes_accuracy", "ece"}
    assert stages["sft"]["risky_failure_rate"] >= 0.25
    assert stages["reward"]["bayes_accuracy"] - stages["reward"]["accuracy_labels"] <= 0.05
    assert stages["ppo"]["gold_mean"] - stages["sft"]["gold_mean"] >= 0.4
    assert stages["ppo"]["risky_failure_rate"] < 0.06


def test_the_course_resumes_instead_of_repeating(desk):
    before = {path: path.stat().st_mtime_ns for path in desk.glob("0*.ipynb")}
    alignkit("course", "--out", desk)
    assert {path: path.stat().st_mtime_ns for path in desk.glob("0*.ipynb")} == before


def test_compare_puts_the_checkpoints_side_by_side(desk, tmp_path):
    alignkit("compare", desk / "sft", desk / "frozen", desk / "dpo", "--out", tmp_path / "comparison")
    text = json.dumps(json.loads(next((tmp_path / "comparison").glob("*.json")).read_text()))
    assert "gold_mean" in text and "risky_failure_rate" in text


SMALL = {
    "demonstrations": 64, "pairs": 64, "heldout_pairs": 32, "eval_prompts": 8, "eval_samples": 2, "max_length": 192,
    "max_new_tokens": 16, "scale_samples": 32, "iterations": 2, "prompts_per_iteration": 16, "minibatch_size": 8,
}
PPO_PARAMETERS = {"max_length", "max_new_tokens", "iterations", "prompts_per_iteration", "minibatch_size"}
REWRITTEN = {"jobs.json", "seconds.json", "summary.json", "report.html", ".lock"}  # records of the whole run


def readme_commands() -> list[list[str]]:
    """The commands of the README's section on models and data, in their order."""
    text = (pathlib.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    block = text.partition("## Your own model and data")[2].partition("```\n")[2].partition("```")[0]
    lines = [part for line in block.splitlines() for part in line.partition("#")[0].split("&&")]
    return [line.split()[1:] for line in lines if line.split()[:1] == ["alignkit"]]


def contents(out) -> dict[str, str]:
    """SHA-256 of every file below a run directory, by path."""
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(out.rglob("*")) if path.is_file() and path.name not in REWRITTEN}


@pytest.mark.shared
def test_the_examples_of_the_readme_go_through_one_after_another_and_lose_nothing(shared, tmp_path):
    """On a real Llama and real preferences, made small."""
    places = {
        "Qwen/Qwen2.5-0.5B": shared / "models" / "stories260K", "runs/qwen": tmp_path / "real",
        "pairs.jsonl": shared / "data" / "hh_rlhf_harmless.jsonl.gz", "frozen/qwen": tmp_path / "frozen",
        "comparison": tmp_path / "comparison",
    }
    commands, made = readme_commands(), {}
    assert [command[0] for command in commands] == [
        "check", "course", "run", "freeze", "verify", "compare", "advise", "run", "runs"]
    for command in commands:
        words = command
        for name, place in places.items():
            words = [word.replace(name, str(place)) for word in words]
        if command[0] in ("course", "run") and "--help" not in command:
            given = {word.partition("=")[0] for word in words}
            words += [part for name, value in SMALL.items() if name not in given for part in ("-p", f"{name}={value}")
                      if command[0] == "course" or name in PPO_PARAMETERS]
            words = ["pairs=64" if word == "pairs=2000" else word for word in words]
        alignkit(*words)
        present = contents(places["runs/qwen"]) if places["runs/qwen"].exists() else {}
        lost = sorted(name for name, digest in made.items() if digest not in present.values())
        assert not lost, f"after `alignkit {' '.join(command)}`: {lost}"
        made = present
        if command[0] == "course":
            stages = check_run(places["runs/qwen"])["stages"]
    assert "gold_mean" not in stages["ppo"]  # there is no gold here, and nothing pretends that there is
    assert {"proxy_mean", "kl_to_sft", "entropy"} <= set(stages["dpo"])
    assert 0 <= stages["reward"]["accuracy_labels"] <= 1 and "bayes_accuracy" not in stages["reward"]
    (aside,) = (places["runs/qwen"] / "aside").iterdir()
    assert json.loads((aside / "aside.json").read_text())["parameters"]["kl_coef"] is None
