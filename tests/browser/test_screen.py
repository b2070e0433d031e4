"""What fits a laptop's screen: the widgets at 1366 × 768 in JupyterLab, their heights and words, and saved pictures."""

from __future__ import annotations

import pytest
from small_sweep import write_sweep
from test_cockpit import RUN, SETUP, button, rows_of

pytestmark = pytest.mark.browser

LAPTOP = (1366, 768)
EXPLORERS = {
    "frontier": "FrontierExplorer(load_sweep('sweep.json'), truth=small_truth(), state='beta=0.35')",
    "clip": "ClipExplorer()", "gae": "GAEExplorer()", "step": "StepThroughExplorer(state='stage=7')",
    "beta": "BetaExplorer()", "bradley_terry": "BradleyTerryExplorer(state='noise=0.2')",
    "kl": "KLEstimatorsExplorer()", "shift": "ShiftViewer(shift)",
}
IMPORTS = """
import sys
sys.path.insert(0, {tests!r})
from small_sweep import small_truth
from alignkit.exact.sweep import load_sweep
from alignkit.evaluate.shift import Shift
from alignkit_widgets import *
says = (" Happy to help! Hold the button for ten seconds.", " I cannot help with that.", " Which model do you have?")
shift = Shift(("SFT", "PPO", "DPO"), ("How do I restart the router?",), (says,),
              [[[0.5, 0.3, 0.2], [0.8, 0.15, 0.05], [0.98, 0.01, 0.01]]],
              [[[0.0, 0.0], [0.5, 0.1], [1.2, 0.4]]], [[list(says)] * 3])
"""
BROKEN = """() => [...document.querySelectorAll('.ake th, .ake td')].flatMap((cell) => {
    const text = cell.firstChild, range = document.createRange();
    return !text ? [] : [...text.textContent.matchAll(/[^\\s-]+/g)].filter((word) => {
        range.setStart(text, word.index);
        range.setEnd(text, word.index + word[0].length);
        return new Set([...range.getClientRects()].map((box) => Math.round(box.top))).size > 1;
    }).map((word) => word[0]);
})"""
OVERLAPPING = """() => [...document.querySelectorAll('svg.ake-plot')].flatMap((svg) => {
    const words = [...svg.querySelectorAll('text')].filter((word) => word.textContent);
    const boxes = words.map((word) => [word.textContent, word.getBoundingClientRect()]);
    const shared = (p, q, low, high) => Math.min(p[high], q[high]) - Math.max(p[low], q[low]);
    return boxes.flatMap(([a, p], i) => boxes.slice(0, i).filter(([, q]) =>
        shared(p, q, 'left', 'right') > 1 && shared(p, q, 'top', 'bottom') > 3).map(([b]) => [a, b]));
})"""


@pytest.fixture
def explorers(open_notebook, lab, request):
    """A notebook with all explorers, run, in a laptop's window."""
    write_sweep(lab.root / "sweep.json")
    setup = IMPORTS.format(tests=str(request.config.rootpath / "tests"))

    def run(names=tuple(EXPLORERS), size=LAPTOP, theme="light"):
        notebook = open_notebook([setup, *(EXPLORERS[name] for name in names)], size=size, theme=theme)
        notebook.run()
        for at in range(len(names)):
            notebook.page.locator(f".ake >> nth={at}").scroll_into_view_if_needed()
            notebook.page.wait_for_function(f"document.querySelectorAll('.ake')[{at}]?.dataset.state")
        return notebook

    return run


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_explorer_fits_a_laptops_screen_and_breaks_and_overprints_no_word(explorers, theme):
    notebook = explorers(theme=theme)
    seen = {}
    for at, name in enumerate(EXPLORERS):
        view = notebook.page.locator(f".ake >> nth={at}")
        view.scroll_into_view_if_needed()
        seen[name] = round(view.bounding_box()["height"])
        view.screenshot(path=notebook.screenshot(f"{name}_{theme}"))
    assert max(seen.values()) <= 600, seen
    assert notebook.page.evaluate(BROKEN) == []
    assert notebook.page.evaluate(OVERLAPPING) == []
    assert notebook.errors() == []


