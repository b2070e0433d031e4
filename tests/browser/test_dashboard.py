"""The dashboard as a user meets it: no code, one page, by mouse and keyboard."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from access import serious_faults
from alignkit_widgets.app.playground import make_desk_start
from lab_page import ARTIFACTS, PATIENCE, until

from alignkit.configs import RewardConfig, SFTConfig
from alignkit.evaluate.evaluation import evaluation_set
from alignkit.jobs import cli
from alignkit.runs.records import start_run
from alignkit.storage import read_metrics
from alignkit.task import desk_task

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def serving(folder: Path, program: tuple[str, ...] = ("-m", "alignkit", "app")):
    """`alignkit app` on a folder, or another program that serves a page, in a process of its own: its URL."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'widgets'}", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, *program, str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as server:
        said = []
        while not said or "http://127.0.0.1" not in said[-1]:
            said.append(server.stdout.readline())
            assert said[-1], "".join(said)
        yield said[-1].strip()
        server.terminate()
        rest = server.stdout.read()
    assert server.returncode == 0 and "Traceback" not in rest, rest


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """`alignkit app` on a run with a hastily trained start: (its URL, the run directory)."""
    run = start_run(tmp_path_factory.mktemp("app") / "run", "tiny", "desk", 0)
    make_desk_start(run, pairs=256, sft=SFTConfig(epochs=1), reward=RewardConfig(epochs=2))
    with serving(run) as url:
        yield url, run


@pytest.fixture
def open_page(chromium):
    """open_page(url, theme) -> a page that may speak to nobody else; fails on errors in its console."""
    contexts, wrong = [], []

    def open_one(url: str, theme: str = "light"):
        contexts.append(chromium.new_context(viewport={"width": 1240, "height": 1000}, color_scheme=theme))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: wrong.append(e.stack or str(e)))
        here = url.split("/?")[0]
        page.on("request", lambda r: None if r.url.startswith((here, "data:")) else wrong.append(f"asked for {r.url}"))
        page.goto(url)
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def open_app(app, open_page):
    """open_app(theme) -> a page of the dashboard."""
    def open_one(theme: str = "light"):
        page = open_page(app[0], theme)
        page.get_by_role("tab", name="Train").wait_for()
        return page

    return open_one


def picture(page, name: str) -> None:
    """Keep a screenshot."""
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / f"dashboard_{name}.png")


def rows_of(run: Path, number: int) -> list[dict]:
    """The log of a run that was started in the dashboard."""
    return read_metrics(run / "app" / f"ppo-{number}" / "metrics.jsonl")


def test_ppo_is_trained_paused_steered_and_stopped_and_a_reload_finds_it_again(open_app, app):
    page, run = open_app(), app[1]
    page.get_by_label("Iterations", exact=True).fill("400")
    page.get_by_role("button", name="Start a run").press("Enter")
    until(page, lambda: len(rows_of(run, 1)) >= 3, "three iterations")
    page.get_by_role("button", name="Pause").click()
    page.wait_for_selector(".akc-state[data-state=paused]")
    paused = len(rows_of(run, 1))
    slider = page.locator("input[type=range][data-control=kl_coef]")
    slider.focus()
    for _ in range(3):
        page.keyboard.press("PageUp")
    asked = float(page.locator("input[type=number][data-control=kl_coef]").input_value())
    page.get_by_text("from the next iteration on").wait_for()
    page.get_by_role("button", name="Step").click()
    until(page, lambda: len(rows_of(run, 1)) == paused + 1, "one step")
    page.wait_for_selector(".akc-state[data-state=paused]")
    assert rows_of(run, 1)[-1]["controls"]["kl_coef"] == asked > 0.2
    page.locator(".akc-plot .marktext", has_text="kl_coef 0.2 →").first.wait_for()

    page.reload()
    page.locator(".akc-state[data-state=paused]").wait_for()
    page.locator(".akc-plot .marktext", has_text="kl_coef 0.2 →").first.wait_for()
    assert page.locator("button", has_text="Start a run").is_disabled()  # in a fold while a run is in progress
    page.locator(".akc").get_by_role("button", name="Play").click()
    until(page, lambda: len(rows_of(run, 1)) > paused + 2, "the run to go on")
    picture(page, "train_light")
    page.locator(".akc").get_by_role("button", name="Stop").click()
    page.get_by_text("it can be compared now").wait_for()
    assert (run / "app" / "ppo-1" / "model.safetensors").exists()
    assert page.get_by_role("button", name="Start a run").is_enabled()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_checkpoints_are_compared_by_keyboard(open_app, app, theme):
    page, run = open_app(theme), app[1]
    page.get_by_role("tab", name="Train").focus()
    page.keyboard.press("ArrowRight")
    page.get_by_role("tab", name="Compare", selected=True).wait_for()
    until(page, lambda: page.locator("#panel-compare input:checked").count() == 2, "two checkpoints that are ticked")
    page.get_by_role("button", name="Compare").press("Enter")
    page.get_by_role("button", name="Show names").wait_for()  # a new board: names are hidden again
    log = run / "app" / "votes-sft-app.ppo-1.log.jsonl"
    before = len(read_metrics(log))
    page.locator(".akb").focus()
    page.keyboard.press("ArrowLeft")
    until(page, lambda: len(read_metrics(log)) == before + 1, "the vote")
    assert "app/ppo-1" not in page.locator(".akb-cards").inner_text()
    picture(page, f"compare_{theme}")
    page.keyboard.press("v")
    page.locator(".akb-results", has_text="app/ppo-1").wait_for()
    picture(page, f"named_{theme}")
    assert json.loads(log.read_text().splitlines()[-1])["blind"] is True


