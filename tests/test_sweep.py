"""Sweeps: the grid, what is refused, every job's one result, and what remains when something dies."""

import contextlib
import csv
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import psutil
import pytest

from alignkit.errors import ParameterError, RunError, RunInUse
from alignkit.jobs import cli
from alignkit.jobs.notebooks import run_notebook
from alignkit.runs.lock import run_lock
from alignkit.sweeps import engine, table
from alignkit.sweeps.grid import Range, axis, draw, grid, is_id, job_id
from alignkit.sweeps.job import begin_with, is_done
from alignkit.sweeps.plan import plan, spec_from
from alignkit.sweeps.sweep import sweep

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PARAMETERS = "run = ''\nseed = 0\nrate: float = 1.0\nsizes = [1]\nname = 'plain'"
RESULT = """\
import json
from pathlib import Path
Path(run, 'toy').mkdir(exist_ok=True)
results = {'score': rate * 2 + seed, 'deep': {'pair': [seed, 0.5]}, 'word': name, 'sizes': sizes}
Path(run, 'toy', 'results.json').write_text(json.dumps(results))"""
# a job with a mark, MARKS/SEED, notes its kernel beside it and waits, the first time
WAITS = """\
import os, time
from pathlib import Path
marks = Path(MARKS)
mark = marks / f'{seed}'
if mark.exists():
    mark.unlink()
    (marks / f'{seed}.pid').write_text(str(os.getpid()))
    time.sleep(3600)"""


def notebook(path: Path, *cells: str, parameters: str = PARAMETERS, **says) -> Path:
    nb = nbformat.v4.new_notebook(metadata={"alignkit": says} if says else {})
    nb.cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
                *map(nbformat.v4.new_code_cell, cells)]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)
    return path


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "table.jsonl").read_text(encoding="utf-8").splitlines()]


def scores(out: Path) -> dict:
    return {row["seed"]: row.get("toy.score") for row in rows(out)}


def processes_in(out: Path) -> list[psutil.Process]:
    """The processes that have a file of the sweep open, as its driver, workers and kernels have its lock."""
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has just ended, or belongs to somebody else
            left += [process] if any(Path(file.path).is_relative_to(out) for file in process.open_files()) else []
    return left


# --- the grid --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text, values", [
    ("0.05,0.1,0.2", ["0.05", "0.1", "0.2"]),
    (" 1 , 2 ", ["1", "2"]),
    ("0..4", ["0", "1", "2", "3", "4"]),
    ("-2..0,7", ["-2", "-1", "0", "7"]),
    ("3..3", ["3"]),
    ("1,1,2", ["1", "2"]),
    ("'a,b',c", ["a,b", "c"]),
    ('"a,\\"b\\"" , \'\'', ['a,"b"', ""]),
    ("[1,2],[3,\"]\"]", ["[1,2]", "[3,\"]\"]"]),
    ('{"a": [1, 2]}', ['{"a": [1, 2]}']),
    ("../data,prompt=x", ["../data", "prompt=x"]),
    ("größe,日本", ["größe", "日本"]),
])
def test_the_values_of_a_parameter(text, values):
    assert axis("x", text) == values


@pytest.mark.parametrize("text, says", [
    ("", "x is '': a value is empty"), ("1,,2", "a value is empty"), ("1,", "a value is empty"),
    ("'a", "the quote ' is not closed"), ("[1,2", r"the bracket \[ is not closed"),
    ("'a'b", "expected a comma"), ("4..0", r"the range goes down; write 0\.\.4"),
    ("0.1..0.5", "add --random N"), ("log:1..2", "add --random N"), ("0..9999999", "values, expected 100,000 at most"),
])
def test_values_that_say_nothing_are_refused(text, says):
    with pytest.raises(ParameterError, match=says):
        axis("x", text)


@pytest.mark.parametrize("text, says", [
    ("2..1", "LOW below HIGH"), ("log:0..1", "above 0"), ("log:-1..1", "above 0"), ("1..1", "LOW below HIGH"),
    ("0.1..0.5,3", "give it alone"),
])
def test_ranges_to_draw_from_that_are_none(text, says):
    with pytest.raises(ParameterError, match=says):
        axis("x", text, drawn=True)


def test_a_whole_number_is_drawn_from_whole_ends():
    with pytest.raises(ParameterError, match="must the ends be"):
        axis("x", "0.5..3", drawn=True, integer=True)
    assert axis("x", "1..3", drawn=True, integer=True) == Range(1, 3, False, True)


def test_the_grid_is_the_cross_product_in_order():
    jobs = grid({"a": ["1", "2"], "b": ["x", "y", "z"]})
    assert [(job["a"], job["b"]) for job in jobs] == [(a, b) for a in "12" for b in "xyz"]
    assert grid({}) == [{}]
    with pytest.raises(ParameterError, match="has 1,000,000 jobs"):
        grid({"a": list(map(str, range(1000))), "b": list(map(str, range(1000)))})
    with pytest.raises(ParameterError, match="--random draws from ranges"):
        grid({"a": ["1"]}, draws=3)


