"""A notebook in a browser, as a test sees it: open it, run it, look at it, press its keys."""

from __future__ import annotations

import json
import re
import shutil
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import nbformat

ARTIFACTS = Path(__file__).parent / "artifacts"
PATIENCE = 150_000  # ms; two cores are shared, so every wait is long and ends when its condition holds
_OWN = "/static/notebook/"  # Notebook 7.6 has errors of its own while it loads, on an empty notebook as well


@dataclass(frozen=True)
class Lab:
    """A running Jupyter server."""

    url: str
    token: str
    root: Path

    def get(self, path: str) -> object:
        """JSON of a server endpoint, such as "api/sessions"."""
        with urllib.request.urlopen(f"{self.url}/{path}?token={self.token}", timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str) -> None:
        """POST to a server endpoint, such as "api/kernels/ID/interrupt"."""
        request = urllib.request.Request(f"{self.url}/{path}?token={self.token}", data=b"", method="POST")
        urllib.request.urlopen(request, timeout=60).close()


def until(page, condition, what: str, seconds: float = PATIENCE / 1000):
    """Wait until `condition` is true, and return its value: a function of this process, or JavaScript for the page.

    Playwright's own ``wait_for_function`` evaluates a string inside the page, which the pages' policy of content
    forbids: it works there only where the condition is true at its first look.
    """
    end = time.monotonic() + seconds
    while not (value := page.evaluate(condition) if isinstance(condition, str) else condition()):
        assert time.monotonic() < end, f"waited {seconds:.0f} s in vain for {what}"
        page.wait_for_timeout(50)  # lets the page's own events through meanwhile
    return value


class NotebookPage:
    """One notebook in one page. `notebook` is a file to copy, or a list of code cells."""

    def __init__(self, page, lab: Lab, notebook: Path | list[str], *, app: str, theme: str, name: str) -> None:
        self.page, self.lab, self.app, self.theme = page, lab, app, theme
        self.name = re.sub(r"[^\w.-]+", "_", name)
        self.console: list[str] = []
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda m: self.console.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: self.console.append(e.stack or str(e)))
        self.path = lab.root / f"{self.name}.ipynb"
        if isinstance(notebook, list):
            cells = [nbformat.v4.new_code_cell(source) for source in notebook]
            kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
            nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), self.path)
        else:
            self.path = lab.root / Path(notebook).name
            shutil.copy(notebook, self.path)
        self.load()

    def load(self) -> None:
        """Load the page and wait until the kernel's session is there."""
        place = "doc/tree" if self.app == "lab" else "notebooks"
        self.page.goto(f"{self.lab.url}/{place}/{self.path.name}?token={self.lab.token}&reset", wait_until="load")
        self.page.wait_for_function("""() => {
            const context = window.jupyterapp?.shell.currentWidget?.context;
            return context?.isReady && context.sessionContext.isReady
                && context.sessionContext.session?.kernel?.connectionStatus === 'connected';
        }""")
        if self.theme == "dark":
            theme = "{theme: 'JupyterLab Dark'}"
            self.page.evaluate(f"window.jupyterapp.commands.execute('apputils:change-theme', {theme})")
            self.page.wait_for_selector("body[data-jp-theme-light=false]", state="attached")

    def start(self) -> None:
        """Run all cells, and return at once."""
        self.page.evaluate("""() => {
            window.allRan = false;
            window.jupyterapp.commands.execute('notebook:run-all-cells').finally(() => { window.allRan = true; });
        }""")

    def wait(self, seconds: float = PATIENCE / 1000) -> None:
        """Wait until all cells that were started are done."""
        done = """window.allRan && ![...document.querySelectorAll('.jp-InputPrompt')]
            .some((prompt) => prompt.textContent.includes('*'))"""
        self.page.wait_for_function(done, timeout=1000 * seconds)

    def run(self, seconds: float = PATIENCE / 1000) -> None:
        """Run all cells and wait."""
        self.start()
        self.wait(seconds)

    def errors(self) -> list[str]:
        """Tracebacks that the notebook shows, and what the browser's console says of errors."""
        shown = self.page.locator('[data-mime-type="application/vnd.jupyter.error"]').all_inner_texts()
        return shown + [e for e in self.console if _OWN not in e or "blob:" in e or "labextensions" in e]

    def saved(self) -> dict:
        """Save the notebook and return its JSON."""
        self.page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
        return json.loads(self.path.read_text(encoding="utf-8"))

    def kernel_id(self) -> str:
        """The id of the notebook's kernel."""
        sessions = self.lab.get("api/sessions")
        return next(s["kernel"]["id"] for s in sessions if s["path"].endswith(self.path.name))

    def interrupt(self) -> None:
        """What the stop button of the toolbar does."""
        self.lab.post(f"api/kernels/{self.kernel_id()}/interrupt")

    def screenshot(self, name: str = "", selector: str | None = None) -> Path:
        """Keep a picture under artifacts/."""
        ARTIFACTS.mkdir(exist_ok=True)
        path = ARTIFACTS / f"{name or self.name}.png"
        (self.page.locator(selector).first if selector else self.page).screenshot(path=path)
        return path

    def until(self, condition, what: str, seconds: float = PATIENCE / 1000):
        """Wait until `condition()` is true, a condition outside the page, and return its value."""
        return until(self.page, condition, what, seconds)

    def close(self) -> None:
        """Close the page, and shut the kernel down."""
        try:
            kernel = self.kernel_id()
            self.page.close()
            url = f"{self.lab.url}/api/kernels/{kernel}?token={self.lab.token}"
            urllib.request.urlopen(urllib.request.Request(url, method="DELETE"), timeout=60).close()
        except StopIteration:
            self.page.close()