def test_the_frontier_answers_the_keyboard_and_trains_at_its_price(open_app, app):
    page, run = open_app("dark"), app[1]
    page.get_by_role("tab", name="Frontier").click()
    page.locator(".ake-plot").first.wait_for()
    said = page.locator(".ake p").first.inner_text()
    page.locator(".ake input[type=range]").first.focus()
    for _ in range(8):
        page.keyboard.press("ArrowRight")
    until(page, lambda: page.locator(".ake p").first.inner_text() != said, "another sentence")
    picture(page, "frontier_dark")
    page.get_by_role("button", name="Recorded runs").click()
    page.locator(".ake-legend", has_text="DPO").first.wait_for()
    picture(page, "recorded_dark")
    page.get_by_role("button", name="This run").click()
    page.get_by_role("button", name="train this").click()
    page.get_by_role("tab", name="Train · running").click()
    until(page, lambda: (run / "app" / "ppo-2").exists() and len(rows_of(run, 2)) >= 1, "an iteration")
    picture(page, "train_dark")
    page.locator(".akc").get_by_role("button", name="Stop").click()
    page.get_by_text("it can be compared now").wait_for()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_opens_on_what_there_is_to_do_and_all_can_read_it(open_app, theme):
    page = open_app(theme)
    for name in ("Start", "Continue", "Compare", "Explore", "Earlier runs"):
        page.get_by_role("heading", name=name, exact=True).wait_for()
    about = page.locator("#panel-train > form p").inner_text()
    assert about.startswith("The desk world") and about.count(". ") == 1
    page.get_by_role("button", name="Use the settings of ppo-1").click()
    assert page.get_by_label("Iterations", exact=True).input_value() == "400"
    page.get_by_label("Seed", exact=True).fill("3")
    page.get_by_label("Seed", exact=True).press("Tab")
    picture(page, f"home_{theme}")
    assert serious_faults(page) == []
    page.get_by_role("tab", name="Compare").click()
    page.reload()
    page.get_by_role("tab", name="Compare", selected=True).wait_for()
    assert serious_faults(page) == []
    page.get_by_role("tab", name="Train").click()
    assert page.get_by_label("Seed", exact=True).input_value() == "3", "the settings are kept over a reload"


