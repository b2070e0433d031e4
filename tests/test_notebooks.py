"""The notebooks as files, and the solutions of their exercises, which must pass their own checks."""

import json
import re
from pathlib import Path

import nbformat
import pytest

from alignkit.jobs.notebooks import run_notebook
from alignkit.jobs.parameters import notebook_parameters
from alignkit.runs.records import start_run
from alignkit.stages import CHAIN

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9]*.ipynb"))
RECORDED = [FOLDER / f"{name}.ipynb"  # they train nothing: seconds each
            for name in ("advice", "claims", "dials", "failures", "relay_or_sum", "sweep", "unpacking",
                         "what_it_cannot_learn", "without_a_critic")]
MEASURING = sorted((FOLDER.parent / "experiments").glob("*.ipynb"))  # jobs of experiments, no lessons
SMALL = {  # notebook -> parameters with which its solutions are run, in this order, in one run directory
    "00_the_world": {},
    "01_sft": {"demonstrations": 2400, "epochs": 2.0, "eval_prompts": 64, "eval_samples": 4},
    "02_reward_model": {"pairs": 1000, "heldout_pairs": 400, "epochs": 2.0, "scale_samples": 256},
    "08_dpo_is_ppo_when": {"pairs": 400, "prompts": 4, "ppo_iterations": 1},
}


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


@pytest.mark.parametrize("path", [*NOTEBOOKS, *RECORDED, *MEASURING], ids=lambda path: path.stem)
def test_a_notebook_is_committed_clean_and_has_the_course_shape(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert notebook.nbformat_minor >= 5 and "widgets" not in notebook.metadata
    assert notebook.metadata.kernelspec.name == "python3"
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, f"{cell.id} has outputs"
            if "parameters" not in tags(cell):  # a line for each parameter
                assert len(cell.source.splitlines()) <= 25, f"{cell.id} has more than 25 lines"
        if "report" in tags(cell):
            assert cell.source.startswith("# "), f"{cell.id}: a chart of report.html begins with its caption, a comment"
    number = path.stem.partition("_")[0]
    assert notebook.cells[0].source.startswith(f"# {number} " if path in NOTEBOOKS else "# ")
    if path.stem in CHAIN:
        assert {"run", "model", "data", "seed"} <= set(notebook_parameters(path))
        assert tags(notebook.cells[1]) == ["parameters"]


def solved(path: Path) -> nbformat.NotebookNode:
    """The notebook with each stub tagged `exercise` replaced by the code in the next cell tagged `solution`."""
    notebook, stub = nbformat.read(path, 4), None
    for cell in notebook.cells:
        if "exercise" in tags(cell):
            stub = cell
        elif "solution" in tags(cell):
            stub.source = re.search(r"```python\n(.*?)```", cell.source, re.DOTALL)[1]
            stub = None
    assert stub is None, f"{stub.id} has no solution"
    return notebook


def test_the_solutions_of_the_exercises_pass_their_checks(tmp_path):
    for name, parameters in SMALL.items():
        path = tmp_path / "solved" / f"{name}.ipynb"
        path.parent.mkdir(exist_ok=True)
        nbformat.write(solved(next(path for path in NOTEBOOKS if path.stem == name)), path)
        executed = nbformat.read(run_notebook(path, tmp_path / "run", parameters, progress=False), 4)
        checks = [cell for cell in executed.cells if cell.get("id", "").startswith("check-")]
        assert checks
        for cell in checks:
            said = "".join(output.get("text", "") for output in cell.outputs)
            assert said and "not answered" not in said, f"{name}, {cell.id}: {said!r}"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["stages"]["sft"]["proxy_mean"] is not None and summary["stages"]["reward"]["bayes_accuracy"] > 0.6


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_a_notebook_about_a_record_runs_and_its_solutions_pass(path, tmp_path):
    solution = tmp_path / path.name
    nbformat.write(solved(path), solution)
    executed = nbformat.read(run_notebook(solution, tmp_path / "run", {}, progress=False), 4)
    checks = ["".join(output.get("text", "") for output in cell.outputs) for cell in executed.cells
              if cell.get("id", "").startswith("check-")]
    assert checks and all(text.startswith("right: ") for text in checks)


def test_a_run_is_in_the_project_folder_also_for_a_notebook_opened_in_jupyterlab(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    for place in (tmp_path, tmp_path / "notebooks"):
        monkeypatch.chdir(place)
        assert start_run("runs/course", "tiny", "desk", 0).resolve() == tmp_path / "runs" / "course"
