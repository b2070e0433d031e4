"""JupyterLab and Chromium for the browser tests: one server a session, one browser a file, one page a test."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from lab_page import Lab, NotebookPage

REPOSITORY = Path(__file__).parents[2]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]


def _missing(reason: str) -> None:
    """Skip, or fail where the browser tests are said to be required."""
    if os.environ.get("ALIGNKIT_REQUIRE_BROWSER") == "1":
        pytest.fail(f"ALIGNKIT_REQUIRE_BROWSER=1, but {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium: Debian's, or the one that ALIGNKIT_CHROMIUM names.

    It ends with its file: while Playwright's blocking interface is open, its event loop counts as running in this
    thread, and ``asyncio.run`` in any later test of the same worker is refused.
    """
    try:
        from playwright import sync_api as playwright
    except ImportError:
        _missing("playwright is not installed")
    path = os.environ.get("ALIGNKIT_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not path:
        _missing("no Chromium was found (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """A JupyterLab server in an empty folder, with settings of its own and a kernel of the running Python."""
    home = tmp_path_factory.mktemp("lab")
    root, config, data = home / "root", home / "config", home / "data"
    root.mkdir()
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    _write(data / "kernels/python3/kernel.json", {"argv": argv, "display_name": "Python 3", "language": "python"})
    quiet = {
        "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
        "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
    }
    _write(config / "labconfig/default_setting_overrides.json", quiet)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(config),
        "JUPYTER_DATA_DIR": str(data),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "IPYTHONDIR": str(home / "ipython"),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "widgets")]),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("ALIGNKIT_HEADLESS", None)
    token = "browser-tests"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
    command += ["--LabApp.expose_app_in_browser=True", "--JupyterNotebookApp.expose_app_in_browser=True"]
    with open(home / "server.log", "w") as log:
        server = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", server, home / "server.log")
        yield Lab(url=f"http://127.0.0.1:{port}", token=token, root=root)
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.fixture
def open_notebook(chromium, lab, request):
    """open_notebook(path or cells, app="lab", theme="light") -> NotebookPage; its page is closed after the test, and a
    screenshot of a failed test is kept."""
    opened: list[NotebookPage] = []

    def open_one(notebook, app: str = "lab", theme: str = "light", size=(1280, 1500)) -> NotebookPage:
        page = chromium.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=theme)
        opened.append(NotebookPage(page, lab, notebook, app=app, theme=theme, name=request.node.name))
        return opened[-1]

    yield open_one
    for notebook in opened:
        notebook.close()


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 300  # a busy machine
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            if server.poll() is not None:
                break
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")
