"""The teacher's kit: student versions, the graded lab, and submissions that are broken or hostile."""

import csv
import json
import math
import os
import re
import tempfile
from pathlib import Path

import nbformat
import pytest
import torch
from lab_answers import RIGHT, WRONG

from alignkit.errors import RunError
from alignkit.jobs.cli import main
from alignkit.jobs.notebooks import find_notebooks
from alignkit.jobs.spare_kernel import STARTS
from alignkit.teaching import probe, submission
from alignkit.teaching.grading import Grade, grade, grade_file, judge, packed, table, task_calls
from alignkit.teaching.student import student_version, student_versions
from alignkit.teaching.submission import LAB, LARGEST_FILE, SubmissionError, read_submission
from alignkit.teaching.tasks import lab_tasks, number, same

TASKS = {task.name: task for task in lab_tasks(0)}
POSSIBLE = sum(task.points for task in TASKS.values())


def handed_in(path: Path, answers: dict[str, str], change=None) -> Path:
    """The lab with `answers` (task -> code) in its answer cells, changed by `change(notebook)`, as a file."""
    notebook = json.loads(LAB.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        for tag in cell["metadata"].get("tags", []):
            if (task := tag.removeprefix("task-")) in answers:
                cell["source"] = answers[task]
    if change:
        change(notebook)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(notebook), encoding="utf-8")
    return path


def judged(task, code: str) -> tuple[int, str]:
    """Points and reason for code of ours, called as a kernel calls a student's, but here."""
    names = {"torch": torch, "math": math}
    exec(code, names)
    results = probe.answers(names[task.function], json.dumps(task_calls(task))).results
    return judge(task, json.loads(json.dumps(results, allow_nan=False)))


# --- the lab ---------------------------------------------------------------------------------------------------------
def test_the_lab_is_a_clean_notebook_with_one_answer_cell_a_task_and_no_answers():
    notebook = nbformat.read(LAB, 4)
    nbformat.validate(notebook)
    text = LAB.read_text(encoding="utf-8")
    assert "alignkit.teaching" not in text and LAB.stem not in find_notebooks()
    for cell in notebook.cells:
        assert cell.cell_type != "code" or (not cell.outputs and cell.execution_count is None)
        assert len(cell.source.splitlines()) <= 25
    answers = read_submission(LAB, list(TASKS)).answers
    assert list(answers) == list(TASKS)
    for name, task in TASKS.items():
        assert f"{task.function} = None" in answers[name] or f"def {task.function}(" in answers[name]
    points = [int(each) for each in re.findall(r"^## Task \d · .*\((\d) points\)$", text.replace("\\n", "\n").replace(
        '"', "\n"), re.MULTILINE)]
    assert points == [task.points for task in TASKS.values()], "the lab tells other points than the checks give"


def test_the_examples_of_the_lab_show_what_they_expect_when_the_answers_are_right():
    notebook = nbformat.read(LAB, 4)
    printed: list[str] = []
    names = {"torch": torch, "math": math, "print": lambda *parts: printed.append(" ".join(map(str, parts)))}
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        tags = [tag.removeprefix("task-") for tag in cell.metadata.get("tags", []) if tag.startswith("task-")]
        exec(RIGHT[tags[0]] if tags else cell.source, names)
    shown = {line.partition(" expected")[0]: line for line in printed if "expected" in line}
    assert len(shown) == 7
    for result, line in shown.items():
        values, expected = ([float(each) for each in re.findall(r"\d+\.?\d*", part)] for part in (
            result, line.partition(" expected")[2]))
        assert "better" in result or any(abs(values[0] - each) < 0.01 for each in expected), line


@pytest.mark.parametrize("name", TASKS)
def test_the_checks_of_a_task_give_full_points_to_the_answer_key_and_fewer_to_each_wrong_answer(name):
    assert len(WRONG[name]) >= 2
    for seed in range(2 if name == "silent-bug" else 6):  # other hidden inputs
        task = next(task for task in lab_tasks(seed) if task.name == name)
        assert judged(task, RIGHT[name]) == (task.points, "")
        for what, code, points in WRONG[name]:
            given, reason = judged(task, code)
            assert given == points < task.points and reason, f"{what} (seed {seed}): {given} points, {reason!r}"


def test_the_untouched_lab_gets_no_points():
    for name, source in read_submission(LAB, list(TASKS)).answers.items():
        points, reason = judged(TASKS[name], source)
        assert points == 0 and reason.startswith("wrong: a higher price" if name == "silent-bug" else "not answered")


