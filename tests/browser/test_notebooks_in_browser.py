"""Every notebook as a reader runs it: opened in JupyterLab, all cells run, nothing wrong to see, a picture of it kept.

The notebooks run in small settings (`experiments.readings`), in their order, in one run directory, and in a world that
nobody chose: its seed comes from the commit's hash. A sentence of a notebook that contradicts itself is an error; those
that do not hold in that world are warnings, which pytest lists at its end. What one of the notebooks needs and was not
chosen is run without a page first. ALIGNKIT_NOTEBOOK_PARAMETERS, a JSON object {notebook: {name: value}}, overrides the
parameters: '{"03b_ppo": {"iterations": 40}}'; ALIGNKIT_WORLD overrides the seed.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

import nbformat
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from alignkit.evaluate.readings import METADATA
from alignkit.jobs.notebooks import run_notebook
from alignkit.jobs.parameters import check_parameters
from alignkit.stages import CHAIN
from alignkit.storage import read_metrics
from experiments.readings import SMALL, contradictions, seed_of_commit

pytestmark = [pytest.mark.browser, pytest.mark.slow]

NOTEBOOKS = {path.stem: path for path in sorted((Path(__file__).parents[2] / "notebooks").glob("[0-9]*.ipynb"))}
WORLD = int(os.environ.get("ALIGNKIT_WORLD") or seed_of_commit())
OVERRIDES: dict[str, dict] = json.loads(os.environ.get("ALIGNKIT_NOTEBOOK_PARAMETERS", "{}"))


def small(name: str) -> dict:
    """The parameters that a notebook is tested with; a name that it does not have is refused."""
    given = {"seed": WORLD} | SMALL.get(name, {}) | OVERRIDES.get(name, {})
    check_parameters(NOTEBOOKS[name], given)
    return given


class Course:
    """The run directory that the notebooks share, and what has run there."""

    def __init__(self, run: Path) -> None:
        self.run, self.done = run, set()

    def before(self, name: str) -> None:
        """Run, without a page, what comes before `name` in the course and has not run yet."""
        for earlier in [stage for stage in CHAIN if stage < name and stage in NOTEBOOKS and stage not in self.done]:
            run_notebook(NOTEBOOKS[earlier], self.run, small(earlier), progress=False)
            self.done.add(earlier)

    def with_parameters(self, name: str, folder: Path, **parameters: object) -> Path:
        """A copy of the notebook in `folder` that will run here, with its small parameters and then `parameters`."""
        notebook = parameterize_notebook(
            load_notebook_node(str(NOTEBOOKS[name])), {"run": str(self.run)} | small(name) | parameters
        )
        path = folder / f"{name}.ipynb"
        nbformat.write(notebook, path)
        return path


@pytest.fixture(scope="module")
def course(tmp_path_factory) -> Course:
    return Course(tmp_path_factory.mktemp("course"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_open_and_run(open_notebook, course, tmp_path, name):
    course.before(name)
    notebook = open_notebook(course.with_parameters(name, tmp_path), size=(1280, 2400))
    notebook.run(seconds=900)
    notebook.screenshot(name)
    assert notebook.errors() == []
    saved = notebook.saved()
    assert len(json.dumps(saved)) < 2_000_000, "an executed notebook stays below 2 MB"
    assert "widgets" not in saved["metadata"], "no state of a widget is kept"
    bundles = [output.get("data", {}) for cell in saved["cells"] for output in cell.get("outputs", [])]
    live = [bundle for bundle in bundles if "application/vnd.jupyter.widget-view+json" in bundle]
    assert all("image/png" in bundle for bundle in live), "a widget without a picture to stand in for it"
    code = [cell for cell in saved["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code if "".join(cell["source"]).strip()), "a cell did not run"
    outputs = [output for cell in code for output in cell["outputs"]]
    readings = [output["metadata"][METADATA] for output in outputs if METADATA in output.get("metadata", {})]
    assert contradictions(readings) == []
    for record in readings:
        if record["verdict"] != "holds":
            warnings.warn(f"world {WORLD}, small settings, {record['name']}: {record[record['verdict']]}", stacklevel=1)
    course.done.add(name)


def test_ppo_is_paused_its_kl_coefficient_doubled_resumed_and_stopped_while_the_cell_runs(
    open_notebook, course, tmp_path
):
    course.before("03b_ppo")
    for folder in ("ppo", "ppo.new"):  # a finished stage would stay, and this run be built beside it
        shutil.rmtree(course.run / folder, ignore_errors=True)
    log = course.run / "ppo" / "metrics.jsonl"
    path = course.with_parameters("03b_ppo", tmp_path, iterations=400, overoptimise=False)
    notebook = open_notebook(path, size=(1280, 1600))
    page, panel = notebook.page, notebook.page.locator(".akc")
    notebook.start()
    panel.wait_for(timeout=900_000)  # the cells before it train nothing, but they import torch and sample
    notebook.until(lambda: len(read_metrics(log)) >= 5 if log.exists() else False, "five iterations of PPO", 600)
    panel.get_by_role("button", name="Pause").press("Enter")
    page.wait_for_selector(".akc-state[data-state=paused]")
    paused_at = len(read_metrics(log))
    box = panel.locator("input[type=number][data-control=kl_coef]")
    before = float(box.input_value())
    box.focus()
    page.keyboard.press("Control+A")
    page.keyboard.type(str(2 * before))
    page.keyboard.press("Enter")
    panel.get_by_text("from the next iteration on").wait_for()
    panel.scroll_into_view_if_needed()
    panel.get_by_role("button", name="Play").press("Enter")
    notebook.until(lambda: len(read_metrics(log)) >= paused_at + 5, "five more iterations", 600)
    notebook.screenshot("03b_ppo_steered")
    panel.get_by_role("button", name="Stop").press("Enter")
    notebook.wait(seconds=900)
    rows = read_metrics(log)
    assert paused_at + 5 <= len(rows) < 400
    coefficients = [row["controls"]["kl_coef"] for row in rows]
    assert coefficients == [before] * paused_at + [2 * before] * (len(rows) - paused_at)
    assert rows[paused_at]["objective/kl_coef"] == pytest.approx(2 * before), "PPO did not train with it"
    assert notebook.errors() == []
    notebook.screenshot("03b_ppo_stopped")


def test_ppo_is_rewound_and_trained_again_at_twice_the_price_of_kl(open_notebook, course, tmp_path):
    course.before("03b_ppo")
    for folder in ("ppo", "ppo.new"):  # a finished stage would stay, and this run be built beside it
        shutil.rmtree(course.run / folder, ignore_errors=True)
    log = course.run / "ppo" / "metrics.jsonl"
    notebook = open_notebook(course.with_parameters("03b_ppo", tmp_path, iterations=16, overoptimise=False))
    page, panel = notebook.page, notebook.page.locator(".akc")
    notebook.start()
    panel.wait_for(timeout=900_000)
    notebook.until(lambda: len(read_metrics(log)) >= 5 if log.exists() else False, "five iterations of PPO", 600)
    panel.get_by_role("button", name="Pause").press("Enter")
    page.wait_for_selector(".akc-state[data-state=paused]")
    left = read_metrics(log)
    box = panel.locator("input[type=number][data-control=kl_coef]")
    before = float(box.input_value())
    box.focus()
    page.keyboard.press("Control+A")
    page.keyboard.type(str(2 * before))
    page.keyboard.press("Enter")
    choice = panel.get_by_label("back to iteration")
    choice.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert choice.input_value() == "2"
    panel.get_by_role("button", name="Rewind").press("Enter")
    notebook.until(lambda: read_metrics(log) == left[:2], "the rewind", 600)
    panel.get_by_role("button", name="Play").press("Enter")
    notebook.until(lambda: len(read_metrics(log)) >= min(len(left) + 3, 15), "the new branch", 600)
    panel.scroll_into_view_if_needed()
    notebook.screenshot("03b_ppo_branching")
    notebook.wait(seconds=900)
    rows = read_metrics(log)
    assert [row["step"] for row in rows] == list(range(1, 17)) and rows[:2] == left[:2]
    assert read_metrics(log.with_name("metrics.branch-1.jsonl")) == left[2:]
    assert [row["controls"]["kl_coef"] for row in rows] == [before] * 2 + [2 * before] * 14
    for measured in ("objective/scores", "objective/kl", "shares"):
        assert rows[2][measured] == left[2][measured], "the same policy, drawn from with the same random numbers"
        assert rows[3][measured] != left[3][measured], "it was trained otherwise"
    assert notebook.errors() == []
    notebook.screenshot("03b_ppo_branched")
