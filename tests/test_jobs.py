"""Notebooks as jobs: what is refused before a kernel starts, how a job ends, and what a second run repeats."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from alignkit import stages
from alignkit.errors import NotebookFailed, ParameterError, RunError, RunInUse
from alignkit.jobs import job as job_module
from alignkit.jobs import notebooks
from alignkit.jobs.notebooks import course, run_notebook
from alignkit.jobs.parameters import check_parameters, notebook_parameters

PARAMETERS = """\
run = "runs/course"  # where everything goes
model = "tiny"
seed = 0
steps = 40  # optimizer steps
rate: float = 1
greedy = False
name = "plain"
sizes = [1, 2]
limit: float | None = None"""


def notebook(path: Path, *cells: str, parameters: str = PARAMETERS) -> Path:
    """A notebook with a parameters cell and the given code cells."""
    nb = nbformat.v4.new_notebook()
    nb.cells = [
        nbformat.v4.new_markdown_cell("# toy"),
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        *map(nbformat.v4.new_code_cell, cells),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)
    return path


def keep(folder: str, expression: str = "seed") -> str:
    """A cell that leaves `expression` in RUN/folder/made.txt, and counts how often it ran in RUN/folder.count."""
    return (
        f"from pathlib import Path\nPath(run, {folder!r}).mkdir(exist_ok=True)\n"
        f"with open(Path(run, '{folder}.count'), 'a') as f: f.write('x')\n"
        f"Path(run, {folder!r}, 'made.txt').write_text(str({expression}))"
    )


def ran(out: Path, folder: str) -> int:
    path = out / f"{folder}.count"
    return len(path.read_text()) if path.exists() else 0


@pytest.fixture(autouse=True)
def _same_code(monkeypatch):
    monkeypatch.setattr(job_module, "code_hash", lambda: "code")


@pytest.fixture
def no_kernel(monkeypatch):
    """Fails the test if a notebook is executed."""

    def refuse(*_args, **_options):
        pytest.fail("a kernel was started")

    monkeypatch.setattr(notebooks, "_execute", refuse)


# --- parameters ------------------------------------------------------------------------------------------------------


def test_parameters_are_read_with_type_default_and_comment(tmp_path):
    found = notebook_parameters(notebook(tmp_path / "x.ipynb"))
    assert list(found) == ["run", "model", "seed", "steps", "rate", "greedy", "name", "sizes", "limit"]
    assert (found["steps"].default, found["steps"].type, found["steps"].help) == (40, "int", "optimizer steps")
    assert (found["rate"].type, found["limit"].type, found["limit"].optional) == ("float", "float", True)
    assert (found["sizes"].type, found["sizes"].element) == ("list", "int")


def test_values_are_converted_from_what_is_typed_on_a_command_line(tmp_path):
    given = {
        "steps": "3",
        "rate": "1e-4",
        "greedy": "yes",
        "name": ' \'a\'\n"""b',
        "sizes": "3,4",
        "limit": "none",
        "seed": 7,
    }
    assert check_parameters(notebook(tmp_path / "x.ipynb"), given) == {
        "steps": 3,
        "rate": 1e-4,
        "greedy": True,
        "name": ' \'a\'\n"""b',
        "sizes": [3, 4],
        "limit": None,
        "seed": 7,
    }
    assert check_parameters(tmp_path / "x.ipynb", {"rate": 2, "sizes": "[]"}) == {"rate": 2.0, "sizes": []}


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("stepz", 3, r"stepz: x has no such parameter; did you mean steps\?"),
        ("zzz", 3, "it has: run, model, seed, steps"),
        ("x=1; open('pwned','w'); y", 3, "expected a plain name"),
        ("class", 3, "expected a plain name"),
        ("__import__", 3, "expected a plain name"),
        ("_", 3, "expected a plain name"),
        ("ѕeed", 3, "expected a plain name"),  # a Cyrillic letter
        ("steps", "ten", "steps is 'ten', expected an int; the parameter is steps .int, default 40."),
        ("steps", 3.5, "steps is 3.5, expected an int"),
        ("steps", True, "steps is True, expected an int"),
        ("steps", None, "steps is None, expected an int"),
        ("rate", "nan", "rate is 'nan', expected a finite number"),
        ("rate", "fast", "rate is 'fast', expected a finite number"),
        ("rate", 10**400, "expected a finite number"),
        ("greedy", "maybe", "greedy is 'maybe', expected true or false"),
        ("greedy", 1, "greedy is 1, expected true or false"),
        ("name", 3, "name is 3, expected a str"),
        ("name", "\udcff", "not text"),
        ("sizes", "1,two", r"sizes\[1\] is 'two', expected an int"),
        ("sizes", 3, "sizes is 3, expected a list"),
        ("run", "elsewhere", "run: the run directory is given by `--out`"),
        ("model", "./nowhere", "there is no such file or folder"),
    ],
)
def test_bad_parameters_are_refused_before_a_kernel_starts(tmp_path, no_kernel, name, value, says):
    with pytest.raises(ParameterError, match=says):
        run_notebook(notebook(tmp_path / "x.ipynb"), tmp_path / "run", {name: value})