def test_draws_are_reproducible_inside_their_range_and_grow_at_the_end():
    for among in (Range(0.1, 0.3), Range(1e-5, 1e-1, log=True), Range(-3, 5, integer=True), Range(1, 900, True, True)):
        drawn = draw("x", among, 2000, seed=3)
        assert drawn == draw("x", among, 2000, seed=3) and drawn[:50] == draw("x", among, 50, seed=3)
        assert all(among.low <= value <= among.high for value in drawn)
        assert drawn[:9] != draw("x", among, 9, seed=4) and drawn[:9] != draw("y", among, 9, seed=3)
        assert all(isinstance(value, int) for value in drawn) is among.integer
        share = sum(value <= (math.sqrt(among.low * among.high) if among.log else (among.low + among.high) / 2)
                    for value in drawn) / 2000
        assert 0.45 < share < 0.6  # half of the draws lie below the middle, which is the geometric one for log
    assert {*draw("n", Range(0, 3, integer=True), 200, 0)} == {0, 1, 2, 3}
    jobs = grid({"kl": axis("kl", "log:0.01..1", drawn=True), "seed": ["0", "1"]}, draws=3)
    assert len(jobs) == 6 and len({job["kl"] for job in jobs}) == 3


def test_ids_are_stable_distinct_and_names_of_folders():
    assert job_id("03b_ppo", {"kl_coef": 0.1, "seed": 3}, {"a": 1}) == "kl_coef=0.1_seed=3_1378c015d8"
    assert job_id("x", {"a": 1, "z": 2}, {}, ["z"]).startswith("z=2_a=1_")
    assert job_id("x", {"n": -2}, {}).startswith("n=-2_")
    assert job_id("x", {"b": 1, "a": 2}, {}) == job_id("x", {"a": 2, "b": 1}, {})
    values = ("a/b", "a\\b", "a b", "a-b", "ä", "", "..", "x" * 300)
    many = {job_id("x", {"name": value}, {"name": value}) for value in values}
    assert len(many) == 8
    assert not any(map(is_id, ("../x_1", "a/b", "", ".hidden", "a b", "a\n", "ä")))
    for name in many:
        assert is_id(name) and len(name.encode()) < 100 and not set(name) & set("/\\ *?\n") and not name.startswith(".")


# --- what a sweep will run -------------------------------------------------------------------------------------------
def test_everything_wrong_is_listed_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    source = notebook(tmp_path / "toy.ipynb")
    monkeypatch.chdir(tmp_path)
    given = ["-p", "rat=1,2", "-p", "seed=0,x", "-p", "rate=1,fast", "-p", "name='a"]
    assert cli.main(["sweep", str(source), *given, "--out", "s"]) == 1
    said = capsys.readouterr().err
    assert "rat: toy has no such parameter; did you mean rate" in said and "seed is 'x', expected an int" in said
    assert "rate is 'fast', expected a finite number" in said and "the quote ' is not closed" in said
    assert os.listdir(tmp_path) == ["toy.ipynb"]
    for wrong, says in ((["-p", "seed=-1..1"], "seed is -1, expected a whole number from 0"),
                        (["-p", "seed=0", "--random", "3"], "--random draws from ranges"),
                        (["-p", "run=a,b"], "run directory is given by `--out`"),
                        (["-p", "seed=0", "-p", "seed=1"], "seed is given twice"),
                        (["--retries", "-1"], "retries is -1")):
        assert cli.main(["sweep", str(source), *wrong, "--out", "s"]) == 1
        assert says in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["sweep", str(source), "--workers", "0", "--out", "s"])
    assert os.listdir(tmp_path) == ["toy.ipynb"]


def test_a_dry_run_lists_the_jobs_and_writes_nothing(tmp_path, monkeypatch, capsys):
    source = notebook(tmp_path / "toy.ipynb")
    monkeypatch.chdir(tmp_path)
    given = ["-p", "rate=log:0.01..1", "-p", "seed=0,1", "-p", "sizes='1,2'"]
    arguments = ["sweep", str(source), *given, "--random", "3", "--random-seed", "7", "--out", "s", "--dry-run"]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert said.startswith("6 jobs of toy; ") and "drawn with seed 7" in said
    assert len(said.splitlines()) == 7 and said.count("sizes=[1, 2]") == 6
    assert cli.main(arguments) == 0 and capsys.readouterr().out == said
    assert os.listdir(tmp_path) == ["toy.ipynb"]


def test_windows_is_refused_before_anything_is_listed(tmp_path, monkeypatch, capsys):
    for dry_run in (True, False):
        with monkeypatch.context() as windows:
            windows.setattr("alignkit.sweeps.sweep.os.name", "nt")
            with pytest.raises(RunError, match="Linux, macOS, WSL"):
                sweep("03b_ppo", str(tmp_path / "s"), {"seed": "0,1"}, dry_run=dry_run)
    assert not capsys.readouterr().out and not (tmp_path / "s").exists()


def test_a_default_that_is_given_is_the_same_job(tmp_path):
    source = str(notebook(tmp_path / "toy.ipynb"))
    one, same, other = (plan(source, tmp_path / "s", given).jobs[0].id
                        for given in ({"rate": "2"}, {"rate": "2.0", "seed": "0"}, {"rate": "2", "seed": "1"}))
    assert one.rpartition("_")[2] == same.rpartition("_")[2] != other.rpartition("_")[2]
    assert len(plan(source, tmp_path / "s", {"rate": "2,2.0"}).jobs) == 1
    one, two = plan(source, tmp_path / "s", {"rate": "2", "seed": "1,2"}).jobs
    assert one.id.startswith("seed=1_rate=2.0_") and two.id.startswith("seed=2_rate=2.0_")  # what varies comes first
    assert one.id.rpartition("_")[2] == other.rpartition("_")[2]
    spec = plan(source, tmp_path / "s", {"sizes": "'3,4'"}).jobs[0]
    assert spec.values == {"toy": {"sizes": [3, 4]}} and spec_from(json.loads(json.dumps(spec.as_json()))) == spec