def test_a_stopped_run_with_its_own_settings_is_continued_in_a_cockpit_that_fits_the_screen(open_app, app):
    page, run = open_app(), app[1]
    page.set_viewport_size({"width": 1366, "height": 768})
    number = 1 + len(list((run / "app").glob("ppo-*")))
    page.locator(".card").get_by_label("kl_coef").fill("0.35")  # the cockpit of an ended run has one too
    page.get_by_label("Seed", exact=True).fill("5")
    page.get_by_label("Iterations", exact=True).fill("300")
    page.get_by_role("button", name="Start a run").click()
    until(page, lambda: (run / "app" / f"ppo-{number}").exists() and len(rows_of(run, number)) >= 2, "two iterations")
    page.locator(".akc-plot .series").first.wait_for(state="attached")
    config = json.loads((run / "app" / f"ppo-{number}" / "config-of-run.json").read_text())
    assert (config["kl_coef"], config["seed"], config["iterations"]) == (0.35, 5, 300)
    box = page.locator(".akc").bounding_box()
    assert box["height"] <= 600 and box["y"] >= 0 and box["y"] + box["height"] <= 768, box
    page.get_by_role("button", name="Pause").click()
    page.wait_for_selector(".akc-state[data-state=paused]")
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        assert serious_faults(page) == [], theme
    page.locator(".akc").get_by_role("button", name="Stop").click()
    page.get_by_text("it can be compared now").wait_for()
    done = len(rows_of(run, number))
    page.get_by_label("Unfinished").select_option(f"ppo-{number}")
    page.get_by_role("button", name="Continue it").click()
    until(page, lambda: len(rows_of(run, number)) > done, "the run to go on")
    page.locator(".akc").get_by_role("button", name="Stop").click()
    page.get_by_text("it can be compared now").wait_for()
    assert [row["step"] for row in rows_of(run, number)] == list(range(1, len(rows_of(run, number)) + 1))


def test_the_runs_own_policies_stand_on_the_frontier_which_keeps_its_place(open_app):
    page = open_app()
    page.get_by_role("button", name="Explore the frontier").click()
    page.get_by_role("cell", name="app/ppo-1").wait_for()
    page.locator(".ake-legend", has_text="PPO, gold").first.wait_for()
    said = page.locator(".ake p").first.inner_text()
    page.locator(".ake input[type=range]").first.focus()
    page.keyboard.press("Home")
    until(page, lambda: page.locator(".ake p").first.inner_text() != said, "another sentence")
    moved = page.locator(".ake p").first.inner_text()
    page.reload()
    page.get_by_role("tab", name="Frontier", selected=True).wait_for()
    page.locator(".ake p").first.wait_for()
    until(page, lambda: page.locator(".ake p").first.inner_text() == moved, "the place before the reload")
    assert serious_faults(page) == []


def test_who_has_no_token_sees_nothing(app, chromium):
    page = chromium.new_page()
    answer = page.goto(app[0].split("?")[0])
    assert answer.status == 403 and "token" in page.inner_text("body") and "alignkit app" in page.inner_text("body")
    page.close()


@pytest.fixture(scope="module")
def sweep_app(app, tmp_path_factory):
    """`alignkit app` on the folder of a sweep of two jobs, one of which has finished: (its URL, the folder)."""
    folder, evalset = tmp_path_factory.mktemp("sweep"), evaluation_set(desk_task(0), prompts=4, samples=2)
    rows = [{"job": f"j{coef}", "kl_coef": coef, "seed": 0, "status": "finished", "host": "", "seconds": 1.0,
             "attempts": 1, "error": None, "ppo.kl_to_sft": 0.3 / coef, "ppo.kl_to_sft_ci95.0": 0.2 / coef,
             "ppo.kl_to_sft_ci95.1": 0.4 / coef, "ppo.proxy_mean": 0.4, "ppo.gold_mean": 0.2} for coef in (0.1, 0.4)]
    for row in rows:
        run = folder / "jobs" / row["job"]
        for name in ("sft", "reward"):
            shutil.copytree(app[1] / name, run / name)
        shutil.copy(app[1] / "run.json", run)
        evalset.save(run / "evaluation_set.json")
        (run / "sft" / "results.json").write_text('{"gold_scale": [0.0, 1.0]}')
    (folder / "sweep.json").write_text('{"notebook": "03b_ppo", "grids": [], "jobs": {}}')
    write_rows(folder, rows)
    assert cli.main(["report", str(folder)]) == 0  # enumerates
    write_rows(folder, [rows[0], {**rows[1], "status": "not run"}])
    with serving(folder) as url:
        yield url, folder, rows


