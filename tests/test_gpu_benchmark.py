"""The GPU benchmark runs, on a CPU and tiny shapes, and times nothing if the numbers are wrong. No time is asserted."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from alignkit.forward import cuda_graph, reading
from benchmarks import gpu

ROOT = Path(__file__).resolve().parents[1]


def test_on_a_cpu_it_runs_whole_and_says_that_it_is_no_result(tmp_path, capsys):
    file = tmp_path / "new" / "gpu.json"
    gpu.main(["--quick", "--device", "cpu", "--json", str(file)])
    results, said = json.loads(file.read_text()), capsys.readouterr().out
    assert results["gpu"] is None and "no result about a GPU" in results["note"] and results["note"] in said
    assert len(results["checks"]) >= 12
    assert all(check["difference"] <= check["tolerance"] <= 1e-4 for check in results["checks"])
    assert results["limits"]["flops"] > 0 and results["limits"]["bandwidth"] > 0
    (row,) = results["decoding"]
    for side in ("alignkit", "generate"):
        assert row[side]["tokens_per_second"] == pytest.approx(4 * 20 / row[side]["seconds"])
        assert row[side]["share_of_limit"] == pytest.approx(
            row[side]["tokens_per_second"] / row["limit_tokens_per_second"])
    assert not row["graph"]
    assert [row["step"] for row in results["training"]] == ["PPO update", "DPO step", "DPO step, TRL"]
    for row in results["training"][: 3 if importlib.util.find_spec("trl") else 2]:
        assert row["seconds"] > 0 and row["mfu"] > 0 and row["peak_gb"] is None
    assert said.strip().endswith("|") and "| tiny | PPO update |" in said


@pytest.mark.parametrize(
    ("owner", "name", "broken", "message"),
    [
        (cuda_graph, "_error", lambda policy: 0.5, "decoder: log-probs against the model's own"),
        (cuda_graph, "usable", lambda policy, tokens: False, "decoder: 0 if it is used"),
        (gpu, "_flat", lambda model: torch.rand(3), "PPO step: gradient of the policy"),
        (reading, "checkpoint", lambda read, states, *rest, **options: read(states.detach(), *rest), "their gradient"),
    ],
    ids=["decoder", "decoder not used", "gradients", "log-probs in parts"],
)
def test_wrong_numbers_end_it_before_anything_is_timed(owner, name, broken, message, monkeypatch, tmp_path):
    monkeypatch.setattr(owner, name, broken)
    monkeypatch.setattr(gpu, "limits", None)
    with pytest.raises(SystemExit, match=f"wrong numbers on cpu, so nothing was timed: .*{message}"):
        gpu.main(["--quick", "--device", "cpu", "--json", str(tmp_path / "gpu.json")])
    assert not (tmp_path / "gpu.json").exists()


def test_on_a_cpu_the_full_shapes_are_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu"])
    assert "--device is cpu, expected a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(("shape", "parameters"), zip(gpu.FULL.shapes, (494_032_768, 1_543_714_304), strict=True))
def test_the_shapes_are_those_of_qwen2_5(shape, parameters):
    policy = gpu.qwen2(shape, torch.device("meta"))
    assert sum(weight.numel() for weight in policy.parameters()) == parameters


def test_the_page_about_speed_names_the_command_and_claims_nothing_that_was_not_measured():
    page, recorded = (ROOT / "docs/speed.md").read_text(), ROOT / "benchmarks/results/gpu.json"
    assert "python -m benchmarks.gpu --json benchmarks/results/gpu.json" in page
    assert recorded.exists() or "GPU: no figures" in page
