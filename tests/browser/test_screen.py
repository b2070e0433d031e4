"""What fits a laptop's screen, 1366 × 768, and who can read it: heights, words and axe's rules, on pages without a
server."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import sys
import threading
from pathlib import Path

import alignkit_widgets
import pytest
from access import serious_faults
from alignkit_widgets import ClipExplorer, FrontierExplorer, ShiftViewer
from alignkit_widgets.cockpit.player import save_run
from alignkit_widgets.explorers.own_plane import OwnPlane
from lab_page import ARTIFACTS, PATIENCE, until
from small_pages import record_run
from small_sweep import small_sweep, small_truth

from alignkit.evaluate.shift import Shift
from alignkit.formulas.intervals import Estimate
from alignkit.jobs.report import build_report
from alignkit.pages.render import render
from alignkit.runs.records import start_run, write_results
from alignkit.sweeps.page import build_page
from alignkit.sweeps.results import Point

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[2]
NAMES = {"clip": "ClipExplorer", "gae": "GAEExplorer", "step": "StepThroughExplorer", "beta": "BetaExplorer",
         "bradley_terry": "BradleyTerryExplorer", "kl": "KLEstimatorsExplorer"}
EXPLORERS = [*NAMES, "frontier", "shift", "own"]
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
CHARTS = """() => { // from the top of the cockpit to the lower end of reward and KL
    const box = document.querySelector('.akc').getBoundingClientRect();
    const ends = [...document.querySelectorAll('.akc figure')].slice(0, 2).map((each) => each.getBoundingClientRect());
    return { whole: box.height, charts: Math.max(...ends.map((end) => end.bottom)) - box.top };
}"""


def small_explorer(name: str):
    """An explorer with little to compute."""
    if name == "frontier":
        return FrontierExplorer(small_sweep(), truth=small_truth(), state="beta=0.35")
    if name == "shift":
        says = (" Happy to help! Hold the button for ten seconds.", " I cannot help with that.", " Which model is it?")
        return ShiftViewer(Shift(("SFT", "PPO", "DPO"), ("How do I restart the router?",), (says,),
                                 [[[0.5, 0.3, 0.2], [0.8, 0.15, 0.05], [0.98, 0.01, 0.01]]],
                                 [[[0.0, 0.0], [0.5, 0.1], [1.2, 0.4]]], [[list(says)] * 3]))
    if name == "own":
        return OwnPlane([Point(job, method, (), 0, Estimate(kl, kl - 0.1, kl + 0.1), Estimate(kl, kl - 0.3, kl + 0.3),
                               None) for job, method, kl in (("sft", "sft", 0.0), ("app/ppo-1", "ppo", 1.0))])
    return getattr(alignkit_widgets, NAMES[name])()


@pytest.fixture
def open_page(chromium):
    """open_page(file or address, theme, width) -> a page; fails on errors in its console."""
    opened, wrong = [], []

    def open_one(file: Path | str, theme: str = "light", width: int = 1366):
        page = chromium.new_page(viewport={"width": width, "height": 768}, color_scheme=theme)
        opened.append(page)
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: wrong.append(e.stack or str(e)))
        page.goto(file if isinstance(file, str) else file.as_uri())
        return page

    yield open_one
    for page in opened:
        page.close()
    assert wrong == []


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files, and says nothing about it."""

    def log_message(self, *_) -> None:
        """Nothing."""


def keep(page, name: str) -> None:
    """Keep a screenshot."""
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / f"screen_{name}.png", full_page=True)


@pytest.mark.parametrize("name", EXPLORERS)
def test_an_explorer_fits_the_screen_and_breaks_and_overprints_no_word_and_all_can_read_it(open_page, tmp_path, name):
    explorer = small_explorer(name)
    file = explorer.save_html(tmp_path / f"{name}.html", grid=dict.fromkeys(explorer.controls, 1))
    page = open_page(file)
    page.locator(".ake svg.ake-plot, .ake table, .ake .ake-bars").first.wait_for()
    assert page.locator(".ake").bounding_box()["height"] <= 600
    assert page.evaluate(BROKEN) == [] and page.evaluate(OVERLAPPING) == []
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        keep(page, f"{name}_{theme}")
        assert serious_faults(page) == [], theme
    page.set_viewport_size({"width": 390, "height": 768})
    until(page, "document.documentElement.scrollWidth <= 390", "a page as wide as the screen")
    assert serious_faults(page) == [], "a table that is scrolled there is scrolled by keys too"