def write_rows(folder: Path, rows: list[dict]) -> None:
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_sweep_opens_as_one_tab_with_its_frontier_and_the_command_of_each_job(open_page, sweep_app, theme):
    url, folder, rows = sweep_app
    write_rows(folder, [rows[0], {**rows[1], "status": "not run"}])
    page = open_page(url, theme)
    page.get_by_role("tab", name="Sweep", selected=True).wait_for()
    assert page.get_by_role("tab").count() == 1 and page.get_by_role("button", name="Recorded runs").count() == 0
    page.get_by_role("button", name="Read it again").click()
    page.get_by_text("1 of 2 jobs of 03b_ppo have finished.").wait_for()
    page.locator(".ake-legend", has_text="most proxy possible, world 0").wait_for()
    page.get_by_text("on the 4 held-out prompts on which its jobs were evaluated").wait_for()
    write_rows(folder, rows)  # the other job finishes
    page.get_by_role("button", name="Read it again").press("Enter")
    page.get_by_text("2 of 2 jobs").wait_for()
    page.get_by_label("job", exact=True).select_option("PPO, kl_coef 0.4, seed 0")
    command = page.get_by_role("textbox", name="copy the command that runs it")
    until(page, lambda: "-p kl_coef=0.4 -p seed=0" in command.input_value(), "the command of the other job")
    assert page.get_by_role("textbox", name="copy the path of its run").input_value() == str(folder / "jobs" / "j0.4")
    assert serious_faults(page) == []
    page.set_viewport_size({"width": 390, "height": 844})
    until(page, lambda: page.locator("html").evaluate("e => e.scrollWidth") <= 390, "a page that fits a phone")
    picture(page, f"sweep_{theme}")
    assert serious_faults(page) == []
    page.reload()
    page.get_by_role("tab", name="Sweep", selected=True).wait_for()
    until(page, lambda: "kl_coef=0.4" in command.input_value(), "the place before the reload")
    for damage, words in (("", "0 of 0 jobs"), ("{", "line 1 is no row of a sweep's table")):
        (folder / "table.jsonl").write_text(damage)
        page.get_by_role("button", name="Read it again").press("Enter")
        page.get_by_text(words).wait_for()
        assert page.locator(".ake").count() == 0, "no picture of what is no longer there"
        write_rows(folder, rows)
        page.get_by_role("button", name="Read it again").press("Enter")
        page.locator(".ake").wait_for()


ANNOTATOR = """
import asyncio, sys
from pathlib import Path
from alignkit_widgets import PreferenceAnnotator
from alignkit_widgets.app import server
from alignkit_widgets.app.sweep_page import SweepPage

class Page(SweepPage):  # the app has no annotator; its page shows one as JupyterLab does, on a page that axe sees whole
    async def _read(self):
        rows = [{"prompt": f"How do I fix tablet {i}?", "a": "Use the tool.", "b": "Please wait."} for i in range(3)]
        board = PreferenceAnnotator(rows, self.folder / "labels.jsonl")
        channel = self.mount("frontier", "board", {"title": board.title}, board.receive)
        board.listeners = [channel.send]
        board.tell()

page = Page(Path(sys.argv[1]))
try:
    asyncio.run(server.serve(page, 0))
except KeyboardInterrupt:
    pass
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_annotator_has_no_serious_fault_and_labels_by_keyboard(open_page, tmp_path, theme):
    with serving(tmp_path, ("-P", "-c", ANNOTATOR)) as url:
        page = open_page(url, theme)
        page.get_by_role("button", name="Read it again").press("Enter")
        page.get_by_role("button", name="Left is better").wait_for()
        assert serious_faults(page) == []
        page.set_viewport_size({"width": 390, "height": 844})
        page.get_by_role("button", name="Left is better").press("Enter")
        page.get_by_text("1 label ·").wait_for()
        assert serious_faults(page) == []
        until(page, lambda: page.locator("html").evaluate("e => e.scrollWidth") <= 390, "a page that fits a phone")
        picture(page, f"annotator_{theme}")
        page.evaluate("document.querySelector('.akb button').style.color = 'rgb(200, 200, 200)'")
        page.evaluate("document.querySelector('.akb button').style.background = 'rgb(220, 220, 220)'")
        assert any("color-contrast" in fault for fault in serious_faults(page)), "axe sees the annotator"
    assert len((tmp_path / "labels.jsonl").read_text().splitlines()) == 1
