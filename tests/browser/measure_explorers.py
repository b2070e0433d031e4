"""How long from a key on a slider to the new picture. Not a test: `python -m benchmarks.explorers` runs it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from small_sweep import write_sweep
from test_explorers_in_browser import FRONTIER

pytestmark = pytest.mark.browser

CELLS = {
    "frontier": (None, "beta", "ArrowLeft"),
    "clip": ("from alignkit_widgets import ClipExplorer\nClipExplorer()", "ratio", "ArrowLeft"),
    "gae": ("from alignkit_widgets import GAEExplorer\nGAEExplorer()", "lambda", "ArrowLeft"),
    "dpo_beta": ("from alignkit_widgets import BetaExplorer\nBetaExplorer()", "beta", "ArrowRight"),
    "bradley_terry": (
        "from alignkit_widgets import BradleyTerryExplorer\nBradleyTerryExplorer()",
        "first",
        "ArrowLeft",
    ),
    "kl_estimators": (
        "from alignkit_widgets import KLEstimatorsExplorer\nKLEstimatorsExplorer(state='samples=1024')",
        "distance",
        "ArrowRight",
    ),
    "step_through": (
        "from alignkit_widgets import StepThroughExplorer\nStepThroughExplorer(state='stage=7&steps=8')",
        "kl_coef",
        "ArrowRight",
    ),
}
WATCH = """([which, name]) => {
    const view = document.querySelectorAll('.ake')[which], slider = view.querySelector(`[data-control=${name}]`);
    window.took = []; window.kernel = [];
    let begun = 0;
    slider.addEventListener('keydown', (event) => { begun = event.timeStamp; });
    new MutationObserver(() => requestAnimationFrame(() => {
        window.took.push(performance.now() - begun); window.kernel.push(+view.dataset.ms);
    })).observe(view, { attributes: true, attributeFilter: ['data-state'] });
    slider.focus();
}"""


def test_measure(open_notebook, lab, request):
    moves = int(os.environ.get("ALIGNKIT_MOVES", "30"))
    write_sweep(lab.root / "sweep.json")
    frontier = FRONTIER.format(tests=str(request.config.rootpath / "tests"))
    notebook = open_notebook([code or frontier for code, _, _ in CELLS.values()], size=(1280, 1600))
    notebook.run()
    found = {}
    for which, (name, (_, slider, key)) in enumerate(CELLS.items()):
        notebook.page.wait_for_function(f"document.querySelectorAll('.ake')[{which}]?.dataset.state")
        notebook.page.evaluate(WATCH, [which, slider])
        for move in range(moves):
            notebook.page.keyboard.press(key)
            notebook.page.wait_for_function(f"window.took.length > {move}")
            notebook.page.wait_for_timeout(100)
        found[name] = {
            "ms": notebook.page.evaluate("window.took"),
            "kernel_ms": notebook.page.evaluate("window.kernel"),
        }
    Path(os.environ.get("ALIGNKIT_MEASURED", "/dev/null")).write_text(json.dumps(found))
