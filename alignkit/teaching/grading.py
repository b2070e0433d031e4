"""Submissions of the lab to points. Nothing of a submission runs in this process.

Each submission gets a kernel of its own; an answer that ends it, or hangs, costs its own points alone, because the next
task begins in a new kernel. The student's functions are called in the kernel; what they return is compared here.
"""

import csv
import io
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jupyter_core.utils import run_sync

from alignkit.errors import RunError
from alignkit.jobs.spare_kernel import STARTS
from alignkit.safe_text import csv_cell, one_line
from alignkit.storage import write_atomically
from alignkit.teaching import probe
from alignkit.teaching.kernel import START_SECONDS, AnswerFailed, SubmissionKernel
from alignkit.teaching.submission import SubmissionError, read_submission, set_up_code
from alignkit.teaching.tasks import Check, Task, lab_tasks

MEMORY = 2 * 2**30  # bytes that a submission may take, above Python and torch
FILE_BYTES = 16 * 2**20  # the largest file that a submission may write
HIDDEN = ["alignkit", "alignkit_widgets", "trl"]  # modules that hold the answers
PROBE = Path(probe.__file__)


@dataclass(frozen=True)
class Grade:
    """The points of a submission, task by task, and for each task that lacks points the reason in a short line.

    points: None for a file that could not be graded because of this machine, not of the student.
    """

    file: str
    points: dict[str, int] | None
    reasons: dict[str, str]
    error: str = ""

    @property
    def total(self) -> int | None:
        return None if self.points is None else sum(self.points.values())


def grade(files: Sequence[str | Path], out: str | Path, *, seconds: float = 30.0, overwrite: bool = False,
          seed: int | None = None, on_grade: Callable[[Grade, int], None] | None = None) -> list[Grade]:
    """Grade submissions of the lab and write the CSV file `out`, again after each of them; returns the grades.

    seconds: the limit for the cell and the calls of one task. seed: of the hidden inputs, the same for all files; by
    default another one each time. on_grade(grade, points that can be had): called after each file. A file that cannot
    be graded gets a row that says why. Raises FileNotFoundError if a file is not there, FileExistsError if `out` is
    there and `overwrite` was not asked for, both before anything is graded.
    """
    out = Path(out)
    if missing := [str(file) for file in files if not Path(file).exists()]:
        raise FileNotFoundError(f"{', '.join(missing[:5])}: no such file; nothing was graded")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} is there already; --overwrite replaces it, --out names another file")
    if not out.parent.is_dir():
        raise RunError(f"{out.parent} is no folder; the table of grades cannot be written there")
    tasks = lab_tasks(secrets.randbits(40) if seed is None else seed)
    possible, grades = sum(task.points for task in tasks), []
    for file in files:
        grades.append(grade_file(file, tasks, seconds))
        write_atomically(out, table(grades, tasks))
        if on_grade:
            on_grade(grades[-1], possible)
    return grades


def grade_file(file: str | Path, tasks: Sequence[Task], seconds: float) -> Grade:
    """Grade one submission; whatever is wrong with it is a reason in the Grade, never an exception."""
    nothing = {task.name: 0 for task in tasks}
    try:
        submission = read_submission(file, [task.name for task in tasks])
    except SubmissionError as error:
        return Grade(str(file), nothing, {}, str(error))
    try:
        points, reasons = run_sync(_grade_answers)(submission.answers, tasks, seconds)
    except Exception as error:  # one file must not stop the others
        return Grade(str(file), None, {}, f"not graded: the kernel could not be used ({type(error).__name__}: {error})")
    return Grade(str(file), nothing | points, submission.problems | reasons)


def table(grades: Sequence[Grade], tasks: Sequence[Task]) -> str:
    """Grades as CSV text: file, student (the file's stem), total, of, the points of each task, error, reasons.

    Texts are cut, stand on one line and cannot become formulas of a spreadsheet.
    """
    text, possible = io.StringIO(), sum(task.points for task in tasks)
    writer = csv.writer(text, lineterminator="\n")
    names = [task.name for task in tasks]
    writer.writerow(["file", "student", "total", "of", *names, "error", *(f"{name}: reason" for name in names)])
    for each in grades:
        points = each.points or {}
        row = [each.file, Path(each.file).stem, "" if each.total is None else each.total, possible,
               *(points.get(name, "") for name in names), each.error, *(each.reasons.get(name, "") for name in names)]
        writer.writerow([csv_cell(value) for value in row])
    return text.getvalue()