def test_the_course_shares_what_its_jobs_have_in_common(tmp_path):
    planned = plan("course", tmp_path, {"kl_coef": "0.1,0.2,0.4", "seed": "0..1"})
    assert len(planned.jobs) == 6 and len(planned.shared) == 2
    assert {Path(spec.notebooks[-1]).stem for spec in planned.shared.values()} == {"02_reward_model"}
    assert {planned.shared[job.base].shown["seed"] == job.shown["seed"] for job in planned.jobs} == {True}
    planned = plan("course", tmp_path, {"ppo.kl_coef": "0.1,0.2", "dpo.beta": "0.1,0.3,1"})  # a tree
    last = {spec.id: Path(spec.notebooks[-1]).stem for spec in planned.shared.values()}
    assert sorted(last.values()) == ["03a_ppo_by_hand", "04_freeze_and_evaluate", "04_freeze_and_evaluate"]
    assert {last[planned.shared[job.base].base] for job in planned.jobs} == {"03a_ppo_by_hand"}
    assert not plan("course", tmp_path, {"seed": "0..3"}).shared


def test_a_notebook_that_reads_stages_gets_them_once_a_seed(tmp_path):
    planned = plan("03b_ppo", tmp_path, {"kl_coef": "0.1,0.2", "seed": "0..2", "sft.epochs": "1"})
    assert len(planned.jobs) == 6 and len(planned.shared) == 3 and all(job.alone for job in planned.jobs)
    base = planned.shared[planned.jobs[0].base]
    assert [Path(path).stem for path in base.notebooks] == ["01_sft", "02_reward_model"]
    assert base.values["01_sft"] == {"seed": 0, "epochs": 1} and base.values["02_reward_model"] == {"seed": 0}
    learning = plan("03b_ppo", tmp_path, {"learning_rate": "1e-4"})  # of PPO alone
    assert learning.jobs[0].values == {"01_sft": {}, "02_reward_model": {}, "03b_ppo": {"learning_rate": 1e-4}}
    planned = plan("05_dpo", tmp_path, {"beta": "0.1,0.2", "ppo.kl_coef": "0.1,0.4"})
    assert len(planned.jobs) == 4 and len(planned.shared) == 3  # SFT and reward model, and PPO and its freeze twice


# --- a sweep that runs -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Six jobs and two that fail, on two workers, in a folder with a space and a letter that is not ASCII."""
    place = tmp_path_factory.mktemp("sweeps") / "ein größer Versuch"
    fails = "if name == 'bad':\n    raise ValueError('no such luck <&> \\x1b[31m')"
    source = notebook(place / "toy.ipynb", fails, RESULT)
    before = Path.cwd()
    os.chdir(place)
    try:
        arguments = ["sweep", "toy.ipynb", "-p", "rate=0.1,0.3", "-p", "seed=0..1", "-p", "name=plain,'a,b',bad",
                     "-p", "sizes=[1,2]", "--out", "s", "--workers", "2", "--retries", "2"]
        code = cli.main(arguments)
    finally:
        os.chdir(before)
    return source, place / "s", code, arguments


def test_every_job_has_exactly_one_result_equal_to_that_of_alignkit_run(swept, tmp_path):
    source, out, code, _ = swept
    assert code == 1 and len(rows(out)) == 12
    finished = [row for row in rows(out) if row["status"] == "finished"]
    assert len(finished) == 8 == len(list((out / "jobs").iterdir())) and not list((out / "attempts").iterdir())
    for row in finished:
        results = json.loads((out / "jobs" / row["job"] / "toy" / "results.json").read_text(encoding="utf-8"))
        assert results["score"] == row["rate"] * 2 + row["seed"] == row["toy.score"]
        assert results["word"] == row["name"] and results["sizes"] == [1, 2]
    row = next(row for row in finished if row["name"] == "a,b" and row["seed"] == 1)
    run_notebook(source, tmp_path / "run", {name: row[name] for name in ("rate", "seed", "name", "sizes")},
                 progress=False)
    assert (tmp_path / "run" / "toy" / "results.json").read_bytes() == (
        out / "jobs" / row["job"] / "toy" / "results.json").read_bytes()
    assert not processes_in(out), "a worker or a kernel is left"


def test_a_failure_names_its_job_cell_and_error_and_stops_nothing(swept):
    _, out, _, _ = swept
    failed = [row for row in rows(out) if row["status"] == "failed"]
    assert len(failed) == 4 and {row["attempts"] for row in failed} == {1}  # no retry of what is the job's own fault
    for row in failed:
        assert "toy failed in cell 2" in row["error"] and "ValueError: no such luck" in row["error"]
        kept = json.loads((out / "failed" / row["job"] / "job.json").read_text(encoding="utf-8"))
        assert (kept["cell"], kept["status"], kept["parameters"]["name"]) == (2, "failed", "bad")
        assert "no such luck" in (out / "failed" / row["job"] / "toy.ipynb").read_text(encoding="utf-8")


