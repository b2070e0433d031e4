"""A finished stage is never deleted: built beside, swapped at the end, set aside with what made it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest

from alignkit import folders
from alignkit.errors import DataError, NotebookFailed, RunError
from alignkit.jobs import cli, notebooks
from alignkit.jobs.notebooks import run_notebook
from alignkit.runs.records import start_run, write_results
from alignkit.runs.stage_folders import is_finished, prune, removable, set_aside, stage_folder

BUILD = """from pathlib import Path
from alignkit import stage_folder, start_run, write_results
run = start_run(run, 'tiny', 'desk', seed)
stage = stage_folder(run, 'ppo')
(stage / 'weights.txt').write_text(str(steps))"""
FINISH = "write_results(run, 'ppo', {'steps': steps}, built=stage)"


def notebook(path: Path, *cells: str, parameters: str = "run = 'runs/x'\nsteps = 1\nseed = 0") -> Path:
    nb = nbformat.v4.new_notebook()
    nb.cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
                *map(nbformat.v4.new_code_cell, cells)]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)
    return path


@pytest.fixture
def run(tmp_path):
    """A run directory in which 03b_ppo was run with steps=1."""
    source = notebook(tmp_path / "03b_ppo.ipynb", BUILD, "if steps == 2: raise RuntimeError('no')", FINISH)
    run_notebook(source, tmp_path / "run", progress=False)
    return source, tmp_path / "run"


@pytest.fixture(autouse=True)
def _needs_nothing(monkeypatch):
    monkeypatch.setattr(notebooks, "NEEDS", {})


def test_a_rerun_that_fails_leaves_the_finished_stage_its_record_and_its_notebook(run):
    source, out = run
    before = {path: path.read_bytes() for path in (out / "ppo").iterdir()}
    executed = (out / "03b_ppo.ipynb").read_bytes()
    with pytest.raises(NotebookFailed, match="RuntimeError: no"):
        run_notebook(source, out, {"steps": 2}, progress=False)
    assert {path: path.read_bytes() for path in (out / "ppo").iterdir()} == before
    assert (out / "03b_ppo.ipynb").read_bytes() == executed and (out / "03b_ppo.new.ipynb").exists()
    jobs = json.loads((out / "jobs.json").read_text())["03b_ppo"]
    assert jobs["status"] == "failed" and jobs["kept"]["status"] == "finished"
    assert "ppo/weights.txt" in jobs["kept"]["made"]


def test_after_a_failed_rerun_the_old_parameters_are_done_already(run, capsys):
    source, out = run
    with pytest.raises(NotebookFailed):
        run_notebook(source, out, {"steps": 2}, progress=False)
    run_notebook(source, out, {"steps": 1})
    assert "done already" in capsys.readouterr().out


def test_a_rerun_that_succeeds_sets_the_old_stage_aside_with_date_parameters_and_notebook(run):
    source, out = run
    run_notebook(source, out, {"steps": 3}, progress=False)
    assert (out / "ppo" / "weights.txt").read_text() == "3" and not (out / "ppo.new").exists()
    (aside,) = (out / "aside").iterdir()
    record = json.loads((aside / "aside.json").read_text())
    assert (aside / "ppo" / "weights.txt").read_text() == "1" and (aside / "03b_ppo.ipynb").exists()
    assert record["parameters"]["steps"] == 1 and record["finished"] and record["why"] == "made again"
    assert record["moved"].startswith(aside.name.removeprefix("ppo-")[:10])


def test_a_notebook_that_writes_in_place_loses_nothing_either(tmp_path):
    cells = ("from pathlib import Path\nPath(run, 'ppo').mkdir(exist_ok=True)\n"
             "Path(run, 'ppo', 'weights.txt').write_text(str(steps))", "if steps == 2: raise RuntimeError('no')")
    source, out = notebook(tmp_path / "03b_ppo.ipynb", *cells), tmp_path / "run"
    run_notebook(source, out, progress=False)
    with pytest.raises(NotebookFailed):
        run_notebook(source, out, {"steps": 2}, progress=False)
    assert "1" in {path.read_text() for path in out.rglob("weights.txt")}
    run_notebook(source, out, {"steps": 3}, progress=False)
    assert {"1", "3"} <= {path.read_text() for path in out.rglob("weights.txt")}


def test_kill_9_of_the_command_in_a_rerun_leaves_the_finished_stage(run):
    source, out = run
    slow = notebook(source, BUILD, "import time; time.sleep(60)", FINISH)
    code = "from alignkit.jobs import notebooks; notebooks.NEEDS = {}; notebooks.run_notebook(*%r, {'steps': 9})"
    process = subprocess.Popen([sys.executable, "-c", code % ((str(slow), str(out)),)])
    try:
        end = time.monotonic() + 60
        while not (out / "ppo.new" / "weights.txt").exists() and time.monotonic() < end:
            time.sleep(0.1)
        assert (out / "ppo.new" / "weights.txt").exists()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (out / "ppo" / "weights.txt").read_text() == "1" and is_finished(out / "ppo")


def test_a_stage_whose_checkpoints_are_there_is_not_finished_and_goes_on_in_its_place(tmp_path):
    run = start_run(tmp_path / "run", "tiny", "desk", 0)
    built = stage_folder(run, "ppo")
    (built / "checkpoints").mkdir()
    write_results(run, "ppo", {"a": 1})  # killed before the stage was finished
    assert not is_finished(built) and stage_folder(run, "ppo") == run / "ppo"
    write_results(run, "ppo", {"a": 1}, built=built)
    assert is_finished(built) and stage_folder(run, "ppo") == run / "ppo.new"


def test_restart_sets_the_unfinished_stage_aside(tmp_path):
    run = start_run(tmp_path / "run", "tiny", "desk", 0)
    (stage_folder(run, "dpo") / "metrics.jsonl").write_text("{}\n")
    assert not any(stage_folder(run, "dpo", restart=True).iterdir())
    (kept,) = (run / "aside").rglob("metrics.jsonl")
    assert json.loads((kept.parents[1] / "aside.json").read_text())["why"] == "begun anew"


def test_prune_lists_before_it_deletes_and_touches_nothing_else(run, capsys):
    source, out = run
    run_notebook(source, out, {"steps": 3}, progress=False)
    part = out / "ppo" / f".x.{folders.MARK}-new-0123456789ab"
    part.mkdir()
    mine = out / "ppo.tmp-mine"
    mine.mkdir()
    (mine / "note.txt").write_text("a stranger's")
    assert cli.main(["runs", "prune", str(out)]) == 0
    listed = capsys.readouterr().out
    assert all(text in listed for text in ("finished ppo, set aside", "left by a process that was killed", "2 folders"))
    assert len(list((out / "aside").iterdir())) == 1 and part.exists()
    assert cli.main(["runs", "prune", str(out), "--yes"]) == 0
    assert not list((out / "aside").iterdir()) and not part.exists() and (mine / "note.txt").exists()
    assert (out / "ppo" / "weights.txt").read_text() == "3" and removable(out) == []
    with pytest.raises(RunError, match="no run directory"):
        removable(mine)
    prune([])


def test_prune_follows_no_link_and_leaves_what_a_living_process_writes(run, tmp_path):
    from alignkit.storage import locked

    source, out = run
    part = out / "ppo" / f".x.{folders.MARK}-new-0123456789ab"
    part.mkdir()
    with locked(part):
        assert removable(out) == []
    (out / "aside").mkdir()
    (out / "aside" / "mine").mkdir()
    (out / "aside" / "mine.txt").write_text("a note")
    assert [folder.path for folder in removable(out)] == [part]
    home = tmp_path / "home"
    (home / "letters").mkdir(parents=True)
    shutil.rmtree(out / "aside")
    (out / "aside").symlink_to(home)
    with pytest.raises(RunError, match="is a link"):
        removable(out)
    with pytest.raises(NotebookFailed, match="is a link"):
        run_notebook(source, out, {"steps": 3}, progress=False, force=True)
    assert (home / "letters").exists()


def test_a_process_killed_after_it_set_the_old_stage_aside_is_finished_by_the_next(tmp_path):
    run = start_run(tmp_path / "run", "tiny", "desk", 0)
    write_results(run, "ppo", {"a": 1}, built=stage_folder(run, "ppo"))
    built = stage_folder(run, "ppo")
    (built / "results.json").write_text('{"a": 2}')
    set_aside(run, run / "ppo", "made again")
    assert stage_folder(run, "ppo") == run / "ppo.new" and (run / "ppo" / "results.json").read_text() == '{"a": 2}'


def test_a_users_own_notebook_with_a_stage_can_run_again_with_other_parameters(tmp_path):
    cells = [cell.replace("'ppo'", "'mine'") for cell in (BUILD, FINISH)]
    source, out = notebook(tmp_path / "mine_nb.ipynb", *cells), tmp_path / "run"
    for steps in (3, 5):
        run_notebook(source, out, {"steps": steps}, progress=False)
        assert (out / "mine" / "weights.txt").read_text() == str(steps) and is_finished(out / "mine")


def test_a_folder_or_link_of_a_user_that_is_called_checkpoints_is_left_alone(tmp_path):
    run = start_run(tmp_path / "run", "tiny", "desk", 0)
    built = stage_folder(run, "ppo")
    (built / "deep" / "checkpoints").mkdir(parents=True)
    (built / "deep" / "checkpoints" / "notes.txt").write_text("mine")
    (built / "checkpoints").symlink_to(tmp_path)
    write_results(run, "ppo", {"a": 1}, built=built)
    assert (run / "ppo" / "deep" / "checkpoints" / "notes.txt").exists() and is_finished(run / "ppo")
    assert not folders.leftovers(run)


def test_two_stages_set_aside_in_one_second_have_two_names(tmp_path):
    run = start_run(tmp_path / "run", "tiny", "desk", 0)
    places = set()
    for _ in range(3):
        (run / "ppo").mkdir()
        places.add(set_aside(run, run / "ppo", "made again"))
    assert len(places) == 3 and all(place.is_dir() for place in places)


# --- facts, before a kernel starts ------------------------------------------------------------------------------------
@pytest.fixture
def no_kernel(monkeypatch):
    monkeypatch.setattr(notebooks, "_execute", lambda *_: pytest.fail("a kernel was started"))


def test_facts_of_another_run_are_refused_before_a_kernel_starts(tmp_path, no_kernel):
    start_run(tmp_path / "run", "tiny", "desk", 0)
    source = notebook(tmp_path / "n.ipynb", parameters="run = 'x'\nmodel = 'tiny'\ndata = 'desk'\nseed = 0")
    with pytest.raises(RunError, match="seed was 0, now 3"):
        run_notebook(source, tmp_path / "run", {"seed": 3})


def test_a_job_takes_model_data_and_seed_from_the_run_that_is_there(tmp_path, monkeypatch):
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    start_run(tmp_path / "run", "tiny", str(data), 7)
    source = notebook(tmp_path / "n.ipynb", parameters="run = 'x'\nmodel = 'tiny'\ndata = 'desk'\nseed = 0")
    jobs = []
    monkeypatch.setattr(notebooks, "_execute", lambda job, *_: (jobs.append(job.settings), job.executed.touch()))
    run_notebook(source, tmp_path / "run", progress=False)
    assert jobs == [{"model": "tiny", "data": str(data), "seed": 7}]
    start_run(tmp_path / "other", "tiny", "some/dataset", 7)
    with pytest.raises(RunError, match="some/dataset', which is not a file or folder here.* -p data=some/dataset"):
        run_notebook(source, tmp_path / "other", progress=False)


@pytest.mark.parametrize("name, content, reason", [("pairs.txt", b"x", "unknown kind of file"),
                                                   ("pairs.parquet", b"not parquet", "not a readable Parquet file")])
def test_data_that_cannot_be_read_is_refused_before_a_kernel_starts(tmp_path, no_kernel, name, content, reason):
    (tmp_path / name).write_bytes(content)
    source = notebook(tmp_path / "n.ipynb", parameters="run = 'x'\nmodel = 'tiny'\ndata = 'desk'\nseed = 0")
    with pytest.raises(DataError, match=reason):
        run_notebook(source, tmp_path / "run", {"data": str(tmp_path / name)})


def test_a_missing_stage_and_one_that_was_changed_are_refused_before_a_kernel_starts(tmp_path, no_kernel, monkeypatch):
    monkeypatch.setattr(notebooks, "NEEDS", {"04_freeze_and_evaluate": ("ppo",)})
    source, out = notebook(tmp_path / "04_freeze_and_evaluate.ipynb", BUILD), tmp_path / "run"
    with pytest.raises(RunError, match="ppo has no model: run notebook 03b_ppo"):
        run_notebook(source, out)
    (out / "ppo").mkdir(parents=True)
    (out / "ppo" / "config.json").write_text("{}")
    made = {"ppo/config.json": "0" * 64}
    record = {"status": "finished", "made": made, "key": {}, "seconds": 1}
    (out / "jobs.json").write_text(json.dumps({"03b_ppo": record}))
    with pytest.raises(RunError, match=r"config.json is not what notebook 03b_ppo wrote \(its SHA-256 differs"):
        run_notebook(source, out)


# --- folders ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, in_one_step):
    if not in_one_step:
        monkeypatch.setattr(folders, "_swap", lambda one, other: False)
    place = tmp_path / "model"
    with folders.replacing(place) as new:
        (new / "a").write_text("1")
    with folders.replacing(place, keep=True) as new:
        (new / "b").write_text("2")
    assert sorted(os.listdir(place)) == ["a", "b"]
    with pytest.raises(ZeroDivisionError), folders.replacing(place) as new:
        (new / "a").write_text("other")
        raise ZeroDivisionError
    assert (place / "a").read_text() == "1" and os.listdir(tmp_path) == ["model"]


def test_a_process_killed_between_two_renames_left_a_folder_that_readers_find(tmp_path):
    old = tmp_path / f".model.{folders.MARK}-old-0123456789ab"
    old.mkdir()
    (old / "a").write_text("1")
    folders.recover(tmp_path / "model")
    assert (tmp_path / "model" / "a").read_text() == "1"


def test_a_reader_between_two_renames_does_not_disturb_the_writer(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "_swap", lambda one, other: False)
    place, readers = tmp_path / "model", []

    def between(point):
        if point == "folder.between":
            readers.append(threading.Thread(target=folders.recover, args=(place,)))
            readers[0].start()
            time.sleep(0.1)

    with folders.replacing(place) as new:
        (new / "a").write_text("1")
    monkeypatch.setattr(folders, "reached", between)
    with folders.replacing(place) as new:
        (new / "a").write_text("2")
    readers[0].join()
    assert (place / "a").read_text() == "2" and os.listdir(tmp_path) == ["model"]


def test_a_folder_that_is_a_link_is_replaced_where_it_points(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "model").symlink_to("real")
    with folders.replacing(tmp_path / "model") as new:
        (new / "a").write_text("1")
    assert (tmp_path / "model").is_symlink() and (tmp_path / "real" / "a").read_text() == "1"
    assert sorted(os.listdir(tmp_path)) == ["model", "real"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_record_that_is_a_pipe_or_a_bomb_is_refused_at_once(tmp_path):
    from alignkit.storage import read_json

    os.mkfifo(tmp_path / "jobs.json")
    with pytest.raises(RunError, match="no plain file"):
        read_json(tmp_path / "jobs.json")
    (tmp_path / "bomb.json").write_text("[" + "[]," * 2_000_000 + "[]]")
    begun = time.monotonic()
    with pytest.raises(RunError, match="more than 1,048,576 lists"):
        read_json(tmp_path / "bomb.json", list)
    assert time.monotonic() - begun < 5


def test_15_what_a_killed_process_left_is_swept_unless_somebody_holds_it_or_it_has_no_marker(tmp_path):
    from alignkit.storage import locked

    dead, alive = (tmp_path / f".model.{folders.MARK}-new-{digit * 12}" for digit in "ab")
    strangers = [tmp_path / name for name in ("model.tmp-mine", ".model.tmp-1", f".other.{folders.MARK}-new-{'c' * 12}",
                                              f".model.{folders.MARK}-new-mine")]
    for folder in (dead, alive, *strangers):
        folder.mkdir()
        (folder / "note").write_text("x")
    with locked(alive), folders.replacing(tmp_path / "model"):
        assert not dead.exists()
    assert alive.exists() and all((folder / "note").exists() for folder in strangers)