async def _grade_answers(answers: dict[str, str], tasks: Sequence[Task], seconds: float) -> tuple[dict, dict]:
    """Points and reasons of the tasks that have an answer; a new kernel after each answer that broke the last one."""
    points, reasons, kernel = {}, {}, None
    try:
        for task in (task for task in tasks if task.name in answers):
            if kernel is None:
                kernel = await _ready_kernel(seconds * len(tasks))
            try:
                points[task.name], reasons[task.name] = await _grade_task(kernel, task, answers[task.name], seconds)
            except AnswerFailed as failure:
                points[task.name], reasons[task.name] = 0, str(failure)
                if not failure.alive:
                    await kernel.stop()
                    kernel = None
    finally:
        if kernel is not None:
            await kernel.stop()
    return points, {name: reason for name, reason in reasons.items() if reason}


async def _ready_kernel(cpu_seconds: float) -> SubmissionKernel:
    """A kernel in which the lab's own set-up has run; one that died before that is started again, STARTS times in all,
    because a port of it may have been taken. Raises RuntimeError if even that fails."""
    limits = {"memory": MEMORY, "file_bytes": FILE_BYTES, "seconds": int(cpu_seconds) + 60, "hidden": HIDDEN}
    code = f"{set_up_code()}\n{_loaded('_limits')}\n_limits['start'](**{limits!r})\ndel _limits"
    for starts_left in reversed(range(STARTS)):
        kernel = await SubmissionKernel().__aenter__()
        try:
            await kernel.run(code, START_SECONDS)
            return kernel
        except AnswerFailed as failure:
            await kernel.stop()
            if not (starts_left and failure.died):
                raise RuntimeError(str(failure)) from None
        except BaseException:
            await kernel.stop()
            raise


async def _grade_task(kernel: SubmissionKernel, task: Task, answer: str, seconds: float) -> tuple[int, str]:
    """Run one answer cell and the calls of its function; returns what `judge` says."""
    await kernel.run(answer, seconds)
    name = f"_probe_{secrets.token_hex(8)}"
    shown = await kernel.run(_loaded(name), seconds,
                             f"{name}['answers'](globals().get({task.function!r}), {json.dumps(task_calls(task))!r})")
    return judge(task, shown.get("results") if isinstance(shown, dict) else None)


def task_calls(task: Task) -> list[dict]:
    """The calls of a task's function as `probe.answers` takes them; calls that checks share are made once."""
    return [{"arguments": [packed(each) for each in arguments], "gradient": check.gradient}
            for check in _groups(task).values() for arguments in check.calls]


def judge(task: Task, results: object) -> tuple[int, str]:
    """Points for the results of `task_calls(task)`, and the first reason why some are missing; "" if none are.

    results: what a kernel sent back, which may be anything.
    """
    groups = _groups(task)
    if (not isinstance(results, list) or len(results) != sum(len(check.calls) for check in groups.values())
            or not all(isinstance(result, dict) for result in results)):
        return 0, "the kernel did not return the results of the calls"
    answers = {}
    for key, check in groups.items():
        answers[key], results = results[:len(check.calls)], results[len(check.calls):]
    points, reason = 0, ""
    for number, check in enumerate(task.checks):
        problem = _problem(check, answers[id(check.calls), check.gradient])
        points += 0 if problem else check.points
        reason = reason or problem
        if problem and number == 0:
            break
    return points, reason


def _groups(task: Task) -> dict[tuple, Check]:
    """The first check of each group of checks that share their calls."""
    groups: dict[tuple, Check] = {}
    for check in task.checks:
        groups.setdefault((id(check.calls), check.gradient), check)
    return groups


def _problem(check: Check, results: list[dict]) -> str:
    """Why a check gives no points; "" if it does."""
    error = next((result["error"] for result in results if "error" in result), None)
    if error == "NotImplementedError: not answered":
        return "not answered"
    if error is not None:
        return f"{check.failure}: {one_line(error, 150)}"
    try:
        return "" if check.right([result.get("value") for result in results]) else f"wrong: {check.failure}"
    except (TypeError, ValueError, ArithmeticError, RuntimeError):  # an answer of another kind
        return f"wrong kind of result: {check.failure}"


def packed(value: object) -> object:
    """An argument of a call as JSON: tensors with shape and type; the rest is JSON already."""
    if hasattr(value, "tolist"):
        return {"tensor": [str(float(each)) for each in value.reshape(-1).tolist()], "shape": list(value.shape),
                "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, dict):
        return {name: packed(each) for name, each in value.items()}
    return [packed(each) for each in value] if isinstance(value, (list, tuple)) else value


def _loaded(name: str) -> str:
    """Code that puts the functions of probe.py into the dict `name`."""
    return f"{name} = {{}}\nexec({PROBE.read_text(encoding='utf-8')!r}, {name})"
