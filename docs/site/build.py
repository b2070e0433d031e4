"""The documentation site, built offline: python docs/site/build.py (make docs)

1. Run the notebooks by papermill in docs/_build/run (your_model beside it), once: what has finished is not run again.
2. Write the explorers and a recorded PPO run as pages that work without Python.
3. Let Sphinx make docs/_build/html from the notebooks, docs/*.md and the docstrings.

`--no-execute` takes the notebooks as they are committed, without outputs, and leaves out what needs a run.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
HOW_TO = ("notebooks", "glossary", "your_model", "evaluation", "judging", "publishing", "speed", "processes", "sweeps",
          "widgets", "pages", "teaching", "troubleshooting")
OWN_CHAIN = ("your_model",)  # notebooks that train SFT, reward model, PPO and DPO by themselves
PROJECT = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
LINK = re.compile(r"(!?\[[^\]]*\]\()(?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?(\))")
EXPLORERS = {  # page -> class; what needs a run is made by `_from_run`
    "frontier": "FrontierExplorer", "clip": "ClipExplorer", "gae": "GAEExplorer", "step_through": "StepThroughExplorer",
    "dpo_beta": "BetaExplorer", "bradley_terry": "BradleyTerryExplorer", "kl_estimators": "KLEstimatorsExplorer",
}
FACES = ("alignkit", "alignkit.exact", "alignkit.evaluate", "alignkit.plots", "alignkit_widgets")


def main() -> int:
    """Build the site as the command line says."""
    parser = argparse.ArgumentParser(description="Build the documentation site.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "_build", help="folder to build in")
    parser.add_argument("--run", type=Path, help="run directory with executed notebooks (default: OUT/run)")
    parser.add_argument("--no-execute", action="store_true", help="take the notebooks as they are, without running")
    options = parser.parse_args()
    run = options.run or options.out / "run"
    if not options.no_execute:
        execute(run)
    html = build_site(options.out, run if run.is_dir() else None)
    print(f"site: {html / 'index.html'}")
    return 0


def execute(run: Path) -> None:
    """Run the course, a steered PPO run beside it, and then every other notebook, all in one run directory but those
    that make the course's stages again."""
    from steered import steered_run

    from alignkit.jobs.notebooks import course, find_notebooks, run_notebook
    from alignkit.stages import CHAIN

    course(run)
    if not list(run.glob("app/ppo-*/metrics.branch-1.jsonl")):
        steered_run(run)
    for name, path in find_notebooks().items():
        if name not in CHAIN:
            run_notebook(path, run_of(name, run), {})


def run_of(name: str, run: Path) -> Path:
    """The run directory of a notebook: RUN, or one of its own beside RUN if it trains the whole chain by itself, which
    would replace the course's policies."""
    return run.with_name(f"{run.name}_{name}") if name in OWN_CHAIN else run


