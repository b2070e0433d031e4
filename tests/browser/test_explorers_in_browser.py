"""The explorers as a reader meets them: in a page, by keyboard, in light and dark."""

from __future__ import annotations

import json

import pytest
from small_sweep import write_sweep
from test_cockpit import HOSTILE

pytestmark = pytest.mark.browser

FRONTIER = """
import sys
sys.path.insert(0, {tests!r})
from small_sweep import small_truth
from alignkit.exact.sweep import load_sweep
from alignkit_widgets import FrontierExplorer
asked = []
def train(parameters):
    asked.append(parameters)
    return f"training with {{parameters}}"
explorer = FrontierExplorer(load_sweep("sweep.json"), truth=small_truth(), train=train, state="beta=1.5")
explorer
"""


@pytest.fixture
def frontier(lab, request):
    """The cell that shows a FrontierExplorer."""
    write_sweep(lab.root / "sweep.json")
    return FRONTIER.format(tests=str(request.config.rootpath / "tests"))


def settled(page, state: str, which: int = 0) -> None:
    """Wait until an explorer shows the picture of a state that begins so."""
    page.locator(f".ake >> nth={which}").and_(page.locator(f".ake[data-state^='{state}']")).wait_for()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_beta_slider_moves_picture_and_numbers_by_keyboard(open_notebook, frontier, theme):
    notebook = open_notebook([frontier, "print(explorer.state)"], theme=theme, size=(1280, 1300))
    notebook.run()
    page, view = notebook.page, notebook.page.locator(".ake")
    settled(page, "beta=1.5&")
    notebook.screenshot(f"frontier_{theme}", ".ake")
    slider, says = view.locator("input[type=range][data-control=beta]"), view.locator("p.lead")
    before, numbers, svg = (
        says.inner_text(),
        view.locator("tr.hot").inner_text(),
        view.locator(".ake-plot").inner_html(),
    )
    slider.focus()
    for _ in range(12):
        page.keyboard.press("ArrowRight")  # towards cheap KL, as the point in the plane
    value = view.locator(".ake-control output").first.inner_text()
    settled(page, f"beta={value}&")
    assert float(value) < 1.5
    assert says.inner_text() != before and f"β = {float(value):g}" in says.inner_text()
    assert view.locator("tr.hot").inner_text() != numbers and view.locator(".ake-plot").inner_html() != svg
    assert slider.get_attribute("aria-valuetext") == value
    assert view.locator(".ake-copy input").first.input_value() == f"-p kl_coef={value} -p seed=0"
    view.get_by_role("button", name="train this").press("Enter")
    view.get_by_text(f"training with {{'kl_coef': {value}, 'seed': 0}}").wait_for()
    view.get_by_label("recorded runs").press("Space")
    view.get_by_text("PPO, proxy", exact=True).wait_for(state="detached")
    view.get_by_role("button", name="reset").press("Enter")
    settled(page, "beta=1.5&")
    assert notebook.errors() == []
    assert len(view.locator(".ake-plot[aria-label*='against']").all()) == 1


def test_two_explorers_share_a_notebook_and_each_keeps_its_own_state(open_notebook):
    cells = [
        "from alignkit_widgets import ClipExplorer, BetaExplorer\nClipExplorer(hide=['size', 'reset'])",
        "beta = BetaExplorer()\nbeta",
        "beta.state = 'beta=0.5&loss=ipo'",
        "beta",
    ]
    notebook = open_notebook(cells, size=(1280, 2600))
    notebook.run()
    page = notebook.page
    settled(page, "beta=0.5&loss=ipo", 1)
    settled(page, "beta=0.5&loss=ipo", 2)  # the same explorer, shown again
    clip = page.locator(".ake").first
    assert clip.locator("[data-control=size], [data-control=reset]").count() == 0
    clip.locator("[data-control=ratio]").focus()
    page.keyboard.press("Home")
    settled(page, "ratio=0.4&sign=up&size=1")
    clip.get_by_text("Inside the clip").or_(clip.get_by_text("Full gradient")).wait_for()
    page.locator(".ake >> nth=1").locator("[data-control=beta]").focus()
    page.keyboard.press("End")
    settled(page, "beta=5&loss=ipo", 1)
    settled(page, "beta=5&loss=ipo", 2)
    settled(page, "ratio=0.4")
    notebook.screenshot("two_explorers")
    assert notebook.errors() == []