def test_the_tables_have_their_columns_and_types(swept):
    _, out, _, _ = swept
    columns = ["job", "rate", "seed", "name", "sizes", "status", "host", "seconds", "attempts", "error"]
    numbers = ["toy.score", "toy.deep.pair.0", "toy.deep.pair.1", "toy.sizes.0", "toy.sizes.1"]
    with (out / "table.csv").open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == columns + numbers and len(read) == 12
    assert (read[0]["rate"], read[0]["sizes"], read[0]["toy.deep.pair.1"]) == ("0.1", "[1, 2]", "0.5")
    import pyarrow.parquet as parquet
    whole = parquet.read_table(out / "table.parquet")
    assert whole.column_names == columns + numbers
    kinds = {name: str(whole.schema.field(name).type) for name in columns + numbers}
    assert kinds["rate"] == kinds["toy.score"] == kinds["seconds"] == "double"
    assert kinds["seed"] == kinds["toy.deep.pair.0"] == kinds["attempts"] == "int64" and kinds["name"] == "string"
    assert whole.to_pylist()[0]["toy.score"] == rows(out)[0]["toy.score"]


def test_junit_has_a_case_a_job_and_the_record_says_how_it_was_made(swept):
    _, out, _, _ = swept
    suite = ElementTree.parse(out / "junit.xml").getroot().find("testsuite")
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("12", "4", "0")
    assert all("no such luck" in failure.text for failure in suite.iter("failure")) and len(list(suite)) == 12
    record = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    assert record["notebook"] == "toy" and len(record["jobs"]) == 12
    assert record["grids"][0]["values"]["name"] == ["plain", "a,b", "bad"] and "torch" in record["grids"][0]["versions"]
    assert "-p 'name=plain,'\"'\"'a,b'\"'\"',bad'" in record["grids"][0]["command"]


def test_the_same_command_repeats_nothing_and_another_grid_adds_jobs(swept, monkeypatch, capsys):
    source, out, _, _ = swept
    before = {path: path.stat().st_mtime_ns for path in (out / "jobs").rglob("*")}
    monkeypatch.setattr(engine, "_Worker", lambda *_: pytest.fail("a worker was started"))
    given = {"rate": "0.1,0.3", "seed": "0..1", "name": "plain", "sizes": "[1,2]"}
    assert sweep(source, out, given) == 0
    assert "4 of them done already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (out / "jobs").rglob("*")} == before
    monkeypatch.undo()
    assert sweep(source, out, {**given, "seed": "0..2", "rate": "0.1"}, workers=1) == 0
    assert len(rows(out)) == 13 and scores(out)[2] == 2.2
    assert len(json.loads((out / "sweep.json").read_text(encoding="utf-8"))["grids"]) == 3
    assert sweep(source, out, {"rate": "0.1", "sizes": "[1,2]", "seed": "2"}, workers=1) == 0  # known under other words
    assert "1 of them done already" in capsys.readouterr().out and len(rows(out)) == 13
    assert {row["name"] for row in rows(out)} == {"plain", "a,b", "bad"}  # nothing that a job was given is forgotten
    other = notebook(source.with_name("other.ipynb"), RESULT)
    with pytest.raises(RunError, match="is a sweep of toy, not of other; choose another folder"):
        sweep(other, out, {"seed": "0"})
    record = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    (out / "sweep.json").write_text(json.dumps({**record, "jobs": {"../../elsewhere_0123456789": {}}}))
    with pytest.raises(RunError, match="has no name of a job; delete the file"):  # it may come from a stranger
        sweep(source, out, given)
    (out / "sweep.json").write_text("{")
    with pytest.raises(RunError, match=r"sweep\.json is not valid JSON.*delete it"):
        sweep(source, out, given)


def test_a_job_whose_notebook_changed_is_not_done(swept):
    source, out, _, _ = swept
    spec = plan(str(source), out, {"rate": "0.1", "name": "plain", "sizes": "[1,2]", "seed": "0"}).jobs[0]
    folder = out / "jobs" / spec.id
    assert is_done(folder, spec)
    text = source.read_text(encoding="utf-8")
    source.write_text(text.replace("no such luck", "no luck"), encoding="utf-8")
    assert not is_done(folder, spec)
    source.write_text(text, encoding="utf-8")
    assert is_done(folder, spec)


