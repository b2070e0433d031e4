"""The command `alignkit app`, found by entry point: a page to train, compare and explore, only on this machine."""

import argparse
from pathlib import Path

from alignkit.errors import AlignkitError
from alignkit.jobs.cli import folder, port
from alignkit.runs.lock import run_lock


def add_app(add) -> None:
    """Add `alignkit app` to the command; add(name, function, about) returns its parser."""
    app = add("app", _app, "a page to train, compare and explore without code, on this machine only",
              epilog="example: alignkit app runs/course --port 8888")
    about = "a run directory; an empty or new one gets the desk world's defaults (default: runs/app)"
    app.add_argument("run", nargs="?", default=Path("runs/app"), type=folder, metavar="RUN", help=about)
    about = "what the run was made from (default: what its run.json says, if that is `desk` or here)"
    app.add_argument("--data", metavar="DATA", help=about)
    about = "where to listen on 127.0.0.1; one in use is refused (default: a port that is free)"
    app.add_argument("--port", default=0, type=port, help=about)


def _app(options: argparse.Namespace) -> None:
    with run_lock(options.run):  # before the imports, which take seconds
        _open(options.run, options.port, options.data)


def _open(run: Path, port: int, data: str | None) -> None:
    import asyncio

    import torch
    from datasets import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    from alignkit.jobs.notebooks import absolute
    from alignkit_widgets.app.playground import open_playground

    disable_progress_bar()
    disable_progress_bars()

    try:
        from alignkit_widgets.app.server import serve
    except ModuleNotFoundError as error:
        raise AlignkitError(
            f"the dashboard needs {error.name}, which is not installed (pip install alignkit)"
        ) from error
    try:
        playground = open_playground(run, data=data and absolute("data", data))
    except ValueError as error:
        raise AlignkitError(str(error)) from error
    if playground.model == "tiny":
        torch.set_num_threads(1)  # a second thread only slows down matrices this small
    asyncio.run(serve(playground, port))