def test_everything_wrong_is_listed_at_once(tmp_path):
    with pytest.raises(ParameterError, match="(?s)stepz.*seed is 'x'"):
        check_parameters(notebook(tmp_path / "x.ipynb"), {"stepz": 1, "seed": "x"})


@pytest.mark.parametrize("cell", ["seed = int('3')", "import os", "seed += 1", "a, b = 1, 2", "print(3)"])
def test_a_parameters_cell_that_is_not_literals_is_refused(tmp_path, cell):
    with pytest.raises(ParameterError, match="expected NAME = literal"):
        notebook_parameters(notebook(tmp_path / "x.ipynb", parameters=cell))


def test_a_file_that_is_no_notebook_is_refused(tmp_path):
    (tmp_path / "x.ipynb").write_text("[]")
    with pytest.raises(ParameterError, match="is not a notebook"):
        notebook_parameters(tmp_path / "x.ipynb")


# --- how a job ends --------------------------------------------------------------------------------------------------


def status(out: Path, name: str = "x") -> dict:
    return json.loads((out / "jobs.json").read_text())[name]


def test_a_notebook_runs_headless_with_its_parameters_and_only_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "model").mkdir()
    seen = (
        "import json, os, sys\nfrom pathlib import Path\nwith open(Path(run, 'count'), 'a') as f: f.write('x')\n"
        "Path(run, 'seen.json').write_text(json.dumps([seed, rate, name, model, os.getcwd(), sys.executable, "
        "os.environ['ALIGNKIT_HEADLESS'], os.environ.get('OMP_NUM_THREADS')]))"
    )
    source, out = notebook(tmp_path / "x.ipynb", seen), tmp_path / "a run {odd}"
    hostile = '\'; import os #\n""" \\ {seed} \u202e é'
    executed = run_notebook(source, "a run {odd}", {"seed": "3", "name": hostile})
    assert executed == out / "x.ipynb"
    assert json.loads((out / "seen.json").read_text()) == [
        3,
        1,
        hostile,
        "tiny",
        str(tmp_path),
        sys.executable,
        "1",
        "1",
    ]
    assert (status(out)["status"], status(out)["cells"]) == ("finished", 3)
    assert json.loads((out / "summary.json").read_text())["seconds"]["x"] == status(out)["seconds"]
    run_notebook(source, out, {"name": hostile, "seed": 3})
    assert (out / "count").read_text() == "x" and "done already" in capsys.readouterr().out
    run_notebook(source, out, {"name": hostile, "seed": 3, "model": "model"})
    assert "model was 'tiny', now " in capsys.readouterr().out
    seen = json.loads((out / "seen.json").read_text())
    assert (seen[3], seen[7]) == (
        str(tmp_path / "model"),
        None,
    )  # absolute; and threads are left alone for other models