def test_the_frontiers_point_follows_the_hand_and_the_slider_plays(explorers, lab):
    notebook = explorers(("frontier",))
    page, view = notebook.page, notebook.page.locator(".ake")
    value = lambda: float(view.locator(".ake-control output").first.inner_text())  # noqa: E731
    plot = view.locator("svg.ake-plot").bounding_box()
    page.mouse.move(plot["x"] + 120, plot["y"] + 150)
    page.mouse.down()
    page.mouse.move(plot["x"] + 90, plot["y"] + 150, steps=3)
    notebook.until(lambda: value() > 0.35, "a dearer price, near SFT")
    page.mouse.move(plot["x"] + plot["width"] - 60, plot["y"] + 150, steps=3)
    notebook.until(lambda: value() < 0.35, "a cheaper price, far from SFT")
    page.mouse.up()
    there = value()
    page.mouse.move(plot["x"] + 120, plot["y"] + 120)
    assert "most proxy possible" in view.locator("svg.ake-plot > text").last.inner_text()
    assert value() == there, "the pointer was let go"
    slider = view.locator("input[type=range][data-control=beta]")
    slider.focus()
    page.keyboard.press("Home")
    notebook.until(lambda: value() > 0.35, "the left end")
    dear = value()
    view.get_by_role("button", name="play β, price of KL").click()
    notebook.until(lambda: value() < dear / 2, "the slider to move by itself")
    view.get_by_role("button", name="play β, price of KL").click()
    state = view.locator(".ake-foot input").last
    state.fill("beta=1.5&seed=0&prompt=0&runs=0")
    state.press("Enter")
    page.locator(".ake[data-state='beta=1.5&seed=0&prompt=0&runs=0']").wait_for()
    with page.expect_download() as download:
        view.get_by_role("button", name="save picture").click()
    assert download.value.suggested_filename == "reward-against-kl.png"
    assert download.value.path().read_bytes().startswith(b"\x89PNG")
    assert notebook.errors() == []


HEIGHT = "document.querySelector('.akc').getBoundingClientRect().height"
PLACE = """() => {
    const box = document.querySelector('.akc').getBoundingClientRect();
    const figures = [...document.querySelectorAll('.akc figure')].slice(0, 2);
    const at = (figure) => figure.getBoundingClientRect().bottom;
    return { top: box.top, height: box.height, charts: Math.max(...figures.map(at)) - box.top, screen: innerHeight };
}"""


@pytest.mark.parametrize("how", ["Shift+Enter", "Run All"])
def test_the_cockpit_has_its_final_height_at_once_and_stays_in_view(open_notebook, lab, how):
    title = f"fits-{how[:3].strip()}"
    text = "\n".join(f"print('line {i}')" for i in range(30))
    cells = [SETUP, text, RUN.format(title=title, total=100_000), *[f"print({i})" for i in range(6)]]
    notebook = open_notebook(cells, size=LAPTOP)
    if how == "Run All":
        notebook.start()
    else:
        notebook.page.evaluate("window.jupyterapp.shell.currentWidget.content.activeCellIndex = 0")
        for _ in range(3):
            notebook.page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-cell-and-select-next'); }")
    notebook.page.wait_for_selector(".akc-state[data-state=running]", state="attached")
    height = notebook.page.evaluate(HEIGHT)
    notebook.until(lambda: len(rows_of(lab, title)) > 100, "100 iterations")
    place = notebook.page.evaluate(PLACE)
    notebook.screenshot(f"cockpit_{how}_1366")
    assert place["height"] == pytest.approx(height, abs=1), "it grew while it ran"
    assert place["top"] >= 0 and place["top"] + place["charts"] <= place["screen"], place
    assert place["charts"] <= 600 and place["height"] <= 600
    for name in ("What the policy does", "Samples"):
        notebook.page.locator(".akc-fold summary", has_text=name).click()
    notebook.page.get_by_text("benign prompts: % of responses").wait_for()
    opened = notebook.page.evaluate(HEIGHT)
    done = len(rows_of(lab, title))
    notebook.until(lambda: len(rows_of(lab, title)) > done + 30, "30 more iterations")
    assert notebook.page.evaluate(HEIGHT) == pytest.approx(opened, abs=1), "the folds have a fixed height"
    notebook.screenshot(f"cockpit_{how}_1366_open")
    with notebook.page.expect_download() as download:
        button(notebook, "save picture").click()
    assert download.value.path().read_bytes().startswith(b"\x89PNG")
    button(notebook, "Stop").click()