def build_site(out: Path, run: Path | None, *, notebooks: Sequence[str] | None = None,
               explorers: Iterable[str] = EXPLORERS, api: Sequence[str] = FACES) -> Path:
    """Write OUT/html, the site; returns that folder.

    run: with executed notebooks; None: notebooks without outputs, no player. notebooks: names; None: all. explorers:
    pages of EXPLORERS. api: modules whose public names are described. Raises RuntimeError if Sphinx reports a warning.
    """
    from sphinx.cmd.build import build_main

    source, html = out / "source", out / "html"
    shutil.rmtree(source, ignore_errors=True)
    (source / "extra" / "live").mkdir(parents=True)
    shutil.copy(HERE / "conf.py", source)
    shutil.copytree(HERE / "static", source / "static")
    every = [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    names = every if notebooks is None else notebooks
    pages = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
    pages = [*pages, *PROJECT, *(f"notebooks/{name}.ipynb" for name in names)]
    links = Links({*pages, *(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs" / "images").iterdir())})
    for page in pages:
        (source / page).parent.mkdir(parents=True, exist_ok=True)
        if page.endswith(".ipynb"):
            _copy_notebook(page, source, run, links)
        else:
            (source / page).write_text(links.rewritten(_titled(ROOT / page), page), encoding="utf-8")
    shutil.copytree(ROOT / "docs" / "images", source / "docs" / "images")
    live = _live_pages(source, explorers) + (_from_run(source, run) if run is not None else [])
    documented = _api_pages(source / "api", api)
    _index(source, names, live, documented)
    if build_main(["-q", "-b", "html", "-W", "--keep-going", "-d", str(out / "doctrees"), str(source), str(html)]):
        raise RuntimeError("Sphinx found faults; its messages are above")
    return html


# --- pages from the repository ---------------------------------------------------------------------------------------
class Links:
    """Links between the repository's files, as links between the site's pages.

    A link to a file that is no page leads to the repository named by ALIGNKIT_REPOSITORY, such as
    https://github.com/OWNER/NAME/blob/main; without that it becomes plain text.
    """

    def __init__(self, pages: set[str]) -> None:
        self.pages, self.repository = pages, os.environ.get("ALIGNKIT_REPOSITORY", "").rstrip("/")

    def rewritten(self, text: str, page: str) -> str:
        """A page's Markdown with its links rewritten; code stays as it is. Raises ValueError on a link to nowhere."""
        parts = re.split(r"(^```.*?^```[^\n]*$|`[^`\n]+`(?!\]))", text, flags=re.M | re.S)
        return "".join(part if i % 2 else LINK.sub(lambda match: self._link(match, page), part)
                       for i, part in enumerate(parts))

    def _link(self, match: re.Match, page: str) -> str:
        target = os.path.normpath(os.path.join(os.path.dirname(page), match[2]))
        if not (ROOT / target).exists():
            raise ValueError(f"{page} links to {match[2]}, which is not there")
        if target in self.pages:
            return match[0]
        if target in ("README.md", "notebooks", "docs", "."):
            return f"{match[1]}{os.path.relpath('index.md', os.path.dirname(page) or '.')}{match[4]}"
        words = match[1].lstrip("!")[1:-2]
        return f"[{words}]({self.repository}/{target})" if self.repository else words


def _titled(page: Path) -> str:
    """The Markdown of a page; a page without a heading, such as a table that a command writes, gets its name."""
    text = page.read_text(encoding="utf-8")
    return text if re.search(r"^# ", text, re.M) else f"# {page.stem.replace('_', ' ').capitalize()}\n\n{text}"


def _copy_notebook(page: str, source: Path, run: Path | None, links: Links) -> None:
    """A notebook as a page: the executed one of the run if there is one, else the committed one; it says which."""
    executed = run_of(Path(page).stem, run) / Path(page).name if run is not None else None
    there = executed is not None and executed.exists()
    notebook = json.loads((executed if there else ROOT / page).read_text(encoding="utf-8"))
    notebook["cells"] = [cell for cell in notebook["cells"]
                         if "injected-parameters" not in cell["metadata"].get("tags", [])]
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = links.rewritten("".join(cell["source"]), page)
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    name = Path(page).stem
    says = ("Run by papermill when this site was built, with the parameters below." if there else
            "Not run when this site was built, so it has no outputs here.")
    says += f" On your machine: `alignkit run {name}`."
    note = {"cell_type": "markdown", "metadata": {}, "id": "site-note", "source": f"*{says}*"}
    notebook["cells"].insert(1, note)
    (source / page).write_text(json.dumps(notebook, ensure_ascii=False), encoding="utf-8")


# --- live pages ------------------------------------------------------------------------------------------------------
def _live_pages(source: Path, explorers: Iterable[str]) -> list[str]:
    """The explorers, each as a file and as a page that frames it; the names of those pages."""
    import alignkit_widgets

    from alignkit.exact.sweep import load_sweep

    made = []
    for name in explorers:
        make = getattr(alignkit_widgets, EXPLORERS[name])
        explorer = make(load_sweep()) if name == "frontier" else make()
        explorer.save_html(source / "extra" / "live" / f"{name}.html")
        made.append(_frame(source, name, explorer.title, make))
    return made


def _from_run(source: Path, run: Path) -> list[str]:
    """The player of the newest steered run, or of the course's PPO run; and SFT, PPO and DPO side by side."""
    from alignkit_widgets.cockpit.player import save_run

    made, live = [], source / "extra" / "live"
    steered = sorted(run.glob("app/ppo-*/metrics.branch-1.jsonl"))
    recorded = steered[-1].parent if steered else run
    if steered or (run / "ppo" / "metrics.jsonl").exists():
        save_run(recorded, live / "player.html")
        made.append(_frame(source, "player", "A recorded PPO run", None))
    if all((run / stage / "config.json").exists() for stage in ("sft", "ppo", "dpo")):
        from alignkit_widgets import ShiftViewer

        from alignkit import World, load_policy, measure_shift

        policies = [(stage.upper(), load_policy(run / stage)) for stage in ("sft", "ppo", "dpo")]
        kinds = {prompt.kind: prompt.text for prompt in World(0).heldout_prompts}
        checkpoints, tokenizer = [(name, loaded[0]) for name, loaded in policies], policies[0][1][1]
        shift = measure_shift(checkpoints, tokenizer, list(kinds.values()))
        viewer = ShiftViewer(shift)
        viewer.save_html(live / "shift.html")
        made.append(_frame(source, "shift", viewer.title, ShiftViewer))
    return made


WELCOME = """**Here without installing anything**: a recorded PPO run, to play and to scrub. It was rewound once;
the dotted lines show how it had gone on before."""
PLAYER = """PPO in the desk world, recorded as the cockpit showed it: first with `kl_coef` 0.02, then rewound to
iteration 6 and continued with `kl_coef` 0.2. The dotted lines are the abandoned branch; choose it under *branch*. Press
*Play*, or move the slider with the mouse or the arrow keys. `alignkit play RUN --out FILE.html` makes such a page from
a run of yours."""


def _frame(source: Path, name: str, title: str, kind: type | None) -> str:
    """A page of the site, try/NAME, that frames the file live/NAME.html; returns its name."""
    words = PLAYER if kind is None else inspect.getdoc(kind).partition("\n\nArgs")[0].partition("\n\nRaises")[0]
    extra = "" if kind is None else (f"\n\nIn a notebook, `from alignkit_widgets import {kind.__name__}` has all"
                                     " values, not the grid of this page alone.")
    page = f"""# {title}

{words}

<iframe class="live" data-page="../live/{name}.html" title="{title}"></iframe>

The address of this page holds the state: *copy link* gives one to pass on. The same page
<a href="../live/{name}.html">alone</a> is one file that works from a disk.{extra}
"""
    (source / "try").mkdir(exist_ok=True)
    (source / "try" / f"{name}.md").write_text(page, encoding="utf-8")
    return f"try/{name}"


# --- the API and the front page --------------------------------------------------------------------------------------
def _api_pages(folder: Path, faces: Sequence[str]) -> list[str]:
    """A page for each module that defines public names, in the order of the faces that list them."""
    homes: dict[str, list[str]] = {}
    for face in faces:
        module = importlib.import_module(face)
        for name in module.__all__:
            value = getattr(module, name)
            home = getattr(value, "__module__", None)
            if (inspect.isclass(value) or inspect.isfunction(value)) and home.startswith(face.partition(".")[0]):
                homes.setdefault(home, []).append(name)
    folder.mkdir()
    for home, names in homes.items():
        module = importlib.import_module(home)
        about = (inspect.getdoc(module) or "").partition("\n\n")[0].replace("\n", " ")
        title = f"{home}\n{'=' * len(home)}\n\n{about}\n\n.. currentmodule:: {home}\n\n"
        parts = [f".. autoclass:: {name}\n   :members:\n" if inspect.isclass(getattr(module, name))
                 else f".. autofunction:: {name}\n" for name in dict.fromkeys(names)]
        (folder / f"{home}.rst").write_text(title + "\n".join(parts), encoding="utf-8")
    return [f"api/{home}" for home in homes]


def _index(source: Path, notebooks: Sequence[str], live: Sequence[str], api: Sequence[str]) -> None:
    """The front page, with the tables of contents."""
    docs = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))
    how_to = [f"docs/{name}" for name in HOW_TO if name in docs]
    measured = [f"docs/{name}" for name in docs if f"docs/{name}" not in how_to]
    contents = {"Try it here": live, "Notebooks": [f"notebooks/{name}" for name in notebooks], "How to": how_to,
                "What was measured": measured, "API": api, "Project": [name.removesuffix(".md") for name in PROJECT]}
    trees = "\n".join(_tree(source, caption, pages) for caption, pages in contents.items() if pages)
    frame = '<iframe class="live" data-page="live/player.html" title="A recorded PPO run"></iframe>'
    shown = f"{WELCOME}\n\n{frame}" if "try/player" in live else ""
    text = (HERE / "index.md").read_text(encoding="utf-8")
    text = text.replace("{{live}}", shown).replace("{{contents}}", trees)
    (source / "index.md").write_text(text, encoding="utf-8")


def _tree(source: Path, caption: str, pages: Sequence[str]) -> str:
    """A section of the site: a page with its list of pages, which the front page names."""
    name = re.sub(r"\W+", "_", caption.lower())
    listed = "\n".join(f"/{page}" for page in pages)
    section = f"# {caption}\n\n```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n"
    (source / f"{name}.md").write_text(section, encoding="utf-8")
    return f"```{{toctree}}\n:hidden:\n\n{name}\n```\n"


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    sys.exit(main())