def test_an_error_names_its_cell_and_keeps_what_was_done(tmp_path):
    source = notebook(
        tmp_path / "x.ipynb", "print('before')", "\n# a note\nraise ValueError('no such luck')", "print('after')"
    )
    with pytest.raises(
        NotebookFailed, match=r"x failed in cell 4 \(In \[\d\]\), `# a note`: ValueError: no such luck"
    ) as caught:
        run_notebook(source, tmp_path / "run", {"seed": 1})
    assert (caught.value.cell, caught.value.status) == (3, "failed")
    assert status(tmp_path / "run")["status"] == "failed"
    kept = (tmp_path / "run" / "x.ipynb").read_text()
    assert "before" in kept and "no such luck" in kept


def test_a_killed_kernel_is_a_failure_with_a_reason(tmp_path):
    source = notebook(
        tmp_path / "x.ipynb", "import os, sys\nos.write(2, b'last words')\nos.kill(os.getpid(), 9)", "print('never')"
    )
    with pytest.raises(NotebookFailed, match="(?s)cell 3.*the kernel died.*SIGKILL.*memory ran out"):
        run_notebook(source, tmp_path / "run")
    assert status(tmp_path / "run")["status"] == "failed" and "SIGKILL" in status(tmp_path / "run")["error"]
    states = [
        cell["metadata"]["papermill"]["status"]
        for cell in json.loads((tmp_path / "run" / "x.ipynb").read_text())["cells"]
    ]
    assert states[-2:] == ["failed", "pending"]  # not `completed`


def test_a_hanging_cell_runs_out_of_time_and_leaves_no_process(tmp_path):
    source = notebook(
        tmp_path / "x.ipynb",
        "import os, time\nfrom pathlib import Path\nPath(run, 'pid').write_text(str(os.getpid()))",
        "time.sleep(600)",
    )
    with pytest.raises(NotebookFailed, match=r"x ran out of time in cell 4.*not done after 4 s \(timeout\)"):
        run_notebook(source, tmp_path / "run", timeout=4)
    hung = (tmp_path / "run" / "pid").stat().st_mtime  # the kernel's start, slow on a busy machine, is not in it
    assert time.time() - hung < 20
    assert status(tmp_path / "run")["status"] == "timeout"
    assert ended(int((tmp_path / "run" / "pid").read_text()), within=5)