def test_hidden_inputs_differ_between_gradings_and_not_between_files():
    calls = [[json.dumps(task_calls(task)) for task in lab_tasks(seed)] for seed in (1, 1, 2)]
    assert calls[0] == calls[1] and all(one != other for one, other in zip(calls[0], calls[2], strict=True))


def test_every_notebook_has_a_plan_for_the_teacher_with_all_its_parts():
    text = (Path(__file__).parents[1] / "docs" / "teaching.md").read_text(encoding="utf-8")
    plans = dict(re.findall(r"^### (\w+)(.*?)(?=^##)", text, re.MULTILINE | re.DOTALL))
    for name in find_notebooks():
        plan = plans[name.partition("_")[0] if name[0].isdecimal() else name]
        for part in ("Time", "Goal", "Project", "Pause", "Questions", "Misunderstandings", "Exercises"):
            assert f"**{part}**" in plan, f"the plan of {name} does not say: {part}"
        assert 3 <= len(re.findall(r"^  \d\. \*.+\*", plan, re.MULTILINE)) <= 5, f"questions of {name}"
    assert str(len(TASKS)) == "8" and "eight tasks" in text


# --- what comes back from a kernel -----------------------------------------------------------------------------------
def test_an_answer_is_compared_by_value_and_shape_and_nan_is_never_right():
    assert same([[1.0, 2.0]], torch.tensor([[1.0, 2.0]])) and same([3.0], 3.0) and same({"text": "a"}, "a")
    assert not same([1.0, 2.0], torch.tensor([[1.0, 2.0]])) and not same([1.0, 2.0, 3.0], torch.tensor([1.0, 2.0]))
    for wrong in ("nan", None, True, {"text": "1"}, [1.0, 1.0], 10**400, "inf", []):
        assert not same(wrong, 1.0) and math.isnan(number(wrong)), wrong
    assert not same(1.001, 1.0) and not same("a", "a") and not same(None, ("a", 1.0))


@pytest.mark.parametrize("results", [
    None, "ok", [], [1, 2, 3], [{"value": "ok"}] * 99, {"points": 3}, [{"error": "x"}], [{}] * 4,
    [{"value": {"text": "right"}}] * 4, [{"value": [[[]]]}] * 4])
def test_results_that_say_nothing_of_value_give_no_points(results):
    points, reason = judge(TASKS["masked-mean"], results)
    assert points == 0 and reason


def test_the_probe_bounds_what_it_sends():
    for function in (lambda: torch.zeros(10**6), lambda: "x" * 10**6, lambda: [[0.0] * 10**4], lambda: object(),
                     lambda: exec("raise ValueError('y' * 10**6)"), lambda: exec("raise SystemExit('z' * 10**6)")):
        results = probe.answers(function, json.dumps([{"arguments": [], "gradient": None}])).results
        assert len(json.dumps(results)) < 400


def test_arguments_reach_the_kernel_as_they_are():
    values = [torch.tensor([[1.5, -math.inf], [math.nan, 0.1]]), torch.tensor([True, False]), [1.0, "a"], {"a": [2]}, 3]
    back = [probe._argument(json.loads(json.dumps(packed(value)))) for value in values]
    assert torch.equal(back[0].nan_to_num(7.0), values[0].nan_to_num(7.0)) and back[0].dtype == torch.float32
    assert torch.equal(back[1], values[1]) and back[1].dtype == torch.bool and back[2:] == values[2:]


# --- reading submissions ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("content, reason", [
    (b"\x80 no json", "not valid JSON"), (b"[1, 2]", "expected a JSON object"), (b'{"cells": 3}', "no notebook"),
    (b'{"cells": [3]}', "no notebook"), (b"[" * 10**5, "nested deeper"), (b'{"cells": []}', "has no answer cells"),
    (b'{"cells": [{"cell_type": "code", "metadata": {"tags": 7}, "source": 1}]}', "has no answer cells"),
    (b'{"cells": [], "x": NaN}', "not valid JSON"), (None, "no such file")])
def test_a_file_that_is_no_lab_is_refused_with_a_reason(tmp_path, content, reason):
    path = tmp_path / "a.ipynb"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SubmissionError, match=reason):
        read_submission(path, list(TASKS))
    given = grade_file(path, list(TASKS.values()), 1)
    assert given.total == 0 and re.search(reason, given.error) and given.error.count("a.ipynb") == 1


