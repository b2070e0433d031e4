"""`alignkit lab`: JupyterLab on copies of the notebooks, so that alignkit's own files stay as they are."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignkit.errors import RunError
from alignkit.jobs.notebooks import find_notebooks
from alignkit.storage import content_hash, read_json, write_atomically

MARK = "alignkit_copy"  # metadata of a copy: the hash of the notebook that it was made from


@dataclass(frozen=True)
class LabCopy:
    """A notebook in the lab's folder. state: "new" (just copied), "current" (made from today's notebook), "updated"
    (an untouched copy of an older one, replaced), "older" (a changed copy of an older one, kept) or "other" (not a copy
    made by the lab, kept)."""

    path: Path
    state: str


def lab_copies(folder: str | Path) -> list[LabCopy]:
    """Copy alignkit's notebooks to `folder`, and say what is there; returns one entry for each notebook.

    A file that somebody changed or ran is never written to. Only a copy that is still exactly as it was made is
    replaced when alignkit has a newer notebook. Raises RunError if `folder` holds alignkit's notebooks themselves or
    cannot be made.
    """
    sources, folder = find_notebooks(), Path(folder)
    if folder.resolve() in {source.parent.resolve() for source in sources.values()}:
        raise RunError(f"{folder} holds alignkit's own notebooks; name another folder for the copies")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"folder {str(folder)!r} cannot be made: {error.strerror or error}") from None
    return [_copied(source, folder / source.name) for source in sources.values()]


def lab_report(copies: Sequence[LabCopy]) -> str:
    """What `lab_copies` did, for the terminal: a summary, and a line for each copy that is not of today's notebook."""
    if not copies:
        return "alignkit's notebooks were not found"
    made = sum(copy.state in ("new", "updated") for copy in copies)
    lines = [f"your notebooks: {copies[0].path.parent} ({len(copies)} copies of alignkit's, {made} made now). "
             "What you change stays there"]
    for copy in copies:
        if copy.state == "older":
            lines.append(f"  {copy.path.name}: alignkit has a newer one. Yours is kept as it is. To get the new one, "
                         "rename yours and start the lab again")
        elif copy.state == "other":
            lines.append(f"  {copy.path.name}: kept; it is not a copy that the lab made")
    return "\n".join(lines)


def open_lab(folder: str | Path, arguments: Sequence[str] = ()) -> None:
    """Run JupyterLab on `folder` until it is stopped; `arguments` are passed on to `jupyter lab`.

    The server's root is the present directory if it contains `folder`, so that runs and reports can be opened too.
    """
    from jupyterlab.labapp import LabApp

    folder, here = Path(folder).resolve(), Path.cwd().resolve()
    root = here if folder.is_relative_to(here) else folder
    names = sorted(path.name for path in folder.glob("*.ipynb"))
    place = "/".join(["/lab/tree", *folder.relative_to(root).parts, *names[:1]])
    LabApp.launch_instance([f"--ServerApp.root_dir={root}", f"--LabApp.default_url={place}", *arguments])


def _copied(source: Path, path: Path) -> LabCopy:
    notebook = read_json(source)
    newest = content_hash(notebook)
    if os.path.lexists(path):
        before, untouched = _made_from(path)
        if before == newest:
            return LabCopy(path, "current")
        if not untouched:
            return LabCopy(path, "older" if before else "other")
    state = "updated" if os.path.lexists(path) else "new"
    notebook["metadata"][MARK] = newest
    write_atomically(path, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    return LabCopy(path, state)


def _made_from(path: Path) -> tuple[str, bool]:
    """The hash of the notebook that a copy was made from ("" for a file that is no copy), and whether the copy is
    untouched."""
    try:
        notebook = read_json(path)
        before = notebook["metadata"].pop(MARK)
    except (OSError, RunError, KeyError, TypeError, AttributeError):
        return "", False
    if not isinstance(before, str):
        return "", False
    return before, not path.is_symlink() and content_hash(notebook) == before
