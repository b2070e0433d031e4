"""The lab notebook as it was given out, and a student's copy of it: which code is graded."""

from dataclasses import dataclass
from pathlib import Path

from alignkit.errors import AlignkitError
from alignkit.safe_text import one_line
from alignkit.storage import parse_json

LAB = Path(__file__).with_name("lab.ipynb")
LARGEST_FILE = 32 * 2**20  # bytes of a submission, with its outputs
LONGEST_ANSWER = 20_000  # characters of an answer cell


class SubmissionError(AlignkitError, ValueError):
    """A submission, or one of its answers, cannot be graded; the message says why."""


@dataclass(frozen=True)
class Submission:
    """A student's answers: task -> the code of its cell, and task -> why there is none that can be graded."""

    answers: dict[str, str]
    problems: dict[str, str]


def set_up_code() -> str:
    """The code of the set-up cell of the lab as it was given out; a student's copy of it is not used."""
    return _sources(_cells(LAB.read_bytes(), LAB.name), "set-up")[0]


def read_submission(path: str | Path, tasks: list[str]) -> Submission:
    """The answer cells of a notebook file: code cells that carry the tag `task-NAME`. Nothing is executed.

    Raises SubmissionError if the file is no notebook that can be read, is larger than LARGEST_FILE, or has no answer
    cell at all.
    """
    path, name = Path(path), one_line(Path(path).name, 100)
    try:
        content = None
        if path.is_file():
            with path.open("rb") as file:
                content = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:
        raise SubmissionError(f"{name} cannot be read: {error}") from None
    if content is None:
        raise SubmissionError(f"{name}: there is no such file, or it is no plain file")
    if len(content) > LARGEST_FILE:
        raise SubmissionError(f"{name} has more than {LARGEST_FILE // 2**20} MiB; clear its outputs and grade it again")
    cells, answers, problems = _cells(content, name), {}, {}
    for task in tasks:
        sources = _sources(cells, f"task-{task}")
        if len(sources) != 1:
            problems[task] = (f"{len(sources)} cells carry the tag task-{task}, expected one"
                              if sources else f"no code cell carries the tag task-{task}")
        elif len(sources[0]) > LONGEST_ANSWER:
            problems[task] = f"the answer has {len(sources[0]):,} characters, {LONGEST_ANSWER:,} at most are graded"
        else:
            answers[task] = sources[0]
    if not answers and not any("expected one" in each or "at most" in each for each in problems.values()):
        raise SubmissionError(f"{name} has no answer cells: it is another notebook, or its tags were lost; "
                              "copy the answers into a fresh lab")
    return Submission(answers, problems)


def _cells(content: bytes, name: str) -> list[dict]:
    notebook = parse_json(content, where=name, error=SubmissionError)
    cells = notebook.get("cells")
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        raise SubmissionError(f"{name} is no notebook: `cells` is no list of cells (nbformat 4)")
    return cells


def _sources(cells: list[dict], tag: str) -> list[str]:
    sources = []
    for cell in cells:
        metadata, source = cell.get("metadata"), cell.get("source")
        tags = metadata.get("tags") if isinstance(metadata, dict) else None
        if cell.get("cell_type") == "code" and isinstance(tags, list) and tag in tags:
            lines = source if isinstance(source, list) else [source]
            sources.append("".join(line for line in lines if isinstance(line, str)))
    return sources