def test_interrupt_lets_the_notebook_save_and_two_jobs_cannot_share_a_folder(tmp_path):
    """Ctrl-C and kill -TERM on `alignkit run`; while it runs, a second job in the same folder is refused."""
    source = notebook(
        tmp_path / "x.ipynb",
        "import time\nfrom pathlib import Path\ntry:\n    Path(run, 'ready').touch()\n    time.sleep(600)\n"
        "finally:\n    Path(run, 'saved').touch()",
    )
    out = tmp_path / "run"
    job = subprocess.Popen(
        [sys.executable, "-m", "alignkit", "run", str(source), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for(out / "ready", job)
        with pytest.raises(RunInUse, match=f"in use by pid {job.pid} since 20"):
            run_notebook(source, out)
        job.send_signal(signal.SIGTERM)
        said, _ = job.communicate(timeout=30)
    finally:
        job.kill()
    assert job.returncode == 130 and "was interrupted in cell 3" in said and "Traceback" not in said
    assert (out / "saved").exists() and status(out)["status"] == "interrupted"


def test_a_killed_job_takes_its_kernel_along_frees_the_folder_and_runs_again(tmp_path, capsys):
    source = notebook(
        tmp_path / "x.ipynb",
        "import os, time\nfrom pathlib import Path\nagain = Path(run, 'ready').exists()\n"
        "Path(run, 'kernel').write_text(str(os.getpid()))\nPath(run, 'ready').touch()\nif not again: time.sleep(600)",
    )
    out = tmp_path / "run"
    job = subprocess.Popen(
        [sys.executable, "-m", "alignkit", "run", str(source), "--out", str(out)], stdout=subprocess.DEVNULL
    )
    try:
        wait_for(out / "ready", job)
    finally:
        job.kill()
        job.wait()
    assert ended(int((out / "kernel").read_text()), within=10)
    assert status(out)["status"] == "running"
    run_notebook(source, out)
    assert status(out)["status"] == "finished" and "again: interrupted before" in capsys.readouterr().out


def ended(pid: int, within: float) -> bool:
    """Is the process gone, or will it be in so many seconds?"""
    try:
        process = psutil.Process(pid)
        while within > 0 and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.1)
            within -= 0.1
    except psutil.NoSuchProcess:
        return True
    return within > 0


def wait_for(path: Path, job: subprocess.Popen) -> None:
    for _ in range(600):
        if path.exists():
            return
        assert job.poll() is None, job.stdout and job.stdout.read()
        time.sleep(0.1)
    pytest.fail(f"{path} did not appear")


@pytest.mark.parametrize(
    "out, says", [("file/run", "cannot be made"), ("a\0b", "cannot be made"), ("x" * 5000, "cannot be made")]
)
def test_a_run_directory_that_cannot_be_used_is_refused(tmp_path, monkeypatch, no_kernel, out, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=says):
        run_notebook(notebook(tmp_path / "x.ipynb"), out)


def test_a_notebook_is_never_overwritten_by_its_executed_copy(tmp_path, no_kernel):
    with pytest.raises(ParameterError, match="it would be overwritten"):
        run_notebook(notebook(tmp_path / "x.ipynb"), tmp_path)


# --- the series ------------------------------------------------------------------------------------------------------


def read(folder: str) -> str:
    return f"from pathlib import Path\nbefore = Path(run, {folder!r}, 'made.txt').read_text()"


def test_the_course_resumes_and_repeats_what_a_change_touches(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fails = "from pathlib import Path\nif not Path(run, 'mended').exists(): raise RuntimeError('not yet')"
    series = [
        notebook(tmp_path / "01_sft.ipynb", keep("sft"), parameters="run = ''\nseed = 0\nmodel = 'tiny'"),
        notebook(tmp_path / "02_reward_model.ipynb", keep("reward", "pairs"), parameters="run = ''\npairs = 5"),
        notebook(tmp_path / "03b_ppo.ipynb", fails, read("sft"), keep("ppo", "before"),
                 parameters="run = ''\nseed = 0"),
    ]
    out = tmp_path / "run"

    def go(**parameters):
        return course("run", parameters=parameters, notebooks=series)

    def counts():
        return [ran(out, folder) for folder in ("sft", "reward", "ppo")]

    with pytest.raises(NotebookFailed, match="03b_ppo failed in cell 3.*RuntimeError: not yet"):
        go()
    assert counts() == [1, 1, 0] and (out / "report.html").exists()
    (out / "mended").touch()
    assert go() == out and counts() == [1, 1, 1]
    go()
    assert counts() == [1, 1, 1]
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["seconds"]) == ["01_sft", "02_reward_model", "03b_ppo"]
    assert (summary["model"], summary["data"], summary["seed"]) == ("tiny", "desk", 0)

    go(pairs="6")  # the notebook that knows the parameter, and what comes after it
    assert counts() == [1, 2, 2]
    assert "02_reward_model         again: pairs was 5, now 6" in (said := capsys.readouterr().out)
    assert "03b_ppo                 again: an earlier stage changed" in said

    (out / "sft" / "made.txt").write_text("by hand")
    (out / "sft" / "results.json").write_text("{}")  # records may change
    go(pairs=6)
    assert counts() == [2, 2, 2]  # the same seed gave the same bytes again
    assert "sft/made.txt is not what it wrote" in capsys.readouterr().out

    with pytest.raises(RunError, match="seed was 0, now 1"):
        go(seed=1, pairs=6)
    with pytest.raises(
        ParameterError, match=r"sed: no notebook of the course has such a parameter; did you mean seed\?"
    ):
        go(sed=1)
    with pytest.raises(ParameterError, match="seed is 'x', expected an int"):
        go(seed="x")
    assert counts() == [2, 2, 2]


def test_each_kernel_imports_while_other_work_goes_on_and_none_is_left(tmp_path):
    note = "import os, sys\nfrom pathlib import Path\n"
    note += "Path(run, '{0}').write_text(f\"{{os.getpid()}} {{'alignkit.models.loading' in sys.modules}}\")"
    first = notebook(tmp_path / "a.ipynb", note.format("a"))
    second = notebook(tmp_path / "b.ipynb", note.format("b"), "raise ValueError('stop here')")
    third = notebook(tmp_path / "c.ipynb", note.format("c"))
    out = tmp_path / "run"
    with pytest.raises(NotebookFailed, match="b failed in cell 4.*stop here"):
        course(out, notebooks=[first, second, third], progress=False)
    (one, first_was), (two, second_was) = ((out / name).read_text().split() for name in "ab")
    assert (first_was, second_was) == ("True", "True")
    assert ended(int(one), 20) and ended(int(two), 20) and not (out / "c").exists()
    mine = psutil.Process().children(recursive=True)
    assert not [child for child in mine if "ipykernel_launcher" in " ".join(child.cmdline())], "the spare is left"


def test_what_a_job_made_with_other_parameters_is_moved_aside(tmp_path, monkeypatch):
    made = ["1"]

    def pretend(job, executing, _timeout, on_cell, *_):
        on_cell(0, 1)
        assert not (job.folder / "made.txt").exists()
        job.folder.mkdir(exist_ok=True)
        (job.folder / "made.txt").write_text(made[0])
        executing.touch()

    monkeypatch.setattr(notebooks, "_execute", pretend)
    source, out = notebook(tmp_path / "03b_ppo.ipynb"), tmp_path / "run"
    run_notebook(source, out, {"steps": 1})
    run_notebook(source, out, {"steps": 2})
    assert len(list((out / "aside").rglob("made.txt"))) == 1
    (out / "ppo" / "mine.txt").write_text("a note of my own")
    run_notebook(source, out, {"steps": 3})
    assert len(list((out / "aside").rglob("made.txt"))) == 2 and list((out / "aside").rglob("mine.txt"))


def test_every_notebook_of_the_course_is_there_and_its_parameters_can_be_read():
    found = notebooks.find_notebooks()
    if not found:
        pytest.fail("no notebooks were found")
    assert set(stages.CHAIN) <= set(found) and "your_model" in found
    for name, path in found.items():
        parameters = notebook_parameters(path)
        assert {"run", "seed"} <= set(parameters) or set(parameters) == {"record"}, name  # a record needs no run
        assert all(parameter.type for parameter in parameters.values()), (
            f"{name}: a default of None needs an annotation"
        )


def test_a_notebook_is_found_by_path_name_and_number(tmp_path, monkeypatch):
    path = notebook(tmp_path / "notebooks" / "03b_ppo.ipynb")
    monkeypatch.setattr(notebooks, "find_notebooks", lambda: {"03b_ppo": path})
    assert [notebooks.find_notebook(name) for name in (path, "03b_ppo", "03b_ppo.ipynb", "3", "03")] == [path] * 5
    by_hand = notebook(tmp_path / "notebooks" / "03a_ppo_by_hand.ipynb")
    monkeypatch.setattr(notebooks, "find_notebooks", lambda: {"03a_ppo_by_hand": by_hand, "03b_ppo": path})
    assert [notebooks.find_notebook(name) for name in ("3", "03", "03b", "03a")] == [path] * 3 + [by_hand]
    with pytest.raises(FileNotFoundError, match="expected a path to an .ipynb file or one of: 03a_ppo_by_hand, 03b"):
        notebooks.find_notebook("04_other")


@pytest.mark.parametrize("file, counts", [("forward/sampling.py", True), ("ppo.py", True), ("exact/sweep.json", True),
                                          ("jobs/report.py", False), ("pages/render.py", False),
                                          ("sweeps/engine.py", False)])
def test_a_job_runs_again_when_code_that_matters_changed_in_a_folder_too(tmp_path, file, counts):
    package = Path(job_module.__file__).parents[1]
    shutil.copytree(package, tmp_path / "alignkit", ignore=shutil.ignore_patterns("__pycache__"))
    code = "from alignkit.runs import records; print(records.__file__, records.code_hash())"

    def code_hash() -> str:
        env = {**os.environ, "PYTHONPATH": str(tmp_path)}
        seen = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True,
                              check=True).stdout.split()
        assert seen[0].startswith(str(tmp_path))
        return seen[1]

    before = code_hash()
    with (tmp_path / "alignkit" / file).open("a") as changed:
        changed.write("\n")
    assert (code_hash() != before) is counts
