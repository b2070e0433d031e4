"""The commands for teachers: `alignkit student` and `alignkit grade`."""

import argparse
from pathlib import Path

from alignkit.jobs.arguments import expanded
from alignkit.safe_text import one_line, visible


def add_teaching(add) -> None:
    """Add the commands for teachers to the command line. add(name, function, about, …) makes one."""
    student = add("student", _student, "write student versions of the notebooks, without solutions, and the graded lab",
                  epilog="example: alignkit student course --no-answers")
    student.add_argument("out", type=Path, metavar="DIR", help="the folder to write to, such as course")
    student.add_argument("--no-answers", action="store_true", help="also leave out the answers below the questions")
    student.add_argument("--overwrite", action="store_true", help="replace files that are there and differ; what a "
                         "student wrote in them is lost (default: they are kept)")

    grade = add("grade", _grade, "grade submissions of the lab, each in a kernel of its own, and write a CSV file; a "
                "kernel is no sandbox: docs/teaching.md", epilog="example: alignkit grade hand-ins/*.ipynb")
    grade.add_argument("files", nargs="+", type=Path, metavar="FILE", help="students' copies of lab.ipynb, or a "
                       "pattern such as hand-ins/*.ipynb")
    grade.add_argument("--out", type=Path, default=Path("grades.csv"), metavar="FILE",
                       help="the table to write (default: grades.csv)")
    grade.add_argument("--timeout", type=_seconds, default=30.0, metavar="SECONDS",
                       help="the limit of one task (default: 30)")
    grade.add_argument("--overwrite", action="store_true", help="replace the table if it is there")


def _student(options: argparse.Namespace) -> None:
    from alignkit.teaching.student import student_versions

    copies = student_versions(options.out, answers=not options.no_answers, overwrite=options.overwrite)
    for copy in copies:
        reason = ": it is there and differs; --overwrite replaces it" if copy.state == "kept" else ""
        print(f"{copy.state:<10}{one_line(copy.path, 1000)}{reason}")


def _grade(options: argparse.Namespace) -> int:
    from alignkit.teaching.grading import grade

    def show(each, possible: int) -> None:
        result = f"{each.total} of {possible}" if each.total is not None else "not graded"
        print(f"{one_line(each.file, 200)}: {result}" + f"; {visible(each.error, 300)}" * bool(each.error), flush=True)

    grades = grade(expanded(options.files), options.out, seconds=options.timeout, overwrite=options.overwrite,
                   on_grade=show)
    print(f"table: {one_line(options.out, 1000)}")
    return 1 if any(each.total is None for each in grades) else 0


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 1 to 3600")
    return seconds
