"""The page of `alignkit app` for the folder of a sweep: the explorer of its finished jobs. It writes nothing.

The folder is read when the page opens and when the reader asks for it, without the sweep's lock, so a sweep that is
still running can be watched: alignkit replaces its tables as a whole.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from alignkit.errors import RunError
from alignkit.safe_text import visible
from alignkit.sweeps.results import TABLE, load_results
from alignkit_widgets.app.server import PageServer
from alignkit_widgets.explorers.frontier import FrontierExplorer
from alignkit_widgets.explorers.view import view_config

ABOUT = ("Each job that has finished is a point. Choose a seed and a job; copy the command that runs it, or the path "
         "of its run, which alignkit app and alignkit report open too. Nothing is trained here.")


class SweepPage(PageServer):
    """The page for the folder of a sweep."""

    tabs = ("frontier",)

    def __init__(self, folder: Path, token: str | None = None) -> None:
        super().__init__(token)
        self.folder = folder

    def status(self) -> dict:
        """As `PageServer.status`, with what a page about a sweep says."""
        return {"status": super().status()["status"] | {"run": visible(self.folder, 200), "sweep": ABOUT}}

    def do(self, message: dict) -> None:
        """Read the folder."""
        if message.get("do") == "frontier":
            self._begin("frontier", self._read())

    async def _read(self) -> None:
        if not (self.folder / TABLE).is_file():
            self.unmount("frontier")
            self.notes["frontier"] = "No job has finished yet."
            return
        try:
            results = await asyncio.to_thread(load_results, self.folder)
        except RunError:
            self.unmount("frontier")
            raise
        words = f"{len(results.finished)} of {len(results.rows)} jobs of {results.notebook} have finished"
        self.notes["frontier"] = words + (f", {len(results.failed)} failed." if results.failed else ".")
        if not results.points():
            self.unmount("frontier")
        else:
            explorer = await asyncio.to_thread(FrontierExplorer, results)
            explorer.view = self.mount("frontier", "explorer", view_config(explorer.config()), explorer.receive)
            explorer.send()