def test_a_burst_of_keys_ends_at_the_newest_state_and_skips_stale_pictures(open_notebook):
    slow = """
import time
from alignkit_widgets.explorers.blocks import Text
from alignkit_widgets.explorers.explorer import Explorer, Slider
drawn = []
def draw(state):
    time.sleep(0.2)
    drawn.append(state["x"])
    return [[Text(f"x is {state['x']:g}", lead=True)]]
Explorer("Slow", [Slider("x", range(41), 0)], draw)
"""
    notebook = open_notebook([slow])
    notebook.run()
    settled(notebook.page, "x=0")
    notebook.page.locator("[data-control=x]").focus()
    for _ in range(40):
        notebook.page.keyboard.press("ArrowRight")
    notebook.page.get_by_text("x is 40", exact=True).wait_for()
    notebook.page.evaluate("""async () => {
        const panel = window.jupyterapp.shell.currentWidget, kernel = panel.context.sessionContext.session.kernel;
        await kernel.requestExecute({ code: "open('drawn', 'w').write(str(drawn))" }).done;
    }""")
    drawn = json.loads((notebook.lab.root / "drawn").read_text())
    assert drawn[-1] == 40 and len(drawn) < 30, "pictures that nobody waits for were drawn"
    assert notebook.errors() == []


def test_model_text_is_text(open_notebook):
    setup = f"""
from alignkit.evaluate.shift import Shift
from alignkit_widgets import ShiftViewer, GAEExplorer
from alignkit_widgets.explorers.blocks import Text, Tokens, Table, Bars, Copy
from alignkit_widgets.explorers.explorer import Choice, Explorer
HOSTILE = list({HOSTILE!r}.values()) + ["x" * 1_000_000]
shift = Shift(("SFT", HOSTILE[0]), tuple(HOSTILE), (tuple(HOSTILE),) * len(HOSTILE),
              [[[0.1] * len(HOSTILE)] * 2] * len(HOSTILE), [[[0.1, 0.2]] * 2] * len(HOSTILE),
              [[HOSTILE] * 2] * len(HOSTILE))
"""
    every = """
Explorer("all blocks", [Choice("c", {str(i): text for i, text in enumerate(HOSTILE)}, "0", HOSTILE[1])], lambda state: [
    [Text(text) for text in HOSTILE[:2]], [Tokens(HOSTILE[0], HOSTILE, [1.0] * len(HOSTILE))],
    [Table(HOSTILE[1], HOSTILE, [HOSTILE])],
    [Bars(HOSTILE[2], {HOSTILE[0]: 'blue'}, [(text, 0.5) for text in HOSTILE], HOSTILE[3])],
    [Copy(HOSTILE[0], HOSTILE[3])]])
"""
    notebook = open_notebook([setup + "ShiftViewer(shift)", every], size=(1280, 3200))
    notebook.run()
    page = notebook.page
    settled(page, "c=0", 1)
    settled(page, "checkpoint=1", 0)
    page.locator(".ake-table").first.get_by_text("press me").wait_for()
    assert page.locator(".ake script, .ake img, .ake a, .ake strong, .ake [data-commandlinker-command]").count() == 0
    text = page.locator(".ake").last.inner_text()
    for shown in (
        HOSTILE["script"],
        HOSTILE["image"],
        "␛[31mred␛[0m",
        "⟨U+202E⟩",
        "1,000,000 characters, the first 400 are shown",
    ):
        assert shown in text
    notebook.screenshot("hostile_explorers")
    saved = json.dumps(notebook.saved())
    kinds = {
        kind for cell in notebook.saved()["cells"] for output in cell["outputs"] for kind in output.get("data", {})
    }
    assert kinds == {"image/png", "text/plain", "application/vnd.jupyter.widget-view+json"} and len(saved) < 2_000_000
    assert page.evaluate("window.hacked") is None
    assert notebook.errors() == []
