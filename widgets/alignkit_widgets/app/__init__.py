"""The command `alignkit app`, found by entry point: a page to train, compare and explore, only on this machine."""

import argparse
from pathlib import Path

from alignkit.errors import AlignkitError
from alignkit.jobs.cli import answer, folder, port
from alignkit.runs.lock import run_lock
from alignkit.safe_text import visible

DEFAULT = Path("runs/app")


def add_app(add) -> None:
    """Add `alignkit app` to the command; add(name, function, about) returns its parser."""
    app = add("app", _app, "a page to train, compare and explore without code, on this machine only",
              epilog="examples: alignkit app runs/course --port 8888     alignkit app runs/kl")
    about = ("a run directory; if it has no run, the app asks and makes a desk world; or the folder of a sweep, whose "
             f"jobs it shows (default: {DEFAULT})")
    app.add_argument("run", nargs="?", default=DEFAULT, type=folder, metavar="RUN", help=about)
    app.add_argument("--new", action="store_true", help="make a new desk world in RUN without the question")
    about = ("the data that the run was made from: `desk`, a file, a folder or a Hub id (default: what its run.json "
             "names; a Hub id in it is not fetched unasked)")
    app.add_argument("--data", metavar="DATA", help=about)
    about = "where to listen on 127.0.0.1; one in use is refused (default: a port that is free)"
    app.add_argument("--port", default=0, type=port, help=about)


def _app(options: argparse.Namespace) -> None:
    from alignkit.sweeps.results import is_sweep

    if is_sweep(options.run):
        if options.new or options.data:
            raise AlignkitError(f"{options.run} is the folder of a sweep, in which the app makes and trains nothing: "
                                "leave out --new and --data")
        _open_sweep(options.run, options.port)  # without its lock: it may still be running
        return
    if not (options.new or options.data or options.run == DEFAULT or _has_run(options.run)):
        _agree(options.run)
    with run_lock(options.run):  # before the imports, which take seconds
        _open(options.run, options.port, options.data)


def _agree(run: Path) -> None:
    """Ask whether a new world is meant. Raises AlignkitError if not, before anything is made."""
    what = "has no run in it" if run.exists() else "is not there"
    others = sorted(each.name for each in run.parent.glob("*") if _has_run(each)) if run.parent.is_dir() else []
    near = f" Runs in {run.parent}: {', '.join(visible(name, 40) for name in others[:8])}." if others else ""
    print(f"{visible(run, 200)} {what}.{near}")
    if not answer("Make a new desk world there, which takes about a minute? [y/N] "):
        raise AlignkitError(f"{run} {what}, and nothing was made; `alignkit app RUN --new` makes a new desk world")


def _has_run(run: Path) -> bool:
    """Whether a folder holds a run, or the beginning of one."""
    return any((run / name).exists() for name in ("run.json", "sft", "reward"))


def _open(run: Path, port: int, data: str | None) -> None:
    import asyncio

    import torch
    from datasets import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    from alignkit.jobs.notebooks import absolute
    from alignkit_widgets.app.playground import open_playground

    disable_progress_bar()
    disable_progress_bars()

    server = _server()
    try:
        playground = open_playground(run, data=data and absolute("data", data))
    except ValueError as error:
        raise AlignkitError(str(error)) from error
    if playground.model == "tiny":
        torch.set_num_threads(1)  # a second thread only slows down matrices this small
    asyncio.run(server.serve(server.Dashboard(playground), port))


def _open_sweep(folder: Path, port: int) -> None:
    import asyncio

    server = _server()
    from alignkit_widgets.app.sweep_page import SweepPage

    asyncio.run(server.serve(SweepPage(folder), port))


def _server():
    """The module that serves pages. Raises AlignkitError if what it needs is not installed."""
    try:
        from alignkit_widgets.app import server
    except ModuleNotFoundError as error:
        raise AlignkitError(
            f"the dashboard needs {error.name}, which is not installed (pip install alignkit)"
        ) from error
    return server