def test_a_submission_that_is_too_large_is_not_read_further(tmp_path, monkeypatch):
    assert LARGEST_FILE <= 64 * 2**20
    monkeypatch.setattr(submission, "LARGEST_FILE", 1000)
    with pytest.raises(SubmissionError, match="clear its outputs"):
        read_submission(LAB, list(TASKS))


def test_cells_that_are_missing_doubled_or_too_long_cost_their_own_task_only(tmp_path):
    def change(notebook):
        cells = notebook["cells"]
        doubled = next(cell for cell in cells if "task-dpo" in cell["metadata"].get("tags", []))
        cells.append(dict(doubled))
        for cell in cells:
            if "task-interval" in cell["metadata"].get("tags", []):
                cell["metadata"] = {}
            if "task-checkpoint" in cell["metadata"].get("tags", []):
                cell["cell_type"] = "markdown"

    path = handed_in(tmp_path / "a.ipynb", RIGHT | {"advantages": "x = '" + "x" * 30_000 + "'"}, change)
    read = read_submission(path, list(TASKS))
    assert set(read.answers) == {"masked-mean", "reward-loss", "sampled-kl", "silent-bug"}
    assert read.problems["dpo"] == "2 cells carry the tag task-dpo, expected one"
    assert read.problems["interval"] == "no code cell carries the tag task-interval"
    assert "20,000 at most" in read.problems["advantages"] and "no code cell" in read.problems["checkpoint"]


# --- the table -------------------------------------------------------------------------------------------------------
def test_the_table_has_no_formulas_no_line_breaks_and_no_endless_texts():
    tasks = list(TASKS.values())
    bad = Grade("=cmd|' C calc'!A0.ipynb", dict.fromkeys(TASKS, 1), {"dpo": "@SUM(A1)\n\x1b[31m" + "x" * 10**5})
    rows = list(csv.DictReader(table([bad, Grade("b.ipynb", None, {}, "-1")], tasks).splitlines()))
    assert rows[0]["file"].startswith("'=") and rows[0]["student"].startswith("'=")
    assert rows[0]["dpo: reason"].startswith("'@SUM(A1)␊␛") and len(rows[0]["dpo: reason"]) < 500
    assert rows[0]["total"] == "8" and rows[0]["of"] == str(POSSIBLE) and rows[0]["dpo"] == "1"
    assert rows[1]["total"] == "" and rows[1]["error"] == "'-1" and rows[1]["dpo"] == ""


def test_a_table_that_is_there_is_not_replaced_unasked(tmp_path, capsys):
    out, bad = tmp_path / "grades.csv", tmp_path / "bad.ipynb"
    out.write_text("mine")
    bad.write_text("no notebook")
    with pytest.raises(FileExistsError, match="--overwrite"):
        grade([bad], out)
    assert main(["grade", str(bad), "--out", str(out)]) == 1 and out.read_text() == "mine"
    assert main(["grade", str(bad), "--out", str(out), "--overwrite"]) == 0
    assert "not valid JSON" in out.read_text() and f"0 of {POSSIBLE}" in capsys.readouterr().out
    with pytest.raises(RunError, match="no folder"):
        grade([], tmp_path / "none" / "grades.csv")


def test_a_pattern_is_expanded_and_a_file_that_is_not_there_ends_it_before_a_table_is_written(tmp_path, capsys):
    out = tmp_path / "grades.csv"
    for name in ("b.ipynb", "a.ipynb", "[c].ipynb"):
        (tmp_path / name).write_text("no notebook")
    for missing in ("non*.ipynb", "non.ipynb"):
        assert main(["grade", str(tmp_path / "a.ipynb"), str(tmp_path / missing), "--out", str(out)]) == 1
        said = capsys.readouterr()
        assert missing in said.err and not said.out and not out.exists()
    assert main(["grade", str(tmp_path / "?.ipynb"), str(tmp_path / "[c].ipynb"), "--out", str(out)]) == 0
    assert [row["student"] for row in csv.DictReader(out.open())] == ["a", "b", "[c]"]


