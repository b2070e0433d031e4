"""The recorded sweep: made by the code that is here, possible at all, and the same when a part of it is made again."""

import json
import textwrap

import numpy as np
import pytest

from alignkit.exact import sweep as sweep_module
from alignkit.exact.sweep import load_sweep, source_hashes
from experiments import sweep as maker


@pytest.fixture(scope="module")
def sweep():
    return load_sweep()


def test_the_sweep_was_made_by_the_present_code(sweep):
    now = source_hashes()
    changed = sorted(name for name in now if sweep.sources.get(name) != now[name])
    assert not changed, (f"alignkit: {', '.join(changed)} changed since the sweep was made. If no figure can differ, "
                         f"run python -m experiments.sweep --confirm; otherwise {sweep.command}")


def test_docstrings_comments_and_line_breaks_do_not_change_a_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_module, "PACKAGE", tmp_path)

    def hashed(text: str) -> str:
        (tmp_path / "kl.py").write_text(textwrap.dedent(text))
        return source_hashes(["kl.py"])["kl.py"]

    first = hashed('"""About."""\n\ndef f(x):\n    """Twice."""\n    return 2 * x  # doubled\n')
    assert first == hashed('def f(\n    x,\n):\n    """Two times."""\n\n    return (2 * x)\n')
    assert first != hashed("def f(x):\n    return 3 * x\n")


def test_whole_folders_are_hashed_without_what_only_stores_figures():
    names = source_hashes()
    assert {"exact/enumeration.py", "formulas/losses.py", "forward/sampling.py", "ppo.py"} <= names.keys()
    assert not names.keys() & {"exact/cache.py", "exact/sweep.py"}


def test_no_run_is_above_the_exact_frontier(sweep):
    """The frontier is interpolated between β that are 20 % apart: 2e-3 SFT-sd is more than that costs."""
    for run in sweep.runs:
        which, curve = f"{run.method} {run.value:g}, seed {run.seed}", sweep.worlds[run.seed].gold_frontier
        assert run.proxy <= run.optimum + 2e-3, which
        assert run.gold <= np.interp(run.kl, curve["kl"], curve["gold"]) + 2e-2, which


def test_every_cell_is_there_and_a_trajectory_ends_where_its_run_ends(sweep):
    assert len({(run.method, run.value, run.seed) for run in sweep.runs}) == len(sweep.runs)
    for method in ("ppo", "dpo"):
        assert sweep.values(method) == sorted(maker.VALUES[method])
        for value in sweep.values(method):
            assert [run.seed for run in sweep.select(method, value)] == sweep.seeds
    for run in sweep.runs:
        assert run.trajectory["kl"][0] == pytest.approx(0, abs=1e-9) and run.trajectory["step"][0] == 0
        assert [run.trajectory[name][-1] for name in ("kl", "proxy", "gold")] == [run.kl, run.proxy, run.gold]
        assert np.mean(run.by_prompt["kl"]) == pytest.approx(run.kl, abs=1e-4)
        assert all(sum(shares.values()) == pytest.approx(1, abs=1e-4) for shares in run.shares.values())


def test_the_frontier_is_one(sweep):
    """Concave and rising, with slope β; best-of-n and gold along it are below; the reference is at 0."""
    for world in sweep.worlds.values():
        kl, proxy, beta = (np.array(world.frontier[name][1:-1], dtype=float) for name in ("kl", "proxy", "beta"))
        slope = np.diff(proxy) / np.diff(kl)
        assert (slope <= beta[:-1] * 1.01).all() and (slope >= beta[1:] * 0.99).all()
        assert world.frontier["kl"][0] == 0
        assert world.frontier["proxy"][0] == pytest.approx(world.sft["proxy"], abs=1e-5)
        assert world.sft["gold"] == pytest.approx(0, abs=1e-6)
        bound = np.interp(world.best_of_n["kl"], world.frontier["kl"], world.frontier["proxy"])
        assert (np.array(world.best_of_n["proxy"]) <= bound + 2e-2).all()
        gold = np.interp(world.frontier["kl"], world.gold_frontier["kl"], world.gold_frontier["gold"])
        assert (np.array(world.frontier["gold"]) <= gold + 2e-2).all()


def test_a_dearer_nat_buys_less_kl(sweep):
    for method in ("ppo", "dpo"):
        kl = [np.mean([run.kl for run in sweep.select(method, value)]) for value in sweep.values(method)]
        assert (np.diff(kl) < 0).all(), f"{method}: mean KL {kl} for {sweep.values(method)}"


def test_what_is_not_recorded_is_refused_by_name(sweep, tmp_path):
    with pytest.raises(ValueError, match="'grpo'"):
        sweep.values("grpo")
    with pytest.raises(ValueError, match="0.123"):
        sweep.select("ppo", 0.123)
    with pytest.raises(FileNotFoundError, match="experiments.sweep"):
        load_sweep(tmp_path / "none.json")


def test_the_file_is_small_and_the_table_is_the_files(sweep):
    assert sweep_module.FILE.stat().st_size < 1_000_000
    table = sweep_module.FILE.parents[2] / "docs" / "closeness.md"
    assert table.read_text(encoding="utf-8") == maker.closeness_table(sweep_module.FILE)


@pytest.mark.slow
def test_the_probe_comes_out_as_recorded(sweep, tmp_path):
    """SFT, reward model, PPO and DPO in small, made again: another machine may round differently, no more."""
    again = maker.probe(tmp_path)
    assert again.keys() == sweep.probe.keys()
    for name, value in sweep.probe.items():
        assert again[name] == pytest.approx(value, abs=0.02), name


def test_a_finished_cell_is_not_run_again_unless_its_key_changed(tmp_path):
    made = []

    def make() -> dict:
        made.append(1)
        return {"value": len(made)}

    path = tmp_path / "cells" / "one.json"
    assert [maker.kept(path, {"k": 1}, make)["value"] for _ in range(2)] == [1, 1]
    assert maker.kept(path, {"k": 2}, make) == {"value": 2}
    assert json.loads(path.read_text())["key"] == {"k": 2}
