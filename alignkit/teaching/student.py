"""Student versions: copies of the notebooks without solutions, made from the committed ones, which stay as they are."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from alignkit.errors import RunError
from alignkit.jobs.notebooks import find_notebooks
from alignkit.storage import read_json, write_atomically
from alignkit.teaching.submission import LAB

_DETAILS = re.compile(r"[ \t]*<details\b[^>]*>\s*<summary>\s*(.*?)\s*</summary>.*?</details>[ \t]*\n?", re.DOTALL)


@dataclass(frozen=True)
class Copy:
    """A student version and what became of it: "written", "unchanged", or "kept", since another file had its name."""

    path: Path
    state: str


def student_versions(out: str | Path, *, answers: bool = True, overwrite: bool = False) -> list[Copy]:
    """Write the student versions of all notebooks and of the graded lab to the folder `out`; returns what was done.

    answers: keep the short answers below the questions of a notebook. A file that is there and differs is kept, since a
    student may have worked in it, unless `overwrite`. Raises RunError if `out` is where the notebooks themselves lie.
    """
    sources = [*find_notebooks().values(), LAB]
    out = Path(out)
    if out.resolve() in {source.parent.resolve() for source in sources}:
        raise RunError(f"{out} holds the notebooks with their solutions; name another folder")
    out.mkdir(parents=True, exist_ok=True)
    return [_write(out / source.name, student_version(source, answers=answers), overwrite) for source in sources]


def student_version(notebook: Path, *, answers: bool = True) -> str:
    """The text of a notebook file without cells tagged `solution` and without folded solutions in other cells.

    answers=False: also without the folded answers below the questions. Hints, stubs and checks stay.
    """
    content = read_json(notebook)
    content["cells"] = [
        cell if cell["cell_type"] != "markdown" else cell | {"source": _unfolded(cell["source"], answers)}
        for cell in content["cells"] if "solution" not in cell["metadata"].get("tags", [])
    ]
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _unfolded(source: str | list[str], answers: bool) -> str | list[str]:
    """A markdown cell's source without the <details> blocks that a student version lacks."""
    text = "".join(source)

    def kept(block: re.Match) -> str:
        title = block[1].lower()
        hidden = "solution" in title or ("answer" in title and not answers)
        return "" if hidden else block[0]

    shorter = _DETAILS.sub(kept, text)
    return source if shorter == text else shorter.rstrip().splitlines(keepends=True)


def _write(path: Path, text: str, overwrite: bool) -> Copy:
    if path.exists() or path.is_symlink():
        if path.is_file() and path.read_bytes() == text.encode():
            return Copy(path, "unchanged")
        if not overwrite:
            return Copy(path, "kept")
    write_atomically(path, text)
    return Copy(path, "written")