# --- grading, in kernels ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """Submissions graded in one call: name -> its row of the CSV, and the folder in which they left their marks."""
    folder = tmp_path_factory.mktemp("graded")
    mark = folder / "marks"
    mark.mkdir()
    leave = "open({!r}, 'w').write({})\n"

    def tampered(notebook):  # everything but the answers is the student's own, and would show if it ran
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code" and not any(
                    tag.startswith("task-") for tag in cell["metadata"].get("tags", [])):
                cell["source"] = leave.format(str(mark / "ran"), "'ran'") + "torch = None\n"
        notebook["metadata"]["kernelspec"] = {"name": "evil", "language": "python", "display_name": "evil"}
        notebook["metadata"]["papermill"] = {"exec": "import os"}

    peeking = {
        "masked-mean": leave.format(str(mark / "pid"), "str(__import__('os').getpid())")
        + leave.format(str(mark / "folder"), "repr(__import__('os').listdir())")
        + leave.format(str(mark / "secret"), "str(dict(__import__('os').environ))") + RIGHT["masked-mean"],
        "advantages": "from alignkit import gae\ndef advantages(*a):\n    return gae(*a)",
        "dpo": "print('x' * 10**7)\nprint('dpo: 4 points, ok')\ndpo = 'ok'",
        "interval": RIGHT["interval"] + "\nprint({'results': 'ok'})\n",
    }
    files = [handed_in(folder / "in" / "right.ipynb", RIGHT, tampered),
             handed_in(folder / "in" / "untouched.ipynb", {}), handed_in(folder / "in" / "peeking.ipynb", peeking)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "a-secret-of-the-teacher")
        patch.setattr(tempfile, "tempdir", str(folder))
        grade(files, folder / "grades.csv", seconds=120, seed=3)
    rows = {row["student"]: row for row in csv.DictReader((folder / "grades.csv").read_text().splitlines())}
    return rows, mark


def test_the_answer_key_gets_all_points_and_the_untouched_lab_none(graded):
    rows, _ = graded
    assert rows["right"]["total"] == rows["right"]["of"] == str(POSSIBLE)
    assert not any(value for name, value in rows["right"].items() if "reason" in name or name == "error")
    assert rows["untouched"]["total"] == "0" and rows["untouched"]["dpo: reason"] == "not answered"


def test_only_answers_and_the_lab_s_own_set_up_are_executed(graded):
    rows, mark = graded
    assert rows["right"]["total"] == str(POSSIBLE) and not (mark / "ran").exists()


def test_answers_run_in_another_process_in_an_empty_folder_without_the_teacher_s_environment(graded):
    rows, mark = graded
    assert int((mark / "pid").read_text()) != os.getpid()
    assert (mark / "folder").read_text() == "[]"
    assert "a-secret-of-the-teacher" not in (mark / "secret").read_text()
    assert not list(mark.parent.glob("alignkit-grade-*")), "a kernel's folder was left"
    assert rows["peeking"]["masked-mean"] == "3"


def test_alignkit_cannot_be_imported_and_printed_claims_count_for_nothing(graded):
    row = graded[0]["peeking"]
    assert row["advantages"] == "0" and "ModuleNotFoundError" in row["advantages: reason"]
    assert row["dpo"] == "0" and "not callable" in row["dpo: reason"]
    assert row["interval"] == "2" and row["total"] == "5"


@pytest.mark.parametrize("taken, total", [(1, 2), (STARTS, None)])
def test_a_kernel_whose_port_was_taken_meanwhile_is_started_again(tmp_path, take_ports, taken, total):
    asked = take_ports(taken)
    file = handed_in(tmp_path / "one.ipynb", {"interval": RIGHT["interval"]})
    (graded,) = grade([file], tmp_path / "grades.csv", seconds=120)
    assert graded.total == total and len(asked) == 5 * min(taken + 1, STARTS), graded.error


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> tuple[Grade, Grade]:
    """A submission in which nearly every answer attacks its kernel, and the file graded after it."""
    folder = tmp_path_factory.mktemp("hostile")
    answers = {
        "masked-mean": "while True: pass",
        "reward-loss": "import os\nos.kill(os.getpid(), 9)",
        "sampled-kl": "def sampled_kl(*a):\n    return [[[a]] * 10**4] * 10**4",
        "advantages": "block = bytearray(2**33)",
        "silent-bug": "raise ValueError('x' * 5_000_000)",
        "checkpoint": "import sys\nsys.exit('=1+1')",
        "dpo": "def dpo(*a):\n    raise SystemExit(1)",
        "interval": RIGHT["interval"],
    }
    files = [handed_in(folder / "=hostile.ipynb", answers), handed_in(folder / "none" / "last.ipynb", {}),
             folder / "none"]
    files[1].write_text("{")
    first, second, _ = grade(files, folder / "grades.csv", seconds=8)
    assert len((folder / "grades.csv").read_text().splitlines()) == 4
    return first, second