# --- what dies -------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def driver(source: Path, out: Path, *more: str):
    """`alignkit sweep` in a process of its own, with all that it started killed at the end."""
    command = [sys.executable, "-P", "-m", "alignkit", "sweep", str(source), "--out", str(out), "--workers", "2", *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # CI may ignore it
    started = psutil.Process(process.pid)
    try:
        yield process, started
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in started.children(recursive=True):
                child.kill()
        process.kill()
        process.communicate()


def wait_for(what, process: subprocess.Popen, seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def gone(pids, within: float = 300) -> bool:
    end = time.monotonic() + within
    while time.monotonic() < end:
        alive = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def waiting(tmp_path):
    """A notebook whose jobs with seeds 0 and 1 wait to be killed, once."""
    marks = tmp_path / "marks"  # no parameter: a job is run again if the content of a folder that it was given changes
    source = notebook(tmp_path / "toy.ipynb", WAITS.replace("MARKS", repr(str(marks))), RESULT)
    marks.mkdir()
    for seed in (0, 1):
        (marks / f"{seed}").touch()
    return source, marks, ("-p", "seed=0..3")


def both_wait(marks: Path) -> bool:
    return all((marks / f"{seed}.pid").exists() and (marks / f"{seed}.pid").read_text() for seed in (0, 1))


def kernel(marks: Path, seed: int) -> int:
    return int((marks / f"{seed}.pid").read_text())


def test_a_killed_worker_and_a_killed_kernel_are_noticed_and_their_jobs_repeated(tmp_path, waiting):
    source, marks, given = waiting
    out = tmp_path / "s"
    with driver(source, out, *given) as (process, _):
        wait_for(lambda: both_wait(marks), process)
        kernels = [kernel(marks, 0), kernel(marks, 1)]
        worker = psutil.Process(kernels[1]).ppid()
        os.kill(kernels[0], signal.SIGKILL)
        os.kill(worker, signal.SIGKILL)
        said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    assert "again, because it died: toy failed in cell 2" in said and "the kernel died" in said
    assert "again, because it died: its worker died: killed by SIGKILL, in cell 2 of toy" in said
    assert gone([*kernels, worker])
    assert scores(out) == {0: 2.0, 1: 3.0, 2: 4.0, 3: 5.0} and not list((out / "attempts").iterdir())
    assert sorted(row["attempts"] for row in rows(out)) == [1, 1, 2, 2]


def test_what_dies_too_often_is_reported_and_nothing_else_stops(tmp_path, capsys):
    source = notebook(tmp_path / "toy.ipynb", "import os\nif seed == 0: os.kill(os.getpid(), 9)", RESULT)
    assert sweep(source, tmp_path / "s", {"seed": "0,1"}, workers=1, retries=1) == 1
    dead, well = rows(tmp_path / "s")
    assert (dead["status"], dead["attempts"], well["status"]) == ("died", 2, "finished")
    assert "cell 2" in dead["error"] and "SIGKILL" in dead["error"] and "DIED" in capsys.readouterr().out
    suite = ElementTree.parse(tmp_path / "s" / "junit.xml").getroot().find("testsuite")
    assert suite.get("failures") == "1"


def test_a_killed_driver_leaves_no_process_and_the_next_start_goes_on(tmp_path, waiting, capsys):
    source, marks, given = waiting
    (marks / "1").unlink()  # one job waits, the others are finished by the other worker
    out = tmp_path / "s"
    with driver(source, out, *given) as (process, started):
        wait_for(lambda: (marks / "0.pid").exists() and len(list((out / "jobs").glob("*"))) == 3, process)
        with pytest.raises(RunInUse, match="in use by pid"):
            sweep(source, out, {"seed": "0..3"})
        children = [child.pid for child in started.children(recursive=True)]
        assert kernel(marks, 0) in children and len(children) >= 3
        process.kill()
        process.wait()
        assert gone(children), "a worker or a kernel is left"
    stamps = {path: path.stat().st_mtime_ns for path in (out / "jobs").rglob("results.json")}
    assert len(stamps) == 3
    capsys.readouterr()
    assert sweep(source, out, {"seed": "0..3"}, workers=1) == 0
    assert "3 of them done already" in capsys.readouterr().out
    assert scores(out) == {0: 2.0, 1: 3.0, 2: 4.0, 3: 5.0} and not list((out / "attempts").iterdir())
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_an_attempt_that_had_finished_when_the_driver_died_is_only_published(tmp_path, monkeypatch):
    source = notebook(tmp_path / "toy.ipynb", RESULT)
    out = tmp_path / "s"
    spec = plan(str(source), out, {"seed": "5"}).jobs[0]
    run_notebook(source, out / "attempts" / f"{spec.id}.1", {"seed": 5}, progress=False)
    (out / "attempts" / f"{spec.id}.1" / "jobs.json").rename(tmp_path / "kept.json")
    (tmp_path / "kept.json").rename(out / "attempts" / f"{spec.id}.1" / "jobs.json")
    monkeypatch.setattr(engine, "_Worker", lambda *_: pytest.fail("a worker was started"))
    assert sweep(source, out, {"seed": "5"}) == 0
    assert [(row["toy.score"], row["attempts"]) for row in rows(out)] == [(7.0, 2)]


def test_ctrl_c_interrupts_the_jobs_keeps_what_is_finished_and_leaves_130(tmp_path, waiting):
    source, marks, given = waiting
    (marks / "1").unlink()
    out = tmp_path / "s"
    with driver(source, out, *given) as (process, started):
        wait_for(lambda: (marks / "0.pid").exists() and len(list((out / "jobs").glob("*"))) == 3, process)
        children = [child.pid for child in started.children(recursive=True)]
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=900)
    assert process.returncode == 130, said
    assert "Traceback" not in said and "interrupted" in said and gone(children)
    assert [row["status"] for row in rows(out)] == ["not run", "finished", "finished", "finished"]
    assert sweep(source, out, {"seed": "0..3"}, workers=1) == 0
    assert scores(out) == {0: 2.0, 1: 3.0, 2: 4.0, 3: 5.0}


# --- stages that jobs share ------------------------------------------------------------------------------------------
WHOLE = "run = ''\nseed = 0\nmodel = 'tiny'\ndata = 'desk'"


def stage(name: str, value: str) -> str:
    return (f"import json\nfrom pathlib import Path\nplace = Path(run, {name!r})\nplace.mkdir()\nvalue = {value}\n"
            "(place / 'weights.bin').write_text(str(value))\n"
            "(place / 'results.json').write_text(json.dumps({'value': value}))")


def reads(name: str) -> str:
    return f"from pathlib import Path\nbefore = float(Path(run, {name!r}, 'weights.bin').read_text())"


def test_a_course_makes_shared_stages_once_a_seed_and_links_them(tmp_path, capsys):
    series = [notebook(tmp_path / "01_sft.ipynb", stage("sft", "seed * 10"), parameters=WHOLE),
              notebook(tmp_path / "02_reward_model.ipynb", reads("sft"), stage("reward", "before + 1"),
                       parameters=WHOLE),
              notebook(tmp_path / "03b_ppo.ipynb", reads("reward"), stage("ppo", "before + kl_coef"),
                       parameters=f"{WHOLE}\nkl_coef = 0.2")]
    out = tmp_path / "s"
    assert sweep("course", out, {"kl_coef": "0.25,0.5", "seed": "0..1"}, workers=2, series=series) == 0
    assert "2 series of earlier notebooks, made once and shared" in capsys.readouterr().out
    assert {(row["seed"], row["kl_coef"]): row["ppo.value"] for row in rows(out)} == {
        (0, 0.25): 1.25, (0, 0.5): 1.5, (1, 0.25): 11.25, (1, 0.5): 11.5}
    weights = list(out.rglob("reward/weights.bin"))
    assert len(weights) == 6 and len({path.stat().st_ino for path in weights}) == 2
    records = list(out.rglob("reward/results.json"))
    assert len({path.stat().st_ino for path in records}) == 6  # records may be added to
    summary = json.loads(next((out / "jobs").rglob("summary.json")).read_text())
    assert list(summary["stages"]) == ["sft", "reward", "ppo"]
    assert sweep("course", out, {"kl_coef": "0.25,0.5", "seed": "0..1"}, workers=2, series=series) == 0
    assert "4 of them done already" in capsys.readouterr().out
    assert all(path.stat().st_nlink == 3 for path in weights)


def test_what_begins_with_a_shared_job_that_failed_fails_and_says_so(tmp_path):
    series = [notebook(tmp_path / "01_sft.ipynb", "if seed: raise RuntimeError('no demonstrations')",
                       stage("sft", "seed"), parameters=WHOLE),
              notebook(tmp_path / "02_reward_model.ipynb", stage("reward", "epochs"),
                       parameters=f"{WHOLE}\nepochs = 1")]
    out = tmp_path / "s"
    assert sweep("course", out, {"epochs": "2,3", "seed": "0..1"}, workers=2, series=series) == 1
    assert [row["status"] for row in rows(out)] == ["finished", "failed", "finished", "failed"]
    failed = rows(out)[1]["error"]
    assert failed.startswith("what it begins with failed (01_sft_seed=1_") and "no demonstrations" in failed


@pytest.fixture
def own_series(tmp_path):
    """A notebook of a user's, after another of his, after notebook 01, which stands for the course: that, and its
    path."""
    sft = notebook(tmp_path / "course" / "01_sft.ipynb", stage("sft", "seed * 10"), parameters=WHOLE)
    notebook(tmp_path / "tables.ipynb", reads("sft"), stage("world", "before + 1"), parameters="run = ''\nseed = 0",
             after=["01_sft"], makes="world")
    mine = notebook(tmp_path / "a mine.ipynb", reads("world"), stage("mine", "before + rate"), after=["tables.ipynb"],
                    makes="mine")
    return [sft], mine


def test_a_users_notebook_begins_with_the_notebooks_that_its_metadata_name(own_series, tmp_path, capsys):
    series, mine = own_series
    out, given = tmp_path / "s", {"rate": "0.25,0.5", "seed": "0..1"}
    planned = plan(str(mine), out, given, series=series)
    assert [Path(path).name for path in planned.jobs[0].notebooks] == ["01_sft.ipynb", "tables.ipynb", "a mine.ipynb"]
    assert len(planned.shared) == 2 and all(job.alone for job in planned.jobs)
    assert sweep(mine, out, given, workers=2, series=series) == 0
    assert {(row["seed"], row["rate"]): row["mine.value"] for row in rows(out)} == {
        (0, 0.25): 1.25, (0, 0.5): 1.5, (1, 0.25): 11.25, (1, 0.5): 11.5}
    made = list(out.rglob("world/weights.bin"))
    assert len(made) == 6 and len({path.stat().st_ino for path in made}) == 2  # `makes`: linked, with its hash
    capsys.readouterr()
    assert sweep(mine, out, given, workers=2, series=series) == 0
    assert "4 of them done already" in capsys.readouterr().out
    notebook(tmp_path / "tables.ipynb", reads("sft"), stage("world", "before + 2"), parameters="run = ''\nseed = 0",
             after=["01_sft"], makes="world")
    assert sweep(mine, out, given, workers=2, series=series) == 0
    assert sorted(row["mine.value"] for row in rows(out)) == [2.25, 2.5, 12.25, 12.5]


def test_a_notebook_that_comes_after_another_needs_what_that_made(own_series, tmp_path):
    series, mine = own_series
    run = tmp_path / "run"
    with pytest.raises(RunError, match="holds no finished tables, which a mine comes after"):
        run_notebook(mine, run, progress=False)
    for each in (*series, tmp_path / "tables.ipynb", mine):
        run_notebook(each, run, progress=False)
    before = json.loads((run / "jobs.json").read_text())["a mine"]["key"]
    notebook(tmp_path / "tables.ipynb", reads("sft"), stage("world", "before + 2"), parameters="run = ''\nseed = 0",
             after=["01_sft"], makes="world")
    run_notebook(tmp_path / "tables.ipynb", run, progress=False)  # its name comes after that of `a mine`
    run_notebook(mine, run, progress=False, force=True)
    after = json.loads((run / "jobs.json").read_text())["a mine"]["key"]
    assert {part for part in before if before[part] != after[part]} == {"earlier"}
    (run / "world" / "weights.bin").write_text("7")
    with pytest.raises(RunError, match="weights.bin is not what notebook tables wrote"):
        run_notebook(mine, run, progress=False, force=True)


@pytest.mark.parametrize("says, error", [
    ({"after": "01_sft"}, "`after` of alignkit in its metadata is '01_sft', expected a list"),
    ({"after": [1]}, r"is \[1\], expected a list"),
    ({"makes": "../up"}, "`makes` of alignkit in its metadata is '../up'"),
    ({"after": ["toy.ipynb"]}, "comes after itself"), ({"after": ["toy"]}, "no notebook 'toy'"),
])
def test_what_a_notebook_cannot_say_of_itself_is_refused(tmp_path, says, error):
    source = notebook(tmp_path / "toy.ipynb", RESULT, **says)
    with pytest.raises((ParameterError, FileNotFoundError), match=error):
        sweep(source, tmp_path / "s", {"seed": "0,1"})
    assert not (tmp_path / "s").exists()


def test_two_notebooks_of_one_name_are_refused_and_a_cycle_is_no_other_notebook(tmp_path):
    for folder in ("a", "b"):
        notebook(tmp_path / folder / "prep.ipynb", RESULT)
    both = notebook(tmp_path / "both.ipynb", RESULT, after=["a/prep.ipynb", "b/prep.ipynb"])
    notebook(tmp_path / "prep.ipynb", RESULT, after=["a/prep.ipynb"])
    nested = notebook(tmp_path / "nested.ipynb", RESULT, after=["prep.ipynb"])
    for source in (both, nested):
        with pytest.raises(ParameterError, match="have the same name, under which a run directory keeps one notebook"):
            plan(str(source), tmp_path / "s", {"seed": "0,1"})
    again = notebook(tmp_path / "again.ipynb", RESULT, after=["a/prep.ipynb", "b/../a/prep.ipynb"])
    assert len(plan(str(again), tmp_path / "s", {"seed": "0,1"}).jobs[0].notebooks) == 2
    lost = notebook(tmp_path / "lost.ipynb", RESULT, after=["gone.ipynb"])
    with pytest.raises(ParameterError, match=r"`after` in the metadata of .*lost.ipynb: no notebook 'gone.ipynb'"):
        plan(str(lost), tmp_path / "s", {"seed": "0,1"})


def test_a_notebook_without_a_seed_is_made_once_for_all_seeds(tmp_path):
    notebook(tmp_path / "plain.ipynb", stage("world", "7"), parameters="run = ''", makes="world")
    seeded = notebook(tmp_path / "seeded.ipynb", reads("world"), stage("mine", "before + seed"), after=["plain.ipynb"],
                      parameters="run = ''\nseed = 0", makes="mine")
    assert sweep(seeded, tmp_path / "s", {"seed": "3,5"}, workers=1) == 0
    assert {row["seed"]: row["mine.value"] for row in rows(tmp_path / "s")} == {3: 10, 5: 12}
    assert len(list((tmp_path / "s" / "shared").iterdir())) == 1
    facts = [json.loads(path.read_text()) for path in sorted((tmp_path / "s" / "jobs").glob("*/run.json"))]
    assert [each["seed"] for each in facts] == [3, 5]


def test_a_run_that_holds_another_notebook_of_that_name_is_refused(tmp_path):
    for folder in ("a", "b"):
        notebook(tmp_path / folder / "prep.ipynb", f"print('{folder}')")
    mine = notebook(tmp_path / "mine.ipynb", "print('mine')", after=["a/prep.ipynb"])
    run_notebook(tmp_path / "b" / "prep.ipynb", tmp_path / "run", progress=False)
    with pytest.raises(RunError, match="holds a finished prep that is not .*a/prep.ipynb as it is now"):
        run_notebook(mine, tmp_path / "run", progress=False)
    run_notebook(tmp_path / "a" / "prep.ipynb", tmp_path / "other", progress=False)
    run_notebook(mine, tmp_path / "other", progress=False)


def test_a_job_that_writes_into_its_records_does_not_change_those_of_others(tmp_path):
    base = tmp_path / "base"
    run_notebook(notebook(tmp_path / "01_sft.ipynb", stage("sft", "seed"), parameters=WHOLE), base, progress=False)
    for name in ("one", "two"):
        begin_with(base, tmp_path / name)
    with (tmp_path / "one" / "sft" / "results.json").open("a") as file:
        file.write(" ")
    assert (tmp_path / "two" / "sft" / "results.json").read_bytes() == (base / "sft" / "results.json").read_bytes()
    assert (tmp_path / "one" / "sft" / "weights.bin").stat().st_nlink == 3
    assert not (tmp_path / "one" / ".lock").exists()


# --- one job by its number: the array jobs of a cluster --------------------------------------------------------------
def test_jobs_by_number_share_a_folder_and_make_a_shared_stage_once(tmp_path, capsys):
    made = tmp_path / "made"
    made.mkdir()
    count = f"import os\nopen({str(made)!r} + f'/{{seed}}.{{os.getpid()}}', 'x').close()"
    series = [notebook(tmp_path / "01_sft.ipynb", count, stage("sft", "seed"), parameters=WHOLE),
              notebook(tmp_path / "02_reward_model.ipynb", stage("reward", "epochs"),
                       parameters=f"{WHOLE}\nepochs = 1")]
    out, given = tmp_path / "s", {"epochs": "2,3"}
    code = ("import sys; from alignkit.sweeps.sweep import sweep; "
            f"sys.exit(sweep('course', {str(out)!r}, {given!r}, job=int(sys.argv[1]), series={[*map(str, series)]!r}))")
    both = [subprocess.Popen([sys.executable, "-P", "-c", code, str(number)], stdout=subprocess.PIPE, text=True,
                             stderr=subprocess.STDOUT) for number in (0, 1)]
    said = [process.communicate(timeout=900)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert len(list(made.iterdir())) == 1 and len(list((out / "jobs").iterdir())) == 2
    assert not (out / "table.csv").exists() and not list((out / "attempts").iterdir())
    assert sweep("course", out, given, series=series) == 0
    assert "2 of them done already" in capsys.readouterr().out
    assert [row["reward.value"] for row in rows(out)] == [2, 3] and (out / "sweep.html").exists()


def test_a_job_by_number_is_that_of_the_list_and_its_failure_is_its_exit_code(tmp_path, capsys):
    source = notebook(tmp_path / "toy.ipynb", "if seed == 1: raise ValueError('no')", RESULT)
    arguments = ["sweep", str(source), "-p", "seed=0..2", "--out", str(tmp_path / "s")]
    assert cli.main([*arguments, "--dry-run"]) == 0
    listed = [line.split("  ") for line in capsys.readouterr().out.splitlines()[1:]]
    assert [line[0] for line in listed] == ["0", "1", "2"]
    assert cli.main([*arguments, "--job", "2"]) == 0
    assert [path.name for path in (tmp_path / "s" / "jobs").iterdir()] == [listed[2][1]]
    assert cli.main([*arguments, "--job", "1"]) == 1 and "ValueError: no" in capsys.readouterr().out
    assert cli.main([*arguments, "--job", "3"]) == 1 and "expected 0 to 2" in capsys.readouterr().err
    with run_lock(tmp_path / "s" / "locks" / listed[0][1]):
        assert cli.main(arguments) == 1
    assert "is being run by its number" in capsys.readouterr().err


def test_the_cluster_examples_hand_their_index_to_the_job(tmp_path):
    script = EXAMPLES / "slurm_sweep.sh"
    stub = tmp_path / "alignkit"
    stub.write_text("#!/bin/sh\nprintf '%s|' \"$@\" OMP=$OMP_NUM_THREADS\n")
    stub.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "7", "SLURM_CPUS_PER_TASK": "2"}
    ran = subprocess.run(["bash", str(script), "toy", "-p", "name='a b'", "--out", "s"], env=env, text=True,
                         capture_output=True, check=True)
    assert ran.stdout == "sweep|toy|-p|name='a b'|--out|s|--job|7|OMP=2|"
    assert subprocess.run(["bash", str(script), "toy"], env={"PATH": env["PATH"]}, capture_output=True).returncode != 0
    import yaml
    job = yaml.safe_load((EXAMPLES / "kubernetes_sweep.yaml").read_text(encoding="utf-8"))["spec"]
    container, = job["template"]["spec"]["containers"]
    ran = subprocess.run([*container["command"], *container["args"]], text=True, capture_output=True, check=True,
                         env={"PATH": env["PATH"], "JOB_COMPLETION_INDEX": "9"})
    words = ran.stdout.split("|")
    assert words[0] == "sweep" and words[-4:-2] == ["--job", "9"] and job["completionMode"] == "Indexed"
    given = dict(word.split("=", 1) for flag, word in itertools.pairwise(words) if flag == "-p")
    assert job["completions"] == len(plan(words[1], tmp_path / "s", given).jobs), "an index a job of its own grid"
    size = next(line for line in script.read_text().splitlines() if line.startswith("#SBATCH --array="))
    assert size == f"#SBATCH --array=0-{job['completions'] - 1}"


# --- folders that cannot be used -------------------------------------------------------------------------------------
def test_a_folder_that_cannot_be_used_and_a_full_disk_are_said_clearly(tmp_path, monkeypatch, capsys):
    source = notebook(tmp_path / "toy.ipynb", RESULT)
    (tmp_path / "file").touch()
    assert cli.main(["sweep", str(source), "-p", "seed=0..1", "--out", str(tmp_path / "file" / "s")]) == 1
    assert "cannot be made" in capsys.readouterr().err

    def full(path, _content):
        raise OSError(28, "No space left on device", str(path))

    out = tmp_path / "s"
    monkeypatch.setattr("alignkit.storage.write_atomically", full)
    assert cli.main(["sweep", str(source), "-p", "seed=0..1", "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said and "sweep.json" in said and not (out / "jobs").exists()
    monkeypatch.undo()
    monkeypatch.setattr(table, "write_atomically", full)
    assert cli.main(["sweep", str(source), "-p", "seed=0", "--out", str(out), "--workers", "1"]) == 1
    assert "No space left on device" in (said := capsys.readouterr().err) and "table.csv" in said
    monkeypatch.undo()
    assert cli.main(["sweep", str(source), "-p", "seed=0", "--out", str(out), "--workers", "1"]) == 0  # it goes on
    assert "1 of them done already" in capsys.readouterr().out and len(rows(out)) == 1


def test_a_cell_is_never_a_formula_and_a_name_never_hides_a_fact(tmp_path):
    row = table.row_of("j", {"status": "=1+1", "seed": 2}, {"status": "finished", "seconds": 1.0}, None)
    assert (row["parameter.status"], row["status"], row["seed"]) == ("=1+1", "finished", 2)
    table.write_tables(tmp_path, [row])
    assert "'=1+1" in (tmp_path / "table.csv").read_text()