def test_a_recorded_runs_controls_reward_and_kl_fit_the_screen_and_all_can_read_it(open_page, tmp_path):
    page = open_page(save_run(record_run(tmp_path), tmp_path / "play.html"))
    page.locator(".akc-plot .series").first.wait_for(state="attached")
    seen = page.evaluate(CHARTS)
    assert seen["whole"] <= 600 and seen["charts"] <= 600, seen
    for fold in page.locator(".akc-fold summary").all():
        fold.click()
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        assert serious_faults(page) == [], theme


def report_page(folder: Path) -> Path:
    """The report of a run with four stages."""
    run = start_run(folder / "run", "tiny", "desk", 0)
    shares = {kind: {"answer": 0.75, "refuse": 0.25} for kind in ("benign", "risky")}
    for stage, gold in (("sft", 0.0), ("ppo", 0.6), ("dpo", 0.7)):
        write_results(run, stage, {"gold_mean": gold, "gold_ci95": [gold - 0.1, gold + 0.1], "risky_failure_rate": 0.3,
                                   "kl_to_sft": 1.5, "behaviour_shares": shares, "config": {"kl_coef": 0.05}})
        rows = [{"prompt": "How?", "stage": stage, "response": "So.", "kind": "benign"}]
        (run / stage / "samples.json").write_text(json.dumps(rows))
    write_results(run, "reward", {"accuracy_labels": 0.5, "accuracy_labels_ci95": [0.4, 0.6], "bayes_accuracy": 0.74})
    return build_report(run)


def compare_page(folder: Path) -> Path:
    """A comparison of two checkpoints."""
    page = render("compare.html", names=["sft", "ppo"], cells=[["gold reward", "0.0 [0.0, 0.1]", "0.6 [0.5, 0.7]"]],
                  remarks=["ppo is better"], pictures=[], samples=[
                      {"prompt": "How?", "kind": "benign", "responses": [["So."], ["Thus."]]}],
                  warning="The reward model ranks like a coin.")
    (folder / "compare.html").write_text(page, encoding="utf-8")
    return folder / "compare.html"


def sweep_page(folder: Path) -> Path:
    """The page of a sweep of four jobs, one of which failed."""
    rows = [{"job": f"j{i}", "kl_coef": i / 4, "seed": i % 2, "status": "finished" if i else "failed", "host": "",
             "seconds": 1.0, "attempts": 1, "error": None if i else "It broke.", "ppo.kl_to_sft": 1.0 + i,
             "ppo.proxy_mean": 0.1 * i} for i in range(4)]
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return build_page(folder)


@pytest.mark.parametrize("make", [report_page, compare_page, sweep_page])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_page_of_results_has_no_serious_fault(open_page, tmp_path, make, theme):
    page = open_page(make(tmp_path), theme)
    for fold in page.locator("details:not([open]) > summary").all():
        if fold.is_visible():
            fold.click()
    keep(page, f"{make.__name__}_{theme}")
    assert serious_faults(page) == []


def test_the_sites_pages_have_no_serious_fault_and_fit_a_telephone(open_page, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("site_build", ROOT / "docs" / "site" / "build.py")
    build = sys.modules["site_build"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    monkeypatch.setattr(ClipExplorer, "page_grid", {"ratio": 3, "size": 1, "clip": 1})
    html = build.build_site(tmp_path, None, notebooks=["03a_ppo_by_hand"], explorers=["clip"], api=["alignkit_widgets"])
    handler = functools.partial(Quiet, directory=html)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        faults = {}
        for name in ("index", "notebooks/03a_ppo_by_hand", "docs/teaching", "docs/claims", "try/clip", "api", "search"):
            for theme in ("light", "dark"):
                page = open_page(f"http://127.0.0.1:{server.server_port}/{name}.html", theme)
                keep(page, f"site_{name.replace('/', '_')}_{theme}")
                faults[name, theme] = serious_faults(page)
                page.set_viewport_size({"width": 390, "height": 768})
                if (width := page.evaluate("() => document.documentElement.scrollWidth")) > 390:
                    faults[name, theme].append(f"the page is {width} px wide on a telephone")
                page.close()
        server.shutdown()
    assert {place: found for place, found in faults.items() if found} == {}
