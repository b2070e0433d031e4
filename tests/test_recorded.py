"""The recorded sweep: made by the code that is here, possible at all, and the same when a part of it is made again."""

import functools
import json
import textwrap
from dataclasses import fields
from pathlib import Path

import nbformat
import numpy as np
import pytest

from alignkit.exact import sweep as sweep_module
from alignkit.exact.sweep import RecordedRun, RecordedWorld, load_sweep, source_hashes
from alignkit.storage import read_json
from alignkit.sweeps.plan import plan
from alignkit.sweeps.results import FIGURES, load_results
from alignkit.sweeps.table import numbers
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


# --- how it is made: `alignkit sweep experiments/closeness.ipynb` ----------------------------------------------------
def test_the_sweep_is_two_grids_whose_runs_share_the_models_and_curves_of_their_seed(sweep, tmp_path):
    planned = [plan(str(maker.NOTEBOOK), tmp_path, grid) for grid in maker.grids(sweep.seeds)]
    jobs = [(job.shown["method"], job.shown["value"], job.shown["seed"]) for each in planned for job in each.jobs]
    assert sorted(jobs) == sorted((run.method, run.value, run.seed) for run in sweep.runs)
    assert planned[0].shared == planned[1].shared and len(planned[0].shared) == len(sweep.seeds)
    for shared in planned[0].shared.values():
        assert [Path(path).stem for path in shared.notebooks] == ["01_sft", "02_reward_model", "closeness_world"]
        assert {stem: {**values} for stem, values in shared.values.items()} == {
            stem: {"seed": shared.shown["seed"]} for stem in shared.values}  # everything else as in the course


TOY = """\
import json, os
from pathlib import Path
if value == 1.5 and os.path.exists(STOP):
    raise RuntimeError("stopped")
for name, content in ((f"{method}/exact.json", [method, value, seed]), ("world/curves.json", seed)):
    Path(run, name).parent.mkdir(exist_ok=True)
    Path(run, name).write_text(json.dumps({"is": content}))"""


def test_the_record_goes_on_where_it_stopped_and_has_every_run_in_order(tmp_path, monkeypatch):
    stop, toy = tmp_path / "stop", tmp_path / "toy.ipynb"
    parameters = nbformat.v4.new_code_cell("run = ''\nseed = 0\nmethod = 'ppo'\nvalue = 0.2",
                                           metadata={"tags": ["parameters"]})
    cells = [parameters, nbformat.v4.new_code_cell(TOY.replace("STOP", repr(str(stop))))]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), toy)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(maker, "NOTEBOOK", toy)
    monkeypatch.setattr(maker, "VALUES", {"dpo": (0.5,), "ppo": (1.5, 0.2)})
    monkeypatch.setattr(maker, "probe", lambda folder: {"ppo kl": 0.5})
    stop.touch()
    with pytest.raises(SystemExit, match="not all runs finished"):
        maker.record([1, 0], tmp_path / "s", workers=2)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "s" / "jobs").rglob("exact.json")}
    assert len(finished) == 4
    stop.unlink()
    made = maker.record([1, 0], tmp_path / "s", workers=2)
    assert finished.items() <= {path: path.stat().st_mtime_ns for path in finished}.items()
    assert [run["is"] for run in made["runs"]] == [
        [method, value, seed] for seed in (1, 0) for method, value in (("dpo", 0.5), ("ppo", 1.5), ("ppo", 0.2))]
    assert [world["is"] for world in made["worlds"]] == [1, 0]
    assert made["command"] == "python -m experiments.sweep --seeds 1 0" and made["sources"] == source_hashes()
    assert load_results(tmp_path / "s").commands[0].startswith("alignkit sweep toy.ipynb -p method=dpo -p value=0.5 ")


@pytest.mark.slow
def test_the_two_notebooks_write_what_the_record_and_the_plane_read(tmp_path, monkeypatch):
    """Their cells in order, in a world of the probe's size: every field of the record, and the plane's figures."""
    monkeypatch.chdir(maker.NOTEBOOK.parents[1])
    small = functools.partial(maker.Cell, size=maker.PROBE)
    maker.make_world(0, tmp_path, maker.PROBE)
    monkeypatch.setattr(maker, "Cell", small)
    for name, given in (("closeness_world", {}), ("closeness", {"method": "dpo", "value": 1.0})):
        space: dict[str, object] = {}
        for cell in nbformat.read(maker.NOTEBOOK.with_name(f"{name}.ipynb"), 4).cells:
            if cell.cell_type == "code":
                exec(cell.source, space)
                if "parameters" in cell.metadata.get("tags", []):
                    space |= {"run": str(tmp_path), **given}
    curves, run = read_json(tmp_path / "world" / "curves.json"), read_json(tmp_path / "dpo" / "exact.json")
    assert curves.keys() == {field.name for field in fields(RecordedWorld)}
    assert run.keys() == {field.name for field in fields(RecordedRun)}
    assert (run["method"], run["value"], run["seed"]) == ("dpo", 1.0, 0)
    assert run["kl"] == pytest.approx(load_sweep().probe["dpo kl"], abs=0.02)
    found = numbers(tmp_path)
    assert {axis: found[f"dpo.{name}"] for axis, name in FIGURES.items()} == {axis: run[axis] for axis in FIGURES}
    assert len(list((tmp_path / "world").glob("*.npy"))) == 4