@pytest.mark.slow
@pytest.mark.parametrize("task, reason", [
    ("masked-mean", "not done after 8 s"), ("reward-loss", "killed by signal 9"),
    ("sampled-kl", "more than 5000 parts"), ("advantages", "MemoryError"),
    ("silent-bug", "reply of more than 1,048,576 bytes"), ("checkpoint", "SystemExit: =1\\+1"),
    ("dpo", "SystemExit: 1")])
def test_an_answer_that_attacks_its_kernel_costs_its_own_points_and_says_why(hostile, task, reason):
    assert hostile[0].points[task] == 0 and re.search(reason, hostile[0].reasons[task])


@pytest.mark.slow
def test_after_all_attacks_an_honest_answer_and_the_next_file_are_graded(hostile):
    assert hostile[0].points["interval"] == 2 and hostile[0].total == 2
    assert hostile[1].total == 0 and "not valid JSON" in hostile[1].error


# --- student versions ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", find_notebooks().values(), ids=lambda path: path.stem)
def test_a_student_version_has_no_solution_and_keeps_stubs_and_checks(path):
    before, after = nbformat.read(path, 4), nbformat.reads(student_version(path, answers=False), 4)
    nbformat.validate(after)
    text = "\n".join(cell.source for cell in after.cells)
    assert not re.search(r"<summary>[^<]*(solution|answer)", text, re.IGNORECASE)
    assert not any("solution" in cell.metadata.get("tags", []) for cell in after.cells)
    assert text.count("<details") == text.count("</details>")
    for cell in before.cells:
        if cell.cell_type == "code" and "solution" not in cell.metadata.get("tags", []):
            assert cell in after.cells, f"{cell.id} is missing or changed"
        if "solution" in cell.metadata.get("tags", []):
            code = re.search(r"```python\n(.*?)```", cell.source, re.DOTALL)
            assert code is None or code[1] not in text, f"the solution {cell.id} is still there"


def test_short_answers_and_hints_stay_unless_answers_are_left_out(tmp_path):
    source = ("text\n\n<details><summary>Hint</summary>h</details>\n\n<details><summary>Short answers</summary>\n\n"
              "1. a\n</details>\n\n<details>\n<summary>Solution of 3</summary>s</details>\nmore")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(source)])
    nbformat.write(notebook, tmp_path / "n.ipynb")
    kept, without = (json.loads(student_version(tmp_path / "n.ipynb", answers=answers))["cells"][0]["source"]
                     for answers in (True, False))
    assert "".join(kept) == source.replace("<details>\n<summary>Solution of 3</summary>s</details>\n", "")
    assert "1. a" not in "".join(without) and "Hint</summary>h" in "".join(without) and "more" in "".join(without)


def test_a_student_s_work_is_kept_and_a_second_call_changes_nothing(tmp_path, capsys):
    before = {path: path.read_bytes() for path in [*find_notebooks().values(), LAB]}
    out = tmp_path / "course"
    assert main(["student", str(out)]) == 0
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(written) == {path.name for path in before} and "written" in capsys.readouterr().out
    assert written["lab.ipynb"] == LAB.read_bytes()
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "01_sft.ipynb").write_text("my work")
    assert {copy.path.name: copy.state for copy in student_versions(out)} == {
        name: "kept" if name == "01_sft.ipynb" else "unchanged" for name in written}
    assert (out / "01_sft.ipynb").read_text() == "my work"
    assert all(path.stat().st_mtime_ns == times[path.name] for path in out.iterdir() if path.name != "01_sft.ipynb")
    assert main(["student", str(out)]) == 0 and "differs; --overwrite replaces it" in capsys.readouterr().out
    assert main(["student", str(out), "--overwrite"]) == 0
    assert (out / "01_sft.ipynb").read_bytes() == written["01_sft.ipynb"]
    assert {path: path.read_bytes() for path in before} == before


def test_the_notebooks_themselves_are_never_the_target():
    for folder in {path.parent for path in [*find_notebooks().values(), LAB]}:
        with pytest.raises(RunError, match="with their solutions"):
            student_versions(folder, overwrite=True)


def test_the_commands_show_an_example_and_refuse_a_limit_that_is_none(capsys):
    for command in ("student", "grade"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"example: alignkit {command}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["grade", "a.ipynb", "--timeout", "0"])
    assert "seconds from 1 to 3600" in capsys.readouterr().err
