"""`alignkit lab`: students work on copies; alignkit's notebooks, and what students wrote, stay as they are."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from alignkit.errors import RunError
from alignkit.jobs import cli, lab, notebooks
from alignkit.jobs.lab import lab_copies, lab_report
from alignkit.runs.records import start_run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A git clone with two notebooks, as `make lab` sees it."""
    folder = tmp_path / "clone"
    (folder / "notebooks").mkdir(parents=True)
    for name in ("00_the_world", "03b_ppo"):
        shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", folder / "notebooks")
    shutil.copy(ROOT / ".gitignore", folder)
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "-c", "user.name=a", "-c", "user.email=a@example.com", "commit", "-qm", "first")
    monkeypatch.setattr(lab, "find_notebooks",
                        lambda: {path.stem: path for path in sorted((folder / "notebooks").glob("*.ipynb"))})
    monkeypatch.chdir(folder)
    return folder


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def states(copies) -> dict[str, str]:
    return {copy.path.stem: copy.state for copy in copies}


def edit(path: Path, line: str) -> bytes:
    """Put a line into a notebook's last cell, as JupyterLab saves it; returns the file's bytes."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["cells"][-1]["source"] = [line]
    path.write_text(json.dumps(notebook, indent=1), encoding="utf-8")
    return path.read_bytes()


def test_the_lab_leaves_the_clone_clean_also_after_a_student_worked_in_it(clone):
    assert states(lab_copies("runs/lab")) == {"00_the_world": "new", "03b_ppo": "new"}
    edit(clone / "runs/lab/03b_ppo.ipynb", "mine")
    assert states(lab_copies("runs/lab")) == {"00_the_world": "current", "03b_ppo": "current"}
    assert git(clone, "status", "--porcelain") == ""


def test_a_changed_copy_of_an_older_notebook_is_kept_and_named_and_an_untouched_one_is_replaced(clone):
    lab_copies("runs/lab")
    mine = edit(clone / "runs/lab/03b_ppo.ipynb", "mine")
    for name in ("00_the_world", "03b_ppo"):
        edit(clone / "notebooks" / f"{name}.ipynb", "newer")
    for _ in range(2):
        copies = lab_copies("runs/lab")
        assert (clone / "runs/lab/03b_ppo.ipynb").read_bytes() == mine
    said = lab_report(copies)
    assert states(copies) == {"00_the_world": "current", "03b_ppo": "older"}
    assert "03b_ppo.ipynb: alignkit has a newer one. Yours is kept" in said and "00_the_world" not in said
    newer = json.loads((clone / "runs/lab/00_the_world.ipynb").read_text(encoding="utf-8"))
    assert newer["cells"][-1]["source"] == ["newer"]
    (clone / "runs/lab/03b_ppo.ipynb").rename(clone / "runs/lab/my_ppo.ipynb")  # as the sentence says
    assert states(lab_copies("runs/lab"))["03b_ppo"] == "new"
    assert (clone / "runs/lab/my_ppo.ipynb").read_bytes() == mine


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"metadata": {"alignkit_copy": 3}}', "not JSON"])
def test_a_file_that_the_lab_did_not_make_is_kept(clone, content):
    there = clone / "runs/lab/03b_ppo.ipynb"
    there.parent.mkdir(parents=True)
    there.write_text(content)
    copies = lab_copies("runs/lab")
    assert states(copies)["03b_ppo"] == "other" and there.read_text() == content
    assert "03b_ppo.ipynb: kept; it is not a copy" in lab_report(copies)


def test_a_link_is_not_written_through_or_replaced(clone):
    lab_copies("runs/lab")
    there, elsewhere = clone / "runs/lab/03b_ppo.ipynb", clone / "elsewhere.ipynb"
    there.rename(elsewhere)
    there.symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    edit(clone / "notebooks/03b_ppo.ipynb", "newer")
    assert states(lab_copies("runs/lab"))["03b_ppo"] == "older"
    assert there.is_symlink() and elsewhere.read_bytes() == before


def test_the_folder_of_the_notebooks_themselves_is_refused(clone):
    with pytest.raises(RunError, match="own notebooks"):
        lab_copies("notebooks")
    (clone / "file").touch()
    with pytest.raises(RunError, match="cannot be made"):
        lab_copies("file")


def test_a_copy_finds_the_run_of_the_project(clone, monkeypatch):
    """JupyterLab starts a kernel in the folder of its notebook: the lab's, the clone's, or that of an executed one."""
    lab_copies("runs/lab")
    for place in ("runs/lab", "notebooks", "."):
        monkeypatch.chdir(clone / place)
        assert start_run("runs/course", "tiny", "desk", 0).resolve() == clone / "runs/course"
    monkeypatch.chdir(clone / "runs/lab")
    assert start_run("elsewhere", "tiny", "desk", 0).resolve() == clone / "runs/lab/elsewhere"


def test_the_command_opens_jupyterlab_on_the_first_copy(clone, capsys, monkeypatch):
    from jupyterlab.labapp import LabApp

    opened = []
    monkeypatch.setattr(LabApp, "launch_instance", lambda arguments: opened.append(arguments))
    assert cli.main(["lab", "--", "--no-browser", "--port=1"]) == 0
    assert opened == [[f"--ServerApp.root_dir={clone}", "--LabApp.default_url=/lab/tree/runs/lab/00_the_world.ipynb",
                       "--no-browser", "--port=1"]]
    assert "your notebooks: runs/lab (2 copies of alignkit's, 2 made now)" in capsys.readouterr().out
    monkeypatch.chdir(clone / "notebooks")
    assert cli.main(["lab", "--folder", str(clone / "runs/lab")]) == 0
    assert opened[1] == [f"--ServerApp.root_dir={clone / 'runs/lab'}",
                         "--LabApp.default_url=/lab/tree/00_the_world.ipynb"]


def test_make_lab_opens_the_copies():
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\nlab:")[2].partition("\n\n")[0]
    assert "alignkit lab" in recipe and "notebooks/" not in recipe
    assert notebooks.find_notebooks()
